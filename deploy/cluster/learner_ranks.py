"""``LearnerGroup``: the learner's ranks behind the one ``Learner`` contract, and the offers of their weights.

Every call goes to all ranks with the same arguments (learner/distributed.py shares the work among them). A rank that
dies or hangs takes the others with it, because they wait for it: the whole group is then lost (``LearnerLost``) and
begins again from its last checkpoint, which deploy/run.py sees to.
"""

from __future__ import annotations

import contextlib
import logging
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
from deploy.cluster.actors import Collective, Lost, Member, gather

log = logging.getLogger("nanogrpo.cluster")
_SHARE = 0.95  # of a limit: the plain watchdog around the call would end the process at the whole of it


class LearnerGroup:
    """Ranks that ``start()`` starts; ``end(members, limit_s)`` ends them, or keeps them for another start."""

    def __init__(
        self, config: Config, start: Callable[[], list[Member]], end: Callable[[Sequence[Member], float], None]
    ) -> None:
        self.version = 0
        self._config, self._start, self._end = config, start, end
        self._ranks: list[Member] = []
        self.turn = threading.Lock()  # the ranks do one thing at a time; a replacement sampler asks from its own thread
        self._joined: tuple[Member, ...] = ()  # the samplers in the broadcast's group
        self.facts: Mapping[str, Any] = {}

    @property
    def alive(self) -> bool:
        """Whether every rank shows a pulse."""
        return not self._dead()

    def open(self) -> None:
        self._ranks = self._start()
        assert self._ranks[0].about is not None
        self.facts = self._ranks[0].about.facts
        self._joined = ()

    def restart(self) -> None:
        """All ranks from the start, those that were lost in other processes; ``restore`` follows."""
        self.close()
        self.version = 0
        self.open()

    def places(self) -> list[str]:
        return [member.place for member in self._ranks]

    # -- the contract ------------------------------------------------------------------------------------------------

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        step = self.version + 1
        shared = ray.put(list(groups))
        metrics: dict[str, float] = self._all("update", shared, doing=f"doing step {step}", limit="update_s")
        self.version = step
        return metrics

    def rehearse(self, groups: Sequence[Group]) -> None:
        self._all("rehearse", ray.put(list(groups)), doing="rehearsing", limit="update_s")

    def publish_weights(self, merged: bool = False) -> Offer:
        kind, adapter_config = self._all("kind", merged, doing="naming its weights")
        return Offer(self, kind, adapter_config, merged, self.version)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        answer: list[list[float]] = self._all("logprobs", sequences, doing="answering the probe")
        return answer

    @contextlib.contextmanager
    def perturbed(self, seed: int) -> Iterator[None]:
        self._all("perturb", seed, doing="perturbing its weights")
        try:
            yield
        finally:
            self._all("settle", doing="taking the noise back")

    def save(self, folder: Path) -> None:
        self._all("save", folder, doing=f"writing checkpoint {self.version}", limit="load_s")

    def restore(self, folder: Path) -> None:
        self.version = self._all("restore", folder, doing=f"reading checkpoint {folder.name}", limit="load_s")

    def export(self, folder: Path, merged: bool = False) -> None:
        self._all("export", folder, merged, doing="writing the model", limit="load_s")

    def memory_gib(self) -> float:
        return max(self._each("memory_gib", doing="counting its memory").values())

    def sees(self, file: Path) -> list[str]:
        """The places of ranks whose node does not see this file."""
        seen = self._each("sees", str(file), doing="looking for the run folder")
        return [member.place for member, found in seen.items() if not found]

    def close(self) -> None:
        ranks, self._ranks = self._ranks, []
        self._end(ranks, 5.0)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _all(self, method: str, *arguments: Any, doing: str, limit: str = "sync_s") -> Any:
        """The first rank's answer, once all have answered."""
        with self.turn:
            return self._each(method, *arguments, doing=doing, limit=limit)[self._ranks[0]]

    def _each(self, method: str, *arguments: Any, doing: str, limit: str = "sync_s") -> dict[Member, Any]:
        calls = self.begin(method, *arguments)
        return self.finish(calls, doing, limit)

    def begin(self, method: str, *arguments: Any) -> dict[Member, Any]:
        return {member: getattr(member.actor, method).remote(*arguments) for member in self._ranks}

    def finish(self, calls: Mapping[Member, Any], doing: str, limit: str = "sync_s") -> dict[Member, Any]:
        """All ranks' answers. Raises ``LearnerLost`` when one died or hangs, ``RunFailure`` when one says so itself."""
        timeouts = self._config.timeouts
        doing = f"{doing} (timeouts.{limit})"
        answers, lost = gather(calls, doing, getattr(timeouts, limit) * _SHARE, timeouts.pulse_s, together=True)
        if not lost:
            return answers
        loss = next(iter(lost.values()))
        # Who died is the cause, and what the others report follows from it.
        if not loss.died and (dead := self._dead()):
            loss = Lost(next(iter(dead)), f"died while {doing}")
        raise LearnerLost(str(loss)) if loss.died or loss.echo else RunFailure(str(loss))

    def _dead(self) -> dict[Member, Lost]:
        calls = {member: member.actor.pulse.remote() for member in self._ranks}
        return gather(calls, "showing a pulse", self._config.timeouts.pulse_s, self._config.timeouts.pulse_s)[1]

    def join(self, samplers: Sequence[Member], timeout_s: float) -> dict[Member, Lost]:
        """A group of processes for broadcasts: the first rank and these samplers. Says which could not be reached."""
        if tuple(samplers) == self._joined:
            return {}
        self._joined = ()
        first = self._ranks[0]
        here = {_node(member) for member in (first, *samplers)}
        timeouts = self._config.timeouts
        # Whoever is dead by now would keep all the others waiting at the meeting place.
        calls = {member: member.actor.pulse.remote() for member in samplers}
        _, lost = gather(calls, "showing a pulse", timeouts.pulse_s, timeouts.pulse_s)
        if lost:
            _end(lost)
            return lost
        url = self.finish({first: first.actor.rendezvous.remote(len(here) == 1)}, "opening a port")[first]
        size = len(samplers) + 1
        mine = {first: first.actor.join.remote(url, 0, size, timeout_s)}
        theirs = {m: m.actor.join.remote(url, i, size, timeout_s) for i, m in enumerate(samplers, start=1)}
        _, lost = gather(theirs, "joining the broadcast", timeout_s, timeouts.pulse_s, together=True)
        if lost:
            _end(lost)
            gather(mine, "joining the broadcast", timeout_s, timeouts.pulse_s)  # it fails too
            return lost
        self.finish(mine, "joining the broadcast")
        self._joined = tuple(samplers)
        return {}

    def forget_broadcast(self) -> None:
        """After a broadcast that failed its group is of no use."""
        self._joined = ()

    def transport(self, kind: str, samplers: Sequence[Member]) -> Transport:
        """How weights of this kind travel to these samplers."""
        if kind == "adapter":
            return "with the call"
        one_host = {_node(member) for member in samplers} == {_node(self._ranks[0])}
        wish = self._config.sync.transport
        if wish == "collective" or (wish == "auto" and not one_host):
            return "collective"
        if not one_host:
            raise RunFailure(
                "sync.transport=shared_memory needs samplers and the learner's first rank on one host, and here they "
                f"are on {', '.join(sorted({member.place for member in (self._ranks[0], *samplers)}))}; use auto"
            )
        return "shared memory"


class Offer:
    """The group's weights of one version, to be delivered to samplers elsewhere: the driver itself never holds them."""

    def __init__(
        self,
        group: LearnerGroup,
        kind: Literal["full", "adapter"],
        adapter_config: Mapping[str, Any] | None,
        merged: bool,
        version: int,
    ) -> None:
        self.kind, self.adapter_config, self.version = kind, adapter_config, version
        self.transport: Transport = "shared memory"
        self._group, self._merged = group, merged
        self._handle: Any = None
        self._sent: tuple[str, int] | None = None

    def sent(self) -> tuple[str, int]:
        assert self._sent is not None, "the fingerprint is known once the weights were delivered"
        return self._sent

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("weights of a learner on other machines are delivered, never opened by the driver")

    def deliver(self, samplers: Sequence[Member], version: int) -> tuple[dict[Member, str], dict[Member, Lost]]:
        """Has these samplers load the weights: the fingerprints that arrived, and who was lost on the way.

        Raises ``LearnerLost`` when the learner is, and ``Busy`` when it works on the next version.
        """
        group = self._group
        limit_s = group._config.timeouts.sync_s * _SHARE
        pulse_s = group._config.timeouts.pulse_s
        if not group._ranks:
            raise LearnerLost("the learner is starting again")
        self.transport = group.transport(self.kind, samplers)
        if self.transport != "collective" and self._handle is not None:
            calls = {m: m.actor.load_weights.remote(self._handle, version) for m in samplers}
            arrived, lost = gather(calls, f"taking the weights of version {version}", limit_s, pulse_s)
            if lost and not group.alive:  # what it wrote into shared memory may have gone with it
                raise LearnerLost("the learner died, and its weights in shared memory with it")
            return arrived, lost
        if not group.turn.acquire(timeout=1.0):
            raise Busy("the learner is at work")
        try:
            if group.version != self.version:
                raise Busy("the learner has gone on to other weights")
            if self.transport == "collective":
                return self._broadcast(samplers, version, limit_s, pulse_s)
            method = "inline" if self.kind == "adapter" else "write_shared"
            handles = group.finish(group.begin(method, self._merged), "handing out its weights")
            self._handle = handles[group._ranks[0]]
            self._sent = self._handle.sent()
        finally:
            group.turn.release()
        calls = {m: m.actor.load_weights.remote(self._handle, version) for m in samplers}
        return gather(calls, f"taking the weights of version {version}", limit_s, pulse_s)

    def _broadcast(
        self, samplers: Sequence[Member], version: int, limit_s: float, pulse_s: float
    ) -> tuple[dict[Member, str], dict[Member, Lost]]:
        group = self._group
        lost = group.join(samplers, min(limit_s, 120.0))
        if lost:
            return {}, lost
        sending = group.begin("send", self._merged)
        offer = Collective(self.kind, self.adapter_config)
        calls = {m: m.actor.load_weights.remote(offer, version) for m in samplers}
        arrived, lost = gather(calls, f"taking the weights of version {version}", limit_s, pulse_s, together=True)
        if lost:
            group.forget_broadcast()
            _end(lost)
            # The sender fails too. Whether the learner itself is well shows in its next call.
            gather(sending, "sending its weights", limit_s, pulse_s)
            return {}, lost
        answers = group.finish(sending, "sending its weights")
        self._sent = answers[group._ranks[0]]
        return arrived, {}


class Busy(Exception):
    """The learner cannot hand out these weights now; the next sync will bring newer ones."""


def _end(lost: Mapping[Member, Lost]) -> None:
    """Ends the dead for good (a stopped process keeps its connections), so that those who wait for them fail now."""
    for member, loss in lost.items():
        if loss.died:
            member.kill()


def _node(member: Member) -> str:
    assert member.about is not None
    return member.about.node
