"""Log-probabilities of completion tokens, without ever holding logits for [tokens, vocabulary].

Only positions that predict a completion token reach the output head, a chunk at a time; the backward pass recomputes
each chunk. Temperature, top-p and top-k are applied as the sampler applied them, so both sides speak of one
distribution. Used by ``learner/learner.py`` for training and for the sync's probe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.logits import process
from learner.attention import FAMILIES, NAME
from learner.packing import Pack

CHUNK = 512  # predicted tokens whose logits exist at once: 100 MB in float32 for a vocabulary of 50 000


def can_pack(model: Any) -> bool:
    """Whether this model's packed pass is known to equal its padded one."""
    return bool(_causal(model).config.model_type in FAMILIES)


def score(
    model: Any, pack: Pack, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [K] in nats, float32, of the pack's predicted tokens.

    Differentiable where gradients are on; the entropies only when ``entropy``, else they are for the log.
    """
    causal = _causal(model)
    hidden_KD = _hidden(causal, pack)
    head = causal.get_output_embeddings()
    logprobs, entropies = [], []
    for start in range(0, len(hidden_KD), CHUNK):
        part = slice(start, start + CHUNK)
        one = checkpoint(
            _head_chunk, hidden_KD[part], pack.target_K[part], head, causal.config, temperature, top_p, top_k, entropy,
            use_reentrant=False,
        )  # fmt: skip
        logprobs.append(one[0])
        entropies.append(one[1])
    return torch.cat(logprobs), torch.cat(entropies)


def plain_attention(config: Any) -> str:
    """transformers' own attention for the padded path: SDPA, but it would leave Gemma 2's soft-capping out without a
    word."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def _causal(model: Any) -> Any:
    """The causal language model under a possible adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _hidden(causal: Any, pack: Pack) -> torch.Tensor:
    """Hidden states [K, D] before the output head. The attention's name is set on the shared configuration at each
    call, and stays for the backward pass, which may recompute layers."""
    causal.config._attn_implementation = NAME if pack.layout is not None else plain_attention(causal.config)
    extra: dict[str, Any] = {"layout": pack.layout} if pack.layout is not None else {}
    output = causal.get_decoder()(
        input_ids=pack.token_ids,
        attention_mask=pack.attention_mask,
        position_ids=pack.position_ids,
        use_cache=False,
        **extra,
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, pack.predict_K)


def _head_chunk(
    hidden_KD: torch.Tensor, target_K: torch.Tensor, head: nn.Module, config: Any,
    temperature: float, top_p: float, top_k: int, entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    logits_KV = head(hidden_KD)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:  # Gemma 2
        logits_KV = torch.tanh(logits_KV / cap) * cap
    if getattr(config, "logits_scaling", None):  # Granite
        logits_KV = logits_KV / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits_KV = logits_KV * config.logit_scale
    # The learner's own top-p set can miss a token that the sampler's just held; its log-prob would be -inf.
    kept_KV = process(logits_KV, temperature, top_p, top_k)
    if top_p < 1 or top_k > 0:
        scaled_KV = logits_KV.float() / temperature
        drawn_KV = torch.zeros_like(kept_KV, dtype=torch.bool).scatter_(1, target_K[:, None], True)
        kept_KV = torch.where(drawn_KV, scaled_KV, kept_KV)
    log_total_K = kept_KV.logsumexp(-1)
    logprob_K = kept_KV.gather(1, target_K[:, None])[:, 0] - log_total_K
    with torch.set_grad_enabled(entropy and torch.is_grad_enabled()):
        # H = log Z - E[logit]; tokens outside the kept set have probability 0 and must not give 0 x inf.
        weighted_KV = (kept_KV - log_total_K[:, None]).exp() * kept_KV.clamp_min(-1e30)
        entropy_K = log_total_K - weighted_KV.sum(-1)
    return logprob_K, entropy_K
