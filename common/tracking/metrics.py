"""What is measured in each step, and the files of the run folder that hold it: metrics, evaluations and completions.

``METRICS`` and ``ROLLOUT_COLUMNS`` are the whole dictionary; docs/metrics.md is made from them. The JSON Lines are read
back by ``--resume`` and the report; other trackers (common/tracking/trackers.py) are never read.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import atomic_files
from common.config import RunConfig
from common.types import Completion, Group


class Metric(NamedTuple):
    key: str
    unit: str
    meaning: str
    absent_when: str = ""
    """When a step lacks it; empty: never."""

    def __str__(self) -> str:
        return f"{self.meaning} ({self.unit})" if self.unit else self.meaning


_NO_UPDATE = "no group carried a gradient, so nothing was learned"
_ONE_UPDATE = f"learner.inner_updates is 1, or {_NO_UPDATE}"
_NO_IMPORTANCE = f"learner.importance is off, or {_NO_UPDATE}"
_METRICS = [
    Metric("step", "", "the step, from 1"),
    Metric("time", "seconds since 1970, UTC", "when the step ended"),
    Metric("version", "", "the learner's version after the step"),
    Metric("sampler_version_min", "", "the oldest version of the weights that wrote a completion of the step"),
    Metric("sampler_version_max", "", "the newest such version"),
    Metric("reward_mean", "", "mean weighted reward of the step's completions"),
    Metric("reward_std", "", "standard deviation of the same"),
    Metric("reward/<name>", "", "mean of one named reward, before its weight"),
    Metric("zero_variance_fraction", "0 to 1", "share of the sampled groups whose rewards are all equal"),
    Metric("groups", "", "groups learned from whose rewards are not all equal"),
    Metric("groups_sampled", "", "groups sampled and scored, dynamic sampling included"),
    Metric("groups_skipped_reward_error", "", "groups left out because a reward failed"),
    Metric("prompts_dropped", "", "prompts passed over as too long while the step sampled (task.long_prompts=drop)"),
    Metric("completion_tokens_mean", "tokens", "mean length of a completion"),
    Metric("completion_tokens_min", "tokens", "length of the shortest"),
    Metric("completion_tokens_max", "tokens", "length of the longest"),
    Metric("truncated_fraction", "0 to 1", "share of the completions cut at sampler.max_tokens"),
    Metric("loss", "", "the objective that was minimised", _NO_UPDATE),
    Metric("grad_norm", "", "global norm of the gradient before clipping", _NO_UPDATE),
    Metric("lr", "", "learning rate of the step", _NO_UPDATE),
    Metric("kl", "nats a token", "mean KL divergence to the reference", f"learner.kl_coef is 0, or {_NO_UPDATE}"),
    Metric("entropy", "nats a token", "mean entropy of the learner's distribution", _NO_UPDATE),
    Metric("clip_fraction", "0 to 1", "share of the learned tokens whose ratio was clipped", _ONE_UPDATE),
    Metric("ratio_mean", "", "mean ratio of the policy to the policy before the step's inner updates", _ONE_UPDATE),
    Metric("logprob_diff_mean", "nats", "mean |sampler - learner| log-prob of the sampled tokens", _NO_UPDATE),
    Metric("logprob_diff_max", "nats", "the largest such difference", _NO_UPDATE),
    Metric("importance_mean", "", "mean sampler/learner importance weight, after the cap", _NO_IMPORTANCE),
    Metric("importance_max", "", "the largest such weight", _NO_IMPORTANCE),
    Metric("tokens_prompt", "", "prompt tokens that went through the learner (packed: shared prefixes once a pass)",
           _NO_UPDATE),
    Metric("tokens_completion", "", "completion tokens that went through the learner", _NO_UPDATE),
    Metric("tokens_computed", "", "tokens of the learner's passes (packed: shared prefixes once; padded: with padding)",
           _NO_UPDATE),
    Metric("tokens_learned", "", "completion tokens that count in the step's means", _NO_UPDATE),
    Metric("packed", "", "1 if each prompt was computed once for its completions, 0 if once for each", _NO_UPDATE),
    Metric("seconds_sample", "seconds", "waiting for completions"),
    Metric("seconds_score", "seconds", "waiting for their scores after the last completion"),
    Metric("seconds_learn", "seconds", "forward, backward and optimizer"),
    Metric("seconds_sync", "seconds", "transferring the weights to the sampler, without the proof"),
    Metric("seconds_proof", "seconds", "proving that the sampler holds them", "sync.proof is off"),
    Metric("seconds_step", "seconds", "the whole step, without evaluation and checkpoint"),
    Metric("sync_bytes", "bytes", "weights transferred"),
    Metric("sync_transport", "", "how they travelled: 0 in the same process, 1 by shared memory, 2 by a collective "
           "broadcast, 3 with the call (an adapter)"),
    Metric("probe_diff", "nats", "mean |sampler - learner| log-prob on the fixed probe after the sync, tokens weighted "
           "by probability", "sync.proof is off"),
    Metric("memory_peak_gib", "GiB", "peak memory: the device's, or the process's on a CPU; of the learner's largest "
           "rank, where it is a service of its own"),
    Metric("restarts", "", "services replaced so far, because they were lost (cluster.mode=ray)"),
]  # fmt: skip
METRICS: Mapping[str, Metric] = {metric.key: metric for metric in _METRICS}
"""Every key of ``metrics.jsonl``; nothing else is written there. A value of null was not a finite number."""
_OF_AN_UPDATE = {metric.key for metric in _METRICS if metric.absent_when == _NO_UPDATE}


class Column(NamedTuple):
    kind: str | list[Any]
    """As the ``datasets`` library writes types; a list: of such entries."""
    meaning: str


_MESSAGE = [{"name": "role", "dtype": "string"}, {"name": "content", "dtype": "string"}]
ROLLOUT_COLUMNS: Mapping[str, Column] = {
    "step": Column("int64", "the step that learned from it"),
    "prompt_id": Column("string", "the question's id in its split"),
    "prompt": Column("string", "the prompt as the model saw it"),
    "messages": Column([_MESSAGE], "the conversation before the chat template"),
    "completion": Column("string", "the answer: what the model wrote, without its end token"),
    "token_ids": Column(["int64"], "its tokens"),
    "logprobs": Column(["float64"], "log-prob of each token under the distribution it was drawn from (nats)"),
    "finish_reason": Column("string", "stop: the model ended it; length: it was cut"),
    "policy_version": Column("int64", "version of the weights that wrote it; the oldest, if they changed on the way"),
    "token_versions": Column(["int64"], "version behind each token, if they did; else empty"),
    "reward_<name>": Column("float64", "one named reward before its weight; null where it failed"),
    "reward": Column("float64", "the weighted sum; null where not scored"),
    "advantage": Column("float64", "how much better than its group; null where not learned from"),
    "data": Column("string", "what the task knows about the question, as JSON text"),
}
"""Every column of ``rollouts/``."""
ROLLOUT_FILES = "step-*.jsonl*"
"""Its files, one a step: ``.jsonl``, and ``.jsonl.gz`` where they are compressed. A folder may hold both."""


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Asserts that a step's keys are the documented ones, and that none is missing that applies."""
    unknown = sorted(key for key in metrics if key not in METRICS and not _is_reward(key))
    assert not unknown, f"not in common.tracking.METRICS: {unknown}"
    always = {metric.key for metric in _METRICS if not metric.absent_when} - {"step", "time", "reward/<name>"}
    assert always <= metrics.keys(), f"metrics of every step are missing: {sorted(always - metrics.keys())}"
    assert any(_is_reward(key) for key in metrics), "no named reward (reward/<name>) among the metrics"
    assert not _OF_AN_UPDATE & metrics.keys() or metrics.keys() >= _OF_AN_UPDATE, (
        f"metrics of every update are missing: {sorted(_OF_AN_UPDATE - metrics.keys())}"
    )


def rewind(folder: Path, step: int) -> None:
    """Takes out of the run folder what was written after ``step``: a run resumed from there writes it again."""
    atomic_files.truncate_after(folder / "metrics.jsonl", "step", step)
    atomic_files.truncate_after(folder / "eval.jsonl", "step", step)
    for path in rollout_files(folder):
        if int(path.name.removeprefix("step-").split(".")[0]) > step:
            path.unlink()


def rollout_files(folder: Path) -> list[Path]:
    """The files of the run's ``rollouts/`` in the order of their steps, compressed or not; none if there is none."""
    return sorted((folder / "rollouts").glob(ROLLOUT_FILES))


class JsonlTracker:
    """``metrics.jsonl`` (one object a step), ``eval.jsonl`` (one an evaluation), ``rollouts/`` (one file a step, or
    one every ``run.rollouts_every`` steps).

    A step's rollouts appear whole, and a line is on the disk when the call returns. ``rollouts/README.md`` declares
    the columns, so ``datasets.load_dataset("RUN/rollouts")`` gives the same types whatever a step happens to hold.
    """

    def __init__(self, folder: Path, config: RunConfig | None = None, last_step: int = 0) -> None:
        """``config`` says which rollouts are written, and how; those of ``last_step`` are among them."""
        self._folder, self._last_step = folder, last_step
        self._config = config or RunConfig()
        self._reward_names: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        check_metrics(metrics)
        numbers = {key: value if isinstance(value, int) else float(value) for key, value in metrics.items()}
        row = {"step": step, "time": time.time()} | numbers
        assert row["step"] == step, f"step {step} was given the metrics of step {row['step']}"
        atomic_files.append_line(self._folder / "metrics.jsonl", atomic_files.to_json(row))

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        every = self._config.rollouts_every
        if not every or (step % every and step != self._last_step):
            return
        names = {name for group in groups for completion in group.completions for name in completion.rewards}
        if not names <= self._reward_names or not (self._folder / "rollouts" / "README.md").exists():
            self._reward_names |= names
            atomic_files.write_text(self._folder / "rollouts" / "README.md", rollouts_card(sorted(self._reward_names)))
        lines = [
            atomic_files.to_json(_rollout_row(step, group, completion, sorted(self._reward_names))) + "\n"
            for group in groups
            for completion in group.completions
        ]
        path, text = self._folder / "rollouts" / f"step-{step:06d}.jsonl", "".join(lines)
        if self._config.rollouts_gzip:  # without the time, which would make two equal runs differ
            atomic_files.write_bytes(path.with_suffix(".jsonl.gz"), gzip.compress(text.encode("utf-8"), mtime=0))
        else:
            atomic_files.write_text(path, text)

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        row = {"step": step, "time": time.time(), **result}
        atomic_files.append_line(self._folder / "eval.jsonl", atomic_files.to_json(row))

    def close(self) -> None:
        """Nothing is held open."""


def rollouts_card(reward_names: Sequence[str]) -> str:
    """A dataset card that declares the columns of ``rollouts/`` and says what they hold."""
    features: list[dict[str, Any]] = []
    for column, (kind, _) in ROLLOUT_COLUMNS.items():
        names = [f"reward_{name}" for name in reward_names] if column == "reward_<name>" else [column]
        described = {"dtype": kind} if isinstance(kind, str) else {"list": kind[0]}
        features += [{"name": name, **described} for name in names]
    # JSON is YAML, and needs no library to write.
    configs = [{"config_name": "default", "data_files": ROLLOUT_FILES}]
    head = atomic_files.to_json({"configs": configs, "dataset_info": {"features": features}})
    rows = "".join(f"| `{name}` | {column.meaning} |\n" for name, column in ROLLOUT_COLUMNS.items())
    return f"---\n{head}\n---\nOne file a step, one line a completion.\n\n| column | holds |\n|---|---|\n{rows}"


def flat(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of an evaluation, each under one name."""
    for key, value in result.items():
        if isinstance(value, int | float):
            yield key, value
    for k, at_k in result.get("pass_at_k", {}).items():
        yield f"pass@{k}", at_k["value"]
    for kind, part in result.get("by_kind", {}).items():
        yield f"kind/{kind}", part["accuracy"]


def _is_reward(key: str) -> bool:
    return key.startswith("reward/") and len(key) > len("reward/")


def _rollout_row(step: int, group: Group, completion: Completion, reward_names: Sequence[str]) -> dict[str, Any]:
    """Numbers are written as floats throughout: a column of 1 and 0.5 would change its type from file to file."""
    prompt = group.prompt
    return {
        "step": step,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "messages": [{"role": m["role"], "content": m["content"]} for m in prompt.messages],
        "completion": completion.text,
        "token_ids": list(completion.token_ids),
        "logprobs": [float(value) for value in completion.logprobs],
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
        "token_versions": list(completion.token_versions),
        **{f"reward_{name}": _float_or_none(completion.rewards.get(name)) for name in reward_names},
        "reward": _float_or_none(completion.reward),
        "advantage": _float_or_none(completion.advantage),
        # default=str: a task's odd value must not cost the run its log.
        "data": atomic_files.to_json(dict(prompt.data), default=str),
    }


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)
