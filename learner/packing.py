"""Groups into forward passes: packed, where each prompt stands once for all its completions, or padded.

A pack lays groups end to end in one sequence, ``[prompt, completion 1, ..., completion G, next prompt, ...]``, with
positions restarting after each prompt, so the linear layers see no padding and no prompt twice. The last token of a
completion predicts nothing and is left out. Which token may see which is ``learner/attention.py``'s work, from the
index tensors made here. The idea of computing a shared prefix once is Hydragen's (arXiv 2402.05099); the padded
batch is the slow truth it is tested against, and the path for models that cannot be packed.

Shapes: T tokens of a pack, G prompts in it, P longest prompt, C completions with inputs, N longest of those,
K predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

TILE_ROWS = 128
"""Tokens of a stretch that attend together: fewer would waste less on keys they do not see yet, but cost more calls."""
TILE = 1 << 18
"""Scores of a tile for each head: few enough that a CPU's cache holds them."""


@dataclass(frozen=True)
class Row:
    """One sequence to score: a completion under its prompt."""

    index: int
    """Its row in the batch's [B, T] tensors."""
    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Stretch:
    """Rows that share a prompt."""

    prompt: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(row.completion) - 1 for row in self.rows)


@dataclass(frozen=True)
class Pack:
    """One forward pass. ``token_ids`` is [1, T] when packed and [rows, longest] when padded."""

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    """Padded only: 1 on real tokens."""
    layout: Layout | None
    """Packed only: which token may see which."""
    predict_K: torch.Tensor
    """Position, in the flattened ``token_ids``, whose output predicts each completion token."""
    target_K: torch.Tensor
    """That token."""
    row_K: torch.Tensor
    """Its row in the batch."""
    column_K: torch.Tensor
    """Its place in the completion."""
    prompt_tokens: int
    """Prompt tokens in it, counted as often as they are computed."""

    def to(self, device: str) -> Pack:
        """This pack there; itself where it is there already, with what was made for all of its layers."""
        here, there = self.token_ids.device, torch.device(device)
        same = here.type == there.type and there.index in (None, here.index)
        return self if same else _to(self, device)

    def forget(self) -> None:
        """Drops what was made for all layers of a pass: for all packs of a step together it can be gigabytes."""
        for tile in self.layout.tiles if self.layout else ():
            tile._bias.clear()


@dataclass(frozen=True, eq=False)
class Tile:
    """B stretches of at most Q neighbouring tokens that attend together, and the S keys that each may see: those of
    its prompt and its own up to the last query. Padding points at token 0 and is masked."""

    query_BQ: torch.Tensor
    query_valid_BQ: torch.Tensor
    key_BS: torch.Tensor
    key_valid_BS: torch.Tensor
    query_at_BQ: torch.Tensor
    """Positions."""
    key_at_BS: torch.Tensor
    _bias: dict[int | None, torch.Tensor] = field(default_factory=dict, init=False)

    def bias(self, window: int | None) -> torch.Tensor:
        """Added to attention scores, float32 [B, Q, S]; made once for all layers."""
        if window not in self._bias:
            self._bias[window] = _bias(self.query_at_BQ, self.key_at_BS, self.key_valid_BS, window)
        return self._bias[window]


@dataclass(frozen=True, eq=False)
class Layout:
    """Index tensors of a packed sequence. Padding points at token 0 and is masked."""

    tiles: tuple[Tile, ...]
    """Every token is a query of exactly one of them."""
    tiled_T: torch.Tensor
    """Where each token lies in the tiles' queries, laid end to end."""

    prompt_GP: torch.Tensor
    prompt_valid_GP: torch.Tensor
    own_CN: torch.Tensor
    own_valid_CN: torch.Tensor
    group_C: torch.Tensor
    """The prompt of each completion."""
    position_GP: torch.Tensor
    position_CN: torch.Tensor


def _bias(
    query_at_BQ: torch.Tensor, key_at_BS: torch.Tensor, key_valid_BS: torch.Tensor, window: int | None
) -> torch.Tensor:
    """0 where a key is real, not after the query, and less than ``window`` before it; very negative elsewhere."""
    behind_BQS = query_at_BQ[:, :, None] - key_at_BS[:, None, :]
    seen_BQS = (behind_BQS >= 0) & key_valid_BS[:, None, :]
    if window is not None:
        seen_BQS &= behind_BQS < window
    return torch.zeros(seen_BQS.shape, device=seen_BQS.device).masked_fill_(~seen_BQS, -1e30)


def _to(value: Any, device: str) -> Any:
    moved = {}
    for each in (each for each in fields(value) if each.init):
        part = getattr(value, each.name)
        if isinstance(part, Layout):
            moved[each.name] = _to(part, device)
        elif isinstance(part, tuple):
            moved[each.name] = tuple(_to(one, device) for one in part)
        elif isinstance(part, torch.Tensor):
            moved[each.name] = part.to(device)
    return replace(value, **moved)


def stretches(rows: Iterable[Row]) -> list[Stretch]:
    """Neighbouring rows with the same prompt, together; rows without tokens are left out."""
    found: list[Stretch] = []
    for row in rows:
        if not row.completion:
            continue
        if found and found[-1].prompt == row.prompt:
            found[-1] = Stretch(row.prompt, (*found[-1].rows, row))
        else:
            found.append(Stretch(row.prompt, (row,)))
    return found


def plan(rows: Sequence[Row], budget_tokens: int, packed: bool) -> list[Pack]:
    """The forward passes for these rows, each at most ``budget_tokens`` tokens and about even in work.

    A group that is too long alone is split, its prompt repeated; a single longer sequence goes alone.
    """
    if not packed:
        return [_padded(chunk) for chunk in _padded_chunks([r for r in rows if r.completion], budget_tokens)]
    parts = [part for whole in stretches(rows) for part in _split(whole, budget_tokens)]
    count = -(-sum(part.tokens for part in parts) // budget_tokens)
    while True:
        bins = _even_bins(parts, count)
        if count >= len(parts) or all(sum(p.tokens for p in one) <= budget_tokens for one in bins):
            return [_packed(one) for one in bins if one]
        count += 1


def share(rows: Sequence[Row], ranks: int, packed: bool) -> list[list[Row]]:
    """Each rank's rows, about even in tokens to compute, whole groups so that each prompt is computed once.

    With fewer groups than ranks the costliest are cut in two; with fewer rows some ranks get none.
    """

    def cost(part: Stretch) -> int:
        return part.tokens if packed else part.tokens + len(part.prompt) * (len(part.rows) - 1)

    parts = stretches(rows)
    while len(parts) < ranks and any(len(part.rows) > 1 for part in parts):
        widest = max((part for part in parts if len(part.rows) > 1), key=cost)
        by_length = sorted(widest.rows, key=lambda row: len(row.completion))
        parts.remove(widest)
        parts += [Stretch(widest.prompt, tuple(by_length[::2])), Stretch(widest.prompt, tuple(by_length[1::2]))]
    bins = _even_bins(parts, ranks, cost)
    return [sorted((row for part in one for row in part.rows), key=lambda row: row.index) for one in bins]


def _split(stretch: Stretch, budget: int) -> list[Stretch]:
    parts: list[list[Row]] = [[]]
    used = len(stretch.prompt)
    for row in stretch.rows:
        if parts[-1] and used + len(row.completion) - 1 > budget:
            parts.append([])
            used = len(stretch.prompt)
        parts[-1].append(row)
        used += len(row.completion) - 1
    return [Stretch(stretch.prompt, tuple(rows)) for rows in parts if rows]


def _tokens(part: Stretch) -> int:
    return part.tokens


def _even_bins(parts: Sequence[Stretch], count: int, cost: Callable[[Stretch], int] = _tokens) -> list[list[Stretch]]:
    """Costliest first into the emptiest bin."""
    bins: list[list[Stretch]] = [[] for _ in range(max(count, 1))]
    sizes = [0] * len(bins)
    for part in sorted(parts, key=cost, reverse=True):
        emptiest = sizes.index(min(sizes))
        bins[emptiest].append(part)
        sizes[emptiest] += cost(part)
    return bins


def _packed(parts: Sequence[Stretch]) -> Pack:
    token_ids: list[int] = []
    positions: list[int] = []
    prompts: list[tuple[int, int]] = []  # (start, length) in the pack
    owns: list[tuple[int, int, int]] = []  # (start, length, prompt)
    predict: list[int] = []
    target: list[int] = []
    row_of: list[int] = []
    column: list[int] = []
    for part in parts:
        length = len(part.prompt)
        start = len(token_ids)
        prompts.append((start, length))
        token_ids += part.prompt
        positions += range(length)
        last = start + length - 1
        for row in part.rows:
            inputs = row.completion[:-1]
            own = len(token_ids)
            token_ids += inputs
            positions += range(length, length + len(inputs))
            if inputs:
                owns.append((own, len(inputs), len(prompts) - 1))
            predict += [last, *range(own, own + len(inputs))]
            target += row.completion
            row_of += [row.index] * len(row.completion)
            column += range(len(row.completion))
    spans = [(start, length) for start, length, _ in owns]
    prompt_GP, prompt_valid_GP = _spans(prompts)
    own_CN, own_valid_CN = _spans(spans)
    position_T = torch.tensor(positions)
    tiles, tiled_T = _tiled(prompts, owns, position_T)
    return Pack(
        token_ids=torch.tensor([token_ids]),
        position_ids=position_T[None],
        attention_mask=None,
        layout=Layout(
            tiles=tiles,
            tiled_T=tiled_T,
            prompt_GP=prompt_GP,
            prompt_valid_GP=prompt_valid_GP,
            own_CN=own_CN,
            own_valid_CN=own_valid_CN,
            group_C=torch.tensor([prompt for _, _, prompt in owns], dtype=torch.long),
            position_GP=position_T[prompt_GP],
            position_CN=position_T[own_CN],
        ),
        predict_K=torch.tensor(predict),
        target_K=torch.tensor(target),
        row_K=torch.tensor(row_of),
        column_K=torch.tensor(column),
        prompt_tokens=sum(length for _, length in prompts),
    )


def _tiled(
    prompts: Sequence[tuple[int, int]], owns: Sequence[tuple[int, int, int]], position_T: torch.Tensor
) -> tuple[tuple[Tile, ...], torch.Tensor]:
    """Stretches of at most ``TILE_ROWS`` tokens, those of about one size together, and where each token went."""
    cut: list[tuple[int, int, tuple[int, int], int]] = []  # first query, queries, the prompt's keys, own keys' start
    for start, length in prompts:
        cut += [
            (start + done, min(TILE_ROWS, length - done), (start, 0), start) for done in range(0, length, TILE_ROWS)
        ]
    for start, length, prompt in owns:
        cut += [
            (start + done, min(TILE_ROWS, length - done), prompts[prompt], start)
            for done in range(0, length, TILE_ROWS)
        ]

    def keys(one: tuple[int, int, tuple[int, int], int]) -> int:
        first, queries, (_, seen), own = one
        return seen + first + queries - own

    tiles: list[Tile] = []
    held: list[tuple[int, int, tuple[int, int], int]] = []
    most_queries = most_keys = 0
    order = sorted(cut, key=lambda one: (keys(one), one[1]), reverse=True)
    for one in [*order, None]:
        if held and (
            one is None
            or (len(held) + 1) * max(most_queries, one[1]) * most_keys > TILE
            or 2 * keys(one) * one[1] < most_keys * most_queries
        ):
            tiles.append(_tile(held, position_T))
            held, most_queries, most_keys = [], 0, 0
        if one is not None:
            held.append(one)
            most_queries, most_keys = max(most_queries, one[1]), max(most_keys, keys(one))
    tiled_T = torch.empty(len(position_T), dtype=torch.long)
    before = 0
    for tile in tiles:
        tiled_T[tile.query_BQ[tile.query_valid_BQ]] = tile.query_valid_BQ.flatten().nonzero()[:, 0] + before
        before += tile.query_BQ.numel()
    return tuple(tiles), tiled_T


def _tile(cut: Sequence[tuple[int, int, tuple[int, int], int]], position_T: torch.Tensor) -> Tile:
    query_BQ, query_valid_BQ = _spans([(first, queries) for first, queries, _, _ in cut])
    prompt_BP, prompt_valid_BP = _spans([prompt for _, _, prompt, _ in cut])
    own_BO, own_valid_BO = _spans([(own, first + queries - own) for first, queries, _, own in cut])
    key_BS = torch.cat([prompt_BP, own_BO], dim=1)
    return Tile(
        query_BQ=query_BQ,
        query_valid_BQ=query_valid_BQ,
        key_BS=key_BS,
        key_valid_BS=torch.cat([prompt_valid_BP, own_valid_BO], dim=1),
        query_at_BQ=position_T[query_BQ],
        key_at_BS=position_T[key_BS],
    )


def _spans(spans: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [spans, longest] of each span's tokens, and which of them are real."""
    if not spans:
        return torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.bool)
    start_S = torch.tensor([start for start, _ in spans])
    length_S = torch.tensor([length for _, length in spans])
    step_L = torch.arange(int(length_S.max()))
    valid_SL = step_L < length_S[:, None]
    return torch.where(valid_SL, start_S[:, None] + step_L, 0), valid_SL


def _padded_chunks(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    chunks: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -(len(row.prompt) + len(row.completion))):
        if not chunks or (len(chunks[-1]) + 1) * longest > budget:
            chunks.append([])
            longest = len(row.prompt) + len(row.completion) - 1
        chunks[-1].append(row)
    return chunks


def _padded(rows: Sequence[Row]) -> Pack:
    longest = max(len(row.prompt) + len(row.completion) - 1 for row in rows)
    token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    predict: list[int] = []
    target: list[int] = []
    row_of: list[int] = []
    column: list[int] = []
    for place, row in enumerate(rows):
        inputs = (*row.prompt, *row.completion[:-1])
        token_ids[place, : len(inputs)] = torch.tensor(inputs)
        mask[place, : len(inputs)] = 1
        first = place * longest + len(row.prompt) - 1
        predict += range(first, first + len(row.completion))
        target += row.completion
        row_of += [row.index] * len(row.completion)
        column += range(len(row.completion))
    return Pack(
        token_ids=token_ids,
        position_ids=torch.arange(longest).expand(len(rows), -1),
        attention_mask=mask,
        layout=None,
        predict_K=torch.tensor(predict),
        target_K=torch.tensor(target),
        row_K=torch.tensor(row_of),
        column_K=torch.tensor(column),
        prompt_tokens=sum(len(row.prompt) for row in rows),
    )
