"""The folder that the run's sampler loads: the model's own, or what the learner computes with in 16 bits where the
sampler holds no 4-bit weights."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from common.atomic_files import atomic_folder
from common.config import ModelConfig
from common.device import dtype_of
from common.weights.handles import weight_files
from learner.model.adapters import sends_adapter
from learner.model.loading import load, on_shapes
from learner.model.resolve import head_of
from learner.model.saving import belongings, full_tensors, write_folder


def dequantized(folder: Path, config: ModelConfig, device: str) -> Path:
    """A Hugging Face folder like this one whose weights are the learner's under ``config.quantize``, each rounded to
    NF4 on ``device`` and back, in ``config.dtype``; made once and kept in ``config.cache_folder``."""
    files = sorted({*weight_files(folder), folder / "config.json", *belongings(folder)})
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns, head_of(file)) for file in files]
    words = f"{about} {config.dtype} {config.quantize} {torch.device(device).type}"
    stamp = hashlib.sha256(words.encode()).hexdigest()[:12]
    target = Path(config.cache_folder).expanduser() / f"{folder.name[:80]}-{config.quantize}-{config.dtype}-{stamp}"
    if (target / "config.json").is_file():
        return target
    model = load(folder, config, device)
    state = {name: tensor.cpu().contiguous() for name, tensor in full_tensors(model, dtype_of(config.dtype))}
    with atomic_folder(target, replace=False) as made:
        write_folder(model, folder, made, state)
    return target


def sampler_base(folder: Path, config: ModelConfig, sampler: str, device: str) -> dict[str, Any]:
    """``model_folder`` and ``quantize`` of the setup of this sampler on ``device``: one that does not hold a quantized
    base in 4 bits itself loads the same numbers. Merged weights replace the base, which then is not quantized."""
    quantize = sampler_quantize(folder, config, sampler, device)
    if quantize == config.quantize or not sends_adapter(config):
        return {"model_folder": str(folder), "quantize": quantize}
    return {"model_folder": str(dequantized(folder, config, device)), "quantize": "off"}


@functools.cache
def sampler_quantize(folder: Path, config: ModelConfig, sampler: str, device: str) -> str:
    """How this sampler holds the base: in 4 bits, as the learner does, only vLLM on a GPU under an adapter, and only a
    model whose matrices are all linear layers, for vLLM would round experts too, which the learner leaves as they are
    (``left_out``)."""
    if config.quantize == "off" or not sends_adapter(config) or device == "cpu" or sampler != "vllm":
        return "off"
    return "off" if any(p.dim() > 2 for p in on_shapes(folder, config).parameters()) else config.quantize
