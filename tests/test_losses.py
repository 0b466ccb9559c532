"""The losses: against the slow truth, against TRL's own code, and by the properties that a learner relies on.

What breaks on purpose, and which check catches it, is in ``test_mutations.py``.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.loss import losses
from tests import slow_truth, trl_reference

KINDS = get_args(losses.LossKind)
POLICY: dict[str, Any] = {
    "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "delta": 0, "dual_clip": 0, "tau_positive": 1.0,
    "tau_negative": 1.05,
}  # fmt: skip
SWITCHED_OFF = POLICY | {"importance": "off", "importance_level": "token", "importance_cap": 2.0}


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


def ours(
    batch: dict[str, Any], kind: losses.LossKind, **choices: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """(loss, gradient by log-probs, gradient by entropies, stats) of ``total_loss`` on the whole batch."""
    logprobs_BT = batch["logprobs_BT"].detach().clone().requires_grad_()
    entropy_BT = batch["entropy_BT"].detach().clone().requires_grad_()
    mask_BT = batch["mask_BT"]
    coef_BT = losses.token_coefficients(kind, mask_BT, max_tokens=16)
    loss, stats = losses.total_loss(
        kind, logprobs_BT, batch["old_BT"], batch["sampler_BT"], batch["advantages_B"], mask_BT, coef_BT,
        reference_logprobs_BT=batch["reference_BT"], entropy_BT=entropy_BT, num_tokens=float(mask_BT.sum()),
        **SWITCHED_OFF | choices,
    )  # fmt: skip
    loss.backward()
    assert logprobs_BT.grad is not None
    assert entropy_BT.grad is not None
    return loss.detach(), logprobs_BT.grad, entropy_BT.grad, losses.mean_stats([stats])


def translate(choices: dict[str, Any]) -> dict[str, Any]:
    """Our words for TRL's, which has no dual clip; above 1 + clip_high that is delta."""
    taken = {"delta": choices["delta"] or choices["dual_clip"] or None, "level": choices["ratio"]}
    if choices["importance"] != "off":
        taken["importance"] = f"{choices['importance_level']}_{choices['importance']}"
    same = ("clip_low", "clip_high", "tau_positive", "tau_negative", "importance_cap", "kl_coef", "entropy_coef")
    return taken | {word: choices[word] for word in same}


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    clip_high = draw(st.sampled_from([0.0, 0.2, 0.28, 1.0]))
    bound = draw(st.sampled_from(["none", "delta", "dual_clip"]))
    return {
        "ratio": draw(st.sampled_from(["token", "sequence"])),
        "clip_low": draw(st.sampled_from([0.0, 0.2, 0.5])),
        "clip_high": clip_high,
        "delta": clip_high + 1.25 if bound == "delta" else 0,
        "dual_clip": clip_high + 1.25 if bound == "dual_clip" else 0,
        "tau_positive": draw(st.sampled_from([1.0, 0.5])),
        "tau_negative": draw(st.sampled_from([1.05, 2.0])),
        "importance": draw(st.sampled_from(["off", "truncate", "mask"])),
        "importance_level": draw(st.sampled_from(["token", "sequence"])),
        "importance_cap": draw(st.sampled_from([0.9, 1.3, 2.0])),
        "kl_coef": draw(st.sampled_from([0.0, 0.04, 1.0])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.1])),
    }


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches(), choice=choices())
def test_loss_and_gradient_are_trls(kind: losses.LossKind, batch: dict[str, Any], choice: dict[str, Any]) -> None:
    theirs = trl_reference.run(**batch, loss_type=kind, **translate(choice))
    loss, gradient_BT, entropy_gradient_BT, _ = ours(batch, kind, **choice)
    slow_truth.close(loss, theirs.loss, "loss", 1e-6)  # TRL keeps sapo's temperatures in float32
    slow_truth.close(gradient_BT, theirs.gradient_BT, "gradient", 1e-6)
    slow_truth.close(entropy_gradient_BT, theirs.entropy_gradient_BT, "entropy gradient", 1e-9)


@pytest.mark.parametrize("importance", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_within_1e5_of_trls(kind: losses.LossKind, level: str, importance: str) -> None:
    """Every loss at both levels under the four importance modes, with KL and entropy, none left to chance."""
    random = slow_truth.random_batch(seed=5, sequences=6, tokens=7)
    names = ("logprobs", "old", "sampler", "reference", "entropy", "advantages", "mask")
    table = {name: torch.tensor(getattr(random, name), dtype=torch.float32) for name in names}
    batch: dict[str, Any] = {
        **{f"{name}_BT": table[name] for name in names if name != "advantages"}, "advantages_B": table["advantages"],
        "lengths_B": torch.full((6,), 7), "group_size": 3, "rewards_B": torch.arange(6.0),
    }  # fmt: skip
    choice = SWITCHED_OFF | {
        "ratio": level, "importance_level": importance.split("_")[0], "importance": importance.split("_")[1],
        "importance_cap": 1.2, "delta": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05,
    }  # fmt: skip
    theirs = trl_reference.run(**batch, loss_type=kind, **translate(choice))
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
    """All but bnpo, whose result in TRL depends on the split."""
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
    loss_BT, *_ = losses.policy_loss(
        "grpo", logprobs_BT, batch["old_BT"], batch["advantages_B"], mask_BT, **POLICY | {"ratio": level}
    )
    loss_BT = loss_BT + 0.3 * losses.kl_BT("k3", logprobs_BT, batch["reference_BT"])
    loss = (loss_BT * losses.token_coefficients("grpo", mask_BT, 16)).sum()
    loss.backward()
    slow_truth.close(loss, theirs.loss, "loss")
    slow_truth.close(logprobs_BT.grad, theirs.gradient_BT, "gradient")


def test_stats_are_trls_metrics() -> None:
    random = slow_truth.random_batch(seed=8, sequences=6, tokens=6)
    names = ("logprobs", "old", "sampler", "reference", "entropy", "mask")
    batch: dict[str, Any] = {f"{name}_BT": torch.tensor(getattr(random, name)).double() for name in names}
    batch |= {"sampler_BT": batch["sampler_BT"].float().double(), "lengths_B": torch.full((6,), 6)}
    batch |= {"advantages_B": torch.tensor(random.advantages).double(), "rewards_B": torch.arange(6.0), "group_size": 3}
    choice = SWITCHED_OFF | {"importance": "truncate", "importance_cap": 1.2}
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
def test_micro_batches_add_up(batch: dict[str, Any], kind: losses.LossKind, choice: dict[str, Any], data: Any) -> None:
    """Any split of the rows, in any order: the same loss, gradient and stats as the one big batch."""
    whole, gradient_BT, entropy_gradient_BT, stats = ours(batch, kind, **choice)
    mask_BT, rows = batch["mask_BT"], len(batch["mask_BT"])
    owner_B = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    coef_BT = losses.token_coefficients(kind, mask_BT, max_tokens=16)
    logprobs_BT = batch["logprobs_BT"].detach().clone().requires_grad_()
    entropy_BT = batch["entropy_BT"].detach().clone().requires_grad_()
    total, parts = 0.0, list[dict[str, Tensor]]()
    for owner in set(owner_B.tolist()):
        part = torch.nonzero(owner_B == owner).flatten().flip(0)
        width = int(batch["lengths_B"][part].max())  # as a learner would, without columns of padding only
        at = (part[:, None], torch.arange(width))
        loss, part_stats = losses.total_loss(
            kind, logprobs_BT[at], batch["old_BT"][at], batch["sampler_BT"][at], batch["advantages_B"][part],
            mask_BT[at], coef_BT[at], reference_logprobs_BT=batch["reference_BT"][at], entropy_BT=entropy_BT[at],
            num_tokens=float(mask_BT.sum()), **choice,
        )  # fmt: skip
        loss.backward()
        total, parts = total + loss.item(), [*parts, part_stats]
    slow_truth.close(total, whole, "loss", 1e-11)
    slow_truth.close(logprobs_BT.grad, gradient_BT, "gradient", 1e-11)
    slow_truth.close(entropy_BT.grad, entropy_gradient_BT, "entropy gradient", 1e-11)
    merged = losses.mean_stats(parts)
    assert merged.keys() == stats.keys()
    for key, value in stats.items():
        slow_truth.close(merged[key], value, key, 1e-11)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradient_of_kl_term_is_the_gradient_of_the_kl(kind: losses.KLKind) -> None:
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
def test_nothing_to_train_on_gives_zero_and_not_nan(kind: losses.LossKind) -> None:
    for shape in ((2, 3), (2, 0)):
        mask_BT = torch.zeros(shape)
        logprobs_BT = torch.full(shape, -math.inf, requires_grad=True)
        loss, stats = losses.total_loss(
            kind, logprobs_BT, logprobs_BT, logprobs_BT, torch.ones(2), mask_BT,
            losses.token_coefficients(kind, mask_BT, 8), num_tokens=0, **SWITCHED_OFF | {"ratio": "sequence"},
        )  # fmt: skip
        loss.backward()
        assert loss.item() == 0
        slow_truth.close(logprobs_BT.grad, torch.zeros(shape), "gradient")
        assert not any(losses.mean_stats([stats]).values())


def test_a_huge_ratio_is_bounded_where_the_clip_says_so() -> None:
    """A negative advantage whose ratio exploded: unbounded in PPO, bounded by delta or dual_clip, with no gradient."""
    logprobs_BT = torch.tensor([[0.0]], requires_grad=True)
    old_BT, advantages_B, mask_BT = torch.tensor([[-9.0]]), torch.tensor([-1.0]), torch.ones(1, 1)
    found = {}
    for name, bound in {"none": {}, "delta": {"delta": 4.0}, "dual": {"dual_clip": 3.0}}.items():
        loss_BT, _, clipped_BT = losses.policy_loss(
            "grpo", logprobs_BT, old_BT, advantages_B, mask_BT, **POLICY | bound
        )
        (gradient,) = torch.autograd.grad(loss_BT.sum(), logprobs_BT)
        found[name] = (round(loss_BT.item(), 3), gradient.item() == 0, clipped_BT.item())
    assert found == {"none": (8103.084, False, False), "delta": (4.0, True, True), "dual": (3.0, True, True)}


def test_unknown_words_are_refused() -> None:
    one = torch.ones(1, 1)
    word: Any = "ppo"
    with pytest.raises(ValueError, match=r"loss='ppo' is not known; use one of grpo, bnpo"):
        losses.token_coefficients(word, one, 1)
    with pytest.raises(ValueError, match="loss='ppo'"):
        losses.policy_loss(word, one, one, one[0], one, **POLICY)
    with pytest.raises(ValueError, match="ratio='ppo'"):
        losses.policy_ratio(one, one, one, word)
    with pytest.raises(ValueError, match="kl_estimator='ppo'"):
        losses.kl_BT(word, one, one)
    with pytest.raises(ValueError, match="importance='ppo'"):
        losses.importance_weights(one, one, one, word, "token", 2)
    with pytest.raises(ValueError, match="importance_level='ppo'"):
        losses.importance_weights(one, one, one, "mask", word, 2)


def test_missing_pieces_are_asserted() -> None:
    one = torch.ones(1, 1)
    rest = (one, one, one, one[0], one, one)
    with pytest.raises(AssertionError, match="needs reference_logprobs_BT"):
        losses.total_loss("grpo", *rest, num_tokens=1, kl_coef=0.1, **SWITCHED_OFF)
    with pytest.raises(AssertionError, match="needs entropy_BT"):
        losses.total_loss("grpo", *rest, num_tokens=1, entropy_coef=0.1, **SWITCHED_OFF)
    with pytest.raises(AssertionError, match="must be above"):
        losses.total_loss("grpo", *rest, num_tokens=1, **SWITCHED_OFF | {"delta": 1.2})
    with pytest.raises(AssertionError, match="must be above 1"):
        losses.total_loss("grpo", *rest, num_tokens=1, **SWITCHED_OFF | {"dual_clip": 1.0})
