"""What the replicas of ``sampler_pool.py`` are asked: requests, cut into items and put together again."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from common.protocols import GroupsFuture
from common.types import Group, Prompt, SamplingParams

_numbers = itertools.count(1)


@dataclasses.dataclass(eq=False)
class Request:
    """The groups of a request as they come in, by their place in it."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    future: GroupsFuture = dataclasses.field(default_factory=GroupsFuture)
    groups: dict[int, Group] = dataclasses.field(default_factory=dict)

    def items(self, size: int) -> Iterator[WorkItem]:
        """The request in pieces of ``size`` prompts."""
        for first in range(0, len(self.prompts), size):
            prompts = tuple(self.prompts[first : first + size])
            params = dataclasses.replace(self.params, seed_offset=first)
            yield WorkItem(self, first, prompts, params)

    def add(self, item: WorkItem, groups: Sequence[Group]) -> None:
        for place, group in enumerate(groups, item.first):
            self.groups[place] = group
            self.future.group_done(place, group)
        if len(self.groups) == len(self.prompts):
            self.future.set_result([self.groups[place] for place in range(len(self.prompts))])


@dataclasses.dataclass(eq=False)
class WorkItem:
    """Prompts of one request that one replica answers."""

    request: Request
    first: int
    """The first prompt's place in the request."""
    prompts: Sequence[Prompt]
    params: SamplingParams
    id: int = dataclasses.field(default_factory=lambda: next(_numbers))
    since: float = 0.0
    """When it was sent to its replica, on the monotonic clock; 0: not yet."""

    def fault_of(self, groups: Sequence[Group], vocabulary: int) -> str:
        """What is wrong with these answers, or nothing. ``vocabulary``: how many tokens there are."""
        if [group.prompt.id for group in groups] != [prompt.id for prompt in self.prompts]:
            return "other prompts than asked"
        for group in groups:
            of = f"of prompt {group.prompt.id!r}"
            if len(group.completions) != self.params.n:
                return f"{len(group.completions)} completions {of} instead of {self.params.n}"
            for completion in group.completions:
                if len(completion.logprobs) != len(completion.token_ids):
                    return f"a completion {of} without all log-probs"
                if not all(0 <= token < vocabulary for token in completion.token_ids):
                    return f"a token {of} that is not in the vocabulary"
                if not all(math.isfinite(value) and value < 1e-3 for value in completion.logprobs):
                    return f"a log-prob {of} that is none"
        return ""
