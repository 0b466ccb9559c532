"""Which packages the learner, the hf sampler and the loop must import without, and whether they do.

A bare machine has torch, transformers, peft and what those bring; the packages named here it lacks. Run as a module it
refuses them by name, so that it shows the same where they are installed.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tests.gpu.runner import ROOT

HEAVY = (
    "bitsandbytes", "datasets", "flash_attn", "gguf", "math_verify", "matplotlib", "ray",
    "reasoning_gym", "tensorboard", "torchao", "trl", "vllm",
)  # fmt: skip
MODULES = (
    "common.config", "common.device", "common.rewards", "common.tokenizer", "common.tracking", "common.transport",
    "deploy.local", "deploy.planner", "learner.evaluate", "learner.learner", "learner.loop", "learner.memory",
    "learner.parallel", "learner.sync", "sampler.contract", "sampler.hf", "sampler.vllm", "tests.making",
    "tests.parity", "tests.tiny",
)  # fmt: skip


class _Without:
    """Another finder of modules, blind to the heavy packages: whoever asks whether one is there is told no, too."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return None if name.partition(".")[0] in HEAVY else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def missing_imports() -> dict[str, str]:
    """By module that does not import, why; in a process of its own."""
    words = [sys.executable, "-m", "tests.gpu.bare"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, str] = json.loads(ran.stdout.strip().split("\n")[-1])
    return found


def main() -> None:
    sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
    failed = {}
    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            failed[module] = str(error)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
