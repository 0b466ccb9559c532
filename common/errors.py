"""The two ways a run ends badly: the user's mistake (exit code 2) and a failure of the machine (exit code 1).

Our own mistakes are plain ``assert`` statements and never one of these.
"""

from __future__ import annotations

import re


class UserError(ValueError):
    """A mistake that the user can fix: one sentence with the key, the value and the cure."""


class RunFailure(RuntimeError):
    """Something broke while running: one sentence naming the side that failed and what it was doing."""


class OutOfMemory(RunFailure):
    """Host or device memory ran out where less can be asked for."""


class LearnerLost(RunFailure):
    """The learner and its state are lost; it goes on from its last checkpoint."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that host or device memory ran out: torch has no type of its own for the host's, and one
    from another process is a ``RunFailure`` with its text."""
    said = re.search(r"out of memory|can't allocate memory|cannot allocate memory", str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or bool(said)


def brief(error: BaseException) -> str:
    """The error's text in one line of at most 300 characters; without a text its type."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Of the error's text, which may go on with a library's advice; without a text its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def printable(text: str, one_line: bool = False) -> str:
    """The text with everything that could steer a terminal shown as U+FFFD; with ``one_line`` the ends of lines too.
    What is shown may be a model's, and a terminal obeys control characters."""
    kept = "" if one_line else "\n"
    return "".join(letter if letter.isprintable() or letter == kept else "\ufffd" for letter in text.expandtabs(4))
