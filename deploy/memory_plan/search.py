"""Which settings would make a run fit its device, cheapest first, and how far one that fits can grow.

Every proposal is a whole configuration, checked and planned like the first (``estimate.py``). Used by ``output.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.config import Config, changed
from common.device import quick_dtype
from common.errors import UserError
from common.memory import OptionValues
from deploy.memory_plan.estimate import Plan, Planner

SAMPLER = "sampler.options."


@dataclasses.dataclass(frozen=True)
class Option:
    """One candidate change, of one setting or of two that go together, and its cost in words."""

    changes: tuple[tuple[str, Any], ...]
    cost: str
    is_series: bool = False
    """One of a series, each going further."""

    def words(self) -> str:
        return ", ".join(f"{key}={json.dumps(value)}" for key, value in self.changes)


def settings(config: Config, gpu: bool, of_sampler: Sequence[OptionValues]) -> Iterator[list[Option]]:
    """The settings that take memory, cheapest first, each with its values: first what costs nothing in the results,
    then time, then other numbers for the same algorithm, then another algorithm or shorter answers."""

    def halved(section: str, name: str, least: int, cost: str) -> list[Option]:
        value = int(getattr(getattr(config, section), name))
        smaller = itertools.takewhile(lambda size: size >= least, (value >> step for step in itertools.count(1)))
        return [Option(((f"{section}.{name}", size),), cost, is_series=True) for size in smaller]

    def single(cost: str, *changes: tuple[str, Any]) -> Option:
        return Option(changes, cost)

    lora, optimizer = config.model.lora_rank > 0, config.optimizer
    yield halved("learner", "microbatch_tokens", 128, "same result, smaller passes")
    yield halved("learner", "head_tokens", 32, "same result up to rounding")
    for option in of_sampler:
        yield [Option(((SAMPLER + option.name, value),), option.cost, option.is_series) for value in option.values]
    if gpu and config.cluster.mode == "local" and not config.memory.offload_while_sampling:
        yield [single("same result, copies each step", ("memory.offload_while_sampling", True))]
    if not config.learner.gradient_checkpointing:
        yield [single("same result, a third more time", ("learner.gradient_checkpointing", True))]
    if gpu and not lora and not optimizer.offload and optimizer.master == "float32":
        yield [single("same result, steps on the host", ("optimizer.offload", True))]
    small = optimizer.name == "adamw" and not optimizer.offload
    if small:
        yield [
            single("coarser moments", ("optimizer.name", "adamw_8bit")),
            single("coarser moments still", ("optimizer.name", "adamw_4bit")),
            single("no float32 master weights", ("optimizer.name", "adamw_8bit"), ("optimizer.master", "stochastic")),
            single("no float32 master weights", ("optimizer.name", "adamw_4bit"), ("optimizer.master", "stochastic")),
        ]
    if config.model.dtype == "float32" and quick_dtype("gpu" if gpu else "cpu") == "bfloat16":
        yield [single("coarser numbers, faster", ("model.dtype", "bfloat16"))]
    if lora:
        yield halved("model", "lora_rank", 4, "a smaller adapter")
    if lora and config.model.quantize == "off":
        yield [single("the base in 4 bits, slower", ("model.quantize", "nf4"))]
    if not lora:
        yield [
            single("an adapter instead of every weight", ("model.lora_rank", 16)),
            single("an adapter on a base in 4 bits", ("model.lora_rank", 16), ("model.quantize", "nf4")),
        ]
    if small:
        yield [single("another optimizer", ("optimizer.name", "adafactor"))]
    yield halved("sampler", "max_tokens", 16, "shorter answers")
    yield halved("train", "group_size", 2, "smaller groups")
    yield halved("train", "prompts_per_step", 1, "smaller batches")


def allowed(config: Config, changes: Sequence[tuple[str, Any]]) -> Config | None:
    """The configuration with these set, options of the sampler each for itself; None where its own rules forbid it."""
    options = {key.removeprefix(SAMPLER): value for key, value in changes if key.startswith(SAMPLER)}
    values = {key: value for key, value in changes if not key.startswith(SAMPLER)}
    if options:
        values["sampler.options"] = {**config.sampler.options, **options}
    try:
        return changed(config, values)
    except UserError:
        return None


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Changes that together make a run fit."""

    options: tuple[Option, ...]
    saved: tuple[int, ...]
    """Bytes each takes off the peak, in their order."""
    margin: int


def solve(planner: Planner, config: Config, limit_s: float, say: Callable[[str], None]) -> Proposal | None:
    """Changes that make the run fit, or None where no such were found within ``limit_s`` seconds.

    Goes through the settings in the order of what they cost, and keeps of each the value that helps most, until the run
    fits; then drops the changes that are not needed, most costly first.
    """
    end = time.monotonic() + limit_s

    def plan(options: Sequence[Option]) -> Plan | None:
        made = allowed(config, [change for option in options for change in option.changes])
        return planner.plan(made) if made is not None else None

    chosen: list[Option] = []
    lack = _excess(plan(chosen))
    for setting in settings(config, planner.device.gpu, planner.sampler(config).cheaper):
        best = None
        for option in setting:
            if not lack or time.monotonic() > end:
                break
            say(f"trying {option.words()}")
            after = _excess(plan([*chosen, option]))
            if after < 0.98 * lack:
                best, lack = option, after
            elif option.is_series:  # further would cost more and be no better
                break
        chosen += [best] if best is not None else []
    if lack:
        return None
    for option in reversed(chosen[:-1]):
        others = [other for other in chosen if other is not option]
        if not _excess(plan(others)):
            chosen = others
    peaks: list[int] = []
    margin = 0
    for count in range(len(chosen) + 1):
        found = plan(chosen[:count])
        # One that is allowed only with the next has saved nothing by itself.
        peaks.append(found.peak if found is not None else peaks[-1])
        margin = (found.margin if found is not None else None) or 0
    return Proposal(tuple(chosen), tuple(before - after for before, after in itertools.pairwise(peaks)), margin)


def _excess(plan: Plan | None) -> float:
    """Bytes that a plan lacks, over the phases of all devices; infinite where there is none."""
    if plan is None:
        return math.inf
    return sum(
        sum(max(0, peak - (part.device.bytes or peak)) for peak in part.peaks.values()) + part.sampler.shortfall
        for part in plan.devices
    )


def largest(planner: Planner, config: Config, key: str, most: int, limit_s: float) -> int:
    """The largest value up to ``most`` of a whole-number setting, within about a thirtieth, with which a run that fits
    still does."""
    section, name = key.split(".")
    low = int(getattr(getattr(config, section), name))
    end = time.monotonic() + limit_s

    def fits(value: int) -> bool:
        made = allowed(config, [(key, value)])
        return made is not None and bool(planner.plan(made).fits)

    high = low
    while high == low < most and time.monotonic() < end:
        high = min(2 * low, most)
        low = high if fits(high) else low
    while high - low > max(1, low // 32) and time.monotonic() < end:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
