"""The prompt stream: every prompt once an epoch, and the same stream after any interruption."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.prompts import LOOKED_AT, PromptStream, looked_at
from common.tasks import Prompts
from common.types import Prompt

ROOT = Path(__file__).parent.parent


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"train-{i}", messages=()) for i in range(count)]


def ids(taken: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in taken]


@given(count=st.integers(1, 30), seed=st.integers(0, 2**31), takes=st.lists(st.integers(0, 17), max_size=12))
def test_every_prompt_once_an_epoch(count, seed, takes):
    stream = PromptStream(prompts(count), seed)
    seen = [name for n in takes for name in ids(stream.take(n))]
    assert len(seen) == sum(takes)
    for start in range(0, len(seen), count):
        epoch = seen[start : start + count]
        assert len(set(epoch)) == len(epoch)


@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    before=st.integers(0, 100),
    after=st.lists(st.integers(0, 40), min_size=1, max_size=4),
)
def test_restored_at_any_point_it_goes_on_the_same(count, seed, before, after):
    stream = PromptStream(prompts(count), seed)
    stream.take(before)
    state = json.loads(json.dumps(stream.state()))
    other = PromptStream(prompts(count), seed)
    other.take(before // 2)
    other.restore(state)
    for n in after:
        assert ids(other.take(n)) == ids(stream.take(n))
    assert other.state() == stream.state()


def test_batches_do_not_change_the_order():
    whole = PromptStream(prompts(7), 3)
    pieces = PromptStream(prompts(7), 3)
    assert ids(whole.take(20)) == [name for n in (1, 6, 7, 6) for name in ids(pieces.take(n))]


def test_epochs_and_seeds_have_their_own_order():
    stream = PromptStream(prompts(50), 0)
    first, second = ids(stream.take(50)), ids(stream.take(50))
    assert first != second
    assert first != ids(prompts(50)), "the order must be shuffled"
    assert first != ids(PromptStream(prompts(50), 1).take(50))


def test_the_order_is_the_same_in_every_process():
    code = (
        "from common.prompts import PromptStream; from common.types import Prompt;"
        "print([p.id for p in PromptStream([Prompt(str(i), ()) for i in range(20)], 5).take(45)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_no_prompts_is_an_error():
    with pytest.raises(UserError, match="no training prompts"):
        PromptStream([], 0)


@pytest.mark.parametrize(("count", "seed", "named"), [(6, 0, "prompts=5"), (5, 1, "seed=0")])
def test_another_task_or_seed_cannot_take_up_the_state(count, seed, named):
    state = PromptStream(prompts(5), 0).state()
    with pytest.raises(UserError, match=named):
        PromptStream(prompts(count), seed).restore(state)


@given(count=st.integers(1, 20), seed=st.integers(0, 9), takes=st.lists(st.integers(0, 9), max_size=8), data=st.data())
def test_what_does_not_fit_is_passed_over_and_counted(count, seed, takes, data):
    unfit = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    stream = PromptStream(prompts(count), seed, lambda prompt: int(prompt.id[6:]) not in unfit)
    plain = PromptStream(prompts(count), seed)
    taken = [name for n in takes for name in ids(stream.take(n))]
    shown = ids(plain.take(stream.state()["position"]))
    assert taken == [name for name in shown if int(name[6:]) not in unfit]
    assert stream.passed_over == len(shown) - len(taken)


def test_a_prompt_that_cannot_be_taken_leaves_the_stream_where_it_was():
    def fits(prompt):
        if prompt.id == "train-3":
            raise UserError("too long")
        return True

    stream = PromptStream(prompts(5), 0, fits)
    place = ids(PromptStream(prompts(5), 0).take(5)).index("train-3")
    stream.take(place)
    before = stream.state()
    for _ in range(2):
        with pytest.raises(UserError, match="too long"):
            stream.take(2)
    assert stream.state() == before
    with pytest.raises(UserError, match="none of the task's training prompts is short enough"):
        PromptStream(prompts(5), 0, lambda prompt: False).take(1)


def test_of_very_many_prompts_some_are_looked_at():
    made = []

    def make(place):
        made.append(place)
        return Prompt(f"train-{place}", ())

    many = Prompts(10 * LOOKED_AT + 7, make)
    state = PromptStream(many, 0).state()
    assert made == list(looked_at(len(many)))
    assert len(made) == LOOKED_AT
    assert all(0 <= second - first - 10 <= 1 for first, second in itertools.pairwise(made))
    PromptStream(many, 0).check(state)
    with pytest.raises(UserError, match="are not those that the run was started with"):
        PromptStream(Prompts(len(many), lambda place: Prompt(f"other-{place}", ())), 0).check(state)
    del state["hashed"]  # of a version that hashed them all
    PromptStream(many, 0).check(state | {"sha256": "of all"})
    assert list(looked_at(5)) == [0, 1, 2, 3, 4]


def test_one_prompt_that_fits_is_found_in_every_epoch():
    """It may be the first of one epoch and the last of the next."""
    for seed in range(10):
        stream = PromptStream(prompts(2), seed, lambda prompt: prompt.id == "train-1")
        assert ids(stream.take(20)) == ["train-1"] * 20


def test_the_order_is_that_of_a_list():
    """It is kept in 8 bytes a prompt; a run begun when it was a list goes on."""
    order = list(range(1000))
    random.Random("prompts 7 0").shuffle(order)
    assert ids(PromptStream(prompts(1000), 7).take(1000)) == [f"train-{place}" for place in order]
