"""Policy losses on padded log-probs: pure functions, each with its equation and paper, and their table ``LOSSES``.

    B sequences    T completion tokens, padded to the longest    K tokens of a pass

Log-probs are natural logs of the probability of the token that was written, in nats. ``mask_BT`` is 1 on the tokens
that count and 0 elsewhere (padding, sequences left out); values under a 0 never matter. Every mean over tokens or
sequences is in ``LossInputs.coef_BT``, made once for the whole step, so micro-batches (and ranks, if gradients are
summed over them) add up to exactly the gradient of the one big batch. The conventions are TRL 1.16's, and tests compare
with TRL's own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.config import LearnerConfig


@dataclass(frozen=True)
class LossInputs:
    """What the loss of some of a step's tokens needs besides the policy's log-probs and entropies: constants."""

    advantages_BT: Tensor
    """The same for all tokens of a sequence."""
    mask_BT: Tensor
    sampler_BT: Tensor
    """The sampler's log-probs."""
    coef_BT: Tensor
    """The weight of each token's loss in the scalar loss: ``Loss.coefficients`` of the whole step's mask."""
    num_tokens: float
    """That count in the whole step."""
    old_BT: Tensor | None = None
    """Log-probs under the weights that sampled; none before the first update, where the policy is the old one."""
    reference_BT: Tensor | None = None

    def select(self, pick: Callable[[Tensor], Tensor]) -> LossInputs:
        """The inputs of some rows, or of some tokens as rows of one: whatever ``pick`` takes of a [B, T]."""
        tensors: dict[str, Any] = {name: pick(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


# -- the means: coefficients [B, T] of the tokens, 0 where the mask is 0 -----------------------------------------------


def sequence_mean(mask_BT: Tensor, max_tokens: int) -> Tensor:
    """1 / (B x tokens of the sequence), the mean over sequences of the token mean. GRPO, arXiv 2402.03300 eq. 3.

    As in TRL, a fully masked sequence adds nothing to the loss but counts in B.
    """
    return mask_BT / (mask_BT.shape[0] * mask_BT.sum(-1, keepdim=True).clamp(min=1))


def token_mean(mask_BT: Tensor, max_tokens: int) -> Tensor:
    """1 / tokens of the step. DAPO, arXiv 2503.14476 eq. 8. TRL's bnpo divides by the tokens of each micro-batch
    instead, so that its result depends on how the batch was split; with one micro-batch it is this."""
    return mask_BT / mask_BT.sum().clamp(min=1)


def constant_mean(mask_BT: Tensor, max_tokens: int) -> Tensor:
    """1 / (B x max_tokens), which favours no length. Dr. GRPO, arXiv 2503.20783."""
    return mask_BT / (mask_BT.shape[0] * max_tokens)


# -- the objectives: each token's loss before any weight, and where a clip acted ---------------------------------------


def clipped_loss(
    ratio_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, spec: LearnerConfig
) -> tuple[Tensor, Tensor]:
    """-min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A), and where the clip took the gradient away.

    PPO, arXiv 1707.06347 eq. 7; two different bounds are DAPO's clip-higher, arXiv 2503.14476 eq. 10. Nothing there
    bounds the loss of a negative advantage whose ratio grew: ``delta`` does, above 1 + clip_high or off at 0. It is
    INTELLECT-2's two-sided clip, arXiv 2505.07291, and the same thing as dual clip, max(.., delta A), arXiv 1912.09729.

    Written out by the sign of A: the ratio is bounded above at 1 + clip_high for A > 0; below at 1 - clip_low and above
    at delta for A < 0.
    """
    assert spec.delta == 0 or spec.delta > 1 + spec.clip_high, f"{spec.delta=} must be above 1 + {spec.clip_high=}"
    bounded_BT = torch.where(
        advantages_BT > 0,
        ratio_BT.clamp(max=1 + spec.clip_high),
        ratio_BT.clamp(min=1 - spec.clip_low, max=spec.delta or math.inf),
    )
    return -bounded_BT * advantages_BT, (bounded_BT != ratio_BT) & (advantages_BT != 0)


def cispo_loss(
    ratio_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, spec: LearnerConfig
) -> tuple[Tensor, Tensor]:
    """-sg(min(r, clip_high)) A logprob, and where the ratio was capped (those tokens still have a gradient).

    MiniMax-M1, arXiv 2506.13585, without its lower bound; the cap is ``clip_high`` itself, as in ScaleRL, arXiv
    2510.13786 (elsewhere 1 + clip_high). TRL reports capped ratios of positive advantages only; here both signs count.
    """
    loss_BT = -ratio_BT.clamp(max=spec.clip_high).detach() * advantages_BT * logprobs_BT
    return loss_BT, (ratio_BT > spec.clip_high) & (advantages_BT != 0)


def sapo_loss(
    ratio_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, spec: LearnerConfig
) -> tuple[Tensor, Tensor]:
    """-(4 / tau) sigmoid(tau (r - 1)) A with tau by the sign of A, and False everywhere: a soft gate clips nothing.

    SAPO, arXiv 2511.20347. The 4 / tau makes the gradient at r = 1 that of r A.
    """
    tau_BT = torch.full_like(advantages_BT, spec.sapo_tau_negative)
    tau_BT = tau_BT.masked_fill(advantages_BT > 0, spec.sapo_tau_positive)
    loss_BT = -(4 / tau_BT) * torch.sigmoid(tau_BT * (ratio_BT - 1)) * advantages_BT
    return loss_BT, torch.zeros_like(ratio_BT, dtype=torch.bool)


@dataclass(frozen=True)
class Loss:
    objective: Callable[[Tensor, Tensor, Tensor, LearnerConfig], tuple[Tensor, Tensor]]
    """(ratio_BT, logprobs_BT, advantages_BT, settings) to (loss_BT, clipped_BT); values under the mask mean nothing."""
    coefficients: Callable[[Tensor, int], Tensor]
    """(mask_BT of the whole step, max_tokens) to coef_BT."""


LOSSES = {
    "grpo": Loss(clipped_loss, sequence_mean),
    "dapo": Loss(clipped_loss, token_mean),
    "dr_grpo": Loss(clipped_loss, constant_mean),
    "cispo": Loss(cispo_loss, token_mean),
    "sapo": Loss(sapo_loss, sequence_mean),
}
"""``learner.loss`` to its functions, by the words of ``LearnerConfig.loss`` in ``common/config/schema.py``."""


# -- the terms ---------------------------------------------------------------------------------------------------------


def policy_ratio(logprobs_BT: Tensor, old_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """ratio_BT, how much likelier the policy makes what the old policy wrote.

    ``token``: exp(logprob - old). ``sequence``: the geometric mean of those over the sequence's tokens, the same number
    at each of them. GSPO, arXiv 2507.18071 eq. 7. The old policy is a constant.
    """
    difference_BT = logprobs_BT - old_BT.detach()
    if level == "token":
        return difference_BT.exp()
    sum_B1 = torch.where(mask_BT > 0, difference_BT, 0).sum(-1, keepdim=True)
    mean_B1 = sum_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return mean_B1.exp().expand_as(difference_BT)


def kl_BT(kind: str, logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """Schulman's estimators of KL(policy || reference) at each token (joschu.net/blog/kl-approx.html).

    With log r = reference - policy: ``k1`` = -log r, ``k2`` = (log r)^2 / 2, ``k3`` = r - 1 - log r (GRPO, arXiv
    2402.03300 eq. 4). In expectation over the policy k1 and k3 are the KL; k2 is close to it for small differences.
    """
    log_r_BT = reference_BT - logprobs_BT
    if kind == "k1":
        return -log_r_BT
    if kind == "k2":
        return log_r_BT.square() / 2
    return log_r_BT.exp() - 1 - log_r_BT


def kl_term(kind: str, logprobs_BT: Tensor, reference_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """The KL as a loss: ``ratio_BT x kl_BT``, whose gradient is that of the KL without bias (at token level).

    ``kl_BT`` alone has the right value and the wrong gradient: k1's is 0 in expectation, k3's is that of the opposite
    KL, and all forget that the tokens came from the old policy. Multiplying by a differentiable ratio fixes it:
    DeepSeek-V3.2, arXiv 2512.02556, and TRL's default (``use_bias_correction_kl``). The gradient of k2 alone is
    already the right one, so its ratio only reweights the tokens.
    """
    weight_BT = ratio_BT.detach() if kind == "k2" else ratio_BT
    return weight_BT * kl_BT(kind, logprobs_BT, reference_BT)


def importance_weights(
    old_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor, mode: str, level: str, cap: float
) -> Tensor:
    """weights_BT = exp(learner - sampler), bounded by ``cap``: makes up for tokens drawn by a slightly other policy.

    ``old_BT`` are the learner's log-probs under the weights that sampled, before any update on this batch. ``level``
    token: each token's own difference; sequence: the **sum** over the sequence, one weight for all of its tokens.
    ``mode`` truncate: larger weights become ``cap`` (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"); mask: they become 0 (Liu et al. 2025, "When speed kills stability"); off: all 1. The
    weights are constants: no gradient.
    """
    with torch.no_grad():
        if mode == "off":
            return torch.ones_like(old_BT)
        difference_BT = torch.where(mask_BT > 0, old_BT - sampler_BT, 0)
        if level == "sequence":
            difference_BT = difference_BT.sum(-1, keepdim=True).expand_as(difference_BT)
        weights_BT = difference_BT.exp()
        return weights_BT.clamp(max=cap) if mode == "truncate" else torch.where(weights_BT > cap, 0, weights_BT)


def total_loss(
    logprobs_BT: Tensor, entropy_BT: Tensor, inputs: LossInputs, spec: LearnerConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats) of one micro-batch of whole sequences; both add up over the micro-batches of a step.

    loss = sum(coef x (importance x objective + kl_coef x kl_term)) - entropy_coef x sum(entropy) / num_tokens

    As in TRL the entropy bonus (nats a token) is a mean over tokens whatever the loss, and the KL takes no importance
    weight. With one update a batch the ratio is 1 and the gradient that of A x logprob.

    ``stats`` holds detached scalars for ``mean_stats``: ``loss``, ``tokens``, and over the tokens that count sums
    (``_sum``) of ratio, clipped, importance (weight), sampler_difference (|learner - sampler| log-prob), kl (the plain
    estimate, where there is a reference) and entropy; largest values (``_max``) of importance and sampler_difference.
    """
    mask_BT = inputs.mask_BT
    kept_BT = mask_BT > 0  # garbage under the mask must not turn into nan (0 x inf), here or in the gradient
    logprobs_BT = torch.where(kept_BT, logprobs_BT, 0)
    old_BT = logprobs_BT.detach() if inputs.old_BT is None else torch.where(kept_BT, inputs.old_BT, 0)
    sampler_BT = torch.where(kept_BT, inputs.sampler_BT, 0)
    entropy_BT = torch.where(kept_BT, entropy_BT, 0)
    ratio_BT = policy_ratio(logprobs_BT, old_BT, mask_BT, spec.ratio)
    loss_BT, clipped_BT = LOSSES[spec.loss].objective(ratio_BT, logprobs_BT, inputs.advantages_BT, spec)
    levels = spec.importance, spec.importance_level, spec.importance_cap
    weights_BT = importance_weights(old_BT, sampler_BT, mask_BT, *levels)
    loss_BT = loss_BT * weights_BT
    each_BT = {
        "ratio": ratio_BT,
        "clipped": clipped_BT,
        "importance": weights_BT,
        "sampler_difference": (old_BT - sampler_BT).abs(),
        "entropy": entropy_BT,
    }
    if inputs.reference_BT is not None:
        reference_BT = torch.where(kept_BT, inputs.reference_BT.detach(), 0)
        loss_BT = loss_BT + spec.kl_coef * kl_term(spec.kl_estimator, logprobs_BT, reference_BT, ratio_BT)
        each_BT["kl"] = kl_BT(spec.kl_estimator, logprobs_BT, reference_BT)
    assert spec.kl_coef == 0 or "kl" in each_BT, f"{spec.kl_coef=} needs reference_BT"
    loss = (loss_BT * inputs.coef_BT).sum() - spec.entropy_coef * entropy_BT.sum() / max(inputs.num_tokens, 1)
    stats = {"loss": loss.detach(), "tokens": mask_BT.sum()}
    for name, value_BT in each_BT.items():
        masked_BT = value_BT.detach() * mask_BT
        stats[f"{name}_sum"] = masked_BT.sum()
        if name in ("importance", "sampler_difference"):
            stats[f"{name}_max"] = masked_BT.max() if masked_BT.numel() else masked_BT.sum()
    return loss, stats


@dataclass(frozen=True)
class ChunkedLoss:
    """``total_loss`` of any of a pass's tokens, whose rows and columns in the step's batch these are."""

    row_K: Tensor
    column_K: Tensor
    inputs: LossInputs
    spec: LearnerConfig

    @property
    def by_sequence(self) -> bool:
        """Whether a token's loss depends on all of its sequence, so that a pass cannot be taken chunk by chunk."""
        importance = self.spec.importance != "off" and self.spec.importance_level == "sequence"
        return importance or self.spec.ratio == "sequence"

    def __call__(self, logprob_K: Tensor, entropy_K: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the tokens ``part``; all of the pass's where it goes ``by_sequence``."""
        if not self.spec.entropy_coef:  # a gradient of zeros would cost as much as a real one
            entropy_K = entropy_K.detach()
        row_K, column_K = self.row_K[part], self.column_K[part]
        if not self.by_sequence:
            inputs = self.inputs.select(lambda values_BT: values_BT[row_K, column_K][:, None])
            return total_loss(logprob_K[:, None], entropy_K[:, None], inputs, self.spec)
        rows_R, at_K = row_K.unique(return_inverse=True)
        blank_RT = logprob_K.new_zeros(len(rows_R), self.inputs.mask_BT.shape[1])
        logprobs_RT, entropy_RT = (
            blank_RT.index_put((at_K, column_K), values_K) for values_K in (logprob_K, entropy_K)
        )
        return total_loss(logprobs_RT, entropy_RT, self.inputs.select(lambda values_BT: values_BT[rows_R]), self.spec)


def total_stats(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The stats of all parts together: ``x_max`` the largest, everything else added up."""
    columns = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    return {key: column.max() if key.endswith("_max") else column.sum() for key, column in columns.items()}


def mean_stats(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The stats of a whole step out of its micro-batches': as ``total_stats``, with ``x_mean`` per token that counts in
    place of ``x_sum`` (0 where none does)."""
    total = {key: float(value) for key, value in total_stats(parts).items()}
    tokens = max(total["tokens"], 1.0)
    means = {key.replace("_sum", "_mean"): value / tokens for key, value in total.items() if key.endswith("_sum")}
    return {key: value for key, value in total.items() if not key.endswith("_sum")} | means
