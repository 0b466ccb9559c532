"""The endless, seeded, resumable order in which a run goes through a task's prompts.

Every epoch shows each prompt once, in a fresh order that depends only on the seed and the epoch's number, so the
stream's whole state is a position. A task may have millions of prompts: each is made and rendered when it is taken, and
of many only some are looked at before the run (``looked_at``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.types import Prompt

LOOKED_AT = 10_000
"""Prompts of a task that are checked before a run: all, or at most this many, evenly spaced."""

MOST_PROMPTS = 100_000_000
"""Prompts of a task at most: their order takes 8 bytes each."""


def looked_at(count: int) -> Sequence[int]:
    """The places of the prompts that are looked at before a run with ``count`` of them."""
    return range(count) if count <= LOOKED_AT else [place * count // LOOKED_AT for place in range(LOOKED_AT)]


class PromptStream:
    """``fits`` says whether a prompt may be used; one that may not is passed over. ``asked`` are the prompts as the
    task made them, where ``prompts`` are rendered as they are taken."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        fits: Callable[[Prompt], bool] = lambda prompt: True,
        asked: Sequence[Prompt] | None = None,
    ) -> None:
        if not len(prompts):
            raise UserError("the task has no training prompts; give it some (see task.options)")
        self._prompts, self._fits = prompts, fits
        self._asked = prompts if asked is None else asked
        self._seed = seed
        self._position = 0  # prompts taken, and passed over, since the start of the run
        self.passed_over = 0
        """Prompts that did not fit, since the stream was made or restored."""
        self._epoch = -1
        self._order: Sequence[int] = ()

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts that fit; goes on into the next epoch where this one ends.

        Raises what making, rendering or ``fits`` raises, and then stands where it stood, and ``UserError`` when no
        prompt fits.
        """
        before = self._position
        taken: list[Prompt] = []
        unfit = 0  # one after the other
        try:
            while len(taken) < n:
                epoch, place = divmod(self._position, len(self._prompts))
                if epoch != self._epoch:
                    self._epoch, self._order = epoch, self._permutation(epoch)
                prompt = self._prompts[self._order[place]]
                self._position += 1
                if self._fits(prompt):
                    taken.append(prompt)
                    unfit = 0
                    continue
                unfit += 1
                if unfit >= 2 * len(self._prompts) - 1:  # as many include a whole epoch, wherever they start
                    raise UserError(
                        "none of the task's training prompts is short enough (task.long_prompts='drop'); raise "
                        "sampler.max_prompt_tokens, lower sampler.max_tokens or shorten them"
                    )
        except BaseException:
            self._position = before
            raise
        self.passed_over += self._position - before - n
        return taken

    def state(self) -> dict[str, Any]:
        """JSON values; ``restore`` takes a stream of the same prompts and seed back to here."""
        return {
            "position": self._position, "prompts": len(self._prompts), "seed": self._seed, "sha256": self._sha256,
            "hashed": len(looked_at(len(self._prompts))),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.check(state)
        self._position = state["position"]

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ``UserError`` when ``state`` is of other prompts or another seed. One written before prompts were
        hashed, or when all of very many were, has only their number."""
        for key, now in (("prompts", len(self._prompts)), ("seed", self._seed)):
            if state[key] != now:
                raise UserError(
                    f"the run was started with {key}={state[key]} in its prompt stream and now has {now}; "
                    "resume with the task and seed that it was started with"
                )
        hashed = len(looked_at(len(self._prompts)))
        if state.get("hashed", len(self._prompts)) == hashed and state.get("sha256", self._sha256) != self._sha256:
            raise UserError(
                f"the task's {len(self._prompts)} training prompts are not those that the run was started with (their "
                "texts or answers have changed); give the task its former data, or start another run"
            )

    @functools.cached_property
    def _sha256(self) -> str:
        """Of every prompt that is looked at, as the task made it, with what it is scored by. How the model is shown
        them is the model's and the configuration's."""
        digest = hashlib.sha256()
        for place in looked_at(len(self._asked)):
            prompt = self._asked[place]
            # Of a value that JSON cannot hold only the type: its text may hold an address in memory.
            whole = [prompt.id, [dict(message) for message in prompt.messages], dict(prompt.data)]
            text = json.dumps(whole, default=lambda value: type(value).__name__, skipkeys=True)
            digest.update(text.encode("ascii") + b"\n")
        return digest.hexdigest()

    def _permutation(self, epoch: int) -> Sequence[int]:
        order = array("q", range(len(self._prompts)))
        # Seeding from text goes through SHA-512: the same order in every process, unlike Python's hash().
        random.Random(f"prompts {self._seed} {epoch}").shuffle(order)
        return order
