"""Accuracy and pass@k against slow truths, and what ``evaluate`` asks of a sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import Future
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RunFailure
from common.types import Completion, Group, Prompt, SamplingParams
from learner.evaluate import Z_95, bootstrap_mean, evaluate, pass_at_k, wilson

GREEDY = SamplingParams(n=1, temperature=0.0, max_tokens=4, seed=5)


class TableSampler:
    """Answers each question from a table: greedily the first of its answers, else all of them in turn."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.requests: list[tuple[list[str], SamplingParams]] = []

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        self.requests.append(([prompt.id for prompt in prompts], params))
        answer: Future[list[Group]] = Future()
        answer.set_result([Group(prompt, self._write(prompt, params)) for prompt in prompts])
        return answer

    def _write(self, prompt: Prompt, params: SamplingParams) -> tuple[Completion, ...]:
        texts = [self.answers[prompt.id][index % len(self.answers[prompt.id])] for index in range(params.n)]
        return tuple(
            Completion(tuple(range(len(text))), text, (0.0,) * len(text), "length" if len(text) == 4 else "stop", 0)
            for text in texts
        )


class SilentSampler(TableSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        return Future()


class FailingSampler(TableSampler):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        answer: Future[list[Group]] = Future()
        answer.set_exception(TimeoutError("the engine's own"))
        return answer


def ask(number: int, kind: str | None = None) -> Prompt:
    messages = ({"role": "user", "content": f"an example {number}"}, {"role": "user", "content": f"question {number}"})
    return Prompt(f"test-{number}", messages, {"kind": kind} if kind else {}, f"<chat>question {number}", (1, 2))


def correct(groups: Sequence[Group]) -> list[list[bool]]:
    return [[completion.text.startswith("ok") for completion in group.completions] for group in groups]


# --- the statistics ---


@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 9))
    right = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    drawn = [any(index < right for index in subset) for subset in combinations(range(samples), k)]
    assert pass_at_k(samples, right, k) == pytest.approx(float(Fraction(sum(drawn), len(drawn))), abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    product = 1 - math.prod(1 - 50 / index for index in range(10_000 - 30 + 1, 10_000 + 1))  # the paper's own loop
    assert pass_at_k(10_000, 30, 50) == pytest.approx(product, rel=1e-9)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_cannot_be(samples: int, right: int, k: int) -> None:
    with pytest.raises(AssertionError):
        pass_at_k(samples, right, k)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson(successes, trials)
    assert interval.value == successes / trials
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_ends_where_the_score_test_no_longer_rejects(trials: int, part: float) -> None:
    successes = round(part * trials)
    interval, share = wilson(successes, trials), successes / trials

    def farther_than_z(p: float) -> bool:
        return abs(share - p) > Z_95 * math.sqrt(p * (1 - p) / trials)

    def edge(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if farther_than_z(middle) else (middle, outside)
        return inside

    assert interval.low == pytest.approx(edge(share, 0.0), abs=1e-9)
    assert interval.high == pytest.approx(edge(share, 1.0), abs=1e-9)
    assert 0 <= interval.low <= share <= interval.high <= 1


@pytest.mark.parametrize("ones", [5, 30, 100])
def test_the_bootstrap_of_shares_is_the_binomial(ones: int) -> None:
    """Resampling n zeros and ones draws a binomial count, whose quantiles can be summed exactly."""
    number = 200
    share = ones / number
    chances = [math.comb(number, c) * share**c * (1 - share) ** (number - c) for c in range(number + 1)]
    low = next(c for c in range(number + 1) if sum(chances[: c + 1]) >= 0.025)
    high = next(c for c in range(number + 1) if sum(chances[: c + 1]) >= 0.975)
    interval = bootstrap_mean([1.0] * ones + [0.0] * (number - ones))
    assert interval.value == pytest.approx(share)
    assert abs(interval.low * number - low) <= 1
    assert abs(interval.high * number - high) <= 1


def test_the_bootstrap_is_the_same_every_time_and_has_no_width_without_spread() -> None:
    values = [0.1, 0.9, 0.4, 0.6, 0.2]
    assert bootstrap_mean(values) == bootstrap_mean(values) != bootstrap_mean(values, seed=1)
    assert bootstrap_mean([0.5, 0.5]) == (0.5, 0.5, 0.5)


# --- evaluate ---


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12))
def test_an_evaluation_counts_what_the_scorer_says(table: list[list[bool]]) -> None:
    prompts = [ask(number) for number in range(len(table))]
    sampler = TableSampler(
        {f"test-{number}": ["ok" if good else "no" for good in row] for number, row in enumerate(table)}
    )
    result = evaluate(sampler, prompts, correct, GREEDY, SamplingParams(n=4, temperature=0.7), (1, 3), timeout_s=5)
    assert result.questions == len(table)
    assert result.samples == 4
    assert result.accuracy == wilson(sum(row[0] for row in table), len(table))
    for k in (1, 3):
        subsets = [any(subset) for row in table for subset in combinations(row, k)]
        assert result.pass_at_k[k].value == pytest.approx(sum(subsets) / len(subsets))
        assert result.pass_at_k[k].low <= result.pass_at_k[k].value + 1e-12
    assert [params for _, params in sampler.requests] == [GREEDY, SamplingParams(n=4, temperature=0.7)]


def test_lengths_kinds_and_transcripts() -> None:
    kinds = ["b", "b", "a", "a", "a", None]
    prompts = [ask(number, kind) for number, kind in enumerate(kinds)]
    texts = ["ok", "no", "ok", "okay", "no", "none"]
    result = evaluate(
        TableSampler({f"test-{number}": [text] for number, text in enumerate(texts)}),
        prompts, correct, GREEDY, timeout_s=5, transcripts=4,
    )  # fmt: skip
    assert result.accuracy.value == 3 / 6
    assert result.pass_at_k == {}
    assert result.samples == 0
    assert result.completion_tokens_mean == sum(map(len, texts)) / 6
    assert result.truncated_fraction == 2 / 6
    assert result.by_kind == {"a": (3, wilson(2, 3)), "b": (2, wilson(1, 2))}
    shown = [(shown.prompt_id, shown.question, shown.completion, shown.correct) for shown in result.transcripts]
    assert shown == [  # the first of each kind, then the first of the rest: whatever was answered
        ("test-0", "question 0", "ok", True), ("test-2", "question 2", "ok", True),
        ("test-5", "question 5", "none", False), ("test-1", "question 1", "no", False),
    ]  # fmt: skip
    assert result.transcripts[0].prompt == "<chat>question 0"


def test_the_result_is_plain_json() -> None:
    sampler = TableSampler({"test-0": ["ok", "no"], "test-1": ["no", "no"]})
    sampled = SamplingParams(n=2)
    result = evaluate(sampler, [ask(0, "x"), ask(1, "x")], correct, GREEDY, sampled, (2,), timeout_s=5)
    plain = result.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["accuracy"] == 0.5
    assert (plain["accuracy_low"], plain["accuracy_high"]) == result.accuracy[1:]
    assert plain["pass_at_k"]["2"]["value"] == 0.5
    assert plain["by_kind"]["x"]["questions"] == 2
    assert plain["transcripts"][0] == {
        "prompt_id": "test-0", "question": "question 0", "prompt": "<chat>question 0", "completion": "ok",
        "correct": True,
    }  # fmt: skip


@pytest.mark.parametrize(("at_once", "sizes"), [(0, [5]), (1, [1] * 5), (2, [2, 2, 1]), (99, [5])])
def test_a_limit_splits_the_questions_and_counts_the_seed_up(at_once: int, sizes: list[int]) -> None:
    sampler = TableSampler({f"test-{number}": ["ok"] for number in range(5)})
    result = evaluate(sampler, [ask(n) for n in range(5)], correct, GREEDY, timeout_s=5, completions_at_once=at_once)
    assert result.accuracy.value == 1
    assert [len(ids) for ids, _ in sampler.requests] == sizes
    assert [name for ids, _ in sampler.requests for name in ids] == [f"test-{number}" for number in range(5)]
    assert [params.seed for _, params in sampler.requests] == [5 + number for number in range(len(sizes))]


def test_a_limit_below_one_group_still_asks_a_question_at_a_time() -> None:
    sampler = TableSampler({f"test-{number}": ["ok"] for number in range(3)})
    prompts = [ask(number) for number in range(3)]
    evaluate(sampler, prompts, correct, GREEDY, SamplingParams(n=8), (1,), timeout_s=5, completions_at_once=4)
    assert [len(ids) for ids, params in sampler.requests if params.n == 8] == [1, 1, 1]
    assert all(params.seed is None for _, params in sampler.requests if params.n == 8)


def test_a_sampler_that_never_answers_is_named_with_the_setting_to_raise() -> None:
    with pytest.raises(
        RunFailure, match=r"the sampler was still answering an eval.* after 0.05 s; raise timeouts\.generate_s"
    ):
        evaluate(SilentSampler({}), [ask(0)], correct, GREEDY, timeout_s=0.05)


def test_the_samplers_own_error_is_not_taken_for_our_limit() -> None:
    with pytest.raises(TimeoutError, match="the engine's own"):
        evaluate(FailingSampler({}), [ask(0)], correct, GREEDY, timeout_s=5)


def test_nonsense_is_refused_before_anything_is_asked() -> None:
    sampler = TableSampler({"test-0": ["ok"]})
    for prompts, greedy, sampled, k in (
        ([], GREEDY, None, ()),
        ([ask(0)], SamplingParams(n=1, temperature=1.0), None, ()),
        ([ask(0)], GREEDY, SamplingParams(n=2), (3,)),
        ([ask(0)], GREEDY, None, (1,)),
    ):
        with pytest.raises(AssertionError):
            evaluate(sampler, prompts, correct, greedy, sampled, k, timeout_s=5)
    assert sampler.requests == []


def test_a_verdict_is_needed_for_every_completion() -> None:
    with pytest.raises(AssertionError, match="verdict"):
        evaluate(TableSampler({"test-0": ["ok"]}), [ask(0)], lambda groups: [[True, True]], GREEDY, timeout_s=5)


def test_a_question_that_could_not_be_judged_is_not_counted() -> None:
    prompts = [ask(number) for number in range(3)]
    sampler = TableSampler({prompt.id: ["ok"] for prompt in prompts})
    result = evaluate(sampler, prompts, lambda groups: [[True], [], [False]], GREEDY, timeout_s=1)  # type: ignore[arg-type]
    assert result.questions == 2
    assert result.accuracy.value == 0.5
    assert [shown.prompt_id for shown in result.transcripts] == ["test-0", "test-2"]
    with pytest.raises(RunFailure, match="every test question"):
        evaluate(sampler, prompts, lambda groups: [[], [], []], GREEDY, timeout_s=1)  # type: ignore[arg-type]
