"""What the checks of the sampler contract share: the sampler under test, requests to it, and how an answer is held to
the reference. The checks are in sampler/conformance/suite.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from common.device import dtype_of
from common.errors import UserError
from common.protocols import Sampler, WeightHandle
from common.sampling_filters import process
from common.tokenizer import decode, end_of_sequence_ids, load_tokenizer
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from sampler.conformance.reference import ReferenceModel, Tensors, forced, frequent, handle_of

# Shapes: T tokens, V vocabulary.

TOLERANCE = {"float32": 2e-4, "float16": 0.01, "bfloat16": 0.08}
"""Largest allowed mean |sampler - reference| log-prob, in nats (a sampler in bfloat16 is right at 0.03 to 0.045)."""
OUTLIER = 15
"""How many times that a single token may be off: rounding has a long tail."""
WAIT_S = 600.0
"""Seconds that one request may take."""
LONG = "Which number is larger, 17 or 9? Think first, then answer in one short line. The answer is "


class ContractError(AssertionError):
    """A check failed; ``check`` is its name in ``CHECKS``."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class ExpectationError(Exception):
    """What was expected and what came, in one sentence."""


def expect_equal(what: str, got: object, wanted: object) -> None:
    """Raises ``ExpectationError``, which names both, unless they are equal."""
    if got != wanted:
        shown, right = (text if len(text := repr(value)) < 500 else f"{text[:500]}..." for value in (got, wanted))
        raise ExpectationError(f"{what}: expected {right}, got {shown}")


def expect_at_most(what: str, got: float, limit: float) -> None:
    """As ``expect_equal``, for a number with a limit."""
    if not got <= limit:
        raise ExpectationError(f"{what}: expected at most {limit:.4f}, got {got:.4f}")


class Harness:
    """The sampler under test (made when first needed), the reference, and the folder's weights.

    ``make_handle(tensors, kind, adapter_config)`` makes the handle through which weights are sent; by default they are
    shared within this process. A sampler elsewhere needs another. ``UserError`` for a folder that names no end of
    sequence.
    """

    def __init__(
        self,
        make: Callable[[SamplerSetup], Sampler],
        model_folder: str | Path,
        dtype: str = "float32",
        device: str = "cpu",
        tolerance: float | None = None,
        max_model_tokens: int = 192,
        make_handle: Callable[..., WeightHandle] = handle_of,
    ) -> None:
        self.tokenizer = load_tokenizer(str(model_folder))
        named = end_of_sequence_ids(model_folder, self.tokenizer)
        if not named:
            raise UserError(f"{str(model_folder)!r} names no end-of-sequence token; the checks need a folder with one")
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        free = [token for token in sorted(added) if added[token].special and token not in named]
        self.setup = SamplerSetup(
            end_tokens=tuple(free[1:2]),
            model_folder=str(model_folder),
            dtype=dtype,
            max_model_tokens=max_model_tokens,
            max_sequences=64,
            device=device,
        )
        self.tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
        self.end_ids = named + self.setup.end_tokens
        self.tag = next(iter(free), None)
        """A special token that ends nothing, if there is one."""
        self.reference = ReferenceModel(str(model_folder))
        self.base = {name: tensor.to(dtype_of(dtype), copy=True) for name, tensor in self.reference.weights()}
        self.served: Tensors = self.base
        """The weights that are to be served now."""
        self.version = 0
        self.takes_adapters: bool | None = None
        """As the sampler declares it; None until one was made."""
        self._make, self._make_handle = make, make_handle
        self._sampler: Sampler | None = None

    @property
    def sampler(self) -> Sampler:
        return self.start(self.setup) if self._sampler is None else self._sampler

    def start(self, setup: SamplerSetup) -> Sampler:
        """A sampler from ``setup``, in the place of the one there (two may not fit on a device)."""
        self.close()
        self._sampler = self._make(setup)
        self.takes_adapters = self._sampler.takes_adapters
        return self._sampler

    def load(
        self, tensors: Tensors, adapter_config: Mapping[str, Any] | None = None, served: Tensors | None = None
    ) -> str:
        """Sends these weights as the next version; returns the fingerprint that the sampler gives back. ``served``:
        the whole weights that come of it, where these are an adapter's or will be overwritten."""
        self.version += 3  # not 1: a sampler that counts its own loads instead of taking the number is seen
        self.served = tensors if served is None else served
        kind = "full" if adapter_config is None else "adapter"
        return self.sampler.load_weights(self._make_handle(tensors, kind, adapter_config), self.version)

    def load_forced(self, text: str, token_ids: Sequence[int]) -> None:
        """Loads weights under which the model writes just these tokens after ``text``."""
        self.load(forced(self.reference, self.base, self.encode(text), token_ids))

    def load_likely_end(self, text: str, probability: float) -> None:
        """Loads weights under which the end of sequence has about this probability everywhere, as after ``text``."""
        self.load(frequent(self.reference, self.base, self.end_ids[0], self.encode(text), probability))

    def ask(self, prompts: Sequence[Prompt | str], **params: Any) -> Request:
        """Asks for completions of prompts or texts."""
        asked = [
            self.prompt(prompt, f"p{index}") if isinstance(prompt, str) else prompt
            for index, prompt in enumerate(prompts)
        ]
        sampling = SamplingParams(**params)
        return Request(self, asked, sampling, self.sampler.generate(asked, sampling), self.version, self.served)

    def generate(self, prompts: Sequence[Prompt | str], **params: Any) -> list[Group]:
        return self.ask(prompts, **params).future.result(timeout=WAIT_S)

    def prompt(self, text: str, name: str = "") -> Prompt:
        return Prompt(name or text, ({"role": "user", "content": text},), text=text, token_ids=self.encode(text))

    def long_prompt(self, tokens: int) -> Prompt:
        ids = self.encode(LONG)
        return Prompt(f"{tokens} tokens", (), token_ids=(ids * (tokens // len(ids) + 1))[:tokens])

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self.tokenizer, token_ids)

    def up_to(self, token_ids: Sequence[int], stop: str) -> tuple[Sequence[int], str]:
        """The first tokens in whose text ``stop`` is found, and that text as far as its end."""
        count = next(count for count in range(len(token_ids)) if stop in self.decode(token_ids[: count + 1]))
        return token_ids[: count + 1], self.decode(token_ids).partition(stop)[0] + stop

    def expect_no_faults(self, digest: str) -> None:
        """What ``check_weights``, if the sampler has it, says of the last transfer."""
        check = getattr(self.sampler, "check_weights", None)
        expect_equal(f"faults that check_weights finds in version {self.version}", check(digest) if check else [], [])

    def expect_logprobs(self, when: str) -> None:
        """``Sampler.logprobs`` is right on sequences of several lengths, given in no order."""
        long = self.long_prompt(60).token_ids
        sequences = [long[:17], self.encode("naïve 日本語 🙂 über"), long, long[:2], long[:1], long[5:40]]
        answers = self.sampler.logprobs(sequences)
        lengths = [len(ids) - 1 for ids in sequences]
        expect_equal(f"lengths of the answers of logprobs {when}", [len(answer) for answer in answers], lengths)
        off = []
        for ids, answer in zip(sequences, answers, strict=True):
            for logprob, right in zip(answer, self.reference.logprobs(self.served, ids), strict=True):
                off.append(abs(logprob - right))
                what = f"log-prob {logprob:.4f} where {right:.4f} is right, in {len(ids)} tokens {when}, nats off"
                expect_at_most(what, off[-1], OUTLIER * self.tolerance)
        expect_at_most(f"log-probs {when}, mean nats off", sum(off) / len(off), self.tolerance)

    def expect_written(
        self, prompts: Sequence[Prompt | str], ids: Sequence[int], text: str, reason: str, **params: Any
    ) -> None:
        """The completions of the first prompt are just these tokens, with a log-prob for each."""
        for completion in self.generate(prompts, **params)[0].completions:
            got = (completion.token_ids, len(completion.logprobs), completion.text, completion.finish_reason)
            what = f"tokens, number of log-probs, text and finish reason with {params}"
            expect_equal(what, got, (tuple(ids), len(ids), text, reason))

    def close(self) -> None:
        if self._sampler is not None:
            sampler, self._sampler = self._sampler, None
            sampler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Request:
    """A request, and the weights that are to write its answer."""

    harness: Harness
    prompts: Sequence[Prompt]
    params: SamplingParams
    future: Future[list[Group]]
    version: int
    tensors: Tensors

    def expect_answer(self, when: str = "") -> list[Group]:
        """The answer: whole groups in the prompts' order, written by the right weights alone, each token inside the
        distribution that it should be drawn from and with that distribution's log-prob."""
        groups = self.future.result(timeout=WAIT_S)
        expect_equal(f"prompts of the groups {when}", [group.prompt for group in groups], list(self.prompts))
        counts = [len(group.completions) for group in groups]
        expect_equal(f"completions of each group {when}", counts, [self.params.n] * len(groups))
        versions = {(completion.policy_version, completion.token_versions) for completion in completions_of(groups)}
        expect_equal(f"versions of the weights that wrote the completions {when}", versions, {(self.version, ())})
        off = []
        for group in groups:
            for completion in group.completions:
                self._expect_whole(completion, when)
                off += self._expect_drawn(group.prompt, completion, when)
        expect_at_most(f"log-probs {when}with {self.params}, mean nats off", sum(off) / len(off), self._tolerance)
        return groups

    @property
    def _tolerance(self) -> float:
        return self.harness.tolerance / (self.params.temperature or 1)

    def _expect_whole(self, completion: Completion, when: str) -> None:
        """Without stop strings it is ended by its last token, after ``min_tokens``, or is cut at ``max_tokens``."""
        ids, length = completion.token_ids, len(completion.token_ids)
        ends = [place for place, token in enumerate(ids) if token in self.harness.end_ids]
        expect_equal(f"log-probs of {length} tokens {when}", len(completion.logprobs), length)
        expect_equal(f"a completion with tokens {when}", length > 0, True)
        right = ([length - 1], "stop") if ends and length > self.params.min_tokens else ([], "length")
        expect_equal(f"places of ends and finish reason of {ids} {when}", (ends, completion.finish_reason), right)
        if not ends:
            expect_equal(f"tokens of a completion without an end {when}", length, self.params.max_tokens)

    def _expect_drawn(self, prompt: Prompt, completion: Completion, when: str) -> list[float]:
        """Returns by how many nats each token's log-prob is off. Rounding may move the cut where the probability summed
        so far comes close to top-p: the widest and the narrowest cut that it allows give a range."""
        params, tolerance = self.params, self.harness.tolerance
        logits_TV = self.harness.reference.logits(self.tensors, prompt.token_ids + completion.token_ids)[0]
        logits_TV = logits_TV[len(prompt.token_ids) - 1 : -1] / (params.temperature or 1)
        logits_TV[: params.min_tokens, list(self.harness.end_ids)] = -torch.inf
        slack = tolerance if params.top_p < 1 else 0.0
        wide_TV, narrow_TV = (
            process(logits_TV, 1.0, params.top_p + change, params.top_k) for change in (slack, -slack)
        )
        kept_TV = wide_TV if params.temperature else process(logits_TV, top_k=1)
        logit_T = logits_TV.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        below_T = kept_TV.masked_fill(kept_TV == -torch.inf, torch.inf).amin(-1) - logit_T
        low_T = logit_T - wide_TV.logsumexp(-1)
        high_T = (logit_T - narrow_TV.logsumexp(-1)).clamp(max=0)
        drawn_T = torch.tensor(completion.logprobs)
        off_T = torch.maximum(low_T - drawn_T, drawn_T - high_T).clamp(min=0)
        for place, token in enumerate(completion.token_ids):
            where = f"token {token} at place {place} of a completion of {prompt.id!r} {when}with {params}"
            expect_at_most(f"{where}, nats below the cut", below_T[place].item(), OUTLIER * self._tolerance)
            what = f"{where}, log-prob {drawn_T[place]:.4f} where {low_T[place]:.4f} to {high_T[place]:.4f} is right"
            expect_at_most(f"{what}, nats off", off_T[place].item(), OUTLIER * self._tolerance)
        return off_T.tolist()


def completions_of(groups: Sequence[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def tokens_of(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions_of(groups)]
