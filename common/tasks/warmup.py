"""A few kinds of tiny generated questions that a very small model half knows, for a first run without any download.

First letter of a word, the next number, the larger of two numbers, small sums: each asked in a chat after a worked
example of its own kind, so that even a 135M model writes the tags and about half of the answers, and nearly every
group of completions holds right ones and wrong ones. Answers are a few tokens.

Three in ten of all questions are held out, the same ones for every seed and size: no training prompt asks or shows one,
and what differs only in the order of its numbers (3 + 5, 5 + 3) is on one side together.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.plugins import did_you_mean
from common.protocols import RewardFunction, Split
from common.tasks import Prompts, answer_in, check_whole, format_reward
from common.types import Completion, Message, Prompt

_HELD_OUT = 0.3
_WORDS = Path(__file__).with_name("warmup_words.txt")
"""Short common words, some for nearly every letter."""


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str
    unit: tuple[str, ...]
    """Questions with the same unit are asked in the same split."""


def _first_letter() -> Iterator[_Question]:
    for word in _WORDS.read_text(encoding="ascii").split():
        yield _Question(f"What is the first letter of the word {word}?", word[0], (word,))


def _next_number() -> Iterator[_Question]:
    for number in range(1, 1000):
        yield _Question(f"What number comes after {number}?", str(number + 1), (str(number),))


def _larger() -> Iterator[_Question]:
    # As many numbers of one digit as of two and of three, so that two thirds of the pairs differ in length.
    chosen = random.Random("warmup larger")
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < 500:
        a, b = (chosen.randrange(10 ** (digits - 1), 10**digits) for digits in chosen.choices((1, 2, 3), k=2))
        if a != b:
            pairs.add((min(a, b), max(a, b)))
    for low, high in sorted(pairs):
        for a, b in (low, high), (high, low):
            yield _Question(f"Which number is larger, {a} or {b}?", str(high), (str(low), str(high)))


def _sum() -> Iterator[_Question]:
    for a in range(1, 20):
        for b in range(1, 21 - a):
            yield _Question(f"What is {a} + {b}?", str(a + b), (str(min(a, b)), str(max(a, b))))


_KINDS: dict[str, Callable[[], Iterator[_Question]]] = {
    "first_letter": _first_letter,
    "next_number": _next_number,
    "larger": _larger,
    "sum": _sum,
}


@functools.cache
def _pool(kind: str, split: Split) -> tuple[_Question, ...]:
    """Every question of this kind that may be asked in the split."""
    questions = list(_KINDS[kind]())
    units = sorted({question.unit for question in questions})
    random.Random(f"warmup held out {kind}").shuffle(units)
    held_out = set(units[: round(_HELD_OUT * len(units))])
    return tuple(question for question in questions if (question.unit in held_out) == (split == "test"))


class Warmup:
    """Generated first questions: first letter, next number, larger of two, small sums; needs no download.

    Options: ``seed`` draws the questions; ``train_questions`` and ``test_questions`` are the splits' sizes;
    ``shots`` is the number of worked examples before each question; ``kinds`` chooses among ``first_letter``,
    ``next_number``, ``larger`` and ``sum``, asked in turn.
    """

    def __init__(
        self,
        seed: int = 0,
        train_questions: int = 4000,
        test_questions: int = 200,
        shots: int = 1,
        kinds: Sequence[str] = tuple(_KINDS),
    ) -> None:
        check_whole("seed", seed, 0)
        check_whole("train_questions", train_questions, 1)
        check_whole("test_questions", test_questions, 1)
        check_whole("shots", shots, 0, 20)
        if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds):
            raise UserError(f"task.options.kinds={kinds!r} must be a list of different kinds: {', '.join(_KINDS)}")
        for kind in kinds:
            if kind not in _KINDS:
                names = f"{did_you_mean(kind, _KINDS)}there are {', '.join(_KINDS)}"
                raise UserError(f"task.options.kinds has {kind!r}; {names}")
        most = len(kinds) * min(len(_pool(kind, "test")) for kind in kinds)
        if test_questions > most:
            raise UserError(
                f"task.options.test_questions={test_questions} is more than the {most} held-out questions of "
                f"{', '.join(kinds)}; use at most {most}"
            )
        self._seed, self._shots, self._kinds = seed, shots, tuple(kinds)
        self._sizes: dict[Split, int] = {"train": train_questions, "test": test_questions}
        self.reward_weights: Mapping[str, float] = {"correct": 1.0, "format": 0.1}
        self.rewards: Mapping[str, RewardFunction] = {
            "correct": lambda prompt, completion: float(self.is_correct(prompt, completion)),
            "format": format_reward,
        }

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The kinds in turn; a kind's questions are asked once each before any is asked again (in train only)."""
        return Prompts(self._sizes[split], lambda index: self._prompt(split, index))

    def is_correct(self, prompt: Prompt, completion: Completion) -> bool:
        """The text in the tags is the answer, letters in either case. See ``common.tasks.answer_in``."""
        answer = answer_in(completion.text)
        return answer is not None and answer.lower() == prompt.data["answer"]

    def _prompt(self, split: Split, index: int) -> Prompt:
        kind = self._kinds[index % len(self._kinds)]
        pool = _pool(kind, split)
        turn, place = divmod(index // len(self._kinds), len(pool))
        question = pool[_order(self._seed, kind, split, turn)[place]]
        # Examples are training questions in both splits, and never the question's own twin.
        chosen = random.Random(f"warmup examples {self._seed} {split} {index}")
        examples: list[_Question] = []
        while len(examples) < self._shots:
            example = chosen.choice(_pool(kind, "train"))
            if example.unit not in {question.unit, *(other.unit for other in examples)}:
                examples.append(example)
        messages: list[Message] = []
        for example in examples:
            messages.append({"role": "user", "content": example.text})
            messages.append({"role": "assistant", "content": f"<answer>{example.answer}</answer>"})
        # Without an example nothing else would show the format.
        asked = question.text if examples else f"{question.text} Reply as <answer>…</answer>."
        messages.append({"role": "user", "content": asked})
        data = {"kind": kind, "question": question.text, "answer": question.answer}
        return Prompt(id=f"{split}-{index}", messages=tuple(messages), data=data)


@functools.lru_cache(maxsize=64)
def _order(seed: int, kind: str, split: Split, turn: int) -> list[int]:
    order = list(range(len(_pool(kind, split))))
    random.Random(f"warmup order {seed} {kind} {split} {turn}").shuffle(order)
    return order
