"""The rehearsal: the largest pack that a run can make, through the learner before the first step, leaving no trace.

``longest_groups`` and ``largest_pack`` say what that pack is; the memory plan (``learner/memory_estimate.py``) measures
it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from common.config import Config
from common.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from learner.torch_learner import TorchLearner


def vocabulary_of(model: Any) -> int:
    """Rows of the model's output head."""
    return int(model.get_output_embeddings().weight.shape[0])


def longest_groups(config: Config, prompt_tokens: int) -> list[Group]:
    """A step's groups at their longest: every prompt ``prompt_tokens``, every completion ``max_tokens`` tokens, none
    with a beginning that another has."""
    length, size = config.sampler.max_tokens, config.train.group_size
    return [
        Group(
            Prompt(f"longest-{number}", (), token_ids=(number, *(1,) * (prompt_tokens - 1))),
            tuple(_made_up((place, *(1,) * (length - 1))) for place in range(size)),
        )
        for number in range(config.train.prompts_per_step)
    ]


def lengthened(groups: Iterable[Group], max_tokens: int) -> list[Group]:
    """These groups with every completion at full length, its last token repeated, and an advantage to learn from."""
    return [
        Group(
            group.prompt,
            tuple(
                _made_up((*one.token_ids, *(one.token_ids[-1:] or (1,)) * (max_tokens - len(one.token_ids))))
                for one in group.completions
            ),
        )
        for group in groups
    ]


def _made_up(token_ids: tuple[int, ...]) -> Completion:
    # "stop" and not "length": learner.truncated may leave those out.
    return Completion(token_ids, "", (0.0,) * len(token_ids), "stop", 0, {}, 1.0, 1.0)


def largest_pack(
    groups: Sequence[Group], budget_tokens: int, packed: bool, vocabulary: int
) -> tuple[list[Group], bool]:
    """What of ``groups`` fills one forward pass to ``budget_tokens`` (``learner/batch/packing.py``), and whether
    anything may be left over for another pass. The last completion is shortened to fit: a step whose other completions
    are shorter fills a pack just so.

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
        for one in group.completions:
            room = budget_tokens - used
            more = more or len(one.token_ids) - 1 > room
            if count and room < 1:
                more = True
                break
            cut = one.token_ids[: room + 1] if count else one.token_ids
            kept.append(_made_up((*_own(count, vocabulary), *cut[2:])[: len(cut)]))
            used, count = used + len(cut) - 1, count + 1
        taken = _closed(taken, group, kept)
    alike = [dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, token_ids=base)) for one in taken]
    for place in range(1, len(alike)):
        wanted = len(taken[place].prompt.token_ids)
        own = min(wanted, max(0, budget_tokens - used))
        more = more or own < wanted
        alike[place] = _branching(alike[place], len(base) - own, place, vocabulary)
        used += own
    return alike, more


def _own(number: int, vocabulary: int) -> tuple[int, int]:
    """Two tokens that no other number has."""
    return number % vocabulary, number // vocabulary % vocabulary


def _branching(group: Group, at: int, number: int, vocabulary: int) -> Group:
    """With a prompt that leaves the others' after ``at`` tokens."""
    prompt = group.prompt.token_ids
    if at < len(prompt):
        prompt = (*prompt[:at], (prompt[at] + number) % vocabulary, *prompt[at + 1 :])
    return dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, token_ids=prompt))


def repeated(pack: Sequence[Group], times: int, vocabulary: int) -> list[Group]:
    """The pack so many times, no two with anything in common: the prompts of each begin with tokens of their own."""
    return [_branching(group, 0, again * len(pack), vocabulary) for again in range(times) for group in pack]


def _largest_padded(groups: Sequence[Group], budget_tokens: int) -> tuple[list[Group], bool]:
    taken: list[Group] = []
    rows = longest = 0
    for group in groups:
        kept: list[Completion] = []
        for one in group.completions:
            longest = max(longest, len(group.prompt.token_ids) + len(one.token_ids) - 1)
            if rows and budget_tokens // longest - rows < 1:
                return _closed(taken, group, kept), True
            rows += 1
            kept.append(one)
        taken = _closed(taken, group, kept)
    return taken, False


def _closed(taken: list[Group], group: Group, kept: list[Completion]) -> list[Group]:
    return [*taken, dataclasses.replace(group, completions=tuple(kept))] if kept else taken


def at_rate_zero(config: Config) -> Config:
    """The configuration of a rehearsal: nothing moves, and one update is as large as several."""
    optimizer = config.optimizer.model_copy(update={"lr": 0.0})
    learner = config.learner.model_copy(update={"inner_updates": 1})
    return config.model_copy(update={"optimizer": optimizer, "learner": learner})


@contextlib.contextmanager
def untouched(learner: TorchLearner) -> Iterator[None]:
    """Inside, the learner works at rate 0; afterwards its weights, moments, version and random state are what they
    were."""
    config, version = learner._config, learner.version
    learner._config = at_rate_zero(config)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        learner._config, learner.version = config, version
        learner._optimizer.reset()


def rehearse(learner: TorchLearner, groups: Sequence[Group]) -> None:
    """``TorchLearner.rehearse``."""
    spec = learner._config
    full = lengthened(groups, spec.sampler.max_tokens)
    vocabulary = vocabulary_of(learner._model)
    pack, more = largest_pack(full, spec.learner.microbatch_tokens, learner.packed, vocabulary)
    with untouched(learner):
        if more:  # a later pack finds the gradients of those before it
            learner._optimizer.blank_gradients()
        learner.update(repeated(pack, learner._ranks.size, vocabulary))
