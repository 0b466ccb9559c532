"""The signals that ask a run to stop, for the run itself (``deploy/run.py``) and for the process above it
(``deploy/cluster/supervisor.py``)."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console


@contextlib.contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP go to the handler. Under ``nohup`` a SIGHUP stays ignored."""
    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Stopping:
    """Whether the run was asked to stop: the first signal asks it to save and stop after its step, or ends it at once
    before the first step, because there is nothing to save yet; a second Ctrl-C ends it at once. The first call of this
    marks the start of the steps."""

    def __init__(self, console: Console) -> None:
        self._console, self._asked, self._begun = console, False, False
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __call__(self) -> bool:
        self._begun = True
        return self._asked

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal."""
        if number == signal.SIGHUP:  # the terminal is closed, and writing to it fails
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in self._terminals:
                os.dup2(nowhere, fd)
            os.close(nowhere)
        if not self._begun or (self._asked and number == signal.SIGINT):
            raise KeyboardInterrupt("stopped before its first step, so nothing was saved" if not self._begun else "")
        self._asked = True
        self._console.print("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without one")
