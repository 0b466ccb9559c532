"""Every verdict of the doctor can be reached, on this machine and between nodes; a real cluster is looked at."""

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from deploy.cluster import connection
from deploy.doctor import diagnose, machine
from deploy.doctor.machine import Finding

ROOT = Path(__file__).parent.parent
SOFTWARE = {"python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm": "0.32.0", "ray": "2.60.0",
            "peft": "0.21.2", "nanogrpo": "0.1.0"}  # fmt: skip


def needs_ray():
    return pytest.importorskip("deploy.doctor.cluster", reason="ray is not installed")


def test_a_finding_that_is_not_ok_says_what_to_do():
    with pytest.raises(AssertionError):
        Finding("a", "b", "warn")
    with pytest.raises(AssertionError):
        Finding("a", "b", "ok", "do it")
    finding = Finding("a", "b", "wrong", "do it")
    assert pickle.loads(pickle.dumps(finding)) == finding


def test_this_machine_from_end_to_end():
    findings = machine.this_machine()
    names = {finding.what for finding in findings}
    assert {"software", "vllm's needs", "devices", "cores", "memory", "shared memory", "loopback", "Ray token",
            "disk for runs", "ports 6379, 8265, 10001", "walls around rewards"} <= names  # fmt: skip
    assert "python 3" in findings[0].found
    assert "\n" not in "".join(finding.cure for finding in findings)
    console = Console(file=open(os.devnull, "w"), record=True, width=120)  # noqa: SIM115
    assert machine.show(console, "here", findings) == all(finding.verdict != "wrong" for finding in findings)
    text = console.export_text()
    assert all(finding.what in text and finding.cure in text for finding in findings)


def test_walls_around_rewards():
    """Here, and inside bubblewrap with user namespaces switched off, as in many containers."""
    here = machine.walls()
    assert here.verdict == "ok" and here.found.startswith("bubblewrap (/"), here
    own = here.found.removeprefix("bubblewrap (").removesuffix(")")
    run = subprocess.run(
        [own, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--unshare-user",
         "--disable-userns", "--", sys.executable, "-c",
         "from deploy.doctor.machine import walls; found = walls(); print(found.verdict, found.cure, sep=chr(10))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    verdict, cure = run.stdout.splitlines()
    assert verdict == "warn"
    assert cure.startswith("task.sandbox='bubblewrap': this machine cannot wall reward workers in (")


@pytest.mark.parametrize("verdict", ["ok", "warn", "wrong"])
def test_only_what_is_wrong_makes_the_answer_no(verdict):
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    finding = Finding("a", "b", verdict, "" if verdict == "ok" else "do it")
    assert machine.show(console, "here", [Finding("c", "d"), finding]) == (verdict != "wrong")


def test_software():
    assert machine.software(SOFTWARE).verdict == "ok"
    old = machine.software({**SOFTWARE, "python": "3.10.1"})
    assert old.verdict == "wrong" and "3.11" in old.cure
    lacking = machine.software({**SOFTWARE, "peft": ""})
    assert lacking.verdict == "wrong" and "install peft" in lacking.cure
    optional = machine.software({**SOFTWARE, "vllm": "", "ray": ""})
    assert optional.verdict == "warn" and "vllm and ray" in optional.cure


def test_torch_and_transformers_must_be_what_vllm_was_built_for():
    pins = ["torch==2.13.0+cpu", "transformers>=5.16.1,<5.20", "torch==2.13.0; platform_system == 'Darwin'", "numpy"]
    assert machine.vllm_fits(SOFTWARE, pins).verdict == "ok"
    other = machine.vllm_fits({**SOFTWARE, "torch": "2.13.0+cu130"}, pins)
    assert other.verdict == "wrong" and "'torch==2.13.0+cpu' (not 2.13.0+cu130)" in other.cure
    newer = machine.vllm_fits({**SOFTWARE, "transformers": "5.20.0"}, pins)
    assert newer.verdict == "wrong" and "transformers" in newer.cure and "torch" not in newer.cure.split(":")[0]
    assert machine.vllm_fits({**SOFTWARE, "torch": "2.13.0+cu130"}, ["torch==2.13.0"]).verdict == "ok"


def test_packages_that_break_beside_this_torch(tmp_path, monkeypatch):
    for name, text in {"torchvision": "raise RuntimeError('operator nms does not exist')", "torchaudio": "1 / 0",
                       "torchcodec": "x = 1"}.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    vision, audio, codec = machine.broken_companions()
    assert vision.verdict == "wrong" and "operator nms does not exist" in vision.cure
    assert audio.verdict == "warn" and "pip uninstall -y torchaudio" in audio.cure
    assert codec == Finding("torchcodec", "9.9")
    assert machine.broken_companions(("no_such_package",)) == []


@pytest.mark.vllm
def test_the_library_that_vllm_loads():
    if not machine.vllm_libraries():
        pytest.skip("vLLM's CPU build is not installed")
    missing = machine.vllm_libraries("libnot_there.so.1")[0]
    assert missing.verdict == "wrong" and "libnuma1" in missing.cure
    assert machine.vllm_libraries("libc.so.6")[0].verdict == "ok"


def test_cores_that_the_container_may_not_use():
    count = len(os.sched_getaffinity(0))
    assert machine.cores(quota=float(count)).verdict == "ok"
    limited = machine.cores(quota=count - 0.5)
    assert limited.verdict == "warn" and f"train.threads={max(1, count - 1)}" in limited.cure


def test_memory():
    assert machine.memory(need_gib=0.001).verdict == "ok"
    assert machine.memory(need_gib=1e6).verdict == "warn"


def test_shared_memory(tmp_path):
    assert machine.shared_memory(str(tmp_path), need_gib=0.001).verdict == "ok"
    assert "nearly full" in machine.shared_memory(str(tmp_path), need_gib=doctor_free(tmp_path) + 0.01).cure
    assert machine.shared_memory(str(tmp_path / "none")).verdict == "wrong"


def doctor_free(folder: Path) -> float:
    return shutil.disk_usage(folder).free / machine.GIB


def test_small_shared_memory(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        small = machine.shared_memory(str(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert small.found == "0.1 GiB, 0.1 free"
    assert small.verdict == "warn" and "--shm-size" in small.cure


def test_disk(tmp_path):
    inside = machine.disk("disk", tmp_path / "not" / "made yet", need_gib=0)
    assert inside.verdict == "ok" and inside.found.startswith(str(tmp_path))
    assert machine.disk("disk", tmp_path, need_gib=1e6).verdict == "warn"
    sealed = machine.disk("disk", Path("/proc/1"))
    assert sealed.verdict == "wrong"


def test_a_port_that_is_held_and_one_that_is_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        held = machine.ports([number])
        assert held.verdict == "warn"
        assert held.found.startswith(f"{number} held by ") and f"pid {os.getpid()}) on 127.0.0.1" in held.found
    assert machine.ports([number]) == Finding(f"ports {number}", "free")
    assert machine.loopback().verdict == "ok"


def test_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert machine.token(needed=False).verdict == "ok"
    assert "RAY_AUTH_MODE=token" in machine.token(needed=True).cure
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert machine.token().verdict == "wrong"
    assert machine.token(needed=False).verdict == "warn"
    secret = "5ecre7" * 10
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(secret)
    file.chmod(0o644)
    assert machine.token().verdict == "warn" and f"chmod 600 {file}" in machine.token().cure
    file.chmod(0o600)
    right = machine.token()
    assert right.verdict == "ok" and secret not in right.found
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert machine.token().verdict == "wrong"
    monkeypatch.setenv("RAY_AUTH_TOKEN", secret)
    assert machine.token().verdict == "ok" and secret not in machine.token().found
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert machine.token().verdict == "warn"


@pytest.mark.slow
def test_the_checksum_follows_the_source(tmp_path):
    def checksum() -> str:
        code = "from deploy.doctor.machine import source_checksum; print(source_checksum())"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    for part in ("common", "sampler", "learner", "deploy"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    first = checksum()
    assert len(first) == 12
    with (tmp_path / "learner" / "losses.py").open("a") as file:
        file.write("# another copy\n")
    assert checksum() != first


def test_differing_versions_are_named_with_their_nodes():
    nodes = needs_ray()
    same = nodes.compare({"a": SOFTWARE, "b": SOFTWARE})
    assert {finding.verdict for finding in same} == {"ok"} and len(same) == len(SOFTWARE)
    older, source = {**SOFTWARE, "ray": "2.59.0", "source": "1"}, {**SOFTWARE, "source": "2"}
    wrong = {f.what: f for f in nodes.compare({"a": source, "b": older, "c": source}) if f.verdict == "wrong"}
    assert wrong.keys() == {"same ray", "same source"}
    assert wrong["same ray"].found == "2.60.0 on a, c; 2.59.0 on b"
    assert "--working-dir" in wrong["same source"].cure
    assert "missing on b" in nodes.compare({"a": {"vllm": "1"}, "b": {"vllm": ""}})[0].found


def test_members_and_addresses():
    nodes = needs_ray()
    spread = {"x": ("n1", "10.0.0.1"), "y": ("n2", "127.0.0.1")}
    assert nodes.members(spread, {"CPU": 4}).verdict == "wrong"
    assert nodes.members({"y": ("n2", "127.0.0.1")}, {"CPU": 4}).found == "1 (y), 4 CPUs, 0 GPUs"
    assert nodes.address_of("127.0.0.1").verdict == "ok"
    assert nodes.address_of("203.0.113.9").verdict == "wrong"


def test_nobody_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert not connection.knock(address)
    assert connection.knock(address)
    assert not connection.knock("auto")
    console = Console(file=open(os.devnull, "w"), record=True, width=120)  # noqa: SIM115
    assert not diagnose.diagnose(console, True, address)
    said = " ".join(console.export_text().split())
    assert f"wrong connection: cluster.address='{address}': nothing answers there; start the head" in said


def run_script(text: str, home: Path, *wrapper: str) -> str:
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "COLUMNS": "200"}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        environment.pop(name, None)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [*wrapper, "bash", "-ec", textwrap.dedent(text)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


DOCTOR = "from rich.console import Console; from deploy.doctor.diagnose import diagnose\n"
DOCTOR += "print('answer', diagnose(Console(), True,"


BETWEEN = """
import ray
from pathlib import Path
from deploy.cluster import connection
from deploy.doctor import cluster

connection.connect("private")
actor = ray.remote(cluster.Probe)
probes = {name: actor.options(num_cpus=0).remote(ip)
          for name, ip in {"a": "127.0.0.1", "b": "127.0.0.1", "c": "203.0.113.9"}.items()}
ray.get([probe.__ray_ready__.remote() for probe in probes.values()])
for finding in cluster.collective({"a": probes["a"], "b": probes["b"]}) + cluster.collective(probes, 8.0):
    print(finding.what, "|", finding.verdict, "|", finding.found)
Path("FOLDER/file").touch()
for folder in ("FOLDER/new", "FOLDER/file"):
    print([finding.verdict for finding in cluster.shared_folder({"a": probes["a"]}, Path(folder))])
cluster._TALK_S = 0.5
print(cluster._ask({"a": probes["a"].leave_mark.remote("FOLDER/elsewhere", "a")}, 20.0)[1]["a"])
"""


@pytest.mark.ray
def test_a_private_cluster(tmp_path):
    needs_ray()
    (tmp_path / "shared").mkdir()
    said = run_script(f"""python -c "{DOCTOR} 'private', '{tmp_path}/shared'))" """, tmp_path)
    assert "node 127.0.0.1" in said
    assert "seen and written" in said
    assert "same source" in said
    assert "collective" not in said  # there is nobody else
    assert "answer True" in said
    assert not list((tmp_path / "shared").iterdir())


@pytest.mark.slow
@pytest.mark.ray
def test_between_nodes_of_which_one_cannot_be_reached(tmp_path):
    """Three probes on this machine, one at an address that no interface here has: the pairs say which it is."""
    needs_ray()
    (tmp_path / "between.py").write_text(BETWEEN.replace("FOLDER", str(tmp_path)))
    said = run_script(f"PYTHONPATH=. python {tmp_path}/between.py", tmp_path).splitlines()
    assert re.match(r"collective of a, b \| ok \| gloo adds up, \d+ MiB/s", said[0])
    assert said[1].startswith("collective of a, b, c | wrong | a: ") and "'203.0.113.9'" in said[1]
    verdicts = [line.split(" | ")[:2] for line in said[2:5]]
    assert verdicts == [["collective of a, b", "ok"], ["collective of a, c", "wrong"], ["collective of b, c", "wrong"]]
    assert said[5:7] == ["['ok']", "['wrong']"]
    assert "No such file or directory" in said[7]
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.full
@pytest.mark.ray
def test_two_nodes_in_a_network_of_their_own(tmp_path):
    """Two Ray nodes with an address each, in a network and a process namespace that end with the test."""
    needs_ray()
    wrapper = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
    if os.geteuid() or shutil.which("ip") is None or subprocess.run([*wrapper, "true"], check=False).returncode:
        pytest.skip("needs root, unshare and ip")
    said = run_script(
        f"""
        temp=$(mktemp -d /tmp/ndXXXX)  # short: sockets lie in it
        trap 'rm -rf "$temp"' EXIT
        ip link set lo up
        ip link add one type veth peer name other
        ip link set one up && ip link set other up
        ip addr add 10.9.0.1/24 dev one && ip addr add 10.9.0.2/24 dev one
        (umask 077; ray get-auth-token --generate) >/dev/null
        ray start --head --node-ip-address=10.9.0.1 --port=6379 --num-cpus=1 --include-dashboard=false \
            --disable-usage-stats --temp-dir="$temp" >&2
        ray start --address=10.9.0.1:6379 --node-ip-address=10.9.0.2 --num-cpus=1 --disable-usage-stats >&2
        python -c "{DOCTOR} '10.9.0.1:6379'))"
        """,
        tmp_path,
        *wrapper,
    )
    assert "2 (" in said and "2 CPUs" in said
    assert "node 10.9.0.1" in said and "node 10.9.0.2" in said
    assert "gloo adds up" in said and "MiB/s" in said
    assert "6379 held by ray gcs_server" in said
    assert "answer True" in said
