"""Our back ends keep the sampler contract, and the contract finds every way to break it that is written down here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import RunFailure, UserError
from common.protocols import GroupsFuture, Sampler, WeightHandle
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from sampler.conformance import CHECKS, ContractError, Harness, check_sampler
from sampler.hf import HfSampler
from tests.tiny import make_tiny


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads, and far slower where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the contract holds ------------------------------------------------------------------------------------------------


def _make_hf(setup: SamplerSetup) -> Sampler:
    return HfSampler(setup, batch_size=24)  # less than max_sequences: a request takes several batches


def _make_vllm(setup: SamplerSetup) -> Sampler:
    from sampler.engine.vllm import VllmSampler

    return VllmSampler(setup)


_BACK_ENDS = [
    pytest.param((_make_hf, "llama", True, "float32"), id="hf-llama-tied-float32"),
    pytest.param((_make_hf, "llama", False, "float32"), id="hf-llama-untied-float32"),
    pytest.param((_make_hf, "mistral", False, "float32"), id="hf-mistral-untied-float32"),
    pytest.param((_make_hf, "qwen2", True, "bfloat16"), id="hf-qwen2-tied-bfloat16"),
    pytest.param((_make_vllm, "llama", True, "float32"), id="vllm-llama-tied-float32", marks=pytest.mark.vllm),
    pytest.param((_make_vllm, "qwen2", False, "bfloat16"), id="vllm-qwen2-untied-bfloat16", marks=pytest.mark.vllm),
]


@pytest.fixture(scope="module", params=_BACK_ENDS)
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    make, family, tied, dtype = request.param
    if make is _make_vllm:
        pytest.importorskip("vllm")
    folder = make_tiny(tmp_path_factory.mktemp("model"), tied=tied, family=family)
    with Harness(make, folder, dtype=dtype) as harness:
        yield harness


@pytest.mark.parametrize("name", CHECKS)
def test_contract(harness: Harness, name: str) -> None:
    CHECKS[name](harness)


# -- the contract finds what breaks it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


class _Edited(HfSampler):
    """Changes completions after they were written."""

    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        return one

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        groups = super().generate(prompts, params).result()
        return _done(Group(g.prompt, tuple(self.edit(g.prompt, one, params) for one in g.completions)) for g in groups)

    def rescored(self, prompt: Prompt, one: Completion, temperature: float) -> tuple[float, ...]:
        with torch.no_grad():
            logits_TV = self.model(input_ids=torch.tensor([prompt.token_ids + one.token_ids])).logits[0]
        logprobs_TV = (logits_TV / temperature).log_softmax(-1)[len(prompt.token_ids) - 1 : -1]
        return tuple(logprobs_TV.gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0].tolist())


def _done(groups: Any) -> Future[list[Group]]:
    future: Future[list[Group]] = Future()
    future.set_result(list(groups))
    return future


class FixedFingerprint(HfSampler):
    def load_weights(self, handle: WeightHandle, version: int) -> str:
        super().load_weights(handle, version)
        return "loaded"


class LogprobsShifted(HfSampler):
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[0.0, *row[:-1]] if row else [] for row in super().logprobs(sequences)]


class LogprobsSortedByLength(HfSampler):
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return super().logprobs(sorted(sequences, key=len))


class IgnoresWeights(HfSampler):
    """Stale for good, though it names what arrived."""

    def _load_full(self, tensors: Any) -> None:
        for _ in tensors:
            pass


class DropsNorms(HfSampler):
    """Loses a few small tensors of each transfer."""

    def _load_full(self, tensors: Any) -> None:
        held = {name: tensor.clone() for name, tensor in self._targets.items() if "layernorm" in name}
        super()._load_full((name, held.get(name, tensor)) for name, tensor in tensors)


class KeepsHead(HfSampler):
    """The output head of a tied model stays at its first values."""

    def __init__(self, setup: SamplerSetup) -> None:
        super().__init__(setup)
        self.model.lm_head.weight = nn.Parameter(self.model.lm_head.weight.detach().clone())


class KeepsReferences(HfSampler):
    """Serves the lent tensors themselves."""

    def _load_full(self, tensors: Any) -> None:
        for name, tensor in tensors:
            self._targets[name].data = tensor


class CountsVersions(HfSampler):
    """Stamps the number of loads."""

    loads = 0

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self.loads += 1
        return super().load_weights(handle, self.loads)


class UnprocessedLogprobs(_Edited):
    """Log-probs of the logits as they are, whatever was drawn from."""

    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        return replace(one, logprobs=self.rescored(prompt, one, 1.0))


class UncutLogprobs(_Edited):
    """Divides by the temperature and forgets top-p and top-k."""

    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        return replace(one, logprobs=self.rescored(prompt, one, params.temperature or 1.0))


class ShiftedLogprobs(_Edited):
    """Each log-prob is its neighbour's."""

    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        return replace(one, logprobs=(*one.logprobs[1:], one.logprobs[0]))


class TopPOnly(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return super().generate(prompts, replace(params, top_k=0))


class TooHot(_Edited):
    """Draws at another temperature than it says, with the log-probs that belong to what it says."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        if params.top_p < 1 or params.top_k or not params.temperature:
            return HfSampler.generate(self, prompts, params)
        groups = HfSampler.generate(self, prompts, replace(params, temperature=1.4 * params.temperature)).result()
        return _done(
            Group(
                g.prompt,
                tuple(replace(one, logprobs=self.rescored(g.prompt, one, params.temperature)) for one in g.completions),
            )
            for g in groups
        )


class OtherOrder(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return _done(reversed(super().generate(prompts, params).result()))


class SwapsPrompts(HfSampler):
    """The groups are in order, their completions are not."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        groups = super().generate(prompts, params).result()
        return _done(Group(own.prompt, other.completions) for own, other in zip(groups, reversed(groups), strict=True))


class OneDraw(HfSampler):
    """A group of copies."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        if params.max_tokens == 1:  # or the check of frequencies would see it first
            return super().generate(prompts, params)
        groups = super().generate(prompts, replace(params, n=1)).result()
        return _done(Group(g.prompt, g.completions * params.n) for g in groups)


class NeverGreedy(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return super().generate(prompts, replace(params, temperature=params.temperature or 1.0))


class IgnoresSeed(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return super().generate(prompts, replace(params, seed=None))


class AlwaysSeeded(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return super().generate(prompts, replace(params, seed=params.seed or 0))


class Late(HfSampler):
    """Writes when the answer is fetched, with the weights of that moment."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        ask = super().generate

        class Lazy(Future[list[Group]]):
            def result(self, timeout: float | None = None) -> list[Group]:
                return ask(prompts, params).result()

        return Lazy()


class IgnoresOffset(HfSampler):
    """Every part of a request draws as its beginning does."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return super().generate(prompts, replace(params, seed_offset=0))


class IgnoresOffsetAndSaysSo(IgnoresOffset):
    seeds_prompts = False


class OffsetInRows(HfSampler):
    """Counts on by completions instead of prompts."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return super().generate(prompts, replace(params, seed_offset=params.seed_offset * params.n))


class AnswersInTurn(HfSampler):
    """Whoever asks first for an answer gets the oldest."""

    def __init__(self, setup: SamplerSetup) -> None:
        super().__init__(setup)
        self.answers: list[list[Group]] = []

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        self.answers.append(super().generate(prompts, params).result())
        answers = self.answers

        class Next(Future[list[Group]]):
            def result(self, timeout: float | None = None) -> list[Group]:
                return answers.pop(0)

        return Next()


class Pumped(HfSampler):
    """Keeps the contract: works a request at a time when it is pumped, and before anything that must come after."""

    def __init__(self, setup: SamplerSetup) -> None:
        super().__init__(setup)
        self.todo: list[tuple[Future[list[Group]], Sequence[Prompt], SamplingParams]] = []

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        self._check_prompts(prompts, params)
        work = self.work

        class Working(Future[list[Group]]):
            def result(self, timeout: float | None = None) -> list[Group]:
                while not self.done() and timeout != 0:
                    work()
                return super().result(timeout=0)

        self.todo.append((Working(), prompts, params))
        return self.todo[-1][0]

    def work(self) -> None:
        if self.todo:
            future, prompts, params = self.todo.pop(0)
            future.set_result(HfSampler.generate(self, prompts, params).result())

    def pump(self) -> bool:
        self.work()
        return bool(self.todo)

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        while self.todo:
            self.work()
        return super().load_weights(handle, version)


class SwapsInFlight(Pumped):
    """Takes weights while requests wait."""

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        return HfSampler.load_weights(self, handle, version)


class SwapsAndStampsOld(SwapsInFlight):
    """As before, and names the version of the day that was asked on."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        future = super().generate(prompts, params)
        self.asked_at = {**getattr(self, "asked_at", {}), id(future): self.version}
        return future

    def work(self) -> None:
        if self.todo:
            now, self.version = self.version, self.asked_at[id(self.todo[0][0])]
            super().work()
            self.version = now


class WaitsForOne(Pumped):
    """Takes weights once the oldest request is done."""

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self.work()
        return HfSampler.load_weights(self, handle, version)


class PumpDoesNothing(Pumped):
    """Works only when an answer is fetched."""

    def pump(self) -> bool:
        return False


class NeverIdle(Pumped):
    """Says that work is left when none is."""

    def pump(self) -> bool:
        self.work()
        return True


class WorksAtOnce(Pumped):
    """Has a pump and does not wait for it."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        future = super().generate(prompts, params)
        self.work()
        return future


class DropsEnd(_Edited):
    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        if len(one.token_ids) > 1 and one.token_ids[-1] in self.end_ids:
            return replace(one, token_ids=one.token_ids[:-1], logprobs=one.logprobs[:-1])
        return one


class OneEnd(HfSampler):
    """Knows the tokenizer's end-of-sequence token only."""

    def __init__(self, setup: SamplerSetup) -> None:
        super().__init__(setup)
        self.end_ids = self.end_ids[:1]


class IgnoresEndTokens(HfSampler):
    """Knows the model folder's end tokens only, not those of the setup."""

    def __init__(self, setup: SamplerSetup) -> None:
        super().__init__(replace(setup, end_tokens=()))


class HidesSpecialTokens(_Edited):
    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        whole = self._decode(one.token_ids[:-1]) == one.text and one.finish_reason == "stop"
        return replace(one, text=self.tokenizer.decode(one.token_ids, skip_special_tokens=True)) if whole else one


class NoSpecialStop(HfSampler):
    """Looks for stop strings in a text without special tokens."""

    def _text_if_ended(self, ids: list[int], params: SamplingParams) -> str | None:
        return super()._text_if_ended(ids, replace(params, stop=tuple(stop for stop in params.stop if "<" not in stop)))


class HidesEmpty(_Edited):
    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        if one.text or params.max_tokens < 6:  # shorter requests belong to earlier checks, which may meet one by chance
            return one
        return replace(one, token_ids=(), logprobs=())


class PadsGroup(HfSampler):
    """Completions of a group are padded to the longest."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        groups = super().generate(prompts, params).result()
        if params.max_tokens < 20:  # shorter requests belong to earlier checks, which may meet an end by chance
            return _done(groups)
        padded = []
        for group in groups:
            width = max(len(one.token_ids) for one in group.completions)
            padded.append(
                Group(
                    group.prompt,
                    tuple(
                        replace(
                            one,
                            token_ids=one.token_ids + (0,) * (width - len(one.token_ids)),
                            logprobs=one.logprobs + (0.0,) * (width - len(one.token_ids)),
                        )
                        for one in group.completions
                    ),
                )
            )
        return _done(padded)


class OneTooMany(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        if params.n > 1:
            return super().generate(prompts, params)
        return super().generate(prompts, replace(params, max_tokens=params.max_tokens + 1))


class CutsStopText(HfSampler):
    """The stop string, and with it a tag that a reward looks for, is no part of the text."""

    def _text_if_ended(self, ids: list[int], params: SamplingParams) -> str | None:
        text = super()._text_if_ended(ids, params)
        if text and params.stop:
            text = text.removesuffix(next(stop for stop in params.stop if text.endswith(stop)))
        return text


class EndsEarly(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return super().generate(prompts, replace(params, min_tokens=0))


class StopsEarly(HfSampler):
    """Keeps end-of-sequence tokens back, but not stop strings."""

    def _text_if_ended(self, ids: list[int], params: SamplingParams) -> str | None:
        return super()._text_if_ended(ids, replace(params, min_tokens=0))


class DecodesEachToken(_Edited):
    """Characters of several tokens are lost."""

    def edit(self, prompt: Prompt, one: Completion, params: SamplingParams) -> Completion:
        whole = self._decode(one.token_ids) == one.text
        return replace(one, text="".join(self._decode([token]) for token in one.token_ids)) if whole else one


class CutsPrompt(HfSampler):
    """Makes room without a word."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        room = self.setup.max_model_tokens - params.max_tokens
        groups = super().generate([replace(p, token_ids=p.token_ids[-room:]) for p in prompts], params).result()
        return _done(Group(prompt, group.completions) for prompt, group in zip(prompts, groups, strict=True))


class FailsLater(HfSampler):
    """The error of a prompt too long comes with the answer."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        try:
            return super().generate(prompts, params)
        except UserError as error:
            future: Future[list[Group]] = Future()
            future.set_exception(error)
            return future


class WakesOld(HfSampler):
    """Waking puts back the weights that it fell asleep with."""

    def sleep(self) -> None:
        self.kept = {name: tensor.detach().clone() for name, tensor in self._targets.items()}
        super().sleep()

    def wake(self, part: Any = "all") -> None:
        super().wake(part)
        with torch.no_grad():
            for name, tensor in self._targets.items():
                tensor.copy_(self.kept[name])


class IgnoresAdapter(HfSampler):
    def load_weights(self, handle: WeightHandle, version: int) -> str:
        arrived = super().load_weights(handle, version)
        if handle.kind == "adapter":
            self.use_adapter(False)
        return arrived


class FirstAdapterOnly(HfSampler):
    adapters = 0

    def _load_adapter(self, tensors: Any, config: Any) -> None:
        self.adapters += 1
        tensors = list(tensors)
        if self.adapters == 1:
            super()._load_adapter(tensors, config)


class ChecksWithTheFirst(HfSampler):
    """Takes the weights, and goes on comparing them with those of its first transfer."""

    first: Any = None

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        digest = super().load_weights(handle, version)
        self.first = self.first or self._arrived
        return digest

    def check_weights(self, fingerprint: str) -> list[str]:
        self._arrived = self.first
        return super().check_weights(fingerprint)


class ClosesOnce(HfSampler):
    def close(self) -> None:
        if self.model is None:
            raise RunFailure("closed already")
        super().close()


_WRONG: list[tuple[Callable[[SamplerSetup], Sampler], str]] = [
    (FixedFingerprint, "fingerprint"),
    (LogprobsShifted, "logprobs"),
    (LogprobsSortedByLength, "logprobs"),
    (IgnoresWeights, "weights"),
    (DropsNorms, "weights"),
    (KeepsHead, "output_head"),
    (KeepsReferences, "lent_tensors"),
    (ChecksWithTheFirst, "check_weights"),
    (CountsVersions, "versions"),
    (UnprocessedLogprobs, "logprobs_temperature"),
    (ShiftedLogprobs, "logprobs_temperature"),
    (SwapsPrompts, "logprobs_temperature"),
    (UncutLogprobs, "logprobs_top_p_top_k"),
    (TopPOnly, "logprobs_top_p_top_k"),
    (TooHot, "distribution"),
    (OtherOrder, "groups"),
    (OneDraw, "groups"),
    (NeverGreedy, "greedy"),
    (IgnoresSeed, "seed"),
    (AlwaysSeeded, "seed"),
    (IgnoresOffset, "seed_offset"),
    (IgnoresOffsetAndSaysSo, "seed_offset"),
    (OffsetInRows, "seed_offset"),
    (Late, "ordering"),
    (SwapsInFlight, "ordering"),
    (SwapsAndStampsOld, "ordering"),
    (AnswersInTurn, "in_flight"),
    (WaitsForOne, "in_flight"),
    (PumpDoesNothing, "pump"),
    (NeverIdle, "pump"),
    (WorksAtOnce, "pump"),
    (DropsEnd, "end_of_sequence"),
    (OneEnd, "end_of_sequence"),
    (IgnoresEndTokens, "end_of_sequence"),
    (HidesEmpty, "empty"),
    (PadsGroup, "ragged"),
    (OneTooMany, "length"),
    (CutsStopText, "stop_strings"),
    (EndsEarly, "min_tokens"),
    (StopsEarly, "min_tokens"),
    (DecodesEachToken, "text"),
    (HidesSpecialTokens, "special_tokens"),
    (NoSpecialStop, "special_tokens"),
    (CutsPrompt, "too_long"),
    (FailsLater, "too_long"),
    (WakesOld, "sleep_wake"),
    (IgnoresAdapter, "adapter"),
    (FirstAdapterOnly, "adapter"),
    (ClosesOnce, "close"),
]

# These go through the checks before their own as well: the first that fails names the cause.
_IN_ORDER = (KeepsHead, ShiftedLogprobs, IgnoresAdapter)


@pytest.mark.parametrize(("make", "check"), _WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_contract_finds(make: Callable[[SamplerSetup], Sampler], check: str, tiny: Path) -> None:
    with pytest.raises(ContractError) as caught, Harness(make, tiny) as harness:
        check_sampler(make, tiny) if make in _IN_ORDER else CHECKS[check](harness)
    assert caught.value.check == check, str(caught.value)
    assert "expected" in str(caught.value)
    assert "got" in str(caught.value)


def test_every_check_has_a_sampler_that_fails_it() -> None:
    assert {check for _, check in _WRONG} == set(CHECKS)


@pytest.mark.parametrize("make", [HfSampler, Pumped])
def test_check_sampler_passes_a_good_one(make: Callable[[SamplerSetup], Sampler], tiny: Path) -> None:
    check_sampler(make, tiny)


class ReportsInTheWrongPlace(HfSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        groups, future = super().generate(prompts, params).result(), GroupsFuture()
        for index, group in enumerate(groups):
            future.group_done(len(groups) - 1 - index, group)
        future.set_result(groups)
        return future


def test_groups_reported_otherwise_than_answered_are_found(tiny: Path) -> None:
    with (
        Harness(ReportsInTheWrongPlace, tiny) as harness,
        pytest.raises(ContractError, match="reported as they are answered"),
    ):
        CHECKS["groups"](harness)


def test_vllm_reports_a_group_before_the_others_are_written(harness: Harness) -> None:
    """The first prompt's completions take every place in the engine, so that the second's can only end later."""
    if not hasattr(harness.sampler, "pump"):
        pytest.skip("writes inside generate")
    prompts = [harness.prompt("a word"), harness.prompt("and another")]
    future = harness.sampler.generate(prompts, SamplingParams(n=harness.setup.max_sequences, max_tokens=6))
    assert isinstance(future, GroupsFuture)
    steps: list[int] = []
    reported: list[tuple[int, Group, int]] = []
    future.on_group(lambda index, group: reported.append((index, group, len(steps))))
    while not future.done():
        steps.append(harness.sampler.pump())
    assert [index for index, _, _ in reported] == [0, 1]
    assert reported[0][2] < reported[1][2]
    assert all(group is future.result()[index] for index, group, _ in reported)
