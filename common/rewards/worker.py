"""A reward worker: a process that makes its own task, inside walls (``common/rewards/sandbox.py``), and scores groups.

``Worker`` is this process's side, ``serve`` the other's. It is a plain ``python -c`` process with a pipe: a fork would
copy torch's threads, and multiprocessing's spawn and forkserver would run the user's ``__main__`` again. Its messages
are JSON and are checked: a pickle could run code of a model's text in this process.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from logging import Logger
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

from common.errors import RunFailure, UserError, printable
from common.plugins import make_task, one_line, where
from common.rewards import sandbox
from common.types import LARGEST_REWARD, Completion, Group, Prompt

if TYPE_CHECKING:
    from common.config import TaskConfig
    from common.protocols import Task

START_TIMEOUT_S = 120.0
"""Seconds that a worker may take to import and make its task."""
_SHOWN_CHARACTERS = 2000
_TRACEBACK_FRAMES = 50
_TRACEBACK_CHARACTERS = 20_000
_LOOK_S = 0.25
"""Seconds between two looks at what a worker uses while it scores."""
_MESSAGE_S = 5  # that a message may stand still in its middle
_MESSAGE_BYTES = 2**20
"""The longest message that a worker sends."""
_PRINTED_LINES = 10_000
"""Lines of a worker that are written to the log."""

Job = Literal["rewards", "is_correct"]


@dataclass(frozen=True)
class RewardError:
    """A completion that could not be scored."""

    group: Group
    index: int
    """Of the completion in its group."""
    reward: str
    """The reward that failed, or ``is_correct``."""
    error: str
    """What happened, in a few words."""
    ran_over: bool = False
    """It ran past its time or memory, or its process died; else it raised."""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.reward!r} failed on completion {self.index} of prompt {self.group.prompt.id!r}: {self.error}"


class _LostError(Exception):
    """The worker is unusable and must be killed; the reason in a few words."""


class Worker:
    """A worker process, as one thread of this process sees it. Started again at the next question after its end."""

    def __init__(self, config: TaskConfig, rewards: tuple[str, ...], log: Logger) -> None:
        self._config, self._rewards, self._log = config, rewards, log
        self._process: subprocess.Popen[str] | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=5)
        self._start()

    def revive(self) -> None:
        """Before each question, outside the time in which the worker may be interrupted for it."""
        if self._doomed or self._process is None or self._process.poll() is not None:
            self.kill()  # interrupted, killed, or dead since the last question: nothing that this group did
            self._start()

    def ask(self, job: Job, group: Group) -> list[Any] | RewardError:
        """One answer for each completion of the group, or the first failure; after it, the rest is not asked."""
        try:
            question = pickle.dumps((job, group))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UserError(
                f"task.name={self._config.name!r} gives prompt {group.prompt.id!r} data that no reward worker can get "
                f"({error}); use JSON values"
            ) from error
        # Beyond each completion's limit: a worker that is stopped reads no question, and one may send a byte at a time.
        limit_s = START_TIMEOUT_S + (len(group.completions) + 1) * self._config.reward_timeout_s
        timer = threading.Timer(limit_s, self.interrupt)
        timer.daemon = True
        timer.start()
        try:
            if not self._ready:
                self._wait_until_ready()
            return self._answers(question, job, group)
        finally:
            timer.cancel()

    def _answers(self, question: bytes, job: Job, group: Group) -> list[Any] | RewardError:
        names, kind = (self._rewards, float) if job == "rewards" else ((job,), bool)
        answers: list[Any] = []
        reward: str = job
        try:
            with contextlib.suppress(OSError):  # it died; the pipe's end shows it below
                self._pipe.send_bytes(question)
            while (index := len(answers)) < len(group.completions):
                reward, deadline, to_begin = job, time.monotonic() + self._config.reward_timeout_s, set(names)
                while index == len(answers):
                    match self._receive(index, deadline, f"task.reward_timeout_s={self._config.reward_timeout_s:g}"):
                        case "began", str(name) if name in to_begin:
                            to_begin.remove(name)  # an endless stream of these would never be timed
                            reward = name
                        case "failed", [str(brief), bool(ran_over), str(trace)]:
                            return RewardError(group, index, reward, printable(brief, one_line=True), ran_over, trace)
                        case "answer", dict(values) if set(values) == set(names) and all(
                            type(value) is kind and abs(value) <= LARGEST_REWARD for value in values.values()
                        ):
                            answers.append(values if job == "rewards" else values[job])
                        case _:
                            raise self._died()
        except _LostError as error:
            self.kill()
            return RewardError(group, len(answers), reward, str(error), ran_over=True)
        return answers

    def _receive(self, index: int, deadline: float, limit: str) -> tuple[Any, Any]:
        """The worker's next message, which must be about this completion."""
        assert self._process is not None
        try:
            # Polled even when the time is up: an answer that has arrived counts, however busy this process was.
            while not self._pipe.poll(min(_LOOK_S, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    raise _LostError(f"ran past {limit}")
                if excess := sandbox.excess(self._config, self._process.pid):
                    raise _LostError(excess)
            what, number, value = json.loads(self._pipe.recv_bytes(_MESSAGE_BYTES))
        except (EOFError, OSError, ValueError, TypeError, RecursionError):
            raise self._died() from None
        if number != index:
            raise _LostError(f"its worker answered for completion {number!r:.20}")
        return what, value

    def _wait_until_ready(self) -> None:
        try:
            match self._receive(-1, time.monotonic() + START_TIMEOUT_S, f"{START_TIMEOUT_S:g} s"):
                case "ready", None:
                    self._ready = True
                case "failed", str(reason):
                    self.kill()
                    raise RunFailure(f"a reward worker cannot make its task: {printable(reason, one_line=True)}")
                case _:
                    raise self._died()
        except _LostError as error:
            self.kill()
            raise RunFailure(f"a reward worker did not make task {self._config.name!r}: {error}") from None

    def interrupt(self) -> None:
        """From any thread: the process and what it started die, and the thread that waits for it finds its pipe at the
        end."""
        process, self._doomed = self._process, True
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
                os.killpg(process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """From the thread that asks, or when none does."""
        self.interrupt()
        process, self._process = self._process, None
        if process is not None:
            process.wait()
            self._pipe.close()
            self._reader.join(timeout=1.0)

    def _died(self) -> _LostError:
        """How its process ended, and what it wrote last."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=1.0)
            if code > 128 and self._config.sandbox != "none":
                code = 128 - code  # as a shell does, bubblewrap reports a signal by its own exit code
            how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        except subprocess.TimeoutExpired:
            how = "it lives, but closed its pipe or wrote what is no message"
        self.kill()
        last = f"; its last lines: {' / '.join(self._last_lines)}" if self._last_lines else ""
        return _LostError(f"its worker process died ({how}{last})")

    def _start(self) -> None:
        config = self._config
        # It must find `common` and the user's modules wherever this process found them.
        code = f"import sys, json; sys.path[:] = json.loads(sys.argv[2]); from {__name__} import serve; serve()"
        self._pipe, theirs = Pipe()
        with socket.socket(fileno=os.dup(self._pipe.fileno())) as ours:
            # A message that stops in its middle is a worker's end: while it is read nothing looks at limits.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _MESSAGE_S, 0))
        with theirs:
            words = [sys.executable, "-u", "-c", code, str(theirs.fileno()), json.dumps(sys.path)]
            try:
                # In a session of its own: killed with whatever it started, and out of reach of the terminal's Ctrl-C.
                self._process = subprocess.Popen(
                    [*sandbox.command(config), *words], env=sandbox.environment(config), pass_fds=[theirs.fileno()],
                    start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, errors="replace",
                )  # fmt: skip
            except OSError as error:
                raise RunFailure(
                    f"a reward worker process cannot be started: {error}; free memory or processes"
                ) from error
        self._doomed = False  # killed, though it may not be dead yet
        self._ready = False
        self._last_lines.clear()
        self._reader = threading.Thread(target=self._log_lines, args=(self._process,), daemon=True)
        self._reader.start()
        with contextlib.suppress(OSError):  # it died at once; the wait for its readiness reports it
            self._pipe.send((config.name, config.options, config.reward_timeout_s, sandbox.memory_bytes(config)))

    def _log_lines(self, process: subprocess.Popen[str]) -> None:
        """Logs each line that rewards print."""
        assert process.stdout is not None
        with process.stdout as lines:
            count = 0
            while line := lines.readline(_SHOWN_CHARACTERS):  # a piece of a longer one: it may be endless
                self._last_lines.append(printable(line.rstrip(), one_line=True))
                count += 1
                if count <= _PRINTED_LINES:
                    self._log.info("a reward printed: %s", line.rstrip())
                if count == _PRINTED_LINES:
                    self._log.warning("a reward printed %d lines; what this worker prints now is not kept", count)


def serve() -> None:
    """The worker's life: make the task, then answer groups until the parent goes away."""
    # What stops a whole job, as Ray does, signals this process too; the run ends it once its step is done. A
    # function, because what a task starts would inherit that a signal is ignored.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)

    def send(what: str, number: int, value: Any) -> None:
        pipe.send_bytes(json.dumps((what, number, value)).encode())

    name, options, limit_s, memory = pipe.recv()
    if memory is not None:
        sandbox.limit(memory)
    try:
        with _without_copies():
            task = make_task(name, options)
    except UserError as error:
        send("failed", -1, str(error))
        return
    send("ready", -1, None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    while True:
        try:
            job, group = pipe.recv()
        except EOFError:
            return
        for index, completion in enumerate(group.completions):
            # The parent kills a late worker long before this; it is for a parent that died itself. Unlike a signal or
            # a thread of ours, this timer also ends code that never gives up the interpreter (a hopeless regex).
            faulthandler.dump_traceback_later(2 * limit_s + 60, exit=True, file=nowhere)
            if memory is not None:
                sandbox.limit_cpu(limit_s)
            with _without_copies():
                values, failure = _answer(task, job, group.prompt, completion, partial(send, "began", index))
            send("failed" if failure else "answer", index, failure or values)
            faulthandler.cancel_dump_traceback_later()
            if failure:
                break


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """Ends a copy of the worker that comes back from the code inside (``os.fork``): it would answer in its place."""
    own = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != own:
            print("a process that a reward forked came back from it; it ends here, and its result is not used",
                  flush=True)  # fmt: skip
            os._exit(1)


def _answer(
    task: Task, job: Job, prompt: Prompt, completion: Completion, begin: Callable[[str], None]
) -> tuple[dict[str, float | bool], tuple[str, bool, str] | None]:
    """Each reward's number, or whether it is correct; or the error in a few words, whether it ran past a limit, and its
    traceback."""
    functions: Mapping[str, Callable[..., Any]] = task.rewards if job == "rewards" else {job: task.is_correct}
    values: dict[str, float | bool] = {}
    try:
        for name, function in functions.items():
            begin(name)
            with _without_copies():
                values[name] = _checked(job, function(prompt, completion))
        return values, None
    except (Exception, SystemExit) as error:  # reported, and never taken for a score
        brief = shortened(str(error) if isinstance(error, _UnfitError) else one_line(error))
        if error.__traceback__ and error.__traceback__.tb_next and not isinstance(error, _UnfitError):
            brief += f" ({where(error, __file__)})"
        # Of an endless recursion the end is enough.
        trace = "".join(traceback.format_exception(error, limit=-_TRACEBACK_FRAMES)).rstrip()
        return {}, (brief, isinstance(error, MemoryError | RecursionError), trace[-_TRACEBACK_CHARACTERS:])


class _UnfitError(Exception):
    """A reward returned what is no score."""


def _checked(job: Job, value: Any) -> float | bool:
    if job == "is_correct":
        if value not in (True, False):
            raise _UnfitError(f"returned {value!r}, which is neither True nor False")
        return bool(value)
    if not isinstance(value, SupportsFloat):
        raise _UnfitError(f"returned {value!r}, which is not a number")
    number = float(value)
    if not abs(number) <= LARGEST_REWARD:
        why = f"beyond {LARGEST_REWARD:g}" if math.isfinite(number) else "not finite"
        raise _UnfitError(f"returned {number:g}, which is {why}")
    return number


def shortened(text: str) -> str:
    """At most as much of a text as the log takes."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}… ({len(text)} characters)"
