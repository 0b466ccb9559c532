"""Log-probabilities of completion tokens, and their gradients, without ever holding logits for [tokens, vocabulary].

Only positions that predict a completion token reach the output head, a chunk at a time. The backward pass is written
out: of a chunk's logits only the probabilities are kept, in the logits' own memory and number format, and they become
the gradient there. ``score`` computes each chunk once more for that; ``learn``, where a token's loss depends on no
other token, takes the loss in the same pass and saves the second one. Temperature, top-p and top-k are applied as the
sampler applied them, so both sides speak of one distribution. Used by ``learner/learner.py`` for training, for the
reference and for the sync's probe.

Shapes: K predicted tokens, C of them in a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from common.logits import process
from learner.attention import NAME
from learner.families import plain_attention
from learner.model import causal_of
from learner.packing import Pack

ROWS = 32  # of a chunk that the CPU works on at once: their float32 logits then stay in its cache
IN_ROWS = {"cpu"}  # device types that work so

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Log-probs and entropies [C] of some of the pack's tokens, and which: to their part of the loss, and statistics."""


@dataclass(frozen=True)
class Drawn:
    """How the sampler drew, and how much of the head's work is done at once."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    chunk: int = 512
    """Predicted tokens whose logits exist at once."""


def score(model: Any, pack: Pack, drawn: Drawn = Drawn()) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [K] in nats, float32, of the pack's predicted tokens; differentiable where gradients
    are on."""
    causal = causal_of(model)
    head = _Head(causal, drawn)
    hidden_KD = _hidden(causal, pack)
    logprob_K, entropy_K = _Score.apply(head, pack.target_K, hidden_KD, *head.parameters)
    return logprob_K, entropy_K


def learn(model: Any, pack: Pack, loss_of: Loss, drawn: Drawn = Drawn()) -> list[dict[str, torch.Tensor]]:
    """Adds the gradients of this pack's loss to the model's weights; returns the statistics of each chunk.

    ``loss_of`` must be a sum over tokens: it is called with a chunk at a time.
    """
    causal = causal_of(model)
    head = _Head(causal, drawn)
    hidden_KD = _hidden(causal, pack)
    stats: list[dict[str, torch.Tensor]] = []
    loss = _Learn.apply(head, pack.target_K, loss_of, stats, hidden_KD, *head.parameters)
    loss.backward()
    return stats


def _hidden(causal: Any, pack: Pack) -> torch.Tensor:
    """Hidden states [K, D] before the output head. The attention's name is set on the shared configuration at each
    call, and stays for the backward pass, which may recompute layers."""
    causal.config._attn_implementation = NAME if pack.layout is not None else plain_attention(causal)
    extra: dict[str, Any] = {"layout": pack.layout} if pack.layout is not None else {}
    output = causal.get_decoder()(
        input_ids=pack.token_ids,
        attention_mask=pack.attention_mask,
        position_ids=pack.position_ids,
        use_cache=False,
        **extra,
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, pack.predict_K)


class _Head:
    """The model's output head, what its family does to the logits, and how the sampler drew from them."""

    def __init__(self, causal: Any, drawn: Drawn) -> None:
        self.module, self.drawn, config = causal.get_output_embeddings(), drawn, causal.config
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (  # Cohere
            getattr(config, "logits_scaling", None) or 1.0  # Granite
        )

    def chunks(self, count: int) -> list[slice]:
        return [slice(start, start + self.drawn.chunk) for start in range(0, count, self.drawn.chunk)]

    def read(self, logits_CV: torch.Tensor, target_C: torch.Tensor, keep: bool) -> _Read:
        """Log-probs and entropies of a chunk. With ``keep`` the probabilities, up to a factor for each row, take the
        place of the logits, or stand beside them where the gradient needs those."""
        kept_CV = torch.empty_like(logits_CV) if keep and self._cap else logits_CV
        rows = ROWS if logits_CV.device.type in IN_ROWS else len(logits_CV)
        found = []
        for start in range(0, len(logits_CV), rows):
            part = slice(start, start + rows)
            found.append(self._rows(logits_CV[part], target_C[part], kept_CV[part] if keep else None))
        logprob_C, entropy_C, total_C = (torch.cat(column) for column in zip(*found, strict=True))
        return _Read(logprob_C, entropy_C, total_C, logits_CV, kept_CV)

    def _rows(
        self, logits_CV: torch.Tensor, target_C: torch.Tensor, kept_CV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        drawn = self.drawn
        scaled_CV = logits_CV.float()
        if self._cap:
            scaled_CV = torch.tanh(scaled_CV / self._cap) * self._cap
        if self._scale != 1.0:
            scaled_CV = scaled_CV * self._scale
        if drawn.top_p < 1 or drawn.top_k > 0:
            allowed_CV = process(scaled_CV, drawn.temperature, drawn.top_p, drawn.top_k)
            # The learner's own top-p set can miss a token that the sampler's just held; its log-prob would be -inf.
            # Finite, so that a probability of 0 never meets an infinite logit.
            own_C1 = scaled_CV.gather(1, target_C[:, None]) / drawn.temperature
            scaled_CV = allowed_CV.clamp_min_(-1e30).scatter_(1, target_C[:, None], own_C1)
        elif drawn.temperature != 1.0:
            scaled_CV = scaled_CV / drawn.temperature
        # From here on relative to the largest: exp neither overflows nor loses the sum.
        scaled_CV = scaled_CV - scaled_CV.amax(-1, keepdim=True)
        chosen_C = scaled_CV.gather(1, target_C[:, None])[:, 0]
        weight_CV = scaled_CV.exp()
        total_C = weight_CV.sum(-1)
        if kept_CV is not None:
            kept_CV.copy_(weight_CV)
        expected_C = weight_CV.mul_(scaled_CV).sum(-1) / total_C
        log_total_C = total_C.log()
        return chosen_C - log_total_C, log_total_C - expected_C, total_C

    def gradient(
        self, read: _Read, target_C: torch.Tensor, logprob_grad_C: torch.Tensor, entropy_grad_C: torch.Tensor | None
    ) -> torch.Tensor:
        """The gradient by the logits [C, V], in the memory of ``read``: with p the probabilities and H the entropy,
        g (1[token] - p) for a log-prob's g, and -h p (log p + H) for an entropy's h."""
        p_CV = read.kept_CV
        # The token's own g (1 - p) before anything is rounded: taken apart, the two cancel where p is near 1.
        own_C = -logprob_grad_C * torch.expm1(read.logprob_C)
        if entropy_grad_C is None:
            p_CV.mul_((-logprob_grad_C / read.total_C)[:, None].to(p_CV.dtype))
        else:
            own_C = own_C - entropy_grad_C * read.logprob_C.exp() * (read.logprob_C + read.entropy_C)
            p_CV.div_(read.total_C[:, None].to(p_CV.dtype))
            factor_C = logprob_grad_C + entropy_grad_C * read.entropy_C
            p_log_p_CV = torch.xlogy(p_CV, p_CV).mul_(entropy_grad_C[:, None].to(p_CV.dtype))
            p_CV.mul_(-factor_C[:, None].to(p_CV.dtype)).sub_(p_log_p_CV)
        p_CV.scatter_(1, target_C[:, None], own_C[:, None].to(p_CV.dtype))
        if self._cap:
            p_CV.mul_(1 - torch.tanh(read.logits_CV / self._cap).square_())
        factor = self._scale / self.drawn.temperature
        return p_CV if factor == 1.0 else p_CV.mul_(factor)

    def chunk(
        self, hidden_CD: torch.Tensor, target_C: torch.Tensor, gradients_of: _GradientsOf, into: list[torch.Tensor]
    ) -> tuple[_Read, torch.Tensor]:
        """A chunk forward and back: what was read, and its gradient by ``hidden_CD``; those of the head's own weights
        are added to ``into``."""
        with torch.enable_grad():  # through whatever the head is: a bias, an adapter
            hidden_CD = hidden_CD.detach().requires_grad_()
            logits_CV = self.module(hidden_CD)
        values_CV = logits_CV.detach()
        read = self.read(values_CV, target_C, keep=True)
        gradient_CV = self.gradient(read, target_C, *gradients_of(read.logprob_C, read.entropy_C))
        grad_CD, *grads = torch.autograd.grad(logits_CV, [hidden_CD, *self.parameters], gradient_CV)
        for total, one in zip(into, grads, strict=True):
            total += one
        return read, grad_CD


@dataclass(frozen=True)
class _Read:
    logprob_C: torch.Tensor
    entropy_C: torch.Tensor
    total_C: torch.Tensor
    """What the kept weights of a row add up to."""
    logits_CV: torch.Tensor
    kept_CV: torch.Tensor


_GradientsOf: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


class _Score(torch.autograd.Function):
    """(head, target_K, hidden_KD, the head's own weights) to log-probs and entropies [K]."""

    @staticmethod
    def forward(ctx: Any, head: _Head, target_K: torch.Tensor, hidden_KD: torch.Tensor, *weights: torch.Tensor) -> Any:
        ctx.head = head
        ctx.save_for_backward(target_K, hidden_KD, *weights)
        ctx.set_materialize_grads(False)
        read = [
            head.read(head.module(hidden_KD[part]), target_K[part], keep=False) for part in head.chunks(len(target_K))
        ]
        return torch.cat([one.logprob_C for one in read]), torch.cat([one.entropy_C for one in read])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        target_K, hidden_KD, *weights = ctx.saved_tensors
        logprob_K, entropy_K = gradients
        if logprob_K is None:
            logprob_K = torch.zeros_like(target_K, dtype=torch.float32)
        totals = [torch.zeros_like(weight) for weight in weights]
        hidden = []
        for part in ctx.head.chunks(len(target_K)):
            wanted = (logprob_K[part], None if entropy_K is None else entropy_K[part])
            _, grad_CD = ctx.head.chunk(hidden_KD[part], target_K[part], lambda *_, wanted=wanted: wanted, totals)
            hidden.append(grad_CD)
        return None, None, torch.cat(hidden), *totals


class _Learn(torch.autograd.Function):
    """The loss, whose gradients are made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, head: _Head, target_K: torch.Tensor, loss_of: Loss, stats: list[Any], hidden_KD: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        totals = [torch.zeros_like(weight) for weight in weights]
        hidden = torch.empty_like(hidden_KD)
        losses = []

        for part in head.chunks(len(target_K)):

            def gradients_of(logprob_C: torch.Tensor, entropy_C: torch.Tensor, part: slice = part) -> Any:
                with torch.enable_grad():
                    loss, seen = loss_of(logprob_C.requires_grad_(), entropy_C.requires_grad_(), part)
                losses.append(loss.detach())
                stats.append(seen)
                return torch.autograd.grad(loss, [logprob_C, entropy_C], allow_unused=True)

            _, hidden[part] = head.chunk(hidden_KD[part], target_K[part], gradients_of, totals)
        ctx.save_for_backward(hidden, *totals)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # The loss is the end of the graph and its gradient 1: nothing is multiplied.
        hidden, *totals = ctx.saved_tensors
        return None, None, None, None, hidden, *totals
