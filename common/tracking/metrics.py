"""The run's numbers and completions, and where they are written: JSON Lines and TensorBoard.

``METRICS`` is the dictionary of everything that is measured each step; nothing outside it is written. Only the JSON
Lines are meant to be read back (by ``--resume`` and the report). The display on the terminal is in
common/tracking/console.py. Used by the one training loop through ``common.protocols.Tracker``; who makes them is in
deploy/.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from common import atomic_files
from common.config import RunConfig
from common.protocols import Tracker
from common.tracking import health
from common.types import Completion, Group
from common.watchdog import result

_log = logging.getLogger("nanogrpo.tracking")

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "step": "the step, from 1",
        "time": "when the step ended (seconds since 1970, UTC)",
        "version": "the learner's version after the step",
        "sampler_version_min": "the oldest version of the weights that wrote a completion of the step",
        "sampler_version_max": "the newest such version",
        "reward_mean": "mean weighted reward of the step's completions",
        "reward_std": "standard deviation of the same",
        "reward/<name>": "mean of one named reward, before its weight",
        "zero_variance_fraction": "share of the sampled groups whose rewards are all equal (0 to 1)",
        "groups": "groups learned from whose rewards are not all equal",
        "groups_sampled": "groups sampled and scored, dynamic sampling included",
        "groups_skipped_reward_error": "groups left out because a reward failed",
        "prompts_dropped": "prompts passed over while the step sampled, because they were too long "
        "(task.long_prompts=drop)",
        "completion_tokens_mean": "mean length of a completion (tokens)",
        "completion_tokens_min": "length of the shortest (tokens)",
        "completion_tokens_max": "length of the longest (tokens)",
        "truncated_fraction": "share of the completions cut at sampler.max_tokens (0 to 1)",
        "loss": "the objective that was minimised",
        "grad_norm": "global norm of the gradient before clipping",
        "lr": "learning rate of the step",
        "kl": "mean KL divergence to the reference (nats a token)",
        "entropy": "mean entropy of the learner's distribution (nats a token)",
        "clip_fraction": "share of the learned tokens whose ratio was clipped (0 to 1)",
        "ratio_mean": "mean ratio of the policy to the policy before the step's inner updates",
        "logprob_diff_mean": "mean |sampler - learner| log-prob of the sampled tokens (nats)",
        "logprob_diff_max": "the largest such difference (nats)",
        "importance_mean": "mean sampler/learner importance weight, after the cap",
        "importance_max": "the largest such weight",
        "tokens_prompt": "prompt tokens that went through the learner (packed: what they begin with alike once a pass)",
        "tokens_completion": "completion tokens that went through the learner",
        "tokens_computed": "tokens of the learner's passes (packed: whatever sequences begin with alike once a pass; "
        "padded: with the padding)",
        "tokens_learned": "completion tokens that count in the step's averages",
        "packed": "1 if each prompt was computed once for its completions, 0 if once for each",
        "seconds_sample": "waiting for completions (seconds)",
        "seconds_score": "waiting for their scores after the last completion (seconds)",
        "seconds_learn": "forward, backward and optimizer (seconds)",
        "seconds_sync": "transferring the weights to the sampler, without the proof (seconds)",
        "seconds_proof": "proving that the sampler holds them (seconds)",
        "seconds_step": "the whole step, without evaluation and checkpoint (seconds)",
        "sync_bytes": "weights transferred (bytes)",
        "sync_transport": "how they travelled: 0 in the same process, 1 by shared memory, 2 by a collective broadcast, "
        "3 with the call (an adapter)",
        "probe_diff": "mean |sampler - learner| log-prob on the fixed probe after the sync, tokens weighted by "
        "probability (nats)",
        "memory_peak_gib": "peak memory: the device's, or the process's on a CPU (GiB); of the learner's largest rank, "
        "where it is a service of its own",
        "restarts": "services replaced so far, because they were lost (cluster.mode=ray)",
    }
)
"""Every key of ``metrics.jsonl``, with its unit. A value of null was not a finite number."""

_NO_UPDATE = "no group carried a gradient, so nothing was learned"
ABSENT_WHEN: Mapping[str, str] = MappingProxyType(
    {
        "loss": _NO_UPDATE,
        "grad_norm": _NO_UPDATE,
        "lr": _NO_UPDATE,
        "entropy": _NO_UPDATE,
        "logprob_diff_mean": _NO_UPDATE,
        "logprob_diff_max": _NO_UPDATE,
        "tokens_prompt": _NO_UPDATE,
        "tokens_completion": _NO_UPDATE,
        "tokens_computed": _NO_UPDATE,
        "tokens_learned": _NO_UPDATE,
        "packed": _NO_UPDATE,
        "kl": f"learner.kl_coef is 0, or {_NO_UPDATE}",
        "clip_fraction": f"learner.inner_updates is 1, or {_NO_UPDATE}",
        "ratio_mean": f"learner.inner_updates is 1, or {_NO_UPDATE}",
        "importance_mean": f"learner.importance is off, or {_NO_UPDATE}",
        "importance_max": f"learner.importance is off, or {_NO_UPDATE}",
        "seconds_proof": "sync.proof is off",
        "probe_diff": "sync.proof is off",
    }
)
"""The keys that a step may lack, and when; every other key is in every step."""

ROLLOUT_COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "step": "the step that learned from it",
        "prompt_id": "the question's id in its split",
        "prompt": "the prompt as the model saw it",
        "messages": "the conversation before the chat template",
        "completion": "the answer: what the model wrote, without its end token",
        "token_ids": "its tokens",
        "logprobs": "log-prob of each token under the distribution it was drawn from (nats)",
        "finish_reason": "stop: the model ended it; length: it was cut",
        "policy_version": "version of the weights that wrote it; the oldest, if they changed on the way",
        "token_versions": "version behind each token, if they did; else empty",
        "reward_<name>": "one named reward before its weight; null where it failed",
        "reward": "the weighted sum; null where not scored",
        "advantage": "how much better than its group; null where not learned from",
        "data": "what the task knows about the question, as JSON text",
    }
)
"""Every column of ``rollouts/``."""
ROLLOUT_FILES = "step-*.jsonl*"
"""Its files, one a step: ``.jsonl``, and ``.jsonl.gz`` where they are compressed. A folder may hold both."""


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Asserts that a step's keys are the documented ones, and that none is missing that applies."""
    unknown = sorted(key for key in metrics if key not in METRICS and not _is_reward(key))
    assert not unknown, f"not in common.tracking.METRICS: {unknown}"
    missing = METRICS.keys() - metrics.keys() - ABSENT_WHEN.keys() - {"step", "time", "reward/<name>"}
    assert not missing, f"metrics of every step are missing: {sorted(missing)}"
    assert any(_is_reward(key) for key in metrics), "no named reward (reward/<name>) among the metrics"
    learned = {key for key, when in ABSENT_WHEN.items() if when == _NO_UPDATE}
    assert not learned & metrics.keys() or learned <= metrics.keys(), (
        f"metrics of every update are missing: {sorted(learned - metrics.keys())}"
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
        row = {"step": step, "time": time.time()} | {key: _number(value) for key, value in metrics.items()}
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
        atomic_files.append_line(
            self._folder / "eval.jsonl", atomic_files.to_json({"step": step, "time": time.time(), **result})
        )

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoardTracker:
    """TensorBoard events in ``FOLDER/tensorboard``: the metrics under their own names, evaluations under ``eval/``.

    The events of a step go to the disk in one synchronous write. TensorBoard's own writer does it from a thread,
    minutes late, and hides a full disk until the next call.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        """``resume_step``: the last step kept of an earlier part of the run; TensorBoard then hides the later ones."""
        from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped, unused-ignore]
            Event,
            SessionLog,
        )

        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}.{next(_event_files)}"
        self._path = folder / "tensorboard" / name
        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])
        if resume_step:
            start = SessionLog(status=SessionLog.START)
            self._write([Event(wall_time=time.time(), step=resume_step + 1, session_log=start)])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._scalars(step, {key: value for key, value in metrics.items() if key not in ("step", "time")})

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Left out: ``rollouts/`` has them."""

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        self._scalars(step, {f"eval/{key}": value for key, value in flat(result)})

    def close(self) -> None:
        """Nothing is held open."""

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped, unused-ignore]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped, unused-ignore]

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()])
        self._write([Event(wall_time=time.time(), step=step, summary=summary)])

    def _write(self, events: Sequence[Any]) -> None:
        from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped, unused-ignore]
            RecordWriter,
        )

        records = io.BytesIO()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        atomic_files.append_bytes(self._path, records.getvalue())


@runtime_checkable
class ShowsPhase(Protocol):
    """A tracker that tells people what the run waits for."""

    def phase(self, text: str) -> None: ...


class HealthTracker:
    """Says once what the run's numbers show to go wrong (common/tracking/health.py), as soon as they do."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
        """``rows``: the steps that a resumed run has behind it; what they show was said before."""
        self._rows, self._say, self._watch = list(rows), say, health.Watch()
        for row in rows:
            self._watch.add(row)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._rows.append({"step": step, **metrics})
        self._report(self._watch.add(self._rows[-1]))

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Left out: the metrics are enough."""

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Left out."""

    def finish(self) -> str:
        """The run has come to its end: says what a short one showed. Returns why nothing was learned, if nothing."""
        self._report(self._watch.finish())
        return health.unlearned(self._rows)

    def close(self) -> None:
        """Nothing is held open."""

    def _report(self, found: Sequence[health.Finding]) -> None:
        for finding in found:
            self._say(f"step {finding.step}: {finding.text}")


class OwnTracker:
    """A tracker that is not ours, on a thread of its own, where it is made, too. What it raises, or a call longer than
    ``limit_s`` seconds (a server that does not answer), is reported once, and the run goes on without it."""

    def __init__(self, name: str, make: Callable[[], Tracker], limit_s: float = 60.0) -> None:
        """Raises what ``make`` raises, and ``RunFailure`` when it takes too long."""
        self._name, self._limit_s = name, limit_s
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._state = "well"  # or raised, hangs, closed
        threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True).start()  # ends with the process
        made: Future[Any] = Future()
        self._calls.put((make, made))
        self._tracker: Tracker = result(made, f"tracker {name!r}", "starting", limit_s, "")

    def phase(self, text: str) -> None:
        if isinstance(self._tracker, ShowsPhase):
            self._tell("phase", text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tell("log", step, metrics)

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        self._tell("rollouts", step, groups)

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        self._tell("evaluation", step, result)

    def close(self) -> None:
        if self._state in ("well", "raised"):  # one that has raised may still have something open
            self._state = "well"
            self._tell("close")
            self._state = "closed"

    def _tell(self, method: str, *arguments: Any) -> None:
        if self._state != "well":
            return
        done: Future[Any] = Future()
        self._calls.put((lambda: getattr(self._tracker, method)(*arguments), done))
        try:
            done.result(timeout=self._limit_s)
        except (Exception, SystemExit) as error:
            self._state = "raised" if done.done() else "hangs"
            why = f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self._state == "hangs":
                why = f"did not return within {self._limit_s:g} s"
            _log.warning("run.trackers: %r is left out from here on, because its %s %s", self._name, method, why)
            _log.info("what it raised", exc_info=error)  # where to: the log alone

    def _serve(self) -> None:
        while True:
            call, done = self._calls.get()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)


class Trackers:
    """Several trackers as one, in the order given. All are closed, even if closing one fails."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def phase(self, text: str) -> None:
        for tracker in self._trackers:
            if isinstance(tracker, ShowsPhase):
                tracker.phase(text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        for tracker in self._trackers:
            tracker.rollouts(step, groups)

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.evaluation(step, result)

    def close(self) -> None:
        errors = []
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def rollouts_card(reward_names: Sequence[str]) -> str:
    """A dataset card that declares the columns of ``rollouts/`` and says what they hold."""
    types = {
        "step": "int64", "prompt_id": "string", "prompt": "string", "completion": "string", "finish_reason": "string",
        "policy_version": "int64", **{f"reward_{name}": "float64" for name in reward_names},
        "reward": "float64", "advantage": "float64", "data": "string",
    }  # fmt: skip
    declared: list[dict[str, Any]] = [{"name": name, "dtype": kind} for name, kind in types.items()]
    lists = {"token_ids": "int64", "logprobs": "float64", "token_versions": "int64"}
    declared += [{"name": name, "list": kind} for name, kind in lists.items()]
    roles = [{"name": "role", "dtype": "string"}, {"name": "content", "dtype": "string"}]
    declared.append({"name": "messages", "list": roles})
    # JSON is YAML, and needs no library to write.
    configs = [{"config_name": "default", "data_files": ROLLOUT_FILES}]
    head = atomic_files.to_json({"configs": configs, "dataset_info": {"features": declared}})
    rows = "".join(f"| `{column}` | {meaning} |\n" for column, meaning in ROLLOUT_COLUMNS.items())
    return f"---\n{head}\n---\nOne file a step, one line a completion.\n\n| column | holds |\n|---|---|\n{rows}"


_event_files = count()  # two trackers of one process and second need two files


def _is_reward(key: str) -> bool:
    return key.startswith("reward/") and len(key) > len("reward/")


def _number(value: float) -> float:
    return int(value) if isinstance(value, int) else float(value)


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


def flat(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of an evaluation, each under one name."""
    for key, value in result.items():
        if isinstance(value, int | float):
            yield key, value
    for k, at_k in result.get("pass_at_k", {}).items():
        yield f"pass@{k}", at_k["value"]
    for kind, part in result.get("by_kind", {}).items():
        yield f"kind/{kind}", part["accuracy"]
