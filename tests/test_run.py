"""Whole runs in this process on a tiny model: what they write, and that a stopped or killed one goes on as if never."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import atomic_files
from common.config import Config, load
from common.errors import RunFailure, UserError
from common.prompts import LOOKED_AT, PromptStream, looked_at
from common.tracking.metrics import METRICS
from common.types import Prompt
from deploy import run as runs
from tests.making import EVERYTHING, QUIET
from tests.tiny import make_tiny

ROOT = Path(__file__).parent.parent
TOY = f"{ROOT / 'tests' / 'toy.py'}:Toy"
TIMES = {"time"} | {name for name in METRICS if name.startswith(("seconds", "memory"))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


def words(tiny, *more: str) -> list[str]:
    return [
        f"model.name={tiny}", "model.dtype=float32", f"task.name={TOY}", "sampler.name=hf", "sampler.max_tokens=8",
        "optimizer.lr=1e-3", "train.steps=4", "train.prompts_per_step=3", "train.group_size=4", "train.threads=1",
        "eval.questions=4", "run.save_every=2", "run.console=plain", *QUIET, *more,
    ]  # fmt: skip


def spec(tiny, *more: str) -> Config:
    return load(None, words(tiny, *more))


def run(config, folder, resume=False):
    return runs.run(config, folder, Console(file=open(os.devnull, "w")), resume=resume)


def metrics(folder):
    return [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in atomic_files.read_json_lines(folder / "metrics.jsonl")
    ]


def rollouts(folder):
    return [file.read_text() for file in sorted((folder / "rollouts").glob("step-*.jsonl"))]


def final(folder):
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """One uninterrupted run, with everything that a run does."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    outcome = run(spec(tiny, *EVERYTHING), folder)
    assert outcome.finished
    assert outcome.before is not None
    assert outcome.after is not None
    return folder


def test_run_folder_holds_what_the_readme_says(whole, tiny):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "config.toml", "metrics.jsonl", "eval.jsonl", "rollouts", "checkpoints", "final", "report.html", "report.png",
        "run.log", "tensorboard",
    }  # fmt: skip
    assert load(whole / "config.toml") == spec(tiny, *EVERYTHING)
    rows = atomic_files.read_json_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {key for key in row if not key.startswith("reward/")} <= METRICS.keys()
        assert {"reward/short", "reward/even"} <= row.keys()
        assert row["sampler_version_min"] == row["sampler_version_max"] == row["step"] - 1
        assert row["probe_diff"] < 1e-3
        assert row["logprob_diff_max"] < 1e-3
    assert [row["step"] for row in atomic_files.read_json_lines(whole / "eval.jsonl")] == [0, 4]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_rollouts_load_with_datasets(whole, tmp_path):
    rows = load_dataset(str(whole / "rollouts"), split="train", cache_dir=str(tmp_path))
    assert len(rows) == 4 * 3 * 4
    assert {"prompt", "completion", "reward", "advantage", "policy_version", "reward_short"} <= set(rows.column_names)
    assert len(rows[0]["token_ids"]) == len(rows[0]["logprobs"])


def test_final_model_is_the_learners(whole, tiny):
    """The exported weights are the masters of the last checkpoint, and transformers loads them."""
    state = load_file(whole / "checkpoints" / "step-000004" / "state.safetensors")
    exported = final(whole)
    for name, tensor in exported.items():
        assert torch.equal(state[f"{name}/master"], tensor), name
    before = load_file(tiny / "model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in exported.items())
    AutoModelForCausalLM.from_pretrained(whole / "final")
    assert AutoTokenizer.from_pretrained(whole / "final").chat_template


def test_same_seed_same_run_and_another_seed_another(tiny, tmp_path, whole):
    run(spec(tiny), tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(whole)
    assert rollouts(tmp_path / "again") == rollouts(whole)
    run(spec(tiny, "train.seed=1"), tmp_path / "other")
    assert rollouts(tmp_path / "other") != rollouts(whole)


def resume_in_words(folder):
    return runs.config_of(folder, [])


@pytest.mark.parametrize(
    ("sampler", "lora", "selection"),
    [("hf", 0, "uniform"), ("hf", 4, "difficulty"),
     *(pytest.param("vllm", rank, "uniform", marks=pytest.mark.vllm) for rank in (0, 4))],
)  # fmt: skip
def test_stopped_and_resumed_equals_never_stopped(tiny, tmp_path, sampler, lora, selection):
    """Stopped by a signal after a step; then the rest. Weights, metrics and rollouts are the same, bit for bit."""
    more = [f"sampler.name={sampler}", f"train.selection={selection}"]
    if lora:
        more += [f"model.lora_rank={lora}", "run.export_merged=true"]
    whole = tmp_path / "whole"
    run(spec(tiny, *more), whole)
    folder = tmp_path / "stopped"
    stopper = Stop(after=1)
    outcome = runs.run(spec(tiny, *more), folder, stopper)
    assert not outcome.finished
    assert outcome.step in (1, 2)
    assert run(resume_in_words(folder), folder, resume=True).finished
    assert metrics(folder) == metrics(whole)
    assert rollouts(folder) == rollouts(whole)
    weights = "final/merged/model.safetensors" if lora else "final/model.safetensors"
    one, other = load_file(folder / weights), load_file(whole / weights)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [row["step"] for row in atomic_files.read_json_lines(folder / "eval.jsonl")] == [0, 4]


class Stop(Console):
    """A console that presses Ctrl-C once a step's line is printed."""

    def __init__(self, after: int) -> None:
        super().__init__(file=open(os.devnull, "w"))  # noqa: SIM115
        self.after = after

    def print(self, *args, **kwargs) -> None:
        super().print(*args, **kwargs)
        if args and re.match(rf"step {self.after}/", str(args[0])):
            os.kill(os.getpid(), signal.SIGINT)


def start(tiny, folder, *more):
    command = [sys.executable, "-m", "deploy.cli", "train"]
    return subprocess.Popen(
        [*command, *more] if more else [*command, str(tiny.parent / "run.toml"), f"run.folder={folder}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def assert_every_file_is_whole(folder):
    for path in folder.rglob("*"):
        # A hidden name is a leftover of the kill, and so is all below it: a checkpoint that was still being filled.
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".jsonl":
            lines = path.read_text().split("\n")
            whole = lines if lines[-1] == "" or path.name != "metrics.jsonl" else lines[:-1]
            for line in whole:
                if line:
                    json.loads(line)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".toml":
            load(path)


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_end(tiny, tmp_path):
    """SIGKILL again and again, each time at a random moment of real work, until the run is through."""
    values = words(tiny, "train.steps=8", "run.save_every=1", "eval.questions=2")
    (tiny.parent / "run.toml").write_text(runs.resolved_toml(load(None, values)))
    run(load(None, values), tmp_path / "whole")
    folder, draw, kills = tmp_path / "killed", random.Random(4), 0
    process = start(tiny, folder)
    while True:
        deadline = time.monotonic() + 120
        seen = len(atomic_files.read_lines(folder / "metrics.jsonl")) if folder.exists() else 0
        while process.poll() is None and kills < 3 and time.monotonic() < deadline:
            if folder.exists() and len(atomic_files.read_lines(folder / "metrics.jsonl")) > seen:
                time.sleep(draw.random() * 0.5)
                process.kill()
                kills += 1
                break
            time.sleep(0.005)
        output, _ = process.communicate(timeout=180)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
        assert_every_file_is_whole(folder)
        process = start(tiny, folder, "--resume", str(folder))
    assert kills == 3
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert rollouts(folder) == rollouts(tmp_path / "whole")
    one, other = final(folder), final(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not list(folder.rglob(".*partial*"))


def test_a_damaged_checkpoint_is_passed_over(tiny, tmp_path, whole):
    folder = tmp_path / "damaged"
    run(spec(tiny), folder)
    state = folder / "checkpoints" / "step-000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    outcome = run(resume_in_words(folder), folder, resume=True)
    assert outcome.finished
    assert metrics(folder) == metrics(whole)


def test_dynamic_sampling_fills_the_batch_within_its_bound(tiny, tmp_path):
    """Only ties between equal lengths leave groups without signal here; a coarse reward makes many."""
    weights = "task.reward_weights={short=0.0}"
    run(
        spec(tiny, weights, "train.group_size=2", "train.dynamic_sampling_rounds=3", "eval.questions=0"), tmp_path / "a"
    )
    run(spec(tiny, weights, "train.group_size=2", "eval.questions=0"), tmp_path / "b")
    filled, plain = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert max(row["zero_variance_fraction"] for row in plain) > 0
    assert sum(row["groups"] for row in filled) > sum(row["groups"] for row in plain)
    assert all(row["groups"] <= 3 and row["groups_sampled"] <= 12 for row in filled)


@pytest.mark.slow
def test_a_long_prompt_that_is_found_late_costs_no_step(tiny, tmp_path):
    """It is one of very many, and was not looked at before the run."""
    count = 2 * LOOKED_AT
    drawn = PromptStream([Prompt(str(place), ()) for place in range(count)], 0).take(12)
    late = next(int(prompt.id) for prompt in drawn[3:] if int(prompt.id) not in {*looked_at(count)})
    (tmp_path / "many.py").write_text(
        "from common.tasks import Prompts\nfrom common.types import Prompt\nfrom tests.toy import Toy\n"
        "class Many(Toy):\n"
        "    def prompts(self, split):\n"
        f"        return Prompts({count} if split == 'train' else 1, lambda n: Prompt(f'{{split}}-{{n}}', "
        f"({{'role': 'user', 'content': f'{{split}} {{n}} ' + 'a' * 90 * (n == {late})}},)))\n"
    )
    folder = tmp_path / "run"
    with pytest.raises(
        UserError, match=rf"'train-{late}' has \d+ tokens, more than the \d+ .*sampler.max_prompt_tokens"
    ):
        run(spec(tiny, f"task.name={tmp_path / 'many.py'}:Many", "eval.questions=0"), folder)
    done = len(metrics(folder))
    assert 1 <= done < 4
    assert [path.name for path in (folder / "checkpoints").iterdir()][-1:] == [f"step-{done:06d}"]
    assert run(runs.config_of(folder, ["sampler.max_prompt_tokens=150"]), folder, resume=True).finished
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


def test_a_bad_reward_stops_or_skips_as_told(tiny, tmp_path):
    skipping = spec(tiny, "task.options.broken=notfinite", "task.on_reward_error=skip", "eval.questions=0")
    with pytest.raises(RunFailure, match="no group of this step could be scored"):
        run(skipping, tmp_path / "skip")
    assert "nan" in (tmp_path / "skip" / "run.log").read_text()


def test_skipping_a_bad_reward_goes_on_without_its_group(tiny, tmp_path):
    run(spec(tiny, "task.options.broken=sometimes", "task.on_reward_error=skip"), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert len(rows) == 4
    assert sum(row["groups_skipped_reward_error"] for row in rows) > 0
    assert all(row["groups_sampled"] + row["groups_skipped_reward_error"] == 3 for row in rows)
    assert "sometimes" in (tmp_path / "run" / "run.log").read_text()


def test_a_batch_that_is_not_finite_stops_the_run_and_is_kept(tiny, tmp_path):
    """A learning rate that blows the weights up: the next batch is on the disk, the step is not taken."""
    with pytest.raises(RunFailure) as caught:
        run(spec(tiny, "optimizer.lr=1e30", "optimizer.max_grad_norm=0", "sync.proof=false"), tmp_path / "run")
    assert "not finite" in str(caught.value) or "is nan" in str(caught.value) or "nan" in str(caught.value)
    steps = [row["step"] for row in metrics(tmp_path / "run")]
    assert len(rollouts(tmp_path / "run")) >= len(steps)


def test_overlong_completions_are_penalised(tiny, tmp_path):
    more = ["eval.questions=0", "train.steps=1"]
    run(spec(tiny, *more), tmp_path / "a")
    run(spec(tiny, "learner.truncated=penalize", "learner.overlong_tokens=4", *more), tmp_path / "b")
    (a,), (b,) = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a["truncated_fraction"] > 0
    assert b["reward/short"] == a["reward/short"]
    assert b["reward_mean"] < a["reward_mean"]


def test_evaluation_during_the_run_with_pass_at_k(tiny, tmp_path, whole):
    outcome = run(spec(tiny, "eval.every=2", "eval.samples=3", "eval.k=[1, 3]"), tmp_path / "run")
    rows = atomic_files.read_json_lines(tmp_path / "run" / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["pass_at_k"]["3"]["value"] >= row["pass_at_k"]["1"]["value"] for row in rows)
    assert outcome.after == rows[-1]
    assert metrics(tmp_path / "run") == metrics(whole)  # asking in between changes nothing


@pytest.mark.parametrize("more", [["learner.gradient_checkpointing=true"], ["learner.packing=padded"]])
def test_memory_settings_change_no_number(tiny, tmp_path, whole, more):
    run(spec(tiny, *more), tmp_path / "run")
    for one, other in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_keep_last_keeps_the_last(tiny, tmp_path):
    run(spec(tiny, "run.save_every=1", "run.keep_last=1", "eval.questions=0"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]


def test_extended_resume_is_remembered(tiny, tmp_path):
    folder = tmp_path / "run"
    run(spec(tiny, "eval.questions=0"), folder)
    run(runs.config_of(folder, ["train.steps=6"]), folder, resume=True)
    assert load(folder / "config.toml").train.steps == 6
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_your_own_tracker_sees_every_step(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "class Mine:\n"
        "    def __init__(self, folder): self.file = folder / 'mine.txt'\n"
        "    def log(self, step, metrics): self.file.open('a').write(f'{step}\\n')\n"
        "    def rollouts(self, step, groups): pass\n"
        "    def evaluation(self, step, result): pass\n"
        "    def close(self): pass\n"
    )
    run(spec(tiny, f"run.trackers=['{tmp_path / 'mine.py'}:Mine']", "eval.questions=0"), tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").read_text().split() == ["1", "2", "3", "4"]


def test_reward_rises(tiny, tmp_path):
    """The toy's reward pays for short completions: thirty steps make the tiny model write them."""
    settings = ["train.steps=30", "train.prompts_per_step=6", "train.group_size=8", "optimizer.lr=3e-3",
                "eval.questions=0", "run.save_every=0"]  # fmt: skip
    run(spec(tiny, *settings), tmp_path / "run")
    rows = [row["reward/short"] for row in metrics(tmp_path / "run")]
    assert sum(rows[-5:]) / 5 > 1.5 * sum(rows[:5]) / 5


OWN = """
import pathlib
class Well:
    def __init__(self, folder):
        self.said = folder.parent / "said.txt"
        self.say("made beside " + ("config.toml" if (folder / "config.toml").exists() else "nothing"))
    def say(self, text): self.said.open("a").write(text + chr(10))
    def log(self, step, metrics): self.say(f"step {step}")
    def rollouts(self, step, groups): pass
    def evaluation(self, step, result): pass
    def close(self): self.say("closed")

class NoLogin(Well):
    def __init__(self, folder): raise ConnectionError("no login")

def sampler(setup):
    pathlib.Path(__file__).with_name("said.txt").open("a").write("sampler")
    raise OSError("no sampler here")
"""


def test_trackers_are_made_before_the_models_and_closed_in_every_case(tiny, tmp_path):
    """One that cannot log in ends the run before there is a sampler, and the one made before it is closed."""
    mine = tmp_path / "mine.py"
    mine.write_text(OWN)
    two = f"run.trackers=['{mine}:Well', '{mine}:NoLogin']"
    with pytest.raises(UserError, match=r"^run\.trackers: '.*:NoLogin' raised ConnectionError: no login; fix it$"):
        run(spec(tiny, two, f"sampler.name={mine}:sampler"), tmp_path / "run")
    said = tmp_path / "said.txt"
    assert said.read_text().splitlines() == ["made beside config.toml", "closed"]
    said.unlink()
    with pytest.raises(RunFailure, match="no sampler here"):  # the sampler would have been asked, and is after it
        run(spec(tiny, f"run.trackers=['{mine}:Well']", f"sampler.name={mine}:sampler"), tmp_path / "other")
    assert said.read_text().splitlines() == ["made beside config.toml", "samplerclosed"]
