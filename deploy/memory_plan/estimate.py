"""What a run takes of its device's memory, phase by phase, without loading a weight.

Puts together the learner's measured memory (``learner/memory_estimate.py``), what the sampler says of its own
(``common/memory.py``), and which side is awake when. The constants below are neither measured on the run nor counted;
each gives its source.

Left out: what would make a run fit (``search.py``), and the output (``output.py``).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from common import plugins
from common.config import Config
from common.errors import UserError
from common.memory import GIB, ModelSize, Room, SamplerMemory
from common.types import AdapterSpec, SamplerSetup
from deploy import components
from learner import memory_estimate
from learner.memory_estimate import LearnerMemory
from learner.model import adapters, for_sampler, resolve

PROCESS_CPU = int(0.47 * GIB)
"""A process with torch, transformers, peft and this package imported, resident: measured on Linux, torch 2.13+cpu."""
HEAP_GAPS = 0.5
"""On a CPU, of the bytes of activations, gradients and the output head alive at once: what the process holds beyond
them, as freed blocks that no later tensor fits and as compiled products. Fitted to the measured peaks of benchmark d
(glibc, torch 2.13+cpu, eight cases): 0.43 to 0.66."""
PROCESS_GPU = 3 * GIB
"""The same process on a GPU, in host memory, vLLM included: stated, 2 to 4 GiB by torch's build and driver."""
CONTEXT = int(0.5 * GIB)
"""A process's CUDA context with torch's kernels loaded; stated, 0.3 to 0.6 GiB by card and driver."""
RESIDENT = ("weights", "reference", "float32 master weights", "optimizer")
SHARDED = (*RESIDENT, "gradients")
"""What ranks divide among them."""

NOTHING = SamplerMemory()
Parts = Mapping[str, int]


@dataclass(frozen=True)
class DeviceSpec:
    """Where a run is to fit."""

    name: str
    gpu: bool
    bytes: int | None
    """What this run can have of it; None where it is unknown: a device of another machine."""
    whole: int | None = None
    """All of it, of which vLLM takes its share; None: the same as ``bytes``."""
    host: int | None = None
    """Of a GPU: the memory of its host that this run can have; None where it is unknown."""


@dataclass(frozen=True)
class DevicePlan:
    """Peak bytes on one device, by phase and part, and what its sampler says of its memory."""

    device: DeviceSpec
    phases: Mapping[str, Parts]
    sampler: SamplerMemory = NOTHING

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def worst(self) -> str:
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def peak(self) -> int:
        return self.peaks[self.worst]

    @property
    def margin(self) -> int | None:
        """Bytes to spare; negative: missing."""
        if self.device.bytes is None:
            return None
        spare = self.device.bytes - self.peak
        return min(spare, -self.sampler.shortfall) if self.sampler.shortfall else spare


@dataclass(frozen=True)
class Plan:
    """A run's devices."""

    config: Config
    devices: tuple[DevicePlan, ...]
    learner: LearnerMemory
    prompt_tokens: int

    @property
    def margin(self) -> int | None:
        return min((part.margin for part in self.devices if part.margin is not None), default=None)

    @property
    def fits(self) -> bool | None:
        return None if self.margin is None else self.margin >= 0

    @property
    def peak(self) -> int:
        """On the devices that compute."""
        gpus = [part for part in self.devices if part.device.gpu]
        return max(part.peak for part in gpus or self.devices)


class Planner:
    """Plans configurations of one model and task on one kind of device; what was measured once is kept."""

    def __init__(self, config: Config, folder: Path, prompt_tokens: int, device: DeviceSpec) -> None:
        self.config, self.folder, self.prompt_tokens, self.device = config, folder, prompt_tokens, device
        self._measured: dict[str, LearnerMemory] = {}
        self._sizes: dict[str, ModelSize] = {}

    def plan(self, config: Config) -> Plan:
        learner, sampler = self._learner(config), self.sampler(config)
        gpu, device, ray = self.device.gpu, self.device, config.cluster.mode == "ray"
        load = parts_of(learner, "load", gpu)
        learn = max((parts_of(learner, phase, gpu) for phase in ("learn", "step")), key=_total)
        # The proof's probe; a tensor as it is, its noise, and their sum; the weights that the challenge keeps.
        proof = learner.probe + 3 * learner.largest_trained + (0 if gpu else self._challenge(config, learner))
        if not ray:
            devices = [DevicePlan(device, self._phases(config, sampler, load, learn, proof), sampler)]
            devices += [self._host(config, learner, sampler, load)] if gpu else []
        else:
            bucket, sampler = 2 * config.sync.bucket_mib << 20, replace(sampler, asleep=sampler.held)
            load, learn = self._one_ranks(config, load), self._one_ranks(config, learn)
            samplers, ranks = (replace(device, name=f"each {of}'s {device.name}") for of in ("sampler", "learner rank"))
            devices = [
                DevicePlan(samplers, self._phases(config, sampler, {}, {}, bucket), sampler),
                DevicePlan(ranks, self._phases(config, NOTHING, load, learn, proof + bucket)),
            ]
        return Plan(config, tuple(devices), learner, self.prompt_tokens)

    def _phases(
        self, config: Config, sampler: SamplerMemory, load: Parts, learn: Parts, sync_buffers: int
    ) -> dict[str, Parts]:
        """Memory by phase; the learner holds ``load`` from its start on. On a shared GPU the one that does not work
        sleeps; on a CPU both are there all the time, and across machines neither sleeps."""
        gpu = self.device.gpu
        base = {"CUDA context": CONTEXT} if gpu else {"process and libraries": PROCESS_CPU}
        awake, writing = sampler.held, summed(base, sampler.held, {"sampler activations": sampler.activations})
        asleep = summed(base, sampler.asleep)
        waiting = syncing = load
        if gpu and config.memory.offload_while_sampling and config.cluster.mode == "local":
            waiting, syncing = {}, {k: v for k, v in load.items() if k in ("weights", "reference")}
        # The sampler starts alone; what its profile took on a GPU is given back when the learner loads.
        loading = [writing, summed(base, awake, load)] if gpu else [summed(writing, load)]
        probing = {"sampler activations": sampler.probe, "sync buffers": sync_buffers}
        return {
            "load": max(loading, key=_total),
            "sample": summed(writing, waiting),
            "score": summed(asleep, load),
            "learn": summed(asleep, learn),
            "sync": summed(base, awake, syncing, probing),
            "save": summed(asleep, load),
        }

    def _host(self, config: Config, learner: LearnerMemory, sampler: SamplerMemory, load: Parts) -> DevicePlan:
        """The memory of the host beside a GPU that both share: what waits there."""
        base = {"process and libraries": PROCESS_GPU}
        if config.optimizer.offload:
            trained = learner.parameters_trained  # a master weight, a gradient and two moments, float32 each
            base |= {"float32 master weights": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
        # The copies are kept from one time to the next.
        parked = summed(base, {"the learner's copies": config.memory.offload_while_sampling * _total(load)})
        asleep = summed(parked, {"sleeping sampler's weights": sampler.asleep_on_host})
        dense = self._size(config).dense
        saved = load.get("float32 master weights", 0) + load.get("optimizer", 0)
        if config.model.lora_rank == 0 or config.run.export_merged:
            saved = max(saved, dense)
        phases = {
            "load": summed(base, {"weights on their way": 0 if config.model.quantize != "off" else dense}),
            "sample": parked,
            "score": asleep,
            "learn": asleep,
            "sync": summed(parked, {"challenge's copies": self._challenge(config, learner)}),
            "save": summed(asleep, {"what is written": saved}),
        }
        return DevicePlan(DeviceSpec("host memory", False, self.device.host), phases)

    # -- the two sides -----------------------------------------------------------------------------------------------

    def _learner(self, config: Config) -> LearnerMemory:
        key = config.model_dump_json(include={
            "model": True, "learner": True, "optimizer": True, "sync": True,
            "train": {"group_size", "prompts_per_step"}, "sampler": {"max_tokens", "temperature", "top_p", "top_k"},
        })  # fmt: skip
        if key not in self._measured:
            self._measured[key] = memory_estimate.measure(
                config, self.folder, self.prompt_tokens, on_cpu=not self.device.gpu
            )
        return self._measured[key]

    def _size(self, config: Config) -> ModelSize:
        key = f"{config.model.dtype} {config.model.quantize}"
        if key not in self._sizes:
            self._sizes[key] = memory_estimate.model_size(config.model, self.folder)
        return self._sizes[key]

    def sampler(self, config: Config) -> SamplerMemory:
        """What the run's sampler says that it takes."""
        needed = getattr(plugins.find("sampler", config.sampler.name), "memory_needed", None)
        if needed is None:
            said = f"sampler.name={config.sampler.name!r} does not say what memory it takes: it is counted as nothing"
            return SamplerMemory(notes=(said,))
        total, free = self.device.whole or self.device.bytes, self.device.bytes
        if self.device.gpu and free is not None:
            free -= CONTEXT
        room = Room(total, free, config.sync.probe_tokens if config.sync.proof else 0)
        found: SamplerMemory = needed(self.setup(config), config.sampler.options, self._size(config), room)
        return found

    def setup(self, config: Config) -> SamplerSetup:
        device = "gpu" if self.device.gpu else "cpu"
        return SamplerSetup(
            model_folder=str(self.folder), dtype=config.model.dtype,
            max_model_tokens=self.prompt_tokens + config.sampler.max_tokens,
            max_sequences=min(components.at_once(config), config.train.prompts_per_step * config.train.group_size),
            device=device, shares_device=config.cluster.mode == "local",
            adapter=AdapterSpec(config.model.lora_rank, {}) if adapters.sends_adapter(config.model) else None,
            tensor_parallel=config.sampler.tensor_parallel,
            quantize=for_sampler.sampler_quantize(self.folder, config.model, config.sampler.name, device),
        )  # fmt: skip

    def _challenge(self, config: Config, learner: LearnerMemory) -> int:
        return learner.trained_bytes if config.sync.proof and config.sync.challenge else 0

    def _one_ranks(self, config: Config, parts: dict[str, int]) -> dict[str, int]:
        """Ranks divide weights, float32 master weights, gradients and moments; a layer at a time is whole."""
        ranks, size = config.cluster.learner_ranks, self._size(config)
        if ranks == 1:
            return parts
        own = {name: held // ranks if name in SHARDED else held for name, held in parts.items()}
        return {**own, "gathered layers": 2 * ((size.dense - size.head) // size.layers) + size.head}


def parts_of(learner: LearnerMemory, phase: str, gpu: bool) -> dict[str, int]:
    """On a CPU with what fragmentation adds to the tensors alive."""
    parts = summed(learner.phases[phase])
    passing = sum(size for name, size in parts.items() if name not in RESIDENT)
    return parts if gpu else summed(parts, {"gaps in the heap": int(HEAP_GAPS * passing)})


def _total(parts: Parts) -> int:
    return sum(parts.values())


def summed(*many: Parts) -> dict[str, int]:
    found: dict[str, int] = {}
    for parts in many:
        for name, size in parts.items():
            if size:
                found[name] = found.get(name, 0) + size
    return found


# -- where and with what -----------------------------------------------------------------------------------------------


def size_of(words: str) -> int:
    """Bytes of ``8GiB``, ``8 GB`` or ``8`` (GiB). Raises ``UserError``."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]i?B?)?\s*", words, re.I)
    if not match:
        raise UserError(f"--device-memory {words!r} is not a size; write 8GiB, 24GB or 80")
    unit = (match[2] or "GiB").upper()
    return int(float(match[1]) * (1000 if unit[1:] == "B" else 1024) ** ("KMGT".index(unit[0]) + 1))


def device_of(config: Config, device_memory: str = "") -> DeviceSpec:
    """The device that the run would take, and its memory: as given, as configured, or as detected."""
    said = size_of(device_memory) if device_memory else int(config.memory.device_gib * GIB)
    there = torch.accelerator.is_available()
    gpu = config.train.device == "gpu" or (config.train.device == "auto" and (there or bool(device_memory)))
    host = available() + psutil.Process().memory_info().rss
    if said:
        return DeviceSpec("GPU" if gpu else "host memory", gpu, said)
    if config.cluster.mode == "ray":
        return DeviceSpec("device", gpu, None)
    if not gpu:
        return DeviceSpec("host memory", False, host)
    if not there:
        return DeviceSpec("GPU", True, None)
    free, whole = torch.accelerator.get_memory_info()  # this process has its context by now
    return DeviceSpec("GPU", True, min(whole, free + CONTEXT), whole, host)


def available() -> int:
    """Host memory that this process could still take, within its container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            group = Path("/sys/fs/cgroup")
            free = min(free, int((group / limit).read_text()) - int((group / used).read_text()))
    return free


def planner_of(config: Config, device_memory: str = "") -> Planner:
    """Of a model folder with a config.json; its weights need not be there."""
    device = device_of(config, device_memory)
    config = components.resolve_dtype(config, "gpu" if device.gpu else "cpu")
    folder = Path(config.model.name).expanduser()
    if not (folder / "config.json").is_file():
        folder = resolve.prepare(config.model)
    return Planner(config, folder, longest_prompt(config), device)


def longest_prompt(config: Config) -> int:
    """Tokens of the run's longest prompt; without its tokenizer or data the limit that the run sets itself."""
    try:
        return components.prepare(
            config.model_copy(update={"train": config.train.model_copy(update={"device": "auto"})})
        ).longest_prompt
    except UserError as error:
        if config.sampler.max_prompt_tokens:
            return config.sampler.max_prompt_tokens
        raise UserError(
            f"the longest prompt is not known ({error}); set sampler.max_prompt_tokens to plan without the data"
        ) from None
