"""Trackers by name: Weights & Biases, Trackio and MLflow, each thin over the library's own client.

Where the numbers go is said to the library in its own way, by environment variables (``WANDB_PROJECT``, ``WANDB_MODE``,
``TRACKIO_DIR``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ...). A resumed run goes on with the run that it
began there, whose id is kept in the run folder.

Left out: completions, which ``rollouts/`` in the run folder has. Used by ``run.trackers``; none of the three is
imported before it is wanted.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from common import atomic_files
from common.config import read_toml
from common.errors import UserError
from common.tracking.metrics import flat
from common.types import Group


class _Numbers:
    """What the three have in common: a step's metrics under their own names, evaluations under ``eval/``."""

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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send(step, {key: float(value) for key, value in metrics.items() if key not in ("step", "time")})

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Left out: ``rollouts/`` has them."""

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        self._send(step, {f"eval/{key}": float(value) for key, value in flat(result)})

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError


class Wandb(_Numbers):
    """Weights & Biases (wandb): project ``nanogrpo`` unless WANDB_PROJECT names another."""

    package = "wandb"

    def __init__(self, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanogrpo"),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=_kept_id(folder, "wandb") or _keep_id(folder, "wandb", uuid.uuid4().hex),
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


class Trackio(_Numbers):
    """Trackio (trackio): project ``nanogrpo``; TRACKIO_DIR says where it lies."""

    package = "trackio"

    def __init__(self, folder: Path) -> None:
        import trackio

        mine = _kept_id(folder, "trackio") or _keep_id(folder, "trackio", uuid.uuid4().hex)
        self._run = trackio.init(
            project="nanogrpo", name=f"{folder.name}-{mine[:6]}", config=_settings(folder), resume="allow", embed=False
        )

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow(_Numbers):
    """MLflow (mlflow): experiment ``nanogrpo`` unless MLFLOW_EXPERIMENT_NAME names another."""

    package = "mlflow"

    def __init__(self, folder: Path) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        self._id = _kept_id(folder, "mlflow")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "nanogrpo")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = _keep_id(folder, "mlflow", self._client.create_run(number, run_name=folder.name).info.run_id)
        for section, values in _settings(folder).items():
            parameters = [mlflow.entities.Param(f"{section}.{key}", str(value)) for key, value in values.items()]
            self._client.log_batch(self._id, params=parameters)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(_allowed(key), value, now, step) for key, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _allowed(key: str) -> str:
    """MLflow refuses a whole batch for one character."""
    return re.sub(r"[^\w\-. :/]", "_", key)


def _settings(folder: Path) -> dict[str, Any]:
    """The run's configuration by section."""
    return read_toml(folder / "config.toml") if (folder / "config.toml").is_file() else {}


def _kept_id(folder: Path, package: str) -> str:
    return next(iter(atomic_files.read_lines(folder / f"{package}.id")), "")


def _keep_id(folder: Path, package: str, identity: str) -> str:
    atomic_files.write_text(folder / f"{package}.id", identity + "\n")
    return identity
