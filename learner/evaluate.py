"""How good the model is on questions it was not trained on: greedy accuracy and pass@k, with 95 % intervals.

Left out: what a right answer is (the task decides), and where results go (the trackers). Used by the training loop
before, during and after training, and by the command line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from common.errors import RunFailure
from common.protocols import Sampler
from common.types import Group, Prompt, SamplingParams
from common.watchdog import result, time_limit

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
CorrectFunction = Callable[[Sequence[Group]], Sequence[Sequence[bool]]]


class Interval(NamedTuple):
    """A measured share with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Transcript:
    """One question, the model's answer, and whether that was right."""

    prompt_id: str
    question: str
    """The last message of the conversation."""
    prompt: str
    """The whole prompt as the model saw it."""
    completion: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation."""

    questions: int
    accuracy: Interval
    """Share of the questions answered right greedily; Wilson's score interval."""
    samples: int
    """Completions drawn of each question for pass@k; 0 if none were."""
    pass_at_k: Mapping[int, Interval]
    """Chance that at least one of k drawn answers is right, mean over the questions; bootstrap interval."""
    completion_tokens_mean: float
    """Mean length of a greedy completion, tokens."""
    truncated_fraction: float
    """Share of the greedy completions cut at ``max_tokens``."""
    by_kind: Mapping[str, tuple[int, Interval]] = field(default_factory=dict)
    """Questions and accuracy of each ``prompt.data["kind"]``, where the task names kinds."""
    transcripts: tuple[Transcript, ...] = ()
    """Greedy answers to a few questions, the same ones for the same list of prompts."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``eval.jsonl``."""
        kinds = {
            kind: {"questions": number, "accuracy": share.value, "low": share.low, "high": share.high}
            for kind, (number, share) in self.by_kind.items()
        }
        return asdict(self) | {
            "accuracy": self.accuracy.value, "accuracy_low": self.accuracy.low, "accuracy_high": self.accuracy.high,
            "pass_at_k": {str(k): share._asdict() for k, share in self.pass_at_k.items()}, "by_kind": kinds,
            "transcripts": [asdict(transcript) for transcript in self.transcripts],
        }  # fmt: skip


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    correct: CorrectFunction,
    greedy: SamplingParams,
    sampled: SamplingParams | None = None,
    k: Sequence[int] = (),
    *,
    timeout_s: float,
    completions_at_once: int = 0,
    transcripts: int = 3,
) -> Evaluation:
    """Asks every prompt once greedily and, with ``sampled``, ``sampled.n`` times at its temperature.

    ``correct`` returns for each completion of each group whether it is right; a group it could not judge (an empty row)
    is left out. ``completions_at_once`` limits a request (0: one for all); each further request of a seeded one counts
    the seed up, so that no two draw alike. Raises ``RunFailure`` for a request that takes more than ``timeout_s``.
    """
    assert prompts, "an evaluation needs at least one question"
    assert (greedy.temperature, greedy.n) == (0, 1), f"greedy means temperature 0 and n 1, not {greedy}"
    assert not k or (sampled is not None and max(k) <= sampled.n), f"pass@{max(k)} needs that many samples: {sampled}"
    started = time.monotonic()
    answers = _ask(sampler, prompts, greedy, timeout_s, completions_at_once)
    answers, verdicts = _judge(correct, answers)
    prompts = [group.prompt for group in answers]
    right = [bool(row[0]) for row in verdicts]
    at_k: dict[int, Interval] = {}
    if sampled is not None and k:
        _, verdicts = _judge(correct, _ask(sampler, prompts, sampled, timeout_s, completions_at_once))
        counts = [sum(row) for row in verdicts]
        at_k = {size: bootstrap_mean([pass_at_k(sampled.n, count, size) for count in counts]) for size in k}
    first = [group.completions[0] for group in answers]
    return Evaluation(
        questions=len(prompts),
        accuracy=wilson(sum(right), len(right)),
        samples=sampled.n if sampled is not None and k else 0,
        pass_at_k=at_k,
        completion_tokens_mean=sum(len(completion.token_ids) for completion in first) / len(first),
        truncated_fraction=sum(completion.finish_reason == "length" for completion in first) / len(first),
        by_kind=_by_kind(prompts, right),
        transcripts=tuple(
            Transcript(
                prompt_id=prompts[index].id,
                question=prompts[index].messages[-1]["content"] if prompts[index].messages else prompts[index].text,
                prompt=prompts[index].text,
                completion=first[index].text,
                correct=right[index],
            )
            for index in _shown(prompts, transcripts)
        ),
        seconds=time.monotonic() - started,
    )


def wilson(successes: int, trials: int) -> Interval:
    """A share with Wilson's 95 % score interval (Wilson 1927): right for few trials and near 0 and 1 too."""
    assert 0 <= successes <= trials != 0, (successes, trials)
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # The bounds are exactly 0 and 1 at the ends, where rounding would leave them a little off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(share, low, high)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased chance that k answers drawn from ``samples`` without replacement hold a right one.

    1 - C(n - c, k) / C(n, k): equation 1 of Chen et al. 2021 (arXiv 2107.03374), in exact integers.
    """
    assert 0 <= right <= samples, (right, samples)
    assert 1 <= k <= samples, (k, samples)
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def bootstrap_mean(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean with its 95 % percentile bootstrap interval over the values (here: the questions), always the same.

    Where all values are equal there is nothing to resample and the interval has no width.
    """
    data_Q = np.asarray(values, dtype=np.float64)
    assert data_Q.size, "a mean needs at least one value"
    draw = np.random.default_rng(seed)
    # One resample a row would need resamples x questions numbers at once; a loop needs one row.
    means = [float(data_Q[draw.integers(0, data_Q.size, data_Q.size)].mean()) for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(data_Q.mean()), float(low), float(high))


def _ask(
    sampler: Sampler, prompts: Sequence[Prompt], params: SamplingParams, timeout_s: float, completions_at_once: int
) -> list[Group]:
    groups: list[Group] = []
    for request, part in enumerate(_parts(prompts, completions_at_once, params.n)):
        seeded = params if params.seed is None else replace(params, seed=params.seed + request)
        # A sampler in this process writes inside the call; another answers later.
        doing = f"answering an evaluation request of {len(part)} x {params.n} completions"
        with time_limit("sampler", doing, timeout_s, "timeouts.generate_s"):
            answer = sampler.generate(part, seeded)
        written = result(answer, "sampler", doing, timeout_s, "timeouts.generate_s")
        assert [group.prompt.id for group in written] == [prompt.id for prompt in part], "groups in another order"
        assert all(len(group.completions) == params.n for group in written), f"not {params.n} completions a group"
        groups += written
    return groups


def _parts(prompts: Sequence[Prompt], completions_at_once: int, n: int) -> Iterator[Sequence[Prompt]]:
    size = max(1, completions_at_once // n) if completions_at_once else len(prompts)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _judge(correct: CorrectFunction, groups: Sequence[Group]) -> tuple[list[Group], list[Sequence[bool]]]:
    """The groups that could be judged and their verdicts. A question whose judging failed and was skipped (an empty
    row) counts neither as right nor as wrong."""
    rows = correct(groups)
    judged = [(group, row) for group, row in zip(groups, rows, strict=True) if row]
    assert all(len(row) == len(group.completions) for group, row in judged), "not a verdict a completion"
    if not judged:
        raise RunFailure("the task's is_correct failed on every test question; see the log, and fix it")
    return [group for group, _ in judged], [row for _, row in judged]


def _by_kind(prompts: Sequence[Prompt], right: Sequence[bool]) -> dict[str, tuple[int, Interval]]:
    kinds: dict[str, list[bool]] = {}
    for prompt, is_right in zip(prompts, right, strict=True):
        if "kind" in prompt.data:
            kinds.setdefault(str(prompt.data["kind"]), []).append(is_right)
    return {kind: (len(part), wilson(sum(part), len(part))) for kind, part in sorted(kinds.items())}


def _shown(prompts: Sequence[Prompt], number: int) -> list[int]:
    """The first question of each kind, then the first of the others: never chosen by the answers."""
    first_of_kind: dict[Any, int] = {}
    for index, prompt in enumerate(prompts):
        first_of_kind.setdefault(prompt.data.get("kind"), index)
    return list(dict.fromkeys([*first_of_kind.values(), *range(len(prompts))]))[:number]
