"""A run's model at any checkpoint: exported, asked and reported, whether the run is finished, stopped or killed."""

import json
import os
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from common import atomic_files
from common.config import load
from common.errors import UserError
from deploy import run as runs
from deploy.cli import app
from deploy.export import export_checkpoint, open_model
from tests.test_cli import call
from tests.test_run import words
from tests.tiny import make_tiny

KINDS = {
    "full": ("model.dtype=bfloat16",),
    "stochastic": ("model.dtype=bfloat16", "optimizer.name=adamw_8bit", "optimizer.master=stochastic"),
    "lora": ("model.lora_rank=4", "run.export_merged=true", "optimizer.lr=0.05"),
    "dora": ("model.lora_rank=4", "model.lora_variant=dora", "run.export_merged=true"),
    "nf4": ("model.lora_rank=4", "model.quantize=nf4", "run.export_merged=true", "optimizer.lr=0.05"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """One run of each kind, made when it is first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("runs") / kind
            model = make_tiny(tmp_path_factory.mktemp("untied"), tied=False) if kind == "stochastic" else tiny
            more = [f"model.cache_folder={folder.parent}"] if kind == "nf4" else []
            config = load(
                None, words(model, "eval.questions=2", "train.steps=2", "run.save_every=1", *KINDS[kind], *more)
            )
            with open(os.devnull, "w") as nowhere:
                assert runs.run(config, folder, Console(file=nowhere)).finished
            made[kind] = folder
        return made[kind]

    return of


def folders_are_equal(one, other):
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir() if p.is_file()}
    for file in one.iterdir():
        if file.suffix == ".safetensors":
            mine, theirs = load_file(file), load_file(other / file.name)
            assert mine.keys() == theirs.keys()
            assert all(mine[name].dtype == theirs[name].dtype for name in theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs), file
        else:
            assert file.read_bytes() == (other / file.name).read_bytes(), file


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_checkpoint_exports_as_the_final_model_to_the_bit(finished, tmp_path, kind):
    run = finished(kind)
    path, step = export_checkpoint(run, None, False, tmp_path / "out")
    assert (path, step) == (tmp_path / "out", 2)
    folders_are_equal(path, run / "final")
    if "run.export_merged=true" in KINDS[kind]:
        folders_are_equal(export_checkpoint(run, 2, True, tmp_path / "merged")[0], run / "final" / "merged")


def test_an_earlier_checkpoint_is_another_model_and_both_can_be_asked(finished, tmp_path):
    """The answers of the last checkpoint are those of the final model; a checkpoint's own folder names it too."""
    run = finished("lora")
    code, output = call("export", run, "--step", 1, tmp_path / "one")
    assert code == 0 and "model of step 1" in output, output
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    end = load_file(run / "final" / "adapter_model.safetensors")
    assert any(not torch.equal(one[name], end[name]) for name in end)

    asked = {}
    for name, args in {
        "final": [run], "last": [run, "--step", 2], "first": [run, "--step", 1],
        "path": [run / "checkpoints" / "step-000001"], "exported": [tmp_path / "one"],
    }.items():  # fmt: skip
        more = [w for w in words(run) if w.split(".")[0] in ("task", "sampler")] if name == "exported" else []
        more += ["eval.questions=4", "model.dtype=float32"]
        result = CliRunner().invoke(app, ["eval", *map(str, args), "--json", *more])
        assert result.exit_code == 0, result.output
        asked[name] = [row["completion"] for row in json.loads(result.stdout)["transcripts"]]
    assert asked["last"] == asked["final"]
    assert asked["path"] == asked["first"] == asked["exported"]
    assert asked["first"] != asked["final"]


def test_a_stopped_run_is_asked_at_its_newest_whole_checkpoint(finished, tmp_path):
    """Also one that was extended after its end: its final model is of an earlier one."""
    run = copied(finished("full"), tmp_path / "run")
    with open_model(str(run), []) as (config, adapter, label):
        assert (config.model.name, adapter, label) == (str(run / "final"), None, str(run))
    text = (run / "config.toml").read_text().replace("steps = 2", "steps = 5")
    (run / "config.toml").write_text(text)
    with open_model(str(run), ["eval.questions=3"]) as (config, _, label):
        folders_are_equal(type(run)(config.model.name), run / "final")
        assert label == f"step-000002 of {run}"
        assert config.eval.questions == 3
    state = run / "checkpoints" / "step-000002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-4])
    with open_model(str(run), []) as (_, _, label):
        assert label == f"step-000001 of {run}"
    with pytest.raises(UserError, match="damaged"):
        export_checkpoint(run, 2, False, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_over_4_bits_is_asked_at_a_checkpoint(finished):
    with open_model(str(finished("nf4")), [], 2) as (config, adapter, _):
        assert config.model.quantize == "nf4"
        folders_are_equal(adapter, finished("nf4") / "final")


def test_a_dora_is_asked_merged(finished):
    with open_model(str(finished("dora")), [], 2) as (config, adapter, _):
        assert adapter is None
        folders_are_equal(type(finished("dora"))(config.model.name), finished("dora") / "final" / "merged")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--step", "7"], "no checkpoint of that step; there are: 1, 2"),
        (["--merged"], "--merged has no effect"),
        (["."], "exists already"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(finished, args, said):
    code, output = call("export", finished("full"), *args)
    assert code == 2, output
    assert said in " ".join(output.split())


def test_neither_a_run_nor_a_step(tiny, tmp_path):
    for args, said in (
        (["export", tmp_path], "is no run folder"), (["report", tmp_path], "is no run folder"),
        (["eval", tiny, "--step", "1"], "no run folder"),
    ):  # fmt: skip
        code, output = call(*args)
        assert code == 2, output
        assert said in " ".join(output.split())


def test_a_report_of_a_run_that_was_killed_in_the_middle_of_a_line(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        (run / name).write_bytes((finished("full") / name).read_bytes())
    with (run / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 3, "rew')
    before = (run / "metrics.jsonl").read_bytes()
    with atomic_files.lock_folder(run):  # a running run's
        code, output = call("report", run)
    assert code == 0, output
    assert re.search(r"step 2\b", (run / "report.html").read_text())
    assert (run / "report.png").stat().st_size > 1000
    assert (run / "metrics.jsonl").read_bytes() == before


def copied(run, to):
    return type(run)(shutil.copytree(run, to))
