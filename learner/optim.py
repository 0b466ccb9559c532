"""AdamW on float32 master weights, gradient clipping and the learning-rate schedule.

A bfloat16 weight near 1 cannot hold a change below 0.004, so small updates would be lost to rounding: the optimizer
steps a float32 copy, and the model gets its rounding. Gradients are added up in float32 too, each as soon as its
backward pass has made it, so no bfloat16 gradient outlives its layer. With ``offload`` all of this lives in host
memory, and only weights cross over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """The rate of optimizer step ``update`` (0 is the first) in a run of ``updates`` steps."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min((update - config.warmup_steps + 1) / max(updates - config.warmup_steps, 1), 1.0)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class MasterAdamW:
    """AdamW (arXiv 1711.05101) over named parameters; float32 ones are their own masters.

    A parameter that is sliced over ranks (a DTensor) stays so, with its averages and in ``state``; ``clip`` is then a
    collective.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        self._config = config
        self._pairs: dict[str, tuple[nn.Parameter, torch.Tensor]] = {}
        for name, parameter in parameters:
            if parameter.dtype == torch.float32 and not config.offload:
                self._pairs[name] = (parameter, parameter)
            else:
                place = "cpu" if config.offload else parameter.device
                master = parameter.detach().to(place, torch.float32, copy=True).requires_grad_()
                self._pairs[name] = (parameter, master)
                parameter.register_post_accumulate_grad_hook(_adder(master))
        assert self._pairs, "there is nothing to train"
        masters = [master for _, master in self._pairs.values()]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in masters if p.dim() >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in masters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def zero_grad(self) -> None:
        for parameter, master in self._pairs.values():
            parameter.grad = master.grad = None

    def clip(self) -> float:
        """Scales the gradients to at most ``max_grad_norm``; returns their global norm before, maybe not finite."""
        limit = self._config.max_grad_norm or math.inf
        masters = [master for _, master in self._pairs.values()]
        norm = nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        if isinstance(norm, DTensor):  # each rank's part of it, until asked for the whole
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(masters, limit, norm)
        return float(norm)

    def step(self, lr: float) -> None:
        """One step at this rate; the model's weights become the masters' rounding."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.round_to_model()
        self.zero_grad()

    def round_to_model(self) -> None:
        with torch.no_grad():
            for parameter, master in self._pairs.values():
                if parameter is not master:
                    parameter.copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and both averages of each parameter, and its count of steps, as flat named tensors."""
        tensors: dict[str, torch.Tensor] = {}
        for name, (_, master) in self._pairs.items():
            tensors[f"{name}/master"] = master.detach()
            for part, value in self._adamw.state.get(master, {}).items():
                tensors[f"{name}/{part}"] = value
        return tensors

    def blank_state(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint's values of these names of ``state``: the masters themselves, new ones for the
        rest. Names of no parameter here are left out."""
        blank: dict[str, torch.Tensor] = {}
        for key in names:
            name, _, part = key.rpartition("/")
            if name in self._pairs:
                master = self._pairs[name][1].detach()
                blank[key] = master if part == "master" else torch.zeros(()) if part == "step" else master.clone()
        return blank

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Undo of ``state``; asserts that every parameter is there."""
        with torch.no_grad():
            for name, (_, master) in self._pairs.items():
                master.copy_(tensors[f"{name}/master"])
                parts = {
                    key.removeprefix(f"{name}/"): value
                    for key, value in tensors.items()
                    if key.startswith(f"{name}/") and not key.endswith("/master")
                }
                if parts:
                    self._adamw.state[master] = {
                        part: value.to(master.device, copy=True)  # "step" too: fused AdamW keeps it there
                        for part, value in parts.items()
                    }
        self.round_to_model()


def _adder(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.device, torch.float32)
        else:
            master.grad += parameter.grad.to(master.device)
        parameter.grad = None

    return add
