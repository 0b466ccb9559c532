"""What a sampler does to logits before it draws, as one pure function; the truth that every back end is held to.

Used by the hf sampler to draw, by the learner to score under the same distribution, and by the sampler contract.
"""

from __future__ import annotations

import torch


def process(logits_NV: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> torch.Tensor:
    """Logits of the distribution drawn from, float32 [N, V]: divided by the temperature, then tokens outside the
    top-k, then outside the smallest set holding ``top_p``, at -inf. The same order and ties rule as vLLM's: a token
    equal to the k-th likeliest stays; the likeliest token always stays."""
    logits_NV = logits_NV.float() / temperature
    if 0 < top_k < logits_NV.shape[-1]:
        kth_N1 = logits_NV.topk(top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth_N1, -torch.inf)
    if top_p < 1:
        ascending_NV, order_NV = logits_NV.sort(dim=-1)
        below_NV = ascending_NV.softmax(-1).cumsum(-1) <= 1 - top_p
        below_NV[:, -1] = False
        outside_NV = torch.zeros_like(below_NV).scatter(-1, order_NV, below_NV)
        logits_NV = logits_NV.masked_fill(outside_NV, -torch.inf)
    return logits_NV


def logprobs_of(logits_NV: torch.Tensor, token_ids_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of one token in each row, float32 [N]."""
    logits_NV = logits_NV.float()
    chosen_N = logits_NV.gather(-1, token_ids_N[:, None])[:, 0]
    return chosen_N - logits_NV.logsumexp(-1)
