"""Transfers of weights from learner to sampler, and the fingerprint that proves what arrived.

Within a process the learner's tensors are shared, never copied; a folder's are read on demand; between
processes of one host they lie in shared memory, and an adapter travels inside its handle. All but the first can be
pickled. The broadcast between hosts is in common/weights/broadcast.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open

from common.errors import RunFailure, UserError
from common.protocols import Transport

Kind = Literal["full", "adapter"]
Tensors = Iterable[tuple[str, torch.Tensor]]

# 8-byte words, each weighted by a number of its own; blocks of them by odd numbers, because an even one times a sum
# would lose the sum's highest bits.
_BLOCK = 512
_AT_ONCE = 1 << 23  # words multiplied together where the device has no product of integer matrices (64 MiB)
# The names of torch's number formats in a safetensors file.
_FORMATS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class Sum(NamedTuple):
    """What a fingerprint holds of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bits: int


class Fingerprint:
    """Gathers the names, shapes, dtypes and bytes of tensors as they pass by; the order does not matter. An adapter's
    configuration is part of it: the same tensors under another ``lora_alpha`` are other weights.

    One pass over each tensor on its own device (``bit_sum``). Enough against lost, stale, truncated, swapped or moved
    data; not a cryptographic hash.
    """

    def __init__(self, adapter_config: Mapping[str, Any] | None = None) -> None:
        self.sums: dict[str, Sum] = {}
        self.bytes = 0
        self.adapter_config = None if adapter_config is None else dict(adapter_config)

    def watch(self, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the tensors through, taking note of each."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.sums[name] = Sum(tensor.dtype, tuple(tensor.shape), bit_sum(tensor))
        self.bytes += tensor.numel() * tensor.element_size()

    def digest(self) -> str:
        """A short text, equal for equal tensors and an equal configuration."""
        lines = [f"{name} {part.dtype} {part.shape} {part.bits}" for name, part in sorted(self.sums.items())]
        if self.adapter_config is not None:
            lines.append(json.dumps(self.adapter_config, sort_keys=True, default=_plain))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def fingerprint(tensors: Tensors, adapter_config: Mapping[str, Any] | None = None) -> str:
    """The digest of these tensors, and of an adapter's configuration; see ``Fingerprint``."""
    return digest_and_bytes(tensors, adapter_config)[0]


def digest_and_bytes(tensors: Tensors, adapter_config: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """What ``WeightHandle.sent`` says of these tensors: one pass over them."""
    seen = Fingerprint(adapter_config)
    for name, tensor in tensors:
        seen.add(name, tensor)
    return seen.digest(), seen.bytes


def _plain(value: Any) -> Any:
    """A value of peft's configuration that JSON lacks, as ``adapter_config.json`` has it."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, uint8 [its bytes]; the tensor's own memory where that is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's 8-byte words, each weighted by its position, modulo 2**64 (int64 arithmetic wraps).

    The weights of a block differ in their last 16 bits: two numbers of 16 bits that change in opposite directions, as
    a small step of training changes a norm's, cancel in no block.
    """
    raw = raw_bytes(tensor)
    if raw.storage_offset() % 8:  # a slice may begin between two words
        raw = raw.clone()
    words = raw[: raw.numel() // 8 * 8].view(torch.int64)  # narrower ones would be widened, at thrice the time
    weights = _weights(raw.device)
    blocks = words[: words.numel() // _BLOCK * _BLOCK].view(-1, _BLOCK)
    if raw.device.type == "cpu":
        sums = torch.mv(blocks, weights)
    else:
        starts = range(0, len(blocks), _AT_ONCE // _BLOCK)
        parts = [blocks[start : start + _AT_ONCE // _BLOCK] for start in starts]
        sums = torch.cat([(part * weights).sum(dim=1) for part in parts] or [weights[:0]])
    total = (sums * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum()
    if rest := words[len(blocks) * _BLOCK :].numel():
        total = total + (words[-rest:] * weights[:rest]).sum() * (2 * len(blocks) + 1)
    if rest := raw.numel() % 8:
        total = total + (raw[-rest:].to(torch.int64) * weights[:rest]).sum() * 104729
    return int(total)


@lru_cache
def _weights(device: torch.device) -> torch.Tensor:
    """Odd numbers of 64 bits, int64 [_BLOCK], no two with the same last 16 bits: the same on every machine."""
    drawn = random.Random(2402)
    lows = drawn.sample(range(1, 1 << 16, 2), _BLOCK)
    weights = [(drawn.getrandbits(48) << 16 | low) - (1 << 63) for low in lows]
    return torch.tensor(weights, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class InProcessWeights:
    """A ``WeightHandle`` for a sampler in the learner's own process."""

    kind: Kind
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    adapter_config: Mapping[str, Any] | None = None
    transport: ClassVar[Transport] = "same process"

    def sent(self) -> tuple[str, int]:
        return digest_and_bytes(self.tensors(), self.adapter_config)

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.tensors()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, or the adapter, of a Hugging Face folder, as transformers and peft
    choose them. A second set of weights beside them (another format's, an older save's) is none of it.

    Raises ``UserError`` for a folder without them, and for an index that cannot be read or names a missing file.
    """
    alone = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    single, index = folder / f"{alone}.safetensors", folder / f"{alone}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"model folder {str(folder)!r} holds neither {single.name} nor {index.name}; convert it with "
            "transformers' save_pretrained"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model folder {str(folder)!r}: {index.name} cannot be read ({error}); get it again") from None
    if absent := [name for name in named if not (folder / name).is_file()]:
        raise UserError(
            f"model folder {str(folder)!r} lacks {', '.join(absent[:3])}, which {index.name} names; get it again"
        )
    return [folder / name for name in named]


@dataclass(frozen=True)
class FolderWeights:
    """A ``WeightHandle`` on a Hugging Face folder: its safetensors files, or peft's adapter files."""

    folder: str
    transport: ClassVar[Transport] = "shared memory"

    @property
    def kind(self) -> Kind:
        return "adapter" if (Path(self.folder) / "adapter_config.json").exists() else "full"

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        if self.kind == "full":
            return None
        file = Path(self.folder) / "adapter_config.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{str(file)!r} cannot be read ({error}); get the adapter again") from None

    def sent(self) -> tuple[str, int]:
        return digest_and_bytes(self.open(), self.adapter_config)

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in weight_files(Path(self.folder)):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    yield name, opened.get_tensor(name)


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What the handles that can be pickled know of their tensors."""

    kind: Kind
    adapter_config: Mapping[str, Any] | None
    digest: str
    bytes: int

    def sent(self) -> tuple[str, int]:
        return self.digest, self.bytes


@dataclass(frozen=True, kw_only=True)
class InlineWeights(_Written):
    """A ``WeightHandle`` that carries its tensors with it, for an adapter's few megabytes. Can be pickled."""

    data: bytes = field(repr=False)
    """One safetensors file."""
    transport: ClassVar[Transport] = "with the call"

    @classmethod
    def of(cls, tensors: Tensors, kind: Kind, adapter_config: Mapping[str, Any] | None = None) -> InlineWeights:
        seen = Fingerprint(adapter_config)
        data = b"".join(_file_parts(list(seen.watch(tensors))))
        return cls(kind=kind, adapter_config=adapter_config, digest=seen.digest(), bytes=seen.bytes, data=data)

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(safetensors.torch.load(self.data).items())


@dataclass(frozen=True, kw_only=True)
class SharedMemoryWeights(_Written):
    """A ``WeightHandle`` on tensors in the host's shared memory, for any process of the host. Can be pickled.

    The writer calls ``remove`` when everyone has read. What was opened before stays readable.
    """

    folder: str
    files: int
    transport: ClassVar[Transport] = "shared memory"

    @classmethod
    def write(
        cls,
        tensors: Tensors,
        kind: Kind,
        adapter_config: Mapping[str, Any] | None = None,
        bucket_bytes: int = 64 << 20,
        place: Path | None = None,
    ) -> SharedMemoryWeights:
        """Writes the tensors in files of ``bucket_bytes`` (a larger tensor alone), to shared memory or into ``place``.
        Of what the source makes, no more than one file's tensors are alive at once, and the one tensor beyond it.

        Raises ``RunFailure`` when there is no room; nothing is left behind then, nor when the source raises.
        """
        seen = Fingerprint(adapter_config)
        folder = shared_memory_folder("nanogrpo-weights", place)
        files = 0
        try:
            for bucket in _buckets(seen.watch(tensors), bucket_bytes):
                _write_file(folder / _file_name(files), bucket)
                files += 1
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(
            kind=kind, adapter_config=adapter_config, digest=seen.digest(), bytes=seen.bytes,
            folder=str(folder), files=files,
        )  # fmt: skip

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields views of the shared pages, copied only where the reader writes on them. Raises ``RunFailure`` if they
        were removed before."""
        for number in range(self.files):
            file = Path(self.folder) / _file_name(number)
            try:
                opened = safe_open(file, framework="pt")
            except FileNotFoundError:
                raise RunFailure(
                    f"the learner's weights are no longer in {file}: they were removed, or this is another host"
                ) from None
            with opened as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)

    def remove(self) -> None:
        """Frees the memory once no reader is left. Removing twice is allowed."""
        shutil.rmtree(self.folder, ignore_errors=True)


_LOCKED: dict[Path, int] = {}  # this process's folders, and the open file that keeps each locked until it ends


def shared_memory_folder(prefix: str, place: Path | None = None) -> Path:
    """A fresh folder of this process in shared memory (the temp folder where there is none), or in ``place``.

    It is locked as long as this process lives, and the next process to make one removes unlocked ones: what killed
    processes left there. A forked child shares the lock.
    """
    assert prefix.startswith("nanogrpo-"), prefix
    if place is None:
        place = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    for folder in [folder for folder in _LOCKED if not folder.exists()]:
        os.close(_LOCKED.pop(folder))
    for folder in place.glob("nanogrpo-*-locked-*"):
        with contextlib.suppress(OSError):  # locked; or removed, another user's, or on a file system without locks
            lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-locked-", dir=place))
        with contextlib.suppress(OSError):  # such a file system, where no other process can remove it either
            _LOCKED[folder] = _lock(folder, fcntl.LOCK_EX)
        if folder.exists():  # or another process removed it before it was locked
            return folder


def _lock(folder: Path, how: int) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _buckets(tensors: Tensors, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Runs of tensors of ``bucket_bytes`` at most, a larger one alone. A list is emptied when the next is asked for."""
    held: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for name, tensor in tensors:
        if held and filled + tensor.nbytes > bucket_bytes:
            yield held
            held.clear()
            filled = 0
        held.append((name, tensor))
        filled += tensor.nbytes
    if held:
        yield held
        held.clear()


def _file_name(number: int) -> str:
    return f"{number:05}.safetensors"


def _write_file(file: Path, tensors: list[tuple[str, torch.Tensor]]) -> None:
    size = sum(tensor.nbytes for _, tensor in tensors)
    free = shutil.disk_usage(file.parent).free
    try:
        if size + (1 << 16) > free:  # the file's own header is small
            raise OSError(errno.ENOSPC, "full")
        with file.open("wb") as opened:
            for part in _file_parts(tensors):
                opened.write(part)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunFailure(
            f"the learner's weights do not fit in shared memory: the next {size / 2**20:.1f} MiB do not go into the "
            f"{free / 2**20:.1f} MiB free in {file.parent.parent}; give the container more (docker run --shm-size), "
            "or set sync.transport=collective"
        ) from None


def _file_parts(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[Any]:
    """A safetensors file, a tensor at a time: the package's own writer takes neither views nor tensors that overlap."""
    tensors = sorted(tensors, key=lambda pair: -pair[1].element_size())  # each then lies on its own boundary
    header, end = {}, 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _FORMATS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        yield raw_bytes(tensor.cpu()).numpy()
