"""Writes docs/metrics.md from what the code says of its metrics: ``python -m tests.metrics_page``."""

from __future__ import annotations

from pathlib import Path

from common.tracking.metrics import ABSENT_WHEN, METRICS, ROLLOUT_COLUMNS

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


def page() -> str:
    absent = {key: f" (absent when {why})" for key, why in ABSENT_WHEN.items()}
    texts = {key: (text + absent.get(key, "")).replace("|", "\\|") for key, text in METRICS.items()}
    rows = [f"| `{key}` | {text} |" for key, text in texts.items()]
    columns = [f"| `{key}` | {text} |" for key, text in ROLLOUT_COLUMNS.items()]
    return "\n".join([
        "# Metrics: the keys of metrics.jsonl, and the columns of rollouts/",
        "\nMade by `python -m tests.metrics_page`.",
        "\n## metrics.jsonl: one object a step\n\n| key | meaning |\n|---|---|",
        *rows,
        "\n## rollouts/: one row a completion\n\n| column | meaning |\n|---|---|",
        *columns,
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page())
