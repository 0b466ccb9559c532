"""Rewards to advantages: how much better each completion is than the others of its group.

Plain numbers, no tensors. Everything here works on whole groups (and ``batch_std`` on the whole batch), so it runs
before anything is dropped, masked or split into micro-batches. A group whose rewards are equal, or differ by rounding
alone (0.1 + 0.2 beside 0.15 + 0.15), gets advantages of exactly 0, never of rounding / 1e-4; for that the statistics
module is exact. What has no signal is decided here too: of groups, and of completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev

from common.config import LearnerConfig
from common.types import Completion, Group

EPSILON = 1e-4
"""Added to every standard deviation, as TRL does; keeps a nearly constant group from exploding."""

ROUNDING = 1e-9
"""Rewards of a group that differ by no more count as equal: relative to the largest, absolute below 1."""


def zscore(rewards: Sequence[float], batch_std: float) -> float:
    """(r - mean r) / (std r + 1e-4), std with G - 1. GRPO, arXiv 2402.03300 section 4.1.2."""
    return 1 / (_std(rewards) + EPSILON)


def no_std(rewards: Sequence[float], batch_std: float) -> float:
    """r - mean r. Dr. GRPO, arXiv 2503.20783 section 3: the division favours questions whose rewards hardly differ."""
    return 1.0


def by_batch_std(rewards: Sequence[float], batch_std: float) -> float:
    """(r - mean r) / (std of all rewards of the batch + 1e-4), groups without signal included. PPO Lite, arXiv
    2508.08221."""
    return 1 / (batch_std + EPSILON)


def leave_one_out(rewards: Sequence[float], batch_std: float) -> float:
    """r_i - mean of the other G - 1, which is G / (G - 1) x ``no_std``. RLOO, arXiv 2402.14740."""
    return len(rewards) / max(len(rewards) - 1, 1)


SCALES = {"zscore": zscore, "no_std": no_std, "batch_std": by_batch_std, "leave_one_out": leave_one_out}
"""``learner.advantage`` to what r - mean r is multiplied with, of a group's rewards and the std of the batch's."""


def assign(groups: Sequence[Group], kind: str) -> list[Group]:
    """The same groups with ``advantage`` set on every completion, each scored with a finite reward; 0 in a group of
    one, which has nothing to be compared with."""
    rewards = [_rewards(group) for group in groups]
    batch_std = _std([reward for of_group in rewards for reward in of_group])
    result = []
    for group, of_group in zip(groups, rewards, strict=True):
        scale, baseline = SCALES[kind](of_group, batch_std), mean(of_group) if of_group else 0.0
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


def counts(completion: Completion, spec: LearnerConfig) -> bool:
    """Whether the step's means count the completion: it has tokens, and is not left out for being truncated."""
    return bool(completion.token_ids) and not (spec.truncated == "mask" and completion.finish_reason == "length")


def has_gradient(completion: Completion, spec: LearnerConfig) -> bool:
    """Whether a completion that counts has to be computed: by its advantage, which ``has_signal`` says of its group, or
    by KL and entropy, which need none; or because ``drop_zero_variance`` is off."""
    return bool(completion.advantage or spec.kl_coef or spec.entropy_coef) or not spec.drop_zero_variance


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
    """The completions' rewards, all the same number where they differ only by rounding."""
    rewards: list[float] = []
    for completion in group.completions:
        reward = completion.reward
        assert reward is not None, f"prompt {group.prompt.id} was not scored"
        assert math.isfinite(reward), f"prompt {group.prompt.id}: {reward=} is not a score"
        rewards.append(float(reward))
    spread = max(rewards, default=0.0) - min(rewards, default=0.0)
    if spread <= ROUNDING * max([1.0, *map(abs, rewards)]):
        return rewards[:1] * len(rewards)
    return rewards


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); 0 where there are fewer than two values."""
    return stdev(values) if len(values) > 1 else 0.0
