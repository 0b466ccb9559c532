"""``nanogrpo plan``, and the plan that every run begins with: whether it fits its device, before anything is loaded.

Asks the planner (``planner.py``) and, where that helps, the solver (``solver.py``), and tells people and programs what
they found. Used by ``deploy/cli.py`` and, for the verdict alone, by ``deploy/run.py``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import Config
from common.errors import UserError, first_line
from deploy import components, disk
from deploy.memory_plan.estimate import GIB, Plan, Planner, place_of, planner_of
from deploy.memory_plan.search import Proposal, largest, solve
from learner.model import resolve

log = logging.getLogger("nanogrpo.plan")


def answer(
    config: Config, device_memory: str, say: Callable[[str], None], *, prompt_tokens: int = 0, limit_s: float = 45.0
) -> tuple[Plan, list[Proposal], dict[str, int]]:
    """The whole of ``nanogrpo plan``. ``say`` is told what is waited for; the search ends at about ``limit_s``."""
    say("reading the model's shape and the task's longest prompt")
    planner = planner_of(config, device_memory, prompt_tokens)
    say("running the learner on shapes")
    plan = planner.plan(planner.config)
    say(verdict(plan))
    if plan.fits is None:
        return plan, [], {}
    if not plan.fits:
        say("looking for the cheapest changes that make it fit")
        proposal = solve(planner, plan, limit_s, say)
        return plan, [proposal] if proposal else [], {}
    limits: dict[str, int] = {}
    longest = resolve.context_tokens(planner.folder) - planner.prompt_tokens
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


def before_run(ready: components.Prepared, console: Console, folder: Path) -> Plan | None:
    """The plan of a run about to begin on its device. Raises ``UserError`` when it cannot fit there, or on
    the disk of its ``folder``, and ``memory.plan`` is ``refuse``."""
    config = ready.config
    if config.memory.plan == "off":
        return None
    plan = _before_run(ready, console)
    if plan is not None:
        check_disk(config, folder, plan.learner.state_bytes, disk.model_bytes(config, plan.learner))
    return plan


def check_disk(config: Config, folder: Path, checkpoint: int, model: int) -> None:
    """Raises ``UserError``, or warns, as ``memory.plan`` says, when the run's files (bytes) have no room."""
    if sentence := disk.lacking(config, folder, checkpoint, model):
        if config.memory.plan == "refuse":
            raise UserError(f"{sentence}; memory.plan='warn' tries it all the same")
        log.warning("%s", sentence)


def _before_run(ready: components.Prepared, console: Console) -> Plan | None:
    config = ready.config
    planner = Planner(config, ready.folder, ready.longest_prompt, place_of(config))
    try:
        with console.status("plan    running the learner on shapes"):
            plan = planner.plan(config)
    except UserError:
        raise
    except Exception as error:  # a model that cannot run on shapes alone: no reason to refuse the run
        log.warning("this run's memory cannot be planned (%s); its rehearsal will show it", first_line(error))
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


def cures(ready: components.Prepared, plan: Plan | None) -> str:
    """After memory ran out all the same: the cheapest changes that take a fifth off the planned peak."""
    if plan is None:
        return LESS
    planner = Planner(ready.config, ready.folder, ready.longest_prompt, place_of(ready.config))
    planner.place = dataclasses.replace(planner.place, bytes=int(0.8 * plan.peak), whole=None)
    return _cheapest(planner, plan)


LESS = "Less learner.microbatch_tokens, or learner.gradient_checkpointing=true, takes less"


def _cheapest(planner: Planner, plan: Plan) -> str:
    """``cheapest``, where a search that fails must not stand before what it is a cure for."""
    try:
        return cheapest(planner, planner.plan(plan.config))
    except Exception as error:
        log.info("no search for settings that fit: %s", first_line(error))
        return LESS


def cheapest(planner: Planner, plan: Plan, limit_s: float = 12.0) -> str:
    """What would make it fit, in a sentence."""
    found = solve(planner, plan, limit_s, lambda text: None)
    if found is None:
        return "No change of a setting that was tried makes it fit; `nanogrpo plan` shows what takes the memory"
    return f"It fits with {', '.join(move.words() for move in found.moves)}"


def as_dict(plan: Plan, proposals: Sequence[Proposal] = (), limits: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Everything, in bytes and tokens, for ``--json``."""
    return {
        "units": {"memory": "bytes", "lengths": "tokens"},
        "fits": plan.fits,
        "verdict": verdict(plan),
        "margin": plan.margin,
        "prompt_tokens": plan.prompt_tokens,
        "completion_tokens": plan.config.sampler.max_tokens,
        "dtype": plan.config.model.dtype,
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
        "disk": {
            "checkpoint": plan.learner.state_bytes, "model": disk.model_bytes(plan.config, plan.learner),
            "peak": disk_bytes(plan),
        },
    }  # fmt: skip


def disk_bytes(plan: Plan) -> int:
    """What the run's folder holds at its fullest."""
    return disk.needed(plan.config, plan.learner.state_bytes, disk.model_bytes(plan.config, plan.learner))


def show(
    plan: Plan, console: Console, proposals: Sequence[Proposal] = (), limits: Mapping[str, int] | None = None
) -> None:
    """The same for people, in GiB."""
    for one in plan.devices:
        parts = list(dict.fromkeys(name for phase in one.phases.values() for name in phase))
        table = Table("GiB", *one.phases, title=f"{one.place.name}, {plan.config.model.dtype}")
        for name in parts:
            table.add_row(name, *(_gib(phase.get(name)) for phase in one.phases.values()))
        table.add_section()
        table.add_row("together", *(_gib(total) for total in one.peaks.values()))
        console.print(table)
        for note in one.notes:
            console.print(f"note: {note}", soft_wrap=True, markup=False)
    console.print(f"on the disk: {disk_bytes(plan) / GIB:.2f} GiB of checkpoints and final model", soft_wrap=True)
    console.print(verdict(plan), style="green" if plan.fits else "red" if plan.fits is False else "", soft_wrap=True)
    for proposal in proposals:
        console.print(f"would fit, {proposal.margin / GIB:.2f} GiB to spare, with:", soft_wrap=True)
        for move, saved in zip(proposal.moves, proposal.saved, strict=True):
            console.print(f"  {move.words()}: {saved / GIB:+.2f} GiB saved, {move.price}", soft_wrap=True, markup=False)
    for name, value in (limits or {}).items():
        console.print(f"largest {name} that still fits: {value}", soft_wrap=True)


def _gib(size: int | None) -> str:
    return f"{size / GIB:.2f}" if size else ""
