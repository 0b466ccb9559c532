"""The demo's own model, real vLLM and the real loop, small: SmolLM2-135M through two steps, then its ``final/``."""

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from common import atomic_files, plugins
from common.config import load
from common.device import dtype_of
from common.tokenizer import Renderer, load_tokenizer
from common.types import SamplerSetup
from common.weights.handles import FolderWeights, fingerprint
from deploy import run as runs
from learner.checkpoint import Checkpoints
from learner.model import resolve
from learner.torch_learner import TorchLearner
from learner.weight_sync import weighted_difference
from tests.making import QUIET

pytestmark = pytest.mark.vllm
DEMO = Path(__file__).parent.parent / "deploy" / "configs" / "demo.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "run"
    asked = load(DEMO, ["train.steps=2", "train.prompts_per_step=4", "eval.questions=4", "run.console=plain",
                        *QUIET, "memory.rehearsal=true"])  # fmt: skip
    with open(os.devnull, "w") as nowhere:
        outcome = runs.run(asked, folder, Console(file=nowhere))
    assert outcome.finished
    return load(folder / "config.toml"), folder  # with the number format that suits this machine


def test_the_two_sides_agree_and_every_sync_was_proved(run):
    config, folder = run
    rows = atomic_files.read_json_lines(folder / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["probe_diff"] < 0.06
        assert row["logprob_diff_mean"] < 0.1
        assert row["packed"] == 1
        assert row["reward/format"] > 0  # a model that the weights did not reach writes no tags at all
        assert row["sync_bytes"] == pytest.approx(134.5e6 * dtype_of(config.model.dtype).itemsize, rel=0.01)


def test_a_gguf_file_is_converted_once(run, tmp_path):
    config, _ = run
    package = resolve._file_in_package(config.model.name)
    folder = resolve.prepare(config.model)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    dtype = f"model.dtype={config.model.dtype}"
    by_path = load(None, [f"model.name={package}", dtype]).model
    assert resolve.prepare(by_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    elsewhere = load(None, [f"model.name={package}", dtype, f"model.cache_folder={tmp_path}"]).model
    again = resolve.prepare(elsewhere)
    assert again.parent == tmp_path
    assert fingerprint(FolderWeights(str(again)).open()) == fingerprint(FolderWeights(str(folder)).open())


def test_final_gives_the_learners_log_probs_in_transformers_and_a_fresh_vllm(run):
    from sampler.engine.vllm import VllmSampler

    config, folder = run
    source = resolve.prepare(config.model)
    learner = TorchLearner(config, source, "cpu")
    assert Checkpoints(folder / "checkpoints", 2).restore_latest(learner) is not None
    final = folder / "final"
    render = Renderer(load_tokenizer(str(final)))
    prompts = [render(prompt) for prompt in list(plugins.find_task(config.task).prompts("test"))[:4]]
    asked = [prompt.token_ids for prompt in prompts]
    ours = learner.logprobs(asked)

    model = AutoModelForCausalLM.from_pretrained(final, dtype=dtype_of(config.model.dtype))
    for ids, row in zip(asked, ours, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        theirs = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert weighted_difference(theirs.tolist(), row) < 0.03  # bfloat16, rows padded and not

    sampler = VllmSampler(SamplerSetup(str(final), config.model.dtype, 256, 8))
    try:
        for theirs, row in zip(sampler.logprobs(asked), ours, strict=True):
            assert weighted_difference(theirs, row) < 0.03
    finally:
        sampler.close()

    # And the base does not: the two steps are in final/.
    assert TorchLearner(config, source, "cpu").logprobs(asked) != ours
