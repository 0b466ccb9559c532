"""``SamplerPool``: any number of sampler replicas behind the one ``Sampler`` contract.

A request is cut into items that the replica with the least to do takes next, and put together again in the order of its
prompts. A replica that dies, hangs or answers garbage is replaced, given the current weights, and its items are asked
again, so that no prompt is lost or answered twice; the number of replacements is bounded. A thread schedules the items
and collects the answers; the loop only waits for its futures. With one replica a request stays whole: it draws exactly
as it would in the loop's own process.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import Enum, auto
from typing import Any, Literal

import ray

from common.config import Config
from common.errors import LearnerLost, RunFailure, UserError
from common.protocols import WeightHandle
from common.tokenizer import check_room
from common.types import Group, Prompt, SamplerSetup, SamplingParams
from common.watchdog import late
from deploy.cluster.calls import ActorFailure, ActorRef, Heartbeats, LearnerBusy, NoRoom, Restarts, answer, call_all
from deploy.cluster.resources import Cluster
from deploy.cluster.work_items import Request, WorkItem
from learner.weight_sync import SyncError, tolerance_of, weighted_difference

log = logging.getLogger("nanogrpo.cluster")
_TURN_S = 0.2  # a replica reports at least so often: new weights wait no longer for it


class _State(Enum):
    STARTING = auto()
    LOADING = auto()  # it lacks the weights that are served now
    READY = auto()
    NO_ROOM = auto()  # the cluster has no place for it; tried again at each sync


@dataclasses.dataclass(eq=False)
class _Replica:
    """One replica; another takes its place in the pool when it is lost."""

    actor: ActorRef
    """Without a handle until it has started."""
    state: _State = _State.STARTING
    work: dict[int, WorkItem] = dataclasses.field(default_factory=dict)
    """By id."""
    call: Any = None
    """Its call in flight."""

    def overdue(self, limit_s: float) -> bool:
        """Whether its process may answer, but its work does not end."""
        told = [item.since for item in list(self.work.values()) if item.since]
        return bool(told) and time.monotonic() - min(told) > limit_s


class SamplerPool:
    """The replicas that the cluster starts, and starts again."""

    def __init__(
        self,
        config: Config,
        setup: SamplerSetup,
        vocabulary: int,
        restarts: Restarts,
        cluster: Cluster,
        deliver: Callable[[Any, Sequence[ActorRef], int], tuple[dict[ActorRef, str], dict[ActorRef, ActorFailure]]],
    ) -> None:
        """``setup`` is every replica's; ``vocabulary`` its number of tokens; ``deliver`` is the learner's
        (``LearnerRanks.deliver``)."""
        self._config, self._setup, self._vocabulary = config, setup, vocabulary
        self._restarts, self._cluster, self._deliver = restarts, cluster, deliver
        self._lock = threading.Condition(threading.RLock())
        self._transfer = threading.Lock()  # one transfer of weights at a time; taken before the other
        self._replicas: list[_Replica] = []
        self._queue: deque[WorkItem] = deque()
        self._served: tuple[WeightHandle, int] | None = None  # or about to be
        self._probe: tuple[Sequence[Sequence[int]], list[list[float]]] | None = None
        self._transport = ""  # logged when it changes
        self._failure: Exception | None = None
        self._learner_failure: LearnerLost | None = None
        self._closing = False

    def open(self) -> None:
        """Starts all replicas at once and then gives out work. Raises what starting one raised."""
        count = self._config.cluster.samplers
        self._replicas = [_Replica(ActorRef(f"sampler {index}", None, index)) for index in range(count)]
        for replica in self._replicas:
            self._bring_up_beside(replica)
        with self._lock:  # each start has limits of its own
            self._lock.wait_for(lambda: all(replica.state is not _State.STARTING for replica in self._replicas))
        if self._failure is not None:
            self.close()
            raise self._failure
        facts = next(iter(self._with(_State.LOADING))).started.facts
        self.takes_adapters: bool = facts["takes_adapters"]
        self.seeds_prompts: bool = facts["seeds_prompts"]
        threading.Thread(target=self._serve, name="sampler pool", daemon=True).start()

    # -- the contract ------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        check_room(prompts, params.max_tokens, self._setup.max_model_tokens)
        request = Request(prompts, params)
        with self._lock:
            self._check()
            if not prompts:
                request.future.set_result([])
                return request.future
            self._queue.extend(request.items(len(prompts) if self._config.cluster.samplers == 1 else 1))
            self._lock.notify_all()
        return request.future

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return next(iter(self.logprobs_of_each(sequences).values()))

    def logprobs_of_each(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Every replica's answer by its name, for the proof."""
        while not (answers := self._ask("logprobs", sequences, "answering the probe")):
            self._wait_for_weights()
        self._probe = (sequences, next(iter(answers.values())))
        return {actor.name: values for actor, values in answers.items()}

    def check_weights(self, fingerprint: str) -> list[str]:
        """Every replica's faults, with its place."""
        answers = self._ask("check_weights", fingerprint, "comparing its weights with those sent")
        return [f"{actor.place}: {fault}" for actor, faults in answers.items() for fault in faults]

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        if not self._config.sampler.in_flight_updates:
            self._drain()
        self._probe = None
        self._look_for_room()
        with self._transfer:
            with self._lock:
                self._check()
                todo = self._with(_State.LOADING, _State.READY)
                for replica in todo.values():
                    replica.state = _State.LOADING
                self._served = (handle, version)
            arrived: dict[ActorRef, str] = {}
            while missing := [actor for actor in todo if actor not in arrived]:
                loaded, failures = self._deliver(handle, missing, version)
                arrived |= loaded
                # A broadcast fails for all when one dies: only where none died is who failed the one to blame.
                died = [actor for actor in failures if failures[actor].died]
                for actor in died or failures:
                    self._replace(todo.pop(actor), str(failures[actor]))
            if arrived and handle.transport != self._transport:
                self._transport = handle.transport
                log.info("weights travel to the samplers by: %s", handle.transport)
            for actor, digest in arrived.items():
                if digest != handle.sent()[0]:
                    raise SyncError(
                        f"{actor.place} did not receive the weights that the learner sent (version {version}): "
                        f"fingerprint {digest} arrived, {handle.sent()[0]} was sent"
                    )
            with self._lock:
                for replica in todo.values():
                    replica.state = _State.READY
                self._lock.notify_all()
        self._wait_for_weights()
        return handle.sent()[0]

    def sleep(self) -> None:
        """Nothing: replicas have devices of their own."""

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        """Nothing; see ``sleep``."""

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify_all()
            actors = list(self._with(_State.LOADING, _State.READY))
        self._cluster.end(actors, 20.0)

    # -- beyond it ---------------------------------------------------------------------------------------------------

    def places(self) -> list[str]:
        with self._lock:
            return [actor.place for actor in self._with(_State.LOADING, _State.READY)]

    def forget(self) -> None:
        """Drops every request in flight, and the weights served: the learner goes back to a checkpoint."""
        with self._transfer, self._lock:
            self._served = self._learner_failure = None
            for request in self._requests():
                request.future.cancel()
            self._queue.clear()
            for replica in self._replicas:
                replica.work = {number: item for number, item in replica.work.items() if item.since}
        self._drain()

    # -- work --------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """The scheduler thread."""
        heartbeats, limit_s = Heartbeats(self._config.timeouts.pulse_s), self._config.timeouts.generate_s
        while not self._closing:
            try:
                with self._lock:
                    self._give_out()
                    turns = {replica.call: replica for replica in self._replicas if replica.call is not None}
                    if not turns:
                        self._lock.wait(0.5)
                        continue
                done, _ = ray.wait(list(turns), num_returns=1, timeout=0.5)
                for ref in done:
                    self._take_in(turns[ref], ref)
                for replica in turns.values():
                    overdue = f"was still writing after {limit_s:g} s" if replica.overdue(limit_s) else ""
                    if why := overdue or heartbeats.missing(replica.actor, "writing completions"):
                        self._replace(replica, f"{replica.actor.place} {why}")
            except Exception as error:  # a bug here must not leave the loop waiting for ever
                log.exception("the sampler pool failed")
                self._fail(error)
                time.sleep(0.5)  # one that repeats must not fill the log

    def _give_out(self) -> None:
        """Assigns waiting items to the replicas with the least to do, and starts a call wherever there is work."""
        ready = [replica for replica in self._replicas if replica.state is _State.READY]
        while self._queue and ready:
            replica = min(ready, key=lambda replica: len(replica.work))
            if len(replica.work) >= self._depth(replica, self._queue[0]):
                break
            item = self._queue.popleft()
            if item.request.future.done():  # forgotten meanwhile; ``_drain`` may wait for just this
                self._lock.notify_all()
            else:
                replica.work[item.id] = item
        for replica in self._replicas:
            if replica.call is None and replica.work:
                new = [item for item in replica.work.values() if not item.since]
                for item in new:
                    item.since = time.monotonic()
                asked = [(item.id, item.prompts, item.params) for item in new]
                replica.call = replica.actor.call("work", asked, _TURN_S)

    def _depth(self, replica: _Replica, item: WorkItem) -> int:
        """How many items a replica holds at once: as many as it has sequences for, if it works on many at a time."""
        if len(item.prompts) > 1 or not replica.actor.started.facts["many_at_once"]:
            return 1
        return max(1, self._setup.max_sequences // item.params.n)

    def _take_in(self, replica: _Replica, ref: Any) -> None:
        try:
            done = answer(replica.actor, ref, "writing completions")
        except UserError as error:
            with self._lock:
                replica.call, replica.work = None, {}
            self._fail(error)
            return
        except ActorFailure as failure:
            self._replace(replica, str(failure))
            return
        with self._lock:
            replica.call = None
            for number, groups in done:
                if number not in replica.work:
                    continue  # it was replaced meanwhile
                item = replica.work[number]
                if why := item.fault_of(groups, self._vocabulary):
                    self._replace(replica, f"{replica.actor.place} answered garbage: {why}")
                    return
                del replica.work[number]
                if not item.request.future.done():  # neither forgotten nor ended by a failure
                    item.request.add(item, groups)
            self._lock.notify_all()

    def _drain(self) -> None:
        """Blocks until in-flight requests finish, so new weights never affect an earlier request. Items that no replica
        can work on, because all lack weights, wait for the new ones instead."""
        timeouts = self._config.timeouts
        # Every loss, and every item, has a limit of its own; this is their sum.
        again_s = timeouts.generate_s + timeouts.start_s + timeouts.load_s + timeouts.sync_s
        limit_s = (self._config.cluster.max_restarts + 1) * again_s

        def drained() -> bool:
            busy = any(replica.work for replica in self._replicas)
            return not busy and not (self._queue and self._with(_State.READY))

        self._wait(drained, limit_s, late("samplers", "writing earlier requests", limit_s, "timeouts.generate_s"))

    def _ask(self, method: str, argument: Any, doing: str) -> dict[ActorRef, Any]:
        """The answers of all replicas that have the weights; the others of them are replaced."""
        with self._lock:
            self._check()
            asked = self._with(_State.READY)
        timeouts = self._config.timeouts
        calls = {actor: actor.call(method, argument) for actor in asked}
        answers, failures = call_all(calls, doing, timeouts.sync_s, timeouts.pulse_s)
        for actor, failure in failures.items():
            self._replace(asked[actor], str(failure))
        return answers

    # -- loss and replacement ----------------------------------------------------------------------------------------

    def _replace(self, replica: _Replica, why: str) -> None:
        """Takes the replica out, puts its items back in front, and starts another in its place."""
        with self._lock:
            if replica not in self._replicas:
                return
            # Kept in their order, ahead of everything that was asked later.
            self._queue.extendleft(reversed(replica.work.values()))
            for item in replica.work.values():
                item.since = 0.0
            replica.work = {}
            place = self._replicas.index(replica)
            del self._replicas[place]
            self._lock.notify_all()
            if self._closing or self._failure:
                return
            try:
                self._restarts.count(why)
            except RunFailure as error:
                self._fail(error)
                return
            new = _Replica(ActorRef(f"sampler {replica.actor.bundle}", None, replica.actor.bundle))
            self._replicas.insert(place, new)
        self._bring_up_beside(new, replica.actor)

    def _look_for_room(self) -> None:
        """Tries once more to fill places that had none."""
        with self._lock:
            for replica in self._replicas:
                if replica.state is _State.NO_ROOM:
                    replica.state = _State.STARTING
                    self._bring_up_beside(replica)

    def _bring_up_beside(self, replica: _Replica, lost: ActorRef | None = None) -> None:
        threading.Thread(target=self._bring_up, args=(replica, lost), daemon=True).start()

    def _bring_up(self, replica: _Replica, lost: ActorRef | None) -> None:
        """Starts the replica and gives it the weights served now. ``lost``: whose place it takes, if that is news."""
        try:
            if lost is not None:
                lost.kill()
            actor = self._cluster.start_sampler(replica.actor.bundle, self._setup)
            with self._transfer, self._lock:
                replica.actor, replica.state = actor, _State.LOADING
                served = self._served
                self._lock.notify_all()
            if served is not None:  # else the next sync sends them
                self._supply(replica, actor, *served)
        except NoRoom as error:
            with self._lock:
                replica.state = _State.NO_ROOM
                self._lock.notify_all()
                if all(other.state is _State.NO_ROOM for other in self._replicas):
                    self._fail(RunFailure(f"{error}, and no other sampler is left"))
                elif lost is not None:
                    self._restarts.say(f"{lost.name}: {error}; the run goes on without it until there is room")
        except ActorFailure as failure:
            replica.actor = failure.actor
            self._replace(replica, str(failure))
        except LearnerBusy:
            pass  # the next sync sends newer weights
        except LearnerLost as failure:
            # Raised in the loop, which waits for completions that no replica can write.
            with self._lock:
                self._learner_failure = failure
                self._end_requests(failure)
        except Exception as error:
            with self._lock:
                if replica.state is _State.STARTING and replica in self._replicas:
                    self._replicas.remove(replica)
                self._fail(error)

    def _supply(self, replica: _Replica, actor: ActorRef, handle: WeightHandle, version: int) -> None:
        with self._transfer:
            if self._served is None or self._served[0] is not handle or replica.state is _State.READY:
                return
            try:
                why = self._load_and_prove(actor, handle, version)
            except ray.exceptions.RayError as error:
                why = f"{actor.place} was lost while taking weights ({type(error).__name__})"
            if why:
                self._replace(replica, why)
                return
            with self._lock:
                replica.state = _State.READY
                self._lock.notify_all()
            self._restarts.say(f"{actor.place} took the place of the lost one, with version {version}")

    def _load_and_prove(self, actor: ActorRef, handle: WeightHandle, version: int) -> str:
        """As a sync does. Returns what is wrong, or nothing."""
        loaded, failures = self._deliver(handle, [actor], version)
        for failure in failures.values():
            return str(failure)
        digest, limit_s = loaded[actor], self._config.timeouts.sync_s
        if digest != handle.sent()[0]:
            return f"{actor.place} received other weights than were sent"
        if self._config.sync.proof and (faults := ray.get(actor.call("check_weights", digest), timeout=limit_s)):
            return f"{actor.place} holds other weights than were sent: {faults[0]}"
        if self._probe is not None:
            sequences, expected = self._probe
            got = ray.get(actor.call("logprobs", sequences), timeout=limit_s)
            flat = [list(itertools.chain(*rows)) for rows in (expected, got)]
            if not weighted_difference(*flat) <= tolerance_of(self._config.sync, self._setup.dtype):
                return f"{actor.place} computes with other weights than were sent"
        return ""

    def _wait_for_weights(self) -> None:
        """Until a replacement holds the weights, where all were lost."""
        limit_s = self._config.timeouts.start_s + self._config.timeouts.load_s
        text = f"no sampler replica was ready within {limit_s:g} s of the loss of the last one"
        self._wait(lambda: bool(self._with(_State.READY)), limit_s, text)

    # -- state -------------------------------------------------------------------------------------------------------

    def _with(self, *states: _State) -> dict[ActorRef, _Replica]:
        """The replicas in these states, by their actors."""
        return {replica.actor: replica for replica in self._replicas if replica.state in states}

    def _requests(self) -> list[Request]:
        """Those in flight: each has an item somewhere."""
        items = itertools.chain(self._queue, *(replica.work.values() for replica in self._replicas))
        return [request for request in {item.request for item in items} if not request.future.done()]

    def _wait(self, condition: Callable[[], bool], limit_s: float, late_text: str) -> None:
        """Until the condition holds. Raises ``RunFailure`` at the limit, and as ``_check``."""

        def holds() -> bool:
            self._check()
            return condition()

        with self._lock:
            if not self._lock.wait_for(holds, limit_s):
                raise RunFailure(late_text)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._learner_failure is not None:
            raise self._learner_failure
        if self._closing:
            raise RunFailure("the sampler pool was called after it was closed")

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._end_requests(self._failure)

    def _end_requests(self, error: Exception) -> None:
        for request in self._requests():
            request.future.set_exception(error)
        self._queue.clear()
        self._lock.notify_all()
