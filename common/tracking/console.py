"""The run on the terminal: progress, the last numbers, a completion to look at. Nothing here is kept."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from common.errors import printable
from common.types import Completion, Group


def terminal(stderr: bool = False) -> Console:
    """A console that prints text as it is: ``[...]`` and ``:...:`` in a path or a name are no markup."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


class ConsoleTracker:
    """The run on the terminal: ``live``, a display that renews itself; ``plain``, one line a step; ``off``.

    ``live`` becomes ``plain`` where standard output is no terminal. Text that a model wrote is shown as it is, never
    read as markup or terminal codes.
    """

    def __init__(
        self,
        mode: Literal["live", "plain", "off"],
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
    ) -> None:
        """``first_step``: the steps already done when the run was resumed."""
        self._console = console or terminal()
        if mode == "live" and (not self._console.is_terminal or self._console.is_dumb_terminal):
            mode = "plain"
        self.mode = mode
        self._total, self._step = total_steps, first_step
        self._metrics: Mapping[str, float] = {}
        self._durations: deque[float] = deque(maxlen=20)
        self._phase, self._phase_since = "starting", time.monotonic()
        self._sample: tuple[Group, Completion] | None = None
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._display, console=self._console, refresh_per_second=4)
        if mode == "live":
            self._live.start()

    def phase(self, text: str) -> None:
        """What the run waits for now, side first: ``sampler: writing 16 x 8 completions``. Shown live only."""
        self._phase, self._phase_since = text, time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step, self._metrics = step, metrics
        if "seconds_step" in metrics:
            self._durations.append(metrics["seconds_step"])
        if self.mode == "plain":
            self._line(self._plain_line())
        elif self.mode == "live":
            self._live.refresh()

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        shown = [group for group in groups if group.completions]
        if shown:
            group = shown[step % len(shown)]  # another place in the batch each step: with one task mix, another kind
            self._sample = group, group.completions[0]

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        if self.mode != "off":
            self._line(evaluation_line(step, result))

    def close(self) -> None:
        """Leaves the last display standing. Closing twice is allowed."""
        if self.mode == "live":
            self._phase = ""
            self._live.stop()

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _eta_s(self) -> float | None:
        if not self._durations or self._step >= self._total:
            return None
        return (self._total - self._step) * sum(self._durations) / len(self._durations)

    def _plain_line(self) -> str:
        width = len(str(self._total))
        parts = [f"step {self._step:{width}d}/{self._total}", *(f"{k} {v}" for k, v in _headline(self._metrics))]
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in _seconds(self._metrics))
        parts.append(f"{self._metrics.get('seconds_step', math.nan):.1f} s ({seconds})")
        if (eta_s := self._eta_s()) is not None:
            parts.append(f"{duration(eta_s)} left")
        return "  ".join(parts)

    def _display(self) -> RenderableType:
        eta_s = self._eta_s()
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        progress = ProgressBar(total=self._total, completed=self._step)
        left = Text("" if eta_s is None else f"{duration(eta_s)} left")
        top.add_row(Text(f"step {self._step}/{self._total}", style="bold"), progress, left)
        rows: list[RenderableType] = [top]
        if self._phase:
            waited = duration(time.monotonic() - self._phase_since)
            self._spinner.update(text=Text(printable(f"{self._phase} ({waited})"), style="cyan"))
            rows.append(self._spinner)
        if self._metrics:
            rows.append(self._numbers())
        if self._sample:
            rows.append(_sample_panel(*self._sample))
        return Stack(*rows)

    def _numbers(self) -> RenderableType:
        cells = [(Text(name, style="dim"), Text(value, style="bold")) for name, value in _headline(self._metrics)]
        pairs_a_row = 3 if self._console.width >= 90 else 2
        table = Table.grid(padding=(0, 2))
        for start in range(0, len(cells), pairs_a_row):
            table.add_row(*(cell for pair in cells[start : start + pairs_a_row] for cell in pair))
        seconds = "  ".join(f"{name} {value:.1f} s" for name, value in _seconds(self._metrics))
        return Stack(table, Text(seconds, style="dim"))


def evaluation_line(step: int, result: Mapping[str, Any]) -> str:
    """An evaluation in one line: ``after step 20: accuracy 0.740 [0.675, 0.796] on 200 questions``."""
    line = (
        f"after step {step}: accuracy {result['accuracy']:.3f} "
        f"[{result['accuracy_low']:.3f}, {result['accuracy_high']:.3f}] on {result['questions']} questions"
    )
    for k, at_k in result.get("pass_at_k", {}).items():
        line += f", pass@{k} {at_k['value']:.3f} [{at_k['low']:.3f}, {at_k['high']:.3f}]"
    return line


def duration(seconds: float) -> str:
    """``8 s``, ``4m10s``, ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _headline(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """What a person looks at first, named and rounded."""
    names = {"reward_mean": "reward"} | {key: key[7:] for key in metrics if key.startswith("reward/")}
    names |= {"loss": "loss", "grad_norm": "grad norm", "kl": "kl", "logprob_diff_mean": "logprob diff"}
    names |= {"completion_tokens_mean": "tokens"}
    for key, name in names.items():
        if key in metrics:
            yield name, f"{metrics[key]:.1f}" if key.startswith("completion") else f"{metrics[key]:.4g}"


def _seconds(metrics: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for phase in ("sample", "score", "learn", "sync", "proof"):
        if f"seconds_{phase}" in metrics:
            yield phase, metrics[f"seconds_{phase}"]


def _sample_panel(group: Group, completion: Completion) -> RenderableType:
    question = group.prompt.messages[-1]["content"] if group.prompt.messages else group.prompt.text
    text = Text(_short(question, 3), style="dim")
    text.append("\n" + (_short(completion.text, 6) or "(empty)"), style="not dim")
    rewards = ", ".join(f"{name} {value:.3g}" for name, value in completion.rewards.items())
    title = "a completion" if completion.reward is None else f"a completion: reward {completion.reward:.3g} ({rewards})"
    return Panel(text, title=Text(title), title_align="left", border_style="dim")


def _short(text: str, lines: int) -> str:
    """The end of a long question and the end of a long answer matter most: the middle goes."""
    clean = printable(text.strip())
    if len(clean) > lines * 80:
        clean = clean[: lines * 20] + " … " + clean[-lines * 60 :]
    rows = clean.split("\n")
    return "\n".join(rows if len(rows) <= lines else [*rows[:1], "…", *rows[2 - lines :]])
