"""A Python process of our own beside this one, and the pipe to it.

It begins from nothing, not as a copy of this process: a copy would hold the locks of threads that it has not, and
multiprocessing's ``spawn`` would run the user's ``__main__`` again. It has a session of its own, so that ``kill`` takes
whatever it started along, and Ctrl-C in the terminal does not reach it.

Left out: what travels through the pipe (``common/rewards/scorer.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any


def start(
    serve: str, *words: str, inside: Sequence[str] = (), **options: Any
) -> tuple[subprocess.Popen[Any], Connection]:
    """A process that calls ``serve`` (``package.module:function``), which finds its end of the pipe by ``pipe`` and
    ``words`` in ``sys.argv[3:]``; and our end. ``inside`` is a command that runs what follows it (a sandbox);
    ``options`` are ``Popen``'s.

    Raises ``OSError`` when there can be no further process.
    """
    module, name = serve.split(":")
    # It must find `common` and the user's modules wherever this process found them.
    code = f"import sys, json; sys.path[:] = json.loads(sys.argv[2]); from {module} import {name}; {name}()"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [*inside, sys.executable, "-u", "-c", code, str(theirs.fileno()), json.dumps(sys.path), *words],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, **options,
        )  # fmt: skip
        return process, Connection(ours.detach())


def pipe() -> Connection:
    """The process's own end, which nothing that it starts inherits."""
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    return Connection(fd)


def kill(process: subprocess.Popen[Any]) -> None:
    """Ends it and what it started; does not wait."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
        os.killpg(process.pid, signal.SIGKILL)
