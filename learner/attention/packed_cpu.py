"""Attention over a packed sequence: a token sees itself and what comes before it in its own sequences.

Registered with transformers under the name ``packed``, so no model is touched; the pack's layout travels to every
layer as a keyword argument. On a CPU the pack is worked on in tiles: spans of neighbouring tokens, each against the
keys it may see, gathered and scattered with index tensors, because a dense mask over the pack would cost T x T; on a
GPU by ``learner/attention/packed_gpu.py``. Sliding windows and logit soft-capping are honoured; attention sinks and
learned biases are refused.

Shapes: T tokens, H query heads, J key heads, D head width; B spans of a tile, Z = B x J; Q queries and S keys of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.errors import UserError
from learner.attention import packed_gpu
from learner.batch.packing import Layout, Tile

NAME = "packed"


def register() -> None:
    """Registers the name with transformers. It has no mask function, so that no mask is made."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


@torch.compiler.disable
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
    if query.is_cuda:
        return packed_gpu.attend(query, key, value, layout, float(scale), sliding_window, softcap).transpose(1, 2), None
    # Tokens first: each is then one row to gather.
    query_THD, key_TJD, value_TJD = (states[0].transpose(0, 1) for states in (query, key, value))
    out_THD = _Tiled.apply(query_THD, key_TJD, value_TJD, layout, float(scale), sliding_window, softcap)
    return out_THD[None], None


class _Tiled(torch.autograd.Function):
    """Attention tile by tile, written out, and computed again in the backward pass so that no scores are kept (the
    idea of FlashAttention, arXiv 2205.14135). On a CPU this beats SDPA's backward pass several times."""

    @staticmethod
    def forward(
        ctx: Any, query_THD: torch.Tensor, key_TJD: torch.Tensor, value_TJD: torch.Tensor,
        layout: Layout, scale: float, window: int | None, softcap: float | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(query_THD, key_TJD, value_TJD)
        ctx.rest = (layout, scale, window, softcap)
        heads = key_TJD.shape[1]
        outputs = []
        for tile in layout.tiles:
            query_ZQD, key_ZSD = _rows(query_THD, tile.query_BQ, heads), _rows(key_TJD, tile.key_BS, heads)
            weights_ZQS, _ = _weights(query_ZQD, key_ZSD, _bias(layout, tile, window), scale, softcap)
            out_ZQD = weights_ZQS.to(value_TJD.dtype) @ _rows(value_TJD, tile.key_BS, heads)
            outputs.append(_tokens(out_ZQD, tile.query_BQ))
        return torch.cat(outputs).index_select(0, layout.tiled_T).view_as(query_THD)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query_THD, key_TJD, value_TJD = ctx.saved_tensors
        layout, scale, window, softcap = ctx.rest
        T, heads, width = key_TJD.shape
        sums_TE = torch.zeros(T, heads * 2 * width, dtype=torch.float32, device=key_TJD.device)
        query_grads = []
        for tile in layout.tiles:
            query_ZQD, key_ZSD = _rows(query_THD, tile.query_BQ, heads), _rows(key_TJD, tile.key_BS, heads)
            out_ZQD = _rows(gradients[0], tile.query_BQ, heads, tile.query_valid_BQ)
            weights_ZQS, slope_ZQS = _weights(query_ZQD, key_ZSD, _bias(layout, tile, window), scale, softcap)
            value_ZSD = weights_ZQS.to(out_ZQD.dtype).transpose(1, 2) @ out_ZQD
            grad_ZQS = (out_ZQD @ _rows(value_TJD, tile.key_BS, heads).transpose(1, 2)).to(weights_ZQS.dtype)
            grad_ZQS = torch._softmax_backward_data(grad_ZQS, weights_ZQS, -1, weights_ZQS.dtype)
            if slope_ZQS is not None:
                grad_ZQS *= slope_ZQS
            scores_ZQS = grad_ZQS.mul_(scale).to(out_ZQD.dtype)
            query_grads.append(_tokens(scores_ZQS @ key_ZSD, tile.query_BQ))
            both_ZSE = torch.cat([scores_ZQS.transpose(1, 2) @ query_ZQD, value_ZSD], dim=-1)
            # Only the expanded form of the index is quick: it adds whole rows.
            sums_TE.scatter_add_(
                0, tile.key_BS.flatten()[:, None].expand(-1, sums_TE.shape[1]), _tokens(both_ZSE, tile.key_BS).float()
            )
        query = torch.cat(query_grads).index_select(0, layout.tiled_T).view_as(query_THD)
        key, value = sums_TE.view(T, heads, 2, width).to(key_TJD.dtype).unbind(2)
        return query, key, value, None, None, None, None


def _rows(states_TXD: torch.Tensor, index_BN: torch.Tensor, heads: int, valid_BN: Any = None) -> torch.Tensor:
    """These tokens' states for each key head, [Z, (X / J) x N, D] with Z = B x J; 0 where not valid."""
    (B, N), (_, X, D) = index_BN.shape, states_TXD.shape
    states = states_TXD.reshape(len(states_TXD), X * D).index_select(0, index_BN.flatten())
    if valid_BN is not None:
        states = states * valid_BN.view(-1, 1)
    return states.view(B, N, heads, X // heads, D).permute(0, 2, 3, 1, 4).reshape(B * heads, X // heads * N, D)


def _tokens(states_ZRD: torch.Tensor, index_BN: torch.Tensor) -> torch.Tensor:
    """Undo of ``_rows``: a row for each token, [B x N, X x D]."""
    (B, N), D = index_BN.shape, states_ZRD.shape[-1]
    return states_ZRD.view(B, -1, N, D).transpose(1, 2).reshape(B * N, -1)


def _bias(layout: Layout, tile: Tile, window: int | None) -> torch.Tensor:
    """Added to attention scores, float32 [B, Q, S]: 0 where a key is real, not after the query, and less than
    ``window`` before it; very negative elsewhere."""

    def make() -> torch.Tensor:
        behind_BQS = tile.query_at_BQ[:, :, None] - tile.key_at_BS[:, None, :]
        seen_BQS = (behind_BQS >= 0) & tile.key_valid_BS[:, None, :]
        if window is not None:
            seen_BQS &= behind_BQS < window
        return torch.zeros(seen_BQS.shape, device=seen_BQS.device).masked_fill_(~seen_BQS, -1e30)

    return layout.once((tile, window), make)


def _weights(
    query_ZQD: torch.Tensor, key_ZSD: torch.Tensor, bias_BQS: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmaxed scores, float32; and with soft-capping its slope at each of them."""
    scores_ZQS = query_ZQD @ key_ZSD.transpose(1, 2)
    slope_ZQS = None
    if softcap is not None:
        scores_ZQS = torch.tanh(scores_ZQS.float() * (scale / softcap))
        slope_ZQS, scale = 1 - scores_ZQS.square(), softcap
    B, Q, S = bias_BQS.shape
    # In one pass: out of the products' format, scaled, and masked.
    biased = torch.add(bias_BQS[:, None], scores_ZQS.view(B, -1, Q, S), alpha=scale)
    return biased.softmax(-1).view_as(scores_ZQS), slope_ZQS
