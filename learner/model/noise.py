"""Noise on the trained weights, for the sync's challenge: a sampler with the old weights then has clearly other
log-probs.

Among ranks everything here is a collective.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from learner.distributed import full_tensor, local, own_slice
from learner.model import nf4

# Of a weight's spread. An old output head alone then puts SmolLM2's log-probs 0.5 nats off (0.07 to 0.2 with half as
# much), where bfloat16 puts them 0.04 to 0.06; with twice as much that would be 0.4 to 1.
NOISE = 0.2


@contextlib.contextmanager
def perturbed(model: Any, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Inside, every trained weight carries seeded noise: ``NOISE`` of each tensor's own spread, so each layer's part
    shows in the log-probs; an adapter's zero half gets noise that makes its update as large."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: local(p.detach()).to("cpu", copy=True) for name, p in trained.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            full = full_tensor(parameter, dtype)
            noise = torch.randn(full.shape, generator=generator) * _scale(model, name, full)
            # Rounded as the model's own weights are, also where this rank keeps float32 ones of its own.
            local(parameter).copy_(own_slice(full + noise.to(full.device, full.dtype), parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                local(parameter).copy_(kept[name])


def _scale(model: Any, name: str, weight: torch.Tensor) -> float:
    if ".lora_B." in name:
        layer = model.get_submodule(name.split(".lora_B.")[0])
        down = layer.lora_A["default"].weight
        # The spread of scaling x B x A for B ~ 1.
        update = layer.scaling["default"] * math.sqrt(len(down)) * float(down.float().std())
        base = float(full_tensor(nf4.dense(layer.base_layer.weight)).float().std())
        return NOISE * base / max(update, 1e-12)
    if ".lora_magnitude_vector." in name:  # of rows of much the same length: their spread would be no noise
        return NOISE * float(weight.float().abs().mean())
    spread = weight.float().std() if weight.numel() > 1 else weight.float().abs().mean()
    return NOISE * float(spread if float(spread) > 0 else 1.0)
