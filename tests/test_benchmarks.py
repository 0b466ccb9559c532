"""The benchmarks' own honesty: both sides learn from the same tokens and take the same step, nothing is left out of
what is counted, and a side that dies says why. How fast anything is, is not a test's business."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest

from common.config import build
from common.errors import RunFailure
from common.types import SamplerSetup, SamplingParams
from learner.torch_learner import TorchLearner
from sampler.scripted import ScriptedSampler
from tests.benchmarks.__main__ import Bench, needed_flops, run
from tests.benchmarks.loads import Load, groups_of, peak_gib, reset_peak, reward_of
from tests.benchmarks.sides import EndsAsLoad, Side, never_ending
from tests.tiny import VOCAB_SIZE, make_tiny

LOAD = Load(2, 4, 12, 3, 9)
FIRST = 4  # tokens below are special, and TRL pads with one of them
STEP = 1e4  # learning rate and epsilon: Adam's first step is then the gradient itself, to a ten-thousandth of its size


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("rows", [0, 4])
def test_trl_and_the_packed_learner_take_the_same_step(tiny: Path, tmp_path: Path, rows: int) -> None:
    from tests.benchmarks.trl_side import Gate, trainer_on

    groups = groups_of(LOAD, VOCAB_SIZE, FIRST)
    config = build(
        {
            "model": {"name": str(tiny), "dtype": "float32"},
            "sampler": {"max_tokens": LOAD.most},
            "learner": {"packing": "packed", "importance": "off"},
            "optimizer": {"lr": STEP, "eps": STEP, "max_grad_norm": 0.0},
        }
    )
    learner = TorchLearner(config, tiny, "cpu")
    before = {name: tensor.clone() for name, tensor in learner.publish_weights().open()}
    metrics = learner.update(groups)
    ours = {name: tensor - before[name] for name, tensor in learner.publish_weights().open()}

    done: list[dict[str, float]] = []
    trainer = trainer_on(
        tiny, groups, Gate(lambda: "learn", done.append), tmp_path, weights="float32", rows=rows, bf16=False,
        learning_rate=STEP, adam_epsilon=STEP, max_grad_norm=0.0, max_steps=1,
    )  # fmt: skip
    loss = trainer.train().training_loss
    theirs = {name: tensor.detach() - before[name] for name, tensor in trainer.model.named_parameters()}

    assert metrics["packed"] == 1
    assert (
        done[0]["tokens"] == metrics["tokens_learned"] == sum(len(c.token_ids) for g in groups for c in g.completions)
    )
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert ours.keys() == theirs.keys()
    for name, moved in theirs.items():
        assert float(moved.norm()) > 0, name
        assert float((ours[name] - moved).norm() / moved.norm()) < 1e-4, name


def test_trl_writes_completions_of_the_lengths_it_is_told(tiny: Path, tmp_path: Path) -> None:
    from tests.benchmarks.trl_side import Gate, trainer_on

    groups = groups_of(LOAD, VOCAB_SIZE, FIRST)
    done: list[dict[str, float]] = []
    gate = Gate(lambda: "step", done.append)
    trainer_on(tiny, groups, gate, tmp_path, weights="float32", bf16=False, max_steps=1).train()
    assert done[0]["tokens"] == sum(len(one.token_ids) for group in groups for one in group.completions)
    assert 0 < done[0]["sample_s"] < done[0]["whole_s"]
    assert done[0]["sample_s"] + done[0]["learn_s"] == pytest.approx(done[0]["whole_s"])


def test_our_sampler_is_asked_for_the_same_lengths() -> None:
    groups = groups_of(LOAD, VOCAB_SIZE, FIRST)
    scripted = ScriptedSampler(SamplerSetup("nowhere", "float32", 64, 8), default=[[7, 8]])
    answer = EndsAsLoad(scripted, groups).generate(
        [group.prompt for group in reversed(groups)], SamplingParams(n=4, max_tokens=9, seed=5)
    )
    asked = [call[2] for call in scripted.calls if call[0] == "generate"]
    assert [params.max_tokens for params in asked] == [
        len(one.token_ids) for group in reversed(groups) for one in group.completions
    ]
    assert [params.n for params in asked] == [1] * 8
    assert [params.seed for params in asked] == [5] + [None] * 7
    assert [(group.prompt.id, len(group.completions)) for group in answer.result()] == [("1", 4), ("0", 4)]


def test_loads_have_the_lengths_they_say_and_uneven_rewards() -> None:
    for load in (LOAD, Load(3, 8, 20, 40, 200)):
        groups = groups_of(load, VOCAB_SIZE, FIRST)
        lengths = [len(one.token_ids) for group in groups for one in group.completions]
        assert [len(group.prompt.token_ids) for group in groups] == [load.prompt] * load.groups
        assert (min(lengths), max(lengths), len(lengths)) == (load.least, load.most, load.groups * load.group_size)
        assert groups == groups_of(load, VOCAB_SIZE, FIRST)
        for group in groups:
            assert [one.reward for one in group.completions] == [reward_of(one.token_ids) for one in group.completions]
            assert all(one.advantage for one in group.completions)


@pytest.mark.parametrize("load", [Load(1, 3, 5, 2, 4), Load(3, 2, 7, 2, 4, alike=4)])
def test_needed_operations_against_a_count_one_by_one(tiny: Path, load: Load) -> None:
    # The tiny model: 2 layers, width 64, 2 heads of 32 and 1 for keys and values, 128 inside.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    computed, predicts = set(), set()  # each token known by all that comes before it
    for group in groups_of(load, VOCAB_SIZE):
        for completion in group.completions:
            sequence = group.prompt.token_ids + completion.token_ids
            computed |= {sequence[: end + 1] for end in range(len(sequence) - 1)}
            predicts |= {sequence[:end] for end in range(load.prompt, len(sequence))}
    flops = 0
    for sequence in computed:
        flops += 3 * 2 * 2 * layer
        flops += 3 * 2 * 2 * 2 * 64 * len(sequence)  # forward and twice backward; two products; two layers; all heads
    flops += 3 * 2 * 64 * VOCAB_SIZE * len(predicts)
    assert needed_flops(tiny, load) == flops


def test_a_model_that_never_ends_has_the_same_weights_and_another_end(tiny: Path) -> None:
    from transformers import AutoTokenizer

    with never_ending(tiny) as copy:
        was, now = (json.loads((folder / "config.json").read_text())["eos_token_id"] for folder in (tiny, copy))
        assert was != now == AutoTokenizer.from_pretrained(copy).eos_token_id
        assert (copy / "model.safetensors").samefile(tiny / "model.safetensors")


def test_peak_memory_starts_anew() -> None:
    held = reset_peak()
    block = mmap.mmap(-1, 64 << 20)  # pages that the process has not used before, whatever its heap keeps
    block[:] = bytes(64 << 20)
    with_block = peak_gib()
    assert 0.06 < with_block - held < 0.2
    block.close()
    assert peak_gib() == pytest.approx(with_block, abs=0.01)
    assert reset_peak() < with_block


@pytest.mark.full
def test_a_section_runs_and_keeps_the_others_results(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    bench = Bench(tiny, {"short": LOAD}, 1, say=said.append)
    run(bench, ["c"], tmp_path)
    run(bench, ["b"], tmp_path)
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    (share,), (packed,) = sections["c"]["rows"], sections["b"]["rows"]
    assert share["share"] == pytest.approx(share["needed_tflop"] / share["learn_s"] / share["machine_tflops"])
    assert packed["tokens"] == sum(len(c.token_ids) for g in groups_of(LOAD, VOCAB_SIZE) for c in g.completions)
    assert packed["times"] == pytest.approx(packed["padded_s"] / packed["packed_s"])
    assert any("b short: padded, turn 1" in line for line in said)
    written = (tmp_path / "results.md").read_text()
    assert written.index("## b.") < written.index("## c.")


@pytest.mark.slow
def test_a_side_that_dies_says_why(tiny: Path) -> None:
    bench = Bench(tiny, {"short": LOAD}, 1)
    with (
        Side(bench.side("learner", LOAD, "learner.packing=sideways")) as side,
        pytest.raises(RunFailure, match="sideways"),
    ):
        side.ask("learn")
