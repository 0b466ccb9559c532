"""Scores groups of completions in worker processes (``common/rewards/worker.py``), each completion under a time limit.

A reward is user code that reads whatever a model wrote, so it may raise, hang or crash its process. No score is ever
invented: a completion that could not be scored stops the run or leaves its whole group out. Left out: advantages
(``learner/loss/advantages.py``). Used by the training loop and by evaluation.
"""

from __future__ import annotations

import collections
import logging
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, SupportsFloat

from common.errors import RunFailure, UserError
from common.plugins import make_task
from common.rewards import sandbox
from common.rewards.worker import Job, RewardError, Worker, shortened
from common.types import LARGEST_REWARD, Completion, Group

if TYPE_CHECKING:
    from common.config import TaskConfig
    from common.protocols import Task

__all__ = ["RewardError", "Scorer", "Scoring"]


class Scorer:
    """Adds rewards to groups. Workers start with it and end with ``close``; use it as a context manager."""

    def __init__(self, task_config: TaskConfig, log: logging.Logger | None = None) -> None:
        self._config = task_config
        self._log = log or logging.getLogger("nanogrpo.rewards")
        sandbox.command(task_config)
        # Made here as well, so that a task that cannot be made is a clear error now and not a dead worker later.
        task = make_task(task_config.name, task_config.options)
        self.weights = _weights(task, task_config.reward_weights)
        """The weight of each named reward in this run."""
        names = tuple(task.rewards)
        self._workers = [Worker(task_config, names, self._log) for _ in range(task_config.reward_workers)]
        self._idle = collections.deque(self._workers)  # never empty for a thread: there is a worker for each
        self._asked: dict[Worker, Scoring] = {}
        self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="rewards")
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
        return [answer or [] for answer in answers]

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

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stops(self, error: RewardError) -> bool:
        return (self._config.on_reward_timeout if error.ran_over else self._config.on_reward_error) == "stop"

    def _scored(self, completion: Completion, rewards: dict[str, float]) -> Completion:
        total = math.fsum(self.weights[name] * value for name, value in rewards.items())
        return replace(completion, rewards=rewards, reward=total)


class Scoring:
    """The scoring of one request's groups, which go to free workers in the order in which they were added."""

    def __init__(self, scorer: Scorer, job: Job) -> None:
        self._scorer, self._job = scorer, job
        self._added: dict[int, tuple[Group, Future[list[Any] | RewardError | None]]] = {}
        self._stopped = False

    def add(self, index: int, group: Group) -> None:
        """From any thread: the request's group ``index`` is there. Neither waits nor raises."""
        with self._scorer._lock:
            if index not in self._added and not self._scorer._closed:
                self._added[index] = group, self._scorer._threads.submit(self._ask, group)

    def result(self, groups: Sequence[Group]) -> tuple[list[Group], list[RewardError]]:
        """The groups with every completion's ``rewards`` and weighted ``reward``, in order; and what failed.

        ``groups`` are the whole request's; those not added yet are added. A failure raises ``RunFailure`` or leaves its
        group out: ``task.on_reward_error``, ``task.on_reward_timeout``.
        """
        answers, errors = self.answers(groups)
        scored = [
            replace(group, completions=tuple(map(self._scorer._scored, group.completions, answer)))
            for group, answer in zip(groups, answers, strict=True)
            if answer is not None
        ]
        return scored, errors

    def answers(self, groups: Sequence[Group]) -> tuple[list[list[Any] | None], list[RewardError]]:
        """Each group's answers, or None where one failed."""
        scorer = self._scorer
        try:
            for index, group in enumerate(groups):
                self.add(index, group)
            with scorer._lock:
                added = [self._added[index] for index in range(len(groups)) if index in self._added]
            answers = [answer.result() for _, answer in added]
        except BaseException:  # Ctrl-C here must not leave a thread waiting for a worker that hangs
            wait(self._stop())
            raise
        if scorer._closed:  # also where its workers still answered
            raise RunFailure("the reward workers were ended before every completion was scored")
        if len(self._added) > len(groups) or [group for group, _ in added] != list(groups):
            raise RunFailure("the sampler reported other groups, while it was writing, than it then answered")
        errors = [answer for answer in answers if isinstance(answer, RewardError)]
        fatal = next((error for error in errors if scorer._stops(error)), None)
        for error in errors:
            # One line for the terminal; the rest is for the log file, as is the one that is about to end the run.
            scorer._log.log(logging.INFO if error is fatal else logging.WARNING, "%s", error)
            text = shortened(error.group.completions[error.index].text)
            scorer._log.info("the completion: %r\n%s", text, error.traceback or "there is no traceback")
        if fatal is not None:
            setting = "on_reward_timeout" if fatal.ran_over else "on_reward_error"
            raise RunFailure(
                f"reward {fatal}; fix it in task {scorer._config.name!r}, or set task.{setting}=skip to leave such "
                "groups out"
            )
        return [None if isinstance(answer, RewardError) else answer for answer in answers], errors

    def _ask(self, group: Group) -> list[Any] | RewardError | None:
        """On a thread of the scorer's: a free worker's answer, or None once it is no longer needed."""
        scorer = self._scorer
        if self._stopped or scorer._closed:
            return None
        worker = scorer._idle.popleft()
        try:
            worker.revive()
            with scorer._lock:  # from here to its end this request alone may interrupt this worker
                if self._stopped or scorer._closed:
                    return None
                scorer._asked[worker] = self
            answer = worker.ask(self._job, group)
            self._stopped |= isinstance(answer, RewardError) and scorer._stops(answer)
            return answer
        except BaseException:
            self._stopped = True
            raise
        finally:
            with scorer._lock:
                scorer._asked.pop(worker, None)
            scorer._idle.append(worker)

    def _stop(self) -> list[Future[list[Any] | RewardError | None]]:
        """Ends what is being asked; returns what ends by it."""
        with self._scorer._lock:
            self._stopped = True
            for worker, scoring in self._scorer._asked.items():
                if scoring is self:
                    worker.interrupt()
            return [answer for _, answer in self._added.values()]


def _weights(task: Task, overrides: dict[str, float]) -> dict[str, float]:
    for name, weight in overrides.items():
        if name not in task.rewards:
            names = ", ".join(task.rewards)
            raise UserError(f"task.reward_weights.{name}={weight}: the task has no such reward; it has {names}")
    weights = {name: overrides.get(name, weight) for name, weight in task.reward_weights.items()}
    for name, weight in weights.items():
        number = isinstance(weight, SupportsFloat) and not isinstance(weight, bool)
        if not number or not abs(float(weight)) <= LARGEST_REWARD:
            limits = f"-{LARGEST_REWARD:g} and {LARGEST_REWARD:g}"
            raise UserError(f"task.reward_weights.{name}={weight!r} is no number between {limits}; set it to one")
    return {name: float(weight) for name, weight in weights.items()}
