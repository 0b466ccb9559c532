"""Which settings would make a run fit its device, cheapest first, and how far one that fits can grow.

Every proposal is a whole configuration, checked and planned like the first (``planner.py``). Used by ``plan.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from common.config import Config, changed
from common.device import quick_dtype
from common.errors import UserError
from deploy.memory_plan.estimate import Plan, Planner, batched_tokens
from learner.model import loading
from learner.optimizer import check as check_optimizer

Change = tuple[str, Any]


@dataclasses.dataclass(frozen=True)
class Move:
    """One value of one setting, or of two that go together, and what it costs in words."""

    changes: tuple[Change, ...]
    price: str
    turned: bool = False
    """One of a row that goes further and further."""

    def words(self) -> str:
        return ", ".join(f"{key}={json.dumps(value)}" for key, value in self.changes)


OPTIONS = "sampler.options."


def moves(config: Config, gpu: bool, card: int | None = None) -> list[list[Move]]:
    """The settings that take memory, cheapest first, with their values, on a card of so many bytes: first what costs
    nothing in the results, then time, then other numbers for the same algorithm, then another algorithm or shorter
    answers."""

    def halved(key: str, value: int, least: int, price: str) -> list[Move]:
        steps = itertools.takewhile(lambda size: size >= least, (value >> turn for turn in itertools.count(1)))
        return [Move(((key, size),), price, turned=True) for size in steps]

    def one(price: str, *changes: Change) -> Move:
        return Move(changes, price)

    lora, vllm, options = config.model.lora_rank > 0, config.sampler.name == "vllm", config.sampler.options
    optimizer = config.optimizer
    found = [
        halved("learner.microbatch_tokens", config.learner.microbatch_tokens, 128, "same result, smaller passes"),
        halved("learner.head_tokens", config.learner.head_tokens, 32, "same result up to rounding"),
    ]
    if gpu and vllm:
        share = float(options.get("gpu_memory_utilization", 0.5))
        shares = [round(share + 0.05 * step, 2) for step in (-1, 1, -2, 2, -3, 3, -4, 4, 5, 6)]
        found.append([one("same result, another cache", (f"{OPTIONS}gpu_memory_utilization", value))
                      for value in shares if 0.1 <= value <= 0.9])  # fmt: skip
        cache = int(options.get("kv_cache_memory_bytes") or 0)
        batched = int(options.get("max_num_batched_tokens") or batched_tokens(card))
        found += [
            halved(f"{OPTIONS}kv_cache_memory_bytes", cache, 64 << 20, "same result, smaller cache"),
            halved(f"{OPTIONS}max_num_batched_tokens", batched, 512, "same result, prompts in smaller steps"),
        ]
    elif vllm:
        found.append([one("same result, smaller cache", (f"{OPTIONS}kv_cache_memory_bytes", size << 20))
                      for size in (1024, 512, 256)])  # fmt: skip
    if gpu and vllm and config.cluster.mode == "local" and not config.memory.offload_while_sampling:
        found.append([one("same result, copies each step", ("memory.offload_while_sampling", True))])
    if not config.learner.gradient_checkpointing:
        found.append([one("same result, a third more time", ("learner.gradient_checkpointing", True))])
    if gpu and not lora and not optimizer.offload and optimizer.master == "float32":
        found.append([one("same result, steps on the host", ("optimizer.offload", True))])
    small = optimizer.name == "adamw" and not optimizer.offload
    if small:
        eight, four, none = (("optimizer.name", "adamw_8bit"), ("optimizer.name", "adamw_4bit"),
                             ("optimizer.master", "stochastic"))  # fmt: skip
        found.append([
            one("coarser moments", eight), one("coarser moments still", four),
            one("no float32 masters", eight, none), one("no float32 masters", four, none),
        ])  # fmt: skip
    if config.model.dtype == "float32" and quick_dtype("gpu" if gpu else "cpu") == "bfloat16":
        found.append([one("coarser numbers, faster", ("model.dtype", "bfloat16"))])
    if lora:
        found.append(halved("model.lora_rank", config.model.lora_rank, 4, "a smaller adapter"))
        if config.model.quantize == "off":
            found.append([one("the base in 4 bits, slower", ("model.quantize", "nf4"))])
    else:
        rank = ("model.lora_rank", 16)
        found.append([
            one("an adapter instead of every weight", rank),
            one("an adapter on a base in 4 bits", rank, ("model.quantize", "nf4")),
        ])  # fmt: skip
    if small:
        found.append([one("another optimizer", ("optimizer.name", "adafactor"))])
    return [setting for setting in (
        *found,
        halved("sampler.max_tokens", config.sampler.max_tokens, 16, "shorter answers"),
        halved("train.group_size", config.train.group_size, 2, "smaller groups"),
        halved("train.prompts_per_step", config.train.prompts_per_step, 1, "smaller batches"),
    ) if setting]  # fmt: skip


def allowed(config: Config, changes: Sequence[Change]) -> Config | None:
    """The configuration with these set, options of the sampler each for itself; None where its own rules forbid it."""
    options = {key.removeprefix(OPTIONS): value for key, value in changes if key.startswith(OPTIONS)}
    settings = {key: value for key, value in changes if not key.startswith(OPTIONS)}
    if options:
        settings["sampler.options"] = {**config.sampler.options, **options}
    try:
        made = changed(config, settings)
        loading.check(made.model, made.cluster.learner_ranks)
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


def solve(planner: Planner, first: Plan, limit_s: float, say: Callable[[str], None]) -> Proposal | None:
    """Changes that make the run fit, or None where no such were found within ``limit_s`` seconds.

    Goes through the settings in the order of what they cost, and keeps of each the value that helps most, until the
    run fits; then leaves out again what it can do without, dearest first. Plans of shallow copies decide, and the
    whole model's has the last word.
    """
    end = time.monotonic() + limit_s

    def missing(moves_: Sequence[Move]) -> float:
        """Bytes, over the phases of all devices; infinite for changes that are not allowed."""
        config = allowed(first.config, [change for move in moves_ for change in move.changes])
        return _missing(planner.plan(config, quick=True)) if config is not None else math.inf

    chosen: list[Move] = []
    lack = missing(chosen)
    for setting in moves(first.config, planner.place.gpu, planner.place.card):
        best = None
        for move in setting:
            if not lack or time.monotonic() > end:
                break
            say(f"trying {move.words()}")
            after = missing([*chosen, move])
            if after < 0.98 * lack:
                best, lack = move, after
            elif move.turned:  # further would be dearer and no better
                break
        if best is not None:
            chosen.append(best)
    for move in reversed(chosen[:-1]):
        if not lack and not missing(others := [one for one in chosen if one is not move]):
            chosen = others
    config = allowed(first.config, [change for move in chosen for change in move.changes])
    if lack or config is None:
        return None
    plan = planner.plan(config)
    if not plan.fits or plan.margin is None:
        return None
    configs = [allowed(first.config, [c for move in chosen[:count] for c in move.changes])
               for count in range(len(chosen) + 1)]  # fmt: skip
    peaks = [planner.plan(config or first.config, quick=True).peak for config in configs]
    saved = tuple(before - after for before, after in itertools.pairwise(peaks))
    return Proposal(tuple(chosen), saved, plan.margin)


def _missing(plan: Plan) -> int:
    return sum(
        sum(max(0, peak - (device.place.bytes or peak)) for peak in device.peaks.values()) + device.short
        for device in plan.devices
    )


def largest(planner: Planner, first: Plan, key: str, most: int, limit_s: float) -> int:
    """The largest value of a whole-number setting up to ``most`` with which the run still fits."""
    section, name = key.split(".")
    low = int(getattr(getattr(first.config, section), name))
    end = time.monotonic() + limit_s

    def fits(value: int) -> bool:
        config = allowed(first.config, [(key, value)])
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
        config = allowed(first.config, [(key, low)])
        if config is not None and planner.plan(config).fits:
            return low
        low = low * 31 // 32 if low > 32 else low - 1
    return low
