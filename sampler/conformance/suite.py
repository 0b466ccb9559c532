"""The sampler contract (``common.protocols.Sampler``) as tests, for our back ends and for anyone else's.

As one call, which raises ``ContractError`` with the name of the first check that fails::

    check_sampler(lambda setup: MySampler(setup, my_option=3), "path/to/a/model")

or a test for each check, on one sampler that all of them share::

    @pytest.fixture(scope="module")
    def harness():
        with Harness(MySampler, "path/to/a/model") as harness:
            yield harness

    @pytest.mark.parametrize("name", CHECKS)
    def test_contract(harness, name):
        CHECKS[name](harness)

The truth is a float32 forward of the same model through transformers on the CPU: one sequence at a time, no cache, no
padding. Every check first loads the folder's own weights, so they may run in any order; in ``CHECKS``' order the more
basic come first, so that the first failure names the cause. Where a check needs a certain completion it sends weights
that make the model write it. Left out: speed, memory, and what happens when a machine dies.

Any causal model folder with a tokenizer will do; a small random one is best (real ones repeat themselves).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, Self

import torch

from common.device import dtype_of
from common.errors import UserError
from common.protocols import GroupsFuture, Sampler, WeightHandle
from common.tokenizer import decode, end_of_sequence_ids, load_tokenizer
from common.types import AdapterSpec, Completion, Group, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import fingerprint
from sampler.conformance.reference import Lora, ReferenceModel, Tensors, forced, frequent, handle_of, perturbed

# Shapes: T tokens, V vocabulary.

TOLERANCE = {"float32": 2e-4, "float16": 0.01, "bfloat16": 0.08}
"""Largest allowed mean |sampler - truth| log-prob, in nats (a sampler in bfloat16 is right at 0.03 to 0.045)."""
OUTLIER = 15
"""How many times that a single token may be off: rounding has a long tail."""
WAIT_S = 600.0
"""Seconds that one request may take."""

SHORT, MIDDLE = "7", "3 7 1 9 4"
UNICODE = "naïve 日本語 🙂 über"
LONG = "Which number is larger, 17 or 9? Think first, then answer in one short line. The answer is "


class ContractError(AssertionError):
    """A check failed; ``check`` is its name in ``CHECKS``."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class Harness:
    """What the checks share: the sampler under test (made when first needed), the truth, and the folder's weights.

    ``offer(tensors, kind, adapter_config)`` makes the handle through which weights are sent; by default they are lent
    in this process. A sampler elsewhere needs another.
    """

    def __init__(
        self,
        make: Callable[[SamplerSetup], Sampler],
        model_folder: str | Path,
        dtype: str = "float32",
        device: str = "cpu",
        tolerance: float | None = None,
        max_model_tokens: int = 192,
        offer: Callable[..., WeightHandle] | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(str(model_folder))
        named = end_of_sequence_ids(model_folder, self.tokenizer)
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
        self.version = 0
        self._takes_adapters: bool | None = None
        self._make = make
        self._offer: Callable[..., Any] = offer or handle_of
        self._sampler: Sampler | None = None

    @property
    def sampler(self) -> Sampler:
        if self._sampler is None:
            self._sampler = self._make(self.setup)
            self._takes_adapters = self._sampler.takes_adapters
        return self._sampler

    @property
    def takes_adapters(self) -> bool:
        """As the sampler last made said; asking again may mean another start."""
        return self.sampler.takes_adapters if self._takes_adapters is None else self._takes_adapters

    def remake(self, setup: SamplerSetup) -> Sampler:
        """Closes the shared sampler (two may not fit on a device) and makes one from ``setup`` in its place."""
        self.close()
        self._sampler = self._make(setup)
        return self._sampler

    def load(
        self,
        tensors: Tensors,
        kind: Literal["full", "adapter"] = "full",
        adapter_config: Mapping[str, Any] | None = None,
    ) -> str:
        """Sends these weights as the next version; returns the fingerprint that the sampler gives back."""
        self.version += 3  # not 1: a sampler that counts its own loads instead of taking the number is seen
        return self.sampler.load_weights(self._offer(tensors, kind, adapter_config), self.version)

    def request(self, prompts: Sequence[Prompt], **params: Any) -> Future[list[Group]]:
        return self.sampler.generate(prompts, SamplingParams(**params))

    def generate(self, prompts: Sequence[Prompt], **params: Any) -> list[Group]:
        return self.request(prompts, **params).result(timeout=WAIT_S)

    def prompt(self, text: str, name: str = "") -> Prompt:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return Prompt(name or text, ({"role": "user", "content": text},), text=text, token_ids=ids)

    def long_prompt(self, tokens: int) -> Prompt:
        ids = self.prompt(LONG).token_ids
        return Prompt(f"{tokens} tokens", (), token_ids=(ids * (tokens // len(ids) + 1))[:tokens])

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self.tokenizer, token_ids)

    def close(self) -> None:
        if self._sampler is not None:
            sampler, self._sampler = self._sampler, None
            sampler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- the checks ----------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Harness], None]] = {}
"""Every check by name, the more basic first. Each raises ``ContractError``."""


class _ExpectationError(Exception):
    """What was expected and what came, in one sentence."""


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise _ExpectationError(message)


def _check(body: Callable[[Harness], None]) -> Callable[[Harness], None]:
    name = body.__name__.removeprefix("_check_")

    @wraps(body)
    def run(harness: Harness) -> None:
        try:
            if name != "adapter":  # which makes a sampler of its own
                harness.load(harness.base)
            body(harness)
        except _ExpectationError as broken:
            raise ContractError(name, str(broken)) from None
        except Exception as error:
            raise ContractError(name, f"expected no exception, got {type(error).__name__}: {error}") from error

    CHECKS[name] = run
    return run


def check_sampler(make: Callable[[SamplerSetup], Sampler], model_folder: str | Path, **settings: Any) -> None:
    """Runs every check on the sampler that ``make`` makes; ``settings`` are ``Harness``'s.

    Raises ``ContractError`` with the name of the first check that fails.
    """
    with Harness(make, model_folder, **settings) as harness:
        for run in CHECKS.values():
            run(harness)


@_check
def _check_fingerprint(harness: Harness) -> None:
    """``load_weights`` returns the fingerprint of what was sent, of other weights another one."""
    for tensors in (harness.base, perturbed(harness.base, seed=1)):
        sent, got = fingerprint(iter(tensors.items())), harness.load(tensors)
        _expect(got == sent, f"expected the fingerprint of the tensors sent, {sent}, got {got}")


@_check
def _check_logprobs(harness: Harness) -> None:
    """``logprobs`` of sequences of many lengths, in their order, at temperature 1."""
    _expect_logprobs(harness, harness.base, "under the folder's weights")


@_check
def _check_weights(harness: Harness) -> None:
    """Every tensor but the output head's (the next check): all are changed, and the log-probs follow, and back."""
    for seed in (1, 2):
        head = harness.reference.head_name
        tensors = {**perturbed(harness.base, seed), head: harness.base[head]}
        harness.load(tensors)
        _expect_logprobs(harness, tensors, f"after load_weights of changed weights (seed {seed})")
    harness.load(harness.base)
    _expect_logprobs(harness, harness.base, "after load_weights of the first weights again")


@_check
def _check_output_head(harness: Harness) -> None:
    """The output head follows, also where it is tied to the embedding and arrives under that name only."""
    tensors = dict(harness.base)
    name = harness.reference.head_name
    scale_V = torch.linspace(0.5, 1.5, tensors[name].shape[0])
    tensors[name] = (tensors[name].float() * scale_V[:, None]).to(tensors[name].dtype)
    harness.load(tensors)
    kind = "tied" if harness.reference.is_tied else "untied"
    _expect_logprobs(harness, tensors, f"after load_weights with other rows in the {kind} output head {name!r}")


@_check
def _check_lent_tensors(harness: Harness) -> None:
    """Tensors are only lent: what their owner does to them after ``load_weights`` changes nothing here."""
    tensors = perturbed(harness.base, seed=3)
    lent = {name: tensor.clone() for name, tensor in tensors.items()}
    harness.load(lent)
    for tensor in lent.values():
        tensor.zero_()
    _expect_logprobs(harness, tensors, "after the lent tensors were overwritten by their owner")


@_check
def _check_check_weights(harness: Harness) -> None:
    """Where there is ``check_weights``: right weights are found right, one load after another."""
    for tensors in (harness.base, perturbed(harness.base, seed=4)):
        _expect_no_faults(harness, harness.load(tensors), "of full weights")


@_check
def _check_versions(harness: Harness) -> None:
    """Every completion carries the version of the weights that wrote it, as given to ``load_weights``."""
    prompts = [harness.prompt(SHORT), harness.prompt(MIDDLE)]
    for _ in range(2):
        _expect_version(harness.generate(prompts, n=2, max_tokens=2), harness.version)
        harness.load(harness.base)


@_check
def _check_logprobs_temperature(harness: Harness) -> None:
    """Log-probs of the distribution drawn from, at a temperature other than 1."""
    params = SamplingParams(n=4, max_tokens=16, temperature=0.7, seed=1)
    _expect_drawn_logprobs(harness, harness.base, [harness.prompt(MIDDLE), harness.prompt(LONG)], params)


@_check
def _check_logprobs_top_p_top_k(harness: Harness) -> None:
    """Log-probs of the distribution drawn from, cut by top-p, by top-k and by both; no token from outside the cut."""
    for cut in ({"top_p": 0.8}, {"top_k": 20}, {"top_p": 0.8, "top_k": 20}):
        params = SamplingParams(n=4, max_tokens=16, temperature=0.7, seed=2, **cut)
        _expect_drawn_logprobs(harness, harness.base, [harness.prompt(MIDDLE), harness.prompt(LONG)], params)


@_check
def _check_distribution(harness: Harness) -> None:
    """First tokens come as often as their probabilities say: a loose chi-square bound over 512 draws."""
    prompt, draws = harness.prompt(LONG), 512
    logits_V = harness.reference.logits(harness.base, prompt.token_ids)[0][-1]
    expected_V = draws * (logits_V / 0.7).softmax(-1)
    counts_V = torch.zeros_like(expected_V)
    for seed in range(draws // 64):
        for one in harness.generate([prompt], n=64, max_tokens=1, temperature=0.7, seed=seed)[0].completions:
            _expect(len(one.token_ids) == 1, f"expected 1 token with max_tokens=1, got {one.token_ids}")
            counts_V[one.token_ids[0]] += 1
    common_V = expected_V >= 5  # rarer tokens are counted together, as the test asks
    expected = torch.cat([expected_V[common_V], expected_V[~common_V].sum()[None]])
    counted = torch.cat([counts_V[common_V], counts_V[~common_V].sum()[None]])
    statistic = ((counted - expected) ** 2 / expected.clamp(min=1)).sum().item()
    freedom = len(expected) - 1
    bound = freedom + 5 * (2 * freedom) ** 0.5 + 5
    _expect(
        statistic < bound,
        f"expected first tokens as often as their probabilities (chi-square below {bound:.1f} at {freedom} degrees of "
        f"freedom), got {statistic:.1f}: counts {_short(counted)} for expected {_short(expected)}",
    )


@_check
def _check_groups(harness: Harness) -> None:
    """One group for each prompt, in their order, of ``n`` completions that are not copies of each other."""
    texts = (LONG, SHORT, MIDDLE + LONG, UNICODE, MIDDLE)
    prompts = [harness.prompt(text, name=f"p{index}") for index, text in enumerate(texts)]
    params = SamplingParams(n=6, max_tokens=10, seed=3)
    future = harness.sampler.generate(prompts, params)
    reported: dict[int, Group] = {}
    if isinstance(future, GroupsFuture):
        future.on_group(reported.__setitem__)
    groups = future.result(timeout=WAIT_S)
    same = not isinstance(future, GroupsFuture) or reported == dict(enumerate(groups))
    _expect(same, f"expected each group reported as it is answered, got reports of {sorted(reported)} or other groups")
    asked, got = [prompt.id for prompt in prompts], [group.prompt.id for group in groups]
    _expect(got == asked, f"expected one group for each prompt in the order {asked}, got {got}")
    for group, prompt in zip(groups, prompts, strict=True):
        _expect(group.prompt == prompt, f"expected prompt {prompt.id!r} unchanged in its group, got {group.prompt}")
        count = len(group.completions)
        _expect(count == params.n, f"expected {params.n} completions in the group of {prompt.id!r}, got {count}")
        kinds = len({one.token_ids for one in group.completions})
        _expect(kinds > params.n // 2, f"expected {params.n} separate draws for {prompt.id!r}, got {kinds} that differ")
    _expect_scores(harness, harness.base, groups, params, "in a request with prompts of different lengths, ")


@_check
def _check_greedy(harness: Harness) -> None:
    """Temperature 0: the likeliest token each time, log-probs of temperature 1, twice the same."""
    prompts = [harness.prompt(SHORT), harness.prompt(LONG), harness.prompt(MIDDLE)]
    first, again = (harness.generate(prompts, max_tokens=12, temperature=0, seed=1) for _ in range(2))
    for group in first:
        one = group.completions[0]
        logits_TV = harness.reference.logits(harness.base, group.prompt.token_ids + one.token_ids)[0]
        for place, token in enumerate(one.token_ids, start=len(group.prompt.token_ids) - 1):
            behind = (logits_TV[place].max() - logits_TV[place, token]).item()
            _expect(
                behind <= OUTLIER * harness.tolerance,
                f"expected the likeliest token {int(logits_TV[place].argmax())} at temperature 0, got {token}, "
                f"which is {behind:.4f} nats behind",
            )
    _expect_scores(harness, harness.base, first, SamplingParams(temperature=1.0), "at temperature 0, ")
    _expect(_tokens(first) == _tokens(again), "expected equal greedy requests to give equal tokens, got others")


@_check
def _check_seed(harness: Harness) -> None:
    """A seed fixes the request whatever came before it; another seed, or none, draws others; rows draw separately."""
    prompts = [harness.prompt(MIDDLE, "a"), harness.prompt(LONG, "b"), harness.prompt(MIDDLE, "c")]
    params = {"n": 4, "max_tokens": 12}
    first = harness.generate(prompts, seed=11, **params)
    free = [_tokens(harness.generate(prompts, **params)) for _ in range(2)]
    harness.sampler.logprobs([prompts[0].token_ids])
    again = harness.generate(prompts, seed=11, **params)
    other = harness.generate(prompts, seed=12, **params)
    _expect(_tokens(first) == _tokens(again), "expected the same tokens for the same seed, got others")
    apart = max(
        (
            abs(x - y)
            for one, two in zip(_flat(first), _flat(again), strict=True)
            for x, y in zip(one.logprobs, two.logprobs, strict=True)
        ),
    )
    _expect(
        apart <= harness.tolerance, f"expected the same log-probs for the same seed, got some {apart:.4f} nats apart"
    )
    _expect(_tokens(first) != _tokens(other), "expected other tokens for another seed, got the same")
    _expect(free[0] != free[1], "expected fresh draws for seed=None, got the same tokens twice")
    same, twin = ([one.token_ids for one in first[index].completions] for index in (0, 2))
    _expect(same != twin, "expected separate draws for two equal prompts in one request, got the same tokens")


@_check
def _check_seed_offset(harness: Harness) -> None:
    """Parts of a request draw separately; where the back end ``seeds_prompts``, just as they would in the whole."""
    texts = (MIDDLE, LONG, UNICODE, SHORT, MIDDLE + LONG, LONG, MIDDLE, SHORT)
    prompts = [harness.prompt(text, name=f"p{index}") for index, text in enumerate(texts)]
    params: dict[str, Any] = {"n": 4, "max_tokens": 8, "seed": 13}
    one, other = (_tokens(harness.generate(prompts[:2], **params, seed_offset=offset)) for offset in (0, 2))
    _expect(one != other, "expected separate draws for two parts of a request (seed_offset 0 and 2), got the same")
    if not getattr(harness.sampler, "seeds_prompts", False):
        return
    whole = _tokens(harness.generate(prompts, **params))
    for cut in (1, 5):
        parts = harness.generate(prompts[:cut], **params) + harness.generate(prompts[cut:], **params, seed_offset=cut)
        # Other neighbours in a batch round otherwise, which may move a draw, and then all that follow it.
        moved = sum(mine != right for mine, right in zip(_tokens(parts), whole, strict=True))
        allowed = int(len(whole) * min(0.5, params["max_tokens"] * harness.tolerance))
        _expect(
            moved <= allowed,
            f"expected the completions of a request cut after prompt {cut} to be those of the whole (but for "
            f"{allowed}), got {moved} others of {len(whole)}",
        )


@_check
def _check_ordering(harness: Harness) -> None:
    """generate, load_weights, generate: the first is by the old weights, the second by the new, nothing left over."""
    old, new = perturbed(harness.base, seed=4), perturbed(harness.base, seed=5)
    harness.load(old)
    prompts, params = [harness.prompt(LONG), harness.long_prompt(100)], SamplingParams(n=4, max_tokens=8, seed=4)
    before, version = harness.sampler.generate(prompts, params), harness.version
    harness.load(new)
    after = harness.sampler.generate(prompts, params)
    for request, stamp, tensors, when in (
        (before, version, old, "asked for before load_weights, "),
        (after, harness.version, new, "asked for after load_weights, "),
    ):
        groups = request.result(timeout=WAIT_S)
        _expect_version(groups, stamp)
        _expect_scores(harness, tensors, groups, params, when)


@_check
def _check_in_flight(harness: Harness) -> None:
    """Several requests before any answer is fetched: each gets its own whatever the order, with ``logprobs`` and
    ``load_weights`` between; the old weights write them."""
    old, new = perturbed(harness.base, seed=8), perturbed(harness.base, seed=9)
    harness.load(old)
    version = harness.version
    requests = [
        ([harness.prompt(LONG), harness.prompt(SHORT)], SamplingParams(n=3, max_tokens=12, seed=21)),
        ([harness.prompt(MIDDLE)], SamplingParams(n=2, max_tokens=5, temperature=0.7, seed=22)),
        ([harness.prompt(UNICODE), harness.prompt(MIDDLE), harness.prompt(LONG)], SamplingParams(max_tokens=16)),
    ]
    futures = [harness.sampler.generate(prompts, params) for prompts, params in requests]
    _expect_logprobs(harness, old, "with requests in flight")
    harness.load(new)
    for place in (2, 0, 1):
        prompts, params = requests[place]
        _expect_answer(harness, futures[place], prompts, params, version, old, f"of request {place} of 3 in flight")
    _expect_logprobs(harness, new, "after load_weights with requests in flight")


@_check
def _check_pump(harness: Harness) -> None:
    """Where there is ``pump``: ``generate`` returns at once, ``pump`` alone does the work, and requests join others."""
    pump: Callable[[], bool] | None = getattr(harness.sampler, "pump", None)
    if pump is None:
        return
    requests = [
        ([harness.prompt(LONG), harness.prompt(MIDDLE)], SamplingParams(n=2, max_tokens=12, seed=31)),
        ([harness.prompt(UNICODE)], SamplingParams(n=3, max_tokens=8, temperature=0.7, seed=32)),
    ]
    idle = not pump()
    _expect(idle, "expected pump to say False with nothing asked for, got True")
    futures = []
    for prompts, params in requests:
        futures.append(harness.sampler.generate(prompts, params))
        _expect(not futures[-1].done(), "expected generate to return before its work is done, got a future done")
        _expect(_times_out(futures[-1]), "expected TimeoutError from result(timeout=0) of work not done, got none")
        pump()
    end = time.monotonic() + WAIT_S
    while not all(future.done() for future in futures) and time.monotonic() < end and pump():
        pass
    left = sum(not future.done() for future in futures)
    _expect(left == 0, f"expected pump alone to do the work, got {left} of {len(futures)} requests not done at its end")
    _expect(not pump(), "expected pump to say False once all work is done, got True")
    for future, (prompts, params) in zip(futures, requests, strict=True):
        _expect_answer(harness, future, prompts, params, harness.version, harness.base, "of work done by pump")


@_check
def _check_end_of_sequence(harness: Harness) -> None:
    """Each end-of-sequence token, and each of ``SamplerSetup.end_tokens``, ends a completion: kept with its log-prob,
    not in the text, ``stop`` even as the last token allowed."""
    _expect(bool(harness.end_ids), "cannot run: the model folder names no end-of-sequence token")
    prompt, words = harness.prompt(MIDDLE), harness.prompt("ab").token_ids
    for end in harness.end_ids:
        ids = (*words, end)
        harness.load(_forced(harness, prompt, ids))
        for room in (8, 0):
            for one in harness.generate([prompt], n=3, max_tokens=len(ids) + room)[0].completions:
                _expect_completion(one, ids, harness.decode(words), "stop", f"with end-of-sequence token {end}")


@_check
def _check_empty(harness: Harness) -> None:
    """A completion that ends at once is that one token and no text."""
    _expect(bool(harness.end_ids), "cannot run: the model folder names no end-of-sequence token")
    prompts = [harness.prompt(MIDDLE), harness.prompt(LONG)]
    harness.load(_forced(harness, prompts[0], harness.end_ids[:1]))
    groups = harness.generate(prompts, n=3, max_tokens=6)  # beside a prompt whose completions go on
    for one in groups[0].completions:
        _expect_completion(one, harness.end_ids[:1], "", "stop", "that ends at once")


@_check
def _check_ragged(harness: Harness) -> None:
    """Completions of one request that end at different places: each whole, with nothing after its end."""
    _expect(bool(harness.end_ids), "cannot run: the model folder names no end-of-sequence token")
    prompts = [harness.prompt(LONG), harness.prompt(MIDDLE), harness.prompt(UNICODE)]
    params = SamplingParams(n=8, max_tokens=20, temperature=1.0, seed=8)
    tensors = frequent(harness.reference, harness.base, harness.end_ids[0], prompts[0].token_ids, probability=0.1)
    harness.load(tensors)
    groups = harness.sampler.generate(prompts, params).result(timeout=WAIT_S)
    _expect_scores(harness, tensors, groups, params)
    for one in _flat(groups):
        ends = [place for place, token in enumerate(one.token_ids) if token in harness.end_ids]
        last = len(one.token_ids) - 1
        _expect(
            ends in ([], [last]),
            f"expected no token after an end-of-sequence token, got it at {ends} with the last at {last}",
        )
        whole = one.finish_reason == "stop" if ends else (one.finish_reason, last + 1) == ("length", params.max_tokens)
        _expect(
            whole,
            f"expected each completion to end with an end-of-sequence token or after {params.max_tokens} tokens, got "
            f"{one.token_ids} with finish reason {one.finish_reason!r}",
        )
    lengths = len({len(one.token_ids) for one in _flat(groups)})
    _expect(
        lengths > 3, f"expected completions of more than 3 lengths with a likely end-of-sequence token, got {lengths}"
    )


@_check
def _check_length(harness: Harness) -> None:
    """Cut at exactly ``max_tokens``, finish reason ``length``."""
    prompt, words = harness.prompt(MIDDLE), harness.prompt("abcdefghij").token_ids
    harness.load(_forced(harness, prompt, words))
    for limit in (1, len(words) - 1):
        one = harness.generate([prompt], max_tokens=limit)[0].completions[0]
        _expect_completion(one, words[:limit], harness.decode(words[:limit]), "length", f"with max_tokens={limit}")


@_check
def _check_stop_strings(harness: Harness) -> None:
    """A stop string ends a completion: the text ends with it, its tokens are kept, later ones not made."""
    prompt, ids = harness.prompt(MIDDLE), harness.prompt("abcdefghij").token_ids
    harness.load(_forced(harness, prompt, ids))
    for stop in (("fg",), ("none of it", "c")):
        here = stop[-1]
        kept = next(ids[:count] for count in range(1, len(ids) + 1) if here in harness.decode(ids[:count]))
        text = harness.decode(kept)
        one = harness.generate([prompt], max_tokens=len(ids), stop=stop)[0].completions[0]
        _expect_completion(one, kept, text[: text.index(here) + len(here)], "stop", f"with stop={stop}")


@_check
def _check_min_tokens(harness: Harness) -> None:
    """No end before ``min_tokens`` tokens, by an end-of-sequence token or a stop string; both count again after."""
    _expect(bool(harness.end_ids), "cannot run: the model folder names no end-of-sequence token")
    prompts = [harness.prompt(LONG), harness.prompt(MIDDLE)]
    tensors = frequent(harness.reference, harness.base, harness.end_ids[0], prompts[0].token_ids, probability=0.5)
    harness.load(tensors)
    for least, most in ((5, 20), (6, 6)):
        params = SamplingParams(n=8, max_tokens=most, min_tokens=least, seed=9)
        groups = harness.sampler.generate(prompts, params).result(timeout=WAIT_S)
        _expect_scores(harness, tensors, groups, params, f"with min_tokens={least}, ")
        for one in _flat(groups):
            early = [place for place in range(len(one.token_ids[:least])) if one.token_ids[place] in harness.end_ids]
            _expect(
                not early and len(one.token_ids) >= least,
                f"expected no end before {least} tokens, got {len(one.token_ids)} tokens with ends at {early}",
            )
        ended = sum(one.finish_reason == "stop" for one in _flat(groups))
        _expect(
            (ended > 0) == (least < most),
            f"expected ends after min_tokens={least} and none at max_tokens={most}, got {ended} of {2 * params.n}",
        )
    prompt, ids = harness.prompt(MIDDLE), harness.prompt("abcdefghij").token_ids
    harness.load(_forced(harness, prompt, ids))
    reach = {one: next(n for n in range(len(ids) + 1) if one in harness.decode(ids[:n])) for one in "cg"}
    for stop, count, text, reason in (
        (("c",), len(ids), harness.decode(ids), "length"),
        (("c", "g"), reach["g"], harness.decode(ids).partition("g")[0] + "g", "stop"),
    ):
        asked = {"max_tokens": len(ids), "min_tokens": reach["c"], "stop": stop}
        one = harness.generate([prompt], **asked)[0].completions[0]
        _expect_completion(one, ids[:count], text, reason, f"with {asked}")


@_check
def _check_text(harness: Harness) -> None:
    """The text is what the tokenizer makes of the tokens, in any script."""
    prompt, ids = harness.prompt(MIDDLE), harness.prompt("é日🙂").token_ids
    harness.load(_forced(harness, prompt, ids))
    one = harness.generate([prompt], max_tokens=len(ids))[0].completions[0]
    _expect_completion(one, ids, harness.decode(ids), "length", "of characters of two, three and four bytes")
    harness.load(harness.base)
    for one in _flat(harness.generate([harness.prompt(UNICODE)], n=8, max_tokens=12, seed=5)):
        ids = one.token_ids[:-1] if one.token_ids[-1] in harness.end_ids else one.token_ids
        # A character cut in half at the very end may be shown as a replacement mark or left out.
        got, expected = one.text.rstrip("\ufffd"), harness.decode(ids).rstrip("\ufffd")
        _expect(got == expected, f"expected the text {expected!r} of tokens {one.token_ids}, got {got!r}")


@_check
def _check_special_tokens(harness: Harness) -> None:
    """A special token that ends nothing is part of the text: it may be a tag that the task asks for. It can be a stop
    string, too, and then ends the text."""
    if harness.tag is None:
        return
    prompt, end = harness.prompt(MIDDLE), harness.end_ids[:1]
    words, more = harness.prompt("ab").token_ids, harness.prompt("cd").token_ids
    ids = (*words, harness.tag, *more, *end)
    harness.load(_forced(harness, prompt, ids))
    text = harness.decode(ids[: len(ids) - len(end)])
    one = harness.generate([prompt], max_tokens=len(ids))[0].completions[0]
    _expect_completion(one, ids, text, "stop" if end else "length", "with a special token inside")
    tag = harness.decode([harness.tag])
    if text.startswith(harness.decode(words) + tag):
        kept = ids[: len(words) + 1]
        one = harness.generate([prompt], max_tokens=len(ids), stop=(tag,))[0].completions[0]
        _expect_completion(one, kept, harness.decode(kept), "stop", f"with the special token {tag!r} as a stop string")


@_check
def _check_too_long(harness: Harness) -> None:
    """A prompt that leaves no room is refused at once, with its length and the limit; one that just fits is not."""
    limit = harness.setup.max_model_tokens
    fits, too_long = harness.long_prompt(limit - 4), harness.long_prompt(limit - 3)
    message = None
    try:
        harness.request([harness.prompt(SHORT), too_long], max_tokens=4)
    except UserError as error:
        message = str(error)
    _expect(
        message is not None, f"expected UserError at once for {limit - 3} + 4 tokens with room for {limit}, got none"
    )
    for number in (limit - 3, limit):
        _expect(str(number) in str(message), f"expected the number {number} in the error's text, got {message!r}")
    count = len(harness.generate([fits], max_tokens=4)[0].completions)
    _expect(count == 1, f"expected 1 completion for {limit - 4} + 4 tokens with room for {limit}, got {count}")


@_check
def _check_sleep_wake(harness: Harness) -> None:
    """After sleep, wake and load_weights it serves as before, woken in two parts or at once."""
    prompts, params = [harness.prompt(LONG), harness.prompt(SHORT)], SamplingParams(n=2, max_tokens=8, seed=6)
    for seed, parts in enumerate((("weights", "cache"), ("all", None)), start=6):
        harness.sampler.sleep()
        harness.sampler.wake(parts[0])  # type: ignore[arg-type]
        tensors = perturbed(harness.base, seed)
        harness.load(tensors)
        if parts[1]:
            harness.sampler.wake(parts[1])  # type: ignore[arg-type]
        groups = harness.sampler.generate(prompts, params).result(timeout=WAIT_S)
        _expect_version(groups, harness.version)
        _expect_scores(harness, tensors, groups, params, f"after sleep and wake({parts[0]!r}), ")


@_check
def _check_close(harness: Harness) -> None:
    """Closing twice is allowed."""
    sampler = harness.sampler
    harness.close()
    sampler.close()


@_check
def _check_adapter(harness: Harness) -> None:
    """Where ``takes_adapters``: a LoRA adapter is served on the folder's base, and so is the next one."""
    if not harness.takes_adapters:
        return
    lora = Lora.on(harness.reference, harness.setup.model_folder)
    harness.remake(replace(harness.setup, adapter=AdapterSpec(lora.rank, lora.config)))
    prompts, params = [harness.prompt(LONG), harness.prompt(MIDDLE)], SamplingParams(n=3, max_tokens=8, seed=7)
    try:
        for seed in (1, 2):
            adapter = lora.tensors(seed)
            sent, got = fingerprint(iter(adapter.items()), lora.config), harness.load(adapter, "adapter", lora.config)
            _expect(got == sent, f"expected the fingerprint of the adapter sent, {sent}, got {got}")
            _expect_no_faults(harness, got, f"of adapter {seed}")
            merged = lora.merged(harness.base, adapter)
            _expect_logprobs(harness, merged, f"under adapter {seed}")
            groups = harness.sampler.generate(prompts, params).result(timeout=WAIT_S)
            _expect_version(groups, harness.version)
            _expect_scores(harness, merged, groups, params, f"under adapter {seed}, ")
    finally:
        harness.close()  # the next check makes one without an adapter


# -- expectations ----------------------------------------------------------------------------------------------------


def _expect_no_faults(harness: Harness, digest: str, what: str) -> None:
    check = getattr(harness.sampler, "check_weights", None)
    faults = check(digest) if check is not None else []
    _expect(faults == [], f"expected check_weights to find nothing wrong {what}, got {faults}")


def _expect_version(groups: Sequence[Group], version: int) -> None:
    stamps = sorted({one.policy_version for one in _flat(groups)})
    _expect(stamps == [version], f"expected every completion stamped with version {version}, got {stamps}")


def _times_out(future: Future[list[Group]]) -> bool:
    try:
        future.result(timeout=0)
    except FutureTimeout:
        return True
    return False


def _expect_answer(
    harness: Harness,
    future: Future[list[Group]],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    version: int,
    tensors: Tensors,
    what: str,
) -> None:
    """The future holds whole groups for these prompts, written by these weights alone."""
    groups = future.result(timeout=WAIT_S)
    asked = [(prompt.id, params.n) for prompt in prompts]
    got = [(group.prompt.id, len(group.completions)) for group in groups]
    _expect(got == asked, f"expected prompts and completions {asked} in the answer {what}, got {got}")
    _expect_version(groups, version)
    mixed = sum(bool(one.token_versions) for one in _flat(groups))
    _expect(mixed == 0, f"expected no token_versions in the answer {what}, got them in {mixed} completions")
    _expect_scores(harness, tensors, groups, params, f"in the answer {what}, ")


def _expect_logprobs(harness: Harness, tensors: Tensors, when: str) -> None:
    """``Sampler.logprobs`` agrees with the truth on sequences of several lengths, given in no order."""
    long = harness.long_prompt(60).token_ids
    sequences = [long[:17], harness.prompt(UNICODE).token_ids, long, long[:2], long[:1], long[5:40]]
    answers = harness.sampler.logprobs(sequences)
    _expect(len(answers) == len(sequences), f"expected {len(sequences)} answers {when}, got {len(answers)}")
    off = []
    for ids, got in zip(sequences, answers, strict=True):
        expected = harness.reference.logprobs(tensors, ids)
        _expect(len(got) == len(expected), f"expected {len(expected)} log-probs of {len(ids)} tokens, got {len(got)}")
        for place, (mine, right) in enumerate(zip(got, expected, strict=True)):
            off.append(abs(mine - right))
            _expect(
                off[-1] <= OUTLIER * harness.tolerance,
                f"expected log-prob {right:.4f} for token {place + 1} of {len(ids)} tokens {when}, got {mine:.4f}",
            )
    _expect_close(off, harness.tolerance, when)


def _expect_drawn_logprobs(
    harness: Harness, tensors: Tensors, prompts: Sequence[Prompt], params: SamplingParams
) -> None:
    groups = harness.sampler.generate(prompts, params).result(timeout=WAIT_S)
    _expect_scores(harness, tensors, groups, params)


def _expect_scores(
    harness: Harness, tensors: Tensors, groups: Sequence[Group], params: SamplingParams, when: str = ""
) -> None:
    """Each token lies inside the distribution that it should be drawn from, and its log-prob is that distribution's."""
    off, wide = [], harness.tolerance / (params.temperature or 1)
    where = f"{when}temperature {params.temperature}, top-p {params.top_p}, top-k {params.top_k}"
    for group in groups:
        for one in group.completions:
            _expect(bool(one.token_ids), f"expected at least one token in each completion, got none ({where})")
            count = len(one.logprobs)
            _expect(
                count == len(one.token_ids), f"expected {len(one.token_ids)} log-probs for as many tokens, got {count}"
            )
            first = len(group.prompt.token_ids) - 1
            logits_TV = harness.reference.logits(tensors, group.prompt.token_ids + one.token_ids)[0]
            for place, (token, got) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
                logits_V = logits_TV[first + place]
                if place < params.min_tokens:
                    logits_V = logits_V.index_fill(0, torch.tensor(harness.end_ids), -torch.inf)
                low, high, behind = _allowed(logits_V, token, params, harness.tolerance)
                _expect(
                    behind <= OUTLIER * wide,
                    f"expected a token from inside the cut, got {token} at place {place}, {behind:.4f} nats below it "
                    f"({where})",
                )
                off.append(max(low - got, got - high, 0.0))
                _expect(
                    off[-1] <= OUTLIER * wide,
                    f"expected log-prob {_span(low, high)} for token {token} at place {place} of a completion of "
                    f"{group.prompt.id!r}, got {got:.4f} ({where})",
                )
    _expect_close(off, wide, f"({where})")


def _expect_close(off: Sequence[float], tolerance: float, when: str) -> None:
    mean = sum(off) / len(off)
    _expect(
        mean <= tolerance,
        f"expected log-probs within {tolerance:.4f} nats of the truth on average {when}, got {mean:.4f}",
    )


def _span(low: float, high: float) -> str:
    return f"{low:.4f}" if high - low < 1e-4 else f"from {low:.4f} to {high:.4f}"


def _allowed(
    logits_V: torch.Tensor, token: int, params: SamplingParams, tolerance: float
) -> tuple[float, float, float]:
    """The least and the greatest right log-prob of a token, and by how many nats it misses the cut (0: inside).

    The cut is a number of likeliest tokens. Rounding may move it where the probability summed so far comes close to
    top-p, so that the smallest and the largest cut that rounding allows give a range.
    """
    scaled_V = (logits_V / params.temperature).double()
    ranked_V = scaled_V.sort(descending=True).values[: params.top_k or None]
    shares_V = ranked_V.softmax(-1)
    above_V = shares_V.cumsum(-1) - shares_V  # a token is kept if those above it hold less than top-p
    largest = max(1, int((above_V < params.top_p + tolerance).sum()) if params.top_p < 1 else len(ranked_V))
    smallest = max(1, int((above_V < params.top_p - tolerance).sum()) if params.top_p < 1 else len(ranked_V))
    behind = (ranked_V[largest - 1] - scaled_V[token]).item()
    low = (scaled_V[token] - ranked_V[:largest].logsumexp(-1)).item()
    high = (scaled_V[token] - ranked_V[:smallest].logsumexp(-1)).item()
    return low, min(0.0, high), max(0.0, behind)


def _expect_completion(one: Completion, ids: Sequence[int], text: str, reason: str, what: str) -> None:
    for name, expected, got in (
        ("tokens", tuple(ids), one.token_ids),
        ("log-probs for as many tokens", len(ids), len(one.logprobs)),
        ("text", text, one.text),
        ("finish reason", reason, one.finish_reason),
    ):
        _expect(expected == got, f"expected {name} {expected!r} of a completion {what}, got {got!r}")


def _flat(groups: Sequence[Group]) -> list[Completion]:
    return [one for group in groups for one in group.completions]


def _tokens(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [one.token_ids for one in _flat(groups)]


def _short(values: torch.Tensor) -> list[float]:
    return [round(value, 1) for value in values.tolist()]


def _forced(harness: Harness, prompt: Prompt, token_ids: Sequence[int]) -> Tensors:
    return forced(harness.reference, harness.base, prompt.token_ids, token_ids)
