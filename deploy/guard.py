"""The process above a run on a cluster: starts the one that does the work, and starts it again when it is killed.

A run that ends by itself, well or badly, has said why and is left alone; one that was killed (no memory, a stray
signal) goes on from its last checkpoint. It knows nothing of the run but its folder. What becomes of a submitted job
whose whole node dies is up to who submitted it (``--auto-resume``; see deploy/README.md).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_MARK = "NANOGRPO_DRIVER"
_ENDED_BY_ITSELF = (0, 1, 2, 130)


def is_driver() -> bool:
    """Whether this process is the child that does the work."""
    return os.environ.get(_MARK) == "1"


def watch(folder: Path, max_restarts: int, *, resuming: bool, command: Sequence[str] | None = None) -> int:
    """Runs this very command in a child, again with --resume after each time that it was killed, and returns its exit
    code. Signals are passed on to it."""
    command = list(command or [sys.executable, "-m", "deploy.cli", *sys.argv[1:]])
    for attempt in range(max_restarts + 1):
        code = _child(command)
        if code in _ENDED_BY_ITSELF:
            return code
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if attempt == max_restarts:
            break
        begun = (folder / "config.toml").is_file()
        sys.stderr.write(
            f"the driver was killed ({how}); starting it again, "
            f"{'from the last checkpoint' if begun else 'from the start'} ({attempt + 1} of {max_restarts})\n"
        )
        if begun and not resuming:
            command = _resuming(command, folder)
            resuming = True
        time.sleep(1.0)
    sys.stderr.write(
        f"failed: the driver was killed ({how}) once more than cluster.max_restarts={max_restarts} allows. Go on from "
        f"the last checkpoint: nanogrpo train --resume {folder}\n"
    )
    return 1


def _resuming(command: Sequence[str], folder: Path) -> list[str]:
    """The same command, going on with the run in the folder: without run file, and with its settings, which the
    folder's own configuration already holds."""
    at = command.index("train")
    return [*command[: at + 1], "--resume", str(folder)]


def _child(command: Sequence[str]) -> int:
    child = subprocess.Popen(command, env=os.environ | {_MARK: "1"})

    def pass_on(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the whole terminal; a signal to this process alone must be handed down.
        if number != signal.SIGINT or not sys.stdin.isatty():
            child.send_signal(number)

    kept = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
