"""What packed passes and attention kernels are compared with: made-up rows, the slow truths, and how far off is wrong.

Used by the tests of packing and attention, and on a device by ``tests/gpu``. Needs neither pytest nor hypothesis.
"""

import random
from dataclasses import dataclass

import torch

from learner.batch.packing import Pack, Row, make_microbatches
from learner.token_logprobs import SamplingTransform, forward_backward
from tests.tiny import VOCAB_SIZE

MIXED = [(5, [3, 1, 7]), (30, [20, 2]), (1, [4]), (12, [1, 1])]


def make_rows(sizes, seed=0, alphabet=VOCAB_SIZE):
    """``sizes``: for each group (prompt length, completion lengths). Of a small alphabet many share a prefix."""
    draw = random.Random(seed)
    rows = []
    for prompt_length, lengths in sizes:
        prompt = tuple(draw.randrange(alphabet) for _ in range(prompt_length))
        for length in lengths:
            rows.append(Row(len(rows), prompt, tuple(draw.randrange(alphabet) for _ in range(length))))
    return rows


def beginnings(rows):
    """What any of the rows' inputs begins with, each once, the shortest and least first."""
    return sorted({row.inputs[: t + 1] for row in rows for t in range(len(row.inputs))})


# -- whole passes ------------------------------------------------------------------------------------------------------


@dataclass
class Weighted:
    """A weighted sum of log-probs as the loss of a pack; it keeps what it is given."""

    pack: Pack
    weights: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor
    by_sequence: bool = False

    def __call__(self, logprob_K, entropy_K, part):
        at = (self.pack.row_K[part], self.pack.column_K[part])
        self.logprobs[at], self.entropies[at] = logprob_K.detach(), entropy_K.detach()
        return (logprob_K * self.weights[at]).sum(), {}


def run(model, rows, packed, budget=10**6, **options):
    """Log-probs and entropies [B, T] and every gradient of a weighted sum of them, computed where the model is; on the
    CPU."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    shape = (len(rows), max(len(row.completion) for row in rows))
    weights = torch.linspace(0.5, 1.5, shape[0] * shape[1], device=device).view(shape)
    logprobs, entropies = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    for pack in make_microbatches(rows, budget, packed):
        pack = pack.to(str(device))
        forward_backward(model, pack, Weighted(pack, weights, logprobs, entropies), SamplingTransform(**options))
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.cpu(), entropies.cpu(), gradients


def errors(one, other):
    """How far two answers of ``run`` are apart: the largest log-prob and entropy, and of each gradient its norm's share
    (one that is nothing but rounding is compared with the largest)."""
    assert one[2].keys() == other[2].keys()
    largest = max((gradient.float().norm() for gradient in other[2].values()), default=0.0)
    return {
        "logprob": _largest(one[0] - other[0]),
        "entropy": _largest(one[1] - other[1]),
        "gradients": {
            name: float((gradient.float() - other[2][name].float()).norm()
                        / other[2][name].float().norm().clamp_min(1e-2 * largest))
            for name, gradient in one[2].items()
        },
    }  # fmt: skip


def _largest(difference):
    return float(difference.abs().max()) if difference.numel() else 0.0


def assert_equal(one, other):
    apart = errors(one, other)
    assert apart["logprob"] < 1e-4, apart["logprob"]
    assert apart["entropy"] < 1e-4, apart["entropy"]
    for name, error in apart["gradients"].items():
        assert error < 1e-4, f"{name}: {error}"


def naive_logprobs(model, row):
    """One sequence at a time through the whole model: the slow truth of both paths."""
    ids = torch.tensor([row.prompt + row.completion])
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    start = len(row.prompt)
    return torch.stack([logits[start + t - 1, token] for t, token in enumerate(row.completion)])


# -- attention alone ---------------------------------------------------------------------------------------------------

SIZES = [
    [(5, [3, 1, 7]), (30, [20, 2]), (1, [4]), (12, [1, 1])],
    [(1, [1])],
    [(150, [3, 40]), (2, [60])],
    [(4, [9] * 12)],
]
WAYS = [(None, None), (7, None), (1, None), (None, 2.0), (16, 0.5)]
"""Sliding window and soft cap."""


def layout_of(sizes, alphabet=VOCAB_SIZE, device="cpu"):
    (pack,) = make_microbatches(make_rows(sizes, alphabet=alphabet), 10**6, packed=True)
    return pack.to(device).layout, pack.token_ids.numel()


def states(tokens, heads, key_heads, width, seed=0):
    """Queries, keys and values [1, H or J, T, D], float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, tokens, width), (1, key_heads, tokens, width), (1, key_heads, tokens, width)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def dense(query, key, value, seen_QK, scaling, softcap):
    """Attention under a dense mask: the slow truth."""
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen_QK, -torch.inf).softmax(-1) @ value


def seen_from_the_words(sizes, window, alphabet=VOCAB_SIZE):
    """A token sees the tokens that its sequence has up to itself, by nested loops: each token of the pack is known by
    all that comes before it."""
    once = beginnings([row for row in make_rows(sizes, alphabet=alphabet) if row.completion])
    seen = torch.zeros(len(once), len(once), dtype=torch.bool)
    for q, mine in enumerate(once):
        for k, other in enumerate(once):
            seen[q, k] = mine[: len(other)] == other and len(mine) - len(other) < (window or 10**9)
    return seen
