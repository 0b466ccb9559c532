"""The end of a run for people: a picture, one HTML page, and the tables that the terminal shows.

Everything comes from the run folder's ``metrics.jsonl`` and ``eval.jsonl``, so a report can be made of a run that was
killed, resumed, or is still going. Left out: the completions of training (``rollouts/``). Used by the command line.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common import atomic_files
from common.errors import printable
from common.tracking import health
from common.tracking.console import duration
from common.tracking.metrics import METRICS, rollout_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_PHASES = ("sample", "score", "learn", "sync", "proof")


def write(folder: Path) -> list[Path]:
    """``report.html`` and ``report.png`` in the run folder. What goes wrong is logged: no run fails by its report."""
    try:
        return build(folder)
    except Exception as error:
        logging.getLogger(__name__).warning("no report of %s: %s", folder, error)
        return []


def build(folder: Path) -> list[Path]:
    """As ``write``, but raises what goes wrong. The page needs nothing beside it."""
    steps = by_step(atomic_files.read_json_lines(folder / "metrics.jsonl"))
    evaluations = by_step(atomic_files.read_json_lines(folder / "eval.jsonl"))
    before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    picture = io.BytesIO()
    figure(steps, evaluations).savefig(picture, format="png", dpi=160)
    config = folder / "config.toml"
    page = _PAGE.render(
        name=folder.resolve().name,
        last_step=steps[-1]["step"] if steps else 0,
        spent=duration(sum(row.get("seconds_step") or 0 for row in steps)),
        rollouts=bool(rollout_files(folder)),
        percent=lambda share: f"{100 * share:.1f} %",
        before=before,
        after=after,
        comparison=comparison(before, after) if len(evaluations) > 1 else [],
        transcripts=paired_transcripts(before, after) if len(evaluations) > 1 else [],
        picture=base64.b64encode(picture.getvalue()).decode("ascii"),
        findings=health.findings(steps, finished=True),
        metrics=_metric_rows(steps),
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
    )
    atomic_files.write_bytes(folder / "report.png", picture.getvalue())
    atomic_files.write_text(folder / "report.html", page)
    return [folder / "report.html", folder / "report.png"]


def by_step(rows: Sequence[Row]) -> list[Row]:
    """The rows by step; deduplicated, the last wins (a resumed run may log a step twice)."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def table(before: Row, after: Row) -> Table:
    """Two evaluations side by side, with their 95 % intervals, for the terminal."""
    shown = Table(title="held-out questions, before and after", title_style="bold")
    shown.add_column("")
    for name in ("before", "after", "change"):
        shown.add_column(name, justify="right")
    for row in comparison(before, after):
        shown.add_row(*(Text(printable(cell)) for cell in row))
    return shown


def transcripts(before: Row, after: Row, n: int = 3) -> RenderableType:
    """The same questions answered before and after, for the terminal."""
    panels = []
    for question, answers in paired_transcripts(before, after)[:n]:
        text = Text(printable(question.strip()), style="dim")
        for when, completion, correct in answers:
            text.append(f"\n{when:<6} ", style="bold not dim")
            text.append("right " if correct else "wrong ", style="green not dim" if correct else "red not dim")
            text.append(printable(completion.strip()) or "(empty)", style="not dim")
        panels.append(Panel(text, border_style="dim"))
    return Stack(*panels)


def comparison(before: Row, after: Row) -> list[tuple[str, str, str, str]]:
    """Name, before, after and change of everything that two evaluations both measured."""
    rows = [_compared("accuracy, greedy", before, after, "accuracy", "accuracy_")]
    for part, label, key in (("pass_at_k", "pass@{}", "value"), ("by_kind", "  {}", "accuracy")):
        for name in before.get(part, {}):
            if name in after.get(part, {}):
                rows.append(_compared(label.format(name), before[part][name], after[part][name], key))
    for name, key, form in (
        ("tokens", "completion_tokens_mean", ".1f"),
        ("cut at the limit", "truncated_fraction", ".1%"),
    ):
        if before.get(key) is not None and after.get(key) is not None:
            rows.append((name, format(before[key], form), format(after[key], form), ""))
    return rows


def _compared(name: str, before: Row, after: Row, key: str, prefix: str = "") -> tuple[str, str, str, str]:
    cells = [f"{row[key]:.3f} [{row[prefix + 'low']:.3f}, {row[prefix + 'high']:.3f}]" for row in (before, after)]
    return name, cells[0], cells[1], f"{after[key] - before[key]:+.3f}"


def paired_transcripts(before: Row, after: Row) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """``(question, [(when, completion, right), …])`` of the questions that both evaluations show."""
    later = {shown["prompt_id"]: shown for shown in after.get("transcripts", [])}
    return [
        (
            shown["question"],
            [
                (when, answer["completion"], answer["correct"])
                for when, answer in (("before", shown), ("after", later[shown["prompt_id"]]))
            ],
        )
        for shown in before.get("transcripts", [])
        if shown["prompt_id"] in later
    ]


def figure(steps: Sequence[Row], evaluations: Sequence[Row]) -> Figure:
    """Held-out accuracy, training reward, completion length and seconds against the step. Any of them may be empty."""
    import matplotlib.style
    from matplotlib.figure import Figure

    step, rewards = _column(steps, "step"), _column(steps, "reward_mean")
    at, values = _column(evaluations, "step"), _column(evaluations, "accuracy")
    low, high = _column(evaluations, "accuracy_low"), _column(evaluations, "accuracy_high")
    with matplotlib.style.context("seaborn-v0_8-whitegrid"):
        drawn = Figure(figsize=(11, 6.8), layout="constrained")
        accuracy, reward, length, seconds = drawn.subplots(2, 2, sharex=True).flat

        accuracy.set(title="held-out accuracy, 95 % intervals", ylim=(0, 1.02))
        bars = [(values - low).tolist(), (high - values).tolist()]
        accuracy.errorbar(at, values, yerr=bars, marker="o", capsize=4, label="greedy")
        for k in evaluations[0].get("pass_at_k", {}) if evaluations else ():
            sampled = [row.get("pass_at_k", {}).get(k, {}) for row in evaluations]
            accuracy.plot(at, _column(sampled, "value"), "--", marker=".", label=f"pass@{k}, sampled")

        width = min(25, max(1, len(steps) // 10) | 1)  # odd, so that the mean is centred
        reward.set(title="training reward, mean of a step")
        reward.plot(step, rewards, marker=".", alpha=0.4 if width > 1 else 1, label="a step")
        if width > 1:
            windows = [rewards[max(0, place - width // 2) : place + width // 2 + 1] for place in range(len(rewards))]
            reward.plot(step, [window.mean() for window in windows], color="C0", label=f"mean of {width} steps")

        length.set(title="completion length, tokens: mean, shortest to longest", xlabel="step")
        shortest, longest = (_column(steps, f"completion_tokens_{end}") for end in ("min", "max"))
        length.fill_between(step, shortest, longest, alpha=0.2, label="shortest to longest")
        length.plot(step, _column(steps, "completion_tokens_mean"), marker=".", label="mean")

        seconds.set(title="seconds a step", xlabel="step")
        edges = np.repeat(step, 2) + np.tile([-0.5, 0.5], len(step))
        spent = [np.repeat(np.nan_to_num(_column(steps, f"seconds_{phase}")), 2) for phase in _PHASES]
        seconds.stackplot(edges, *spent, labels=_PHASES)
        for axes, rows in ((accuracy, evaluations), (reward, steps), (length, steps), (seconds, steps)):
            axes.xaxis.get_major_locator().set_params(integer=True)
            if rows:
                axes.legend(loc="lower right", ncols=5, frameon=True, fontsize="small", columnspacing=1, handlelength=1)
            else:
                axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center")
    return drawn


def _column(rows: Sequence[Row], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A metric of every row; NaN, a gap in its line, where it was not measured or was not finite."""
    return np.array([row[key] if isinstance(row.get(key), int | float) else np.nan for row in rows], dtype=float)


def _metric_rows(steps: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """Key, first, last, mean and meaning of each metric that the run has."""
    rows = []
    for key in dict.fromkeys(key for row in steps for key in row if key not in ("step", "time")):
        values = _column(steps, key)
        values = values[~np.isnan(values)]
        if len(values):
            first, last, mean = (f"{value:.4g}" for value in (values[0], values[-1], values.mean()))
            rows.append((key, first, last, mean, str(METRICS.get(key) or METRICS["reward/<name>"])))
    return rows


_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} - nanoGRPO</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 0 auto; padding: 2rem 1rem; }
.big { font-size: 2.25rem; font-weight: 700; color: #d9480f; } .quiet { color: #616e7c; }
img { width: 100%; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; }
table { border-collapse: collapse; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
.right { color: #0b7a3b; } .wrong { color: #b42318; }
</style>
</head>
<body>
{% macro rows(title, head, cells) %}
{% if cells %}
<h2>{{ title }}</h2>
<table>
<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in cells %}
<tr>{% for cell in row %}<td><pre>{{ cell }}</pre></td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% endmacro %}
<h1>{{ name }}</h1>
<p class="quiet">{{ "step %s, %s of steps" % (last_step, spent) if last_step else "no step yet" }}</p>
{% if last_step and not rollouts %}
<p class="quiet">No completions of training were kept: rollouts/ holds none (run.rollouts_every).</p>
{% endif %}
{% if after %}
<h2>Held-out accuracy</h2>
<div class="big">{% if comparison %}{{ percent(before.accuracy) }} → {% endif %}{{ percent(after.accuracy) }}</div>
<p class="quiet">greedy, {{ after.questions }} questions that are not trained on, after step {{ after.step }};
95 % interval {{ percent(after.accuracy_low) }} to {{ percent(after.accuracy_high) }}
{% if comparison %}(before: {{ percent(before.accuracy_low) }} to {{ percent(before.accuracy_high) }}){% endif %}</p>
{% endif %}
<img src="data:image/png;base64,{{ picture }}" alt="accuracy, reward, completion length and seconds against the step">
{% if findings %}
<h2>What to look at</h2>
{% for finding in findings %}
<p>step {{ finding.step }}, {{ finding.kind }}: {{ finding.text }}.</p>
{% endfor %}
{% endif %}
{{ rows("Before and after", ["", "before", "after", "change"], comparison) }}
{% if transcripts %}
<h2>The same questions, before and after</h2>
{% for question, answers in transcripts %}
<pre class="quiet">{{ question }}</pre>
<table>
{% for when, completion, correct in answers %}
{% set verdict = "right" if correct else "wrong" %}
<tr><td>{{ when }}</td><td class="{{ verdict }}">{{ verdict }}</td>
<td><pre>{{ completion or "(empty)" }}</pre></td></tr>
{% endfor %}
</table>
{% endfor %}
{% endif %}
{{ rows("Metrics", ["key", "first", "last", "mean", "what it is"], metrics) }}
{% if config %}<details><summary>Configuration</summary><pre>{{ config }}</pre></details>{% endif %}
</body>
</html>
""")
