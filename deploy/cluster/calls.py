"""Calls to services: the owner's handle of a service, and the one way of waiting for its answers.

Every wait has a limit, and a service that died, hangs or failed is named in an ``ActorFailure``. ``max_restarts=0``: a
restarted actor would have lost its state, so its owner decides. Used by ``resources.py``, ``learner_ranks.py`` and
``sampler_pool.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from common.errors import LearnerLost, RunFailure, UserError
from learner.distributed import RankLost

log = logging.getLogger("nanogrpo.cluster")
# One memory arena: services work on a thread of their own, and only glibc's first arena keeps large blocks
# (``common.device.set_threads``).
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ActorInfo:
    """What a service reports once it has started."""

    node: str
    """Ray's id of its node: the same for two services that share memory."""
    ip: str
    pid: int
    versions: Mapping[str, str]
    facts: Mapping[str, Any]


@dataclasses.dataclass(eq=False)
class ActorRef:
    """One service as its owner sees it."""

    name: str
    handle: Any
    """Ray's."""
    bundle: int
    """Its place in the placement group."""
    info: ActorInfo | None = None

    @property
    def place(self) -> str:
        return f"{self.name} on node {self.info.ip} (process {self.info.pid})" if self.info else self.name

    @property
    def started(self) -> ActorInfo:
        assert self.info is not None, f"{self.name} has not started"
        return self.info

    def call(self, method: str, *arguments: Any) -> Any:
        """Ray's reference to the answer that will come."""
        return getattr(self.handle, method).remote(*arguments)

    def kill(self) -> None:
        """Ends its process, be it stopped or hanging (Ray sends SIGKILL when it does not go by itself)."""
        with contextlib.suppress(RayError):
            ray.kill(self.handle)


class ActorFailure(RunFailure):
    """A service died or hangs (``died``), or its call failed, perhaps because another rank died."""

    def __init__(self, actor: ActorRef, why: str, died: bool = True, caused_by_peer: bool = False) -> None:
        super().__init__(f"{actor.place} {why}")
        self.actor, self.died, self.caused_by_peer = actor, died, caused_by_peer

    def of_learner(self) -> RunFailure:
        """The same as an error of the whole learner: lost, or failed by itself."""
        return LearnerLost(str(self)) if self.died or self.caused_by_peer else RunFailure(str(self))


class NoRoom(RunFailure):
    """The cluster has no place for a replacement now, and ``cluster.on_lost_node`` is ``shrink``."""


class LearnerBusy(Exception):
    """The learner cannot send these weights now; the next sync sends newer ones."""


class Restarts:
    """How often services were replaced, all of them together, and how often they may be; ``say`` prints for people."""

    def __init__(self, limit: int, say: Callable[[str], None]) -> None:
        self.made, self.say = 0, say
        self._limit, self._lock = limit, threading.Lock()

    def count(self, why: str) -> None:
        """One more, and why. Raises ``RunFailure`` beyond the limit."""
        with self._lock:
            if self.made == self._limit:
                raise RunFailure(f"{why}; that was once more than cluster.max_restarts={self._limit} allows")
            self.made += 1
            self.say(f"{why}; it is being replaced ({self.made} of {self._limit})")


def start_actor(service: type, **options: Any) -> Any:
    """Starts a service as an actor; ``options`` are Ray's. Calls run one after another in the order made; beside them
    ``pulse`` answers at any time, which distinguishes a process that hangs from a busy one."""
    settings: Any = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {"pulse": 1}}
    return ray.remote(**settings)(service).options(runtime_env={"env_vars": _ENVIRONMENT}, **options).remote()


def close_all(actors: Sequence[ActorRef], limit_s: float) -> list[ActorRef]:
    """Closes these services. Returns those that can be started again; the others' processes are ended: those that did
    not answer within ``limit_s``, that failed, and that used a GPU, whose memory is surely free only without them."""
    calls = {actor: actor.call("close") for actor in actors}
    closed = ray.wait(list(calls.values()), num_returns=len(calls), timeout=limit_s)[0] if calls else []
    well = []
    for actor, ref in calls.items():
        if actor.info is not None and actor.info.facts["device"] == "cpu" and ref in closed:
            with contextlib.suppress(RayError):
                ray.get(ref, timeout=60)
                well.append(actor)
                continue
        actor.kill()
    return well


def call_all(
    calls: Mapping[ActorRef, Any], doing: str, limit_s: float, pulse_s: float, stop_on_failure: bool = False
) -> tuple[dict[ActorRef, Any], dict[ActorRef, ActorFailure]]:
    """Waits for the answers to these calls, and says who gave none: died, stopped answering, failed or took too long.

    ``stop_on_failure``: the first failure ends the waiting, because the others wait for that one. A ``UserError``
    raised in a service is raised here.
    """
    until = time.monotonic() + limit_s
    answers: dict[ActorRef, Any] = {}
    failures: dict[ActorRef, ActorFailure] = {}
    heartbeats = Heartbeats(pulse_s)
    waiting = dict(calls)
    while waiting and not (stop_on_failure and failures):
        left = until - time.monotonic()
        count = 1 if left > 0 else len(waiting)  # at the limit, every answer that is there counts
        ready, _ = ray.wait(list(waiting.values()), num_returns=count, timeout=max(0.0, min(1.0, left)))
        for actor in [actor for actor, ref in waiting.items() if ref in ready]:
            try:
                answers[actor] = answer(actor, waiting.pop(actor), doing)
            except ActorFailure as failure:
                failures[actor] = failure
        for actor in list(waiting):
            why = heartbeats.missing(actor, doing) or (f"was still {doing} after {limit_s:g} s" if left <= 0 else "")
            if why:
                failures[actor] = ActorFailure(actor, why)
                del waiting[actor]
    return answers, failures


def answer(actor: ActorRef, ref: Any, doing: str) -> Any:
    """The answer that is ready. Raises ``ActorFailure`` when there is none, and the user's mistake as it is."""
    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        # A RunFailure is complete in one sentence; anything else needs its traceback, too.
        level = logging.INFO if isinstance(cause, RunFailure) else logging.WARNING
        log.log(level, "%s failed while %s:\n%s", actor.place, doing, error)
        text = str(cause) if isinstance(cause, RunFailure) else f"{type(cause).__name__}: {cause}"
        why = f"failed while {doing}: {' '.join(text.split())[:500]}"
        raise ActorFailure(actor, why, died=False, caused_by_peer=isinstance(cause, RankLost)) from None
    except RayError as error:
        how = "died" if isinstance(error, RayActorError | GetTimeoutError) else "is out of reach"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[-1][:300] if lines else type(error).__name__
        raise ActorFailure(actor, f"{how} while {doing} ({said})") from None


class Heartbeats:
    """Asks services at work for their pulse, and says which has none."""

    def __init__(self, pulse_s: float) -> None:
        self._pulse_s = pulse_s
        self._asked: dict[ActorRef, tuple[Any, float]] = {}
        self._next: dict[ActorRef, float] = {}

    def missing(self, actor: ActorRef, doing: str) -> str:
        """What is wrong with this service, or nothing. Returns at once."""
        now = time.monotonic()
        if actor not in self._asked:
            if now >= self._next.get(actor, 0.0):
                self._asked[actor] = (actor.call("pulse"), now)
            return ""
        ref, since = self._asked[actor]
        if ray.wait([ref], timeout=0)[0]:
            del self._asked[actor]
            self._next[actor] = now + self._pulse_s / 5
            return ""  # a death shows in the call itself
        return f"did not answer at all for {self._pulse_s:g} s while {doing}" if now - since > self._pulse_s else ""


def wait_until(condition: Callable[[], bool], limit_s: float, tell: Callable[[], None], every_s: float = 1.0) -> bool:
    """Waits until the condition holds; False when it did not within ``limit_s``. ``tell`` is called once, if there is
    something to wait for."""
    until, told = time.monotonic() + limit_s, False
    while not condition():
        if time.monotonic() >= until:
            return False
        if not told:
            tell()
            told = True
        time.sleep(every_s)
    return True
