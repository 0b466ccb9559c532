"""Groups into forward passes: packed, where each token stands once however many sequences begin with it, or padded.

A pack lays its groups in one sequence in the order of their tokens: the first completion with its prompt in front,
then of every next one only what it does not begin with in common with the one before it. So a prompt stands once for
all its completions, and a system prompt or worked examples once for all prompts that begin with them; so do the first
words that completions share. Positions go on from where a row branches off; the linear layers see no padding and
nothing twice. The last token of a completion predicts nothing and is left out (but see ``plan``). Which token may see
which (those before it in its own sequences) is ``learner/attention/packed_cpu.py``'s work, from the index tensors made
here. The idea of computing a shared prefix once is Hydragen's (arXiv 2402.05099); the padded batch is the slow truth it
is tested against, and the path for models that cannot be packed.

Shapes: T tokens of a pack, N runs of new tokens in it, S keys of all runs; U positions that predict, P different
(position, token) pairs predicted, K tokens of the batch that are predicted.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

TILE_ROWS = 128
"""Tokens of a stretch that attend together: fewer would waste less on keys they do not see yet, but cost more calls."""
TILE = 1 << 18
"""Scores of a tile for each head: few enough that a CPU's cache holds them."""
FEWEST = 32
"""Queries that a stretch counts for at least: the keys of many short ones are more than their scores."""


@dataclass(frozen=True)
class Row:
    """One sequence to score: a completion under its prompt."""

    index: int
    """Its row in the batch's [B, T] tensors."""
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    whole: bool = False
    """Whether the last token is computed as well, though it predicts nothing."""

    @functools.cached_property
    def inputs(self) -> tuple[int, ...]:
        return self.prompt + (self.completion if self.whole else self.completion[:-1])


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens the two begin with in common."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda n: one[: n + 1] != other[: n + 1])


@dataclass(frozen=True)
class Stretch:
    """Rows that share a prompt, in the order of their tokens."""

    prompt: tuple[int, ...]
    rows: tuple[Row, ...]

    @functools.cached_property
    def tokens(self) -> int:
        """As many as are computed for it alone."""
        every = sum(len(row.inputs) for row in self.rows)
        return every - sum(_common(one.inputs, other.inputs) for one, other in pairwise(self.rows))


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
    """Where each position's pairs begin, and P."""
    tokens_P: tuple[int, ...]
    """Where each pair's tokens begin, and K."""
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
    its sequence up to the last query. Padding points at token 0 and is masked."""

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
    """Index tensors of a packed sequence, a row of runs: each the tokens of a sequence that no earlier one has."""

    tiles: tuple[Tile, ...]
    """Every token is a query of exactly one of them."""
    tiled_T: torch.Tensor
    """Where each token lies in the tiles' queries, laid end to end."""

    run_ends: torch.Tensor
    """Where each run begins, and T: int32 [N + 1]."""
    key_ends: torch.Tensor
    """Where each run's keys begin, and S: int32 [N + 1]."""
    key_S: torch.Tensor
    """The tokens of each run's whole sequence, in their order; the run itself comes last."""
    seen_T: torch.Tensor
    """Where the tokens end that may see this one: they begin with itself and lie together."""
    position_T: torch.Tensor


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
        elif isinstance(part, tuple) and part and is_dataclass(part[0]):
            moved[each.name] = tuple(_to(one, device) for one in part)
        elif isinstance(part, torch.Tensor):
            moved[each.name] = part.to(device)
    return replace(value, **moved)


def stretches(rows: Iterable[Row]) -> list[Stretch]:
    """Rows with the same prompt, together; rows without tokens are left out."""
    found: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        if row.completion:
            found.setdefault(row.prompt, []).append(row)
    return [Stretch(prompt, tuple(sorted(own, key=_completion))) for prompt, own in found.items()]


def _completion(row: Row) -> tuple[int, ...]:
    return row.completion


def plan(
    rows: Sequence[Row], budget_tokens: int, packed: bool, kind_of: Callable[[int], Hashable] | None = None
) -> list[Pack]:
    """The forward passes for these rows, each at most ``budget_tokens`` tokens and about even in work.

    A group that is too long alone is split, its prompt repeated; a single longer sequence goes alone. ``kind_of`` is
    for models whose positions go by the longest row of a pass: rows whose lengths it tells apart do not share one, and
    are computed whole, so that a pass is as long as they are.
    """
    if kind_of is not None:
        apart: dict[Hashable, list[Row]] = {}
        for row in rows:
            if row.completion:
                apart.setdefault(kind_of(len(row.prompt + row.completion)), []).append(replace(row, whole=True))
        return [pack for part in apart.values() for pack in plan(part, budget_tokens, packed)]
    if not packed:
        return [_padded(chunk) for chunk in _padded_chunks([r for r in rows if r.completion], budget_tokens)]
    parts = [part for whole in stretches(rows) for part in _split(whole, budget_tokens)]
    small = [part for part in parts if part.tokens <= budget_tokens]
    bins = [[part] for part in parts if part.tokens > budget_tokens]
    if small:
        alone = sum(part.tokens for part in small)
        in_order, by_cost = len(_filled(_in_order(small), budget_tokens)), -(-alone // budget_tokens)
        while by_cost < in_order and max(_sizes(_emptiest(small, by_cost))) > budget_tokens:
            by_cost += 1
        bins += _even_bins(small, min(in_order, by_cost))
    return [_packed(one) for one in bins if one]


def _sizes(bins: Sequence[Sequence[Stretch]]) -> list[int]:
    return [sum(part.tokens for part in one) for one in bins]


def tokens(parts: Sequence[Stretch], packed: bool = True) -> int:
    """As many as are computed for these in one pass, or a few less where a completion goes on like another prompt."""
    return sum(alone - alike for _, alone, alike in _in_order(parts, packed))


def _alone(part: Stretch, packed: bool) -> int:
    return part.tokens if packed else sum(len(row.inputs) for row in part.rows)


def _prompt(part: Stretch) -> tuple[int, ...]:
    return part.prompt


def share(rows: Sequence[Row], ranks: int, packed: bool) -> list[list[Row]]:
    """Each rank's rows, about even in tokens to compute, whole groups so that a prompt is computed by one rank; what
    prompts begin with alike may be computed by several.

    With fewer groups than ranks the costliest are cut in two; with fewer rows some ranks get none.
    """
    parts = stretches(rows)
    while len(parts) < ranks and any(len(part.rows) > 1 for part in parts):
        widest = max((part for part in parts if len(part.rows) > 1), key=lambda part: _alone(part, packed))
        by_length = sorted(widest.rows, key=lambda row: len(row.completion))
        parts.remove(widest)
        parts += stretches(by_length[::2]) + stretches(by_length[1::2])
    bins = _even_bins(parts, ranks, packed)
    return [sorted((row for part in one for row in part.rows), key=lambda row: row.index) for one in bins]


def _split(stretch: Stretch, budget: int) -> list[Stretch]:
    parts: list[list[Row]] = []
    used = 0
    for row in stretch.rows:
        own = len(row.inputs) - (_common(row.inputs, parts[-1][-1].inputs) if parts else 0)
        if not parts or (own and used + own > budget):
            parts.append([])
            used, own = 0, len(row.inputs)
        parts[-1].append(row)
        used += own
    return [Stretch(stretch.prompt, tuple(rows)) for rows in parts]


def _even_bins(parts: Sequence[Stretch], count: int, packed: bool = True) -> list[list[Stretch]]:
    """So many bins, the fullest as small as the better of two ways makes it: neighbours in the order of their tokens,
    which have most in common, or the costliest first into the emptiest bin."""
    count = max(count, 1)
    return min(
        (_neighbours(parts, count, packed), _emptiest(parts, count, packed)),
        key=lambda bins: max(tokens(one, packed) for one in bins),
    )


def _emptiest(parts: Sequence[Stretch], count: int, packed: bool = True) -> list[list[Stretch]]:
    bins: list[list[Stretch]] = [[] for _ in range(count)]
    sizes = [0] * count
    for part in sorted(parts, key=lambda part: _alone(part, packed), reverse=True):
        emptiest = sizes.index(min(sizes))
        bins[emptiest].append(part)
        sizes[emptiest] += _alone(part, packed)
    return bins


def _neighbours(parts: Sequence[Stretch], count: int, packed: bool) -> list[list[Stretch]]:
    ordered = _in_order(parts, packed)
    # The least that a bin may hold for all of them to fit into so many.
    every = sum(alone - alike for _, alone, alike in ordered)
    most = bisect_left(range(every), True, key=lambda most: len(_filled(ordered, most)) <= count)
    bins = _filled(ordered, most)
    return bins + [[] for _ in range(count - len(bins))]


def _in_order(parts: Sequence[Stretch], packed: bool = True) -> list[tuple[Stretch, int, int]]:
    """In the order of their tokens, each with its own tokens and how many of them the one before it has."""
    ordered = sorted(parts, key=_prompt)
    alike = [_common(one.prompt, other.prompt) if packed else 0 for one, other in pairwise(ordered)]
    return [(part, _alone(part, packed), begins) for part, begins in zip(ordered, [0, *alike], strict=False)]


def _filled(ordered: Sequence[tuple[Stretch, int, int]], most: int) -> list[list[Stretch]]:
    """As few bins of neighbours as hold at most so many tokens each, or a single part."""
    bins: list[list[Stretch]] = []
    used = 0
    for part, alone, alike in ordered:
        used += alone - alike
        if not bins or used > most:
            bins.append([])
            used = alone
        bins[-1].append(part)
    return bins


@dataclass(frozen=True)
class _Run:
    """The tokens of a sequence that no earlier one of the pack has; its keys are a slice of all runs' keys."""

    start: int
    length: int
    key_start: int
    keys: int


def _packed(parts: Sequence[Stretch]) -> Pack:
    token_ids: list[int] = []
    positions: list[int] = []
    runs: list[_Run] = []
    keys: list[torch.Tensor] = []
    left: list[tuple[torch.Tensor, int]] = []  # tokens that no later one sees, and the pack's length then
    predicted: list[tuple[torch.Tensor, Row]] = []
    prompt_tokens = 0
    path = torch.empty(0, dtype=torch.long)  # where the row's inputs lie in the pack
    before: tuple[int, ...] = ()
    for row in sorted((row for part in parts for row in part.rows), key=lambda row: row.inputs):
        inputs, shared, start = row.inputs, _common(row.inputs, before), len(token_ids)
        left.append((path[shared:], start))
        path = torch.cat([path[:shared], torch.arange(start, start + len(inputs) - shared)])
        if shared < len(inputs):
            runs.append(_Run(start, len(inputs) - shared, runs[-1].key_start + runs[-1].keys if runs else 0, len(path)))
            keys.append(path)
            token_ids += inputs[shared:]
            positions += range(shared, len(inputs))
            prompt_tokens += max(0, len(row.prompt) - shared)
        predicted.append((path[len(row.prompt) - 1 :][: len(row.completion)], row))
        before = inputs
    left.append((path, len(token_ids)))
    position_T, key_S = torch.tensor(positions), torch.cat(keys)
    seen_T = torch.empty_like(position_T)
    for at, end in left:
        seen_T[at] = end
    tiles, tiled_T = _tiled(runs, key_S, position_T)
    return Pack(
        token_ids=torch.tensor([token_ids]),
        position_ids=position_T[None],
        attention_mask=None,
        layout=Layout(
            tiles=tiles,
            tiled_T=tiled_T,
            run_ends=_ends(run.length for run in runs),
            key_ends=_ends(run.keys for run in runs),
            key_S=key_S,
            seen_T=seen_T,
            position_T=position_T,
        ),
        prompt_tokens=prompt_tokens,
        **_targets(predicted),
    )


def _ends(lengths: Iterable[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


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


def _tiled(
    runs: Sequence[_Run], key_S: torch.Tensor, position_T: torch.Tensor
) -> tuple[tuple[Tile, ...], torch.Tensor]:
    """Stretches of at most ``TILE_ROWS`` tokens, those of about one size together, and where each token went."""
    cut: list[_Run] = []
    for run in runs:
        before = run.keys - run.length
        for done in range(0, run.length, TILE_ROWS):
            own = min(TILE_ROWS, run.length - done)
            cut.append(_Run(run.start + done, own, run.key_start, before + done + own))
    tiles: list[Tile] = []
    held: list[_Run] = []
    most_queries = most_keys = 0
    order = sorted(cut, key=lambda one: (one.keys, one.length), reverse=True)
    for one in [*order, None]:
        if held and (
            one is None
            or (len(held) + 1) * max(most_queries, one.length, FEWEST) * most_keys > TILE
            or 2 * one.keys * one.length < most_keys * most_queries
        ):
            tiles.append(_tile(held, key_S, position_T))
            held, most_queries, most_keys = [], 0, 0
        if one is not None:
            held.append(one)
            most_queries, most_keys = max(most_queries, one.length), max(most_keys, one.keys)
    tiled_T = torch.empty(len(position_T), dtype=torch.long)
    before = 0
    for tile in tiles:
        tiled_T[tile.query_BQ[tile.query_valid_BQ]] = tile.query_valid_BQ.flatten().nonzero()[:, 0] + before
        before += tile.query_BQ.numel()
    return tuple(tiles), tiled_T


def _tile(cut: Sequence[_Run], key_S: torch.Tensor, position_T: torch.Tensor) -> Tile:
    query_BQ, query_valid_BQ = _spans([(one.start, one.length) for one in cut])
    place_BS, key_valid_BS = _spans([(one.key_start, one.keys) for one in cut])
    key_BS = torch.where(key_valid_BS, key_S[place_BS], 0)
    return Tile(
        query_BQ=query_BQ,
        query_valid_BQ=query_valid_BQ,
        key_BS=key_BS,
        key_valid_BS=key_valid_BS,
        query_at_BQ=position_T[query_BQ],
        key_at_BS=position_T[key_BS],
    )


def _spans(spans: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [spans, longest] of each span's tokens, and which of them are real."""
    start_S = torch.tensor([start for start, _ in spans])
    length_S = torch.tensor([length for _, length in spans])
    step_L = torch.arange(int(length_S.max()))
    valid_SL = step_L < length_S[:, None]
    return torch.where(valid_SL, start_S[:, None] + step_L, 0), valid_SL


def _padded_chunks(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    chunks: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -len(row.inputs)):
        if not chunks or (len(chunks[-1]) + 1) * longest > budget:
            chunks.append([])
            longest = len(row.inputs)
        chunks[-1].append(row)
    return chunks


def _padded(rows: Sequence[Row]) -> Pack:
    longest = max(len(row.inputs) for row in rows)
    token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    predicted: list[tuple[torch.Tensor, Row]] = []
    for place, row in enumerate(rows):
        token_ids[place, : len(row.inputs)] = torch.tensor(row.inputs)
        mask[place, : len(row.inputs)] = 1
        first = place * longest + len(row.prompt) - 1
        predicted.append((torch.arange(first, first + len(row.completion)), row))
    return Pack(
        token_ids=token_ids,
        position_ids=torch.arange(longest).expand(len(rows), -1),
        attention_mask=mask,
        layout=None,
        prompt_tokens=sum(len(row.prompt) for row in rows),
        **_targets(predicted),
    )
