"""``LearnerRanks``: the learner's ranks behind the one ``Learner`` contract, and weight transfer to the samplers.

Every call goes to all ranks with the same arguments (learner/distributed.py shares the work among them). A rank that
dies or hangs takes the others with it, because they wait for it: the whole learner is then lost (``LearnerLost``) and
deploy/run.py restarts it from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from common.config import Config
from common.errors import LearnerLost, RunFailure
from common.protocols import Transport
from common.types import Group
from common.weights.handles import InlineWeights, SharedMemoryWeights
from deploy.cluster.calls import ActorFailure, ActorRef, LearnerBusy, call_all
from deploy.cluster.resources import Cluster

_SHARE = 0.95  # of a limit: the plain watchdog around the call would end the process at the whole of it
Written = InlineWeights | SharedMemoryWeights
Delivered = tuple[dict[ActorRef, str], dict[ActorRef, ActorFailure]]
"""The fingerprints that arrived, and the samplers where none did."""


@dataclasses.dataclass(eq=False)
class RankWeights:
    """A ``WeightHandle`` on one version of the ranks' weights. ``LearnerRanks.deliver`` sends them to samplers;
    ``open`` here, or ``sent`` before that, fetches the tensors into this process."""

    fetch: Callable[[RankWeights], Written]
    version: int
    merged: bool
    adapter_config: Mapping[str, Any] | None
    transport: Transport = "with the call"
    written: Written | None = None
    """For any sampler that can open it."""
    broadcast: tuple[str, int] | None = None
    """What was sent, once it was."""

    @property
    def kind(self) -> Literal["full", "adapter"]:
        return "full" if self.adapter_config is None else "adapter"

    def sent(self) -> tuple[str, int]:
        return self.broadcast or (self.written or self.fetch(self)).sent()

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.fetch(self).open()


class LearnerRanks:
    """The ranks that the cluster starts, and starts again."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self.version = 0
        self.facts: Mapping[str, Any] = {}
        self._timeouts, self._transport_wanted = config.timeouts, config.sync.transport
        self._cluster = cluster
        self._ranks: list[ActorRef] = []
        self._turn = threading.Lock()  # the ranks do one thing at a time; a new sampler asks from a thread of its own
        self._members: tuple[ActorRef, ...] = ()  # of the broadcast's group, the sender first
        self._url = ""  # their rendezvous

    def open(self) -> None:
        self._ranks = self._cluster.start_learner()
        self.facts = self._ranks[0].started.facts
        self._members = ()

    def restart(self) -> None:
        """All ranks from the start, those that were lost in other processes; ``restore`` follows."""
        self.close()
        self.version = 0
        self.open()

    def close(self) -> None:
        ranks, self._ranks = self._ranks, []
        self._cluster.end(ranks, 5.0)

    def places(self) -> list[str]:
        return [rank.place for rank in self._ranks]

    def memory_gib(self) -> float:
        return max(self._all("memory_gib", doing="counting its memory").values())

    def sees(self, file: Path) -> list[str]:
        """The places of ranks whose node does not see this file."""
        seen = self._all("sees", str(file), doing="looking for the run folder")
        return [rank.place for rank, found in seen.items() if not found]

    # -- the contract ------------------------------------------------------------------------------------------------

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        step = self.version + 1
        shared = ray.put(list(groups))
        doing = f"doing step {step}"
        metrics: dict[str, float] = self._first("learner", "update", shared, doing=doing, limit="update_s")
        self.version = step
        return metrics

    def rehearse(self, groups: Sequence[Group]) -> None:
        self._first("learner", "rehearse", ray.put(list(groups)), doing="rehearsing", limit="update_s")

    def publish_weights(self, merged: bool = False) -> RankWeights:
        return RankWeights(self._fetch, self.version, merged, None if merged else self.facts["adapter_config"])

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        answer: list[list[float]] = self._first("learner", "logprobs", sequences, doing="answering the probe")
        return answer

    @contextlib.contextmanager
    def perturbed(self, seed: int) -> Iterator[None]:
        self._first("perturb", seed, doing="perturbing its weights")
        try:
            yield
        finally:
            self._first("undo_perturb", doing="taking the noise back")

    def save(self, folder: Path) -> None:
        self._first("learner", "save", folder, doing=f"writing checkpoint {self.version}", limit="load_s")

    def restore(self, folder: Path) -> None:
        self.version = self._first("restore", folder, doing=f"reading checkpoint {folder.name}", limit="load_s")

    def export(self, folder: Path, merged: bool = False) -> None:
        self._first("learner", "export", folder, merged, doing="writing the model", limit="load_s")

    # -- weights -----------------------------------------------------------------------------------------------------

    def deliver(self, handle: RankWeights, samplers: Sequence[ActorRef], version: int) -> Delivered:
        """Makes these samplers load the weights. Raises ``LearnerLost`` when the learner is lost, and ``LearnerBusy``
        when it works on the next version."""
        if not self._ranks:
            raise LearnerLost("the learner is starting again")
        handle.transport = self._transport(handle.kind, samplers)
        doing = f"taking the weights of version {version}"
        if handle.transport == "collective" or handle.written is None:
            if not self._turn.acquire(timeout=1.0):
                raise LearnerBusy("the learner is at work")
            try:
                if self.version != handle.version:
                    raise LearnerBusy("the learner has other weights by now")
                if handle.transport == "collective":
                    return self._broadcast(handle, samplers, version, doing)
                handle.written = self._write(handle, inline=handle.kind == "adapter")
            finally:
                self._turn.release()
        calls = {sampler: sampler.call("load_weights", handle.written, version) for sampler in samplers}
        arrived, failures = self._call_all(calls, doing)
        if failures and self._without_pulse(self._ranks):
            raise LearnerLost("the learner died, and its weights in shared memory with it")
        return arrived, failures

    def _fetch(self, handle: RankWeights) -> Written:
        """The weights, into this process."""
        with self._turn:
            if self.version != handle.version:
                raise RunFailure(f"the learner has moved from version {handle.version} to {self.version}")
            return self._write(handle, inline=True)

    def _write(self, handle: RankWeights, inline: bool) -> Written:
        written = self._all("write_weights", handle.merged, inline, doing="handing out its weights")
        first: Written = written[self._ranks[0]]
        return first

    def _transport(self, kind: str, samplers: Sequence[ActorRef]) -> Transport:
        """How weights of this kind travel to these samplers."""
        if kind == "adapter":
            return "with the call"
        members = (self._ranks[0], *samplers)
        one_host = len({member.started.node for member in members}) == 1
        if self._transport_wanted == "collective" or (self._transport_wanted == "auto" and not one_host):
            return "collective"
        if not one_host:
            raise RunFailure(
                "sync.transport=shared_memory needs samplers and the learner's first rank on one host, and here they "
                f"are on {', '.join(sorted({member.place for member in members}))}; use auto"
            )
        return "shared memory"

    def _broadcast(self, handle: RankWeights, samplers: Sequence[ActorRef], version: int, doing: str) -> Delivered:
        """To a group of processes of the first rank and these samplers, which serves until others are asked for or one
        fails."""
        members = (self._ranks[0], *samplers)
        if members != self._members:
            # A dead member would keep all the others waiting at the rendezvous.
            if failures := self._without_pulse(samplers):
                _kill_dead(failures)
                return {}, failures
            first, one_host = self._ranks[0], len({member.started.node for member in members}) == 1
            self._url = self._finish({first: first.call("rendezvous", one_host)}, "opening a port")[first]
            self._members = members
        group = self._url, len(members), min(self._timeouts.sync_s * _SHARE, 120.0)
        sending = self._begin("send_weights", handle.merged, *group)
        calls = {
            sampler: sampler.call("receive_weights", version, number, *group)
            for number, sampler in enumerate(samplers, start=1)
        }
        arrived, failures = self._call_all(calls, doing, stop_on_failure=True)
        if failures:
            self._members = ()  # a group whose broadcast failed is of no use
            _kill_dead(failures)
            # The sender fails too. Whether the learner itself is well shows in its next call.
            self._call_all(sending, "sending its weights")
            return {}, failures
        handle.broadcast = self._finish(sending, "sending its weights")[self._ranks[0]]
        return arrived, {}

    # -- calls -------------------------------------------------------------------------------------------------------

    def _first(self, method: str, *arguments: Any, doing: str, limit: str = "sync_s") -> Any:
        """The first rank's answer, once all have answered."""
        with self._turn:
            return self._all(method, *arguments, doing=doing, limit=limit)[self._ranks[0]]

    def _all(self, method: str, *arguments: Any, doing: str, limit: str = "sync_s") -> dict[ActorRef, Any]:
        return self._finish(self._begin(method, *arguments), doing, limit)

    def _begin(self, method: str, *arguments: Any) -> dict[ActorRef, Any]:
        return {rank: rank.call(method, *arguments) for rank in self._ranks}

    def _finish(self, calls: Mapping[ActorRef, Any], doing: str, limit: str = "sync_s") -> dict[ActorRef, Any]:
        """All ranks' answers. Raises ``LearnerLost`` when one died or hangs, ``RunFailure`` when one reports a failure
        of its own."""
        doing = f"{doing} (timeouts.{limit})"
        answers, failures = self._call_all(calls, doing, limit, stop_on_failure=True)
        if not failures:
            return answers
        failure = next(iter(failures.values()))
        # The rank that died is the cause; the others' errors follow from it.
        if not failure.died and (dead := self._without_pulse(self._ranks)):
            failure = ActorFailure(next(iter(dead)), f"died while {doing}")
        raise failure.of_learner()

    def _call_all(
        self, calls: Mapping[ActorRef, Any], doing: str, limit: str = "sync_s", stop_on_failure: bool = False
    ) -> tuple[dict[ActorRef, Any], dict[ActorRef, ActorFailure]]:
        limit_s = getattr(self._timeouts, limit) * _SHARE
        return call_all(calls, doing, limit_s, self._timeouts.pulse_s, stop_on_failure)

    def _without_pulse(self, actors: Sequence[ActorRef]) -> dict[ActorRef, ActorFailure]:
        pulse_s = self._timeouts.pulse_s
        return call_all({actor: actor.call("pulse") for actor in actors}, "showing a pulse", pulse_s, pulse_s)[1]


def _kill_dead(failures: Mapping[ActorRef, ActorFailure]) -> None:
    """Ends the dead for good (a stopped process keeps its connections), so that those who wait for them fail now."""
    for actor, failure in failures.items():
        if failure.died:
            actor.kill()
