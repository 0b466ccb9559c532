"""The built-in tasks, one a file, and the two things they share: prompts made when they are looked
at, and how a final answer is read from a completion.

A task that needs a package of its own (``datasets``, ``reasoning_gym``) is the only file that imports it. Nothing
here imports torch: every reward worker imports its task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import overload

from common.types import Prompt

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
