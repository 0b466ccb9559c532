"""A small run put together as ``deploy/run.py`` does it, without its folder, report and trackers, which need packages
that a bare machine lacks: sampler, learner and loop in this process.

Used by the sampler's checks.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import device as devices
from common.config import Config, load
from common.rewards.scorer import Scorer
from deploy import colocated, components
from learner.checkpoint import Checkpoints
from learner.train import Loop, rehearse, train
from learner.weight_sync import WeightSync, make_probe
from tests.gpu.runner import ROOT

TOY = f"{ROOT / 'tests' / 'toy.py'}:Toy"


class _Rows:
    """A tracker that keeps the steps' metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def phase(self, text: str) -> None:
        print(text, flush=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append(dict(metrics))

    def rollouts(self, step: int, groups: Sequence[Any]) -> None:
        pass


def config_of(folder: Path, *words: str) -> Config:
    """A run on the toy task, which pays for short completions, with the model in ``folder``."""
    return load(None, [
        f"model.name={folder}", f"task.name={TOY}", "sampler.max_tokens=24", "optimizer.lr=1e-2",
        "train.prompts_per_step=8",
"train.group_size=8", "eval.questions=0", "run.save_every=0", "run.console=off", *words,
    ])  # fmt: skip


@contextlib.contextmanager
def made(config: Config) -> Iterator[Any]:
    """The loop of this run, its sampler holding the learner's weights by a proven sync, and the rows it logs."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready = components.prepare(config)
        scorer = stack.enter_context(Scorer(ready.config.task))
        parts = stack.enter_context(colocated.parts(ready))
        probe = make_probe(ready.train, ready.config.sync.probe_tokens, ready.longest_prompt)
        sync = WeightSync(parts.learner, parts.sampler, parts.placement, probe, ready.config.sync, parts.sync_s,
                          ready.config.model.dtype)  # fmt: skip
        rows = _Rows()
        loop = Loop(
            ready.config, parts.learner, parts.sampler, parts.placement, scorer,
            ready.stream(), sync, rows,
            Checkpoints(place / "checkpoints", 1), memory_gib=parts.memory_gib, restarts=parts.restarts,
            answer_s=parts.answer_s,
        )  # fmt: skip
        challenge = sync.challenge()
        first = sync()
        yield loop, rows.metrics, ready, {"challenge": challenge, "first": first}


def trained(config: Config) -> dict[str, Any]:
    """The whole run, and of it: the rewards of its first and last third, parity of the log-probs, tokens a second."""
    with made(config) as (loop, rows, ready, synced):
        size = ready.config.train.steps
        assert train(loop, lambda step: None, lambda: False), "the run did not reach its end"
        assert len(rows) == size, (len(rows), size)
    third = max(1, size // 3)

    def mean(key: str, some: Sequence[Mapping[str, float]]) -> float:
        found = [row[key] for row in some if key in row]
        return sum(found) / max(1, len(found))

    written = mean("completion_tokens_mean", rows) * ready.config.train.group_size * ready.config.train.prompts_per_step
    return {
        "steps": size,
        "reward_first_third": mean("reward_mean", rows[:third]),
        "reward_last_third": mean("reward_mean", rows[-third:]),
        "logprob_diff_mean": mean("logprob_diff_mean", rows),
        "logprob_diff_max": max(row.get("logprob_diff_max", 0.0) for row in rows),
        "challenge_diff": synced["challenge"].get("probe_diff"),
        "probe_diff_max": max(row["probe_diff"] for row in rows),
        "sample_tokens_per_s": written / max(1e-9, mean("seconds_sample", rows)),
        "step_s": mean("seconds_step", rows),
        "sync_s": mean("seconds_sync", rows),
        "packed": mean("packed", rows),
        "peak_gib": devices.peak_memory_gib(ready.device),
    }


def rehearsed(config: Config) -> dict[str, Any]:
    """The rehearsal alone: the longest request, the largest pack, a sync."""
    with made(config) as (loop, _, ready, synced):
        return {**rehearse(loop, ready.longest), "challenge_diff": synced["challenge"].get("probe_diff")}
