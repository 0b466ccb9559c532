"""The loads that the benchmarks put on both sides: shapes, their tokens and rewards, and what memory they took.

Tokens are drawn uniformly from the vocabulary by a fixed seed: what they say costs nothing, how many there are does.
A reward is a function of the tokens alone, so that our loop and TRL's give the same one. Left out: which trainer learns
from them (``sides.py``, ``trl_side.py``). Used by everything in this folder.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from common.types import Completion, Group, Prompt
from learner.loss import advantages


@dataclass(frozen=True)
class Load:
    """One optimizer step's worth of groups. Lengths in tokens; completions are drawn between ``least`` and ``most``;
    all prompts begin with the same ``alike`` tokens."""

    groups: int
    group_size: int
    prompt: int
    least: int
    most: int
    alike: int = 0

    def words(self) -> str:
        prompt = f"prompt {self.prompt}" + (f" ({self.alike} of them the same)" if self.alike else "")
        return f"{self.groups} x {self.group_size}, {prompt}, completions {self.least} to {self.most}"


LOADS = {
    "short": Load(8, 8, 50, 8, 32),
    "gsm8k": Load(4, 8, 160, 40, 200),
    "few-shot": Load(2, 8, 800, 40, 200),
    "examples": Load(4, 8, 800, 40, 200, alike=640),
}


def reward_of(token_ids: tuple[int, ...] | list[int]) -> float:
    return sum(token_ids) % 97 / 97


def groups_of(load: Load, vocabulary: int, first: int = 0, seed: int = 0) -> list[Group]:
    """The load's groups with rewards and z-score advantages; tokens from ``first`` up to ``vocabulary``, lengths spread
    evenly over the range, so that every load has the same mean length."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(first, vocabulary) for _ in range(count))

    count = load.groups * load.group_size
    lengths = [load.least + round((load.most - load.least) * place / max(1, count - 1)) for place in range(count)]
    draw.shuffle(lengths)
    alike = tokens(load.alike)
    groups = []
    for number in range(load.groups):
        answers = [tokens(lengths.pop()) for _ in range(load.group_size)]
        made = [Completion(ids, "", (-10.0,) * len(ids), "stop", 0, {}, reward_of(ids)) for ids in answers]
        prompt = (*alike, *tokens(load.prompt - load.alike))
        groups.append(Group(Prompt(str(number), (), token_ids=prompt), tuple(made)))
    return advantages.assign(groups, "zscore")


def peak_gib() -> float:
    """The most memory this process has held at once since ``reset_peak``, GiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def reset_peak() -> float:
    """Starts ``peak_gib`` again from what is held now, and returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_gib()
