"""Where the numbers go besides the run folder's own files: TensorBoard, wandb, Trackio, MLflow, a user's own.

Each library is configured by its own environment variables (``WANDB_PROJECT``, ``WANDB_MODE``,
``TRACKIO_DIR``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ...), and is imported only when it is used. A
resumed run goes on with the run that it began there, whose id is kept in the run folder.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from common import atomic_files
from common.config import read_toml
from common.errors import UserError, brief
from common.protocols import Tracker
from common.tracking.metrics import flat
from common.types import Group
from common.watchdog import result

_log = logging.getLogger("nanogrpo.tracking")


@runtime_checkable
class ShowsPhase(Protocol):
    """A tracker that also shows what the run waits for."""

    def phase(self, text: str) -> None: ...


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


class OwnTracker:
    """A user's tracker, on a thread of its own, where it is made, too. What it raises, or a call longer than
    ``limit_s`` seconds (a server that does not answer), is reported once, and the run goes on without it."""

    def __init__(self, name: str, make: Callable[[], Tracker], limit_s: float = 60.0) -> None:
        """Raises what ``make`` raises, and ``RunFailure`` when it takes too long."""
        self._name, self._limit_s = name, limit_s
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._state = "well"  # or raised, hangs, closed
        threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True).start()  # ends with the process
        self._tracker: Tracker = result(self._call(make), f"tracker {name!r}", "starting", limit_s, "")

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
        done = self._call(lambda: getattr(self._tracker, method)(*arguments))
        try:
            done.result(timeout=self._limit_s)
        except (Exception, SystemExit) as error:
            if done.done():
                self._state, why = "raised", f"raised {type(error).__name__}: {brief(error)}"
            else:
                self._state, why = "hangs", f"did not return within {self._limit_s:g} s"
            _log.warning("run.trackers: %r is left out from here on, because its %s %s", self._name, method, why)
            _log.info("what it raised", exc_info=error)  # the traceback is for the log alone

    def _call(self, call: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        self._calls.put((call, done))
        return done

    def _serve(self) -> None:
        while True:
            call, done = self._calls.get()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)


class _Numbers:
    """What the libraries have in common: a step's metrics under their own names, evaluations under ``eval/``."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send(step, {key: float(value) for key, value in metrics.items() if key not in ("step", "time")})

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Left out: ``rollouts/`` has them."""

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        self._send(step, {f"eval/{key}": float(value) for key, value in flat(result)})

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError


class TensorBoardTracker(_Numbers):
    """TensorBoard events in ``FOLDER/tensorboard``, on the disk after each step."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        """``resume_step``: the last step kept of an earlier part of the run; TensorBoard then hides the later ones."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        with atomic_files.disk_errors(self._folder):
            self._writer: Any = SummaryWriter(str(self._folder), purge_step=resume_step + 1 if resume_step else None)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        with atomic_files.disk_errors(self._folder):
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()  # its thread would write minutes later, and hide a full disk until then

    def close(self) -> None:
        with atomic_files.disk_errors(self._folder):
            self._writer.close()


class _ByName(_Numbers):
    """A library of ``run.trackers``; the pip extra has its name."""

    package: ClassVar[str]

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ``UserError`` where the library is not installed. There are no options."""
        spec = importlib.util.find_spec(cls.package)
        if spec is None or spec.origin is None:  # a folder of that name, as wandb leaves one, is no package
            raise UserError(
                f"run.trackers={cls.package!r} needs the Python package {cls.package!r}, which is not installed; "
                f"`pip install 'nanogrpo[{cls.package}]'`"
            )


class Wandb(_ByName):
    """Weights & Biases (wandb): project ``nanogrpo`` unless WANDB_PROJECT names another."""

    package = "wandb"

    def __init__(self, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanogrpo"),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=_run_id(folder, self.package),
            resume="allow",
            dir=folder,
            config=_settings(folder),
            settings=wandb.Settings(console="off"),  # it would copy, and so tear, the live display
        )
        # Its own steps only rise, and a resumed run sends some again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio(_ByName):
    """Trackio (trackio): project ``nanogrpo``; TRACKIO_DIR says where it lies."""

    package = "trackio"

    def __init__(self, folder: Path) -> None:
        import trackio

        name = f"{folder.name}-{_run_id(folder, self.package)[:6]}"
        self._run = trackio.init(
            project="nanogrpo", name=name, config=_settings(folder), resume="allow", embed=False
        )  # fmt: skip

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow(_ByName):
    """MLflow (mlflow): experiment ``nanogrpo`` unless MLFLOW_EXPERIMENT_NAME names another."""

    package = "mlflow"

    def __init__(self, folder: Path) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "nanogrpo")
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            run_id: str = self._client.create_run(experiment, run_name=folder.name).info.run_id
            for section, values in _settings(folder).items():
                parameters = [mlflow.entities.Param(f"{section}.{key}", str(value)) for key, value in values.items()]
                self._client.log_batch(run_id, params=parameters)
            return run_id

        self._id = _run_id(folder, self.package, begin)
        self._client.update_run(self._id, status="RUNNING")

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # It refuses a whole batch for one character of a name.
        allowed = {re.sub(r"[^\w\-. :/]", "_", key): value for key, value in values.items()}
        self._client.log_batch(self._id, [Metric(key, value, now, step) for key, value in allowed.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _settings(folder: Path) -> dict[str, Any]:
    """The run's configuration by section."""
    return read_toml(folder / "config.toml") if (folder / "config.toml").is_file() else {}


def _run_id(folder: Path, package: str, begin: Callable[[], str] = lambda: uuid.uuid4().hex) -> str:
    """The library's id of this run, from the run folder if it was started there before."""
    file = folder / f"{package}.id"
    if not (lines := atomic_files.read_lines(file)):
        lines = [begin()]
        atomic_files.write_text(file, lines[0] + "\n")
    return lines[0]
