"""The loop and its scores: groups are scored while others are written, and no number depends on when."""

from __future__ import annotations

import contextlib
import json
import textwrap
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.config import TaskConfig
from common.errors import RunFailure, UserError
from common.protocols import GroupsFuture
from common.rewards.scorer import Scorer
from common.types import Completion, Group, Prompt
from learner import train as loops
from learner.train import Loop
from tests.making import config

WAIT_S = 60

TASK = """
    from pathlib import Path

    class Task:
        reward_weights = {"third": 1.0}

        def __init__(self):
            self.rewards = {"third": self.third}

        def prompts(self, split):
            return []

        def is_correct(self, prompt, completion):
            return True

        def third(self, prompt, completion):
            if completion.text == "raise":
                raise ValueError("no such thing")
            if "mark" in prompt.data:
                Path(prompt.data["mark"]).touch()
            return sum(completion.token_ids) / 3
"""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    file = tmp_path_factory.mktemp("task") / "thirds.py"
    file.write_text(textwrap.dedent(TASK))
    settings = TaskConfig(name=f"{file}:Task", sandbox="none", reward_workers=2, on_reward_error="skip")
    with Scorer(settings) as scorer:
        yield scorer


class Stream:
    """Prompts numbered on; those of ``marks`` leave a file behind once they are scored."""

    passed_over = 0

    def __init__(self, marks: Path | None = None) -> None:
        self.marks, self.taken = marks, 0

    def state(self) -> dict:
        return {"taken": self.taken}

    def restore(self, state) -> None:
        self.taken = state["taken"]

    def take(self, count: int) -> list[Prompt]:
        numbers = range(self.taken, self.taken + count)
        self.taken += count
        return [Prompt(f"p{n}", (), {"mark": str(self.marks / f"p{n}")} if self.marks else {}) for n in numbers]


def written(prompt: Prompt, n: int) -> Group:
    number = int(prompt.id[1:])
    texts = ["raise" if number % 5 == 3 and draw == 1 else "" for draw in range(n)]
    return Group(
        prompt, tuple(Completion((number, draw), text, (-1.0, -1.0), "stop", 0) for draw, text in enumerate(texts))
    )


class Whole:
    """Answers with a plain future."""

    def generate(self, prompts, params):
        future: Future = Future()
        future.set_result([written(prompt, params.n) for prompt in prompts])
        return future


class Reporting:
    """Writes on a thread and reports groups in an order of its own; holds each back until those before are scored."""

    def __init__(self, order, scored=lambda prompt: True) -> None:
        self.order, self.scored = order, scored

    def generate(self, prompts, params):
        future = GroupsFuture()
        threading.Thread(target=self.write, args=(future, prompts, params), daemon=True).start()
        return future

    def write(self, future, prompts, params):
        groups = [written(prompt, params.n) for prompt in prompts]
        order = self.order(range(len(groups)))
        for index, following in pairwise([*order, None]):
            future.group_done(index, groups[index])
            deadline = time.monotonic() + WAIT_S
            while following is not None and not self.scored(prompts[index]):
                if time.monotonic() > deadline:
                    return future.set_exception(RunFailure("a group was not scored while the next was held back"))
                time.sleep(0.01)
        return future.set_result(groups)


@contextlib.contextmanager
def at_once():
    yield


def make(scorer, sampler, stream=None, *, rounds=0, staleness=0, size=6):
    settings = config(train={"steps": 9, "prompts_per_step": size, "group_size": 3, "dynamic_sampling_rounds": rounds})
    stale = settings.train.model_copy(update={"max_staleness": staleness})  # which is for clusters alone
    settings = settings.model_copy(update={"train": stale})
    free = SimpleNamespace(sampling=at_once, learning=at_once, syncing=at_once)
    tracker = SimpleNamespace(phase=lambda text: None)
    return Loop(
        settings, SimpleNamespace(version=0), sampler, free, scorer, stream or Stream(), None, tracker, None,
        lambda: 0.0, lambda: 0, WAIT_S,
    )  # type: ignore[arg-type]  # fmt: skip


def sampled(loop, steps=2):
    return [loops._sample(loop, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("order", [list, reversed, lambda numbers: sorted(numbers, key=lambda n: (n % 3, n))])
@pytest.mark.parametrize(("rounds", "staleness"), [(0, 0), (2, 0), (0, 1)])
def test_scores_and_advantages_are_bit_for_bit_those_of_an_answer_scored_at_its_end(scorer, order, rounds, staleness):
    at_end = sampled(make(scorer, Whole(), rounds=rounds, staleness=staleness))
    as_they_come = sampled(make(scorer, Reporting(order), rounds=rounds, staleness=staleness))
    for (right, numbers), (groups, own) in zip(at_end, as_they_come, strict=True):
        assert groups == right
        assert own["groups_skipped_reward_error"] == numbers["groups_skipped_reward_error"] > 0
        assert all(one.advantage is not None for group in groups for one in group.completions)


def test_a_group_is_scored_before_the_next_one_is_there(scorer, tmp_path):
    """The sampler holds each group back until the mark of the one before is on the disk."""
    sampler = Reporting(list, lambda prompt: Path(prompt.data["mark"]).exists())
    loop = make(scorer, sampler, Stream(tmp_path), size=3)
    groups, _ = loops._sample(loop, 1)
    assert [group.prompt.id for group in groups] == ["p0", "p1", "p2"]


def test_a_request_in_flight_is_scored_while_the_loop_does_something_else(scorer, tmp_path):
    """With ``max_staleness`` 1 the second request is made before the first is waited for, and nobody waits for it."""
    loop = make(scorer, Reporting(list), Stream(tmp_path), staleness=1, size=3)
    loops._sample(loop, 1)
    deadline = time.monotonic() + WAIT_S
    while not all((tmp_path / f"p{n}").exists() for n in (4, 5)) and time.monotonic() < deadline:
        time.sleep(0.01)  # as long as the learner learns
    assert (tmp_path / "p5").exists()
    assert [request.number for request in loop.in_flight] == [1]


def test_a_checkpoint_holds_groups_unscored_and_restored_ones_are_scored_alike(scorer):
    loop = make(scorer, Reporting(list), staleness=1)
    loops._sample(loop, 1)
    loop.in_flight[0].future.result(WAIT_S)
    state = loop.state()
    assert all(one["reward"] is None for group in state["in_flight"][0]["groups"] for one in group["completions"])
    resumed = make(scorer, Reporting(reversed), staleness=1)
    resumed.restore(state)
    (mine, _), (right, _) = loops._sample(resumed, 2), loops._sample(loop, 2)
    assert mine == right


def test_every_listener_hears_of_every_group_once_whenever_it_begins_to_listen():
    future, count, heard = GroupsFuture(), 200, [deque() for _ in range(8)]

    def report(numbers):
        for number in numbers:
            future.group_done(number, Group(Prompt(f"p{number}", ()), ()))

    work = [threading.Thread(target=report, args=(range(start, count, 4),)) for start in range(4)]
    for place, thread in enumerate(work):
        future.on_group(lambda index, group, place=place: heard[place].append((index, group.prompt.id)))
        thread.start()
    for place in range(4, 8):
        future.on_group(lambda index, group, place=place: heard[place].append((index, group.prompt.id)))
    for thread in work:
        thread.join()
    for own in heard:
        assert sorted(own) == [(number, f"p{number}") for number in range(count)]


def test_a_step_that_ends_at_a_prompt_keeps_the_answers_it_had(scorer):
    """The second round of a step's sampling draws a prompt that is too long: a run resumed without it samples as one
    that never met it."""

    class Ends(Stream):
        def take(self, count):
            if self.taken >= 6:
                raise UserError("too long")
            return super().take(count)

    class After(Whole):
        def generate(self, prompts, params):
            groups = super().generate(prompts, params).result()
            future: Future = Future()
            future.set_result(
                [Group(g.prompt, tuple(replace(one, policy_version=1) for one in g.completions)) for g in groups]
            )
            return future

    def begun(stream):
        loop = make(scorer, After(), stream, rounds=1)
        loop.learner.version = 1
        return loop

    saved = []
    ended = begun(Ends())
    ended.checkpoints = SimpleNamespace(save=lambda version, learner, state: saved.append(json.dumps(state)))
    with pytest.raises(UserError, match="too long"):
        sampled(ended, 1)
    resumed, never = begun(Stream()), begun(Stream())
    resumed.restore(json.loads(saved[0]))
    for (groups, _), (others, _) in zip(sampled(resumed), sampled(never), strict=True):
        assert groups == others
    assert resumed.state() == never.state()
