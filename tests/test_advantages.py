"""Advantages: against the slow truth, TRL's own code, and what must hold for any rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.types import Group
from learner.loss import advantages
from tests import slow_truth, trl_reference

KINDS: list[Any] = ["zscore", "no_std", "batch_std", "leave_one_out"]
REWARDS = st.one_of(st.sampled_from([0.0, 0.1, 1.0, 1.1]), st.floats(-10, 10))


def of(group: Group) -> list[float]:
    return [float("nan") if c.advantage is None else c.advantage for c in group.completions]


def test_the_slow_truth() -> None:
    slow_truth.check_advantages(advantages)


@pytest.mark.parametrize(("kind", "scale_rewards"), [("zscore", "group"), ("no_std", "none"), ("batch_std", "batch")])
@given(data=st.data(), group_size=st.integers(2, 5), groups=st.integers(1, 3))
def test_advantages_are_trls(kind: Any, scale_rewards: str, data: Any, group_size: int, groups: int) -> None:
    rows = group_size * groups
    # Rounded: TRL's float arithmetic gives a group of equal, long fractions a spread of 1e-16, ours exactly 0.
    rewards = data.draw(st.lists(REWARDS.map(lambda reward: round(reward * 64) / 64), min_size=rows, max_size=rows))
    table = torch.zeros(rows, 1, dtype=torch.float64)
    theirs = trl_reference.run(
        logprobs_BT=table, old_BT=table, sampler_BT=table, reference_BT=table, entropy_BT=table,
        mask_BT=table + 1, lengths_B=torch.ones(rows, dtype=torch.long), group_size=group_size,
        rewards_B=torch.tensor(rewards, dtype=torch.float64), scale_rewards=scale_rewards,
    ).advantages_B  # fmt: skip
    split = [slow_truth.group_of(rewards[start : start + group_size]) for start in range(0, rows, group_size)]
    found = [advantage for group in advantages.assign(split, kind) for advantage in of(group)]
    slow_truth.close(found, theirs, kind, 1e-6)  # TRL's n / (n - 1) is float32


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=st.lists(st.lists(REWARDS, min_size=1, max_size=6), min_size=1, max_size=4), shift=st.integers(-3, 3))
def test_what_holds_for_any_rewards(kind: Any, rewards: list[list[float]], shift: int) -> None:
    """Advantages of a group sum to 0, keep the order of the rewards, and do not see a constant added to them."""
    rewards = [[round(reward, 6) for reward in of_group] for of_group in rewards]  # or a shift might round them alike
    groups = [slow_truth.group_of(of_group) for of_group in rewards]
    shifted = [slow_truth.group_of([reward + shift for reward in of_group]) for of_group in rewards]
    for group, moved in zip(advantages.assign(groups, kind), advantages.assign(shifted, kind), strict=True):
        found = of(group)
        assert abs(sum(found)) < 1e-6 * max(1, *map(abs, found))
        by_reward = sorted(group.completions, key=lambda completion: completion.reward or 0.0)
        assert [c.advantage for c in by_reward] == sorted(found)
        slow_truth.close(of(moved), found, "shifted", 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -1e-3, 1e6])
def test_equal_rewards_give_exactly_zero(kind: Any, reward: float) -> None:
    """Float means of equal numbers can be off by a last digit, and 1e-4 would blow that up."""
    flat, mixed = slow_truth.group_of([reward] * 7), slow_truth.group_of([0.0, 1.0])
    assert not advantages.has_signal(flat)
    assert advantages.has_signal(mixed)
    assert of(advantages.assign([flat, mixed], kind)[0]) == [0.0] * 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards", [[0.1 + 0.2, 0.15 + 0.15], [0.7 + 0.1, 0.8, 0.8], [1e9 + 0.1, 1e9 + 0.1 + 1e-7]])
def test_rewards_equal_but_for_rounding_are_equal(kind: Any, rewards: list[float]) -> None:
    assert len(set(rewards)) > 1
    flat = slow_truth.group_of(rewards)
    assert not advantages.has_signal(flat)
    assert of(advantages.assign([flat, slow_truth.group_of([0.0, 1.0])], kind)[0]) == [0.0] * len(rewards)
    assert advantages.has_signal(slow_truth.group_of([0.3, 0.3 + 1e-7]))
    assert advantages.has_signal(slow_truth.group_of([0.0, 1e-7]))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_touch_each_other(kind: Any) -> None:
    """Except through the batch's std, which only scales."""
    one, other = slow_truth.group_of([0.0, 1.0, 1.0]), slow_truth.group_of([5.0, 9.0])
    alone, together = of(advantages.assign([one], kind)[0]), of(advantages.assign([one, other], kind)[0])
    scale = together[0] / alone[0]
    slow_truth.close([advantage * scale for advantage in alone], together, kind)
    assert (scale == 1) == (kind != "batch_std")


def test_everything_else_is_kept() -> None:
    group = slow_truth.group_of([0.0, 1.0], tokens=[2, 3])
    (scored,) = advantages.assign([group], "zscore")
    assert replace(scored, completions=tuple(replace(c, advantage=None) for c in scored.completions)) == group
    assert all(completion.advantage is None for completion in group.completions)
    assert advantages.assign([Group(group.prompt, ())], "zscore") == [Group(group.prompt, ())]
    assert advantages.assign([], "zscore") == []


def test_mistakes() -> None:
    group = slow_truth.group_of([0.0, 1.0])
    for bad in (None, float("nan"), float("inf")):
        unscored = replace(group, completions=(replace(group.completions[0], reward=bad),))
        with pytest.raises(AssertionError, match="train-0"):
            advantages.assign([unscored], "zscore")
    with pytest.raises(AssertionError, match="overlong_tokens=9"):
        advantages.soft_overlong(group, max_tokens=8, overlong_tokens=9)
