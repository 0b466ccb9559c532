"""Every wait has a limit, and its end names the side that was waited for.

Work in this process cannot be cut off from outside when it hangs inside a library's C code, so a watchdog thread says
what hung, writes every thread's stack to the error stream, and ends the process with exit code 1. The last checkpoint
is whole (files are written whole or not at all).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def bounded(side: str, doing: str, timeout_s: float) -> Iterator[None]:
    """Ends the process if the block takes longer than ``timeout_s`` seconds."""
    timer = threading.Timer(timeout_s, _give_up, args=(side, doing, timeout_s))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(side: str, doing: str, timeout_s: float) -> None:
    sys.stderr.write(
        f"\nfailed: the {side} was still {doing} after {timeout_s:g} s. Raise the limit under [timeouts], or go on "
        "from the last checkpoint with --resume. The stacks of all threads:\n"
    )
    faulthandler.dump_traceback(sys.stderr)
    sys.stderr.flush()
    os._exit(1)
