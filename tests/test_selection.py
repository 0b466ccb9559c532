"""Selection of prompts: where groups disagree, nothing forgotten, and the same choices after any interruption."""

import json
import random
from collections import Counter

import pytest

from common.prompts import PromptStream
from common.types import Completion, Group, Prompt
from learner.selection import FLOOR, POOL, Selection


def prompts(count, kinds=("hard", "mixed", "easy")):
    return [Prompt(f"p{number}", (), {"kind": kinds[number % len(kinds)]}) for number in range(count)]


def scored(prompt, signal):
    rewards = (0.0, 1.0) if signal else (1.0, 1.0)
    return Group(prompt, tuple(Completion((), "", (), "stop", 0, {}, reward) for reward in rewards))


def made(count, kind="difficulty", seed=0):
    return Selection(PromptStream(prompts(count), seed), kind, seed)


def play(selection, steps, n, chances, seed=0):
    """The prompts of each step, where a group of a kind has signal with the kind's chance."""
    draw, taken = random.Random(seed), []
    for _ in range(steps):
        chosen = selection.take(n)
        selection.observe([scored(prompt, draw.random() < chances[prompt.data["kind"]]) for prompt in chosen])
        taken.append([prompt.id for prompt in chosen])
    return taken


def test_uniform_is_the_stream_and_keeps_nothing():
    selection, stream = made(50, "uniform"), PromptStream(prompts(50), 0)
    taken = play(selection, 9, 7, {"hard": 0.0, "mixed": 1.0, "easy": 0.0})
    assert taken == [[prompt.id for prompt in stream.take(7)] for _ in range(9)]
    assert selection.state() == {"kinds": {}, "prompts": {}}


def test_prompts_whose_groups_disagree_are_drawn_more_often_by_their_kind_alone():
    """Too many prompts to see one twice: 1 of 3 kinds has signal, and 4 are looked at for one that is drawn."""
    kinds = Counter()
    for step in play(made(30_000), 60, 12, {"hard": 0.02, "mixed": 0.9, "easy": 0.02})[10:]:
        kinds.update(int(name[1:]) % 3 for name in step)
    assert kinds[1] / kinds.total() > 0.7  # uniform: 0.33
    assert min(kinds[0], kinds[2]) / kinds.total() > 0.05


def test_every_prompt_of_a_small_task_is_seen_again():
    """Also one that never had signal, beside others that always have it."""
    taken = play(made(30), 200, 6, {"hard": 0.0, "mixed": 1.0, "easy": 0.0})
    for half in (taken[:100], taken[100:]):
        assert {name for step in half for name in step} == {f"p{number}" for number in range(30)}


@pytest.mark.parametrize(("count", "n"), [(3, 8), (8, 8), (20, 8), (1000, 8)])
def test_as_many_as_asked_for_and_none_twice_where_there_are_enough(count, n):
    for step in play(made(count), 5, n, {"hard": 0.1, "mixed": 0.5, "easy": 0.9}):
        assert len(step) == n
        assert len(set(step)) >= min(n, count) / 2 if count < POOL * n else len(set(step)) == n


def test_the_chance_by_hand():
    selection = made(9)
    [first, second] = [Prompt("a", (), {"kind": "x"}), Prompt("b", (), {"kind": "x"})]
    assert selection.chance(first) == 1  # nothing is known
    selection.observe([scored(first, True), scored(first, False), scored(second, False)])
    everything = (1 + 1) / (3 + 1)
    kind = (1 + everything) / (3 + 1)
    assert selection.chance(first) == pytest.approx((1 + kind) / (2 + 1))
    assert selection.chance(second) == pytest.approx((0 + kind) / (1 + 1))
    assert selection.chance(Prompt("c", (), {"kind": "x"})) == pytest.approx(kind)
    assert selection.chance(Prompt("d", ())) == pytest.approx(everything)
    for _ in range(8):  # half of the weight
        selection.observe([])
    everything = (0.5 + 1) / (1.5 + 1)
    kind = (0.5 + everything) / (1.5 + 1)
    assert selection.chance(first) == pytest.approx((0.5 + kind) / (1 + 1))


@pytest.mark.parametrize("before", [0, 1, 7])
def test_restored_it_chooses_as_if_never_interrupted(before):
    chances = {"hard": 0.1, "mixed": 0.6, "easy": 0.1}
    whole, stopped = made(100), made(100)
    play(whole, before, 5, chances)
    play(stopped, before, 5, chances)
    state = json.loads(json.dumps({"stream": stopped._stream.state(), "selection": stopped.state()}))
    other = made(100)
    other._stream.restore(state["stream"])
    other.restore(state["selection"])
    assert play(other, 9, 5, chances, seed=1) == play(whole, 9, 5, chances, seed=1)


def test_what_was_not_seen_of_late_is_forgotten():
    selection = made(100_000)
    play(selection, 300, 8, {"hard": 0.1, "mixed": 0.6, "easy": 0.1})
    assert len(selection.state()["prompts"]) < 8 * 40
    assert sum(map(selection.chance, selection.take(8))) / 8 > 3 * FLOOR
