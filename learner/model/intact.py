"""Checks of a model's files before they are loaded: Git LFS pointers in place of files, and numbers that are not
finite.

That all weights are there, complete and in the right shapes, is checked by ``learner.model.loading``, which can read
the headers alone. Used by ``loading.py`` and ``resolve.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.weights.handles import weight_files

_POINTER = b"version https://git-lfs.github.com/"
_BESIDE = (".json", ".jinja", ".model", ".txt")
_SAMPLE = 4096  # numbers at either end of a tensor


def refuse_pointers(folder: Path, label: str) -> None:
    """Raises ``UserError`` for a file that Git LFS was to put in place and did not."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _BESIDE and file.is_file():
            _refuse_pointer(file, label)
    for file in weight_files(folder):  # only now: the index, which names them, is a file too
        _refuse_pointer(file, label)


def _refuse_pointer(file: Path, label: str) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{label}: {file.name} is a Git LFS pointer and not the file itself; run `git lfs pull` there, or "
                "download the model again"
            )


def refuse_not_finite_samples(folder: Path, label: str) -> None:
    """Raises ``UserError`` for a tensor that is not finite at its beginning or its end, where most of one that is
    damaged would show it; the whole of it is looked at once it is loaded."""
    for file in weight_files(folder):
        try:
            for name, numbers in _samples(file):
                refuse_not_finite(name, numbers, label)
        except SafetensorError as error:
            raise UserError(f"{label}: {file.name} cannot be read ({error}); download or convert it again") from None


def refuse_not_finite(name: str, tensor: torch.Tensor, label: str) -> None:
    """Raises ``UserError`` for a tensor with a number that is not finite. No second tensor is made for it."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return
    least, most = tensor.detach().aminmax()
    if not (math.isfinite(float(least)) and math.isfinite(float(most))):
        raise UserError(f"{label}: {name} holds numbers that are not finite; download or convert the model again")


def _samples(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():
            rows = opened.get_slice(name)
            shape = rows.get_shape()
            if not shape:
                yield name, opened.get_tensor(name).float()
                continue
            count = min(shape[0], max(1, _SAMPLE // max(1, math.prod(shape[1:]))))
            for part in (rows[:count], rows[shape[0] - count : shape[0]]):
                yield name, part.float()
