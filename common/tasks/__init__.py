"""The built-in tasks, one a file, and what they share: prompts made when they are looked at, how an answer is read.

A task that needs a package of its own (``datasets``, ``reasoning_gym``) is the only file that imports it. Nothing
here imports torch: every reward worker imports its task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import overload

from common.errors import UserError
from common.types import Completion, Prompt

_ANSWER = re.compile(r"<answer>(.*?)</answer>\s*\Z", re.DOTALL)
_TAG = re.compile(r"</?answer>")


def answer_in(text: str) -> str | None:
    """What stands in the completion's ``<answer>…</answer>``, without surrounding space; None where it gives none.

    Strict on purpose, because a loose reader is what a policy learns to exploit: one opening and one closing tag in the
    whole completion, something between them, and nothing but space after them. Any text may come before.
    """
    if len(_TAG.findall(text)) != 2:  # first: from each of a thousand tags the search would go to the end
        return None
    match = _ANSWER.search(text)
    return match[1].strip() or None if match else None


def format_reward(prompt: Prompt, completion: Completion) -> float:
    """1 where the completion gives an answer, right or wrong."""
    return float(answer_in(completion.text) is not None)


def check_whole(key: str, value: object, least: int, most: float = math.inf) -> None:
    """Raises ``UserError`` for an option that is no whole number from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        limit = "" if most == math.inf else f" and at most {most}"
        raise UserError(f"task.options.{key}={value!r} must be a whole number of at least {least}{limit}")


class Prompts(Sequence[Prompt]):
    """Prompts made when they are looked at."""

    def __init__(self, size: int, make: Callable[[int], Prompt]) -> None:
        self._indices = range(size)
        self._make = make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self._make(i) for i in self._indices[index]]
        return self._make(self._indices[index])
