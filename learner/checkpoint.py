"""Checkpoints: a folder a step, written atomically, with checksums, the last few kept. Safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import atomic_files
from common.config import Config
from common.device import dtype_of
from common.errors import UserError
from common.protocols import Learner
from learner.distributed import RankGroup, read_state, shapes_in
from learner.model import adapters, loading, saving

log = logging.getLogger("nanogrpo.checkpoint")


class Checkpoints:
    """``FOLDER/step-000020/``: what ``Learner.save`` wrote, ``state.json`` of the loop, the texts of ``kept`` by their
    file names (what the run is known by again), and ``manifest.json``."""

    def __init__(self, folder: Path, keep_last: int, kept: Mapping[str, str] | None = None) -> None:
        self._folder, self._keep_last, self._kept = folder, keep_last, kept or {}

    def save(self, step: int, learner: Learner, state: Mapping[str, Any]) -> Path:
        """Writes one and removes the oldest. Raises ``RunFailure`` on a full disk; the earlier ones stay."""
        path = self._folder / _name(step)
        with atomic_files.atomic_folder(path) as folder:
            learner.save(folder)
            atomic_files.write_json(folder / "state.json", {"step": step, **state})
            for name, text in self._kept.items():
                atomic_files.write_text(folder / name, text)
            atomic_files.write_json(
                folder / "manifest.json", {file.name: _checksum(file) for file in sorted(folder.iterdir())}
            )
        for later in self._all():
            if later.name > path.name:  # damaged ones that a resume has passed over
                shutil.rmtree(later)
        for old in self._all()[: -self._keep_last]:
            shutil.rmtree(old)
        return path

    def rehearse(self, learner: Learner) -> int:
        """Writes what ``Learner.save`` writes where checkpoints go, and removes it again; returns its bytes. Raises
        ``RunFailure`` on a full disk."""
        with atomic_files.scratch_folder(self._folder / "rehearsal") as folder:
            learner.save(folder)
            return sum(file.stat().st_size for file in folder.iterdir())

    def restore_latest(self, learner: Learner) -> dict[str, Any] | None:
        """Puts the learner where the newest whole checkpoint has it and returns that checkpoint's state, or None when
        the run was ended before its first one.

        A damaged one is passed over with a warning. Raises ``UserError`` when none but damaged ones are left.
        """
        if not self._all():
            return None
        path = self._newest_whole()
        if path is None:
            raise UserError(
                f"every checkpoint in {str(self._folder)!r} is damaged; start the run again in another folder"
            )
        learner.restore(path)
        return dict(json.loads((path / "state.json").read_text()))

    def steps(self) -> list[int]:
        """Of the checkpoints there, damaged ones included, in order."""
        return [int(path.name.removeprefix("step-")) for path in self._all()]

    def text(self, name: str) -> str | None:
        """This file of the newest checkpoint that holds it undamaged, whatever its other files are like."""
        for path in reversed(self._all()):
            if not _damage(path, name):
                return (path / name).read_text(encoding="utf-8")
        return None

    def whole(self, step: int | None = None) -> Path:
        """The folder of the newest whole checkpoint, or of this step's. Raises ``UserError`` where there is none."""
        there = f"there are: {', '.join(map(str, self.steps())) or 'none'}"
        if step is None:
            if path := self._newest_whole():
                return path
            if self._all():
                raise UserError(f"{str(self._folder)!r}: every checkpoint is damaged; {there}")
            raise UserError(f"{str(self._folder)!r} holds no checkpoint yet; one is written every run.save_every steps")
        if step not in self.steps():
            raise UserError(f"--step {step}: {str(self._folder)!r} has no checkpoint of that step; {there}")
        path = self._folder / _name(step)
        if damage := _damage(path):
            raise UserError(f"{str(self._folder)!r}: the checkpoint is damaged ({damage}); {there}")
        return path

    def _newest_whole(self) -> Path | None:
        for path in reversed(self._all()):
            if not (damage := _damage(path)):
                return path
            log.warning("checkpoint %s is damaged (%s); the one before it is used", path, damage)
        return None

    def _all(self) -> list[Path]:
        named = (path for path in self._folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
        return sorted(path for path in named if path.is_dir())


def export(checkpoint: Path, config: Config, base: Path, out: Path, merged: bool = False) -> None:
    """Writes the checkpoint's model into ``out`` as ``Learner.export`` would have, in host memory and without its
    optimizer. ``base`` is the folder of the model that was trained, whose weights are read only to merge an adapter.

    Raises ``UserError`` when the checkpoint is of another model.
    """
    adapter = config.model.lora_rank > 0
    # A base in 4 bits on shapes alone cannot be asked for its state, and only a merge needs its numbers.
    model = loading.load(base, config.model.model_copy(update={"quantize": "off"}), "meta", blank=True)
    if merged or (not adapter and any(not isinstance(tensor, nn.Parameter) for _, tensor in saving.held(model))):
        model = loading.load(base, config.model, "cpu")
    model.requires_grad_(not adapter)
    if adapter:
        model = adapters.add_adapter(model, config.model, base, config.train.seed)
    shapes = shapes_in(checkpoint)
    for name, parameter in [(name, p) for name, p in model.named_parameters() if p.requires_grad]:
        key = next((key for key in (f"{name}/master", f"{name}/weight") if shapes.get(key) == parameter.shape), "")
        if not key:
            raise UserError(f"checkpoint {str(checkpoint)!r} belongs to another model or adapter: it has no {name}")
        value = torch.empty(parameter.shape, dtype=torch.float32 if key.endswith("/master") else parameter.dtype)
        read_state({key: value}, checkpoint)
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value.to(parameter.dtype), requires_grad=False)
    loading.causal_of(model).tie_weights()
    saving.export(model, base, out, merged, dtype_of(config.model.dtype), RankGroup())


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _damage(path: Path, only: str = "") -> str:
    """What is wrong with this checkpoint, or with one file of it, or nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in [only] if only else manifest:
            if _checksum(path / name) != manifest.get(name):
                return f"{name} has another checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return "" if "state.json" in manifest else "state.json is not in its manifest"


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
