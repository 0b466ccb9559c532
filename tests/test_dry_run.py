"""``--dry-run`` says "right" of no run that cannot begin: models that cannot be loaded, rewards that fail, no room."""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from common import atomic_files
from common.config import ModelConfig, load
from common.errors import RunFailure, UserError
from deploy import components, disk
from deploy import run as runs
from deploy.dry_run import dry_run
from deploy.memory_plan import output
from learner import memory_estimate
from learner.model import loading, resolve
from tests.making import QUIET
from tests.test_run import spec
from tests.tiny import make_model, make_tiny

PLANNED = "memory.plan=refuse"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


class Said(Console):
    def __init__(self):
        super().__init__(file=open(os.devnull, "w"))  # noqa: SIM115
        self.lines = []

    def print(self, *args, **kwargs):
        self.lines.append(str(args[0]))


def checked(config, folder):
    console = Said()
    dry_run(config, folder, console, resume=False)
    return console.lines


def test_each_reward_is_called_and_memory_and_disk_are_planned(tiny, tmp_path):
    plan_line, line = checked(spec(tiny, PLANNED), tmp_path / "run")
    assert plan_line.startswith("plan    fits")
    assert "12 training and 4 test questions" in line
    assert re.search(r"is worth short 0\.\d+, even [01]$", line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", ["raise", "notfinite", "exit"])
def test_a_reward_that_fails_is_found(tiny, tmp_path, broken):
    with pytest.raises(RunFailure, match="reward 'short' failed on completion 0 of prompt 'train-0'"):
        checked(spec(tiny, f"task.options.broken={broken}"), tmp_path / "run")


def test_a_reward_that_fails_and_may_is_named(tiny, tmp_path):
    skipped = spec(tiny, "task.options.broken=raise", "task.on_reward_error=skip")
    assert "'short' failed" in checked(skipped, tmp_path / "run")[-1]


def test_a_folder_with_something_else_in_it_is_refused(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("")
    with pytest.raises(UserError, match="holds no run"):
        checked(spec(tiny), tmp_path / "mine")


def harmed(folder, harm):
    make_tiny(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "q_proj" in name)
    if harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif harm == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    elif harm == "tokenizer pointer":
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    elif harm == "config":
        (folder / "config.json").write_text("{")
    elif harm == "t5":
        sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
        T5ForConditionalGeneration(T5Config(vocab_size=384, **sizes)).save_pretrained(folder)
    elif harm == "index":
        (folder / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}'
        )
        weights.rename(folder / "other.safetensors")
    else:
        if harm == "nan":
            tensors = {key: torch.full_like(value, torch.nan) for key, value in tensors.items()}
        elif harm == "one nan at the end":
            tensors[name].view(-1)[-1] = torch.nan
        elif harm == "shape":
            tensors[name] = tensors[name][:8].clone()
        elif harm == "missing":
            del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("truncated", "cannot be loaded.*not fully covered"),
        ("pointer", r"model\.safetensors is a Git LFS pointer"),
        ("tokenizer pointer", r"tokenizer\.json is a Git LFS pointer"),
        ("config", r"model\.name"),
        ("t5", "causal language model|T5Config"),
        ("index", "lacks model-00001-of-00001.safetensors"),
        ("nan", "not finite"),
        ("one nan at the end", "q_proj.weight holds numbers that are not finite"),
        ("shape", "hold them in another shape.*q_proj"),
        ("missing", "lack 1 weights.*q_proj"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, harm, said):
    """transformers would fill what is missing with random numbers."""
    folder = harmed(tmp_path / "model", harm)
    with pytest.raises(UserError, match=said) as caught:
        checked(spec(folder), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model")


def test_files_that_are_not_loaded_do_not_count(tmp_path):
    """A second set of weights, not pulled, beside the one that the index names."""
    folder = make_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    config = ModelConfig(name=str(folder), dtype="float32")
    loading.check_files(resolve.prepare(config), config)


def test_a_nan_in_the_middle_is_found_once_loaded(tmp_path):
    folder = make_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name][200, 3] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(name=str(folder), dtype="float32")
    loading.check_files(folder, config)
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite"):
        loading.load(folder, config, "cpu")


@pytest.mark.parametrize(
    "family", ["gpt2", "glm4_moe", "phi3", "gemma3n_text", "mixtral", "qwen3_moe", "gpt_oss", "mamba", "jamba", "bloom"]
)
def test_the_headers_of_a_right_model_are_right(tmp_path, family):
    """Of kinds whose files name or shape tensors otherwise than the model in memory does, among others."""
    make_model(family).save_pretrained(tmp_path / family)
    loading.check_files(tmp_path / family, ModelConfig(name=str(tmp_path / family), dtype="float32"))


# -- the disk --


@pytest.mark.parametrize(
    ("more", "files_there"),
    [
        (("run.keep_last=2", "run.save_every=2", "train.steps=100"), (3, 0)),  # a new one before the oldest goes
        (("run.keep_last=2", "run.save_every=2", "train.steps=4"), (2, 1)),
        (("run.save_every=0",), (1, 1)),
        (("run.keep_last=5", "run.save_every=60", "train.steps=100"), (2, 1)),
    ],
)
def test_the_disk_holds_what_is_there_at_the_fullest(tiny, more, files_there):
    checkpoints, finals = files_there
    assert disk.needed(spec(tiny, *more), 1000, 10) == checkpoints * 1000 + finals * 10


@pytest.mark.parametrize(
    "more",
    [
        (), ("model.dtype=bfloat16",), ("model.lora_rank=4", "run.export_merged=true"),
        ("model.dtype=bfloat16", "optimizer.name=adamw_8bit", "optimizer.master=stochastic"),
    ],
)  # fmt: skip
def test_planned_sizes_are_those_of_the_files(tiny, tmp_path, more):
    """Against a run's own folder, but for headers and JSON."""
    config = spec(tiny, "train.steps=1", "eval.questions=0", *more)
    runs.run(config, tmp_path / "run", Said())
    learner = memory_estimate.measure(config, tiny, 40, on_cpu=False)
    real = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step-000001").glob("*.safetensors"))
    assert 0 <= real - learner.state_bytes < 20_000
    final = sum(file.stat().st_size for file in (tmp_path / "run" / "final").rglob("*.safetensors"))
    assert -10_000 <= final - disk.model_bytes(config, learner) < 20_000


def test_a_disk_without_room_is_refused_or_warned_of(tiny, tmp_path, caplog):
    free = shutil.disk_usage(tmp_path).free
    folder = tmp_path / "no" / "such" / "folder"
    with pytest.raises(UserError, match=r"run\.keep_last=1, or run\.folder") as caught:
        output.check_disk(spec(tiny, PLANNED), folder, free, 0)
    assert "GiB free" in str(caught.value)
    output.check_disk(spec(tiny, PLANNED), folder, free // 4, 0)
    assert not caplog.text
    output.check_disk(spec(tiny, "memory.plan=warn"), folder, free, 0)
    assert "free some" in caplog.text
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)  # what makes way is room
    with (folder / "checkpoints" / "step-000002" / "state.safetensors").open("wb") as sparse:
        sparse.truncate(2 * free)
    output.check_disk(spec(tiny, PLANNED), folder, free, 0)


def test_the_first_save_is_rehearsed_and_leaves_nothing(tiny, tmp_path):
    config = spec(tiny, "train.steps=1", "eval.questions=0", "memory.rehearsal=true")
    said = Said()
    runs.run(config, tmp_path / "run", said)
    (line,) = [line for line in said.lines if line.startswith("rehearsed")]
    assert re.search(r"sync \d+\.\d s, save \d+\.\d s", line)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_a_scratch_folder_is_gone_after_it_and_a_full_disk_is_a_sentence(tmp_path):
    with atomic_files.scratch_folder(tmp_path / "deep" / "place") as scratch:
        (scratch / "file").write_text("x")
        assert scratch.parent == tmp_path / "deep"
    assert not list((tmp_path / "deep").iterdir())
    with (
        pytest.raises(RunFailure, match=r"no space left to write .*place"),
        atomic_files.scratch_folder(tmp_path / "place"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("bitsandbytes", "nf4", ["model.lora_rank=4", "model.quantize=nf4"]),
        ("gguf", "gguf", ["model.name=some.gguf"]),
        ("torchao", "low-bit", ["optimizer.name=adamw_8bit"]),
        ("torchao", "low-bit", ["optimizer.master=stochastic", "model.dtype=bfloat16"]),
        ("reasoning_gym", "reasoning-gym", ["task.name=reasoning_gym"]),
        ("tensorboard", "tensorboard", ["run.tensorboard=true"]),
        ("matplotlib", "report", ["run.report=true"]),
    ],
)
def test_a_run_that_needs_an_extra_names_it(tiny, monkeypatch, package, extra, words):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    config = load(None, [f"model.name={tiny}", *QUIET, *words])
    with pytest.raises(UserError, match=rf"needs the package {package}, .*'nanogrpo\[{extra}\]'"):
        components.prepare(config)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = declared["optional-dependencies"][extra]
    assert requirement.startswith(package.replace("_", "-"))
    assert not [name for name in declared["dependencies"] if name.startswith(package.replace("_", "-"))]
