"""Many machines: joins a Ray cluster, sees that the run fits on it, and starts sampler replicas and learner ranks.

Everything that can be wrong with the cluster is said before a model is loaded: no cluster or token, too little of
something (said with what is missing, and not an endless wait), nodes with other versions. Where the parts sit is one
placement group, which Ray fixes by itself when a node is lost and another has room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import LearnerLost, RunFailure, UserError
from deploy.cluster import connection
from deploy.cluster.connection import Need
from deploy.components import Parts, Prepared, sampler_setup, warn_if_slow
from learner.model import resolve

log = logging.getLogger("nanogrpo.cluster")


@dataclasses.dataclass(frozen=True)
class Apart:
    """A ``Placement`` where each side has devices of its own: nobody has to make room."""

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def syncing(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def parts(ready: Prepared, folder: Path, say: Callable[[str], None]) -> Iterator[Parts]:
    """Sampler replicas and learner ranks as services; what is lost of them is replaced."""
    config = ready.config
    cluster = Cluster(config, say, resuming=any((folder / "checkpoints").glob("step-*")))
    from deploy.cluster.actors import Restarts
    from deploy.cluster.learner_ranks import LearnerGroup
    from deploy.cluster.sampler_pool import SamplerPool

    restarts = Restarts(config.cluster.max_restarts)
    setup = sampler_setup(ready, shares_device=False, threads=max(1, int(config.cluster.sampler_cpus)), base=False)
    vocabulary = max(len(ready.tokenizer), resolve.vocabulary(ready.folder))
    pool = SamplerPool(
        config, lambda index: cluster.start_sampler(index, setup), setup, vocabulary, restarts, say, cluster.end
    )
    learner = LearnerGroup(config, cluster.start_learner, cluster.end)

    def open_learner() -> None:
        while True:
            try:
                return learner.open()
            except LearnerLost as loss:
                say(restarts.one_more(str(loss)))

    def recover(loss: LearnerLost) -> None:
        say(restarts.one_more(str(loss)))
        pool.forget()
        learner.restart()

    with contextlib.ExitStack() as stack:
        stack.callback(cluster.close)
        cluster.take_room()
        stack.callback(pool.close)
        stack.callback(learner.close)
        _side_by_side(pool.open, open_learner)
        if blind := learner.sees(folder / "config.toml"):
            raise UserError(
                f"run.folder={str(folder)!r} is not on storage that every node sees: {', '.join(blind)} does not find "
                "config.toml in it; give a folder that is"
            )
        facts, timeouts = learner.facts, config.timeouts
        warn_if_slow(config, facts["device"])
        replaced_s = timeouts.start_s + timeouts.load_s + 2 * timeouts.sync_s
        tries = config.cluster.max_restarts + 1
        yield Parts(
            pool,
            learner,
            Apart(),
            f"sampler {config.sampler.name} x {config.cluster.samplers}: {', '.join(pool.places())}\n"
            f"learner {facts['parameters_trained'] / 1e6:.1f} M of {facts['parameters_total'] / 1e6:.1f} M weights, "
            f"{'packed' if facts['packed'] else 'padded'}, {config.model.dtype}, {facts['device']}: "
            f"{', '.join(learner.places())}",
            memory_gib=learner.memory_gib,
            # Each wait inside has its own limit; these are the sums, should all of them be needed.
            answer_s=tries * (timeouts.generate_s + replaced_s),
            sync_s=timeouts.generate_s + tries * replaced_s,
            restarts=lambda: restarts.made,
            recover=recover,
        )


def _side_by_side(*calls: Callable[[], None]) -> None:
    """Runs these at once; raises what the first of them that failed raised."""
    with futures.ThreadPoolExecutor(len(calls)) as threads:
        running = [threads.submit(call) for call in calls]
    for one in running:
        one.result()


def needs(config: Config, gpus: bool) -> list[dict[str, float]]:
    """What each part takes from one node: the sampler replicas first, then the learner's ranks."""
    cluster, wide = config.cluster, config.sampler.tensor_parallel
    sampler: dict[str, float] = {"CPU": cluster.sampler_cpus}
    rank: dict[str, float] = {"CPU": cluster.learner_cpus}
    if gpus:
        rank["GPU"] = 1
        if config.sampler.name != "remote":  # whose server has its own
            sampler["GPU"] = wide
    return [dict(sampler) for _ in range(cluster.samplers)] + [dict(rank) for _ in range(cluster.learner_ranks)]


def missing_room(wanted: Sequence[Need], nodes: Mapping[str, Need]) -> str:
    """What these nodes lack for these parts, each of which must fit on one node; nothing when all fit."""
    left = {name: dict(has) for name, has in nodes.items()}
    homeless = []
    for need in sorted(wanted, key=lambda one: sorted(one.items()), reverse=True):
        home = next(
            (n for n, has in left.items() if all(has.get(what, 0) >= much for what, much in need.items())), None
        )
        if home is None:
            homeless.append(need)
            continue
        for what, much in need.items():
            left[home][what] -= much
    if not homeless:
        return ""
    lacking = {what: sum(need[what] for need in homeless) for what in homeless[0]}
    has = "; ".join(f"{name} has {_amounts(node)}" for name, node in sorted(nodes.items()))
    whole = {what: sum(need[what] for need in wanted) for what in wanted[0]}
    return (
        f"the run needs {_amounts(whole)} in {len(wanted)} parts ({_kinds(wanted)}), and {_amounts(lacking)} of it has "
        f"no place ({has})"
    )


@dataclasses.dataclass
class Room:
    """Places that are reserved on the cluster."""

    group: Any
    """Ray's placement group."""
    idle: dict[int, Any] = dataclasses.field(default_factory=dict)
    """Services that were closed and can be started again, by their place."""

    def close(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):  # the cluster may be gone
            for actor in self.idle.values():
                ray.kill(actor)
            remove_placement_group(self.group)


class _Kept:
    """What ``services_kept`` keeps from one run to the next."""

    wanted = False
    room: Room | None = None
    kind: Any = None

    def take(self, kind: Any) -> Room | None:
        """The room kept, if it is of this kind; one of another kind is given back."""
        room, self.room = self.room, None
        if room is not None and (kind != self.kind or not self.wanted):
            room.close()
            return None
        return room

    def give(self, kind: Any, room: Room) -> None:
        if self.wanted:
            self.kind, self.room = kind, room
        else:
            room.close()


_KEPT = _Kept()


@contextlib.contextmanager
def services_kept() -> Iterator[None]:
    """Inside, a run of this process leaves its room and its services to the next run that needs the same, which then
    starts without new processes and their imports. For notebooks and tests; join the cluster before."""
    _KEPT.wanted = True
    try:
        yield
    finally:
        _KEPT.wanted = False
        _KEPT.take(None)


class Cluster:
    """The run's place on a cluster: starts its parts, and starts them again."""

    def __init__(self, config: Config, say: Callable[[str], None], *, resuming: bool = False) -> None:
        """Connects and checks the room. Raises ``UserError`` for a cluster too small for the run: at once, or for a run
        that has been on it before after ``timeouts.start_s``, because a lost node may come back."""
        self._membership = contextlib.ExitStack()
        self._membership.enter_context(connection.joined(config))
        self._config, self._say = config, say
        has_gpus = connection.has_gpus()
        if config.train.device == "gpu" and not has_gpus:
            raise UserError("train.device='gpu' but no node of the cluster has a GPU; set train.device='cpu'")
        self._needs = needs(config, has_gpus and config.train.device != "cpu")
        self._lock = threading.Lock()
        until = time.monotonic() + (config.timeouts.start_s if resuming else 0.0)
        told = False
        while lacking := missing_room(self._needs, connection.nodes()):
            if time.monotonic() >= until:
                raise UserError(
                    f"cluster.samplers={config.cluster.samplers} and cluster.learner_ranks="
                    f"{config.cluster.learner_ranks} do not fit on the cluster: {lacking}; add nodes, or lower them, "
                    "cluster.sampler_cpus or cluster.learner_cpus"
                )
            if not told:
                say(f"waiting for nodes to come back (timeouts.start_s): {lacking}")
                told = True
            time.sleep(2.0)
        self._versions: Mapping[str, str] = {}
        self._room: Room | None = None

    def take_room(self) -> None:
        """Reserves the places. Raises ``RunFailure`` when others hold them longer than ``timeouts.start_s``."""
        import ray
        from ray.util.placement_group import placement_group

        self._room = _KEPT.take(self._kind_of_room())
        if self._room is not None:
            return
        group = placement_group(self._needs, strategy="SPREAD" if self._config.cluster.spread else "PACK")
        self._room = Room(group)
        limit_s = self._config.timeouts.start_s
        ready, started = group.ready(), time.monotonic()
        told = False
        while not ray.wait([ready], timeout=2.0)[0]:
            waited = time.monotonic() - started
            if waited > limit_s:
                raise RunFailure(
                    f"the cluster had no room for the run within timeouts.start_s={limit_s:g}: it is large enough "
                    f"({'; '.join(f'{node} has {_amounts(has)}' for node, has in connection.nodes().items())}), so "
                    "other jobs hold it"
                )
            if waited > 5 and not told:
                self._say(f"waiting for room on the cluster, which others use (at most {limit_s:g} s)")
                told = True

    def start_sampler(self, index: int, setup: Any) -> Any:
        """Sampler replica ``index``, ready to take weights. Blocks; raises ``Lost``, or ``NoRoom``."""
        from deploy.cluster.actors import Member, SamplerService
        from deploy.cluster.sampler_pool import NoRoom

        if not self._placed(index):
            if self._config.cluster.on_lost_node == "shrink":
                raise NoRoom("the cluster has no room for a replacement")
            self._wait_for_place(index, f"sampler {index}")
        member = Member(f"sampler {index}", self._actor(SamplerService, index), bundle=index)
        self._begin(member, member.actor.start.remote(self._config, setup))
        return member

    def start_learner(self) -> list[Any]:
        """Every rank of the learner, with fresh weights. Blocks; raises ``LearnerLost`` when one dies on the way."""
        from deploy.cluster.actors import LearnerService, Member, gather

        places = self._learner_places()
        members = [
            Member(f"learner rank {rank}", self._actor(LearnerService, place), bundle=place)
            for rank, place in enumerate(places)
        ]
        timeouts = self._config.timeouts
        limit_s = timeouts.load_s

        def ask(calls: Mapping[Any, Any], doing: str) -> dict[Any, Any]:
            answers, lost = gather(calls, doing, limit_s, limit_s, together=True)
            if lost:
                for member in members:
                    member.kill()
                loss = next((one for one in lost.values() if one.died), next(iter(lost.values())))
                raise LearnerLost(str(loss)) if loss.died or loss.echo else RunFailure(str(loss))
            return answers

        where = ask({member: member.actor.where.remote() for member in members}, "starting")
        first = members[0]
        one_host = len({node for node, _ in where.values()}) == 1
        url = ask({first: first.actor.rendezvous.remote(one_host)}, "opening a port")[first]
        # A collective waits no longer than the longest thing between two of them.
        wait_s = max(timeouts.update_s, timeouts.sync_s, timeouts.load_s)
        calls = {m: m.actor.start.remote(self._config, r, len(members), url, wait_s) for r, m in enumerate(members)}
        for member, about in ask(calls, "loading its model").items():
            member.about = about
            self._same_versions(member)
        return members

    def end(self, members: Sequence[Any], limit_s: float) -> None:
        """Ends these services, within ``limit_s``; those that can be started again wait in their places for that."""
        from deploy.cluster.actors import close_all

        assert self._room is not None, "services live in a room"
        self._room.idle |= {member.bundle: member.actor for member in close_all(members, limit_s)}

    def close(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            _KEPT.give(self._kind_of_room(), room)
        self._membership.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _kind_of_room(self) -> Any:
        return self._config.cluster.spread, *(tuple(sorted(need.items())) for need in self._needs)

    def _learner_places(self) -> list[int]:
        """The bundles to start ranks in: all of them, or after a lost node those that are left (``shrink``)."""
        all_places = list(range(self._config.cluster.samplers, len(self._needs)))
        if self._config.cluster.on_lost_node == "shrink":
            placed = [place for place in all_places if self._placed(place)]
            if placed:
                if len(placed) < len(all_places):
                    self._say(f"the learner goes on with {len(placed)} of {len(all_places)} ranks")
                return placed
        for place in all_places:
            self._wait_for_place(place, f"learner rank {place - all_places[0]}")
        return all_places

    def _wait_for_place(self, index: int, name: str) -> None:
        limit_s = self._config.timeouts.start_s
        until = time.monotonic() + limit_s
        told = False
        while not self._placed(index):
            if time.monotonic() > until:
                raise RunFailure(f"the cluster had no room for {name} within timeouts.start_s={limit_s:g} after a loss")
            if not told:
                self._say(f"waiting for room for {name} on the cluster (at most {limit_s:g} s)")
                told = True
            time.sleep(1.0)

    def _placed(self, index: int) -> bool:
        """Whether this part of the placement group has a living node."""
        import ray
        from ray.util import placement_group_table

        assert self._room is not None, "a place is in a room"
        home = placement_group_table(self._room.group)["bundles_to_node_id"].get(index)
        return any(node["NodeID"] == home and node["Alive"] and _answers(node) for node in ray.nodes())

    def _actor(self, service: type, index: int) -> Any:
        """A service in this place: one that waits there, or a new process."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from deploy.cluster.actors import actor_of

        assert self._room is not None, "services live in a room"
        idle = self._room.idle.pop(index, None)
        if idle is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # its node may be gone
                ray.get(idle.pulse.remote(), timeout=self._config.timeouts.pulse_s)
                return idle
            ray.kill(idle)
        need = self._needs[index]
        return actor_of(
            service,
            num_cpus=need["CPU"],
            num_gpus=need.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._room.group, placement_group_bundle_index=index),
        )

    def _begin(self, member: Any, call: Any) -> None:
        from deploy.cluster.actors import gather

        limit_s = self._config.timeouts.load_s
        answers, lost = gather({member: call}, "loading its model", limit_s, limit_s)
        for loss in lost.values():
            member.kill()
            raise loss
        member.about = answers[member]
        self._same_versions(member)

    def _same_versions(self, member: Any) -> None:
        """Raises ``UserError`` when a service runs with other versions than the first one did."""
        theirs = member.about.versions
        with self._lock:  # replicas start side by side
            self._versions = self._versions or theirs
        differing = sorted(
            f"{name} {theirs.get(name, 'missing')} instead of {self._versions.get(name, 'none')}"
            for name in theirs.keys() | self._versions.keys()
            if theirs.get(name) != self._versions.get(name)
        )
        if differing:
            raise UserError(
                f"{member.place} has {', '.join(differing)} on the node that answered first; install the same "
                "versions on every node (nanogrpo doctor --cluster compares them)"
            )


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether a node is there. Ray takes one for alive until some 15 s after its end, and would start services on it
    that never come."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=5).close()
    except OSError:
        return False
    return True


def _amounts(resources: Need) -> str:
    return " and ".join(f"{much:g} {what}" for what, much in sorted(resources.items()) if much) or "nothing"


def _kinds(wanted: Sequence[Need]) -> str:
    texts = [_amounts(need) for need in wanted]
    return ", ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts))
