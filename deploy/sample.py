"""``nanogrpo sample``: prints completions, with rewards where a task is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from common.config import Config, changed
from common.errors import printable
from common.protocols import Sampler
from common.rewards.scorer import Scorer
from common.tokenizer import check_room
from common.types import Group, Prompt
from common.watchdog import result, time_limit
from deploy import components
from learner.model.resolve import context_tokens
from learner.train import sampling_params


def sample(
    ready: components.Prepared, sampler: Sampler, prompts: Sequence[Prompt], n: int, greedy: bool
) -> list[Group]:
    """``n`` completions of each prompt, as a training step would draw them, or one greedily."""
    config = ready.config
    params = dataclasses.replace(sampling_params(config), n=n, seed=config.train.seed)
    if greedy:
        params = dataclasses.replace(params, n=1, temperature=0.0)
    doing, limit_s = f"answering {len(prompts)} prompts", config.timeouts.generate_s
    with time_limit("sampler", doing, limit_s, "timeouts.generate_s"):
        future = sampler.generate(prompts, params)
    return result(future, "sampler", doing, limit_s, "timeouts.generate_s")


def completions(
    config: Config,
    adapter: Path | None,
    texts: Sequence[str],
    questions: int,
    n: int,
    greedy: bool,
    scored: bool,
    console: Console,
) -> None:
    """Asks the user's texts, or the task's first test questions, and prints what comes."""
    # A reward that needs an answer cannot score a free prompt: that prompt is shown without rewards.
    skip = {"task.on_reward_error": "skip", "task.on_reward_timeout": "skip", "eval.questions": max(questions, 1)}
    config = changed(config, skip)
    ready = components.prepare(config, need_train=False)
    prompts = ready.test
    if texts:
        own = [Prompt(f"prompt-{i}", ({"role": "user", "content": text},)) for i, text in enumerate(texts, 1)]
        prompts = [ready.renderer(prompt) for prompt in own]
        check_room(prompts, config.sampler.max_tokens, context_tokens(ready.folder))
        longest = max(len(prompt.token_ids) for prompt in prompts)
        ready = dataclasses.replace(ready, test=prompts, longest_prompt=max(longest, ready.longest_prompt))
    made = components.make_sampler(ready, shares_device=False, adapter_folder=adapter)
    with components.closing(made, config) as sampler:
        groups = sample(ready, sampler, prompts, n, greedy)
    notes = {}
    if scored:
        with Scorer(config.task) as scorer:
            done, errors = scorer.score(groups)
        by_id = {group.prompt.id: group for group in done}
        groups = [by_id.get(group.prompt.id, group) for group in groups]
        notes = {error.group.prompt.id: str(error) for error in errors}
    for group in groups:
        console.print(_panel(group, notes.get(group.prompt.id, "")))


def _panel(group: Group, note: str) -> Panel:
    text = Text(printable(group.prompt.messages[-1]["content"].strip()) + "\n", style="dim")
    for completion in group.completions:
        text.append(f"\n{printable(completion.text.strip()) or '(empty)'}", style="not dim")
        rewards = "  ".join(f"{name} {value:g}" for name, value in completion.rewards.items())
        reward = f"reward {completion.reward:g}  {rewards}" if completion.reward is not None else ""
        cut = "  (cut at sampler.max_tokens)" if completion.finish_reason == "length" else ""
        if reward or cut:
            text.append(f"\n  {reward}{cut}", style="bold not dim")
    if note:
        text.append(f"\nno rewards: {printable(note)}", style="yellow not dim")
    return Panel(text, border_style="dim")
