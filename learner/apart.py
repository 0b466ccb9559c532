"""Calls functions in fresh copies of a process that has no threads.

A copy of a training process itself (a fork) would hold the locks of threads that it has not: Ray's, the console's,
torch's. It may then wait for ever, and so may the process that it is copied from.

Left out: what is called (``learner/memory.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any

from common import child
from common.errors import RunFailure


class Apart:
    """``imports``: the modules that the helper imports once, for every copy."""

    def __init__(self, *imports: str) -> None:
        self._imports = imports
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection
        self._said: IO[bytes]

    def start(self) -> None:
        """Starts the helper, if it does not run; its imports take seconds that a caller can use for other work.

        Raises ``RunFailure`` when there can be no further process.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process, self._pipe = child.start(
                "learner.apart:_serve", json.dumps(self._imports), stdout=subprocess.DEVNULL, stderr=self._said,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            self._said.close()
            raise RunFailure(f"a helper process cannot be started: {error}; free memory, processes or files") from error

    def call(self, function: Callable[..., Any], *args: Any, limit_s: float, imports: Sequence[str] = ()) -> Any:
        """``function(*args)``, in a copy of the helper that has imported ``imports`` where they exist.

        Raises what the function raised; ``RunFailure`` when there is no answer within ``limit_s`` seconds, or the copy
        died. Everything must pickle.
        """
        self.start()
        name = function.__name__
        try:
            self._pipe.send((function, args, list(imports)))
            if not self._pipe.poll(limit_s):
                raise RunFailure(f"{name} did not answer within {limit_s:g} s")
            ended, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise RunFailure(f"the process of {name} died; it last said: {self._last_words()}") from None
        except BaseException:
            self._end()  # or its answer would be the next call's
            raise
        if ended == "died":
            raise RunFailure(f"the process of {name} died (exit code {answer}); it last said: {self._last_words()}")
        if ended == "raised":
            raise answer
        return answer

    def close(self) -> None:
        """Ends the helper; the next call starts another."""
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        child.kill(process)  # and the copy at work with it
        process.wait()
        self._pipe.close()
        self._said.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        self._end()
        return next((line for line in reversed(lines) if line.strip()), "nothing")


def _serve() -> None:
    """The helper's life: import, then make a copy for each call, until the parent goes away."""
    pipe, parent = child.pipe(), os.getppid()
    for name in json.loads(sys.argv[3]):
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    while True:
        try:
            function, args, imports = pipe.recv()
        except EOFError:
            return
        for name in imports:
            with contextlib.suppress(Exception):  # whoever needs it will say what is wrong with it
                importlib.import_module(name)
        copy = fork.Process(target=_answer, args=(pipe, function, args))
        copy.start()
        while copy.exitcode is None:
            copy.join(1.0)
            if os.getppid() != parent:
                copy.kill()
                return
        if copy.exitcode:
            pipe.send(("died", copy.exitcode))


def _answer(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        answer = ("returned", function(*args))
    except Exception as error:  # handed on
        try:
            answer = ("raised", pickle.loads(pickle.dumps(error)))
        except Exception:
            answer = ("raised", RuntimeError(f"{type(error).__name__}: {error}"))
    pipe.send(answer)
    os._exit(0)
