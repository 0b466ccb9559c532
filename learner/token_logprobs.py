"""Log-probabilities of completion tokens, and their gradients, without ever holding logits for [tokens, vocabulary].

Only positions that predict a completion token reach the output head, each once however many tokens it predicts, a
chunk at a time. The backward pass is written out: of a chunk's logits only the probabilities are kept, in the logits'
own memory and number format, and they become the gradient there. Where a token's loss depends on no other token, it is
taken while the chunk's logits are there; else each chunk is computed twice. Temperature, top-p and top-k are applied as
the sampler applied them, so both sides speak of one distribution.

Shapes: K predicted tokens; U positions that predict them, C of those in a chunk, P pairs of a position and a token, all
as in ``learner/batch/packing.py``; D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from common.sampling_filters import process
from learner.attention.packed_cpu import NAME
from learner.batch.packing import Pack
from learner.batch.packing_support import behind_head, decoder_of, head_of, plain_attention, reset_rope
from learner.model.loading import causal_of

ROWS = 32  # of a chunk that the CPU works on at once: their float32 logits then stay in its cache
IN_ROWS = {"cpu"}  # device types that work so


class PackLoss(Protocol):
    """The loss of a pass, a sum over tokens (``learner.loss.losses.ChunkedLoss``)."""

    @property
    def by_sequence(self) -> bool: ...

    def __call__(
        self, logprob_K: torch.Tensor, entropy_K: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Log-probs and entropies of these of the pack's tokens, all of them ``by_sequence``, to their part of the loss
        and statistics."""
        ...


@dataclass(frozen=True)
class SamplingTransform:
    """How the sampler drew, and how much of the head's work is done at once."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    chunk: int = 512
    """Positions (pairs, where tokens are left out) whose logits exist at once."""

    @property
    def cuts(self) -> bool:
        """Whether top-p or top-k leaves tokens out."""
        return self.top_p < 1 or self.top_k > 0


_Gradients: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""Of a loss by log-probs and by entropies [K]."""


def token_logprobs(
    model: Any, pack: Pack, transform: SamplingTransform = SamplingTransform()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [K] in nats, float32, of the pack's predicted tokens; without gradient."""
    with torch.no_grad():
        head = _Head(causal_of(model), transform)
        return head.all_logprobs(_hidden(causal_of(model), pack, head), head.chunks(pack))


def forward_backward(
    model: Any, pack: Pack, loss: PackLoss, transform: SamplingTransform = SamplingTransform()
) -> list[dict[str, torch.Tensor]]:
    """Adds the gradients of this pack's loss to the model's weights; returns its statistics, in parts."""
    causal = causal_of(model)
    head = _Head(causal, transform)
    hidden_UD, chunks = _hidden(causal, pack, head), head.chunks(pack)
    values_UD, gradient_UD = hidden_UD.detach(), torch.empty_like(hidden_UD)
    head_gradients = [torch.zeros_like(weight) for weight in head.parameters]
    stats: list[dict[str, torch.Tensor]] = []

    def gradients_of(logprob_K: torch.Tensor, entropy_K: torch.Tensor, part: slice) -> _Gradients:
        with torch.enable_grad():
            value, parts = loss(logprob_K.requires_grad_(), entropy_K.requires_grad_(), part)
        stats.append(parts)
        logprob_grad_K, entropy_grad_K = torch.autograd.grad(value, [logprob_K, entropy_K], allow_unused=True)
        return logprob_grad_K, entropy_grad_K

    with torch.no_grad():
        of_chunk: Callable[..., _Gradients] = gradients_of
        if loss.by_sequence:
            whole = gradients_of(*head.all_logprobs(values_UD, chunks), slice(0, len(pack.row_K)))
            of_chunk = lambda _, __, part: (whole[0][part], None if whole[1] is None else whole[1][part])  # noqa: E731
        for chunk in chunks:
            gradient_UD[chunk.positions] = head.forward_backward(
                values_UD[chunk.positions], chunk, of_chunk, head_gradients
            )
    torch.autograd.backward([hidden_UD, *head.parameters], [gradient_UD, *head_gradients])
    return stats


def from_logits(model: Any, logits_KV: torch.Tensor, target_K: torch.Tensor) -> torch.Tensor:
    """Log-probs [K] of these tokens, float32, from what the model's output head makes."""
    at_K = torch.arange(len(target_K), device=target_K.device)
    return _Head(causal_of(model), SamplingTransform()).rows_logprobs(logits_KV, at_K, target_K, None)[0]


def _hidden(causal: Any, pack: Pack, head: _Head) -> torch.Tensor:
    """Hidden states [U, D], or [P, D], before the output head. The attention's name is set on the shared configuration
    at each call, and stays for the backward pass, which may recompute layers."""
    causal.config._attn_implementation = NAME if pack.layout is not None else plain_attention(causal)
    extra: dict[str, Any] = {"layout": pack.layout} if pack.layout is not None else {}
    reset_rope(causal)
    output = decoder_of(causal)(
        input_ids=pack.token_ids,
        attention_mask=pack.attention_mask,
        position_ids=pack.position_ids,
        use_cache=False,
        **extra,
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, head.positions(pack))


@dataclass(frozen=True)
class _Chunk:
    """Some of a pack's positions and what they predict, counted from the chunk's own first."""

    positions: slice
    tokens: slice
    at_P: torch.Tensor
    target_P: torch.Tensor
    pair_K: torch.Tensor
    pairs_C: tuple[int, ...]
    """Where each position's pairs start, and P."""


class _Head:
    """The model's output head, what its family does to the logits, and how the sampler drew from them."""

    def __init__(self, causal: Any, transform: SamplingTransform) -> None:
        parts = head_of(causal)
        self.module = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
        self.transform = transform
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._cap, self._scale = behind_head(causal.config)

    def positions(self, pack: Pack) -> torch.Tensor:
        """The places in the pack whose logits are computed. Where tokens are left out, each predicted one has a
        distribution of its own, which it belongs to in any case: a row for each pair."""
        return pack.predict_U[pack.at_P] if self.transform.cuts else pack.predict_U

    def chunks(self, pack: Pack) -> list[_Chunk]:
        ends: Sequence[int] = range(len(pack.target_P) + 1) if self.transform.cuts else pack.pairs_U
        chunks = []
        for first in range(0, len(ends) - 1, self.transform.chunk):
            end = min(first + self.transform.chunk, len(ends) - 1)
            pairs = slice(ends[first], ends[end])
            tokens = slice(pack.tokens_P[pairs.start], pack.tokens_P[pairs.stop])
            target_P = pack.target_P[pairs]
            at_P = (
                torch.arange(end - first, device=target_P.device) if self.transform.cuts else pack.at_P[pairs] - first
            )
            begins = tuple(at - pairs.start for at in ends[first : end + 1])
            chunks.append(_Chunk(slice(first, end), tokens, at_P, target_P, pack.pair_K[tokens] - pairs.start, begins))
        return chunks

    def all_logprobs(self, hidden_UD: torch.Tensor, chunks: Sequence[_Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [K], a chunk at a time."""
        read = [self.chunk_logprobs(self.module(hidden_UD[c.positions]), c, keep=False).of_tokens(c) for c in chunks]
        return torch.cat([logprob_K for logprob_K, _ in read]), torch.cat([entropy_K for _, entropy_K in read])

    def chunk_logprobs(self, logits_CV: torch.Tensor, chunk: _Chunk, keep: bool) -> _ChunkLogprobs:
        """Log-probs and entropies of a chunk. With ``keep`` the probabilities, up to a factor for each row, take the
        place of the logits, or stand beside them where the gradient needs those."""
        kept_CV = torch.empty_like(logits_CV) if keep and self._cap else logits_CV
        rows = ROWS if logits_CV.device.type in IN_ROWS else len(logits_CV)
        columns = []
        for start in range(0, len(logits_CV), rows):
            part = slice(start, min(start + rows, len(logits_CV)))
            pairs = slice(chunk.pairs_C[part.start], chunk.pairs_C[part.stop])
            at_P, target_P = chunk.at_P[pairs] - start, chunk.target_P[pairs]
            columns.append(self.rows_logprobs(logits_CV[part], at_P, target_P, kept_CV[part] if keep else None))
        logprob_P, entropy_C, total_C = (torch.cat(column) for column in zip(*columns, strict=True))
        return _ChunkLogprobs(logprob_P, entropy_C, total_C, logits_CV, kept_CV)

    def rows_logprobs(
        self, logits_CV: torch.Tensor, at_P: torch.Tensor, target_P: torch.Tensor, kept_CV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        transform = self.transform
        scaled_CV = logits_CV.float()
        if self._cap:
            scaled_CV = torch.tanh(scaled_CV / self._cap) * self._cap
        if self._scale != 1.0:
            scaled_CV = scaled_CV * self._scale
        if transform.cuts:
            allowed_CV = process(scaled_CV, transform.temperature, transform.top_p, transform.top_k)
            # The learner's own top-p set can miss a token that the sampler's just held; its log-prob would be -inf.
            # Finite, so that a probability of 0 never meets an infinite logit.
            own_C1 = scaled_CV.gather(1, target_P[:, None]) / transform.temperature
            scaled_CV = allowed_CV.clamp_min_(-1e30).scatter_(1, target_P[:, None], own_C1)
        elif transform.temperature != 1.0:
            scaled_CV = scaled_CV / transform.temperature
        # From here on relative to the largest: exp neither overflows nor loses the sum.
        scaled_CV = scaled_CV - scaled_CV.amax(-1, keepdim=True)
        chosen_P = scaled_CV[at_P, target_P]
        weight_CV = scaled_CV.exp()
        total_C = weight_CV.sum(-1)
        if kept_CV is not None:
            kept_CV.copy_(weight_CV)
        expected_C = weight_CV.mul_(scaled_CV).sum(-1) / total_C
        log_total_C = total_C.log()
        return chosen_P - log_total_C[at_P], log_total_C - expected_C, total_C

    def gradient(
        self, read: _ChunkLogprobs, chunk: _Chunk, logprob_grad_K: torch.Tensor, entropy_grad_K: torch.Tensor | None
    ) -> torch.Tensor:
        """The gradient by the logits [C, V], in the memory of ``read``: with p the probabilities and H the entropy,
        g (1[token] - p) for a log-prob's g, and -h p (log p + H) for an entropy's h, summed over a position's
        tokens."""
        p_CV, at_P, count = read.kept_CV, chunk.at_P, len(read.total_C)
        grad_P = _summed(logprob_grad_K, chunk.pair_K, len(at_P))
        grad_C = _summed(grad_P, at_P, count)
        # The token's own g (1 - p) before anything is rounded: computed separately, the two cancel where p is near 1.
        own_P = -grad_P * torch.expm1(read.logprob_P) - read.logprob_P.exp() * (grad_C[at_P] - grad_P)
        if entropy_grad_K is None:
            p_CV.mul_((-grad_C / read.total_C)[:, None].to(p_CV.dtype))
        else:
            entropy_grad_C = _summed(entropy_grad_K, at_P[chunk.pair_K], count)
            own_P = own_P - entropy_grad_C[at_P] * read.logprob_P.exp() * (read.logprob_P + read.entropy_C[at_P])
            p_CV.div_(read.total_C[:, None].to(p_CV.dtype))
            factor_C = grad_C + entropy_grad_C * read.entropy_C
            p_log_p_CV = torch.xlogy(p_CV, p_CV).mul_(entropy_grad_C[:, None].to(p_CV.dtype))
            p_CV.mul_(-factor_C[:, None].to(p_CV.dtype)).sub_(p_log_p_CV)
        p_CV[at_P, chunk.target_P] = own_P.to(p_CV.dtype)
        if self._cap:
            p_CV.mul_(1 - torch.tanh(read.logits_CV / self._cap).square_())
        factor = self._scale / self.transform.temperature
        return p_CV if factor == 1.0 else p_CV.mul_(factor)

    def forward_backward(
        self, hidden_CD: torch.Tensor, chunk: _Chunk, gradients_of: Callable[..., _Gradients], into: list[torch.Tensor]
    ) -> torch.Tensor:
        """A chunk forward and back: its gradient by ``hidden_CD``; those of the head's own weights are added to
        ``into``."""
        with torch.enable_grad():  # through whatever the head is: a bias, an adapter
            hidden_CD = hidden_CD.detach().requires_grad_()
            logits_CV = self.module(hidden_CD)
        read = self.chunk_logprobs(logits_CV.detach(), chunk, keep=True)
        gradient_CV = self.gradient(read, chunk, *gradients_of(*read.of_tokens(chunk), chunk.tokens))
        grad_CD, *grads = torch.autograd.grad(logits_CV, [hidden_CD, *self.parameters], gradient_CV)
        for total, gradient in zip(into, grads, strict=True):
            total += gradient
        return grad_CD


def _summed(values: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """The sum of the values at each index, none of which is without one; always in the same order."""
    if len(values) == count:
        return values
    sums = values.new_zeros(count)
    # On a GPU only the first sorts before it adds, on a CPU only the second adds in one thread.
    if values.is_cuda:
        return sums.index_put_((index,), values, accumulate=True)
    return sums.index_add_(0, index, values)


@dataclass(frozen=True)
class _ChunkLogprobs:
    logprob_P: torch.Tensor
    entropy_C: torch.Tensor
    total_C: torch.Tensor
    """What the kept weights of a row add up to."""
    logits_CV: torch.Tensor
    kept_CV: torch.Tensor

    def of_tokens(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [K] of the chunk's tokens."""
        return self.logprob_P[chunk.pair_K], self.entropy_C[chunk.at_P[chunk.pair_K]]
