"""``nanogrpo train --dry-run``: every check of a run that needs no loaded model; writes nothing.

Configuration, folder, task and data; the model's files by their headers; each reward once; memory and disk. What needs
the loaded model is left to the run.
"""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from common.config import Config
from common.rewards.scorer import Scorer
from common.types import Completion, Group
from deploy import components
from deploy import run as runs
from deploy.memory_plan import output
from deploy.resume import anchored, check_task

log = logging.getLogger("nanogrpo")
SAMPLE = "Let me think about it. <answer>42</answer>"
"""What each reward is asked to score."""


def dry_run(config: Config, folder: Path, console: Console, *, resume: bool) -> None:
    """Raises what the run would raise; at the end prints what was found right."""
    runs.check_folder(folder, resume)
    config = components.resolve_dtype(anchored(config))
    ready = components.prepare(config)
    components.warn_if_slow(ready.config, ready.device)
    if resume:
        check_task(folder, config, ready.stream())
    rewards = _rewards(ready)
    output.before_run(ready, console, folder)
    console.print(
        f"right: model {ready.folder}, {len(ready.train)} training and {len(ready.test)} test questions, longest "
        f"prompt {ready.longest_prompt} tokens, {ready.config.model.dtype}, "
        f"{ready.device if ready.config.cluster.mode == 'local' else 'on the cluster'}; {SAMPLE!r} is worth {rewards}",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _rewards(ready: components.Prepared) -> str:
    """Each reward, and the judge of accuracy, once, on an answer to the first question."""
    ids = tuple(ready.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    answer = Completion(ids, SAMPLE, (-1.0,) * len(ids), "stop", 0)
    # One worker: how many there are says nothing about the rewards. One that dies of so plain an answer will of others.
    asked = {"reward_workers": 1, "on_reward_timeout": "stop"}
    with Scorer(ready.config.task.model_copy(update=asked)) as scorer:
        scored, errors = scorer.score([Group(ready.train[0], (answer,))])
        if ready.test:
            scorer.correct([Group(ready.test[0], (answer,))])
    for error in errors:  # under task.on_reward_error=skip; it is logged
        return f"nothing: {error.reward!r} failed, and such groups are left out"
    (completion,) = scored[0].completions
    return ", ".join(f"{name} {value:g}" for name, value in completion.rewards.items())
