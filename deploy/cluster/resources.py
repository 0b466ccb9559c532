"""The run's resources on the cluster: checks that the run fits, reserves a placement group, and starts services in it.

Problems of the cluster are reported before a model is loaded: missing resources (named, instead of an endless wait),
nodes with other versions. All parts share one placement group, which Ray repairs itself when a node is lost and another
has room. Import it once the cluster is joined; used by ``separate.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config import Config
from common.errors import RunFailure, UserError
from common.types import SamplerSetup
from deploy.cluster import connection
from deploy.cluster.actors import LearnerService, SamplerService
from deploy.cluster.calls import (
    ActorFailure,
    ActorInfo,
    ActorRef,
    NoRoom,
    call_all,
    close_all,
    start_actor,
    wait_until,
)
from deploy.cluster.connection import Need


def needs(config: Config, gpus: bool) -> list[dict[str, float]]:
    """What each part takes from one node: the sampler replicas first, then the learner's ranks."""
    cluster = config.cluster
    sampler: dict[str, float] = {"CPU": cluster.sampler_cpus}
    rank: dict[str, float] = {"CPU": cluster.learner_cpus}
    if gpus:
        rank["GPU"] = 1
        if config.sampler.name != "remote":  # whose server has its own
            sampler["GPU"] = config.sampler.tensor_parallel
    return [dict(sampler) for _ in range(cluster.samplers)] + [dict(rank) for _ in range(cluster.learner_ranks)]


def missing_room(wanted: Sequence[Need], nodes: Mapping[str, Need]) -> str:
    """What these nodes lack for these parts, each of which must fit on one node; nothing when all fit."""
    left = {name: dict(has) for name, has in nodes.items()}
    homeless = []
    for need in sorted(wanted, key=lambda need: sorted(need.items()), reverse=True):
        for has in left.values():
            if all(has.get(kind, 0) >= amount for kind, amount in need.items()):
                for kind, amount in need.items():
                    has[kind] -= amount
                break
        else:
            homeless.append(need)
    if not homeless:
        return ""
    texts = [_amounts(need) for need in wanted]
    parts = ", ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts))
    return (
        f"the run needs {_amounts(_sum(wanted))} in {len(wanted)} parts ({parts}), and {_amounts(_sum(homeless))} of "
        f"it has no place ({'; '.join(f'{name} has {_amounts(node)}' for name, node in sorted(nodes.items()))})"
    )


def _sum(needs: Sequence[Need]) -> Need:
    return {kind: sum(need[kind] for need in needs) for kind in needs[0]}


def _amounts(resources: Need) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in sorted(resources.items()) if amount) or "nothing"


@dataclasses.dataclass
class Room:
    """Places that are reserved on the cluster."""

    kind: Hashable
    """The same for runs that need the same."""
    placement: Any
    """Ray's placement group."""
    idle: dict[int, Any] = dataclasses.field(default_factory=dict)
    """Services that were closed and can be started again, by their place."""

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be down
            for actor in self.idle.values():
                ray.kill(actor)
            remove_placement_group(self.placement)


_kept: list[Room] | None = None
"""What ``services_kept`` keeps."""


@contextlib.contextmanager
def services_kept() -> Iterator[None]:
    """Inside, a run of this process leaves its room and its services to the next run that needs the same, which then
    starts without new processes and their imports. For notebooks and tests; join the cluster before."""
    global _kept
    _kept = []
    try:
        yield
    finally:
        for room in _kept:
            room.close()
        _kept = None


class Cluster:
    """The run's place on a cluster: starts its parts, and starts them again."""

    def __init__(self, config: Config, say: Callable[[str], None], *, resuming: bool = False) -> None:
        """Checks the room. Raises ``UserError`` for a cluster too small for the run: at once, or for a run that has
        been on it before after ``timeouts.start_s``, because a lost node may come back."""
        self._config, self._say = config, say
        has_gpus = connection.has_gpus()
        if config.train.device == "gpu" and not has_gpus:
            raise UserError("train.device='gpu' but no node of the cluster has a GPU; set train.device='cpu'")
        self._needs = needs(config, has_gpus and config.train.device != "cpu")
        self._kind = config.cluster.spread, *(tuple(sorted(need.items())) for need in self._needs)
        self._room: Room | None = None
        self._lock = threading.Lock()
        self._first: ActorInfo | None = None  # of the service that started first
        lacking = ""

        def fits() -> bool:
            nonlocal lacking
            lacking = missing_room(self._needs, connection.nodes())
            return not lacking

        def tell() -> None:
            say(f"waiting for nodes to come back (timeouts.start_s): {lacking}")

        if not wait_until(fits, config.timeouts.start_s if resuming else 0.0, tell, every_s=2.0):
            raise UserError(
                f"cluster.samplers={config.cluster.samplers} and cluster.learner_ranks="
                f"{config.cluster.learner_ranks} do not fit on the cluster: {lacking}; add nodes, or lower them, "
                "cluster.sampler_cpus or cluster.learner_cpus"
            )

    def take_room(self) -> None:
        """Reserves the places. Raises ``RunFailure`` when others hold them longer than ``timeouts.start_s``."""
        while _kept:
            room = _kept.pop()
            if room.kind == self._kind:
                self._room = room
                return
            room.close()
        placement = placement_group(self._needs, strategy="SPREAD" if self._config.cluster.spread else "PACK")
        self._room = Room(self._kind, placement)
        ready, limit_s = placement.ready(), self._config.timeouts.start_s
        if not wait_until(
            lambda: bool(ray.wait([ready], timeout=min(5.0, limit_s))[0]),
            limit_s,
            lambda: self._say(f"waiting for room on the cluster, which others use (at most {limit_s:g} s)"),
            every_s=0.0,
        ):
            raise RunFailure(
                f"the cluster had no room for the run within timeouts.start_s={limit_s:g}: it is large enough "
                f"({'; '.join(f'{node} has {_amounts(has)}' for node, has in connection.nodes().items())}), so "
                "other jobs hold it"
            )

    def start_sampler(self, index: int, setup: SamplerSetup) -> ActorRef:
        """Sampler replica ``index``, ready to take weights. Blocks; raises ``ActorFailure``, or ``NoRoom``."""
        name = f"sampler {index}"
        if not self._placed(index):
            if self._config.cluster.on_lost_node == "shrink":
                raise NoRoom("the cluster has no room for a replacement")
            self._wait_for_place(index, name)
        actor = ActorRef(name, self._service(SamplerService, index), index)
        self._note(self._ask([actor], {actor: actor.call("start", self._config, setup)}, "loading its model"))
        return actor

    def start_learner(self) -> list[ActorRef]:
        """Every rank of the learner, with fresh weights. Blocks; raises ``LearnerLost`` when one dies on the way."""
        places, timeouts = self._learner_places(), self._config.timeouts
        ranks = [
            ActorRef(f"learner rank {rank}", self._service(LearnerService, place), place)
            for rank, place in enumerate(places)
        ]
        one_host = len({self._home(place) for place in places}) == 1
        # A collective waits no longer than the longest thing between two of them.
        wait_s = max(timeouts.update_s, timeouts.sync_s, timeouts.load_s)
        try:
            url = self._ask(ranks, {ranks[0]: ranks[0].call("rendezvous", one_host)}, "opening a port")[ranks[0]]
            starts = {
                rank: rank.call("start", self._config, number, len(ranks), url, wait_s)
                for number, rank in enumerate(ranks)
            }
            self._note(self._ask(ranks, starts, "loading its model"))
        except ActorFailure as failure:
            raise failure.of_learner() from None
        return ranks

    def end(self, actors: Sequence[ActorRef], limit_s: float) -> None:
        """Ends these services, within ``limit_s``; those that can be started again wait in their places for that."""
        assert self._room is not None, "services live in a room"
        self._room.idle |= {actor.bundle: actor.handle for actor in close_all(actors, limit_s)}

    def close(self) -> None:
        """Gives the room back, or keeps it (``services_kept``)."""
        room, self._room = self._room, None
        if room is not None and _kept is not None:
            _kept.append(room)
        elif room is not None:
            room.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _learner_places(self) -> list[int]:
        """The bundles to start ranks in: all of them, or after a lost node those that are left (``shrink``)."""
        every = list(range(self._config.cluster.samplers, len(self._needs)))
        if self._config.cluster.on_lost_node == "shrink":
            placed = [place for place in every if self._placed(place)]
            if 0 < len(placed) < len(every):
                self._say(f"the learner goes on with {len(placed)} of {len(every)} ranks")
            if placed:
                return placed
        for place in every:
            self._wait_for_place(place, f"learner rank {place - every[0]}")
        return every

    def _wait_for_place(self, place: int, name: str) -> None:
        limit_s = self._config.timeouts.start_s
        if not wait_until(
            lambda: self._placed(place),
            limit_s,
            lambda: self._say(f"waiting for room for {name} on the cluster (at most {limit_s:g} s)"),
        ):
            raise RunFailure(f"the cluster had no room for {name} within timeouts.start_s={limit_s:g} after a loss")

    def _home(self, place: int) -> str | None:
        """Ray's id of the node that this part of the placement group is on."""
        assert self._room is not None, "a place is in a room"
        home: str | None = placement_group_table(self._room.placement)["bundles_to_node_id"].get(place)
        return home

    def _placed(self, place: int) -> bool:
        """Whether that is a living node. Ray counts a node as alive until some 15 s after its end, and would start
        services on it that never run."""
        home = self._home(place)
        return any(
            node["NodeID"] == home
            and node["Alive"]
            and not connection.knock(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
            for node in ray.nodes()
        )

    def _service(self, service: type, place: int) -> Any:
        """A service in this place: one that waits there, or a new process."""
        assert self._room is not None, "services live in a room"
        idle = self._room.idle.pop(place, None)
        if idle is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # its node may be down
                ray.get(idle.pulse.remote(), timeout=self._config.timeouts.pulse_s)
                return idle
            ray.kill(idle)
        need = self._needs[place]
        strategy = PlacementGroupSchedulingStrategy(self._room.placement, placement_group_bundle_index=place)
        return start_actor(service, num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), scheduling_strategy=strategy)

    def _ask(self, together: Sequence[ActorRef], calls: Mapping[ActorRef, Any], doing: str) -> dict[ActorRef, Any]:
        """The answers. Where one fails, all of ``together`` are ended."""
        limit_s = self._config.timeouts.load_s
        answers, failures = call_all(calls, doing, limit_s, limit_s, stop_on_failure=True)
        if failures:
            for actor in together:
                actor.kill()
            raise next((failure for failure in failures.values() if failure.died), next(iter(failures.values())))
        return answers

    def _note(self, infos: Mapping[ActorRef, ActorInfo]) -> None:
        """Records what started services reported."""
        for actor, info in infos.items():
            actor.info = info
            with self._lock:  # replicas start side by side
                self._first = self._first or info
            check_versions(actor, self._first)


def check_versions(actor: ActorRef, first: ActorInfo) -> None:
    """Raises ``UserError`` when a service runs with other versions than the first one did."""
    theirs = actor.started.versions
    differing = sorted(
        f"{name} {theirs.get(name, 'missing')} instead of {first.versions.get(name, 'none')}"
        for name in theirs.keys() | first.versions.keys()
        if theirs.get(name) != first.versions.get(name)
    )
    if differing:
        raise UserError(
            f"{actor.place} has {', '.join(differing)} on the node that answered first; install the same versions on "
            "every node (nanogrpo doctor --cluster compares them)"
        )
