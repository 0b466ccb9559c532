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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_INK, _GREY, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_BLUE, _ORANGE = "#2563eb", "#d9480f"
_LENGTHS = ("min", "mean", "max")
_PHASES = {
    "seconds_sample": ("sample", "#60a5fa"),
    "seconds_score": ("score", "#334155"),
    "seconds_learn": ("learn", "#fb923c"),
    "seconds_sync": ("sync", "#0d9488"),
    "seconds_proof": ("proof", "#a78bfa"),
}


def write(folder: Path) -> list[Path]:
    """``report.html`` and ``report.png`` in the run folder. What goes wrong is logged: no run fails by its report."""
    try:
        return build(folder)
    except Exception as error:
        logging.getLogger(__name__).warning("no report of %s: %s", folder, error)
        return []


def build(folder: Path) -> list[Path]:
    """As ``write``, but raises what goes wrong."""
    steps = by_step(atomic_files.read_json_lines(folder / "metrics.jsonl"))
    evaluations = by_step(atomic_files.read_json_lines(folder / "eval.jsonl"))
    picture = io.BytesIO()
    figure(steps, evaluations).savefig(picture, format="png", dpi=160)
    atomic_files.write_bytes(folder / "report.png", picture.getvalue())
    config = folder / "config.toml"
    page = html(
        folder.resolve().name,
        steps,
        evaluations,
        picture.getvalue(),
        config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        rollouts=bool(rollout_files(folder)),
    )
    atomic_files.write_text(folder / "report.html", page)
    return [folder / "report.html", folder / "report.png"]


def by_step(rows: Sequence[Row]) -> list[Row]:
    """The rows in order of their step, the last one said of each: a resumed run may say one again."""
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
    rows = [_compared("accuracy, greedy", before, after, "accuracy")]
    for k, at_k in before.get("pass_at_k", {}).items():
        if k in after.get("pass_at_k", {}):
            rows.append(_compared(f"pass@{k}", at_k, after["pass_at_k"][k], "value"))
    for kind, part in before.get("by_kind", {}).items():
        if kind in after.get("by_kind", {}):
            rows.append(_compared(f"  {kind}", part, after["by_kind"][kind], "accuracy"))
    for name, key, form in (
        ("tokens", "completion_tokens_mean", ".1f"),
        ("cut at the limit", "truncated_fraction", ".1%"),
    ):
        if before.get(key) is not None and after.get(key) is not None:
            rows.append((name, format(before[key], form), format(after[key], form), ""))
    return rows


def paired_transcripts(before: Row, after: Row) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """``(question, [(when, completion, right), …])`` of the questions that both evaluations show."""
    later = {shown["prompt_id"]: shown for shown in after.get("transcripts", [])}
    return [
        (
            shown["question"],
            [
                ("before", shown["completion"], shown["correct"]),
                ("after", later[shown["prompt_id"]]["completion"], later[shown["prompt_id"]]["correct"]),
            ],
        )
        for shown in before.get("transcripts", [])
        if shown["prompt_id"] in later
    ]


def figure(steps: Sequence[Row], evaluations: Sequence[Row]) -> Figure:
    """Held-out accuracy, training reward, completion length and seconds against the step. Any of them may be empty."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = Figure(figsize=(11, 6.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white")
    (accuracy, reward), (length, seconds) = drawn.subplots(2, 2, sharex=True)
    _draw_accuracy(_panel(accuracy, "held-out accuracy, 95 % intervals"), evaluations)
    _draw_reward(_panel(reward, "training reward, mean of a step"), steps)
    _draw_length(_panel(length, "completion length, tokens: mean, shortest to longest"), steps)
    _draw_seconds(_panel(seconds, "seconds a step"), steps)
    last = max([row["step"] for row in (*steps, *evaluations)], default=1)
    for axes in (length, seconds):
        axes.set_xlabel("step", color=_GREY)
        axes.set_xlim(-0.03 * last - 0.5, 1.03 * last + 0.5)
    return drawn


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, color=_GREY, ha="center")
    axes.set_yticks([])


def html(
    name: str, steps: Sequence[Row], evaluations: Sequence[Row], picture: bytes, config: str, *, rollouts: bool = True
) -> str:
    """The report as one page that needs nothing beside it. ``rollouts``: whether the run kept any."""
    before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    two = len(evaluations) > 1
    return _PAGE.render(
        name=name,
        steps=len(steps),
        last_step=steps[-1]["step"] if steps else 0,
        spent=duration(sum(row.get("seconds_step") or 0 for row in steps)),
        percent=lambda share: f"{100 * share:.1f} %",
        before=before,
        after=after,
        two=two,
        comparison=comparison(before, after) if two else [],
        transcripts=paired_transcripts(before, after) if two else [],
        picture=base64.b64encode(picture).decode("ascii"),
        findings=health.findings(steps, finished=True),
        metrics=_metric_rows(steps),
        config=config,
        rollouts=rollouts,
    )


def _compared(name: str, before: Row, after: Row, key: str) -> tuple[str, str, str, str]:
    prefix = "accuracy_" if "accuracy_low" in before else ""
    cells = [f"{row[key]:.3f} [{row[prefix + 'low']:.3f}, {row[prefix + 'high']:.3f}]" for row in (before, after)]
    return name, cells[0], cells[1], f"{after[key] - before[key]:+.3f}"


def _numbers(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it was measured and finite."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """Centred running mean over at most ``width`` values, fewer at the ends."""
    half = width // 2
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _panel(axes: Axes, title: str) -> Axes:
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=10)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_GREY, length=0, labelsize=9)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    return axes


def _draw_accuracy(axes: Axes, evaluations: Sequence[Row]) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if not evaluations:
        return _nothing(axes, "not evaluated")
    at = [row["step"] for row in evaluations]
    values = [row["accuracy"] for row in evaluations]
    for k, dashes in zip(evaluations[0].get("pass_at_k", {}), ("--", ":", "-."), strict=False):
        drawn = [row for row in evaluations if k in row.get("pass_at_k", {})]
        axes.plot([row["step"] for row in drawn], [row["pass_at_k"][k]["value"] for row in drawn],
                  dashes, color=_GREY, linewidth=1.4, marker=".", markersize=4, label=f"pass@{k}, sampled")  # fmt: skip
    low, high = ([row[f"accuracy_{end}"] for row in evaluations] for end in ("low", "high"))
    if len(at) <= 25:
        bars = [[value - end for value, end in zip(values, low, strict=True)],
                [end - value for value, end in zip(values, high, strict=True)]]  # fmt: skip
        axes.errorbar(at, values, yerr=bars, color=_ORANGE, linewidth=0, elinewidth=1.8, capsize=4)
    else:
        axes.fill_between(at, low, high, color=_ORANGE, alpha=0.2, linewidth=0)
    axes.plot(
        at, values, color=_ORANGE, linewidth=1.8, marker="o", markersize=5 if len(at) <= 25 else 0, label="greedy"
    )
    for index in dict.fromkeys((0, len(at) - 1)):  # above the bar, where no line passes
        axes.annotate(f"{values[index]:.0%}", (at[index], high[index]), xytext=(0, 5),
                      textcoords="offset points", color=_ORANGE, fontweight="bold", ha="center")  # fmt: skip
    axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=_INK)


def _draw_reward(axes: Axes, steps: Sequence[Row]) -> None:
    at, rewards = _numbers(steps, "reward_mean")
    if not at:
        return _nothing(axes, "no step yet")
    width = min(25, max(1, len(at) // 10) | 1)  # odd, so that the mean is centred
    marker = "o" if len(at) <= 100 else ""
    axes.plot(at, rewards, color=_BLUE, alpha=0.3 if width > 1 else 1, linewidth=1.2, marker=marker, markersize=3)
    if width > 1:
        axes.plot(at, _smoothed(rewards, width), color=_BLUE, linewidth=2.2, label=f"mean of {width} steps")
        axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=_INK)


def _draw_length(axes: Axes, steps: Sequence[Row]) -> None:
    whole = [
        row for row in steps if all(isinstance(row.get(f"completion_tokens_{of}"), int | float) for of in _LENGTHS)
    ]
    at = [row["step"] for row in whole]
    if not at:
        return _nothing(axes, "no step yet")
    least, mean, most = ([row[f"completion_tokens_{of}"] for row in whole] for of in _LENGTHS)
    axes.fill_between(at, least, most, color=_BLUE, alpha=0.12, linewidth=0)
    axes.plot(at, mean, color=_BLUE, linewidth=2, marker="o" if len(at) < 3 else "", markersize=4)
    axes.set_ylim(bottom=0)


def _draw_seconds(axes: Axes, steps: Sequence[Row]) -> None:
    if not steps:
        return _nothing(axes, "no step yet")
    # One polygon a phase instead of a bar a step: a run may have thousands.
    edges = [row["step"] - 0.5 for row in steps] + [steps[-1]["step"] + 0.5]
    bottom = [0.0] * len(steps)
    for key, (name, colour) in _PHASES.items():
        values = [float(row.get(key) or 0) for row in steps]
        if any(values):
            top = [low + value for low, value in zip(bottom, values, strict=True)]
            axes.fill_between(edges, [*bottom, bottom[-1]], [*top, top[-1]], step="post", color=colour, linewidth=0,
                              label=name)  # fmt: skip
            bottom = top
    axes.set_ylim(0, max(bottom) * 1.02 or 1)
    if any(bottom):
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 1), ncols=len(_PHASES), frameon=False, fontsize=9,
                    labelcolor=_INK, handlelength=0.9, handletextpad=0.4, columnspacing=1)  # fmt: skip


def _metric_rows(steps: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """Key, first, last, mean and meaning of each metric that the run has."""
    keys = list(dict.fromkeys(key for row in steps for key in row if key not in ("step", "time")))
    rows = []
    for key in keys:
        _, values = _numbers(steps, key)
        if values:
            meaning = METRICS.get(key) or METRICS["reward/<name>"]
            mean = sum(values) / len(values)
            rows.append((key, f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{mean:.4g}", str(meaning)))
    return rows


_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} - nanoGRPO</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem; }
section { background: #fff; border-radius: 8px; padding: 1rem 1.25rem; margin: 1rem 0; overflow-x: auto; }
h1 { margin: 0; font-size: 1.5rem; } h2 { margin: 0 0 .5rem; font-size: 1.1rem; }
.big { font-size: 2.25rem; font-weight: 700; color: #d9480f; } .quiet { color: #616e7c; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; } td.name { white-space: pre; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; font-size: .9rem; }
.right { color: #0b7a3b; } .wrong { color: #b42318; }
</style>
</head>
<body><main>
<h1>{{ name }}</h1>
<p class="quiet">{% if steps %}step {{ last_step }}, {{ spent }} of steps{% else %}no step yet{% endif %}</p>
{% if steps and not rollouts %}
<p class="quiet">No completions of training were kept: rollouts/ holds none (run.rollouts_every).</p>
{% endif %}
{% if after %}
<section>
<h2>Held-out accuracy</h2>
<div class="big">{% if two %}{{ percent(before.accuracy) }} → {% endif %}{{ percent(after.accuracy) }}</div>
<p class="quiet">greedy, {{ after.questions }} questions that are not trained on, after step {{ after.step }};
95 % interval {{ percent(after.accuracy_low) }} to {{ percent(after.accuracy_high) }}
{% if two %}
(before: {{ percent(before.accuracy_low) }} to {{ percent(before.accuracy_high) }})
{% endif %}
</p>
</section>
{% endif %}
<section>
<img src="data:image/png;base64,{{ picture }}" alt="accuracy, reward, completion length and seconds against the step">
</section>
{% if findings %}
<section>
<h2>What to look at</h2>
{% for finding in findings %}
<p>step {{ finding.step }}, {{ finding.kind }}: {{ finding.text }}.</p>
{% endfor %}
</section>
{% endif %}
{% if comparison %}
<section>
<h2>Before and after</h2>
<table>
<tr><th></th><th class="number">before</th><th class="number">after</th><th class="number">change</th></tr>
{% for row in comparison %}
<tr><td class="name">{{ row[0] }}</td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</section>
{% endif %}
{% if transcripts %}
<section>
<h2>The same questions, before and after</h2>
{% for question, answers in transcripts %}
<pre class="quiet">{{ question }}</pre>
<table>
{% for when, completion, correct in answers %}
<tr><td>{{ when }}</td><td class="{{ "right" if correct else "wrong" }}">{{ "right" if correct else "wrong" }}</td>\
<td><pre>{{ completion or "(empty)" }}</pre></td></tr>
{% endfor %}
</table>
{% endfor %}
</section>
{% endif %}
{% if metrics %}
<section>
<h2>Metrics</h2>
<table>
<tr><th>key</th><th class="number">first</th><th class="number">last</th><th class="number">mean</th>
<th>what it is</th></tr>
{% for key, first, last, mean, meaning in metrics %}
<tr><td><code>{{ key }}</code></td><td class="number">{{ first }}</td><td class="number">{{ last }}</td>\
<td class="number">{{ mean }}</td><td class="quiet">{{ meaning }}</td></tr>
{% endfor %}
</table>
</section>
{% endif %}
{% if config %}
<section><details><summary>Configuration</summary><pre>{{ config }}</pre></details></section>
{% endif %}
</main></body>
</html>
""")
