"""The losses: against the slow truth, against TRL's own code, and by the properties that a learner relies on.

What breaks on purpose, and which check catches it, is in ``test_mutations.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.config import LearnerConfig
from learner.loss import losses
from learner.loss.losses import LossInputs
from tests import slow_truth, trl_reference

KINDS = list(losses.LOSSES)
TRLS = [*((kind, kind) for kind in KINDS), ("dapo", "bnpo")]
"""Ours, and TRL's that agrees; its bnpo as long as there is one micro-batch."""


@pytest.mark.parametrize(
    "check",
    [
        slow_truth.check_total_loss,
        slow_truth.check_policy_loss,
        slow_truth.check_importance_weights,
        slow_truth.check_kl,
        slow_truth.check_coefficients,
        slow_truth.check_on_policy,
        slow_truth.check_mean_stats,
    ],
)
def test_the_slow_truth(check: Any) -> None:
    check(losses)


# --- parity with TRL ---------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype = torch.float64, groups: int = 2) -> dict[str, Any]:
    """A batch as both sides take it: log-probs, ragged lengths, holes, fully masked rows, advantages (some 0)."""
    group_size = draw(st.integers(2, 3))
    rows, longest = groups * group_size, draw(st.integers(1, 5))
    # Multiples of 1/64 are exact in float32, in which TRL holds the sampler's log-probs; and they give exact ties.
    grid = st.integers(-96, 96).map(lambda number: number / 64)

    def table() -> Tensor:
        values = draw(st.lists(grid, min_size=rows * longest, max_size=rows * longest))
        return torch.tensor(values, dtype=dtype).view(rows, longest)

    logprobs_BT = table() - 2
    lengths = [longest, *draw(st.lists(st.integers(1, longest), min_size=rows - 1, max_size=rows - 1))]
    lengths_B = torch.tensor(draw(st.permutations(lengths)))
    holes = draw(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=rows * longest, max_size=rows * longest))
    mask_BT = torch.tensor(holes).view(rows, longest) * (torch.arange(longest) < lengths_B[:, None])
    if draw(st.booleans()):
        mask_BT[draw(st.integers(0, rows - 1))] = 0
    old_BT = logprobs_BT if draw(st.integers(0, 3)) == 0 else logprobs_BT + table() / 2
    sampler_BT = old_BT + table() / 2
    advantages = draw(st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.75, 1.5]), min_size=rows, max_size=rows))
    rewards = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    return {
        "logprobs_BT": logprobs_BT, "old_BT": old_BT, "sampler_BT": sampler_BT, "reference_BT": logprobs_BT + table(),
        "entropy_BT": table().abs(), "mask_BT": mask_BT.to(dtype), "lengths_B": lengths_B, "group_size": group_size,
        "advantages_B": torch.tensor(advantages, dtype=dtype), "rewards_B": torch.tensor(rewards, dtype=dtype),
    }  # fmt: skip


def spec_of(kind: str, **choices: Any) -> LearnerConfig:
    return LearnerConfig(**{"loss": kind, "importance": "off"} | choices)


def inputs_of(batch: dict[str, Any], kind: str) -> LossInputs:
    mask_BT = batch["mask_BT"]
    return LossInputs(
        batch["advantages_B"][:, None].expand_as(mask_BT), mask_BT, batch["sampler_BT"],
        losses.LOSSES[kind].coefficients(mask_BT, 16), float(mask_BT.sum()), batch["old_BT"], batch["reference_BT"],
    )  # fmt: skip


def ours(batch: dict[str, Any], kind: str, **choices: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """(loss, gradient by log-probs, gradient by entropies, stats) of ``total_loss`` on the whole batch."""
    logprobs_BT = batch["logprobs_BT"].detach().clone().requires_grad_()
    entropy_BT = batch["entropy_BT"].detach().clone().requires_grad_()
    loss, stats = losses.total_loss(logprobs_BT, entropy_BT, inputs_of(batch, kind), spec_of(kind, **choices))
    loss.backward()
    assert logprobs_BT.grad is not None
    assert entropy_BT.grad is not None
    return loss.detach(), logprobs_BT.grad, entropy_BT.grad, losses.mean_stats([stats])


def translate(choices: dict[str, Any]) -> dict[str, Any]:
    """Our words for TRL's."""
    spec = LearnerConfig(**{"importance": "off"} | choices)
    level = None if spec.importance == "off" else f"{spec.importance_level}_{spec.importance}"
    same = ("clip_low", "clip_high", "importance_cap", "kl_coef", "entropy_coef")
    return {word: getattr(spec, word) for word in same} | {
        "delta": spec.delta or None, "level": spec.ratio, "importance": level,
        "tau_positive": spec.sapo_tau_positive, "tau_negative": spec.sapo_tau_negative,
    }  # fmt: skip


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    clip_high = draw(st.sampled_from([0.0, 0.2, 0.28, 1.0]))
    return {
        "ratio": draw(st.sampled_from(["token", "sequence"])),
        "clip_low": draw(st.sampled_from([0.0, 0.2, 0.5])),
        "clip_high": clip_high,
        "delta": draw(st.sampled_from([0, clip_high + 1.25])),
        "sapo_tau_positive": draw(st.sampled_from([1.0, 0.5])),
        "sapo_tau_negative": draw(st.sampled_from([1.05, 2.0])),
        "importance": draw(st.sampled_from(["off", "truncate", "mask"])),
        "importance_level": draw(st.sampled_from(["token", "sequence"])),
        "importance_cap": draw(st.sampled_from([0.9, 1.3, 2.0])),
        "kl_coef": draw(st.sampled_from([0.0, 0.04, 1.0])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.1])),
    }


@pytest.mark.parametrize(("kind", "trls"), TRLS)
@given(batch=batches(), choice=choices())
def test_loss_and_gradient_are_trls(kind: str, trls: str, batch: dict[str, Any], choice: dict[str, Any]) -> None:
    theirs = trl_reference.run(**batch, loss_type=trls, **translate(choice))
    loss, gradient_BT, entropy_gradient_BT, _ = ours(batch, kind, **choice)
    slow_truth.close(loss, theirs.loss, "loss", 1e-6)  # TRL keeps sapo's temperatures in float32
    slow_truth.close(gradient_BT, theirs.gradient_BT, "gradient", 1e-6)
    slow_truth.close(entropy_gradient_BT, theirs.entropy_gradient_BT, "entropy gradient", 1e-9)


@pytest.mark.parametrize("importance", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("kind", "trls"), TRLS)
def test_float32_is_within_1e5_of_trls(kind: str, trls: str, level: str, importance: str) -> None:
    """Every loss at both levels under the four importance modes, with KL and entropy, none left to chance."""
    random = slow_truth.random_batch(seed=5, sequences=6, tokens=7)
    names = ("logprobs", "old", "sampler", "reference", "entropy", "advantages", "mask")
    table = {name: torch.tensor(getattr(random, name), dtype=torch.float32) for name in names}
    batch: dict[str, Any] = {
        **{f"{name}_BT": table[name] for name in names if name != "advantages"}, "advantages_B": table["advantages"],
        "lengths_B": torch.full((6,), 7), "group_size": 3, "rewards_B": torch.arange(6.0),
    }  # fmt: skip
    choice = {
        "ratio": level, "importance_level": importance.split("_")[0], "importance": importance.split("_")[1],
        "importance_cap": 1.2, "delta": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05,
    }  # fmt: skip
    theirs = trl_reference.run(**batch, loss_type=trls, **translate(choice))
    loss, gradient_BT, entropy_gradient_BT, _ = ours(batch, kind, **choice)
    assert loss.dtype == torch.float32
    slow_truth.close(loss, theirs.loss, "loss", 1e-5)
    slow_truth.close(gradient_BT, theirs.gradient_BT, "gradient", 1e-5)
    slow_truth.close(entropy_gradient_BT, theirs.entropy_gradient_BT, "entropy gradient", 1e-5)


@given(
    batch=batches(),
    micro_batches=st.sampled_from([2, 4]),
    kind=st.sampled_from(["grpo", "dr_grpo", "dapo", "cispo", "sapo"]),
)
def test_one_big_batch_is_trls_accumulated_micro_batches(batch: dict[str, Any], micro_batches: int, kind: Any) -> None:
    rows = len(batch["mask_BT"]) // micro_batches * micro_batches
    batch = {key: value[:rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
    batch["lengths_B"][0], batch["group_size"] = batch["mask_BT"].shape[1], 2
    theirs = trl_reference.run(**batch, loss_type=kind, micro_batches=micro_batches)
    loss, gradient_BT, *_ = ours(batch, kind)
    slow_truth.close(loss, theirs.loss, "loss", 1e-6)
    slow_truth.close(gradient_BT, theirs.gradient_BT, "gradient", 1e-6)


@given(batch=batches(), level=st.sampled_from(["token", "sequence"]))
def test_a_plain_kl_can_be_composed(batch: dict[str, Any], level: Any) -> None:
    """loss_BT + kl_coef * kl_BT(...) is TRL without its bias correction."""
    theirs = trl_reference.run(**batch, loss_type="grpo", level=level, kl_coef=0.3, kl_correction=False)
    logprobs_BT, mask_BT = batch["logprobs_BT"].detach().clone().requires_grad_(), batch["mask_BT"]
    loss_BT, *_ = slow_truth.policy_loss(
        losses, logprobs_BT, batch["old_BT"], batch["advantages_B"], mask_BT, spec_of("grpo", ratio=level)
    )
    loss_BT = loss_BT + 0.3 * losses.kl_BT("k3", logprobs_BT, batch["reference_BT"])
    loss = (loss_BT * losses.sequence_mean(mask_BT, 16)).sum()
    loss.backward()
    slow_truth.close(loss, theirs.loss, "loss")
    slow_truth.close(logprobs_BT.grad, theirs.gradient_BT, "gradient")


def test_stats_are_trls_metrics() -> None:
    random = slow_truth.random_batch(seed=8, sequences=6, tokens=6)
    names = ("logprobs", "old", "sampler", "reference", "entropy", "mask")
    batch: dict[str, Any] = {f"{name}_BT": torch.tensor(getattr(random, name)).double() for name in names}
    batch |= {"sampler_BT": batch["sampler_BT"].float().double(), "lengths_B": torch.full((6,), 6)}
    batch |= {"advantages_B": torch.tensor(random.advantages).double(), "rewards_B": torch.arange(6.0), "group_size": 3}
    choice = {"importance": "truncate", "importance_cap": 1.2}
    theirs = trl_reference.run(**batch, loss_type="dapo", importance="token_truncate", importance_cap=1.2).metrics
    stats = ours(batch, "dapo", **choice)[3]
    assert stats["clipped_mean"] > 0
    for our_key, their_key in {
        "clipped_mean": "clip_ratio/region_mean", "entropy_mean": "entropy",
        "importance_mean": "sampling/importance_sampling_ratio/mean",
        "importance_max": "sampling/importance_sampling_ratio/max",
        "sampler_difference_mean": "sampling/sampling_logp_difference/mean",
        "sampler_difference_max": "sampling/sampling_logp_difference/max",
    }.items():  # fmt: skip
        slow_truth.close(stats[our_key], theirs[their_key], our_key, 1e-6)


# --- what the learner relies on ----------------------------------------------------------------------------------


@given(batch=batches(), kind=st.sampled_from(KINDS), choice=choices(), data=st.data())
def test_micro_batches_add_up(batch: dict[str, Any], kind: str, choice: dict[str, Any], data: Any) -> None:
    """Any split of the rows, in any order, as a learner makes it: the loss, gradient and stats of the one big batch."""
    whole, gradient_BT, entropy_gradient_BT, stats = ours(batch, kind, **choice)
    rows = len(batch["mask_BT"])
    owner_B = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    inputs, spec = inputs_of(batch, kind), spec_of(kind, **choice)
    logprobs_BT = batch["logprobs_BT"].detach().clone().requires_grad_()
    entropy_BT = batch["entropy_BT"].detach().clone().requires_grad_()
    total, parts = 0.0, list[dict[str, Tensor]]()
    for owner in set(owner_B.tolist()):
        row_K, column_K = torch.nonzero((owner_B == owner)[:, None].expand_as(logprobs_BT)).flip(0).unbind(1)
        loss_of = losses.ChunkedLoss(row_K, column_K, inputs, spec)
        step = len(row_K) if loss_of.by_sequence else 3
        for first in range(0, len(row_K), step):
            part = slice(first, first + step)
            at = (row_K[part], column_K[part])
            loss, part_stats = loss_of(logprobs_BT[at], entropy_BT[at], part)
            loss.backward()
            total, parts = total + loss.item(), [*parts, part_stats]
    slow_truth.close(total, whole, "loss", 1e-11)
    slow_truth.close(logprobs_BT.grad, gradient_BT, "gradient", 1e-11)
    if choice["entropy_coef"]:  # else it is cut off
        slow_truth.close(entropy_BT.grad, entropy_gradient_BT, "entropy gradient", 1e-11)
    merged = losses.mean_stats(parts)
    assert merged.keys() == stats.keys()
    for key, value in stats.items():
        slow_truth.close(merged[key], value, key, 1e-11)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradient_of_kl_term_is_the_gradient_of_the_kl(kind: str) -> None:
    """Summed over every token that the old policy might have written, off policy too."""
    generator = torch.Generator().manual_seed(1)
    scores_V, old_V, reference_V = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    scores_V.requires_grad_()
    logprobs_V, old_V, reference_V = scores_V.log_softmax(0), old_V.log_softmax(0), reference_V.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - reference_V)).sum(), scores_V, retain_graph=True)
    term_V = losses.kl_term(kind, logprobs_V, reference_V, (logprobs_V - old_V).exp())
    (found,) = torch.autograd.grad((old_V.exp() * term_V).sum(), scores_V, retain_graph=True)
    slow_truth.close(found, exact, kind)
    if kind != "k2":  # without the ratio even the on-policy gradient is another one
        (plain,) = torch.autograd.grad(
            (logprobs_V.detach().exp() * losses.kl_BT(kind, logprobs_V, reference_V)).sum(), scores_V
        )
        assert not torch.allclose(plain, exact, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_train_on_gives_zero_and_not_nan(kind: str) -> None:
    for shape in ((2, 3), (2, 0)):
        mask_BT = torch.zeros(shape)
        logprobs_BT = torch.full(shape, -math.inf, requires_grad=True)
        coef_BT = losses.LOSSES[kind].coefficients(mask_BT, 8)
        inputs = LossInputs(torch.ones(shape), mask_BT, logprobs_BT, coef_BT, 0, logprobs_BT)
        loss, stats = losses.total_loss(logprobs_BT, torch.zeros(shape), inputs, spec_of(kind, ratio="sequence"))
        loss.backward()
        assert loss.item() == 0
        slow_truth.close(logprobs_BT.grad, torch.zeros(shape), "gradient")
        assert not any(losses.mean_stats([stats]).values())


def test_a_huge_ratio_is_bounded_where_the_clip_says_so() -> None:
    """A negative advantage whose ratio exploded: unbounded in PPO, bounded by delta, with no gradient."""
    logprobs_BT = torch.tensor([[0.0]], requires_grad=True)
    old_BT, advantages_B, mask_BT = torch.tensor([[-9.0]]), torch.tensor([-1.0]), torch.ones(1, 1)
    found = {}
    for delta in (0, 4.0):
        spec = spec_of("grpo", delta=delta)
        loss_BT, _, clipped_BT = slow_truth.policy_loss(losses, logprobs_BT, old_BT, advantages_B, mask_BT, spec)
        (gradient,) = torch.autograd.grad(loss_BT.sum(), logprobs_BT)
        found[delta] = (round(loss_BT.item(), 3), gradient.item() == 0, clipped_BT.item())
    assert found == {0: (8103.084, False, False), 4.0: (4.0, True, True)}


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_dual_clip_is_delta(advantage: float) -> None:
    """max(min(r A, clip(r) A), c A) for A < 0, arXiv 1912.09729."""
    ratio_BT, advantages_BT = torch.linspace(0, 6, 61)[None], torch.full((1, 61), advantage)
    loss_BT, _ = losses.clipped_loss(ratio_BT, ratio_BT, advantages_BT, spec_of("grpo", delta=3.0))
    dual_BT = torch.minimum(ratio_BT * advantage, ratio_BT.clamp(0.8, 1.2) * advantage)
    if advantage < 0:
        dual_BT = dual_BT.clamp(min=3 * advantage)
    assert torch.allclose(-loss_BT, dual_BT)


def test_missing_pieces_are_asserted() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(AssertionError, match="needs reference_BT"):
        losses.total_loss(one, one, LossInputs(one, one, one, one, 1), spec_of("grpo", kl_coef=0.1))
    with pytest.raises(AssertionError, match="must be above"):
        losses.total_loss(one, one, LossInputs(one, one, one, one, 1), spec_of("grpo", delta=1.2))
