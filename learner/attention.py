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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_blocks, key_blocks, value_blocks = (
        _Blocks.apply(states[0].transpose(0, 1), layout) for states in (query, key, value)
    )
    prompt_query, prompt_key, prompt_value = (
        blocks[0].transpose(1, 2) for blocks in (query_blocks, key_blocks, value_blocks)
    )
    longest = layout.prompt_GP.shape[1]
    if longest > SHORT and softcap is None and (sliding_window is None or longest <= sliding_window):
        # Padding stands behind every real token of its row, so causality alone hides it.
        prompt_out = F.scaled_dot_product_attention(
            prompt_query, prompt_key, prompt_value, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        bias_GPP = layout.prompt_bias(sliding_window)
        prompt_out = _attend(prompt_query, prompt_key, prompt_value, bias_GPP, scale, softcap)

    own_query, own_key, own_value = (blocks[1].transpose(1, 2) for blocks in (query_blocks, key_blocks, value_blocks))
    own_out = _attend(
        own_query,
        torch.cat([_Repeat.apply(prompt_key, layout.group_C), own_key], dim=2),
        torch.cat([_Repeat.apply(prompt_value, layout.group_C), own_value], dim=2),
        layout.own_bias(sliding_window),
        scale,
        softcap,
    )
    return _Sequence.apply(prompt_out.transpose(1, 2), own_out.transpose(1, 2), layout)[None], None


def _attend(
    query_BHQD: torch.Tensor,
    key_BJSD: torch.Tensor,
    value_BJSD: torch.Tensor,
    bias_BQS: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention written out, its softmax in float32: on a CPU its backward pass is several times faster than SDPA's
    with a mask. ``bias`` is 0 where a key is seen and very negative elsewhere."""
    B, H, Q, D = query_BHQD.shape
    J, S = key_BJSD.shape[1:3]
    scores = query_BHQD.reshape(B, J, (H // J) * Q, D) @ key_BJSD.transpose(2, 3)
    if softcap is not None:
        scores, scale = torch.tanh(scores.float() * (scale / softcap)), softcap
    scores = torch.add(bias_BQS[:, None, None], scores.view(B, J, H // J, Q, S), alpha=scale)
    weights = scores.softmax(-1).to(value_BJSD.dtype)
    return (weights.view(B, J, (H // J) * Q, S) @ value_BJSD).reshape(B, H, Q, D)


# Every token stands in exactly one block, so the gradient of a gather is again a gather. Autograd does not know that
# and would scatter-add, which took a fifth of the step.


class _Blocks(torch.autograd.Function):
    """States [T, X, D] to prompt blocks [G, P, X, D] and completion blocks [C, N, X, D]; padding repeats token 0."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.layout = layout
        return _gather(states, layout.prompt_GP), _gather(states, layout.own_CN)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # What reaches padding is zero: a hidden key gets no weight, and nobody reads a padding query's output.
        prompt, own = gradients
        return torch.cat([prompt.flatten(0, 1), own.flatten(0, 1)]).index_select(0, ctx.layout.back_T), None


class _Sequence(torch.autograd.Function):
    """The way back: blocks to states [T, X, D], padding left out."""

    @staticmethod
    def forward(ctx: Any, prompt: torch.Tensor, own: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return torch.cat([prompt.flatten(0, 1), own.flatten(0, 1)]).index_select(0, layout.back_T)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        layout, (gradient,) = ctx.layout, gradients
        prompt = _gather(gradient, layout.prompt_GP).masked_fill_(~layout.prompt_valid_GP[..., None, None], 0)
        own = _gather(gradient, layout.own_CN).masked_fill_(~layout.own_valid_CN[..., None, None], 0)
        return prompt, own, None


class _Repeat(torch.autograd.Function):
    """A prompt's block once for each of its completions: [G, J, P, D] to [C, J, P, D]."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group_C: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(group_C)
        ctx.groups = len(blocks)
        return blocks.index_select(0, group_C)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (group_C,), (gradient,) = ctx.saved_tensors, gradients
        summed = gradient.new_zeros((ctx.groups, *gradient.shape[1:]), dtype=torch.float32)
        return summed.index_add_(0, group_C, gradient.float()).to(gradient.dtype), None


def _gather(states_TXD: torch.Tensor, index_BS: torch.Tensor) -> torch.Tensor:
    return states_TXD.index_select(0, index_BS.flatten()).view(*index_BS.shape, *states_TXD.shape[1:])
