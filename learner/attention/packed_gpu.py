"""Attention over a packed sequence on a GPU: the same meaning as ``learner/attention/packed_cpu.py``, by kernels made
for it.

Two of them, behind ``attend``:

- ``by_varlen``: variable-length flash attention. The pack, as it lies, is a row of runs (the tokens of a sequence that
  no earlier one has); each is the queries of one sequence, whose keys are the whole of it. Flash attention lines up
  the last query with the last key, so causality and window come out right in one call. Its keys are copies: a
  prompt's as often as runs go on from it.
- ``by_flex``: PyTorch's flex_attention (arXiv 2412.05496) under a block mask; copies nothing, any number format.

``choose`` says which. flash-attn is used where it is installed and needed by nothing. Left out: attention sinks and
biases, refused by ``learner/attention/packed_cpu.py``, which calls this for tensors on a GPU. Tests compare the mask,
the spans and the results with the CPU path; **the kernels themselves have not yet run on a GPU**, where
``packing_support.probe`` compares their log-probs with the padded ones before the first step.

Shapes: T tokens of the pack, H query heads, J key heads, D head width, N spans, S keys of all spans; the rest as in
``learner/batch/packing.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from learner.batch.packing import Layout

BLOCK = 128  # tokens: flex_attention's own; packs are filled up to a multiple, so that few shapes are compiled
REPEATED = 3  # times the pack's tokens that copied keys may be, beyond which flex_attention's none are cheaper
WIDEST = 256  # head width that flash attention takes
KINDS = 64  # of calls that flex_attention is compiled for: with a window, with a gradient, in one block; torch's is 8

Varlen = Callable[..., torch.Tensor]
"""``(query_THD, key_SJD, value_SJD, spans, scaling, window, softcap)`` to [T, H, D]."""


@dataclass(frozen=True)
class Spans:
    """A pack as variable-length sequences, in the pack's own order."""

    query_ends: torch.Tensor
    """Where each one's queries begin, and T: int32 [N + 1]."""
    key_ends: torch.Tensor
    """Where each one's keys begin, and S: int32 [N + 1]."""
    most_queries: int
    most_keys: int
    key_S: torch.Tensor
    """The token of the pack that is each key."""
    order_S: torch.Tensor
    """Puts the copies of each token side by side."""
    copies_T: torch.Tensor
    """How many each has."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout,
    scaling: float, sliding_window: int | None = None, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """query [1, H, T, D], key and value [1, J, T, D], in the pack's order, to [1, H, T, D]. Differentiable."""
    if choose(query, value, layout, softcap):
        return by_varlen(query, key, value, layout, scaling, sliding_window, softcap, _kernel())
    return by_flex(query, key, value, layout, scaling, sliding_window, softcap)


def choose(query: torch.Tensor, value: torch.Tensor, layout: Layout, softcap: float | None) -> bool:
    """Whether flash attention is taken: 16-bit tensors, heads it can hold, soft-capping only with flash-attn itself
    (torch's own has none), and copies of keys of at most ``REPEATED`` times the pack (long prompts of large groups
    go to flex_attention)."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= WIDEST
        and query.shape[-1] % 8 == 0
        and (softcap is None or _flash_installed())
        and len(spans_of(layout).key_S) <= REPEATED * query.shape[2]
    )


# -- variable-length flash attention ---------------------------------------------------------------------------------


def by_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout,
    scaling: float, sliding_window: int | None, softcap: float | None, kernel: Varlen,
) -> torch.Tensor:  # fmt: skip
    """``attend`` by a variable-length kernel."""
    spans = spans_of(layout)
    query_THD, key_TJD, value_TJD = (states[0].transpose(0, 1) for states in (query, key, value))
    key_SJD, value_SJD = (_Copies.apply(states, spans) for states in (key_TJD, value_TJD))
    out_THD = kernel(query_THD.contiguous(), key_SJD, value_SJD, spans, scaling, sliding_window, softcap)
    return out_THD.transpose(0, 1)[None]


def spans_of(layout: Layout) -> Spans:
    """Made once for a pack and kept as long as its layout is."""
    return _once(layout, "spans", lambda: _spans(layout))


def _spans(layout: Layout) -> Spans:
    return Spans(
        query_ends=layout.run_ends,
        key_ends=layout.key_ends,
        most_queries=int(layout.run_ends.diff().max()),
        most_keys=int(layout.key_ends.diff().max()),
        key_S=layout.key_S,
        order_S=torch.argsort(layout.key_S, stable=True),
        copies_T=torch.bincount(layout.key_S, minlength=len(layout.position_T)),
    )


class _Copies(torch.autograd.Function):
    """States [T, J, D] to keys of all spans [S, J, D]. The way back adds each token's copies in float32 and always in
    the same order, which autograd's scatter-add on a GPU does not."""

    @staticmethod
    def forward(ctx: Any, states_TJD: torch.Tensor, spans: Spans) -> torch.Tensor:
        ctx.spans = spans
        return states_TJD.index_select(0, spans.key_S)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        sorted_SJD = gradients[0].index_select(0, ctx.spans.order_S).float()
        summed = torch.segment_reduce(sorted_SJD, "sum", lengths=ctx.spans.copies_T, axis=0)
        return summed.to(gradients[0].dtype), None


@functools.cache
def _flash_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _kernel() -> Varlen:
    return _flash_attn if _flash_installed() else _torch_varlen


def _flash_attn(
    query_THD: torch.Tensor, key_SJD: torch.Tensor, value_SJD: torch.Tensor, spans: Spans,
    scaling: float, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query_THD, key_SJD, value_SJD, spans.query_ends, spans.key_ends, spans.most_queries, spans.most_keys,
        softmax_scale=scaling, causal=True, window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0,
    )  # fmt: skip


def _torch_varlen(
    query_THD: torch.Tensor, key_SJD: torch.Tensor, value_SJD: torch.Tensor, spans: Spans,
    scaling: float, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    assert softcap is None, "torch's variable-length attention caps nothing"
    grouped: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # before torch 2.12: a head of keys for each
        times = query_THD.shape[1] // key_SJD.shape[1]
        key_SJD, value_SJD = (states.repeat_interleave(times, dim=1) for states in (key_SJD, value_SJD))
        grouped = {}
    out: Any = varlen_attn(
        query_THD, key_SJD, value_SJD, spans.query_ends, spans.key_ends, spans.most_queries, spans.most_keys,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    return out


# -- flex_attention --------------------------------------------------------------------------------------------------


def by_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout,
    scaling: float, sliding_window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """``attend`` by flex_attention: compiled on a GPU, PyTorch's slow reference of it (forward only) on a CPU."""
    T = query.shape[2]
    mask = _once(layout, ("mask", sliding_window), lambda: _block_mask(layout, T, sliding_window))
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
    # The whole graph or an error: where torch gives up compiling again for another kind of pack, it would go on with
    # its reference without a word, and all scores of the pack would exist at once.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    return torch.compile(flex_attention, fullgraph=True)


@functools.cache  # the same function again, or the compiled kernel would be made again
def _capped(softcap: float | None) -> Callable[..., torch.Tensor] | None:
    if softcap is None:
        return None
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


def seen(layout: Layout, tokens: int, window: int | None) -> Callable[..., torch.Tensor]:
    """flex_attention's mask function: does query ``q`` see key ``k``? ``tokens`` is T or more; what fills up the pack
    sees itself alone, so that no row is empty."""
    # Who sees a token begins with itself and lies together: see ``Layout.seen_T``.
    blank = torch.arange(len(layout.position_T), tokens, device=layout.position_T.device)
    seen_T, position_T = torch.cat([layout.seen_T, blank + 1]), torch.cat([layout.position_T, blank])

    def sees(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mine = (k <= q) & (q < seen_T[k])
        return mine if window is None else mine & (position_T[q] - position_T[k] < window)

    return sees


def _block_mask(layout: Layout, T: int, window: int | None) -> BlockMask:
    tokens = -(-T // BLOCK) * BLOCK
    return create_block_mask(
        seen(layout, tokens, window), None, None, tokens, tokens, device=layout.position_T.device, BLOCK_SIZE=BLOCK
    )


_MADE: weakref.WeakKeyDictionary[Layout, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _once(layout: Layout, name: Any, make: Callable[[], Any]) -> Any:
    """What was made of this layout before; it goes when the layout goes."""
    made = _MADE.setdefault(layout, {})
    if name not in made:
        made[name] = make()
    return made[name]
