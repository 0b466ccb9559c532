"""The slow truth: losses and advantages as nested loops over plain numbers, written from the papers.

Nothing here is shared with ``learner/``. ``check_losses`` and ``check_advantages`` hold a module against it; the tests
give them ours, ``test_mutations.py`` gives them ours with one thing broken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from common.config import LearnerConfig, OptimizerConfig
from common.types import Completion, Group, Prompt

Rows = list[list[float]]
LOSSES = ("grpo", "dapo", "dr_grpo", "cispo", "sapo")


@dataclass(frozen=True)
class Batch:
    """Random numbers of one step. What stands under a 0 of the mask is never read by the truth."""

    logprobs: Rows
    old: Rows
    sampler: Rows
    reference: Rows
    entropy: Rows
    advantages: list[float]
    mask: list[list[int]]
    max_tokens: int


def random_batch(seed: int, sequences: int = 4, tokens: int = 4, drift: float = 0.4) -> Batch:
    """Ragged lengths, a hole, one sequence fully masked, advantages of both signs and at times a zero."""
    rng = np.random.default_rng(seed)
    logprobs = rng.normal(-2, 1, (sequences, tokens))
    old = logprobs + rng.normal(0, drift, (sequences, tokens))
    sampler = old + rng.normal(0, drift, (sequences, tokens))
    reference = logprobs + rng.normal(0, drift, (sequences, tokens))
    entropy = rng.uniform(0, 3, (sequences, tokens))
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, (sequences, 1))
    mask[0], mask[0, 1:2], mask[-1] = True, False, False
    advantages = rng.normal(0, 1, sequences)
    advantages[:2] = abs(advantages[0]), -abs(advantages[1])
    if seed % 2:
        advantages[2:3] = 0.0
    return Batch(
        logprobs.tolist(), old.tolist(), sampler.tolist(), reference.tolist(), entropy.tolist(), advantages.tolist(),
        mask.astype(int).tolist(), max_tokens=tokens + 3,
    )  # fmt: skip


def settings() -> Iterator[dict[str, Any]]:
    """Every loss at both ratio levels under every importance mode, the other choices taking turns."""
    weights = [("off", "token"), *itertools.product(("truncate", "mask"), ("token", "sequence"))]
    deltas = itertools.cycle([0, 1.6, 1.45, 1.4])
    kls = itertools.cycle([("k3", 0.0), ("k1", 0.3), ("k2", 0.7), ("k3", 0.2), ("k3", 0.5)])
    entropies = itertools.cycle([0.0, 0.01, 0.2])
    for loss, ratio, (mode, level) in itertools.product(LOSSES, ("token", "sequence"), weights):
        kl_estimator, kl_coef = next(kls)
        yield {
            "loss": loss, "ratio": ratio, "clip_low": 0.15, "clip_high": 1.2 if loss == "cispo" else 0.3,
            "delta": 0 if loss == "cispo" else next(deltas), "sapo_tau_positive": 1.0, "sapo_tau_negative": 1.4,
            "importance": mode, "importance_level": level, "importance_cap": 1.15, "kl_estimator": kl_estimator,
            "kl_coef": kl_coef, "entropy_coef": next(entropies),
        }  # fmt: skip


def objective(kind: str, ratio: float, advantage: float, s: dict[str, Any]) -> float:
    """The clipped or gated objective of one token (cispo's has a log-prob as well and is not here)."""
    value: float
    if kind == "sapo":
        tau = s["sapo_tau_positive"] if advantage > 0 else s["sapo_tau_negative"]
        value = 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
        return value
    assert kind in ("grpo", "dapo", "dr_grpo"), f"no truth is written for the loss {kind!r}"
    clipped = min(max(ratio, 1 - s["clip_low"]), 1 + s["clip_high"])
    first = min(ratio, s["delta"]) if s["delta"] else ratio
    return float(min(first * advantage, clipped * advantage))


def estimate_kl(kind: str, logprob: float, reference: float) -> float:
    r = math.exp(reference) / math.exp(logprob)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[kind]


def importance_weight(batch: Batch, row: int, token: int, s: dict[str, Any]) -> float:
    """exp(learner - sampler) of a token, or of the whole sequence, then the cap."""
    if s["importance"] == "off":
        return 1.0
    weight = 1.0
    for t, counts in enumerate(batch.mask[row]):
        if counts and (s["importance_level"] == "sequence" or t == token):
            weight *= math.exp(batch.old[row][t]) / math.exp(batch.sampler[row][t])
    if weight > s["importance_cap"]:
        return float(s["importance_cap"]) if s["importance"] == "truncate" else 0.0
    return weight


def token_ratio(batch: Batch, logprobs: Rows, row: int, token: int, level: str) -> float:
    if level == "token":
        return math.exp(logprobs[row][token]) / math.exp(batch.old[row][token])
    counted = [t for t, counts in enumerate(batch.mask[row]) if counts]
    likelihood = math.prod(math.exp(logprobs[row][t]) / math.exp(batch.old[row][t]) for t in counted)
    return float(likelihood ** (1 / len(counted)))


def divisor(kind: str, batch: Batch, row: int) -> float:
    sequences = len(batch.mask)
    if kind in ("grpo", "sapo"):
        return sequences * sum(batch.mask[row])
    if kind == "dr_grpo":
        return sequences * batch.max_tokens
    return sum(sum(of_row) for of_row in batch.mask)


def slow_loss(batch: Batch, s: dict[str, Any], logprobs: Rows) -> tuple[float, dict[str, float]]:
    """The loss at ``logprobs``, and the sums over tokens. Stop-gradients are taken at ``batch.logprobs``, so that the
    differences of this function by ``logprobs`` are the gradient."""
    loss, tokens = 0.0, sum(sum(of_row) for of_row in batch.mask)
    names = ("ratio", "clipped", "importance", "sampler_difference", "kl", "entropy")
    sums = dict.fromkeys(names, 0.0) | {"largest_importance": 0.0, "largest_difference": 0.0}
    for row, token in itertools.product(range(len(batch.mask)), range(len(batch.mask[0]))):
        if not batch.mask[row][token]:
            continue
        advantage, logprob = batch.advantages[row], logprobs[row][token]
        ratio = token_ratio(batch, logprobs, row, token, s["ratio"])
        constant_ratio = token_ratio(batch, batch.logprobs, row, token, s["ratio"])
        weight = importance_weight(batch, row, token, s)
        if s["loss"] == "cispo":
            value = min(constant_ratio, s["clip_high"]) * advantage * logprob
            sums["clipped"] += advantage != 0 and ratio > s["clip_high"]
        else:
            value = objective(s["loss"], ratio, advantage, s)
            around = [objective(s["loss"], ratio * step, advantage, s) for step in (0.99999, 1.00001)]
            sums["clipped"] += advantage != 0 and around[0] == around[1]
        kl = estimate_kl(s["kl_estimator"], logprob, batch.reference[row][token])
        kl_ratio = constant_ratio if s["kl_estimator"] == "k2" else ratio
        loss += (-value * weight + s["kl_coef"] * kl_ratio * kl) / divisor(s["loss"], batch, row)
        loss -= s["entropy_coef"] * batch.entropy[row][token] / tokens
        difference = abs(batch.old[row][token] - batch.sampler[row][token])
        sums["ratio"] += ratio
        sums["importance"] += weight
        sums["sampler_difference"] += difference
        sums["kl"] += kl
        sums["entropy"] += batch.entropy[row][token]
        sums["largest_importance"] = max(sums["largest_importance"], weight)
        sums["largest_difference"] = max(sums["largest_difference"], difference)
    return loss, sums


def slow_gradient(batch: Batch, s: dict[str, Any], step: float = 1e-5) -> Rows:
    """Central differences of ``slow_loss`` by each log-prob that counts; 0 for the others."""
    gradient = [[0.0] * len(of_row) for of_row in batch.mask]
    for row, token in itertools.product(range(len(batch.mask)), range(len(batch.mask[0]))):
        if batch.mask[row][token]:
            sides = []
            for sign in (1, -1):
                moved = [list(of_row) for of_row in batch.logprobs]
                moved[row][token] += sign * step
                sides.append(slow_loss(batch, s, moved)[0])
            gradient[row][token] = (sides[0] - sides[1]) / (2 * step)
    return gradient


@lru_cache
def loss_cases() -> list[tuple[Batch, dict[str, Any], float, dict[str, float], Rows]]:
    """(batch, settings, loss, sums, gradient) by the truth; computed once, since every mutation is held against it."""
    cases = []
    for seed, (s, size) in enumerate(itertools.product(settings(), range(3))):
        batch = random_batch(seed, sequences=2 + (seed + size) % 4, tokens=1 + seed % 4)
        loss, sums = slow_loss(batch, s, batch.logprobs)
        cases.append((batch, s, loss, sums, slow_gradient(batch, s)))
    return cases


def with_garbage(rows: Rows, mask: list[list[int]], garbage: float) -> torch.Tensor:
    tensor = torch.tensor(rows, dtype=torch.float64)
    return torch.where(torch.tensor(mask) > 0, tensor, garbage)


def close(found: Any, expected: Any, what: str, tolerance: float = 1e-8) -> None:
    """Fails, with the word ``what``, unless all numbers agree absolutely and relatively (nan agrees with nothing)."""
    if isinstance(found, torch.Tensor):
        found = found.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=False, err_msg=what)


def check_losses(losses: Any) -> None:
    """Fails with an AssertionError unless the module ``losses`` computes what the papers say."""
    check_total_loss(losses)
    check_policy_loss(losses)
    check_importance_weights(losses)
    check_kl(losses)
    check_coefficients(losses)
    check_on_policy(losses)
    check_mean_stats(losses)


def check_total_loss(losses: Any) -> None:
    """Loss, gradient, constants and stats, with rubbish under the mask."""
    for batch, s, loss, sums, gradient in loss_cases():
        mask_BT = torch.tensor(batch.mask, dtype=torch.float64)
        logprobs_BT, old_BT, sampler_BT, reference_BT, entropy_BT = (
            with_garbage(rows, batch.mask, garbage).requires_grad_()
            for rows, garbage in (
                (batch.logprobs, math.inf), (batch.old, -math.inf), (batch.sampler, math.nan),
                (batch.reference, math.nan), (batch.entropy, math.inf),
            )
        )  # fmt: skip
        advantages_B = torch.tensor(batch.advantages, dtype=torch.float64)
        inputs = losses.LossInputs(
            advantages_B[:, None].expand_as(mask_BT), mask_BT, sampler_BT,
            losses.LOSSES[s["loss"]].coefficients(mask_BT, batch.max_tokens), float(mask_BT.sum()), old_BT,
            reference_BT,
        )  # fmt: skip
        found, stats = losses.total_loss(logprobs_BT, entropy_BT, inputs, LearnerConfig(**s))
        found.backward()
        assert logprobs_BT.grad is not None, f"no gradient under {s}"
        assert entropy_BT.grad is not None, f"no entropy gradient under {s}"
        close(found, loss, f"loss under {s}")
        close(logprobs_BT.grad, gradient, f"gradient under {s}", 1e-7)
        close(entropy_BT.grad, -s["entropy_coef"] * mask_BT / mask_BT.sum(), f"entropy gradient under {s}")
        for name, constant_BT in {"old": old_BT, "sampler": sampler_BT, "reference": reference_BT}.items():
            assert constant_BT.grad is None or not constant_BT.grad.any(), f"{name} log-probs got a gradient"
        assert not any(value.requires_grad for value in stats.values()), "stats keep the graph alive"
        assert all(value.shape == () for value in stats.values()), "stats are not scalars"
        means = losses.mean_stats([stats])
        close(means.pop("importance_max"), sums["largest_importance"], f"importance_max under {s}")
        close(means.pop("sampler_difference_max"), sums["largest_difference"], f"sampler_difference_max under {s}")
        close([means.pop("loss"), means.pop("tokens")], [loss, mask_BT.sum()], f"stats under {s}")
        expected = {f"{name}_mean": sums[name] / mask_BT.sum() for name in sums if not name.startswith("largest")}
        assert means.keys() == expected.keys(), means.keys()
        for name, value in expected.items():
            close(means[name], value, f"{name} under {s}")


def policy_loss(
    losses: Any, logprobs_BT: torch.Tensor, old_BT: torch.Tensor, advantages_B: torch.Tensor, mask_BT: torch.Tensor,
    spec: LearnerConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss_BT, ratio_BT, clipped_BT) by the module ``losses``, before any weight."""
    ratio_BT = losses.policy_ratio(logprobs_BT, old_BT, mask_BT, spec.ratio)
    advantages_BT = advantages_B[:, None].expand_as(mask_BT)
    loss_BT, clipped_BT = losses.LOSSES[spec.loss].objective(ratio_BT, logprobs_BT, advantages_BT, spec)
    return loss_BT, ratio_BT, clipped_BT


def check_policy_loss(losses: Any) -> None:
    """Token by token, before any weight."""
    for batch, s, *_ in loss_cases():
        mask_BT = torch.tensor(batch.mask, dtype=torch.float64)
        loss_BT, ratio_BT, clipped_BT = policy_loss(
            losses, with_garbage(batch.logprobs, batch.mask, 3.0), with_garbage(batch.old, batch.mask, 1.0),
            torch.tensor(batch.advantages, dtype=torch.float64), mask_BT, LearnerConfig(**s),
        )  # fmt: skip
        assert loss_BT.shape == ratio_BT.shape == clipped_BT.shape == mask_BT.shape
        assert clipped_BT.dtype == torch.bool
        for row, token in torch.argwhere(mask_BT > 0).tolist():
            ratio, advantage = token_ratio(batch, batch.logprobs, row, token, s["ratio"]), batch.advantages[row]
            if s["loss"] == "cispo":
                expected = -min(ratio, s["clip_high"]) * advantage * batch.logprobs[row][token]
            else:
                expected = -objective(s["loss"], ratio, advantage, s)
            close(loss_BT[row, token], expected, f"policy loss under {s}")
            close(ratio_BT[row, token], ratio, f"ratio under {s}")


def check_importance_weights(losses: Any) -> None:
    for batch, s, *_ in loss_cases():
        mask_BT = torch.tensor(batch.mask, dtype=torch.float64)
        old_BT = with_garbage(batch.old, batch.mask, math.inf).requires_grad_()
        sampler_BT = with_garbage(batch.sampler, batch.mask, math.nan)
        modes = s["importance"], s["importance_level"], s["importance_cap"]
        weights_BT = losses.importance_weights(old_BT, sampler_BT, mask_BT, *modes)
        assert not weights_BT.requires_grad, "importance weights must be constants"
        assert weights_BT.shape == mask_BT.shape
        for row, token in torch.argwhere(mask_BT > 0).tolist():
            close(weights_BT[row, token], importance_weight(batch, row, token, s), f"importance weight under {s}")
    one = torch.ones(1, 1)
    close(losses.importance_weights(one, one, one, "mask", "token", 1.0), one, "a weight of just the cap is kept")


def check_kl(losses: Any) -> None:
    batch = random_batch(0)
    logprobs_BT, reference_BT = torch.tensor(batch.logprobs).double(), torch.tensor(batch.reference).double()
    for kind in ("k1", "k2", "k3"):
        found = losses.kl_BT(kind, logprobs_BT, reference_BT)
        for row, token in np.ndindex(*found.shape):
            expected = estimate_kl(kind, float(logprobs_BT[row, token]), float(reference_BT[row, token]))
            close(found[row, token], expected, kind)


def check_coefficients(losses: Any) -> None:
    for batch in (random_batch(0), random_batch(1), random_batch(2, sequences=2, tokens=1)):
        mask_BT = torch.tensor(batch.mask, dtype=torch.float64)
        for loss in LOSSES:
            coefficients = losses.LOSSES[loss].coefficients
            coef_BT = coefficients(mask_BT, batch.max_tokens)
            for row in range(len(mask_BT)):
                expected = [counts and 1 / divisor(loss, batch, row) for counts in batch.mask[row]]
                close(coef_BT[row], expected, f"coefficients of {loss}")
            nothing_BT = coefficients(torch.zeros(2, 3), 5)
            close(nothing_BT, np.zeros((2, 3)), f"coefficients of a fully masked batch, {loss}")


def check_on_policy(losses: Any) -> None:
    """The current log-probs given as the old ones, gradient and all: ratio 1, and REINFORCE's gradient -A.

    Also with the clip just at 1, which is not yet beyond it.
    """
    mask_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages_B = torch.tensor([2.0, -3.0])
    for s in settings():
        logprobs_BT = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.0, -9.0]], requires_grad=True)
        spec = LearnerConfig(**s | {"clip_low": 0.0, "clip_high": 1.0 if s["loss"] == "cispo" else 0.0})
        loss_BT, ratio_BT, clipped_BT = policy_loss(losses, logprobs_BT, logprobs_BT, advantages_B, mask_BT, spec)
        (loss_BT * mask_BT).sum().backward()
        close(logprobs_BT.grad, -advantages_B[:, None] * mask_BT, f"on-policy gradient under {s}", 1e-6)
        close(ratio_BT, np.ones((2, 3)), f"on-policy ratio under {s}")
        assert not clipped_BT.any()


def check_mean_stats(losses: Any) -> None:
    """Two micro-batches of 2 and 6 tokens."""
    names = ("loss", "tokens", "x_sum", "x_max")
    parts = [
        dict(zip(names, map(torch.tensor, row), strict=True)) for row in ([1.0, 2.0, 3.0, 4.0], [0.5, 6.0, 1.0, 2.0])
    ]
    found = losses.mean_stats(parts)
    assert found == {"loss": 1.5, "tokens": 8.0, "x_mean": 0.5, "x_max": 4.0}, found


def check_batch(loop: Any) -> None:
    """Those with signal first, then the others, as they came, as many as the step has room for."""
    flat, mixed, other = (group_of(rewards) for rewards in ([1.0, 1.0], [0.0, 1.0], [2.0, 3.0]))
    assert loop.batch_of([flat, mixed, other, flat], 3) == [mixed, other, flat]
    assert loop.batch_of([flat, mixed, flat, other], 2) == [mixed, other]
    assert loop.batch_of([flat, mixed], 4) == [mixed, flat]


def check_rates(optim: Any) -> None:
    """Each rate by its own count: full after the warm-up, the end at the last step, and 0 only after it."""
    schedules = ("constant", "linear", "cosine")
    for schedule, warmup, steps, ratio in itertools.product(schedules, (0, 3), (1, 2, 9), (0.0, 0.25)):
        spec = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=warmup, min_lr_ratio=ratio)
        updates = warmup + steps
        last = steps if ratio else steps + 1  # counted from the warm-up's end, where the rate is full
        for update in range(updates):
            after = update + 1 - warmup
            falls = {"constant": 1.0, "linear": 1 - after / last, "cosine": (1 + math.cos(math.pi * after / last)) / 2}
            share = falls[schedule]
            rate = 2.0 * (update + 1) / warmup if after <= 0 else 2.0 * (ratio + (1 - ratio) * share)
            found = optim.learning_rate(spec, update, updates)
            assert found > 0, (spec, update)
            close(found, rate, f"rate {update} of {updates} under {spec}")


def group_of(rewards: list[float], tokens: list[int] | None = None) -> Group:
    """A group with these rewards (and lengths)."""
    lengths = tokens or [1] * len(rewards)
    completions = tuple(
        Completion((7,) * length, "", (-1.0,) * length, "stop", 0, {"right": reward}, reward)
        for reward, length in zip(rewards, lengths, strict=True)
    )
    return Group(Prompt("train-0", ()), completions)


def slow_advantages(rewards: list[list[float]], kind: str) -> list[list[float]]:
    everything = [reward for of_group in rewards for reward in of_group]
    result = []
    for of_group in rewards:
        row = []
        for index, reward in enumerate(of_group):
            others = of_group[:index] + of_group[index + 1 :]
            if not others:
                row.append(0.0)
            elif kind == "leave_one_out":
                row.append(reward - sum(others) / len(others))
            else:
                advantage = reward - sum(of_group) / len(of_group)
                spread = {"zscore": of_group, "batch_std": everything, "no_std": None}[kind]
                if spread is not None:
                    mean = sum(spread) / len(spread)
                    variance = sum((value - mean) ** 2 for value in spread) / (len(spread) - 1)
                    advantage /= math.sqrt(variance) + 1e-4
                row.append(advantage)
        result.append(row)
    return result


def check_advantages(advantages: Any) -> None:
    """Fails with an AssertionError unless the module ``advantages`` computes what the papers say."""
    rng = np.random.default_rng(0)
    # The last batch has a group whose reward is hardly ever different: there the 1e-4 matters.
    batches = [
        [rng.normal(0, 2, size).round(2).tolist() for size in sizes] for sizes in ([4, 4], [2, 5, 3], [1, 3], [1])
    ]
    batches += [[[1.0, 0.0, 0.0, 1.1], [0.1] * 3, [1.0, 1.0002]]]
    for rewards, kind in itertools.product(batches, ("zscore", "no_std", "batch_std", "leave_one_out")):
        groups = [group_of(of_group) for of_group in rewards]
        result = advantages.assign(groups, kind)
        for group, scored, expected in zip(groups, result, slow_advantages(rewards, kind), strict=True):
            close([c.advantage for c in scored.completions], expected, f"{kind} of {rewards}", 1e-9)
            assert [c.reward for c in scored.completions] == [c.reward for c in group.completions]
            assert advantages.has_signal(group) == any(c.advantage for c in scored.completions), f"signal of {rewards}"
    assert not advantages.has_signal(group_of([0.1 + 0.2, 0.15 + 0.15, 0.3])), "rewards that rounding sets apart"
    assert not advantages.has_signal(group_of([1e9, 1e9 + 1e-6])), "the same of large rewards"
    assert advantages.has_signal(group_of([0.0, 1e-6])), "small rewards"
    lengths = list(range(1, 13))
    punished = advantages.soft_overlong(group_of([0.5] * 12, lengths), max_tokens=10, overlong_tokens=4)
    for length, completion in zip(lengths, punished.completions, strict=True):
        penalty = 0.0 if length <= 6 else 1.0 if length > 10 else (length - 6) / 4
        close(completion.reward, 0.5 - penalty, f"reward at {length} tokens")
        assert completion.rewards == {"right": 0.5}
        assert len(completion.token_ids) == length
    punished = advantages.soft_overlong(group_of([0.5] * 2, [9, 10]), max_tokens=10, overlong_tokens=1)
    assert [completion.reward for completion in punished.completions] == [0.5, -0.5]
