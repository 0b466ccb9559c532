"""The check that learner, hf sampler and loop import without the optional packages, which a bare machine lacks.

It makes this process blind to them, so that it shows the same where they are installed. Nothing else may be imported
before, and so it has a module of its own.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tests.gpu.runner import Report

HEAVY = (
    "bitsandbytes", "datasets", "gguf", "matplotlib", "ray", "reasoning_gym",
    "tensorboard", "torchao", "trl", "vllm",
)  # fmt: skip
MODULES = (
    "common.config", "common.device", "common.rewards.scorer", "common.tokenizer", "common.tracking.metrics",
    "common.weights.broadcast", "deploy.colocated", "deploy.memory_plan.estimate", "learner.evaluate",
    "learner.torch_learner", "learner.train", "learner.memory_estimate", "learner.distributed", "learner.weight_sync",
    "sampler.conformance.suite", "sampler.hf", "sampler.engine.vllm", "tests.making", "tests.parity", "tests.tiny",
)  # fmt: skip


class _Without:
    """Another finder of modules, blind to the heavy packages: whoever asks whether one is there is told no, too."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return None if name.partition(".")[0] in HEAVY else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def imports(report: Report) -> None:
    """Each of the modules, without the packages."""
    assert "torch" not in sys.modules, "imported too early"
    sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
    failed = {}
    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            failed[module] = str(error)
    report.note(modules=len(MODULES), without=", ".join(HEAVY))
    assert not failed, json.dumps(failed)
