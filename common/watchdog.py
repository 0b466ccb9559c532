"""Every wait has a limit, and its end names the side that was waited for and the setting that raises the limit.

Work in this process cannot be cut off from outside when it hangs inside a library's C code, so a watchdog thread names
what hung, writes every thread's stack to the error stream, and ends the process with exit code 1. The last checkpoint
is whole (files are written whole or not at all).

A wait that can end by itself (a future's) has the same limit and comes first, so that the process can close what it
has opened; the watchdog is for the rest (a sampler in this process does its work inside ``Future.result``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TypeVar

from common.errors import RunFailure

T = TypeVar("T")


@contextlib.contextmanager
def time_limit(side: str, doing: str, timeout_s: float, setting: str = "") -> Iterator[None]:
    """Ends the process if the block takes longer than ``timeout_s`` seconds. ``setting``: the key of that limit, if it
    has one."""
    timer = threading.Timer(timeout_s, _give_up, args=(side, doing, timeout_s, setting))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def result(future: Future[T], side: str, doing: str, timeout_s: float, setting: str) -> T:
    """The future's answer. Raises ``RunFailure`` after ``timeout_s`` seconds, and whatever the future holds.

    A future that works inside ``result`` and hangs there is ended by the watchdog a twentieth later.
    """
    with time_limit(side, doing, 1.05 * timeout_s + 1, setting):
        try:
            return future.result(timeout=timeout_s)
        except TimeoutError:
            if future.done():  # the work's own error, not that of waiting
                raise
            future.cancel()
            raise RunFailure(late(side, doing, timeout_s, setting)) from None


def late(side: str, doing: str, timeout_s: float, setting: str = "") -> str:
    """The one sentence for a wait that reached its limit."""
    cure = f"; raise {setting} if it needs longer" if setting else ""
    return f"the {side} was still {doing} after {timeout_s:g} s{cure}"


def _give_up(side: str, doing: str, timeout_s: float, setting: str) -> None:
    sys.stderr.write(
        f"\nfailed: {late(side, doing, timeout_s, setting)}. A run goes on from its last checkpoint with --resume. "
        "The stacks of all threads:\n"
    )
    faulthandler.dump_traceback(sys.stderr)
    sys.stderr.flush()
    os._exit(1)
