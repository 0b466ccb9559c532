"""One run from start to end: its folder, log and signals, the parts, and going on after the learner was lost.

The parts come from deploy/colocated.py (one process) or deploy/cluster/separate.py (services on Ray); the loop is
learner/train.py's and knows neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common import atomic_files, plugins
from common.config import Config, resolved_toml
from common.errors import LearnerLost, OutOfMemory, RunFailure, UserError
from common.protocols import Learner, Tracker
from common.rewards.scorer import Scorer
from common.tracking import metrics
from common.tracking.console import ConsoleTracker
from common.tracking.health import HealthTracker
from common.tracking.trackers import OwnTracker, TensorBoardTracker, Trackers
from common.watchdog import time_limit
from deploy import colocated, components, disk, report
from deploy.cluster import connection, separate
from deploy.components import Components, Prepared
from deploy.memory_plan import output
from deploy.resume import anchored, check_task, kept
from deploy.resume import config_of as config_of
from deploy.resume import same_run as same_run
from deploy.stopping import Stopping, on_stop_signals
from learner.checkpoint import Checkpoints
from learner.train import Loop, rehearse, train
from learner.weight_sync import WeightSync, make_probe

log = logging.getLogger("nanogrpo")
_CONFIG, _LOG = "config.toml", "run.log"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    finished: bool
    """False: it was stopped, and its last checkpoint is the step it reached."""
    step: int
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    """Evaluations as ``eval.jsonl`` holds them."""
    unlearned: str = ""
    """Why a finished run has changed nothing, if it has not."""


def run(config: Config, folder: Path, console: Console, *, resume: bool = False) -> Outcome:
    """Trains, writing everything into ``folder``; see docs/runs.md for what it will hold."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_run_folder(folder, resume))
        stack.enter_context(_logging_to(folder / _LOG))
        atomic_files.remove_leftovers(folder)
        if not resume:  # replaces what a run ended before its first step left, which a supervisor would resume
            atomic_files.write_text(folder / _CONFIG, resolved_toml(config))
            metrics.rewind(folder, -1)
        if config.cluster.mode == "ray" and config.cluster.address != "private":
            stack.enter_context(connection.joined(config))  # once, for all who ask it
        config = components.resolve_dtype(anchored(config))
        ready = components.prepare(config)
        if resume:
            check_task(folder, config, ready.stream())
        scorer = stack.enter_context(Scorer(config.task))
        atomic_files.write_text(folder / _CONFIG, resolved_toml(config))
        own = [stack.enter_context(_own_tracker(name, folder)) for name in config.run.trackers]
        stopping = Stopping(console)
        stack.enter_context(on_stop_signals(stopping.ask))
        console.print(
            f"model   {ready.folder}\n"
            f"task    {config.task.name}: {len(ready.train)} training and {len(ready.test)} test questions"
        )
        planned = output.before_run(ready, console, folder)
        if config.cluster.mode == "local":
            parts = stack.enter_context(colocated.parts(ready))
        else:
            parts = stack.enter_context(separate.parts(ready, folder, lambda text: _tell(console, text)))
        console.print(parts.summary, soft_wrap=True)
        failure: LearnerLost | None = None
        while True:
            try:
                if failure is not None:
                    assert parts.recover is not None
                    parts.recover(failure)
                    atomic_files.remove_leftovers(folder)  # of a checkpoint that it was writing
                begin = not resume and failure is None
                return _train(config, folder, console, ready, scorer, parts, own, stopping, planned, begin=begin)
            except LearnerLost as error:
                if parts.recover is None:
                    raise
                failure = error


def _tell(console: Console, text: str) -> None:
    log.info("%s", text)  # a warning would come to the terminal twice
    console.print(text, style="yellow", markup=False, soft_wrap=True)


def _train(
    config: Config, folder: Path, console: Console, ready: Prepared, scorer: Scorer, parts: Components,
    own: Sequence[Tracker], stopping: Callable[[], bool], planned: output.Plan | None, *, begin: bool,
) -> Outcome:  # fmt: skip
    """From the last checkpoint, or with ``begin`` from the start, to the end of the run or its stop. ``own``: the
    user's trackers, which outlive a lost learner and are closed by the caller."""
    learner, sampler, placement = parts.learner, parts.sampler, parts.placement
    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_last, kept(config))
    stream = ready.stream()
    state = None
    if not begin:
        with time_limit("learner", "reading its checkpoint", config.timeouts.load_s, "timeouts.load_s"):
            state = checkpoints.restore_latest(learner)
        if state is None:
            _tell(console, "there is no checkpoint yet: the run starts again from the beginning")
        metrics.rewind(folder, learner.version)

    probe = make_probe(ready.train, config.sync.probe_tokens, ready.longest_prompt)
    sync = WeightSync(learner, sampler, placement, probe, config.sync, parts.sync_s, config.model.dtype)
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = [metrics.JsonlTracker(folder, config.run, config.train.steps)]
        if config.run.tensorboard:
            trackers.append(TensorBoardTracker(folder, learner.version))
        shown = ConsoleTracker(config.run.console, config.train.steps, learner.version, console)
        done = atomic_files.read_json_lines(folder / "metrics.jsonl")
        watched = HealthTracker(done, lambda text: _tell(console, text))
        trackers += [shown, watched]
        stack.callback(Trackers(trackers).close)
        tracker = Trackers([*trackers, *own])
        loop = Loop(
            config, learner, sampler, placement, scorer, stream, sync, tracker, checkpoints,
            memory_gib=parts.memory_gib, restarts=parts.restarts, answer_s=parts.answer_s,
        )  # fmt: skip
        if state is not None:
            loop.restore(state)

        tracker.phase("sampler: following perturbed weights (the proof's challenge)")
        sync.challenge()
        sync()
        if begin and config.memory.rehearsal:  # a resumed run has been through it
            _rehearse(loop, ready, planned, console, folder)

        def measure(step: int) -> None:
            done = {row["step"] for row in atomic_files.read_json_lines(folder / "eval.jsonl")}
            if ready.test and step not in done:
                tracker.phase(f"evaluation: {len(ready.test)} test questions at step {step}")
                with placement.sampling():
                    tracker.evaluation(
                        step, components.ask_test_questions(ready, sampler, scorer, parts.answer_s).as_dict()
                    )

        if learner.version == 0:
            measure(0)
        finished = train(loop, measure, stopping)
        if finished:
            measure(config.train.steps)
            tracker.phase("disk: writing the final model")
            limit_s = config.timeouts.load_s
            with placement.learning(), time_limit("learner", "writing the final model", limit_s, "timeouts.load_s"):
                _export(learner, folder, config)
        unlearned = watched.finish() if finished else ""
    if config.run.report:
        report.write(folder)
    evaluations = report.by_step(atomic_files.read_json_lines(folder / "eval.jsonl"))
    asked = {row["step"]: row for row in evaluations}
    return Outcome(folder, finished, learner.version, asked.get(0), asked.get(config.train.steps), unlearned)


def _rehearse(loop: Loop, ready: Prepared, planned: output.Plan | None, console: Console, folder: Path) -> None:
    try:
        took = rehearse(loop, ready.longest)
    except OutOfMemory as failure:
        raise RunFailure(f"{failure}. {output.cures(ready, planned)}") from failure
    said = ", ".join(f"{side} {took[side]:.1f} s" for side in ("sample", "learn", "sync", "save"))
    compared = f" (planned {planned.peak / output.GIB:.2f})" if planned is not None else ""
    line = f"rehearsed the longest batch: {said}; peak {took['peak_gib']:.2f} GiB{compared}"
    log.info("%s", line)
    console.print(line, soft_wrap=True, markup=False)
    model = disk.model_bytes(ready.config, planned.learner) if planned is not None else 0
    output.check_disk(ready.config, folder, int(took["checkpoint_bytes"]), model)


@contextlib.contextmanager
def _own_tracker(name: str, folder: Path) -> Iterator[Tracker]:
    """Made before the models, because a login or a server may be missing."""
    try:
        tracker = OwnTracker(name, lambda: plugins.make("tracker", name, {}, folder))
    except (UserError, RunFailure):
        raise
    except (Exception, SystemExit) as error:
        log.info("a tracker did not start", exc_info=True)  # the traceback is for the log alone
        raise UserError(f"run.trackers: {name!r} raised {type(error).__name__}: {error}; fix it") from error
    with contextlib.closing(tracker):
        yield tracker


def _export(learner: Learner, folder: Path, config: Config) -> None:
    with atomic_files.atomic_folder(folder / "final") as final:
        learner.export(final)
        if config.model.lora_rank and config.run.export_merged:
            (final / "merged").mkdir()
            learner.export(final / "merged", merged=True)


# -- the run folder, its log and its signals ---------------------------------------------------------------------------


def folder_of(config: Config) -> Path:
    """``run.folder`` with its {task}, {model} and {date} filled in."""
    words = {
        "task": _last_part(config.task.name.split(":")[0], ".py"),
        "model": _last_part(config.model.name, ".gguf"),
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
    }
    try:
        return Path(config.run.folder.format(**words)).expanduser()
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"run.folder={config.run.folder!r} cannot be filled in ({error}); it knows {{task}}, {{model}} and {{date}}"
        ) from None


def _last_part(name: str, ending: str) -> str:
    """Of a path or a hub id, with the dots of a name like Llama-3.2-1B."""
    return os.path.basename(os.path.abspath(os.path.expanduser(name))).removesuffix(ending)


def shared_folder(folder: Path) -> Path:
    """The folder's full path, which services on other nodes need. Raises ``UserError`` where it would lie in the
    temporary copy of a submitted job's working directory, which goes away with the job."""
    if not folder.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
        raise UserError(
            f"run.folder={str(folder)!r} is relative, and a submitted job works in a temporary copy of its folder; "
            "give a full path on storage that every node sees"
        )
    return folder.absolute()


def begun(folder: Path) -> bool:
    """Whether the folder holds a run with a step to go on from or to look at. One that was refused or ended before,
    by its plan or its rehearsal say, leaves the folder to the next with the settings that it was advised."""
    if not (folder / _CONFIG).exists():
        return False
    kept_files = (folder / "final").exists() or any((folder / "checkpoints").glob("step-*"))
    return kept_files or not (folder / _LOG).exists() or bool(atomic_files.read_json_lines(folder / "metrics.jsonl"))


def check_folder(folder: Path, resume: bool) -> None:
    """Raises ``UserError`` for a folder that another run, or somebody's files, are in."""
    if resume:
        return
    if begun(folder):
        raise UserError(
            f"run.folder={str(folder)!r} is in use by an earlier run; go on with it by --resume {folder}, or choose "
            "another"
        )
    # A start that failed leaves its lock and log; anything else without a configuration is somebody's.
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if _CONFIG not in there and there - {atomic_files.LOCK_NAME, _LOG}:
        raise UserError(f"run.folder={str(folder)!r} is not empty and holds no run; choose another")


@contextlib.contextmanager
def _run_folder(folder: Path, resume: bool) -> Iterator[None]:
    check_folder(folder, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.folder={str(folder)!r} cannot be made ({error.strerror}); choose another") from None
    with atomic_files.lock_folder(folder):
        check_folder(folder, resume)  # again: until now another run may have gone on in it
        yield


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Our own log lines go to the run's log; warnings also to the terminal, through the handlers set up before."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("nanogrpo")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
