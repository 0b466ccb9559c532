"""Policy losses on padded log-probs: pure functions, each with its equation and paper.

    B sequences    T completion tokens, padded to the longest

Log-probs are natural logs of the probability of the token that was written, in nats. ``mask_BT`` is 1 on the tokens
that count and 0 elsewhere (padding, sequences left out); what stands under a 0 never matters.

How a batch is trained on: ``token_coefficients`` once for the whole step, then ``total_loss`` for each micro-batch of
whole sequences with its rows of the coefficients. Every average over tokens or sequences is in the coefficients, so
micro-batches (and ranks, if gradients are summed over them) add up to exactly the gradient of the one big batch.

The conventions are TRL 1.16's, and tests compare with TRL's own code. Left out: advantages
(``learner/loss/advantages.py``) and everything that knows a model. Used by the learner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

LossKind = Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo"]
Level = Literal["token", "sequence"]
KLKind = Literal["k1", "k2", "k3"]
ImportanceMode = Literal["off", "truncate", "mask"]


def token_coefficients(
    loss: LossKind,
    mask_BT: Tensor,
    max_tokens: int,
    *,
    num_sequences: float | None = None,
    num_tokens: float | None = None,
) -> Tensor:
    """coef_BT, the weight of each token's loss in the scalar loss; 0 where the mask is 0.

    - ``grpo``, ``sapo``: 1 / (B x tokens of the sequence), the mean over sequences of the token mean. GRPO, arXiv
      2402.03300 eq. 3.
    - ``dapo``, ``bnpo``, ``cispo``: 1 / tokens of the batch. DAPO, arXiv 2503.14476 eq. 8.
    - ``dr_grpo``: 1 / (B x max_tokens), which favours no length. Dr. GRPO, arXiv 2503.20783.

    ``num_sequences`` (B) and ``num_tokens`` are the totals of the whole step; without them ``mask_BT`` is taken to be
    the whole step. They are needed when this is one rank's part, or when sequences that count were left out.

    As in TRL, a fully masked sequence adds nothing to the loss but counts in B, and a batch without any token gives
    zeros. Unlike TRL, ``bnpo`` here is ``dapo``: TRL's divides by the tokens of each micro-batch, so that its result
    depends on how the batch was split; with one micro-batch the two agree.
    """
    sequences = mask_BT.shape[0] if num_sequences is None else num_sequences
    if loss in ("grpo", "sapo"):
        return mask_BT / (sequences * mask_BT.sum(-1, keepdim=True).clamp(min=1))
    if loss in ("dapo", "bnpo", "cispo"):
        return mask_BT / (mask_BT.sum().clamp(min=1) if num_tokens is None else max(num_tokens, 1))
    if loss == "dr_grpo":
        return mask_BT / (sequences * max_tokens)
    raise ValueError(f"loss={loss!r} is not known; use one of {', '.join(get_args(LossKind))}")


def policy_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor, level: Level) -> Tensor:
    """ratio_BT, how much likelier the policy makes what the old policy wrote.

    ``token``: exp(logprob - old). ``sequence``: the geometric mean of those over the sequence's tokens, the same number
    at each of them. GSPO, arXiv 2507.18071 eq. 7. The old policy is a constant.
    """
    difference_BT = logprobs_BT - old_logprobs_BT.detach()
    if level == "token":
        return difference_BT.exp()
    if level == "sequence":
        sum_B1 = torch.where(mask_BT > 0, difference_BT, 0).sum(-1, keepdim=True)
        mean_B1 = sum_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)
        return mean_B1.exp().expand_as(difference_BT)
    raise ValueError(f"ratio={level!r} is not known; use token or sequence")


def clipped_loss(
    ratio_BT: Tensor, advantages_B1: Tensor, clip_low: float, clip_high: float, delta: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and where the clip took the gradient away.

    PPO, arXiv 1707.06347 eq. 7; two different bounds are DAPO's clip-higher, arXiv 2503.14476 eq. 10. Nothing there
    bounds the loss of a negative advantage whose ratio grew. Two papers do, each off at 0:

    - ``delta``: min(min(r, delta) A, clip(r) A), delta above 1 + clip_high. INTELLECT-2, arXiv 2505.07291.
    - ``dual_clip``: max(min(r A, clip(r) A), dual_clip A) for A < 0, dual_clip above 1. arXiv 1912.09729.

    Written out by the sign of A, all of these bound the ratio: above at 1 + clip_high for A > 0; below at 1 - clip_low
    and above at delta or dual_clip, whichever is smaller, for A < 0. So those two are one thing under two names.
    """
    assert delta == 0 or delta > 1 + clip_high, f"{delta=} must be above 1 + {clip_high=}"
    assert dual_clip == 0 or dual_clip > 1, f"{dual_clip=} must be above 1"
    highest = min(delta or math.inf, dual_clip or math.inf)
    bounded_BT = torch.where(
        advantages_B1 > 0, ratio_BT.clamp(max=1 + clip_high), ratio_BT.clamp(min=1 - clip_low, max=highest)
    )
    return -bounded_BT * advantages_B1, (bounded_BT != ratio_BT) & (advantages_B1 != 0)


def cispo_loss(logprobs_BT: Tensor, ratio_BT: Tensor, advantages_B1: Tensor, clip_high: float) -> tuple[Tensor, Tensor]:
    """-sg(min(r, clip_high)) A logprob, and where the ratio was capped (those tokens still have a gradient).

    MiniMax-M1, arXiv 2506.13585, without its lower bound; the cap is ``clip_high`` itself, as in ScaleRL, arXiv
    2510.13786 (elsewhere 1 + clip_high). TRL reports capped ratios of positive advantages only; here both signs count.
    """
    loss_BT = -ratio_BT.clamp(max=clip_high).detach() * advantages_B1 * logprobs_BT
    return loss_BT, (ratio_BT > clip_high) & (advantages_B1 != 0)


def sapo_loss(
    ratio_BT: Tensor, advantages_B1: Tensor, tau_positive: float, tau_negative: float
) -> tuple[Tensor, Tensor]:
    """-(4 / tau) sigmoid(tau (r - 1)) A with tau by the sign of A, and False everywhere: a soft gate clips nothing.

    SAPO, arXiv 2511.20347. The 4 / tau makes the gradient at r = 1 that of r A.
    """
    tau_B1 = torch.full_like(advantages_B1, tau_negative).masked_fill(advantages_B1 > 0, tau_positive)
    loss_BT = -(4 / tau_B1) * torch.sigmoid(tau_B1 * (ratio_BT - 1)) * advantages_B1
    return loss_BT, torch.zeros_like(ratio_BT, dtype=torch.bool)


def policy_loss(
    kind: LossKind,
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    ratio: Level,
    clip_low: float,
    clip_high: float,
    delta: float,
    dual_clip: float,
    tau_positive: float,
    tau_negative: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_BT, ratio_BT, clipped_BT): each token's loss before importance weights and coefficients, the ratio before
    any clip, and where a clip acted. Values where the mask is 0 mean nothing.

    grpo, bnpo, dapo and dr_grpo share one loss and differ in ``token_coefficients``. A single update after sampling
    passes ``logprobs_BT.detach()`` as the old ones: the ratio is 1 and the gradient that of A x logprob.
    """
    ratio_BT = policy_ratio(logprobs_BT, old_logprobs_BT, mask_BT, ratio)
    advantages_B1 = advantages_B[:, None]
    if kind in ("grpo", "bnpo", "dapo", "dr_grpo"):
        loss_BT, clipped_BT = clipped_loss(ratio_BT, advantages_B1, clip_low, clip_high, delta, dual_clip)
    elif kind == "cispo":
        loss_BT, clipped_BT = cispo_loss(logprobs_BT, ratio_BT, advantages_B1, clip_high)
    elif kind == "sapo":
        loss_BT, clipped_BT = sapo_loss(ratio_BT, advantages_B1, tau_positive, tau_negative)
    else:
        raise ValueError(f"loss={kind!r} is not known; use one of {', '.join(get_args(LossKind))}")
    return loss_BT, ratio_BT, clipped_BT


def kl_BT(kind: KLKind, logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
    """Schulman's estimators of KL(policy || reference) at each token (joschu.net/blog/kl-approx.html).

    With log r = reference - policy: ``k1`` = -log r, ``k2`` = (log r)^2 / 2, ``k3`` = r - 1 - log r (GRPO, arXiv
    2402.03300 eq. 4). In expectation over the policy k1 and k3 are the KL; k2 is close to it for small differences.
    """
    log_r_BT = reference_logprobs_BT - logprobs_BT
    if kind == "k1":
        return -log_r_BT
    if kind == "k2":
        return log_r_BT.square() / 2
    if kind == "k3":
        return log_r_BT.exp() - 1 - log_r_BT
    raise ValueError(f"kl_estimator={kind!r} is not known; use k1, k2 or k3")


def kl_term(kind: KLKind, logprobs_BT: Tensor, reference_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """The KL as a loss: ``ratio_BT x kl_BT``, whose gradient is that of the KL without bias (at token level).

    ``kl_BT`` alone has the right value and the wrong gradient: k1's is 0 in expectation, k3's is that of the opposite
    KL, and all forget that the tokens came from the old policy. Multiplying by a differentiable ratio fixes it:
    DeepSeek-V3.2, arXiv 2512.02556, and TRL's default (``use_bias_correction_kl``). The gradient of k2 alone is
    already the right one, so its ratio only reweights the tokens.
    """
    weight_BT = ratio_BT.detach() if kind == "k2" else ratio_BT
    return weight_BT * kl_BT(kind, logprobs_BT, reference_logprobs_BT)


def importance_weights(
    logprobs_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    mask_BT: Tensor,
    mode: ImportanceMode,
    level: Level,
    cap: float,
) -> Tensor:
    """weights_BT = exp(learner - sampler), bounded by ``cap``: makes up for tokens drawn by a slightly other policy.

    ``logprobs_BT`` are the learner's under the weights that sampled, before any update on this batch. ``level``
    token: each token's own difference; sequence: the **sum** over the sequence, one weight for all of its tokens.
    ``mode`` truncate: larger weights become ``cap`` (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"); mask: they become 0 (Liu et al. 2025, "When speed kills stability"); off: all 1. The
    weights are constants: no gradient.
    """
    with torch.no_grad():
        if mode == "off":
            return torch.ones_like(logprobs_BT)
        difference_BT = torch.where(mask_BT > 0, logprobs_BT - sampler_logprobs_BT, 0)
        if level == "sequence":
            difference_BT = difference_BT.sum(-1, keepdim=True).expand_as(difference_BT)
        elif level != "token":
            raise ValueError(f"importance_level={level!r} is not known; use token or sequence")
        weights_BT = difference_BT.exp()
        if mode == "truncate":
            return weights_BT.clamp(max=cap)
        if mode == "mask":
            return torch.where(weights_BT > cap, 0, weights_BT)
        raise ValueError(f"importance={mode!r} is not known; use off, truncate or mask")


def total_loss(
    kind: LossKind,
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    coef_BT: Tensor,
    *,
    ratio: Level,
    clip_low: float,
    clip_high: float,
    delta: float,
    dual_clip: float,
    tau_positive: float,
    tau_negative: float,
    importance: ImportanceMode,
    importance_level: Level,
    importance_cap: float,
    reference_logprobs_BT: Tensor | None = None,
    kl_coef: float = 0,
    kl_estimator: KLKind = "k3",
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0,
    num_tokens: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats) of one micro-batch of whole sequences; both add up over the micro-batches of a step.

    loss = sum(coef x (importance x policy_loss + kl_coef x kl_term)) - entropy_coef x sum(entropy) / num_tokens

    ``coef_BT`` are this micro-batch's rows of ``token_coefficients``; ``num_tokens`` counts the whole step: as in TRL
    the entropy bonus (nats a token) is a mean over tokens whatever the loss, and the KL takes no importance weight.

    ``stats`` holds detached scalars for ``mean_stats``: ``loss``, ``tokens``, and over the tokens that count sums
    (``_sum``) of ratio, clipped, importance (weight), sampler_difference (|learner - sampler| log-prob), and kl (the
    plain estimate) and entropy where given; largest values (``_max``) of importance and sampler_difference.
    """
    kept_BT = mask_BT > 0  # garbage under the mask must not turn into nan (0 x inf), here or in the gradient
    logprobs_BT = torch.where(kept_BT, logprobs_BT, 0)
    old_BT = torch.where(kept_BT, old_logprobs_BT, 0)
    sampler_BT = torch.where(kept_BT, sampler_logprobs_BT, 0)
    loss_BT, ratio_BT, clipped_BT = policy_loss(
        kind, logprobs_BT, old_BT, advantages_B, mask_BT, ratio=ratio, clip_low=clip_low, clip_high=clip_high,
        delta=delta, dual_clip=dual_clip, tau_positive=tau_positive, tau_negative=tau_negative,
    )  # fmt: skip
    weights_BT = importance_weights(old_BT, sampler_BT, mask_BT, importance, importance_level, importance_cap)
    loss_BT = loss_BT * weights_BT
    each_BT = {
        "ratio": ratio_BT,
        "clipped": clipped_BT,
        "importance": weights_BT,
        "sampler_difference": (old_BT - sampler_BT).abs(),
    }
    if reference_logprobs_BT is not None:
        reference_BT = torch.where(kept_BT, reference_logprobs_BT.detach(), 0)
        loss_BT = loss_BT + kl_coef * kl_term(kl_estimator, logprobs_BT, reference_BT, ratio_BT)
        each_BT["kl"] = kl_BT(kl_estimator, logprobs_BT, reference_BT)
    loss = (loss_BT * coef_BT).sum()
    if entropy_BT is not None:
        entropy_BT = torch.where(kept_BT, entropy_BT, 0)
        loss = loss - entropy_coef * entropy_BT.sum() / max(num_tokens, 1)
        each_BT["entropy"] = entropy_BT
    assert kl_coef == 0 or "kl" in each_BT, f"{kl_coef=} needs reference_logprobs_BT"
    assert entropy_coef == 0 or "entropy" in each_BT, f"{entropy_coef=} needs entropy_BT"
    stats = {"loss": loss.detach(), "tokens": mask_BT.sum()}
    for name, value_BT in each_BT.items():
        masked_BT = value_BT.detach() * mask_BT
        stats[f"{name}_sum"] = masked_BT.sum()
        if name in ("importance", "sampler_difference"):
            stats[f"{name}_max"] = masked_BT.max() if masked_BT.numel() else masked_BT.sum()
    return loss, stats


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
