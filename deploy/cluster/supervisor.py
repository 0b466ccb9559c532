"""The process above a run on a cluster: starts the one that does the work, and starts it again when it is killed.

A run that exits by itself, with or without an error, has reported why and is not restarted; one that was killed (no
memory, a stray signal) or stopped and never continued goes on from its last checkpoint. It knows nothing of the run but
its folder. What becomes of a submitted job whose whole node dies is up to who submitted it (``--auto-resume``;
docs/cluster.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from deploy.stopping import on_stop_signals

_MARK = "NANOGRPO_DRIVER"
_ENDED_BY_ITSELF = (0, 1, 2, 130)
_STOPPED = 130


def is_driver() -> bool:
    """Whether this process is the child that does the work."""
    return os.environ.get(_MARK) == "1"


def supervise(
    folder: Path, max_restarts: int, pulse_s: float, *, resuming: bool, command: Sequence[str] | None = None
) -> int:
    """Runs this very command in a child, with the run's folder, and again with --resume after each time that it was
    killed; returns its exit code. Signals are passed on to it. A child that stays stopped for ``pulse_s`` seconds is
    killed."""
    command = list(command or [sys.executable, *sys.orig_argv[1:]])
    if not resuming:
        command.append(f"run.folder={folder}")  # a {date} in it must not be another one the next time
    signals: list[int] = []
    with on_stop_signals(lambda number, frame: signals.append(number)):
        for attempt in range(1, max_restarts + 2):
            code = _child(command, pulse_s, signals)
            if code in _ENDED_BY_ITSELF:
                return code
            if signals:  # stopped before it could save: there is nothing to go on with but what was saved before
                return _STOPPED
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            if attempt > max_restarts:
                break
            begun = (folder / "config.toml").is_file()
            sys.stderr.write(
                f"the driver was killed ({how}); starting it again, "
                f"{'from the last checkpoint' if begun else 'from the start'} ({attempt} of {max_restarts})\n"
            )
            if begun and not resuming:
                # Without run file and words: the folder's own configuration holds them.
                command = [*command[: command.index("train") + 1], "--resume", str(folder)]
                resuming = True
            time.sleep(1.0)
    sys.stderr.write(
        f"failed: the driver was killed ({how}) once more than cluster.max_restarts={max_restarts} allows. Go on from "
        f"the last checkpoint: nanogrpo train --resume {folder}\n"
    )
    return 1


def _child(command: Sequence[str], pulse_s: float, signals: Sequence[int]) -> int:
    # A group of its own: Ctrl-C in a terminal then comes once, through here.
    child = subprocess.Popen(command, env=os.environ | {_MARK: "1"}, process_group=0, preexec_fn=_end_with_parent)
    passed_on, stopped_since = 0, 0.0
    while True:
        for number in signals[passed_on:]:
            child.send_signal(number)
            passed_on += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.2)
        with contextlib.suppress(psutil.Error):
            if psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
                stopped_since = 0.0
            elif not stopped_since:
                stopped_since = time.monotonic()
            elif time.monotonic() - stopped_since > pulse_s:
                sys.stderr.write(f"the driver has been stopped for {pulse_s:g} s\n")
                child.kill()


def _end_with_parent() -> None:
    """Has the kernel end the child (SIGTERM: it saves) when this process dies; Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
