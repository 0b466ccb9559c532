"""Scores groups of completions in worker processes, under a time limit for each completion.

A reward is somebody's code that reads whatever a model came to write, so it may raise, hang or take its process down,
and it may run what it reads. Each worker makes its own task, inside walls (``common/rewards/sandbox.py``), and scores a
group a completion at a time; one that is late is killed and replaced. No score is ever made up: a completion that could
not be scored stops the run or leaves its whole group out. Every answer has its completion's number and comes from the
worker itself: a copy of it that a reward makes (``os.fork``) and that comes back ends there.

The workers are plain ``python -c`` processes with a pipe, not ``multiprocessing`` ones. A fork would copy a parent with
torch's threads in it; spawn and forkserver would run the parent's main script again in every worker. Here a worker
imports the task and what the task imports, and what it prints goes to the log rather than across the console.
What comes from a worker is JSON: a pickle would run as code here whatever a model's text had made of it there.

Left out: advantages (``learner/loss/advantages.py``). Used by the training loop and by evaluation.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import logging
import math
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsFloat

from common.errors import RunFailure, UserError, printable
from common.plugins import make_task, where
from common.rewards import sandbox, subprocess_pipe
from common.types import LARGEST_REWARD, Completion, Group, Prompt

if TYPE_CHECKING:
    from common.config import TaskConfig
    from common.protocols import Task

START_TIMEOUT_S = 120.0
"""Seconds that a worker may take to import and make its task."""
_SHOWN_CHARACTERS = 2000
"""How much of a completion that could not be scored is written to the log."""
_TRACEBACK_FRAMES = 50
_TRACEBACK_CHARACTERS = 20_000
_LOOK_S = 0.25
"""Seconds between two looks at what a worker uses while it scores."""
_MESSAGE_BYTES = 2**20
"""The longest message that a worker sends."""
_BROKEN_OFF_S = 30
"""Seconds that a message to or from a worker may stop in its middle."""
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
    """What it did, in a few words."""
    ran_over: bool = False
    """It ran past its time or memory, or its process died; else it raised."""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.reward!r} failed on completion {self.index} of prompt {self.group.prompt.id!r}: {self.error}"


class Scorer:
    """Adds rewards to groups. Workers start with it and end with ``close``; use it as a context manager."""

    def __init__(self, task_config: TaskConfig, log: logging.Logger | None = None) -> None:
        self._config = task_config
        self._log = log or logging.getLogger("nanogrpo.rewards")
        sandbox.command(task_config)
        # Made here as well, so that a task that cannot be made is a clear error now and not a dead worker later.
        self.task: Task = make_task(task_config.name, task_config.options)
        self.weights = _weights(self.task, task_config.reward_weights)
        """The weight of each named reward in this run."""
        self._workers = [_Worker(task_config, self.task, self._log) for _ in range(task_config.reward_workers)]
        self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="rewards")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()  # never empty for a thread: one worker for each
        for worker in self._workers:
            self._idle.put(worker)
        self._lock = threading.Lock()  # who asks which worker, and the end
        self._closed = False

    def begin(self) -> Scoring:
        """A request's groups to come, each scored from the moment it is added."""
        return Scoring(self, "rewards")

    def score(self, groups: Sequence[Group]) -> tuple[list[Group], list[RewardError]]:
        """``Scoring.result`` of groups that are all there."""
        return self.begin().result(groups)

    def correct(self, groups: Sequence[Group]) -> list[list[bool]]:
        """``task.is_correct`` of every completion, in order.

        A failure raises ``RunFailure`` or leaves that group's list empty, by the same two settings: it was not judged,
        and must not be counted.
        """
        answers, _ = Scoring(self, "is_correct").answers(groups)
        return [[] if answer is None else answer for answer in answers]

    def close(self) -> None:
        """Ends the workers, and with them what is being scored. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.interrupt()
        self._threads.shutdown()
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _stops(self, error: RewardError) -> bool:
        return (self._config.on_reward_timeout if error.ran_over else self._config.on_reward_error) == "stop"

    def _total(self, rewards: dict[str, float]) -> float:
        return math.fsum(self.weights[name] * value for name, value in rewards.items())


class Scoring:
    """The scoring of one request's groups, which go to whichever worker is free, those added first first."""

    def __init__(self, scorer: Scorer, job: Job) -> None:
        self._scorer, self._job = scorer, job
        self._asked: dict[int, tuple[Group, Future[list[Any] | RewardError | None]]] = {}
        self._busy: set[_Worker] = set()
        self._stopped = False

    def add(self, index: int, group: Group) -> None:
        """From any thread: the request's group ``index`` is there. Neither waits nor raises."""
        with self._scorer._lock:
            if index not in self._asked and not self._scorer._closed:
                self._asked[index] = group, self._scorer._threads.submit(self._ask, group)

    def result(self, groups: Sequence[Group]) -> tuple[list[Group], list[RewardError]]:
        """The groups with every completion's ``rewards`` and weighted ``reward``, in order; and what failed.

        ``groups`` are the whole request's; those not added yet are added. A failure raises ``RunFailure`` or leaves its
        group out: ``task.on_reward_error``, ``task.on_reward_timeout``.
        """
        answers, errors = self.answers(groups)
        scored = []
        for group, answer in zip(groups, answers, strict=True):
            if answer is not None:
                total = self._scorer._total
                pairs = zip(group.completions, answer, strict=True)
                completions = tuple(replace(c, rewards=values, reward=total(values)) for c, values in pairs)
                scored.append(replace(group, completions=completions))
        return scored, errors

    def answers(self, groups: Sequence[Group]) -> tuple[list[list[Any] | None], list[RewardError]]:
        """Each group's answers, or None where one failed."""
        scorer = self._scorer
        try:
            for index, group in enumerate(groups):
                self.add(index, group)
            with scorer._lock:
                asked = [self._asked[index] for index in range(len(groups)) if index in self._asked]
            found = [answer.result() for _, answer in asked]
        except BaseException:  # Ctrl-C here must not leave a thread waiting for a worker that hangs
            wait(self._stop())
            raise
        if scorer._closed:  # whatever its workers still answered
            raise RunFailure("the reward workers were ended before every completion was scored")
        reported = [group for group, _ in asked]
        if len(self._asked) > len(groups) or reported != list(groups):
            raise RunFailure("the sampler reported other groups, while it was writing, than it then answered")
        errors = [answer for answer in found if isinstance(answer, RewardError)]
        fatal = next((error for error in errors if scorer._stops(error)), None)
        for error in errors:
            # One line for the terminal; the rest is for the log file, as is the one that is about to end the run.
            scorer._log.log(logging.INFO if error is fatal else logging.WARNING, "%s", error)
            text = error.group.completions[error.index].text
            scorer._log.info("the completion: %r\n%s", _shortened(text), error.traceback or "there is no traceback")
        if fatal is not None:
            setting = "on_reward_timeout" if fatal.ran_over else "on_reward_error"
            raise RunFailure(
                f"reward {fatal}; fix it in task {scorer._config.name!r}, or set task.{setting}=skip to leave such "
                "groups out"
            )
        return [None if isinstance(answer, RewardError) else answer for answer in found], errors

    def _ask(self, group: Group) -> list[Any] | RewardError | None:
        """On a thread of the scorer's: a free worker's answer, or None once nobody wants it."""
        scorer = self._scorer
        if self._stopped or scorer._closed:
            return None
        worker = scorer._idle.get_nowait()
        try:
            worker.revive()
            with scorer._lock:  # from here to its end this group alone may be interrupted with this worker
                if self._stopped or scorer._closed:
                    return None
                self._busy.add(worker)
            # Beyond the limit of each completion: a worker that is stopped does not even read the question.
            limit_s = START_TIMEOUT_S + (len(group.completions) + 1) * scorer._config.reward_timeout_s
            limit = threading.Timer(limit_s, worker.interrupt)
            limit.daemon = True
            limit.start()
            try:
                answer = worker.ask(self._job, group)
            finally:
                limit.cancel()
                with scorer._lock:
                    self._busy.discard(worker)
            if isinstance(answer, RewardError) and scorer._stops(answer):
                self._stopped = True
            return answer
        except BaseException:
            self._stopped = True
            raise
        finally:
            scorer._idle.put(worker)

    def _stop(self) -> list[Future[list[Any] | RewardError | None]]:
        """Ends what is being asked; returns what ends by it."""
        with self._scorer._lock:
            self._stopped = True
            for worker in self._busy:
                worker.interrupt()
            return [answer for _, answer in self._asked.values()]


class _Worker:
    """One worker process, as one thread of the parent sees it. Restarted at the next question after it was killed."""

    def __init__(self, config: TaskConfig, task: Task, log: logging.Logger) -> None:
        self._config = config
        self._rewards = tuple(task.rewards)
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._said: collections.deque[str] = collections.deque(maxlen=5)
        self._ready = False
        self._doomed = False  # told to die, though it may not have yet
        self._start()

    def revive(self) -> None:
        """Before each question, outside the time in which the worker may be interrupted for it."""
        if self._doomed or self._process is None or self._process.poll() is not None:
            self.kill()  # interrupted, killed, or dead since the last question: nothing that this group did
            self._start()

    def ask(self, job: Job, group: Group) -> list[Any] | RewardError:
        """One answer for each completion of the group, or the first failure; at it, the rest is not asked."""
        if not self._ready:
            self._wait_until_ready()
        answers: list[Any] = []
        reward: str = job
        try:
            self._pipe.send((job, group))
            for index in range(len(group.completions)):
                reward, deadline = job, time.monotonic() + self._config.reward_timeout_s
                while True:
                    if excess := self._wait(deadline):
                        self.kill()
                        return RewardError(group, index, reward, excess, ran_over=True)
                    what, number, value = self._receive()
                    if number != index:
                        self.kill()
                        wrong = f"its worker answered for completion {number}"
                        return RewardError(group, index, reward, wrong, ran_over=True)
                    if what == "began":
                        reward = value
                    elif what == "failed":
                        brief, ran_over, whole = value
                        return RewardError(group, index, reward, printable(brief, one_line=True), ran_over, whole)
                    elif isinstance(value, bool) != (job == "is_correct"):
                        raise OSError("no answer to this question")
                    else:
                        answers.append(value)
                        break
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            name = self._config.name
            raise UserError(
                f"task.name={name!r} gives prompt {group.prompt.id!r} data that no reward worker can get ({error}); "
                "use JSON values"
            ) from error
        except (EOFError, OSError):
            died = f"its worker process died ({self._end()})"
            return RewardError(group, len(answers), reward, died, ran_over=True)
        return answers

    def _receive(self) -> tuple[str, int, Any]:
        """A message of the worker. Raises ``OSError`` for what is none."""
        try:
            what, number, value = json.loads(self._pipe.recv_bytes(_MESSAGE_BYTES))
            if what == "failed" and number >= 0:
                brief, ran_over, whole = value
                value = str(brief), bool(ran_over), str(whole)
            elif what == "answer" and not isinstance(value, bool):
                value = {name: float(value[name]) for name in self._rewards}
                assert all(map(math.isfinite, value.values()))
        except (ValueError, TypeError, KeyError, RecursionError, AssertionError) as error:
            raise OSError("no message of a worker") from error
        return what, number, value

    def _wait(self, deadline: float) -> str:
        """Until the worker has said something: nothing; or which of its limits it has run past."""
        assert self._process is not None
        while True:
            # Asked even when the time is up: an answer that has arrived counts, however busy this process was.
            if self._pipe.poll(min(_LOOK_S, max(0.0, deadline - time.monotonic()))):
                return ""
            if time.monotonic() >= deadline:
                return f"ran past task.reward_timeout_s={self._config.reward_timeout_s:g}"
            if excess := sandbox.excess(self._config, self._process.pid):
                return excess

    def interrupt(self) -> None:
        """From any thread: the process dies, and the thread that waits for it finds its pipe at the end."""
        process, self._doomed = self._process, True
        if process is not None:
            subprocess_pipe.kill(process)

    def kill(self) -> None:
        """From the thread that asks, or when none does."""
        self.interrupt()
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        process.wait()
        self._pipe.close()
        self._reader.join(timeout=1.0)

    def _start(self) -> None:
        try:
            self._process, self._pipe = subprocess_pipe.start(
                "common.rewards.scorer:_serve", inside=sandbox.command(self._config),
                env=sandbox.environment(self._config),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
        except OSError as error:
            raise RunFailure(f"a reward worker process cannot be started: {error}; free memory or processes") from error
        self._doomed = False
        self._said.clear()
        self._reader = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._reader.start()
        with socket.fromfd(self._pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
            for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                pipe.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", _BROKEN_OFF_S, 0))
        config = self._config
        with contextlib.suppress(OSError):  # it died at once; whoever waits for it to be ready will say so
            self._pipe.send((config.name, config.options, config.reward_timeout_s, sandbox.memory_bytes(config)))

    def _wait_until_ready(self) -> None:
        try:
            if not self._pipe.poll(START_TIMEOUT_S):
                self.kill()
                raise RunFailure(f"a reward worker did not make task {self._config.name!r} in {START_TIMEOUT_S:g} s")
            _, _, failure = self._receive()
        except (EOFError, OSError):
            raise RunFailure(f"a reward worker died while making task {self._config.name!r} ({self._end()})") from None
        if failure is not None:
            self.kill()
            raise RunFailure(f"a reward worker cannot make its task: {printable(str(failure), one_line=True)}")
        self._ready = True

    def _end(self) -> str:
        """How the process ended and what it last said."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = None  # it closed its pipe and lives on
        self.kill()
        if code is not None and self._config.sandbox != "none" and code > 128:
            code = 128 - code  # as a shell does, bubblewrap tells a signal by its own exit code
        if code is not None and code < 0:
            how = f"killed by signal {-code}"
        else:
            how = "it closed its pipe" if code is None else f"exit code {code}"
        return f"{how}; it last said: {' / '.join(self._said)}" if self._said else how

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """What rewards print is for whoever wrote them: a line of the log each."""
        assert process.stdout is not None
        with process.stdout as lines:
            count = 0
            while line := lines.readline(_SHOWN_CHARACTERS):  # a piece of a longer one: it may be endless
                self._said.append(printable(line.rstrip(), one_line=True))
                count += 1
                if count <= _PRINTED_LINES:
                    self._log.info("a reward printed: %s", line.rstrip())
                if count == _PRINTED_LINES:
                    self._log.warning("a reward printed %d lines; what this worker prints now is not kept", count)


def _serve() -> None:
    """The worker's life: make the task, then answer groups until the parent goes away."""
    # Whoever stops a whole job, as Ray does, tells this process too; the run ends it once its step is done. A function,
    # because what a task starts would inherit that a signal is ignored.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    pipe, own = subprocess_pipe.pipe(), os.getpid()

    def say(what: str, number: int, value: Any) -> None:
        pipe.send_bytes(json.dumps((what, number, value)).encode())

    name, options, limit_s, memory = pipe.recv()
    if memory is not None:
        sandbox.limit(memory)
    try:
        task = make_task(name, options)
    except UserError as error:
        _end_unless(own)
        say("failed", -1, str(error))
        return
    finally:
        _end_unless(own)
    say("ready", -1, None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    while True:
        try:
            job, group = pipe.recv()
        except EOFError:
            return
        for index in range(len(group.completions)):
            # The parent kills a late worker long before this; it is for a parent that died itself. Unlike a signal or
            # a thread of ours, this timer also ends code that never gives up the interpreter (a hopeless regex).
            faulthandler.dump_traceback_later(2 * limit_s + 60, exit=True, file=nowhere)
            if memory is not None:
                sandbox.limit_cpu(limit_s)
            what, value = _answer(partial(say, "began", index), own, task, job, group, index)
            say(what, index, value)
            faulthandler.cancel_dump_traceback_later()
            if what == "failed":
                break


def _end_unless(own: int) -> None:
    """Ends a copy of the worker that came back from somebody's code: it would answer in the worker's place."""
    if os.getpid() != own:
        print("a process that a reward forked came back from it; it ends here, and its result is not used", flush=True)
        os._exit(1)


def _answer(
    begin: Callable[[str], None], own: int, task: Task, job: Job, group: Group, index: int
) -> tuple[Literal["answer", "failed"], Any]:
    """This completion's answer; or the error in a few words, whether it ran past a limit, and its traceback."""
    prompt, completion = group.prompt, group.completions[index]
    try:
        if job == "is_correct":
            begin(job)
            right = task.is_correct(prompt, completion)
            if right not in (True, False):
                raise _Unfit(f"returned {right!r}, which is neither True nor False")
            return "answer", bool(right)
        numbers = {}
        for name, function in task.rewards.items():
            begin(name)
            numbers[name] = _number(function, prompt, completion)
            _end_unless(own)
        return "answer", numbers
    except (Exception, SystemExit) as error:  # reported, and never taken for a score
        kind = "" if isinstance(error, _Unfit) else f"{type(error).__name__}: "
        brief = kind + _shortened(" ".join(str(error).split()))
        if error.__traceback__ and error.__traceback__.tb_next and not isinstance(error, _Unfit):
            brief += f" ({where(error, __file__)})"
        # Of an endless recursion the end is enough.
        whole = "".join(traceback.format_exception(error, limit=-_TRACEBACK_FRAMES)).rstrip()
        ran_over = isinstance(error, MemoryError | RecursionError)
        return "failed", (brief, ran_over, whole[-_TRACEBACK_CHARACTERS:])
    finally:
        _end_unless(own)


class _Unfit(Exception):
    """A reward returned what is no score."""


def _number(function: Callable[[Prompt, Completion], Any], prompt: Prompt, completion: Completion) -> float:
    value = function(prompt, completion)
    if not isinstance(value, SupportsFloat):
        raise _Unfit(f"returned {value!r}, which is not a number")
    number = float(value)
    if not abs(number) <= LARGEST_REWARD:
        why = "not finite" if not math.isfinite(number) else f"beyond {LARGEST_REWARD:g}"
        raise _Unfit(f"returned {number:g}, which is {why}")
    return number


def _weights(task: Task, overrides: dict[str, float]) -> dict[str, float]:
    for name, weight in overrides.items():
        if name not in task.rewards:
            names = ", ".join(task.rewards)
            raise UserError(f"task.reward_weights.{name}={weight}: the task has no such reward; it has {names}")
    weights = {**task.reward_weights, **overrides}
    for name, weight in weights.items():
        number = isinstance(weight, SupportsFloat) and not isinstance(weight, bool)
        if not number or not abs(float(weight)) <= LARGEST_REWARD:
            limits = f"-{LARGEST_REWARD:g} and {LARGEST_REWARD:g}"
            raise UserError(f"task.reward_weights.{name}={weight!r} is no number between {limits}; set it to one")
    return {name: float(weights[name]) for name in task.reward_weights}


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}… ({len(text)} characters)"
