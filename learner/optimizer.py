"""The optimizers, on float32 master weights or with stochastic rounding; gradient clipping; the learning-rate schedule.

A bfloat16 weight near 1 cannot hold a change below 0.004, so small updates would be lost to rounding. Two cures:

- float32 master weights: the optimizer steps a float32 copy, and the model gets its rounding. Gradients are added up in
  float32 too, as soon as the backward pass has made them. With ``offload`` all of this lives in host memory;
- stochastic rounding: the bfloat16 weights themselves are stepped and rounded up or down at random, right on average.
  No copy, but gradients are added up over micro-batches in bfloat16.

Moments, bytes a weight: adamw 8; adamw_8bit 2 and adamw_4bit 1 (8 for tensors of fewer than 4096 values, or of no whole
number of blocks); muon 4 for the layers' matrices and 8 for the rest; adafactor next to nothing. All exist from the
start, so that memory is honest before the first step.

torchao's steps compile, ten seconds a shape at the first step. On a GPU that is worth it: uncompiled, the float32
intermediates of the largest weight exist at once. On a CPU they run uncompiled unless ``compiled`` is asked for (one
core, us a weight: adamw_8bit 0.2, compiled 0.06; adamw_4bit 0.09; stochastic adamw 0.02). The two ways differ in
rounding, so a run keeps to one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common.config import OptimizerConfig
from learner.distributed import local

QUANTIZED = ("codes", "scale")  # what changes of a torchao moment held in 8 or 4 bits
MUON_MOMENTUM = 0.95  # as in both papers; ``betas`` are AdamW's


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """The rate of optimizer step ``update`` (0 is the first) in a run of ``updates`` steps, never 0: a schedule that
    falls to ``min_lr_ratio`` reaches it at the last step, and one that falls to 0 a step after."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = updates if config.min_lr_ratio > 0 else updates + 1
    done = min((update - config.warmup_steps + 1) / max(end - config.warmup_steps, 1), 1.0)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class MasterOptimizer:
    """``config.name`` over named parameters. float32 ones are stepped directly, as bfloat16 ones are with
    ``config.master == "stochastic"``; other bfloat16 ones have float32 master weights.

    - adamw: arXiv 1711.05101, torch's fused one; adamw_8bit and adamw_4bit: its moments in blocks of 256 (arXiv
      2110.02861) or 128 (arXiv 2309.01507) values with a scale each, by torchao;
    - adafactor: arXiv 1804.04235 as torch has it: its step is ``lr`` times the weight's own root mean square;
    - muon: arXiv 2502.16982 for the parameters named in ``matrices``, its step scaled to AdamW's so that ``lr`` fits
      both, and AdamW for the rest.

    A parameter that is sliced over ranks (a DTensor; adamw only) stays so, with its moments and in ``state``; ``clip``
    is then a collective. What rounds at random is seeded by ``seed`` and the number of steps done, so that a restored
    optimizer goes on as if it had never stopped.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        *,
        matrices: Collection[str] = (),
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        self._config, self._seed, self._compiled = config, seed, compiled
        self._stochastic = config.master == "stochastic"
        self._steps = 0
        self._pairs: dict[str, tuple[nn.Parameter, torch.Tensor]] = {}
        self._reached: set[str] = set()  # whose gradient a pass has added to since ``zero_grad``
        for name, parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_noter(self._reached, name))
            if (parameter.dtype == torch.float32 or self._stochastic) and not config.offload:
                self._pairs[name] = (parameter, parameter)
            else:
                place = "cpu" if config.offload else parameter.device
                master = parameter.detach().to(place, torch.float32, copy=True).requires_grad_()
                self._pairs[name] = (parameter, master)
                parameter.register_post_accumulate_grad_hook(_adder(master))
        assert self._pairs, "there is nothing to train"
        self._optimizers = _optimizers({name: master for name, (_, master) in self._pairs.items()}, config, matrices)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for master in group["params"]:
                    optimizer.state[master].update(_blank(optimizer, master))

    def zero_grad(self) -> None:
        self._reached.clear()
        for parameter, master in self._pairs.values():
            parameter.grad = master.grad = None

    def blank_gradients(self) -> None:
        """Gradients of 0 for the passes to add to. Made in the middle of a backward pass they would fragment the memory
        that it frees, and a CPU's next pass would not fit (5.9 GiB of heap in place of 4.6 for LoRA on
        Qwen2.5-0.5B)."""
        for _, master in self._pairs.values():
            master.grad = torch.zeros_like(master)

    def drop_blanks(self) -> None:
        """No gradient where no pass has added to a blank one: an expert that no token reached is not stepped (among
        several ranks it is, with a gradient of 0)."""
        for name, (_, master) in self._pairs.items():
            if name not in self._reached:
                master.grad = None

    def clip(self) -> float:
        """Scales the gradients to at most ``max_grad_norm``; returns their global norm before, maybe not finite."""
        limit = self._config.max_grad_norm or math.inf
        masters = [master for _, master in self._pairs.values()]
        grads = [master.grad for master in masters if master.grad is not None]
        if self._stochastic and grads:  # of bfloat16 gradients torch would give a norm of three digits
            norm = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]).norm()
        else:
            norm = nn.utils.get_total_norm(grads)
        if isinstance(norm, DTensor):  # each rank's part of it, until asked for the whole
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(masters, limit, norm)
        return float(norm)

    def step(self, lr: float) -> None:
        """One step at this rate; the model's weights become the rounded master weights."""
        with self._seeded(), torch.compiler.set_stance("default" if self._compiled else "force_eager"):
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    if isinstance(group["lr"], torch.Tensor):  # torchao's: a number would be compiled in
                        group["lr"].fill_(lr)
                    else:
                        group["lr"] = lr
                optimizer.step()
        self._steps += 1
        self.round_to_model()
        self.zero_grad()

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """A random state of this step's own for stochastic rounding; the one outside is left as it was."""
        if not self._stochastic:
            yield
            return
        devices = {master.device for _, master in self._pairs.values()} - {torch.device("cpu")}
        kind = next(iter(devices), torch.device("cpu")).type
        with torch.random.fork_rng(devices=list(devices), **({"device_type": kind} if devices else {})):
            torch.manual_seed(self._seed * 1_000_003 + self._steps)
            yield

    def round_to_model(self) -> None:
        with torch.no_grad():
            for parameter, master in self._pairs.values():
                if parameter is not master:
                    parameter.copy_(master)

    def reset(self) -> None:
        """Moments and the count of steps as before the first step; master weights and weights stay."""
        self.zero_grad()
        self._steps = 0
        with torch.no_grad():
            for name in self._pairs:
                for tensor in self._kept(name).values():
                    tensor.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Of each parameter ``NAME/master`` (``NAME/weight`` where the model's own bfloat16 weight is stepped), its
        moments and its count of steps, as flat named tensors, not copied; a moment held in few bits is its codes and
        its scales (``NAME/exp_avg.codes``, ``.scale``)."""
        tensors: dict[str, torch.Tensor] = {}
        for name, (_, master) in self._pairs.items():
            tensors[_master_key(name, master)] = master.detach()
            tensors |= {f"{name}/{part}": value for part, value in self._kept(name).items()}
        return tensors

    def blank_state(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint's values of these names of ``state``: our own, to be read into. Names of no
        parameter here are left out."""
        own = self.state()
        return {key: own[key] for key in names if key in own}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Undo of ``state``; asserts that every parameter is there. What has no moments there gets blank ones."""
        own = self.state()
        with torch.no_grad():
            for name, (_, master) in self._pairs.items():
                assert _master_key(name, master) in tensors, f"the state of {name} is missing"
            for key, tensor in own.items():
                if key in tensors:
                    tensor.copy_(tensors[key])
                else:
                    tensor.zero_()
        self._steps = max((int(value) for key, value in own.items() if key.endswith("/step")), default=0)
        self.round_to_model()

    def _kept(self, name: str) -> dict[str, torch.Tensor]:
        """The plain tensors that the optimizer keeps for this parameter, not copied."""
        master = self._pairs[name][1]
        found: dict[str, torch.Tensor] = {}
        for optimizer in self._optimizers:
            for part, value in optimizer.state.get(master, {}).items():
                if hasattr(value, "codes"):
                    found |= {f"{part}.{inner}": getattr(value, inner) for inner in QUANTIZED}
                else:
                    found[part] = value
        return found


def _master_key(name: str, master: torch.Tensor) -> str:
    return f"{name}/{'master' if master.dtype == torch.float32 else 'weight'}"


def _optimizers(
    masters: dict[str, torch.Tensor], config: OptimizerConfig, matrices: Collection[str]
) -> list[torch.optim.Optimizer]:
    """The one that steps these, or muon's two; biases and norms get no weight decay."""

    def groups(chosen: Collection[torch.Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in chosen if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in chosen if p.dim() < 2], "weight_decay": 0.0},
        ]

    adamw: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    everything = groups(masters.values())
    if config.name == "adafactor":
        return [torch.optim.Adafactor(everything, lr=config.lr)]
    if config.name == "muon":
        inner = {name: p for name, p in masters.items() if name in matrices}
        assert all(p.dim() == 2 for p in inner.values()), "muon takes matrices only"
        rest = [p for name, p in masters.items() if name not in matrices]
        muon = torch.optim.Muon(
            [{"params": list(inner.values())}], lr=config.lr, weight_decay=config.weight_decay, momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        return [muon, torch.optim.AdamW(groups(rest), **adamw, fused=True)]
    if config.name == "adamw" and config.master == "float32":
        return [torch.optim.AdamW(everything, **adamw, fused=True)]
    return [_torchao(config.name)(everything, **adamw, bf16_stochastic_round=config.master == "stochastic")]


def _torchao(name: str) -> Any:
    from torchao.optim import AdamW4bit, AdamW8bit
    from torchao.optim.adam import _AdamW

    return {"adamw": _AdamW, "adamw_8bit": AdamW8bit, "adamw_4bit": AdamW4bit}[name]


def _blank(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """What this optimizer makes for a parameter at its first step, all zero: made now."""
    p = master.detach()
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(p)}
    if isinstance(optimizer, torch.optim.AdamW):  # fused, it keeps the count beside the weights
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    step = torch.tensor(0.0)
    if isinstance(optimizer, torch.optim.Adafactor):
        if p.dim() < 2:
            return {"step": step, "variance": torch.zeros_like(p)}
        return {"step": step, "row_var": torch.zeros_like(p[..., :1]), "col_var": torch.zeros_like(p[..., :1, :])}
    torchao: Any = optimizer
    made = {"exp_avg": torchao._new_buffer(p, True), "exp_avg_sq": torchao._new_buffer(p, False)}
    # A moment not held in few bits would be as coarse as the weight, and one in bfloat16 stands still.
    return {"step": step} | {name: buf if hasattr(buf, "codes") else buf.float() for name, buf in made.items()}


def _noter(reached: set[str], name: str) -> Callable[[torch.Tensor], None]:
    """Not a closure over the optimizer: torch would keep it, and all it holds, for good."""
    return lambda _: reached.add(name)


def _adder(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.device, torch.float32)
        else:
            master.grad += parameter.grad.to(master.device)
        parameter.grad = None

    return add


class HostOffload:
    """Tensors whose memory can wait on the host and come back under the same names, views and ties.

    Their storages are emptied in place, so every tensor on them, a tied weight's two names and a moment's codes among
    them, is the same object before and after. On a GPU the host's copy is pinned, and kept from one time to the next.
    Tensors that ``besides`` already manages are left out.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], besides: HostOffload | None = None) -> None:
        self._device: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = local(tensor.detach()).untyped_storage()
            if storage.nbytes() and not (besides and storage._cdata in besides._device):
                self._device[storage._cdata] = storage
        self._host: dict[int, torch.Tensor] = {}
        self.away = False

    def offload(self) -> None:
        """To the host. Doing so twice is allowed."""
        if self.away:
            return
        for key, storage in self._device.items():
            if key not in self._host:
                pinned = storage.device.type != "cpu"
                self._host[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            self._host[key].copy_(_bytes(storage))
            storage.resize_(0)
        self.away = True

    def onload(self) -> None:
        """Back to the device, with the bits they had."""
        if not self.away:
            return
        for key, storage in self._device.items():
            storage.resize_(self._host[key].nbytes)
            _bytes(storage).copy_(self._host[key])
        self.away = False

    def held(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's values wherever they are now: on the host while offloaded, to be read only."""
        key = local(tensor.detach()).untyped_storage()._cdata
        if not self.away or key not in self._host:
            return tensor
        host = self._host[key].untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
