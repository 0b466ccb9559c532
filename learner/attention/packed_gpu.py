"""Attention over a packed sequence on a GPU, by PyTorch's flex_attention (arXiv 2412.05496) under a block mask: no keys
are copied, and any number format will do.

The same meaning as ``learner/attention/packed_cpu.py``, which calls this for tensors on a GPU and refuses attention
sinks and biases. Tests compare the mask and PyTorch's reference with the CPU path; **the compiled kernel has not yet
run on a GPU**, where ``packing_support.probe`` compares its log-probs with the padded ones before the first step.

Shapes: T tokens of the pack, H query heads, J key heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from learner.batch.packing import Layout

BLOCK = 128  # tokens: flex_attention's own; packs are filled up to a multiple, so that few shapes are compiled
KINDS = 64  # of calls that flex_attention is compiled for: with a window, with a gradient, in one block; torch's is 8


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout,
    scaling: float, sliding_window: int | None = None, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """query [1, H, T, D], key and value [1, J, T, D], in the pack's order, to [1, H, T, D]. Differentiable on a GPU; on
    a CPU it is PyTorch's slow reference, forward only."""
    T = query.shape[2]
    mask = layout.once(("mask", sliding_window), lambda: block_mask(layout, T, sliding_window))
    blank = mask.shape[-1] - T
    query, key, value = (F.pad(states, (0, 0, 0, blank)) for states in (query, key, value))
    call = _compiled() if query.is_cuda else flex_attention
    out = call(
        query, key, value, score_mod=_capped(softcap), block_mask=mask, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[:, :, :T]


@functools.cache
def _compiled() -> Any:
    # The whole graph or an error: where torch stops recompiling for another kind of pack, it would silently run its
    # reference, and all scores of the pack would exist at once.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    return torch.compile(flex_attention, fullgraph=True)


@functools.cache  # the same function again, or the kernel would be compiled again
def _capped(softcap: float | None) -> Callable[..., torch.Tensor] | None:
    if softcap is None:
        return None
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


def seen(layout: Layout, tokens: int, window: int | None) -> Callable[..., torch.Tensor]:
    """flex_attention's mask function: does query ``q`` see key ``k``? ``tokens`` is T or more; what fills up the pack
    sees itself alone, so that no row is empty."""
    blank = torch.arange(len(layout.position_T), tokens, device=layout.position_T.device)
    seen_T, position_T = torch.cat([layout.seen_T, blank + 1]), torch.cat([layout.position_T, blank])

    def sees(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        in_sequence = (k <= q) & (q < seen_T[k])
        return in_sequence if window is None else in_sequence & (position_T[q] - position_T[k] < window)

    return sees


def block_mask(layout: Layout, T: int, window: int | None) -> BlockMask:
    tokens = -(-T // BLOCK) * BLOCK
    return create_block_mask(
        seen(layout, tokens, window), None, None, tokens, tokens, device=layout.position_T.device, BLOCK_SIZE=BLOCK
    )
