"""Hand-overs of weights from learner to sampler, and the fingerprint that proves what arrived.

The same-process hand-over lends the learner's tensors, never copies them; a folder's are read as they are asked for.
The proof that compares both ends is in learner/sync.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from common.errors import UserError

_BLOCK = 4096  # numbers summed together; the position of a block counts, so moved data is seen


@dataclass(frozen=True)
class InProcessWeights:
    """A ``WeightHandle`` for a sampler in the learner's own process."""

    kind: Literal["full", "adapter"]
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    adapter_config: Mapping[str, Any] | None = None

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.tensors()


class Fingerprint:
    """Gathers the names, shapes, dtypes and bytes of tensors as they pass by; the order does not matter.

    One pass over each tensor on its own device: the bit patterns summed as integers block by block, then the blocks
    summed weighted by their position. Enough against lost, stale, truncated, swapped or moved data; not a
    cryptographic hash.
    """

    def __init__(self) -> None:
        self._sums: dict[str, str] = {}
        self.bytes = 0

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the tensors through, taking note of each."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._sums[name] = f"{tensor.dtype} {tuple(tensor.shape)} {_bit_sum(tensor)}"
        self.bytes += tensor.numel() * tensor.element_size()

    def digest(self) -> str:
        """A short text, equal for equal tensors."""
        return hashlib.sha256("\n".join(f"{n} {s}" for n, s in sorted(self._sums.items())).encode()).hexdigest()[:32]


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The digest of these tensors; see ``Fingerprint``."""
    seen = Fingerprint()
    for name, tensor in tensors:
        seen.add(name, tensor)
    return seen.digest()


def _bit_sum(tensor: torch.Tensor) -> int:
    """Position-weighted sum of the tensor's bit patterns, modulo 2**64 (int64 arithmetic wraps)."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    width = 4 if raw.numel() % 4 == 0 else 1
    words = raw.view(torch.int32) if width == 4 else raw
    whole = words.numel() // _BLOCK * _BLOCK
    total = words[whole:].sum(dtype=torch.int64) * 7919
    if whole:
        blocks = words[:whole].view(-1, _BLOCK).sum(dim=1, dtype=torch.int64)
        total = total + (blocks * torch.arange(1, len(blocks) + 1, device=blocks.device)).sum()
    return int(total)


@dataclass(frozen=True)
class FolderWeights:
    """A ``WeightHandle`` on a Hugging Face folder: its safetensors files, or peft's adapter files."""

    folder: str

    @property
    def kind(self) -> Literal["full", "adapter"]:
        return "adapter" if (Path(self.folder) / "adapter_config.json").exists() else "full"

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        if self.kind == "full":
            return None
        return dict(json.loads((Path(self.folder) / "adapter_config.json").read_text()))

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        files = sorted(Path(self.folder).glob("*.safetensors"))
        if not files:
            raise UserError(f"model folder {self.folder!r} holds no .safetensors file; convert it with save_pretrained")
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    yield name, opened.get_tensor(name)
