"""Any generator of reasoning-gym (arXiv 2505.24760) by name and settings, scored by its own scorer.

An entry is named by its seed and place and made again where it is scored: its metadata is not always plain values.
Some scorers evaluate the answer as Python; those get only what ``common/tasks/literals.py`` lets through.
Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from common.errors import UserError
from common.plugins import did_you_mean
from common.protocols import RewardFunction, Split
from common.tasks import Prompts, answer_in, check_whole, format_reward
from common.tasks.literals import readable
from common.types import Completion, Prompt

SYSTEM_PROMPT = "Think about the problem first, then give the final answer as <answer>…</answer> and stop."
_TRIES = 100
_TEST_SEED = 1_000_000_000
_CHANGES_WITH_HASH_SEED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note")
"""Generators of reasoning-gym 0.1.25 that walk over a set of strings, so that each process makes other entries."""


class ReasoningGym:
    """Generated puzzles of reasoning-gym, any of its generators, scored by its own scorer.

    Options: ``dataset`` is the generator (``basic_arithmetic``); ``settings`` goes to it; ``size`` and ``test_size``
    are the splits' questions; ``seed`` draws them. Test questions are distinct and never among the training questions.
    """

    def __init__(
        self,
        dataset: str,
        size: int = 1000,
        test_size: int = 100,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        for key, value, least in (("size", size, 1), ("test_size", test_size, 1), ("seed", seed, 0)):
            check_whole(key, value, least, _TEST_SEED - 1)
        if dataset not in DATASETS:
            hint = did_you_mean(dataset, DATASETS).strip() or f"there are {', '.join(sorted(DATASETS))}"
            raise UserError(f"task.options.dataset={dataset!r} is no generator of reasoning-gym; {hint}")
        if dataset in _CHANGES_WITH_HASH_SEED and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            raise UserError(_unsteady(dataset))
        self._dataset, self._settings = dataset, dict(settings or {})
        self._sizes: dict[Split, int] = {"train": size, "test": test_size}
        self._seed = seed
        self._check_settings()
        self._source = functools.lru_cache(maxsize=8)(self._make_source)
        # A group's completions are scored one after the other, and some entries take long to make.
        self._entry = functools.lru_cache(maxsize=8)(lambda size, seed, index: self._source(size, seed)[index])
        first = self._source(size, seed)
        if first[0]["question"] != first[0]["question"]:  # list_functions draws on at each look
            raise UserError(
                f"task.options.dataset={dataset!r} makes another question at each look, so no answer could be scored; "
                "use another generator"
            )
        self.reward_weights: Mapping[str, float] = {"correct": 1.0, "format": 0.1}
        self.rewards: Mapping[str, RewardFunction] = {"correct": self._correct, "format": format_reward}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Test entries are all made at once (to tell which questions training must leave out), training ones lazily."""
        if split == "test":
            return list(self._test)
        return Prompts(self._sizes["train"], self._train)

    def is_correct(self, prompt: Prompt, completion: Completion) -> bool:
        """The generator's scorer gives full marks to what is in the tags. See ``common.tasks.answer_in``."""
        return self._correct(prompt, completion) > 0.99

    def _correct(self, prompt: Prompt, completion: Completion) -> float:
        """The scorer's mark, 0 to 1; some generators give part marks. Without an answer in tags, 0."""
        answer = answer_in(completion.text)
        if answer is None:
            return 0.0
        where = prompt.data
        source = self._source(where["size"], where["seed"])
        entry = self._entry(where["size"], where["seed"], where["index"])
        if entry["question"] != where["question"]:
            raise RuntimeError(_unsteady(self._dataset))
        try:
            # Without an answer a scorer gives what it gives to one that it cannot read, which is not always 0.
            mark = float(source.score_answer(answer if readable(answer, entry) else None, entry))
        except Exception:  # what no author of a scorer has thought of is no right answer
            return 0.0
        return mark if math.isfinite(mark) else 0.0

    @functools.cached_property
    def _test(self) -> list[Prompt]:
        size = self._sizes["test"]
        questions: dict[str, Prompt] = {}
        for turn in range(_TRIES):
            # A new seed for each turn: some generators cannot make entries beyond their size. The seeds of two turns
            # differ by a size because most generators draw entry i from seed + i.
            seed = _TEST_SEED + self._seed + turn * size
            for index in range(size):
                prompt = self._prompt("test", len(questions), size, seed, index)
                questions.setdefault(prompt.data["question"], prompt)
                if len(questions) == size:
                    return list(questions.values())
        raise UserError(
            f"task.options.test_size={size} is more than the {len(questions)} different questions that "
            f"{self._dataset!r} makes with these settings; use fewer, or harder settings"
        )

    @functools.cached_property
    def _test_questions(self) -> frozenset[str]:
        return frozenset(prompt.data["question"] for prompt in self._test)

    def _train(self, index: int) -> Prompt:
        size = self._sizes["train"]
        for turn in range(_TRIES):
            prompt = self._prompt("train", index, size, self._seed + turn * size, index)
            if prompt.data["question"] not in self._test_questions:
                return prompt
        raise UserError(
            f"task.options.test_size={self._sizes['test']} takes nearly every question that {self._dataset!r} makes "
            "with these settings, so none is left to train on; use fewer, or harder settings"
        )

    def _prompt(self, split: Split, number: int, size: int, seed: int, index: int) -> Prompt:
        entry = self._source(size, seed)[index]
        messages = ({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": entry["question"]})
        data = {"question": entry["question"], "size": size, "seed": seed, "index": index}
        if isinstance(entry["answer"], str):  # for people; several generators have no single right answer
            data["answer"] = entry["answer"]
        return Prompt(id=f"{split}-{number}", messages=messages, data=data)

    def _make_source(self, size: int, seed: int) -> Any:
        try:
            return reasoning_gym.create_dataset(self._dataset, size=size, seed=seed, **self._settings)
        except (AssertionError, TypeError, ValueError) as error:  # how its generators refuse their settings
            raise UserError(
                f"task.options.settings={self._settings} is refused by {self._dataset!r} "
                f"({error or 'no reason given'}); it takes {', '.join(self._known_settings()) or 'none'}"
            ) from error

    def _check_settings(self) -> None:
        known = self._known_settings()
        for key in self._settings:
            if key in ("size", "seed"):
                raise UserError(f"task.options.settings.{key} belongs one level up: task.options.{key}")
            if key not in known:
                hint = f"{did_you_mean(key, known)}it takes {', '.join(known) or 'none'}"
                raise UserError(f"task.options.settings.{key} is not a setting of {self._dataset!r}; {hint}")

    def _known_settings(self) -> list[str]:
        fields = dataclasses.fields(DATASETS[self._dataset][1])
        return [field.name for field in fields if field.name not in ("size", "seed")]


def _unsteady(dataset: str) -> str:
    return (
        f"task.options.dataset={dataset!r} makes other questions in every process, because it depends on the order of "
        "Python sets; set PYTHONHASHSEED=0 in the environment"
    )
