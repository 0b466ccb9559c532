"""Which settings would make a run fit its device, cheapest first, and how far one that fits can grow.

Every proposal is a whole configuration, checked and planned like the first (``planner.py``). Used by ``plan.py``.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.config import Config, changed
from common.device import quick_dtype
from common.errors import UserError
from deploy.planner import Plan, Planner, batched_tokens, summed
from learner import model as models
from learner.optim import check as check_optimizer

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


OPTIONS = "sampler.options."
FREE, SLOWER, NUMBERS, OTHER = 1.0, 4.0, 16.0, 64.0


def moves(config: Config, gpu: bool, card: int | None = None) -> list[list[Move]]:
    """Every knob's steps, each knob's cheapest first, on a card of so many bytes. What a step costs: nothing in the
    results; time; other numbers for the same algorithm; another algorithm or shorter answers."""

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
        found.append([
            Move(FREE + 0.1 * abs(step), ((f"{OPTIONS}gpu_memory_utilization", round(share + 0.05 * step, 2)),),
                 "same result, smaller cache" if step < 0 else "same result")
            for step in (-1, 1, -2, 2, -3, 3, -4, 4, 5, 6) if 0.1 <= share + 0.05 * step <= 0.9
        ])  # fmt: skip
        for name, value, least, price in (
            ("kv_cache_memory_bytes", int(spec.sampler.options.get("kv_cache_memory_bytes") or 0), 64 << 20,
             "same result, smaller cache"),
            ("max_num_batched_tokens",
             int(spec.sampler.options.get("max_num_batched_tokens") or batched_tokens(card)), 512,
             "same result, prompts in smaller steps"),
        ):  # fmt: skip
            found.append(halved(f"{OPTIONS}{name}", value, least, FREE, price))
        if spec.cluster.mode == "local" and not spec.memory.offload_while_sampling:
            found.append([Move(SLOWER, (("memory.offload_while_sampling", True),), "same result, copies each step")])
    elif spec.sampler.name == "vllm":
        found.append([
            Move(FREE, ((f"{OPTIONS}kv_cache_memory_bytes", size << 20),),
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
    if spec.model.dtype == "float32" and quick_dtype("gpu" if gpu else "cpu") == "bfloat16":
        found.append([Move(NUMBERS, (("model.dtype", "bfloat16"),), "coarser numbers, faster")])
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


def allowed(config: Config, changes: Sequence[Change]) -> Config | None:
    """The configuration with these set, options of the sampler each for itself; None where its own rules forbid it."""
    options = {key.removeprefix(OPTIONS): value for key, value in changes if key.startswith(OPTIONS)}
    settings = {key: value for key, value in changes if not key.startswith(OPTIONS)}
    if options:
        settings["sampler.options"] = {**config.sampler.options, **options}
    try:
        made = changed(config, settings)
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
    for knob in moves(first.config, planner.place.gpu, planner.place.card):
        useful: list[Tried] = []
        best = 0
        for move in knob:
            config = allowed(first.config, move.changes)
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
        saved = summed(*(one for _, one in picked))
        config = allowed(first.config, [change for move in chosen for change in move.changes])
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
        config = allowed(first.config, [change for move in picked[:count] for change in move.changes])
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
