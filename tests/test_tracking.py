"""Metrics, rollouts and evaluations come back as they were said; the console shows model text as plain text."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common import atomic_files
from common.config import RunConfig, build
from common.errors import RunFailure, UserError, printable
from common.tracking.console import ConsoleTracker, duration, evaluation_line
from common.tracking.metrics import (
    METRICS,
    ROLLOUT_COLUMNS,
    JsonlTracker,
    rewind,
    rollout_files,
)
from common.tracking.trackers import TensorBoardTracker, Trackers
from common.types import Completion, Group, Prompt

ROOT = Path(__file__).parent.parent
MAY_BE_ABSENT = {key for key, metric in METRICS.items() if metric.absent_when}


def metrics(step: int, **changed: float) -> dict[str, float]:
    """Every documented metric, each with its own value."""
    named = {key: 0.5 + number for number, key in enumerate(METRICS) if key not in ("step", "time", "reward/<name>")}
    return named | {"reward/correct": 0.25, "reward/format": 1.0, "version": step} | changed


def completion(text: str, **changed: Any) -> Completion:
    values: dict[str, Any] = {
        "token_ids": (1, 2), "text": text, "logprobs": (-0.5, -1.25), "finish_reason": "stop", "policy_version": 3,
        "rewards": {"correct": 1.0, "format": 0.5}, "reward": 1.05, "advantage": -0.75,
    }  # fmt: skip
    return Completion(**values | changed)


def group(*completions: Completion, prompt_id: str = "train-1", data: Mapping[str, Any] | None = None) -> Group:
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First letter of [b]apple[/b]?"},
    )
    return Group(Prompt(prompt_id, messages, data or {"answer": "a"}, "PROMPT", (7, 8)), completions)


EVALUATION = {
    "questions": 200, "accuracy": 0.5, "accuracy_low": 0.431, "accuracy_high": 0.569, "samples": 4,
    "pass_at_k": {"4": {"value": 0.75, "low": 0.7, "high": 0.8}}, "completion_tokens_mean": 10.5,
    "truncated_fraction": 0.0, "by_kind": {"sums": {"questions": 50, "accuracy": 0.25, "low": 0.1, "high": 0.4}},
    "transcripts": [], "seconds": 2.0,
}  # fmt: skip


# --- metrics.jsonl ---


def test_each_step_is_one_line_with_its_step_and_time(tmp_path: Path) -> None:
    tracker, before = JsonlTracker(tmp_path), time.time()
    tracker.log(1, metrics(1))
    tracker.log(2, metrics(2, kl=math.nan, tokens_learned=900))
    tracker.close()
    first, second = atomic_files.read_json_lines(tmp_path / "metrics.jsonl")
    assert first == metrics(1) | {"step": 1, "time": first["time"]}
    assert before <= first["time"] <= time.time()
    assert second["step"] == 2
    assert second["kl"] is None
    assert second["tokens_learned"] == 900
    assert isinstance(second["tokens_learned"], int)


def test_only_documented_metrics_are_written(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    with pytest.raises(AssertionError, match=r"not in common\.tracking\.METRICS: \['losss', 'reward/'\]"):
        tracker.log(1, metrics(1) | {"losss": 1.0, "reward/": 1.0})
    with pytest.raises(AssertionError, match="step 1 was given the metrics of step 2"):
        tracker.log(1, metrics(1) | {"step": 2})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_only_what_does_not_apply_may_be_missing(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    full = metrics(1)
    for key in METRICS.keys() - MAY_BE_ABSENT - {"step", "time", "reward/<name>"}:
        with pytest.raises(AssertionError, match=rf"missing: \['{key}'\]"):
            tracker.log(1, {name: value for name, value in full.items() if name != key})
    with pytest.raises(AssertionError, match="no named reward"):
        tracker.log(1, {name: value for name, value in full.items() if not name.startswith("reward/")})
    with pytest.raises(AssertionError, match=r"every update are missing: \['grad_norm'\]"):
        tracker.log(1, {name: value for name, value in full.items() if name != "grad_norm"})
    tracker.log(1, {name: value for name, value in full.items() if name not in ("kl", "seconds_proof", "ratio_mean")})
    tracker.log(2, {name: value for name, value in full.items() if name not in MAY_BE_ABSENT})


def test_every_metric_says_its_meaning_and_every_absence_its_reason() -> None:
    assert all(metric.meaning and "\n" not in "".join(metric) for metric in METRICS.values())
    units = {key: metric.unit for key, metric in METRICS.items()}
    assert all(unit == "seconds" for key, unit in units.items() if key.startswith("seconds_"))
    assert all(unit == "0 to 1" for key, unit in units.items() if key.endswith("_fraction"))
    assert str(METRICS["seconds_sync"]).endswith("without the proof (seconds)")


# --- rollouts ---


def load_rollouts(**where: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.load_dataset(split="train", **where)


def test_rollouts_load_with_datasets_and_say_everything(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "run")
    one = completion("<answer>ä\u2028\n日本</answer>")
    two = completion("", rewards={"correct": 0}, reward=None, advantage=None, finish_reason="length", policy_version=2)
    tracker.rollouts(1, [group(one, two, data={"answer": "a", "list": [1, None]}), group(one, prompt_id="train-2")])
    tracker.rollouts(2, [group(one, data={"answer": 7})])
    paths = [str(tmp_path / "run" / "rollouts" / f"step-00000{step}.jsonl") for step in (1, 2)]
    rows = load_rollouts(path="json", data_files=paths, cache_dir=str(tmp_path / "cache"))
    assert list(rows["step"]) == [1, 1, 1, 2]
    assert list(rows["prompt_id"]) == [
        "train-1",
        "train-1",
        "train-2",
        "train-1",
    ]
    assert rows[0] == {
        "step": 1, "prompt_id": "train-1", "prompt": "PROMPT",
        "messages": [dict(message) for message in group().prompt.messages],
        "completion": "<answer>ä\u2028\n日本</answer>", "token_ids": [1, 2], "logprobs": [-0.5, -1.25],
        "token_versions": [],
        "finish_reason": "stop", "policy_version": 3, "reward_correct": 1.0, "reward_format": 0.5, "reward": 1.05,
        "advantage": -0.75, "data": '{"answer": "a", "list": [1, null]}',
    }  # fmt: skip
    assert rows[1]["finish_reason"] == "length"
    assert rows[1]["policy_version"] == 2
    assert rows[1]["completion"] == ""
    assert (rows[1]["reward_correct"], rows[1]["reward_format"], rows[1]["reward"], rows[1]["advantage"]) == (
        0.0, None, None, None,
    )  # fmt: skip
    assert json.loads(rows[3]["data"]) == {"answer": 7}
    documented = {column for column in ROLLOUT_COLUMNS if column != "reward_<name>"}
    assert set(rows.column_names) == documented | {"reward_correct", "reward_format"}


def test_the_folder_declares_its_columns_so_no_step_can_change_their_types(tmp_path: Path) -> None:
    """Guessed from this first step alone, rewards and tokens would be nulls for ever, and the text a time stamp."""
    tracker = JsonlTracker(tmp_path / "run")
    odd = {"token_ids": (), "logprobs": (), "reward": None, "advantage": None}
    tracker.rollouts(1, [group(completion("2024-01-01T00:00:00", rewards={"correct": math.nan}, **odd))])
    tracker.rollouts(2, [group(completion("a"))])
    folder, cache = str(tmp_path / "run" / "rollouts"), str(tmp_path / "cache")
    rows = load_rollouts(path=folder, cache_dir=cache)
    assert rows[1]["completion"] == "a"
    assert rows.features["completion"].dtype == "string"
    assert list(rows["reward_correct"]) == [None, 1.0]
    assert list(rows["reward_format"]) == [None, 0.5]
    assert list(rows["token_ids"]) == [[], [1, 2]]
    assert list(rows["advantage"]) == [None, -0.75]
    assert str(rows.features["reward_correct"].dtype) == "float64"


def test_an_odd_value_of_a_task_does_not_cost_the_log(tmp_path: Path) -> None:
    JsonlTracker(tmp_path).rollouts(1, [group(completion("\ud800 half"), data={"set": {1}, "nan": math.inf})])
    (row,) = atomic_files.read_json_lines(tmp_path / "rollouts" / "step-000001.jsonl")
    assert row["completion"] == "\ufffd half"
    assert json.loads(row["data"]) == {"set": "{1}", "nan": None}


def test_a_step_without_groups_leaves_an_empty_file(tmp_path: Path) -> None:
    JsonlTracker(tmp_path).rollouts(3, [])
    assert (tmp_path / "rollouts" / "step-000003.jsonl").read_text() == ""


def test_rollouts_are_thinned_compressed_and_switched_off(tmp_path: Path) -> None:
    """Steps 1 to 7: every third and the last, first plain, then (as when resumed) compressed; all load together."""
    for run in ("run", "same"):
        plain = JsonlTracker(tmp_path / run, RunConfig(rollouts_every=3), last_step=7)
        packed = JsonlTracker(tmp_path / run, RunConfig(rollouts_every=3, rollouts_gzip=True), last_step=7)
        for step in range(1, 8):
            text = [completion(f"<answer>{step} \u2028</answer>")]
            (plain if step < 4 else packed).rollouts(step, [group(*text)] if step != 6 else [])
    kept = rollout_files(tmp_path / "run")
    names = ["step-000003.jsonl", "step-000006.jsonl.gz", "step-000007.jsonl.gz"]
    assert [path.name for path in kept] == names
    assert sorted(path.name for path in (tmp_path / "run" / "rollouts").iterdir()) == ["README.md", *names]
    assert [path.read_bytes() for path in kept] == [path.read_bytes() for path in rollout_files(tmp_path / "same")]
    (row,) = atomic_files.read_json_lines(kept[2])
    assert row == atomic_files.read_json_lines(kept[0])[0] | {"step": 7, "completion": "<answer>7 \u2028</answer>"}
    assert json.loads(gzip.decompress(kept[2].read_bytes())) == row
    rows = load_rollouts(path=str(tmp_path / "run" / "rollouts"), cache_dir=str(tmp_path / "cache"))
    assert list(rows["step"]) == [3, 7]
    assert rows[1] == {key: row[key] for key in rows[1]} | {"data": row["data"]}
    rewind(tmp_path / "run", 6)
    assert [path.name for path in rollout_files(tmp_path / "run")] == names[:2]
    rewind(tmp_path / "run", 2)
    assert rollout_files(tmp_path / "run") == []

    off = JsonlTracker(tmp_path / "off", RunConfig(rollouts_every=0), last_step=1)
    off.rollouts(1, [group(completion("a"))])
    assert not (tmp_path / "off").exists()
    with pytest.raises(UserError, match=r"run\.rollouts_gzip=True has no effect: run\.rollouts_every is 0"):
        build({"run": {"rollouts_every": 0, "rollouts_gzip": True}})


def test_a_damaged_compressed_file_is_one_sentence(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"step": 1}\n' * 50)
    for bad in (whole[:-9], b"plain\n", whole[:12] + b"\xff\xff\xff" + whole[15:]):
        (tmp_path / "step-000001.jsonl.gz").write_bytes(bad)
        with pytest.raises(UserError, match=r"step-000001\.jsonl\.gz is damaged \(.*\); remove it"):
            atomic_files.read_json_lines(tmp_path / "step-000001.jsonl.gz")


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.evaluation(0, EVALUATION)
    for step in (1, 2, 3):
        tracker.log(step, metrics(step))
        tracker.rollouts(step, [group(completion("a"))])
        tracker.evaluation(step, EVALUATION)
    rewind(tmp_path, 2)
    assert [row["step"] for row in atomic_files.read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in atomic_files.read_json_lines(tmp_path / "eval.jsonl")] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "README.md", "step-000001.jsonl", "step-000002.jsonl",
    ]  # fmt: skip
    rewind(tmp_path / "none", 2)


# --- TensorBoard ---


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_the_metrics_as_soon_as_they_are_said(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    tracker.evaluation(0, EVALUATION)
    tracker.log(1, metrics(1, loss=-0.25))
    tracker.log(2, metrics(2, loss=0.5))
    tracker.rollouts(2, [group(completion("a"))])
    read = scalars(tmp_path)  # before close
    assert read["loss"] == [(1, -0.25), (2, 0.5)]
    assert read["reward/correct"] == [(1, 0.25), (2, 0.25)]
    assert read["eval/accuracy"] == [(0, 0.5)]
    assert read["eval/pass@4"] == [(0, 0.75)]
    assert read["eval/kind/sums"] == [(0, 0.25)]
    assert "step" not in read
    assert "time" not in read
    tracker.close()
    tracker.close()


def test_tensorboard_hides_what_a_resumed_run_says_again(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, metrics(step, loss=step))
    again = TensorBoardTracker(tmp_path, resume_step=1)
    again.log(2, metrics(2, loss=20.0))
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_is_not_imported_before_it_is_wanted() -> None:
    code = "import sys, common.tracking.trackers, common.tracking.console\n"
    code += "print('tensorboard' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "False False\n"


# --- the console ---


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, color_system=None)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_live_becomes_plain_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=60)
    tracker = ConsoleTracker("live", 40, console=console)
    assert tracker.mode == "plain"
    tracker.phase("sampler: writing 16 x 8 completions")
    tracker.rollouts(7, [group(completion("a"))])
    tracker.log(7, metrics(7, reward_mean=0.71234, loss=-0.0123, seconds_sample=5.12, seconds_step=10.0, kl=0.001))
    tracker.evaluation(7, EVALUATION)
    tracker.close()
    lines = said(console).splitlines()
    assert len(lines) == 2, lines
    assert re.match(r"step  7/40  reward 0\.7123  correct 0\.25  format 1  loss -0\.0123 .*  kl 0\.001  ", lines[0])
    assert "10.0 s (sample 5.1, score" in lines[0]
    assert lines[0].endswith("  5m30s left")
    assert lines[1] == ("after step 7: accuracy 0.500 [0.431, 0.569] on 200 questions, pass@4 0.750 [0.700, 0.800]")


def test_off_says_nothing() -> None:
    console = terminal()
    tracker = ConsoleTracker("off", 40, console=console)
    tracker.phase("x")
    tracker.log(1, metrics(1))
    tracker.evaluation(1, EVALUATION)
    tracker.close()
    assert said(console) == ""


def test_live_shows_progress_phase_numbers_and_a_completion() -> None:
    console = terminal()
    tracker = ConsoleTracker("live", 40, first_step=4, console=console)
    tracker.phase("sampler: writing 16 x 8 completions")
    tracker.rollouts(5, [group(completion("<answer>a</answer>"))])
    tracker.log(5, metrics(5, seconds_step=60.0, grad_norm=0.4321))
    shown = said(console)
    for wanted in (
        "step 5/40", "35m00s left", "sampler: writing 16 x 8 completions (0 s)", "grad norm", "0.4321",
        "First letter of [b]apple[/b]?", "<answer>a</answer>", "reward 1.05 (correct 1, format 0.5)",
    ):  # fmt: skip
        assert wanted in shown, wanted
    tracker.evaluation(5, EVALUATION)
    assert "after step 5: accuracy 0.500" in said(console)
    tracker.close()
    tracker.close()
    assert said(console).endswith("\x1b[?25h"), "the cursor stays hidden"


@pytest.mark.parametrize(
    "text", ["[bold]x[/bold]", "[/red] [link=file:///]", "\x1b[2J\x1b]0;title\x07", "a\rb\u202ec", "日本 ✓"]
)
@pytest.mark.parametrize("width", [100, 60])
def test_what_a_model_writes_is_shown_as_it_is(text: str, width: int) -> None:
    console = terminal(width)
    tracker = ConsoleTracker("live", 2, console=console)
    tracker.rollouts(1, [group(completion(text, rewards={"[red]odd": 1.0}))])
    tracker.log(1, metrics(1))
    tracker.close()
    shown = said(console)
    assert printable(text) in shown
    assert "[red]odd 1" in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown


def test_a_long_completion_keeps_the_display_short() -> None:
    console = terminal()
    tracker = ConsoleTracker("live", 2, console=console)
    tracker.rollouts(1, [group(completion("begin\n" + "and on\n" * 5000 + "end of it"))])
    tracker.log(1, metrics(1))
    tracker.close()
    last = said(console).split("step 1/2")[-1]
    assert "end of it" in last
    assert last.count("\n") < 25


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1m00s"), (250, "4m10s"), (7500, "2h05m")]
)
def test_durations_read_easily(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_evaluation_without_samples_is_one_line_too() -> None:
    assert evaluation_line(0, EVALUATION | {"pass_at_k": {}}) == (
        "after step 0: accuracy 0.500 [0.431, 0.569] on 200 questions"
    )


# --- several at once ---


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.heard: list[Any] = []
        self.fails = fails

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.heard.append(("log", step))

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        self.heard.append(("rollouts", step))

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        self.heard.append(("evaluation", step))

    def close(self) -> None:
        self.heard.append("close")
        if self.fails:
            raise RunFailure("no space left")


class Showing(Recorder):
    def phase(self, text: str) -> None:
        self.heard.append(text)


def test_all_trackers_hear_everything_and_all_are_closed() -> None:
    first, second = Recorder(fails=True), Showing()
    trackers = Trackers([first, second])
    trackers.phase("learner: updating")
    trackers.evaluation(0, EVALUATION)
    trackers.log(1, {})
    trackers.rollouts(1, [])
    with pytest.raises(RunFailure, match="no space left"):
        trackers.close()
    assert first.heard == [("evaluation", 0), ("log", 1), ("rollouts", 1), "close"]
    assert second.heard == ["learner: updating", *first.heard]
