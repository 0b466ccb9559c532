"""``SamplerPool``: any number of sampler replicas behind the one ``Sampler`` contract.

A request is cut into units that the replica with the least to do takes next, and put together again in the order of
its prompts. A replica that dies, hangs or answers garbage is replaced, given the current weights, and its units are
asked again, so that no prompt is lost or answered twice; the number of replacements is bounded. A thread gives out the
work and takes it in; the loop only waits for its futures.

With one replica a request stays whole: it draws exactly as it would in the loop's own process.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Any, Literal

import ray

from common.config import Config
from common.errors import LearnerLost, RunFailure, UserError
from common.protocols import GroupsFuture, WeightHandle
from common.tokenizer import check_room
from common.types import Group, Prompt, SamplerSetup, SamplingParams
from common.watchdog import late
from deploy.cluster.actors import Lost, Member, Pulses, Restarts, Unit, answer, gather
from deploy.cluster.learner_ranks import Busy, Offer
from learner.weight_sync import SyncError, tolerance_of, weighted_difference

log = logging.getLogger("nanogrpo.cluster")
_TURN_S = 0.2  # a replica reports at least so often: new weights wait no longer for it


@dataclasses.dataclass
class _Request:
    """A request's groups as they come in."""

    number: int
    future: GroupsFuture
    groups: list[Group | None]


@dataclasses.dataclass(eq=False)
class _Part:
    """A unit and where its groups belong."""

    unit: Unit
    request: _Request
    first: int
    told: float = 0.0
    """When its replica was given it, on the monotonic clock."""


@dataclasses.dataclass(eq=False)
class _Replica:
    member: Member
    index: int
    """Its place on the cluster."""
    holds: bool = False
    """Whether it has the weights that are served now."""
    parts: dict[int, _Part] = dataclasses.field(default_factory=dict)
    new: list[_Part] = dataclasses.field(default_factory=list)
    """Given to it and not yet told."""
    call: Any = None


class SamplerPool:
    """Replicas that ``start(index)`` starts; it blocks until the replica is ready and raises ``Lost``, or ``NoRoom``
    when the cluster has no place for it now."""

    def __init__(
        self,
        config: Config,
        start: Callable[[int], Member],
        setup: SamplerSetup,
        vocabulary: int,
        restarts: Restarts,
        say: Callable[[str], None],
        end: Callable[[Sequence[Member], float], None],
    ) -> None:
        """``setup`` is every replica's; ``vocabulary`` its number of tokens; ``say`` tells people of losses;
        ``end(members, limit_s)`` ends replicas, or keeps them for another start."""
        self._config, self._start, self._say, self._end = config, start, say, end
        self._setup, self._vocabulary, self._restarts = setup, vocabulary, restarts
        self._lock = threading.Condition(threading.RLock())
        self._weights = threading.Lock()  # one transfer at a time
        self._replicas: list[_Replica] = []
        self._starting: set[int] = set()
        self._resting: set[int] = set()  # places without room, tried again at each sync
        self._queue: deque[_Part] = deque()
        self._requests: dict[int, _Request] = {}
        self._counts = {"unit": 0, "request": 0}
        self._failure: Exception | None = None
        self._offer: tuple[Offer, int] | None = None  # what is served, or about to be
        self._probe: tuple[Sequence[Sequence[int]], list[list[float]]] | None = None
        self._closing = False
        self._lost_learner: LearnerLost | None = None
        self._transport = ""  # said in the log when it changes

    def open(self) -> None:
        """Starts all replicas at once and then gives out work. Raises what starting one raised."""
        count = self._config.cluster.samplers
        results: dict[int, Any] = {}

        def one(index: int) -> None:
            while index not in results:
                try:
                    results[index] = self._start(index)
                except Lost as loss:
                    try:
                        self._say(self._restarts.one_more(str(loss)))
                    except RunFailure as error:
                        results[index] = error
                except BaseException as error:
                    results[index] = error

        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._replicas = [_Replica(results[i], i) for i in range(count) if not isinstance(results[i], BaseException)]
        for failed in results.values():
            if isinstance(failed, BaseException):
                self.close()
                raise failed
        facts = self._facts()
        self.takes_adapters = bool(facts["takes_adapters"])
        self.seeds_prompts = bool(facts["seeds_prompts"])
        threading.Thread(target=self._serve, name="sampler pool", daemon=True).start()

    def _facts(self) -> dict[str, Any]:
        about = self._replicas[0].member.about
        assert about is not None
        return dict(about.facts)

    # -- the contract ------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        future = GroupsFuture()
        check_room(prompts, params.max_tokens, self._setup.max_model_tokens)
        with self._lock:
            self._check()
            if not prompts:
                future.set_result([])
                return future
            request = _Request(self._count("request"), future, [None] * len(prompts))
            self._requests[request.number] = request
            size = len(prompts) if self._config.cluster.samplers == 1 else 1
            for first in range(0, len(prompts), size):
                some = tuple(prompts[first : first + size])
                unit = Unit(self._count("unit"), some, dataclasses.replace(params, seed_offset=first))
                self._queue.append(_Part(unit, request, first))
            self._lock.notify_all()
        return future

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return next(iter(self.logprobs_of_each(sequences).values()))

    def logprobs_of_each(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Every replica's answer by its name, for the proof."""
        while True:
            with self._lock:
                self._check()
                asked = {replica.member: replica for replica in self._replicas if replica.holds}
            calls = {member: member.actor.logprobs.remote(sequences) for member in asked}
            answers, lost = self._gather(calls, "answering the probe")
            for member, loss in lost.items():
                self._lose(asked[member], str(loss))
            if answers:
                self._probe = (sequences, next(iter(answers.values())))
                return {member.name: values for member, values in answers.items()}
            self._wait_for_weights()

    def check_weights(self, fingerprint: str) -> list[str]:
        """Every replica's faults, with its place."""
        with self._lock:
            self._check()
            asked = {replica.member: replica for replica in self._replicas if replica.holds}
        calls = {member: member.actor.check_weights.remote(fingerprint) for member in asked}
        answers, lost = self._gather(calls, "comparing its weights with those sent")
        for member, loss in lost.items():
            self._lose(asked[member], str(loss))
        return [f"{member.place}: {fault}" for member, faults in answers.items() for fault in faults]

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        """Delivers the learner group's offer to every replica."""
        assert isinstance(handle, Offer), f"a pool takes what a learner group offers, and not {type(handle).__name__}"
        offer = handle
        if not self._config.sampler.in_flight_updates:
            self._drain()
        self._probe = None
        self._grow()
        with self._weights:
            with self._lock:
                self._check()
                todo = {replica.member: replica for replica in self._replicas}
                for replica in todo.values():
                    replica.holds = False
                self._offer = (offer, version)
            arrived: dict[Member, str] = {}
            while missing := [member for member in todo if member not in arrived]:
                some, lost = offer.deliver(missing, version)
                arrived |= some
                # A broadcast fails for all when one dies: only where none died is who failed the one to blame.
                died = [member for member in lost if lost[member].died]
                for member in died or lost:
                    self._lose(todo.pop(member), str(lost[member]))
            if offer.transport != self._transport:
                self._transport = offer.transport
                log.info("weights travel to the samplers by: %s", offer.transport)
            for member, digest in arrived.items():
                if digest != offer.sent()[0]:
                    raise SyncError(
                        f"{member.place} did not receive the weights that the learner sent (version {version}): "
                        f"fingerprint {digest} arrived, {offer.sent()[0]} was sent"
                    )
            with self._lock:
                for replica in todo.values():
                    replica.holds = True
                self._lock.notify_all()
        self._wait_for_weights()
        return offer.sent()[0]

    def places(self) -> list[str]:
        with self._lock:
            return [replica.member.place for replica in self._replicas]

    def sleep(self) -> None:
        """Nothing: replicas have devices of their own."""

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        """Nothing; see ``sleep``."""

    def forget(self) -> None:
        """Drops every request in flight, and the weights offered: the learner goes back to a checkpoint."""
        with self._weights, self._lock:
            self._offer = self._lost_learner = None
            self._queue.clear()
            self._requests.clear()
            for replica in self._replicas:
                for part in replica.new:
                    del replica.parts[part.unit.id]
                replica.new.clear()
        self._drain()

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify_all()
            replicas = list(self._replicas)
        self._end([replica.member for replica in replicas], 20.0)

    # -- work --------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """The thread that gives out work and takes it in."""
        pulses = Pulses(self._config.timeouts.pulse_s)
        while not self._closing:
            try:
                with self._lock:
                    self._give_out()
                    calls = {replica.call: replica for replica in self._replicas if replica.call is not None}
                    if not calls:
                        self._lock.wait(0.5)
                        continue
                done, _ = ray.wait(list(calls), num_returns=1, timeout=0.5)
                for ref in done:
                    self._take_in(calls[ref], ref)
                for replica in calls.values():
                    if replica.call is not None and (why := pulses.missing(replica.member)):
                        self._lose(replica, f"{replica.member.place} {why} while writing completions")
                self._overdue()
            except Exception as error:  # a mistake here must not leave the loop waiting for ever
                log.exception("the sampler pool failed")
                self._fail(error)

    def _give_out(self) -> None:
        """Hands waiting units to those with the least to do, and starts a turn wherever there is work."""
        ready = [replica for replica in self._replicas if replica.holds]
        while self._queue and ready:
            replica = min(ready, key=lambda one: len(one.parts))
            if len(replica.parts) >= self._depth(replica, self._queue[0].unit):
                break
            part = self._queue.popleft()
            if part.request.number in self._requests:  # not forgotten meanwhile
                replica.parts[part.unit.id] = part
                replica.new.append(part)
        for replica in self._replicas:
            if replica.call is None and replica.parts:
                told, replica.new = replica.new, []
                for part in told:
                    part.told = time.monotonic()
                replica.call = replica.member.actor.work.remote([part.unit for part in told], _TURN_S)

    def _depth(self, replica: _Replica, unit: Unit) -> int:
        """How many units a replica holds at once: as many as it has sequences for, if it works on many at a time."""
        about = replica.member.about
        assert about is not None
        if len(unit.prompts) > 1 or not about.facts["many_at_once"]:
            return 1
        return max(1, self._setup.max_sequences // unit.params.n)

    def _take_in(self, replica: _Replica, ref: Any) -> None:
        try:
            done = answer(replica.member, ref, "writing completions")
        except UserError as error:
            self._fail(error)
            return
        except Lost as loss:
            self._lose(replica, str(loss))
            return
        with self._lock:
            replica.call = None
            for number, groups in done:
                part = replica.parts.get(number)
                if part is None:
                    continue  # forgotten
                if why := fault_of(groups, part.unit.prompts, part.unit.params.n, self._vocabulary):
                    self._lose(replica, f"{replica.member.place} answered garbage: {why}")
                    return
                del replica.parts[number]
                request = part.request
                if request.number not in self._requests:
                    continue  # ended by a failure
                for index, group in enumerate(groups, part.first):
                    request.groups[index] = group
                    request.future.group_done(index, group)
                if all(group is not None for group in request.groups):
                    del self._requests[request.number]
                    request.future.set_result([group for group in request.groups if group is not None])
            self._lock.notify_all()

    def _overdue(self) -> None:
        """A replica whose process answers but whose work does not end."""
        limit_s = self._config.timeouts.generate_s
        with self._lock:
            for replica in list(self._replicas):
                told = [part.told for part in replica.parts.values() if part.told]
                if told and time.monotonic() - min(told) > limit_s:
                    self._lose(replica, f"{replica.member.place} was still writing after {limit_s:g} s")

    def _drain(self) -> None:
        """Until nothing is in flight: weights never touch an earlier request. Units that no replica can work on, all
        being without weights, wait for the new ones instead."""
        timeouts = self._config.timeouts
        # Every loss, and every unit, has a limit of its own; this is their sum.
        again_s = timeouts.generate_s + timeouts.start_s + timeouts.load_s + timeouts.sync_s
        limit_s = (self._config.cluster.max_restarts + 1) * again_s
        until = time.monotonic() + limit_s
        with self._lock:
            while not self._failure and not self._lost_learner:
                if time.monotonic() > until:
                    raise RunFailure(late("samplers", "writing earlier requests", limit_s, "timeouts.generate_s"))
                busy = any(replica.parts for replica in self._replicas)
                able = any(replica.holds for replica in self._replicas)
                if not busy and not (self._queue and able):
                    break
                self._lock.wait(0.5)
            self._check()

    # -- loss and replacement ----------------------------------------------------------------------------------------

    def _lose(self, replica: _Replica, why: str) -> None:
        """Takes the replica out, puts its units back in front, and starts another in its place."""
        with self._lock:
            if replica not in self._replicas:
                return
            self._replicas.remove(replica)
            # Kept in their order, ahead of everything that was asked later.
            self._queue.extendleft(reversed(replica.parts.values()))
            for part in replica.parts.values():
                part.told = 0.0
            replica.parts = {}
            if self._closing or self._failure:
                return
            try:
                said = self._restarts.one_more(why)
            except RunFailure as error:
                self._fail(error)
                return
            self._starting.add(replica.index)
        self._say(said)
        threading.Thread(target=self._renew, args=(replica,), daemon=True).start()

    def _renew(self, old: _Replica) -> None:
        old.member.kill()
        try:
            new = _Replica(self._start(old.index), old.index)
        except NoRoom as error:
            with self._lock:
                self._starting.discard(old.index)
                self._resting.add(old.index)
                if self._replicas or self._starting:
                    if old.member.actor is not None:  # said once, and not at each further try
                        self._say(f"{old.member.name}: {error}; the run goes on without it until there is room")
                else:
                    self._fail(RunFailure(f"{error}, and no other sampler is left"))
                self._lock.notify_all()
            return
        except Lost as loss:
            with self._lock:
                self._starting.discard(old.index)
                again = _Replica(loss.member, old.index)
                self._replicas.append(again)
                self._lose(again, str(loss))
            return
        except Exception as error:
            self._fail(error)
            return
        with self._weights, self._lock:
            self._starting.discard(old.index)
            self._replicas.append(new)
            offer = self._offer
            self._lock.notify_all()
            if offer is None:
                return  # the next sync brings them
        self._supply(new, *offer)

    def _supply(self, replica: _Replica, offer: Offer, version: int) -> None:
        """The weights served now, for one that has none; proven as in a sync."""
        try:
            with self._weights:
                if self._offer is None or self._offer[0] is not offer or replica.holds:
                    return
                arrived, lost = offer.deliver([replica.member], version)
                for loss in lost.values():
                    self._lose(replica, str(loss))
                    return
                if arrived[replica.member] != offer.sent()[0]:
                    self._lose(replica, f"{replica.member.place} received other weights than were sent")
                    return
                if self._config.sync.proof:
                    asked = replica.member.actor.check_weights.remote(arrived[replica.member])
                    if faults := ray.get(asked, timeout=self._config.timeouts.sync_s):
                        self._lose(replica, f"{replica.member.place} holds other weights than were sent: {faults[0]}")
                        return
                if self._probe is not None:
                    sequences, expected = self._probe
                    got = ray.get(replica.member.actor.logprobs.remote(sequences), timeout=self._config.timeouts.sync_s)
                    wrong = weighted_difference(list(chain(*expected)), list(chain(*got)))
                    if not wrong <= tolerance_of(self._config.sync, self._setup.dtype):
                        self._lose(replica, f"{replica.member.place} computes with other weights than were sent")
                        return
                with self._lock:
                    replica.holds = True
                    self._lock.notify_all()
                self._say(f"{replica.member.place} took the place of the lost one, with version {version}")
        except Busy:
            return  # the next sync brings newer ones
        except LearnerLost as loss:
            self._learner_is_lost(loss)
        except ray.exceptions.RayError as error:
            self._lose(replica, f"{replica.member.place} was lost while taking weights ({type(error).__name__})")
        except Exception as error:
            self._fail(error)

    def _learner_is_lost(self, loss: LearnerLost) -> None:
        """Tells the loop, which waits for completions that nobody can write: it brings another learner."""
        with self._lock:
            self._lost_learner = loss
            self._end_requests(loss)

    def _wait_for_weights(self) -> None:
        """Until a replacement holds the weights."""
        limit_s = self._config.timeouts.start_s + self._config.timeouts.load_s
        until = time.monotonic() + limit_s
        with self._lock:
            while not any(replica.holds for replica in self._replicas):
                self._check()
                if time.monotonic() > until:
                    raise RunFailure(f"no sampler replica was ready within {limit_s:g} s of the loss of the last one")
                self._lock.wait(0.5)

    def _grow(self) -> None:
        """Tries once more to fill places that had no room."""
        with self._lock:
            resting, self._resting = self._resting, set()
            self._starting |= resting
        for index in resting:
            empty = _Replica(Member(f"sampler {index}", None), index)
            threading.Thread(target=self._renew, args=(empty,), daemon=True).start()

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._end_requests(self._failure)

    def _end_requests(self, error: Exception) -> None:
        for request in self._requests.values():
            request.future.set_exception(error)
        self._requests.clear()
        self._queue.clear()
        self._lock.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._lost_learner is not None:
            raise self._lost_learner
        if self._closing:
            raise RunFailure("the sampler pool was called after it was closed")

    def _gather(self, calls: dict[Member, Any], doing: str) -> tuple[dict[Member, Any], dict[Member, Lost]]:
        timeouts = self._config.timeouts
        return gather(calls, doing, timeouts.sync_s, timeouts.pulse_s)

    def _count(self, what: str) -> int:
        self._counts[what] += 1
        return self._counts[what]


class NoRoom(Exception):
    """The cluster has no place for a replacement now, and ``cluster.on_lost_node`` is ``shrink``."""


def fault_of(groups: Sequence[Group], prompts: Sequence[Prompt], n: int, vocabulary: int) -> str:
    """What is wrong with these answers to these prompts, or nothing."""
    if [group.prompt.id for group in groups] != [prompt.id for prompt in prompts]:
        return "other prompts than asked"
    for group in groups:
        if len(group.completions) != n:
            return f"{len(group.completions)} completions of prompt {group.prompt.id!r} instead of {n}"
        for one in group.completions:
            if len(one.logprobs) != len(one.token_ids):
                return f"a completion of prompt {group.prompt.id!r} without all log-probs"
            if not all(0 <= token < vocabulary for token in one.token_ids):
                return f"a token of prompt {group.prompt.id!r} that is not in the vocabulary"
            if not all(math.isfinite(value) and value < 1e-3 for value in one.logprobs):
                return f"a log-prob of prompt {group.prompt.id!r} that is none"
    return ""
