"""The prompt stream: every prompt once an epoch, and the same stream after any interruption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.prompts import PromptStream
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
