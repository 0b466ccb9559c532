"""Attention over a packed sequence: a prompt sees itself, a completion sees its prompt and itself, causally.

Registered with transformers under the name ``packed``, so no model is touched; the pack's layout travels to every
layer as a keyword argument. Two parts: the prompts among themselves, then every completion against
``[its prompt, itself]``; tokens are gathered to padded blocks and scattered back with index tensors, because a dense
mask over the pack would cost T x T. Sliding windows and logit soft-capping are honoured; attention sinks and learned
biases are refused.

Shapes: T tokens, H query heads, J key heads (H = J x R), D head width; the rest as in ``learner/packing.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from learner.packing import Layout

NAME = "packed"
FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "olmo2", "granite", "gemma2", "gemma3_text"}
)
"""``model_type``s whose packed log-probs and gradients are tested equal to the padded ones."""


SHORT = 384
"""Tokens of a prompt up to which writing attention out beats SDPA's backward pass (measured on a CPU in bfloat16)."""


def register() -> None:
    """Makes the name known to transformers. No mask function goes with it: none is made then."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, J, T, D] to output [1, T, H, D]."""
    assert layout is not None, "packed attention was called without a layout"
    assert attention_mask is None and dropout == 0.0, (attention_mask, dropout)
    if others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise UserError(
            "learner.packing='packed' does not know attention sinks or biases; use learner.packing='padded'"
        )
    query_THD, key_TJD, value_TJD = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = query.shape[1]
    extras = (scale, sliding_window, softcap)

    prompt_query, prompt_key, prompt_value = (
        _gather(states, layout.prompt_GP).transpose(1, 2) for states in (query_THD, key_TJD, value_TJD)
    )
    longest = layout.prompt_GP.shape[1]
    if longest > SHORT and softcap is None and (sliding_window is None or longest <= sliding_window):
        # Padding stands behind every real token of its row, so causality alone hides it.
        prompt_out = F.scaled_dot_product_attention(
            prompt_query, prompt_key, prompt_value, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        at_GP = layout.position_GP
        prompt_out = _attend(prompt_query, prompt_key, prompt_value, at_GP, at_GP, layout.prompt_valid_GP, *extras)
    outputs = [prompt_out.transpose(1, 2).reshape(-1, heads, query.shape[-1])]

    if len(layout.group_C):
        own_query, own_key, own_value = (
            _gather(states, layout.own_CN).transpose(1, 2) for states in (query_THD, key_TJD, value_TJD)
        )
        own_out = _attend(
            own_query,
            torch.cat([prompt_key.index_select(0, layout.group_C), own_key], dim=2),
            torch.cat([prompt_value.index_select(0, layout.group_C), own_value], dim=2),
            layout.position_CN,
            torch.cat([layout.position_GP[layout.group_C], layout.position_CN], dim=1),
            torch.cat([layout.prompt_valid_GP[layout.group_C], layout.own_valid_CN], dim=1),
            *extras,
        )
        outputs.append(own_out.transpose(1, 2).reshape(-1, heads, query.shape[-1]))
    return torch.cat(outputs).index_select(0, layout.back_T)[None], None


def _gather(states_TXD: torch.Tensor, index_BS: torch.Tensor) -> torch.Tensor:
    """``states[index]``; index_select, because its backward pass is several times faster on a CPU."""
    return states_TXD.index_select(0, index_BS.flatten()).view(*index_BS.shape, *states_TXD.shape[1:])


def _attend(
    query_BHQD: torch.Tensor,
    key_BJSD: torch.Tensor,
    value_BJSD: torch.Tensor,
    query_at_BQ: torch.Tensor,
    key_at_BS: torch.Tensor,
    key_valid_BS: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention by positions, written out: on a CPU its backward pass is several times faster than SDPA's with a
    mask. A key is seen when it is real, not after the query, and less than ``window`` before it."""
    B, H, Q, D = query_BHQD.shape
    J = key_BJSD.shape[1]
    behind_BQS = query_at_BQ[:, :, None] - key_at_BS[:, None, :]
    seen_BQS = (behind_BQS >= 0) & key_valid_BS[:, None, :]
    if window is not None:
        seen_BQS &= behind_BQS < window
    mask_BQS = torch.zeros(seen_BQS.shape, device=query_BHQD.device).masked_fill_(~seen_BQS, -1e30)
    query_BJXD = query_BHQD.reshape(B, J, (H // J) * Q, D)
    scores = (query_BJXD @ key_BJSD.transpose(2, 3)).float().mul_(scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(B, J, H // J, Q, -1) + mask_BQS[:, None, None]
    weights = scores.softmax(-1).to(value_BJSD.dtype)
    return (weights.view(B, J, (H // J) * Q, -1) @ value_BJSD).reshape(B, H, Q, D)
