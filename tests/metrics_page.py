"""Writes docs/metrics.md from what the code says of its metrics: ``python -m tests.metrics_page``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.tracking.metrics import METRICS, ROLLOUT_COLUMNS

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


def page() -> str:
    metrics = [(f"`{m.key}`", m.unit, m.meaning, m.absent_when) for m in METRICS.values()]
    columns = [(f"`{name}`", column.meaning) for name, column in ROLLOUT_COLUMNS.items()]
    return "\n".join([
        "# Metrics: the keys of metrics.jsonl, and the columns of rollouts/",
        "\nMade by `python -m tests.metrics_page`.",
        "\n## metrics.jsonl: one object a step\n\n| key | unit | meaning | absent when |\n|---|---|---|---|",
        *map(_row, metrics),
        "\n## rollouts/: one row a completion\n\n| column | meaning |\n|---|---|",
        *map(_row, columns),
        "",
    ])  # fmt: skip


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
