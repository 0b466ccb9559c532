"""The rehearsal leaves no trace, and uses the largest pack that the run can make."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from common.config import load
from common.errors import OutOfMemory
from common.types import Completion, Group, Prompt
from deploy import run as runs
from learner import rehearsal
from learner import train as loops
from learner.batch.packing import Row, make_microbatches
from learner.torch_learner import TorchLearner
from tests.test_run import final, metrics, rollouts, run, spec
from tests.tiny import make_tiny

PARTS = {
    "full": ("optimizer.lr=1e-3",),
    "lora": ("model.lora_rank=4", "learner.gradient_checkpointing=true"),
    "dropout": ("model.lora_rank=4", "model.lora_dropout=0.1"),
    "8bit": ("model.dtype=bfloat16", "optimizer.name=adamw_8bit", "optimizer.master=stochastic"),
    "reference": ("learner.kl_coef=0.1", "learner.inner_updates=2", "optimizer.warmup_steps=2"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


def groups(count: int, prompt: int, lengths: list[int]) -> list[Group]:
    return [
        Group(
            Prompt(str(g), (), token_ids=tuple(5 + (g + t) % 300 for t in range(prompt))),
            tuple(
                Completion(tuple(7 + (g * 31 + i * 7 + t) % 300 for t in range(n)), "", (-3.0,) * n, "stop", 0,
                           {}, 1.0, (-1.0) ** i)
                for i, n in enumerate(lengths)
            ),
        )
        for g in range(count)
    ]  # fmt: skip


def config_of(tiny, *words):
    dtype = [] if any(word.startswith("model.dtype") for word in words) else ["model.dtype=float32"]
    return load(None, [f"model.name={tiny}", *dtype, "sampler.max_tokens=12", "train.prompts_per_step=4",
                       "train.group_size=4", "learner.microbatch_tokens=64", *words])  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_rehearsed_learner_goes_on_bit_for_bit_as_one_that_never_was(tiny, tmp_path, name):
    config = config_of(tiny, *PARTS[name])
    states = []
    for rehearsed in (True, False):
        learner = TorchLearner(config, tiny, "cpu")
        torch.manual_seed(3)
        if rehearsed:
            learner.rehearse(groups(4, 20, [2, 5, 1, 3]))
            assert learner.version == 0
        drawn = torch.rand(4)  # the random state outside is untouched
        metrics = [learner.update(groups(4, 20, [9, 12, 1, 7])) for _ in range(2)]
        folder = tmp_path / f"{rehearsed}"
        folder.mkdir()
        learner.save(folder)
        states.append((drawn, metrics, load_file(folder / "state.safetensors")))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    assert states[0][2].keys() == states[1][2].keys()
    for key, tensor in states[0][2].items():
        assert torch.equal(tensor, states[1][2][key]), key


def test_a_run_with_rehearsal_equals_one_without(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nanogrpo")
    run(spec(tiny, "train.steps=2", "memory.rehearsal=true"), tmp_path / "with")
    run(spec(tiny, "train.steps=2"), tmp_path / "without")
    assert "rehearsed the longest batch" in (tmp_path / "with" / "run.log").read_text()
    assert "rehearsed" not in (tmp_path / "without" / "run.log").read_text()
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert rollouts(tmp_path / "with") == rollouts(tmp_path / "without")
    for name, tensor in final(tmp_path / "with").items():
        assert torch.equal(tensor, final(tmp_path / "without")[name]), name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [30, 64, 100, 10_000])
@pytest.mark.parametrize("size", [1, 4])
def test_the_largest_pack_is_one_pass_and_as_full_as_it_can_be(packed, budget, size):
    """Fuller than any pass of the real step, whether its prompts have nothing in common or nearly everything."""
    every = groups(3, 20, [12] * size)
    chosen, more = rehearsal.largest_pack(every, budget, packed, 384)
    (pack,) = passes(chosen, budget, packed)
    single = 20 + 11
    assert pack.token_ids.numel() <= max(budget, single)
    alike = [replace(g, prompt=replace(g.prompt, token_ids=(*range(17), g.prompt.token_ids[0], 1, 2))) for g in every]
    for real in (every, alike):
        others = passes(real, budget, packed)
        assert len(others) == 1 or more
        for other in others if size > 1 else ():
            assert pack.token_ids.numel() >= other.token_ids.numel()
            assert len(pack.predict_U) >= len(other.predict_U) or not packed
    if packed and more and budget > single and size > 1:
        assert pack.token_ids.numel() == budget
    if packed:
        twice = passes(rehearsal.repeated(chosen, 2, 384), budget, packed) if more else []
        assert all(other.token_ids.numel() == pack.token_ids.numel() for other in twice) and len(twice) in (0, 2)


def passes(of, budget, packed):
    pairs = [(group.prompt.token_ids, one.token_ids) for group in of for one in group.completions]
    return make_microbatches([Row(i, prompt, own) for i, (prompt, own) in enumerate(pairs)], budget, packed)


def test_running_out_of_memory_in_the_rehearsal_is_one_sentence_that_names_the_side():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
                  MemoryError()):  # fmt: skip
        with pytest.raises(OutOfMemory, match="the learner ran out of memory") as caught, loops._memory_of("learner"):
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shape"), loops._memory_of("learner"):
        raise RuntimeError("a wrong shape")


def test_a_resumed_run_does_not_rehearse_again(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nanogrpo")
    run(spec(tiny, "train.steps=2", "memory.rehearsal=true"), tmp_path / "run")
    config = runs.config_of(tmp_path / "run", ["train.steps=4"])
    before = (tmp_path / "run" / "run.log").read_text().count("rehearsed")
    run(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "run.log").read_text().count("rehearsed") == before == 1
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
