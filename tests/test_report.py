"""The report says what the run folder says, works with any part of it missing, and fails no run."""

from __future__ import annotations

import html
import io
import logging
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from common import atomic_files
from common.config import RunConfig
from common.tracking.metrics import METRICS, JsonlTracker
from deploy import report

PNG = b"\x89PNG\r\n\x1a\n"


def metrics(step: int) -> dict[str, float]:
    named = {key: 0.5 + step for key in METRICS if key not in ("step", "time", "reward/<name>")}
    return named | {"reward/correct": step / 10, "seconds_step": 30.0}


def evaluation(accuracy: float, answer: str, right: bool) -> dict[str, Any]:
    share = {"low": accuracy - 0.1, "high": accuracy + 0.1}
    return {
        "questions": 200, "accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1,
        "samples": 4, "pass_at_k": {"4": {"value": accuracy + 0.05, **share}}, "completion_tokens_mean": 10.0,
        "truncated_fraction": 0.25, "by_kind": {"small sums": {"questions": 50, "accuracy": accuracy, **share}},
        "transcripts": [
            {"prompt_id": f"test-{number}", "question": f"question <{number}> [b]?[/b]", "prompt": "",
             "completion": answer, "correct": right} for number in range(4)
        ],
        "seconds": 3.0,
    }  # fmt: skip


BEFORE = evaluation(0.5, "I [bold]think[/bold] <script>alert(1)</script>", False)
AFTER = evaluation(0.84, "<answer>a</answer> \x1b[2J", True)


def make_run(folder: Path, steps: int, evaluations: Mapping[int, dict[str, Any]]) -> Path:
    tracker = JsonlTracker(folder)
    for step in range(1, steps + 1):
        tracker.log(step, metrics(step))
    for step, result in evaluations.items():
        tracker.evaluation(step, result)
    return folder


class Tags(HTMLParser):
    """Every tag and address of a page, and whether the tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def page_of(folder: Path) -> str:
    assert report.build(folder) == [folder / "report.html", folder / "report.png"]
    assert (folder / "report.png").read_bytes().startswith(PNG)
    page = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert not tags.open
    assert "script" not in tags.names
    assert [address.split(",")[0] for address in tags.addresses] == ["data:image/png;base64"], "needs something beside"
    return page


def words(page: str) -> str:
    """What a reader sees."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def printed(shown: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_whole_run_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "warmup-1", 3, {0: BEFORE, 2: evaluation(0.7, "x", True), 3: AFTER})
    (run / "config.toml").write_text('[model]\nname = "a<b"\n')
    seen = words(page_of(run))
    assert "warmup-1 step 3, 1m30s of steps" in seen
    assert "50.0 % → 84.0 %" in seen
    assert "74.0 % to 94.0 % (before: 40.0 % to 60.0 %)" in seen
    assert "accuracy, greedy 0.500 [0.400, 0.600] 0.840 [0.740, 0.940] +0.340" in seen
    assert "pass@4 0.550 [0.400, 0.600] 0.890 [0.740, 0.940] +0.340" in seen
    assert "small sums 0.500" in seen
    assert "tokens 10.0 10.0" in seen
    assert "cut at the limit 25.0% 25.0%" in seen
    assert "question <0> [b]?[/b] before wrong I [bold]think[/bold] <script>alert(1)</script> after right" in seen
    assert "reward/correct 0.1 0.3 0.2 mean of one named reward" in seen
    assert f"grad_norm 1.5 3.5 2.5 {METRICS['grad_norm']}" in seen
    assert '[model] name = "a<b"' in seen


@pytest.mark.parametrize(
    ("steps", "evaluations", "wanted", "unwanted"),
    [
        (0, {}, "no step yet", "Held-out"),
        (1, {}, "step 1, 30 s of steps", "Held-out"),
        (0, {0: BEFORE}, "Held-out accuracy 50.0 % greedy", "→"),
        (2, {0: BEFORE}, "after step 0", "Before and after"),
        (2, {2: AFTER}, "84.0 %", "Before and after"),
        (60, dict.fromkeys(range(0, 60, 2), AFTER), "step 60", "no step"),
    ],
)
def test_a_part_of_a_run_is_told_too(
    tmp_path: Path, steps: int, evaluations: dict[int, dict[str, Any]], wanted: str, unwanted: str
) -> None:
    tmp_path.joinpath("run").mkdir()
    seen = words(page_of(make_run(tmp_path / "run", steps, evaluations)))
    assert wanted in seen
    assert unwanted not in seen


def test_missing_and_null_metrics_leave_gaps(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for step in (1, 2, 3):
        row = metrics(step)
        if step == 2:
            row |= dict.fromkeys(("reward_mean", "loss", "completion_tokens_max", "seconds_learn"), math.nan)
            del row["kl"]
        tracker.log(step, row)
    seen = words(page_of(tmp_path))
    assert "reward_mean 1.5 3.5 2.5" in seen
    assert "kl 1.5 3.5 2.5" in seen


def test_of_a_step_said_twice_the_last_word_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3, {0: BEFORE, 3: BEFORE})
    tracker = JsonlTracker(run)
    tracker.log(2, metrics(2) | {"lr": 99.0})
    tracker.evaluation(3, AFTER)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lr"')
    rows = report.by_step(atomic_files.read_json_lines(run / "metrics.jsonl"))
    assert [(row["step"], row["lr"]) for row in rows] == [(1, 1.5), (2, 99.0), (3, 3.5)]
    assert "50.0 % → 84.0 %" in words(page_of(run))


def test_the_picture_shows_what_was_measured() -> None:
    steps = [{"step": step} | metrics(step) for step in range(1, 41)]
    steps[19]["reward_mean"] = None
    evaluations = [{"step": 0} | BEFORE, {"step": 20} | evaluation(0.7, "", True), {"step": 40} | AFTER]
    accuracy, reward, length, seconds = report.figure(steps, evaluations).axes
    greedy, *_, sampled = accuracy.get_lines()
    assert list(greedy.get_xdata()) == [0, 20, 40] and list(greedy.get_ydata()) == [0.5, 0.7, 0.84]
    assert list(sampled.get_ydata()) == pytest.approx([0.55, 0.75, 0.89])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["pass@4, sampled", "greedy"]
    (bars,) = accuracy.collections
    ends = [(path.vertices[0][1], path.vertices[1][1]) for path in bars.get_paths()]
    assert ends == [pytest.approx(pair) for pair in ((0.4, 0.6), (0.6, 0.8), (0.74, 0.94))]
    measured, smoothed = (list(line.get_ydata()) for line in reward.get_lines())
    assert measured[:3] == [1.5, 2.5, 3.5] and math.isnan(measured[19])
    assert smoothed[:3] + smoothed[-3:] == [2.5, 3, 3.5, 38.5, 39, 39.5]  # of 5 steps, centred, fewer at the ends
    assert list(length.get_lines()[0].get_ydata()) == [row["completion_tokens_mean"] for row in steps]
    tops = [max(vertex[1] for vertex in area.get_paths()[0].vertices) for area in seconds.collections]
    assert tops == pytest.approx([40.5 * number for number in range(1, 6)])  # five phases of 40.5 s at the last step


def test_the_terminal_table_and_transcripts() -> None:
    table = printed(report.table(BEFORE, AFTER))
    assert "0.500 [0.400, 0.600]" in table
    assert "0.840 [0.740, 0.940]" in table
    assert "+0.340" in table
    assert "small sums" in table
    assert "pass@4" in table
    said = printed(report.transcripts(BEFORE, AFTER, n=2))
    assert said.count("before wrong I [bold]think[/bold] <script>") == 2
    assert said.count("after  right") == 2
    assert "question <1> [b]?[/b]" in said
    assert "question <2>" not in said
    assert "\x1b" not in said


def test_only_what_both_evaluations_have_is_compared() -> None:
    greedy_only = BEFORE | {"pass_at_k": {}, "by_kind": {}, "transcripts": AFTER["transcripts"][1:2]}
    assert [row[0].strip() for row in report.comparison(greedy_only, AFTER)] == [
        "accuracy, greedy",
        "tokens",
        "cut at the limit",
    ]
    assert [question for question, _ in report.paired_transcripts(greedy_only, AFTER)] == ["question <1> [b]?[/b]"]


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    with caplog.at_level(logging.WARNING):
        assert report.write(tmp_path) == []
    assert f"no report of {tmp_path}" in caplog.text
    assert "line 1: not an object" in caplog.text
    (tmp_path / "metrics.jsonl").write_text("")
    assert report.write(tmp_path) == [tmp_path / "report.html", tmp_path / "report.png"]


def test_what_went_wrong_stands_in_the_report(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for step in range(1, 5):
        tracker.log(step, metrics(step) | {"zero_variance_fraction": 1.0, "truncated_fraction": 0.95})
    report.build(tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "What to look at" in page
    assert "step 3, rewards all equal: the completions of each prompt all earned the same" in page
    assert "step 3, completions cut: 95% of the completions are cut at sampler.max_tokens" in page


def test_it_says_where_no_rollouts_were_kept(tmp_path: Path) -> None:
    said = "No completions of training were kept: rollouts/ holds none (run.rollouts_every)."
    assert said in words(page_of(make_run(tmp_path, 1, {})))
    JsonlTracker(tmp_path, RunConfig(rollouts_gzip=True)).rollouts(1, [])
    assert said not in words(page_of(tmp_path))
