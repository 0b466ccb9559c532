"""Which prompts a step samples: in the task's order, or those whose groups are likely to disagree.

A group whose rewards are all equal teaches nothing, and late in a run most groups are such. ``difficulty`` draws each
step's prompts from more than are needed, by how likely their groups are to disagree. It learns that from the groups
themselves: of each kind that the task declares (``prompt.data["kind"]``), so that it works before a prompt is seen
again, and of each prompt. What was seen loses half its weight every ``HALF_LIFE`` steps, because the policy moves, and
is forgotten once it weighs little: there is no state for prompts that were not seen recently, however many there are.

Its bias: gradients come from the task's prompts weighted by their share of groups with signal. Groups without signal
have no gradient, so that what changes is the weight of the others among themselves. Prioritised sampling of prompts:
GRESO, arXiv 2506.02177; SPEED, arXiv 2506.09016. Used by the training loop.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from common.prompts import PromptStream
from common.types import Group, Prompt
from learner.loss.advantages import has_signal

SelectionKind = Literal["uniform", "difficulty"]
POOL = 4  # prompts looked at for one that is sampled
FLOOR = 0.1  # least chance that counts, so that every prompt is seen again
HALF_LIFE = 8  # steps
FORGOTTEN = 0.05  # groups: what weighs less is dropped


class Selection:
    """Takes prompts from ``stream`` by ``kind``. Its state and the stream's make a run go on exactly."""

    def __init__(self, stream: PromptStream, kind: SelectionKind, seed: int) -> None:
        self._stream, self._kind, self._seed = stream, kind, seed
        self._kinds: dict[str, list[float]] = {}  # groups with signal, groups; both decayed
        self._prompts: dict[str, list[float]] = {}

    def take(self, n: int) -> list[Prompt]:
        """``n`` prompts for the next request. Raises what the stream raises."""
        if self._kind == "uniform":
            return self._stream.take(n)
        draw = random.Random(f"selection {self._seed} {self._stream.state()['position']}")
        size = max(n, min(POOL * n, len(self._stream)))  # few prompts are not looked at twice for one request
        pool = self._stream.take(size)
        # Without replacement, by weight: Efraimidis and Spirakis 2006.
        keys = [draw.random() ** (1 / max(self.chance(prompt), FLOOR)) for prompt in pool]
        chosen = sorted(sorted(range(size), key=lambda place: -keys[place])[:n])
        return [pool[place] for place in chosen]

    def chance(self, prompt: Prompt) -> float:
        """That a group of this prompt has signal: the prompt's own groups beside one of its kind's, the kind's beside
        one of all, all beside one that had it."""
        signal, groups = map(sum, zip(*self._kinds.values(), strict=True)) if self._kinds else (0.0, 0.0)
        estimate = (signal + 1) / (groups + 1)
        for seen in (self._kinds.get(_kind(prompt)), self._prompts.get(prompt.id)):
            if seen:
                estimate = (seen[0] + estimate) / (seen[1] + 1)
        return estimate

    def observe(self, groups: Sequence[Group]) -> None:
        """Learns from the scored groups of one step."""
        if self._kind == "uniform":
            return
        for table in (self._kinds, self._prompts):
            for key, seen in list(table.items()):
                table[key] = [value * 0.5 ** (1 / HALF_LIFE) for value in seen]
                if seen[1] < FORGOTTEN:
                    del table[key]
        for group in groups:
            for table, key in ((self._kinds, _kind(group.prompt)), (self._prompts, group.prompt.id)):
                seen = table.setdefault(key, [0.0, 0.0])
                seen[0] += has_signal(group)
                seen[1] += 1

    def state(self) -> dict[str, Any]:
        """JSON values; the stream's state is its own."""
        return {"kinds": self._kinds, "prompts": self._prompts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo of ``state``; of ``{}``, which older checkpoints have, nothing is known."""
        self._kinds = {key: list(seen) for key, seen in state.get("kinds", {}).items()}
        self._prompts = {key: list(seen) for key, seen in state.get("prompts", {}).items()}


def _kind(prompt: Prompt) -> str:
    return str(prompt.data.get("kind", ""))
