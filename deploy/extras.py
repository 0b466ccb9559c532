"""The packages that only some runs need, each an extra of pyproject.toml named after what it is for. Whether a run has
what it needs is known before anything loads."""

from __future__ import annotations

import importlib.util

from common.config import Config
from common.errors import UserError


def check(config: Config, *, training: bool) -> None:
    """Raises ``UserError`` for a setting whose package is not installed; without ``training`` of those that a model
    needs that is only asked."""
    model, run = config.model, config.run
    for wanted, package, extra, setting, cure in (
        (model.quantize == "nf4", "bitsandbytes", "nf4", "model.quantize='nf4'", "set it to off"),
        (model.name.endswith(".gguf"), "gguf", "gguf", f"model.name={model.name!r}", "name another model"),
        (
            training and ("bit" in config.optimizer.name or config.optimizer.master == "stochastic"),
            "torchao", "low-bit", f"optimizer.name={config.optimizer.name!r} with master={config.optimizer.master!r}",
            "use adamw with master=float32",
        ),
        (config.task.name == "reasoning_gym", "reasoning_gym", "reasoning-gym", "task.name='reasoning_gym'",
         "use another task"),
        (training and run.tensorboard, "tensorboard", "tensorboard", "run.tensorboard=true", "set it to false"),
        (training and run.report, "matplotlib", "report", "run.report=true", "set it to false"),
    ):  # fmt: skip
        if wanted:
            need(package, extra, setting, cure)


def need(package: str, extra: str, setting: str, cure: str) -> None:
    """Raises ``UserError`` where the package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{setting} needs the package {package}, which is not installed: `pip install 'nanogrpo[{extra}]'`, or "
            f"{cure}"
        )
