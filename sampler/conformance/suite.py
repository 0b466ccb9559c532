"""The sampler contract (``common.protocols.Sampler``) as checks, for our back ends and for anyone else's.

One call, which raises ``ContractError`` with the name of the first check that fails::

    check_sampler(lambda setup: MySampler(setup, my_option=3), "path/to/a/model")

or ``CHECKS[name](harness)`` for each check, on one ``Harness`` that they share (``pytest.mark.parametrize``). Every
check first loads the folder's own weights, so they run in any order; in ``CHECKS``' order the first failure names the
cause. Any causal model folder with a tokenizer will do; a small random one is best. Left out: speed and memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.protocols import GroupsFuture, Sampler
from common.types import AdapterSpec, Group, SamplerSetup
from common.weights.handles import fingerprint
from sampler.conformance.harness import (
    LONG,
    WAIT_S,
    ContractError,
    ExpectationError,
    Harness,
    completions_of,
    expect_at_most,
    expect_equal,
    tokens_of,
)
from sampler.conformance.reference import Lora, perturbed

# Shapes: V vocabulary, D width.

SHORT, MIDDLE = "7", "3 7 1 9 4"
UNICODE = "naïve 日本語 🙂 über"
LETTERS = "abcdefghij"


def _check_fingerprint(harness: Harness) -> None:
    """``load_weights`` returns the fingerprint of what was sent, of other weights another one."""
    for tensors in (harness.base, perturbed(harness.base, seed=1)):
        expect_equal("fingerprint of the tensors sent", harness.load(tensors), fingerprint(iter(tensors.items())))


def _check_logprobs(harness: Harness) -> None:
    """``logprobs`` of sequences of many lengths, in their order, at temperature 1."""
    harness.expect_logprobs("under the folder's weights")


def _check_weights(harness: Harness) -> None:
    """Every tensor but the output head's (the next check): all are changed, and the log-probs follow, and back."""
    head = harness.reference.head_name
    for seed in (1, 2):
        harness.load({**perturbed(harness.base, seed), head: harness.base[head]})
        harness.expect_logprobs(f"after load_weights of changed weights (seed {seed})")
    harness.load(harness.base)
    harness.expect_logprobs("after load_weights of the first weights again")


def _check_output_head(harness: Harness) -> None:
    """The output head follows, also where it is tied to the embedding and arrives under that name only."""
    name = harness.reference.head_name
    head_VD = harness.base[name]
    scale_V = torch.linspace(0.5, 1.5, len(head_VD))
    harness.load({**harness.base, name: (head_VD.float() * scale_V[:, None]).to(head_VD.dtype)})
    kind = "tied" if harness.reference.is_tied else "untied"
    harness.expect_logprobs(f"after load_weights with other rows in the {kind} output head {name!r}")


def _check_lent_tensors(harness: Harness) -> None:
    """The sampler keeps no reference: changes to the tensors after ``load_weights`` have no effect."""
    tensors = perturbed(harness.base, seed=3)
    lent = {name: tensor.clone() for name, tensor in tensors.items()}
    harness.load(lent, served=tensors)
    for tensor in lent.values():
        tensor.zero_()
    harness.expect_logprobs("after the tensors that it was sent were overwritten")


def _check_check_weights(harness: Harness) -> None:
    """Where there is ``check_weights``: right weights are found right, one load after another."""
    for tensors in (harness.base, perturbed(harness.base, seed=4)):
        harness.expect_no_faults(harness.load(tensors))


def _check_versions(harness: Harness) -> None:
    """Every completion carries the version of the weights that wrote it, as given to ``load_weights``."""
    for _ in range(2):
        completions = completions_of(harness.generate([SHORT, MIDDLE], n=2, max_tokens=2))
        expect_equal("versions stamped", {completion.policy_version for completion in completions}, {harness.version})
        harness.load(harness.base)


def _check_logprobs_temperature(harness: Harness) -> None:
    """Log-probs of the distribution drawn from, at a temperature other than 1."""
    harness.ask([MIDDLE, LONG], n=4, max_tokens=16, temperature=0.7, seed=1).expect_answer()


def _check_logprobs_top_p_top_k(harness: Harness) -> None:
    """Log-probs of the distribution drawn from, cut by top-p, by top-k and by both; no token from outside the cut."""
    for cut in ({"top_p": 0.8}, {"top_k": 20}, {"top_p": 0.8, "top_k": 20}):
        harness.ask([MIDDLE, LONG], n=4, max_tokens=16, temperature=0.7, seed=2, **cut).expect_answer()


def _check_distribution(harness: Harness) -> None:
    """First tokens come as often as their probabilities say: a loose chi-square bound over 512 draws."""
    logits_V = harness.reference.logits(harness.base, harness.encode(LONG))[0][-1]
    expected_V = 512 * (logits_V / 0.7).softmax(-1)
    answers = [harness.generate([LONG], n=64, max_tokens=1, temperature=0.7, seed=seed) for seed in range(8)]
    first = torch.tensor([ids[0] for groups in answers for ids in tokens_of(groups)])
    counts_V = first.bincount(minlength=len(expected_V))
    common_V = expected_V >= 5  # rarer tokens are counted together, as the test asks
    expected, counted = (
        torch.cat([values_V[common_V], values_V[~common_V].sum()[None]]) for values_V in (expected_V, counts_V)
    )
    statistic = ((counted - expected) ** 2 / expected.clamp(min=1)).sum().item()
    freedom = len(expected) - 1
    bound = freedom + 5 * (2 * freedom) ** 0.5 + 5
    expect_at_most(f"chi-square of 512 first tokens at {freedom} degrees of freedom", statistic, bound)


def _check_groups(harness: Harness) -> None:
    """One group for each prompt, in their order, of ``n`` completions that are not copies of each other."""
    request = harness.ask([LONG, SHORT, MIDDLE + LONG, UNICODE, MIDDLE], n=6, max_tokens=10, seed=3)
    reported: dict[int, Group] = {}
    if isinstance(request.future, GroupsFuture):
        request.future.on_group(reported.__setitem__)
    groups = request.expect_answer()
    if isinstance(request.future, GroupsFuture):
        expect_equal("groups reported as they are answered", reported, dict(enumerate(groups)))
    for group in groups:
        expect_equal(f"most draws for {group.prompt.id!r} differ", len(set(tokens_of([group]))) > 3, True)


def _check_greedy(harness: Harness) -> None:
    """Temperature 0: the likeliest token each time, log-probs of temperature 1, twice the same."""
    first, again = (
        harness.ask([SHORT, LONG, MIDDLE], max_tokens=12, temperature=0, seed=1).expect_answer() for _ in range(2)
    )
    expect_equal("tokens of the same greedy request", tokens_of(again), tokens_of(first))


def _check_seed(harness: Harness) -> None:
    """A seed fixes the request whatever came before it; another seed, or none, draws others; rows draw separately."""
    draw = partial(harness.generate, [MIDDLE, LONG, MIDDLE], n=4, max_tokens=12)
    first, free = draw(seed=11), [tokens_of(draw()) for _ in range(2)]
    harness.sampler.logprobs([harness.encode(MIDDLE)])
    again, other = draw(seed=11), draw(seed=12)
    expect_equal("tokens for the same seed", tokens_of(again), tokens_of(first))
    for one, two in zip(completions_of(first), completions_of(again), strict=True):
        off = max(abs(x - y) for x, y in zip(one.logprobs, two.logprobs, strict=True))
        expect_at_most("nats between log-probs for the same seed", off, harness.tolerance)
    expect_equal("another seed draws other tokens", tokens_of(other) != tokens_of(first), True)
    expect_equal("seed=None draws other tokens each time", free[0] != free[1], True)
    expect_equal("equal prompts draw separately", tokens_of(first[:1]) != tokens_of(first[2:]), True)


def _check_seed_offset(harness: Harness) -> None:
    """Parts of a request draw separately; where the back end ``seeds_prompts``, just as they would in the whole."""
    texts = [MIDDLE, LONG, UNICODE, SHORT, MIDDLE + LONG, LONG, MIDDLE, SHORT]

    def draw(start: int, end: int, offset: int) -> list[tuple[int, ...]]:
        return tokens_of(harness.generate(texts[start:end], n=4, max_tokens=8, seed=13, seed_offset=offset))

    expect_equal("parts with seed_offset 0 and 2 draw separately", draw(0, 2, 0) != draw(0, 2, 2), True)
    if not getattr(harness.sampler, "seeds_prompts", False):
        return
    whole = draw(0, 8, 0)
    # Other neighbours in a batch round otherwise, which may move a draw, and then all that follow it.
    allowed = int(len(whole) * min(0.5, 8 * harness.tolerance))
    for cut in (1, 5):
        parts = draw(0, cut, 0) + draw(cut, 8, cut)
        moved = sum(part != right for part, right in zip(parts, whole, strict=True))
        expect_at_most(f"completions of {len(whole)} changed by a cut after prompt {cut}", moved, allowed)


def _check_ordering(harness: Harness) -> None:
    """generate, load_weights, generate: the first is by the old weights, the second by the new, nothing left over."""
    requests = []
    for seed in (4, 5):
        harness.load(perturbed(harness.base, seed))
        requests.append(harness.ask([LONG, harness.long_prompt(100)], n=4, max_tokens=8, seed=4))
    requests[0].expect_answer("asked for before load_weights, ")
    requests[1].expect_answer("asked for after load_weights, ")


def _check_in_flight(harness: Harness) -> None:
    """Several requests before any answer is fetched: each gets its own whatever the order, with ``logprobs`` and
    ``load_weights`` between; the old weights write them."""
    harness.load(perturbed(harness.base, seed=8))
    requests = [
        harness.ask([LONG, SHORT], n=3, max_tokens=12, seed=21),
        harness.ask([MIDDLE], n=2, max_tokens=5, temperature=0.7, seed=22),
        harness.ask([UNICODE, MIDDLE, LONG], max_tokens=16),
    ]
    harness.expect_logprobs("with requests in flight")
    harness.load(perturbed(harness.base, seed=9))
    for place in (2, 0, 1):
        requests[place].expect_answer(f"request {place} of 3 in flight, ")
    harness.expect_logprobs("after load_weights with requests in flight")


def _check_pump(harness: Harness) -> None:
    """Where there is ``pump``: ``generate`` returns at once, ``pump`` alone does the work, and requests join others."""
    pump: Callable[[], bool] | None = getattr(harness.sampler, "pump", None)
    if pump is None:
        return
    expect_equal("pump with nothing asked for", pump(), False)
    requests = []
    for texts, params in (
        ([LONG, MIDDLE], {"n": 2, "max_tokens": 12, "seed": 31}),
        ([UNICODE], {"n": 3, "max_tokens": 8, "temperature": 0.7, "seed": 32}),
    ):
        request = harness.ask(texts, **params)
        expect_equal("future is done when generate returns", request.future.done(), False)
        expect_equal("result(timeout=0) of work not done times out", _times_out(request.future), True)
        requests.append(request)
        pump()
    end = time.monotonic() + WAIT_S
    while not all(request.future.done() for request in requests) and time.monotonic() < end and pump():
        pass
    expect_equal("requests done by pump alone", [request.future.done() for request in requests], [True, True])
    expect_equal("pump once all work is done", pump(), False)
    for request in requests:
        request.expect_answer("done by pump, ")


def _check_end_of_sequence(harness: Harness) -> None:
    """Each end-of-sequence token, and each of ``SamplerSetup.end_tokens``, ends a completion: kept with its log-prob,
    not in the text, ``stop`` even as the last token allowed."""
    words = harness.encode("ab")
    for end in harness.end_ids:
        ids = (*words, end)
        harness.load_forced(MIDDLE, ids)
        for limit in (len(ids) + 8, len(ids)):
            harness.expect_written([MIDDLE], ids, harness.decode(words), "stop", n=3, max_tokens=limit)


def _check_empty(harness: Harness) -> None:
    """A completion that ends at once, beside others that go on, is that one token and no text."""
    harness.load_forced(MIDDLE, harness.end_ids[:1])
    harness.expect_written([MIDDLE, LONG], harness.end_ids[:1], "", "stop", n=3, max_tokens=6)


def _check_ragged(harness: Harness) -> None:
    """Completions of one request that end at different places: each whole, with nothing after its end."""
    harness.load_likely_end(LONG, probability=0.1)
    groups = harness.ask([LONG, MIDDLE, UNICODE], n=8, max_tokens=20, seed=8).expect_answer()
    lengths = {len(ids) for ids in tokens_of(groups)}
    expect_equal(f"more than 3 lengths ({lengths}) where an end is likely", len(lengths) > 3, True)


def _check_length(harness: Harness) -> None:
    """Cut at exactly ``max_tokens``, finish reason ``length``."""
    ids = harness.encode(LETTERS)
    harness.load_forced(MIDDLE, ids)
    for limit in (1, len(ids) - 1):
        harness.expect_written([MIDDLE], ids[:limit], harness.decode(ids[:limit]), "length", max_tokens=limit)


def _check_stop_strings(harness: Harness) -> None:
    """A stop string ends a completion: the text ends with it, its tokens are kept, later ones not made."""
    ids = harness.encode(LETTERS)
    harness.load_forced(MIDDLE, ids)
    for stop in (("fg",), ("none of it", "c")):
        kept, text = harness.up_to(ids, stop[-1])
        harness.expect_written([MIDDLE], kept, text, "stop", max_tokens=len(ids), stop=stop)


def _check_min_tokens(harness: Harness) -> None:
    """No end before ``min_tokens`` tokens, by an end-of-sequence token or a stop string; both count again after."""
    harness.load_likely_end(LONG, probability=0.5)
    for least, most in ((5, 20), (6, 6)):
        request = harness.ask([LONG, MIDDLE], n=8, max_tokens=most, min_tokens=least, seed=9)
        reasons = {completion.finish_reason for completion in completions_of(request.expect_answer())}
        expect_equal(f"ends with min_tokens={least} and max_tokens={most}", "stop" in reasons, least < most)
    ids = harness.encode(LETTERS)
    harness.load_forced(MIDDLE, ids)
    least = len(harness.up_to(ids, "c")[0])
    written = partial(harness.expect_written, [MIDDLE], max_tokens=len(ids), min_tokens=least)
    written(ids, harness.decode(ids), "length", stop=("c",))
    written(*harness.up_to(ids, "g"), "stop", stop=("c", "g"))


def _check_text(harness: Harness) -> None:
    """The text is what the tokenizer makes of the tokens, in any script."""
    ids = harness.encode("é日🙂")  # of two, three and four bytes
    harness.load_forced(MIDDLE, ids)
    harness.expect_written([MIDDLE], ids, harness.decode(ids), "length", max_tokens=len(ids))
    harness.load(harness.base)
    for completion in completions_of(harness.generate([UNICODE], n=8, max_tokens=12, seed=5)):
        ids = completion.token_ids
        text = harness.decode(ids[:-1] if ids[-1] in harness.end_ids else ids)
        # A character cut in half at the very end may be shown as a replacement mark or left out.
        expect_equal(f"text of tokens {ids}", completion.text.rstrip("\ufffd"), text.rstrip("\ufffd"))


def _check_special_tokens(harness: Harness) -> None:
    """A special token that ends nothing is part of the text: it may be a tag that the task asks for. It can be a stop
    string, too, and then ends the text."""
    if harness.tag is None:
        return
    words, tag = harness.encode("ab"), harness.decode([harness.tag])
    ids = (*words, harness.tag, *harness.encode("cd"), harness.end_ids[0])
    harness.load_forced(MIDDLE, ids)
    written = partial(harness.expect_written, [MIDDLE], max_tokens=len(ids))
    written(ids, harness.decode(ids[:-1]), "stop")
    kept = ids[: len(words) + 1]
    if harness.decode(kept).endswith(tag):
        written(kept, harness.decode(kept), "stop", stop=(tag,))


def _check_too_long(harness: Harness) -> None:
    """A prompt that leaves no room is refused at once, with its length and the limit; one that just fits is not."""
    limit = harness.setup.max_model_tokens
    message = "no UserError at once"
    try:
        harness.ask([SHORT, harness.long_prompt(limit - 3)], max_tokens=4)
    except UserError as error:
        message = str(error)
    for number in (limit - 3, limit):
        what = f"{limit - 3} + 4 tokens with room for {limit}: {message!r} names {number}"
        expect_equal(what, str(number) in message, True)
    harness.ask([harness.long_prompt(limit - 4)], max_tokens=4).expect_answer("that just fits, ")


def _check_sleep_wake(harness: Harness) -> None:
    """After sleep, wake and load_weights it serves as before, woken in two parts or at once."""
    for seed, at_once in ((6, False), (7, True)):
        harness.sampler.sleep()
        harness.sampler.wake("all" if at_once else "weights")
        harness.load(perturbed(harness.base, seed))
        if not at_once:
            harness.sampler.wake("cache")
        harness.ask([LONG, SHORT], n=2, max_tokens=8, seed=6).expect_answer("after sleep and wake, ")


def _check_close(harness: Harness) -> None:
    """Closing twice is allowed."""
    sampler = harness.sampler
    harness.close()
    sampler.close()


def _check_adapter(harness: Harness) -> None:
    """Where ``takes_adapters``: a LoRA adapter is served on the folder's base, and so is the next one."""
    if harness.takes_adapters is None:
        harness.start(harness.setup)
    if not harness.takes_adapters:
        return
    lora = Lora.on(harness.reference, harness.setup.model_folder)
    harness.start(replace(harness.setup, adapter=AdapterSpec(lora.rank, lora.config)))
    try:
        for seed in (1, 2):
            adapter = lora.tensors(seed)
            arrived = harness.load(adapter, lora.config, served=lora.merged(harness.base, adapter))
            expect_equal("fingerprint of the adapter sent", arrived, fingerprint(iter(adapter.items()), lora.config))
            harness.expect_no_faults(arrived)
            harness.expect_logprobs(f"under adapter {seed}")
            harness.ask([LONG, MIDDLE], n=3, max_tokens=8, seed=7).expect_answer(f"under adapter {seed}, ")
    finally:
        harness.close()  # the next check makes one without an adapter


def _times_out(future: Future[list[Group]]) -> bool:
    try:
        future.result(timeout=0)
    except FutureTimeout:
        return True
    return False


def _run(name: str, check: Callable[[Harness], None], harness: Harness) -> None:
    try:
        if name != "adapter":  # which makes a sampler of its own
            harness.load(harness.base)
        check(harness)
    except ExpectationError as error:
        raise ContractError(name, str(error)) from None
    except Exception as error:
        raise ContractError(name, f"expected no exception, got {type(error).__name__}: {error}") from error


CHECKS: dict[str, Callable[[Harness], None]] = {
    function.removeprefix("_check_"): partial(_run, function.removeprefix("_check_"), check)
    for function, check in list(globals().items())
    if function.startswith("_check_")
}
"""Every check by name, the more basic first. Each raises ``ContractError``."""


def check_sampler(make: Callable[[SamplerSetup], Sampler], model_folder: str | Path, **settings: Any) -> None:
    """Runs every check on the sampler that ``make`` makes; ``settings`` are ``Harness``'s.

    Raises ``ContractError`` with the name of the first check that fails.
    """
    with Harness(make, model_folder, **settings) as harness:
        for run in CHECKS.values():
            run(harness)
