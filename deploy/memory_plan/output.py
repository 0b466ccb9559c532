"""``nanogrpo plan``, and the plan that every run starts with: whether it fits its device, before anything is loaded.

Asks the planner (``estimate.py``) and, where that helps, the search (``search.py``), and prints the results for people
and programs. Used by ``deploy/cli.py`` and, for the verdict alone, by ``deploy/run.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import Config
from common.errors import UserError, first_line
from common.memory import GIB
from deploy import components, disk
from deploy.memory_plan.estimate import Plan, Planner, device_of, planner_of
from deploy.memory_plan.search import Proposal, largest, solve
from learner.model import resolve

log = logging.getLogger("nanogrpo.plan")


def answer(
    config: Config, device_memory: str, say: Callable[[str], None], *, limit_s: float = 45.0
) -> tuple[Plan, Proposal | None, dict[str, int]]:
    """The whole of ``nanogrpo plan``: the plan, changes that would make it fit, how far it can grow. ``say`` prints
    progress; the search ends at about ``limit_s`` seconds."""
    say("reading the model's shape and the task's longest prompt")
    planner = planner_of(config, device_memory)
    say("running the learner on shapes")
    plan = planner.plan(planner.config)
    say(verdict(plan))
    if plan.fits is None:
        return plan, None, {}
    if not plan.fits:
        say("looking for the cheapest changes that make it fit")
        return plan, solve(planner, plan.config, limit_s, say), {}
    limits: dict[str, int] = {}
    longest = resolve.context_tokens(planner.folder) - planner.prompt_tokens
    for key, most in (("sampler.max_tokens", longest), ("train.group_size", 1024)):
        say(f"looking for the largest {key}")
        limits[key] = largest(planner, plan.config, key, most, limit_s / 2)
    first = plan.devices[0]
    if first.sampler.cache and first.device.bytes is not None:
        busy = max(peak for phase, peak in first.peaks.items() if "KV cache" in first.phases[phase])
        room = first.sampler.cache + first.device.bytes - busy
        limits |= {"KV cache (MiB)": room >> 20, "KV cache (tokens)": room // first.sampler.cache_per_token}
    return plan, None, limits


def verdict(plan: Plan) -> str:
    """One sentence."""
    known = [part for part in plan.devices if part.margin is not None]
    if not known:
        return f"peak {plan.peak / GIB:.2f} GiB; the device's memory is not known here: set memory.device_gib"
    tightest = min(known, key=lambda part: part.margin or 0)
    device, margin = tightest.device, tightest.margin or 0
    said = f"{tightest.peak / GIB:.2f} GiB at its peak ({tightest.worst}), of {(device.bytes or 0) / GIB:.2f} GiB of "
    if margin >= 0:
        return f"fits: {said}{device.name}, {margin / GIB:.2f} GiB to spare"
    return f"does not fit: {said}{device.name}, {-margin / GIB:.2f} GiB too much"


def before_run(ready: components.Prepared, console: Console, folder: Path) -> Plan | None:
    """The plan of a run about to start on its device. Raises ``UserError`` when it cannot fit there, or on the disk of
    its ``folder``, and ``memory.plan`` is ``refuse``."""
    config = ready.config
    if config.memory.plan == "off":
        return None
    planner = Planner(config, ready.folder, ready.longest_prompt, device_of(config))
    try:
        with console.status("plan    running the learner on shapes"):
            plan = planner.plan(config)
    except UserError:
        raise
    except Exception as error:  # a model that cannot run on shapes alone: no reason to refuse the run
        log.warning("this run's memory cannot be planned (%s); its rehearsal will show it", first_line(error))
        return None
    console.print(f"plan    {verdict(plan)}", soft_wrap=True, markup=False)
    for note in plan.devices[0].sampler.notes:
        log.info("plan: %s", note)
    if plan.fits is False:
        with console.status("plan    looking for what would make it fit"):
            advice = _advice(planner)
        _refuse(config, f"this run {verdict(plan)}. {advice}")
    check_disk(config, folder, plan.learner.state_bytes, disk.model_bytes(config, plan.learner))
    return plan


def check_disk(config: Config, folder: Path, checkpoint: int, model: int) -> None:
    """Raises ``UserError``, or warns, as ``memory.plan`` says, when the run's files (bytes) have no room."""
    if sentence := disk.lacking(config, folder, checkpoint, model):
        _refuse(config, sentence)


def _refuse(config: Config, sentence: str) -> None:
    if config.memory.plan == "refuse":
        raise UserError(f"{sentence}; memory.plan='warn' runs it anyway")
    log.warning("%s", sentence)


def cures(ready: components.Prepared, plan: Plan | None) -> str:
    """After memory ran out in the rehearsal: the cheapest changes that take a fifth off the planned peak."""
    if plan is None:
        return LESS
    device = replace(device_of(ready.config), bytes=int(0.8 * plan.peak), whole=None)
    return _advice(Planner(ready.config, ready.folder, ready.longest_prompt, device))


LESS = "Less learner.microbatch_tokens, or learner.gradient_checkpointing=true, takes less"


def _advice(planner: Planner, limit_s: float = 15.0) -> str:
    """What would make it fit, in a sentence; an error of the search must not hide the out-of-memory error."""
    try:
        found = solve(planner, planner.config, limit_s, lambda text: None)
    except Exception as error:
        log.info("no search for settings that fit: %s", first_line(error))
        return LESS
    if found is None:
        return "No change of a setting that was tried makes it fit; `nanogrpo plan` shows what takes the memory"
    return f"It fits with {', '.join(option.words() for option in found.options)}"


def as_dict(plan: Plan, proposal: Proposal | None = None, limits: Mapping[str, int] | None = None) -> dict[str, Any]:
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
                "name": part.device.name, "gpu": part.device.gpu, "memory": part.device.bytes, "margin": part.margin,
                "peak": part.peak, "worst_phase": part.worst, "notes": list(part.sampler.notes),
                "phases": {phase: {"total": part.peaks[phase], **parts} for phase, parts in part.phases.items()},
            }
            for part in plan.devices
        ],
        "proposals": [] if proposal is None else [{
            "margin": proposal.margin,
            "changes": [
                {**dict(option.changes), "saves": saved, "price": option.cost}
                for option, saved in zip(proposal.options, proposal.saved, strict=True)
            ],
        }],
        "largest": dict(limits or {}),
        "disk": {
            "checkpoint": plan.learner.state_bytes, "model": disk.model_bytes(plan.config, plan.learner),
            "peak": _disk_bytes(plan),
        },
    }  # fmt: skip


def _disk_bytes(plan: Plan) -> int:
    """What the run's folder holds at its fullest."""
    return disk.needed(plan.config, plan.learner.state_bytes, disk.model_bytes(plan.config, plan.learner))


def show(
    plan: Plan, console: Console, proposal: Proposal | None = None, limits: Mapping[str, int] | None = None
) -> None:
    """The same for people, in GiB."""

    def gib(size: int | None) -> str:
        return f"{size / GIB:.2f}" if size else ""

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, soft_wrap=True, markup=False)

    for part in plan.devices:
        table = Table("GiB", *part.phases, title=f"{part.device.name}, {plan.config.model.dtype}")
        for name in dict.fromkeys(name for parts in part.phases.values() for name in parts):
            table.add_row(name, *(gib(parts.get(name)) for parts in part.phases.values()))
        table.add_section()
        table.add_row("together", *(gib(total) for total in part.peaks.values()))
        console.print(table)
        for note in part.sampler.notes:
            say(f"note: {note}")
    say(f"on the disk: {_disk_bytes(plan) / GIB:.2f} GiB of checkpoints and final model")
    say(verdict(plan), style="green" if plan.fits else "red" if plan.fits is False else "")
    if proposal is not None:
        say(f"would fit, {proposal.margin / GIB:.2f} GiB to spare, with:")
        for option, saved in zip(proposal.options, proposal.saved, strict=True):
            say(f"  {option.words()}: {saved / GIB:+.2f} GiB saved, {option.cost}")
    for name, value in (limits or {}).items():
        say(f"largest {name} that still fits: {value}")
