"""A Ray cluster of two nodes on one machine, each in a network namespace of its own, and runs submitted to it.

Three namespaces on a bridge that nothing outside them sees: the head, a worker node, and the place that jobs are
submitted from, which is no node. The nodes have addresses and a token of their own, and an interpreter that has the
requirements but not nanogrpo: what runs there was shipped with the job. ``kill_node`` ends every process of a node at
once, ``add_node`` brings it back, ``cut`` takes its link. Needs Linux, root and ``ip`` (``lacking`` says what is
missing). Left out: Ray's own logs (lost with the cluster) and containers. Used by test_two_nodes.py; as a program::

    python -m tests.cluster.two_nodes --folder /tmp/two --demo      # a real model, vLLM on both nodes
    python -m tests.cluster.two_nodes --folder /tmp/two --rounds 4  # nodes killed and links cut, with recovery times
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from common import atomic_files
from tests.cluster.disturb import ROOT, Run, weights, words
from tests.tiny import make_tiny

SHIPPED = ("common", "deploy", "learner", "sampler", "pyproject.toml", "tests/toy.py", "tests/cluster/low.py")
_MARK = "nanogrpo-"
_ADDRESS = {"head": "10.77.0.1", "node": "10.77.0.2", "other": "10.77.0.3"}  # of no meaning outside the namespaces
_OUTSIDE = "10.77.0.254"
_GCS, _JOBS = 6379, 8265
HEAD = _ADDRESS["head"]
NODE = _ADDRESS["node"]
# AdamW with its usual eps makes steps of full size out of gradients that are nothing but rounding.
SETTINGS = ("task.name=tests/cluster/low.py:Low", "optimizer.lr=2e-3", "optimizer.eps=1e-4",
            "train.prompts_per_step=8", "train.group_size=8")  # fmt: skip
SPREAD = ("cluster.mode=ray", "cluster.samplers=2", "cluster.learner_ranks=2", "cluster.spread=true")


def lacking() -> str:
    """Why no such cluster can be made here; empty when it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"{_MARK}{os.getpid()}-try"
    for line in (f"netns add {name}", f"-n {name} link add br0 type bridge", f"netns del {name}"):
        done = subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"network namespaces cannot be made here: {done.stderr.strip()}"
    return ""


class TwoNodes:
    """The running cluster. ``folder`` takes its logs, the shipped copy of the source and the runs."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self._cpus = folder, cpus
        self.source = folder / "source"
        self.token = folder / "token"
        self._temporary = Path(tempfile.mkdtemp(prefix="two-"))  # short: Ray's sockets lie in it
        self._prefix = f"{_MARK}{os.getpid()}-{secrets.token_hex(2)}-"
        self._jobs = 0

    def open(self) -> None:
        _sweep()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        ship(self.source)
        bare_python(self._temporary / "python")
        self._wire("outside", _OUTSIDE)
        for name in ("head", "node"):
            self._wire(name, _ADDRESS[name])
        self._ray_start("head", "--head", "--include-dashboard=true", f"--port={_GCS}",
                        f"--dashboard-host={HEAD}", f"--dashboard-port={_JOBS}")  # fmt: skip
        self._until(lambda: self._alive() == {HEAD}, "the head")
        self.add_node()

    def close(self) -> None:
        """Removes every process, namespace and temporary file; allowed at any point of ``open``."""
        for name in _namespaces(self._prefix):
            _remove(name)
        shutil.rmtree(self._temporary, ignore_errors=True)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def add_node(self, name: str = "node") -> None:
        """Starts a worker node and waits until the cluster has it."""
        self._ray_start(name, f"--address={HEAD}:{_GCS}")
        self._until(lambda: _ADDRESS[name] in self._alive(), name)

    def add_other_node(self) -> None:
        """A third node, without cores, which cannot reach the second one, nor it."""
        self._wire("other", _ADDRESS["other"])
        for name in ("node", "other"):  # ports of a bridge that are isolated do not see each other
            self._ip(f"-n {self._space('outside')} link set dev to-{name} type bridge_slave isolated on")
        self.add_node("other")

    def kill_node(self, name: str = "node") -> None:
        """SIGKILL for every process of a node."""
        while pids := _pids(self._space(name)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self, name: str = "node", up: bool = False) -> None:
        """Takes a node's link, without its processes noticing (or gives it back)."""
        self._ip(f"-n {self._space('outside')} link set to-{name} {'up' if up else 'down'}")

    def until_lost(self, since: float, name: str = "node", limit_s: float = 120) -> float:
        """Waits until Ray has declared a node dead, and returns the seconds since then (on the monotonic clock)."""
        self._until(lambda: _ADDRESS[name] not in self._alive(), f"the loss of {name}", limit_s)
        return time.monotonic() - since

    def listening(self) -> list[str]:
        """Where Ray's processes, which are known by this cluster's folder, listen in the machine's own namespace."""
        ray = [one.pid for one in psutil.process_iter() if str(self._temporary) in " ".join(_command_line(one))]
        assert ray, "no process of the cluster was found"
        return [
            f"{one.laddr.ip}:{one.laddr.port} by process {one.pid}"
            for one in psutil.net_connections("tcp")  # of the namespace that asks
            if one.status == psutil.CONN_LISTEN and one.pid in ray
        ]

    # -- work on it --------------------------------------------------------------------------------------------------

    def submit(self, settings: Sequence[str], run_file: str = "empty.toml") -> Run:
        """``ray job submit`` from outside the nodes, as a user does; its output, the job's included, is ``Run.said``.
        The job's own exit code is ``exit_code``."""
        (self.source / "empty.toml").touch()
        return self._submitted(settings, "train", run_file, "--auto-resume", *settings)

    def submit_words(self, *words: str) -> Run:
        """Another ``nanogrpo`` command as a job."""
        return self._submitted(["run.folder=/nowhere"], *words)

    def _submitted(self, settings: Sequence[str], *words: str) -> Run:
        self._jobs += 1
        command = [
            *self._ray("job", "submit", "--address", f"http://{HEAD}:{_JOBS}", "--submission-id", f"run-{self._jobs}"),
            "--working-dir", str(self.source), "--", "python", "-m", "deploy.cli", *words,
        ]  # fmt: skip
        log = self.folder / f"job-{self._jobs}.log"
        return Run(list(settings), log, self._in("outside", command))

    def exit_code(self, job: int | None = None) -> int | None:
        """Of a job (the last one submitted), by what Ray's job server says."""
        answer = self._get(f"/api/jobs/run-{job or self._jobs}")
        code = answer.get("driver_exit_code")
        return None if code is None else int(code)

    def inside(self, words: Sequence[str], token: Path | None = None) -> subprocess.Popen[str]:
        """Starts a command on the head node itself, in the shipped source; both its outputs in one."""
        command = self._in("head", list(words), token)
        return subprocess.Popen(command, cwd=self.source, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    # -- plumbing ----------------------------------------------------------------------------------------------------

    def _space(self, name: str) -> str:
        return self._prefix + name

    def _ip(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)

    def _wire(self, name: str, address: str) -> None:
        """A namespace with this address, on the bridge in the one called outside."""
        space, hub = self._space(name), self._space("outside")
        self._ip(f"netns add {space}")
        self._ip(f"-n {space} link set lo up")
        device = "eth0"
        if space == hub:
            device = "br0"
            self._ip(f"-n {hub} link add br0 type bridge")
        else:
            self._ip(f"-n {hub} link add to-{name} type veth peer name eth0 netns {space}")
            self._ip(f"-n {hub} link set to-{name} master br0 up")
        self._ip(f"-n {space} addr add {address}/24 dev {device}")
        self._ip(f"-n {space} link set {device} up")

    def _in(self, name: str, command: Sequence[str], token: Path | None = None) -> tuple[str, ...]:
        """The command, in a namespace and in the environment of a node."""
        environment = {
            "PATH": f"{self._temporary / 'python' / 'bin'}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token or self.token), "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        leaves = [
            word for name in os.environ if name.startswith(("RAY_", "PYTHON", "VIRTUAL_ENV")) for word in ("-u", name)
        ]
        pairs = [f"{key}={value}" for key, value in environment.items()]
        return ("ip", "netns", "exec", self._space(name), "env", *leaves, *pairs, *command)

    def _ray(self, *words: str) -> tuple[str, ...]:
        return ("python", "-m", "ray.scripts.scripts", *words)

    def _ray_start(self, name: str, *words: str) -> None:
        folder = self._temporary / name
        shutil.rmtree(folder, ignore_errors=True)
        command = self._ray(
            "start", "--block", f"--node-ip-address={_ADDRESS[name]}", f"--temp-dir={folder}", "--disable-usage-stats",
            f"--num-cpus={0 if name == 'other' else self._cpus}", "--num-gpus=0", "--object-store-memory=200000000",
            *words,
        )  # fmt: skip
        with (self.folder / f"ray-{name}.log").open("a") as log:
            subprocess.Popen(
                self._in(name, command), cwd=self._temporary, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _get(self, path: str) -> dict[str, Any]:
        """What the head's web server answers, asked from outside; nothing while it does not."""
        call = (
            "import sys, urllib.request as r; "
            "ask = r.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + open(sys.argv[2]).read()}); "
            "print(r.build_opener(r.ProxyHandler({})).open(ask, timeout=10).read().decode())"
        )
        command = self._in("outside", ["python", "-S", "-c", call, f"http://{HEAD}:{_JOBS}{path}", str(self.token)])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {}
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def _alive(self) -> set[str]:
        """Addresses of the nodes that Ray takes for alive."""
        data = self._get("/api/v0/nodes?detail=true").get("data", {})
        rows = data.get("result", {}).get("result", [])
        return {row["node_ip"] for row in rows if row["state"] == "ALIVE"}

    def _until(self, done: Callable[[], bool], what: str, limit_s: float = 120) -> None:
        until = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > until:
                logs = "\n".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("ray-*.log")))
                raise TimeoutError(f"waited {limit_s:g} s for {what}:\n{logs}")
            time.sleep(0.2)


@contextlib.contextmanager
def two_nodes(folder: Path, cpus: int = 2) -> Iterator[TwoNodes]:
    """The cluster, removed whole at the end, however that comes."""
    cluster = TwoNodes(folder, cpus)
    try:
        cluster.open()
        yield cluster
    finally:
        cluster.close()


def ship(folder: Path) -> None:
    """A copy of what a job needs of the source."""
    for part in SHIPPED:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / part, folder / part)


def bare_python(folder: Path) -> None:
    """A virtual environment with everything that this one has, except nanogrpo."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    there = next((folder / "lib").glob("python*/site-packages"))
    here = {Path(place) for place in sys.path if place.endswith(("site-packages", "dist-packages"))}
    for package in (entry for place in sorted(here) for entry in place.iterdir()):
        if "nanogrpo" not in package.name and not (there / package.name).exists():
            (there / package.name).symlink_to(package)


def wait_for(run: Run, text: str, limit_s: float = 180) -> None:
    """Until the run has said this."""
    until = time.monotonic() + limit_s
    while text not in run.said:
        assert run.process.poll() is None, f"the run ended:\n{run.said[-3000:]}"
        assert time.monotonic() < until, f"{text!r} was not said in {limit_s:g} s:\n{run.said[-3000:]}"
        time.sleep(0.1)


def furthest(one: Path, other: Path) -> float:
    """The largest difference between the final weights of two runs."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _namespaces(prefix: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(prefix)]


def _pids(space: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in listed.split()]


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _remove(space: str) -> None:
    """A namespace and every process in it."""
    until = time.monotonic() + 20
    while (pids := _pids(space)) and time.monotonic() < until:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _sweep() -> None:
    """Removes what a process that was killed itself has left."""
    for name in _namespaces(_MARK):
        owner = name.removeprefix(_MARK).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(name)


def rounds(folder: Path, count: int, steps: int = 8) -> None:
    """Loses a node in each of the ways there are, one run each, and prints a table."""
    model = make_tiny(folder / "model")
    plain = Run(words(model, folder / "plain", steps, *SETTINGS), folder / "plain.log")
    assert plain.wait() == 0, plain.said
    print("| lost by | on_lost_node | Ray says dead after s | a step further after s | from the undisturbed run |")
    print("|---|---|---|---|---|", flush=True)
    with two_nodes(folder / "two") as cluster:
        kinds = [(how, policy) for policy in ("wait", "shrink") for how in ("SIGKILL", "cut link")]
        for number in range(count):
            how, policy = kinds[number % len(kinds)]
            place = folder / f"lost-{number}"
            settings = words(model, place, steps, *SETTINGS, *SPREAD, f"cluster.on_lost_node={policy}")
            run = cluster.submit([*settings, "timeouts.pulse_s=10"])
            run.wait_for_step(4)
            started = time.monotonic()
            if how == "SIGKILL":
                cluster.kill_node()
            else:
                cluster.cut()
            time.sleep(0.5)  # a step that had been done may still be written
            before = run.step()
            if policy == "shrink":
                run.wait_for_step(before + 1)
                seconds = time.monotonic() - started
            dead = cluster.until_lost(started)
            cluster.kill_node()  # one that was cut off must not come back with what it holds
            cluster.cut(up=True)
            if policy == "wait":
                wait_for(run, "waiting for room for learner rank")
                cluster.add_node()
                run.wait_for_step(before + 1)
                seconds = time.monotonic() - started
            assert run.wait() == 0, run.said
            far = furthest(place, folder / "plain")
            print(f"| {how} | {policy} | {dead:.1f} | {seconds:.1f} | {far:.1e} |", flush=True)
            if policy == "shrink":
                cluster.add_node()


def blocked(folder: Path) -> None:
    """What the doctor says of nodes that do not reach each other."""
    with two_nodes(folder / "blocked") as cluster:
        cluster.add_other_node()
        run = cluster.submit_words("doctor", "--cluster")
        print(f"exit code {run.wait(600)}\n{run.said}")


def demo(folder: Path, steps: int = 8) -> None:
    """A real model: vLLM on both nodes, the learner shared by both, rewards printed as they come."""
    with two_nodes(folder / "two") as cluster:
        place = folder / "demo"
        settings = [f"run.folder={place}", f"train.steps={steps}", "train.prompts_per_step=8", "train.threads=1",
                    "eval.questions=0", "run.save_every=4", "run.console=plain", *SPREAD]  # fmt: skip
        run = cluster.submit(settings, run_file="deploy/configs/demo.toml")
        code = run.wait(3600)
        print(run.said)
        for row in atomic_files.read_json_lines(place / "metrics.jsonl"):
            print({name: round(row[name], 3) for name in ("step", "reward_mean", "sync_transport", "time")})
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--demo", action="store_true", help="train SmolLM2-135M for a few steps")
    parser.add_argument("--rounds", type=int, default=0, help="lose a node so often")
    parser.add_argument(
        "--blocked", action="store_true", help="ask the doctor about nodes that do not reach each other"
    )
    chosen = parser.parse_args()
    if why := lacking():
        sys.exit(why)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if chosen.rounds:
        rounds(chosen.folder, chosen.rounds)
    if chosen.blocked:
        blocked(chosen.folder)
    if chosen.demo:
        demo(chosen.folder)


if __name__ == "__main__":
    main()
