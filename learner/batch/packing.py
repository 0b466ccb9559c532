"""Rows into forward passes: packed as a prefix trie, where every shared prefix is computed once, or padded.

A pack is the trie laid out in the order of its tokens: of every row only what follows the prefix that it shares with
the row before it. So a prompt is there once for all its completions, and worked examples once for all prompts that
start with them (the idea is Hydragen's, arXiv 2402.05099). Positions go on from where a row branches off. The last
token of a completion predicts nothing and is left out (but see ``make_microbatches``). Which token may see which is for
``learner/attention``, from the index tensors made here. The padded batch is the slow truth that packs are tested
against, and the path for models that cannot be packed.

Shapes: T tokens of a pack; U positions that predict, P different (position, token) pairs predicted, K tokens of the
batch that are predicted; in a tile B spans of at most Q tokens, each with S keys.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import torch

SPAN = 128
"""Tokens of a span that attend together: fewer would waste less on keys they do not see yet, but cost more calls."""
TILE = 1 << 18
"""Scores of a tile for each head: few enough that a CPU's cache holds them."""
FEWEST = 32
"""Queries that a span counts for at least: the keys of many short ones are more than their scores."""


@dataclass(frozen=True)
class Row:
    """One sequence whose completion's log-probs are wanted."""

    index: int
    """Its row in the batch's [B, T] tensors."""
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    whole: bool = False
    """Whether the last token is computed as well, though it predicts nothing."""

    @functools.cached_property
    def inputs(self) -> tuple[int, ...]:
        return self.prompt + (self.completion if self.whole else self.completion[:-1])


@dataclass(frozen=True, eq=False)
class Pack:
    """One forward pass. ``token_ids`` is [1, T] when packed and [rows, longest] when padded.

    What is predicted stands in the order of the positions that predict it, and then of the tokens.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    """Padded only: 1 on real tokens."""
    layout: Layout | None
    """Packed only: which token may see which."""
    predict_U: torch.Tensor
    """Positions, in the flattened ``token_ids``, whose outputs predict completion tokens."""
    at_P: torch.Tensor
    """Which of those each pair has."""
    target_P: torch.Tensor
    """The token it predicts."""
    pair_K: torch.Tensor
    """The pair of each token of the batch."""
    row_K: torch.Tensor
    """Its row in the batch."""
    column_K: torch.Tensor
    """Its place in the completion."""
    pairs_U: tuple[int, ...]
    """Where each position's pairs start, and P."""
    tokens_P: tuple[int, ...]
    """Where each pair's tokens start, and K."""
    prompt_tokens: int
    """Prompt tokens in it, counted as often as they are computed."""

    def to(self, device: str) -> Pack:
        """This pack on that device; itself, with its cache, where it is there already."""
        here, there = self.token_ids.device, torch.device(device)
        same = here.type == there.type and there.index in (None, here.index)
        return self if same else _to(self, device)

    def free_cache(self) -> None:
        """Drops what was made for all layers of a pass: for all packs of a step together it can be gigabytes."""
        if self.layout is not None:
            self.layout.cache.clear()


@dataclass(frozen=True, eq=False)
class Layout:
    """Which token of a packed sequence may see which."""

    tiles: tuple[Tile, ...]
    """Every token is a query of exactly one of them."""
    tiled_T: torch.Tensor
    """Where each token lies in the tiles' queries, laid end to end."""
    seen_T: torch.Tensor
    """Where the tokens end that may see this one: they begin with itself and lie together."""
    position_T: torch.Tensor
    cache: dict[Hashable, torch.Tensor | Any] = field(default_factory=dict, init=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for all layers of a pass."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


@dataclass(frozen=True, eq=False)
class Tile:
    """B spans of neighbouring tokens that attend together, and the keys that each may see: those of its sequence up to
    the last query. Padding points at token 0 and is masked."""

    query_BQ: torch.Tensor
    query_valid_BQ: torch.Tensor
    key_BS: torch.Tensor
    key_valid_BS: torch.Tensor
    query_at_BQ: torch.Tensor
    """Positions."""
    key_at_BS: torch.Tensor


def _to(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Pack | Layout | Tile):
        names = [part.name for part in fields(value) if part.init]
        return replace(value, **{name: _to(getattr(value, name), device) for name in names})
    return tuple(_to(part, device) for part in value) if isinstance(value, tuple) else value


# -- which rows share a pass -------------------------------------------------------------------------------------------


def make_microbatches(
    rows: Sequence[Row], budget_tokens: int, packed: bool, kind_of: Callable[[int], Hashable] | None = None
) -> list[Pack]:
    """The forward passes for these rows, each at most ``budget_tokens`` tokens. A pass takes neighbours in the order of
    their tokens, which share most, all passes about equal; or the largest groups first where fewer passes hold them so.
    Rows of one prompt stay together where a pass can hold them; a single longer row goes alone; rows without tokens are
    left out. ``kind_of`` is for models whose positions go by the longest row of a pass: rows whose lengths it
    distinguishes do not share one, and are computed whole, so that a pass is as long as they are.
    """
    if kind_of is not None:
        kinds: dict[Hashable, list[Row]] = {}
        for row in rows:
            if row.completion:
                kinds.setdefault(kind_of(len(row.prompt + row.completion)), []).append(replace(row, whole=True))
        return [pack for kind in kinds.values() for pack in make_microbatches(kind, budget_tokens, packed)]
    if not packed:
        return [_padded(chunk) for chunk in _padded_chunks([row for row in rows if row.completion], budget_tokens)]
    units = _units(rows, budget_tokens)
    in_order, by_size = len(_filled(units, budget_tokens)), _first_fit_decreasing(units, budget_tokens)
    return [_packed(part) for part in (by_size if len(by_size) < in_order else _evenly(units, in_order))]


def shard(rows: Sequence[Row], ranks: int, packed: bool) -> list[list[Row]]:
    """Each rank's rows, neighbours in the order of their tokens: whole groups, or cut anywhere where the most that a
    rank computes is less so, though the prompt at a cut is computed twice. With fewer rows than ranks some get none."""
    every = sum(len(row.inputs) for row in rows)
    whole, cut = (_evenly(_units(rows, most_tokens, packed), ranks) for most_tokens in (every, 0))
    parts = min(whole, cut, key=lambda parts: max((_tokens(part, packed) for part in parts), default=0))
    return parts + [[] for _ in range(ranks - len(parts))]


def _tokens(rows: Sequence[Row], packed: bool) -> int:
    """As many as are computed for these in one pass, without padding."""
    return sum(unit.tokens - unit.shared for unit in _units(rows, 0, packed))


@dataclass(frozen=True)
class _Unit:
    """Neighbouring rows that are not parted."""

    rows: list[Row]
    tokens: int
    """As many as are computed for it alone."""
    shared: int
    """How many of them the row before it has as well."""


def _units(rows: Sequence[Row], most_tokens: int, packed: bool = True) -> list[_Unit]:
    """In the order of the tokens: the rows of one prompt, parted where they are more than so many tokens."""
    units: list[_Unit] = []
    before = Row(-1, (), ())
    for row in sorted((row for row in rows if row.completion), key=_order):
        shared = _common(row.inputs, before.inputs) if packed else 0
        own, last = len(row.inputs) - shared, units[-1] if units else None
        if last and row.prompt == before.prompt and (not own or last.tokens + own <= most_tokens):
            units[-1] = _Unit([*last.rows, row], last.tokens + own, last.shared)
        else:
            units.append(_Unit([row], len(row.inputs), shared))
        before = row
    return units


def _order(row: Row) -> tuple[tuple[int, ...], int]:
    return row.inputs, row.completion[-1]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the prefix that the two share, in tokens."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda n: one[: n + 1] != other[: n + 1])


def _filled(units: Sequence[_Unit], most_tokens: int) -> list[list[Row]]:
    """As few parts of neighbours as hold at most so many tokens each, or a single unit."""
    parts: list[list[Row]] = []
    used = 0
    for unit in units:
        used += unit.tokens - unit.shared
        if not parts or used > most_tokens:
            parts.append([])
            used = unit.tokens
        parts[-1] += unit.rows
    return parts


def _evenly(units: Sequence[_Unit], count: int) -> list[list[Row]]:
    """At most so many parts of neighbours, the largest as small as can be."""
    every = sum(unit.tokens for unit in units)
    return _filled(units, bisect_left(range(every), True, key=lambda most: len(_filled(units, most)) <= count))


def _first_fit_decreasing(units: Sequence[_Unit], most_tokens: int) -> list[list[Row]]:
    """Parts of at most so many tokens, as if units shared nothing; or of a single unit."""
    parts: list[list[Row]] = []
    sizes: list[int] = []
    for unit in sorted(units, key=lambda unit: unit.tokens, reverse=True):
        place = next((place for place, size in enumerate(sizes) if size + unit.tokens <= most_tokens), len(sizes))
        if place == len(sizes):
            parts.append([])
            sizes.append(0)
        parts[place] += unit.rows
        sizes[place] += unit.tokens
    return [sorted(part, key=_order) for part in parts]


def _padded_chunks(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    chunks: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -len(row.inputs)):
        if not chunks or (len(chunks[-1]) + 1) * longest > budget:
            chunks.append([])
            longest = len(row.inputs)
        chunks[-1].append(row)
    return chunks


# -- one pass ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """Tokens of a row that no earlier one of the pack has, and its keys: the whole row up to there."""

    start: int
    length: int
    key_S: torch.Tensor


def _packed(rows: Sequence[Row]) -> Pack:
    """``rows`` in the order of their inputs."""
    token_ids: list[int] = []
    positions: list[int] = []
    spans: list[_Span] = []
    left: list[tuple[torch.Tensor, int]] = []  # tokens that no later one sees, and the pack's length then
    predicted: list[tuple[torch.Tensor, Row]] = []
    prompt_tokens = 0
    path = torch.empty(0, dtype=torch.long)  # where the row's inputs lie in the pack
    before: tuple[int, ...] = ()
    for row in rows:
        inputs, shared, start = row.inputs, _common(row.inputs, before), len(token_ids)
        left.append((path[shared:], start))
        path = torch.cat([path[:shared], torch.arange(start, start + len(inputs) - shared)])
        if shared < len(inputs):
            spans.append(_Span(start, len(inputs) - shared, path))
            token_ids += inputs[shared:]
            positions += range(shared, len(inputs))
            prompt_tokens += max(0, len(row.prompt) - shared)
        predicted.append((path[len(row.prompt) - 1 :][: len(row.completion)], row))
        before = inputs
    left.append((path, len(token_ids)))
    position_T = torch.tensor(positions)
    seen_T = torch.empty_like(position_T)
    for at, end in left:
        seen_T[at] = end
    tiles = _tiles(spans, position_T)
    tiled_T = torch.empty_like(position_T)
    queries = 0
    for tile in tiles:
        tiled_T[tile.query_BQ[tile.query_valid_BQ]] = tile.query_valid_BQ.flatten().nonzero()[:, 0] + queries
        queries += tile.query_BQ.numel()
    return Pack(
        token_ids=torch.tensor([token_ids]),
        position_ids=position_T[None],
        attention_mask=None,
        layout=Layout(tiles, tiled_T, seen_T, position_T),
        prompt_tokens=prompt_tokens,
        **_targets(predicted),
    )


def _targets(predicted: Sequence[tuple[torch.Tensor, Row]]) -> dict[str, Any]:
    """A pack's predictions, of each row and the positions that predict its completion."""
    position_K = torch.cat([at for at, _ in predicted])
    target_K = torch.tensor([token for _, row in predicted for token in row.completion])
    row_K = torch.repeat_interleave(
        torch.tensor([row.index for _, row in predicted]), torch.tensor([len(row.completion) for _, row in predicted])
    )
    column_K = torch.cat([torch.arange(len(row.completion)) for _, row in predicted])
    many = int(target_K.max()) + 1
    both_K, order_K = torch.sort(position_K * many + target_K, stable=True)
    both_P, pair_K, tokens_P = torch.unique_consecutive(both_K, return_inverse=True, return_counts=True)
    predict_U, at_P, pairs_U = torch.unique_consecutive(both_P // many, return_inverse=True, return_counts=True)
    return {
        "predict_U": predict_U,
        "at_P": at_P,
        "target_P": both_P % many,
        "pair_K": pair_K,
        "row_K": row_K[order_K],
        "column_K": column_K[order_K],
        "pairs_U": (0, *accumulate(pairs_U.tolist())),
        "tokens_P": (0, *accumulate(tokens_P.tolist())),
    }


def _tiles(spans: Sequence[_Span], position_T: torch.Tensor) -> tuple[Tile, ...]:
    """Spans cut to at most ``SPAN`` tokens, those of about one size together."""
    cut: list[_Span] = []
    for span in spans:
        for done in range(0, span.length, SPAN):
            own = min(SPAN, span.length - done)
            cut.append(_Span(span.start + done, own, span.key_S[: len(span.key_S) - span.length + done + own]))
    cut.sort(key=lambda span: (len(span.key_S), span.length), reverse=True)
    groups: list[list[_Span]] = []
    queries = keys = 0
    for span in cut:
        length, own_keys = span.length, len(span.key_S)
        full = groups and (len(groups[-1]) + 1) * max(queries, length, FEWEST) * keys > TILE
        if not groups or full or 2 * own_keys * length < keys * queries:
            groups.append([])
            queries = keys = 0
        groups[-1].append(span)
        queries, keys = max(queries, length), max(keys, own_keys)
    return tuple(_tile(group, position_T) for group in groups)


def _tile(spans: Sequence[_Span], position_T: torch.Tensor) -> Tile:
    query_BQ, query_valid_BQ = _side_by_side([torch.arange(span.start, span.start + span.length) for span in spans])
    key_BS, key_valid_BS = _side_by_side([span.key_S for span in spans])
    return Tile(query_BQ, query_valid_BQ, key_BS, key_valid_BS, position_T[query_BQ], position_T[key_BS])


def _side_by_side(indices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, longest], 0 where a row has ended, and where it has not."""
    lengths = torch.tensor([len(index) for index in indices])
    padded = torch.nn.utils.rnn.pad_sequence(list(indices), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def _padded(rows: Sequence[Row]) -> Pack:
    token_ids, mask = _side_by_side([torch.tensor(row.inputs) for row in rows])
    longest = token_ids.shape[1]
    predicted: list[tuple[torch.Tensor, Row]] = []
    for place, row in enumerate(rows):
        first = place * longest + len(row.prompt) - 1
        predicted.append((torch.arange(first, first + len(row.completion)), row))
    return Pack(
        token_ids=token_ids,
        position_ids=torch.arange(longest).expand(len(rows), -1),
        attention_mask=mask.long(),
        layout=None,
        prompt_tokens=sum(len(row.prompt) for row in rows),
        **_targets(predicted),
    )
