"""A sampler that returns scripted answers: the readable fake for tests of everything around a sampler.

Completions come from a table or a function, but weights and versions are real: it stamps the version it was given and,
where the model folder exists, computes ``logprobs`` with the weights it holds (through ``HfSampler``): the proof of a
sync runs on it. ``fault`` breaks that in one known way. Left out: drawing, and requests in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from common.errors import RunFailure, UserError
from common.protocols import WeightHandle
from common.sampling_filters import logprobs_of, process
from common.tokenizer import check_room, decode
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import Fingerprint, InProcessWeights
from sampler.hf import HfSampler

Answer: TypeAlias = str | Sequence[int]
"""Text (encoded with the folder's tokenizer, its end-of-sequence token added; without one, as UTF-8 bytes), or tokens
as they are."""
Answers: TypeAlias = Mapping[str, Sequence[Answer]] | Callable[[Prompt, int], Answer]
"""Completions by prompt id or text, taken in turn and then from the start again; or a function that gives a prompt's
k-th completion (k counts on over calls)."""
Fault: TypeAlias = Literal["stale", "stale_head", "ignore_adapter", "corrupt"]
"""``stale``: reports that it loaded, and keeps the old weights. ``stale_head``: the output head stays the first one (a
tied one becomes a copy). ``ignore_adapter``: takes the adapter and serves the base. ``corrupt``: the first tensor is
altered in one number on its way."""


class ScriptedSampler:
    """Returns ``answers``, or ``default`` for a prompt that the table lacks; the folder need not exist.

    ``logprobs``: one number for every token, a function of prompt and tokens, or ``"model"`` for those of the weights
    held. ``calls`` lists what it was asked, in order: ``("generate", prompt ids, params)``,
    ``("load_weights", kind, version)``, ``("logprobs", count)``, ``("sleep",)``, ``("wake", part)``, ``("close",)``.
    ``received`` holds copies of the tensors of the last transfer as they arrived.
    """

    takes_adapters = True
    seeds_prompts = False
    """Lines are taken in turn by each replica for itself, whatever the seed."""

    def __init__(
        self,
        setup: SamplerSetup,
        answers: Answers | None = None,
        default: Sequence[Answer] = ("",),
        logprobs: float | Literal["model"] | Callable[[Prompt, Sequence[int]], Sequence[float]] = -1.0,
        fault: Fault | None = None,
    ) -> None:
        if fault is not None and fault not in get_args(Fault):
            raise UserError(f"sampler.options.fault={fault!r} is none of {', '.join(get_args(Fault))}")
        self.setup = setup
        self.version = 0
        self.calls: list[tuple[Any, ...]] = []
        self.received: dict[str, torch.Tensor] = {}
        self._answers: Answers = answers or {}
        self._default, self._logprobs, self._fault = default, logprobs, fault
        self._turns: dict[str, Iterator[int]] = {}
        self._closed = False
        self._engine = HfSampler(setup) if (Path(setup.model_folder) / "config.json").is_file() else None
        if self._engine is not None and fault == "stale_head":
            # The engine keeps writing to the tensors that it took note of when it was made; the head no longer is one.
            head = self._engine.model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        self._note("generate", tuple(prompt.id for prompt in prompts), params)
        check_room(prompts, params.max_tokens, self.setup.max_model_tokens)
        groups = [Group(prompt, tuple(self._completion(prompt, params) for _ in range(params.n))) for prompt in prompts]
        future: Future[list[Group]] = Future()
        future.set_result(groups)
        return future

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._note("logprobs", len(sequences))
        return self._model().logprobs(sequences)

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self._note("load_weights", handle.kind, version)
        arrived = Fingerprint(handle.adapter_config)
        tensors = _corrupted(handle.open()) if self._fault == "corrupt" else handle.open()
        self.received = {name: tensor.detach().clone() for name, tensor in arrived.watch(tensors)}
        if self._engine is not None and self._fault != "stale":
            mine = InProcessWeights(handle.kind, lambda: iter(self.received.items()), handle.adapter_config)
            self._engine.load_weights(mine, version)
            if handle.kind == "adapter" and self._fault == "ignore_adapter":
                self._engine.use_adapter(False)
        self.version = version
        return arrived.digest()

    def sleep(self) -> None:
        self._note("sleep")

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        self._note("wake", part)

    def close(self) -> None:
        self.calls.append(("close",))
        self._closed = True
        if self._engine is not None:
            self._engine.close()

    def _note(self, *call: Any) -> None:
        if self._closed:
            raise RunFailure(f"the scripted sampler was asked to {call[0]} after it was closed")
        self.calls.append(call)

    def _model(self) -> HfSampler:
        if self._engine is None:
            raise RunFailure(
                f"the scripted sampler cannot compute log-probs: there is no model in {self.setup.model_folder!r}"
            )
        return self._engine

    def _completion(self, prompt: Prompt, params: SamplingParams) -> Completion:
        turns = self._turns.setdefault(prompt.id, count())
        turn = next(turns) if params.min_tokens < params.max_tokens else 0  # a rehearsal takes none of the answers
        if callable(self._answers):
            answer = self._answers(prompt, turn)
        else:
            lines = self._answers.get(prompt.id) or self._answers.get(prompt.text) or self._default
            answer = lines[turn % len(lines)]
        ids = self._encode(answer) if isinstance(answer, str) else tuple(answer)
        if len(ids) < params.min_tokens:
            answer = ids = self._repeated(ids, params.min_tokens)
        kept = ids[: params.max_tokens]
        return Completion(
            token_ids=kept,
            text=answer if isinstance(answer, str) and kept == ids else self._decode(kept),
            logprobs=self._logprobs_of(prompt, kept, params),
            finish_reason="stop" if kept == ids else "length",
            policy_version=self.version,
        )

    def _repeated(self, ids: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """An answer that is too short, repeated to the length and then ended as it was."""
        ends = self._engine.end_ids if self._engine is not None else ()
        words = tuple(token for token in ids if token not in ends) or (0,)
        return (words * tokens)[:tokens] + tuple(token for token in ids[-1:] if token in ends)

    def _encode(self, text: str) -> tuple[int, ...]:
        if self._engine is None:
            return tuple(text.encode())
        return (*self._engine.tokenizer.encode(text, add_special_tokens=False), *self._engine.end_ids[:1])

    def _decode(self, ids: Sequence[int]) -> str:
        if self._engine is None:
            return bytes(token % 256 for token in ids).decode(errors="replace")
        ended = ids[-1:] and ids[-1] in self._engine.end_ids
        return decode(self._engine.tokenizer, ids[:-1] if ended else ids)

    def _logprobs_of(self, prompt: Prompt, ids: Sequence[int], params: SamplingParams) -> tuple[float, ...]:
        if isinstance(self._logprobs, int | float):
            return (float(self._logprobs),) * len(ids)
        if callable(self._logprobs):
            return tuple(self._logprobs(prompt, ids))
        with torch.no_grad():
            inputs_1T = torch.tensor([[*prompt.token_ids, *ids]], device=self.setup.device)
            logits_TV = self._model().model(input_ids=inputs_1T, use_cache=False).logits[0]
            logits_TV = logits_TV[len(prompt.token_ids) - 1 : -1]
            logits_TV = process(logits_TV, params.temperature or 1.0, params.top_p, params.top_k)
            return tuple(logprobs_of(logits_TV, inputs_1T[0, len(prompt.token_ids) :]).tolist())


def _corrupted(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (name, tensor) in enumerate(tensors):
        if index == 0:
            tensor = tensor.detach().clone()
            tensor.view(-1)[0] += 1
        yield name, tensor
