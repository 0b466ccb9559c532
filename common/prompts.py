"""The endless, seeded, resumable order in which a run goes through a task's prompts.

Every epoch shows each prompt once, in a fresh order that depends only on the seed and the epoch's number, so the
stream's whole state is a position. Used by the training loop; evaluation goes through its prompts in their own order.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.types import Prompt


class PromptStream:
    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not len(prompts):
            raise UserError("the task has no training prompts; give it some (see task.options)")
        self._prompts = prompts
        self._seed = seed
        self._position = 0  # prompts taken since the start of the run
        self._epoch = -1
        self._order: list[int] = []

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; goes on into the next epoch where this one ends."""
        taken = []
        for _ in range(n):
            epoch, place = divmod(self._position, len(self._prompts))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._permutation(epoch)
            taken.append(self._prompts[self._order[place]])
            self._position += 1
        return taken

    def state(self) -> dict[str, Any]:
        """JSON values; ``restore`` takes a stream of the same prompts and seed back to here."""
        return {
            "position": self._position, "prompts": len(self._prompts), "seed": self._seed, "sha256": self._sha256,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.check(state)
        self._position = state["position"]

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ``UserError`` when ``state`` is of other prompts or another seed. One written before prompts were
        hashed has only their number."""
        for key, now in (("prompts", len(self._prompts)), ("seed", self._seed)):
            if state[key] != now:
                raise UserError(
                    f"the run was begun with {key}={state[key]} in its prompt stream and now has {now}; "
                    "resume with the task and seed that it was begun with"
                )
        if state.get("sha256", self._sha256) != self._sha256:
            raise UserError(
                f"the task's {len(self._prompts)} training prompts are not those that the run was begun with (their "
                "texts or answers have changed); give the task its former data, or begin another run"
            )

    @functools.cached_property
    def _sha256(self) -> str:
        """Of every prompt as the task made it, with what it is scored by. How the model is shown them is the model's
        and the configuration's."""
        digest = hashlib.sha256()
        for prompt in self._prompts:
            # Of a value that JSON has no word for only the type: its text may hold an address in memory.
            whole = [prompt.id, [dict(message) for message in prompt.messages], dict(prompt.data)]
            text = json.dumps(whole, default=lambda value: type(value).__name__, skipkeys=True)
            digest.update(text.encode("ascii") + b"\n")
        return digest.hexdigest()

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        # Seeding from text goes through SHA-512: the same order in every process, unlike Python's hash().
        random.Random(f"prompts {self._seed} {epoch}").shuffle(order)
        return order
