"""The disk space of a run: estimated before it starts, and checked again after a trial checkpoint.

Left out: rollouts, logs and TensorBoard's events, megabytes beside it; and a model's download or conversion, which is
done before. Used by ``deploy/memory_plan/output.py`` and ``deploy/run.py``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common.config import Config
from common.device import dtype_of
from learner.memory_estimate import LearnerMemory

GIB = 2**30


def needed(config: Config, checkpoint: int, model: int) -> int:
    """Bytes at the run's fullest: a checkpoint is whole before the oldest goes, and the final model comes last."""
    train, run = config.train, config.run
    written = -(-train.steps // run.save_every) if run.save_every else 1
    return max(min(run.keep_last + 1, written) * checkpoint, min(run.keep_last, written) * checkpoint + model)


def model_bytes(config: Config, learner: LearnerMemory) -> int:
    """Of ``final/``."""
    merged = learner.parameters_total - learner.parameters_trained if config.run.export_merged else 0
    return learner.trained_bytes + merged * dtype_of(config.model.dtype).itemsize


def lacking(config: Config, folder: Path, checkpoint: int, model: int) -> str:
    """What the disk of the run folder lacks, in a sentence; empty where it has room. What an earlier part of the run
    has written there counts as free, because it is replaced."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    old = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    need = needed(config, checkpoint, model)
    if need <= free + old:
        return ""
    fewer = "run.keep_last=1, or " if config.run.keep_last > 1 else ""
    return (
        f"the run's checkpoints ({checkpoint / GIB:.2f} GiB each) and final model take {need / GIB:.2f} GiB, and the "
        f"disk of {str(folder)!r} has {(free + old) / GIB:.2f} GiB free; free some, or set {fewer}run.folder on "
        "another disk"
    )
