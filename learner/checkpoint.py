"""Checkpoints: a folder a step, whole or not there, with checksums, the last few kept. Safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError
from common.protocols import Learner

log = logging.getLogger("nanogrpo.checkpoint")


class Checkpoints:
    """``FOLDER/step-000020/``: what ``Learner.save`` wrote, ``state.json`` of the loop, the texts of ``kept`` by their
    file names (what the run is known by again), and ``manifest.json``."""

    def __init__(self, folder: Path, keep_last: int, kept: Mapping[str, str] | None = None) -> None:
        self._folder, self._keep_last, self._kept = folder, keep_last, kept or {}

    def save(self, step: int, learner: Learner, state: Mapping[str, Any]) -> Path:
        """Writes one and removes the oldest. Raises ``RunFailure`` on a full disk; the earlier ones stay."""
        path = self._folder / _name(step)
        with files.atomic_folder(path) as folder:
            learner.save(folder)
            files.write_json(folder / "state.json", {"step": step, **state})
            for name, text in self._kept.items():
                files.write_text(folder / name, text)
            files.write_json(
                folder / "manifest.json", {file.name: _checksum(file) for file in sorted(folder.iterdir())}
            )
        for later in self._all():
            if later.name > path.name:  # damaged ones that a resume has passed over
                shutil.rmtree(later)
        for old in self._all()[: -self._keep_last]:
            shutil.rmtree(old)
        return path

    def restore_latest(self, learner: Learner) -> dict[str, Any] | None:
        """Puts the learner where the newest whole checkpoint has it and returns that checkpoint's state, or None when
        the run was ended before its first one.

        A damaged one is passed over with a warning. Raises ``UserError`` when none but damaged ones are left.
        """
        for path in reversed(self._all()):
            damage = _damage(path)
            if damage:
                log.warning("checkpoint %s is damaged (%s); the one before it is used", path, damage)
                continue
            learner.restore(path)
            return dict(json.loads((path / "state.json").read_text()))
        if self._all():
            raise UserError(
                f"every checkpoint in {str(self._folder)!r} is damaged; start the run anew in another folder"
            )
        return None

    def steps(self) -> list[int]:
        """Of the checkpoints there, damaged ones included, in order."""
        return [int(path.name.removeprefix("step-")) for path in self._all()]

    def text(self, name: str) -> str | None:
        """This file of the newest checkpoint that holds it undamaged, whatever its other files are like."""
        for path in reversed(self._all()):
            if name in _manifest(path) and not _damage(path, name):
                return (path / name).read_text(encoding="utf-8")
        return None

    def _all(self) -> list[Path]:
        named = (path for path in self._folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
        return sorted(path for path in named if path.is_dir())


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _manifest(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads((path / "manifest.json").read_text()))
    except (OSError, ValueError):
        return {}


def _damage(path: Path, only: str = "") -> str:
    """What is wrong with this checkpoint, or with one file of it, or nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, checksum in manifest.items():
            if only in ("", name) and _checksum(path / name) != checksum:
                return f"{name} has another checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return "" if "state.json" in manifest else "state.json is not in its manifest"


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
