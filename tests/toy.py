"""A task for tiny random models, whose answers are noise: it pays for short completions, which any model can learn.

``broken`` makes a reward fail in a chosen way. Used as ``task.name = "tests/toy.py:Toy"``, as a user's own file is.
"""

import os
import time

from common.types import Prompt


class Toy:
    reward_weights = {"short": 1.0, "even": 0.5}  # noqa: RUF012 (a plain attribute, as a user would write it)

    def __init__(self, questions: int = 12, broken: str = "", words: int = 3) -> None:
        self.rewards = {"short": self.short, "even": self.even}
        self._questions, self._broken, self._words = questions, broken, words

    def prompts(self, split):
        names = [f"{split} question {n} " + "very " * (self._words + n % 3) for n in range(self._questions)]
        return [Prompt(f"{split}-{n}", ({"role": "user", "content": name},), {"n": n}) for n, name in enumerate(names)]

    def short(self, prompt, completion):
        if self._broken == "raise":
            raise RuntimeError("no such thing")
        if self._broken == "hang":
            time.sleep(1000)
        if self._broken == "notfinite":
            return float("nan")
        if self._broken == "sometimes" and prompt.data["n"] % 4 == 0:
            raise RuntimeError("sometimes")
        if self._broken == "exit":
            os._exit(3)
        return 1.0 / (1 + len(completion.token_ids))

    def even(self, prompt, completion):
        return float(sum(completion.token_ids) % 2 == 0)

    def is_correct(self, prompt, completion):
        return sum(completion.token_ids) % 3 == 0
