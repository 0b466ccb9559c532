"""The largest pack that a run can make, before its first step: what the rehearsal learns and the memory plan measures.

Used by ``TorchLearner.rehearse`` and ``learner/memory_estimate.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from common.config import Config
from common.types import Completion, Group, Prompt


def vocabulary_of(model: Any) -> int:
    """Rows of the model's output head."""
    return int(model.get_output_embeddings().weight.shape[0])


def longest_groups(config: Config, prompt_tokens: int) -> list[Group]:
    """A step's groups at their longest: every prompt ``prompt_tokens``, every completion ``max_tokens`` tokens, no two
    with a shared prefix."""
    length, size = config.sampler.max_tokens, config.train.group_size
    return [
        Group(
            Prompt(f"longest-{number}", (), token_ids=(number, *(1,) * (prompt_tokens - 1))),
            tuple(_dummy((place, *(1,) * (length - 1))) for place in range(size)),
        )
        for number in range(config.train.prompts_per_step)
    ]


def pad_to_max_tokens(groups: Iterable[Group], max_tokens: int) -> list[Group]:
    """These groups with every completion at full length, its last token repeated, and an advantage to learn from."""

    def padded(ids: tuple[int, ...]) -> Completion:
        return _dummy((*ids, *(ids[-1:] or (1,)) * (max_tokens - len(ids))))

    return [replace(group, completions=tuple(padded(c.token_ids) for c in group.completions)) for group in groups]


def _dummy(token_ids: tuple[int, ...]) -> Completion:
    # "stop" and not "length": learner.truncated may leave those out.
    return Completion(token_ids, "", (0.0,) * len(token_ids), "stop", 0, {}, 1.0, 1.0)


def largest_pack(
    groups: Sequence[Group], budget_tokens: int, packed: bool, vocabulary: int
) -> tuple[list[Group], bool]:
    """What of ``groups`` fills one forward pass to ``budget_tokens`` (``learner/batch/packing.py``), and whether
    anything may be left over for another pass. When packed, the last completion is shortened to fit: a step whose other
    completions are shorter fills a pack just so.

    When packed, prompts may share a prefix of any length, and the longer it is the more of a pass are completions: so
    all groups get the longest one's prompt, and as far as that leaves room prompts of their own. Completions share
    nothing.
    """
    if not packed:
        return _largest_padded(groups, budget_tokens)
    base = (0, *max((group.prompt.token_ids for group in groups), key=len)[1:])
    used, count = len(base), 0
    taken: list[Group] = []
    more = False
    for group in groups:
        kept: list[Completion] = []
        for completion in group.completions:
            ids, room = completion.token_ids, budget_tokens - used
            more = more or len(ids) - 1 > room
            if count and room < 1:
                more = True
                break
            ids = ids[: room + 1] if count else ids
            own = (count % vocabulary, count // vocabulary % vocabulary)  # two tokens that no other completion has
            kept.append(_dummy((*own, *ids[2:])[: len(ids)]))
            used, count = used + len(ids) - 1, count + 1
        if kept:
            taken.append(replace(group, completions=tuple(kept)))
    pack = []
    for place, group in enumerate(taken):
        wanted = len(group.prompt.token_ids) if place else 0
        own_tokens = min(wanted, max(0, budget_tokens - used))
        more = more or own_tokens < wanted
        used += own_tokens
        alike = replace(group, prompt=replace(group.prompt, token_ids=base))
        pack.append(_diverge_at(alike, len(base) - own_tokens, place, vocabulary))
    return pack, more


def _diverge_at(group: Group, at: int, number: int, vocabulary: int) -> Group:
    """With a prompt that leaves the others' after ``at`` tokens."""
    ids = group.prompt.token_ids
    if at < len(ids):
        ids = (*ids[:at], (ids[at] + number) % vocabulary, *ids[at + 1 :])
    return replace(group, prompt=replace(group.prompt, token_ids=ids))


def repeated(pack: Sequence[Group], times: int, vocabulary: int) -> list[Group]:
    """The pack that many times, no two with a shared prefix: the prompts of each start with tokens of their own."""
    return [_diverge_at(group, 0, again * len(pack), vocabulary) for again in range(times) for group in pack]


def _largest_padded(groups: Sequence[Group], budget_tokens: int) -> tuple[list[Group], bool]:
    taken: list[Group] = []
    rows = longest = 0
    for group in groups:
        for place, completion in enumerate(group.completions):
            longest = max(longest, len(group.prompt.token_ids) + len(completion.token_ids) - 1)
            if rows and budget_tokens // longest - rows < 1:
                return taken + [replace(group, completions=group.completions[:place])] * (place > 0), True
            rows += 1
        taken.append(group)
    return taken, False


def at_rate_zero(config: Config) -> Config:
    """The configuration of a rehearsal: nothing moves, and one update is as large as several."""
    optimizer = config.optimizer.model_copy(update={"lr": 0.0})
    learner = config.learner.model_copy(update={"inner_updates": 1})
    return config.model_copy(update={"optimizer": optimizer, "learner": learner})
