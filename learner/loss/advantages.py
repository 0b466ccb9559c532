"""Rewards to advantages: how much better each completion is than the others of its group.

Plain numbers, no tensors. Everything here works on whole groups (and ``batch_std`` on the whole batch), so it runs
before anything is dropped, masked or split into micro-batches. Left out: the losses (``learner/loss/losses.py``).

A group whose rewards are equal, or differ by rounding alone (0.1 + 0.2 beside 0.15 + 0.15), gets advantages of exactly
0, never of rounding / 1e-4; for that the statistics module is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Literal, get_args

from common.types import Group

AdvantageKind = Literal["zscore", "no_std", "batch_std", "leave_one_out"]

EPSILON = 1e-4
"""Added to every standard deviation, as TRL does; keeps a nearly constant group from exploding."""

ROUNDING = 1e-9
"""Rewards of a group that lie no further apart are equal: relative to the largest, absolute below 1."""


def assign(groups: Sequence[Group], kind: AdvantageKind) -> list[Group]:
    """The same groups with ``advantage`` set on every completion. With r the rewards of a group of G:

    - ``zscore``: (r - mean r) / (std r + 1e-4), std with G - 1. GRPO, arXiv 2402.03300 section 4.1.2.
    - ``no_std``: r - mean r. Dr. GRPO, arXiv 2503.20783 section 3: the division favours questions whose rewards
      hardly differ.
    - ``batch_std``: (r - mean r) / (std of all rewards of ``groups`` + 1e-4). PPO Lite, arXiv 2508.08221. Give it the
      whole batch, groups without signal included.
    - ``leave_one_out``: r_i - mean of the other G - 1. RLOO, arXiv 2402.14740; equals G / (G - 1) x ``no_std``.

    A group of one has nothing to be compared with: 0. Every completion must have been scored with a finite reward.
    Raises ``ValueError`` for an unknown ``kind``.
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"advantage={kind!r} is not known; use one of {', '.join(get_args(AdvantageKind))}")
    rewards = [_rewards(group) for group in groups]
    batch_std = _std([reward for of_group in rewards for reward in of_group])
    result = []
    for group, of_group in zip(groups, rewards, strict=True):
        count = len(of_group)
        scale = 1.0
        if kind == "zscore":
            scale = 1 / (_std(of_group) + EPSILON)
        elif kind == "batch_std":
            scale = 1 / (batch_std + EPSILON)
        elif kind == "leave_one_out" and count > 1:
            scale = count / (count - 1)
        baseline = mean(of_group) if of_group else 0.0
        completions = zip(group.completions, of_group, strict=True)
        scored = tuple(replace(completion, advantage=(reward - baseline) * scale) for completion, reward in completions)
        result.append(replace(group, completions=scored))
    return result


def has_signal(group: Group) -> bool:
    """Whether the group can move the policy: its rewards are not all equal (but for rounding).

    Equal rewards give zero advantages under every kind. Dropping such groups and sampling others is the dynamic
    sampling of DAPO, arXiv 2503.14476 eq. 11.
    """
    return len(set(_rewards(group))) > 1


def soft_overlong(group: Group, max_tokens: int, overlong_tokens: int) -> Group:
    """The same group, each ``reward`` lowered by a penalty that grows with length near the limit.

    Soft overlong punishment, DAPO, arXiv 2503.14476 eq. 13: 0 up to ``max_tokens - overlong_tokens`` tokens, then
    linear, 1 at ``max_tokens`` and above. Only the length counts, not how the completion ended: the penalty must not
    jump between an answer that just fitted and one that was cut. The named ``rewards`` stay as they are.
    """
    assert 0 < overlong_tokens <= max_tokens, f"{overlong_tokens=} must be from 1 to {max_tokens=}"
    free_tokens = max_tokens - overlong_tokens
    completions = []
    for completion, reward in zip(group.completions, _rewards(group), strict=True):
        excess = (len(completion.token_ids) - free_tokens) / overlong_tokens
        completions.append(replace(completion, reward=reward - min(max(excess, 0.0), 1.0)))
    return replace(group, completions=tuple(completions))


def _rewards(group: Group) -> list[float]:
    """The completions' rewards, all the same number where only rounding sets them apart."""
    rewards: list[float] = []
    for completion in group.completions:
        reward = completion.reward
        assert reward is not None, f"prompt {group.prompt.id} was not scored"
        assert math.isfinite(reward), f"prompt {group.prompt.id}: {reward=} is not a score"
        rewards.append(float(reward))
    apart = max(rewards, default=0.0) - min(rewards, default=0.0)
    if apart <= ROUNDING * max([1.0, *map(abs, rewards)]):
        return rewards[:1] * len(rewards)
    return rewards


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); 0 where there are fewer than two values."""
    return stdev(values) if len(values) > 1 else 0.0
