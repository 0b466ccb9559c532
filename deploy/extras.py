"""The packages that only some runs need, each an extra of pyproject.toml named after what it is for. Whether a run has
what it needs is known before anything loads."""

from __future__ import annotations

import importlib.util

from common.config import Config
from common.errors import UserError


def check(config: Config, *, training: bool) -> None:
    """Raises ``UserError`` for a setting whose package is not installed; without ``training`` only for those that
    inference needs."""
    model, optimizer, run, task = config.model, config.optimizer, config.run, config.task
    low_bit = "bit" in optimizer.name or optimizer.master == "stochastic"
    stepping = f"optimizer.name={optimizer.name!r} with master={optimizer.master!r}"
    for wanted, package, extra, setting, cure in (
        (model.quantize == "nf4", "bitsandbytes", "nf4", "model.quantize='nf4'", "set it to off"),
        (model.name.endswith(".gguf"), "gguf", "gguf", f"model.name={model.name!r}", "name another model"),
        (training and low_bit, "torchao", "low-bit", stepping, "use adamw with master=float32"),
        (task.name == "reasoning_gym", "reasoning_gym", "reasoning-gym", f"task.name={task.name!r}", "use another"),
        (training and run.tensorboard, "tensorboard", "tensorboard", "run.tensorboard=true", "set it to false"),
        (training and run.report, "matplotlib", "report", "run.report=true", "set it to false"),
    ):
        if wanted:
            need(package, extra, setting, cure)


def need(package: str, extra: str, setting: str, cure: str) -> None:
    """Raises ``UserError`` where the package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{setting} needs the package {package}, which is not installed: `pip install 'nanogrpo[{extra}]'`, or "
            f"{cure}"
        )
