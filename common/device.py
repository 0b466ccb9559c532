"""Where tensors live: the one file that names an accelerator.

Device, number format, memory facts and random state. What needs a GPU here has not yet run on one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Callable
from typing import Literal

import psutil
import torch

from common.errors import UserError


def pick(device: Literal["auto", "cpu", "gpu"]) -> str:
    """The torch device string. Raises ``UserError`` when a GPU is asked for and torch sees none."""
    available = torch.cuda.is_available()
    if device == "gpu" and not available:
        raise UserError(
            "train.device='gpu' but torch sees no GPU; check the driver with nvidia-smi, install the GPU build "
            "(make setup ACCEL=gpu), or set train.device='cpu'"
        )
    return "cuda" if available and device != "cpu" else "cpu"


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a configuration's ``model.dtype``, once ``auto`` is resolved."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def quick_dtype(device: str) -> Literal["bfloat16", "float32"]:
    """The format that ``model.dtype="auto"`` means on this device; for a GPU that is not here, bfloat16.

    A CPU without instructions for bfloat16 emulates its products: on an EPYC with AVX2 alone the learner's
    backward products ran at a hundredth of float32's rate, and vLLM wrote a fifth of the tokens.
    """
    if device != "cpu":
        here = torch.cuda.is_available()
        return "bfloat16" if not here or torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has = torch.cpu.get_capabilities()
    # Only x86's names are known; elsewhere the library that multiplies says whether it can.
    quick = (
        has.get("avx512_bf16") or has.get("amx_bf16")
        if has.get("architecture") == "x86_64"
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return "bfloat16" if quick else "float32"


KERNELS = 128
"""Compiled kernels that torch's CPU library keeps. Each new shape needs one, and packs keep having new shapes."""


def set_threads(threads: int) -> int:
    """Sets torch's CPU threads (0: every core this process may use) and returns their number. To be called before the
    first product, because it also configures the allocator of a process that computes on a CPU."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    # glibc keeps freed tensors for the next ones: by default the kernel maps and zeroes every large one again, which
    # took a quarter of a training step.
    _libc("mallopt", -3, 1 << 30)  # M_MMAP_THRESHOLD
    _libc("mallopt", -1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    # By default torch and oneDNN keep 1024 compiled kernels each, about 0.6 GiB, and they fragment the heap (a learner
    # of SmolLM2-135M grew by 30 MiB a step). A pass needs some hundred, and making one takes a millisecond.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))
    return count


def _libc(function: str, *values: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library: no harm, only slower
        getattr(ctypes.CDLL("libc.so.6"), function)(*values)


def peak_memory_gib(device: str) -> float:
    """Peak so far in GiB: the device's allocations on a GPU, the process's resident memory on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def release(device: str) -> None:
    """Returns cached, unused memory: to the driver on a GPU; on a CPU to the system, once the process has grown.

    Freed blocks are kept there (``set_threads``) and the next step uses them again: returning them after every step
    cost up to a third of its time. But the heap fragments, so the process would grow a little every step.
    """
    if device != "cpu":
        torch.cuda.empty_cache()
    else:
        _HEAP.release(psutil.Process().memory_info().rss)


class _Heap:
    """Trims the C library's heap when the process is a tenth larger than a fresh heap made it."""

    def __init__(self, trim: Callable[[], None]) -> None:
        self.allowed_bytes = 0
        self._trim = trim
        self._calls = 0  # since the last trim

    def release(self, resident_bytes: int) -> None:
        self._calls += 1
        if resident_bytes > 1.1 * self.allowed_bytes:
            if self._calls <= 4:  # about two steps on a fresh heap: the work itself needs this much
                self.allowed_bytes = resident_bytes
            else:
                self._calls = 0
                self._trim()


def _trim() -> None:
    _libc("malloc_trim", 0)


_HEAP = _Heap(_trim)


def collective_backend(device: str) -> Literal["gloo", "nccl"]:
    """The torch.distributed backend for collectives between processes on this kind of device."""
    return "gloo" if torch.device(device).type == "cpu" else "nccl"


def bind_collectives(ip: str) -> None:
    """Makes this process's collectives travel by the network interface that owns ``ip``; to be called before it joins
    a group. By default gloo resolves the host's name, which may belong to another interface or to none.

    Raises ``UserError`` when no interface here has that address.
    """
    names = {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
    }
    if ip not in names:
        raise UserError(
            f"no network interface of this machine has the address {ip!r}; give the cluster one that it has"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = names[ip]
    os.environ["NCCL_SOCKET_IFNAME"] = f"={names[ip]}"  # without the sign eth1 would match eth10 too
