"""The learner's memory before the run: its own rehearsal on tensors that have a shape and no memory.

The model is built on torch's meta device and rehearsed there: packing, forward pass, output head, loss and backward
pass of the largest pack that the run can make. A ``MemoryTracker`` sees every operation and counts the storage alive,
by category. The optimizer's step is counted, not run.

Left out: the sampler, which side is awake when, fragmentation on a CPU (all in ``deploy/memory_plan/estimate.py``), and
memory outside torch's tensors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.config import Config, ModelConfig
from common.memory import ModelSize
from learner import token_logprobs
from learner.batch import packing, packing_support
from learner.model import loading, nf4
from learner.rehearsal import largest_pack, longest_groups, vocabulary_of
from learner.torch_learner import TorchLearner

aten = torch.ops.aten
SHAPE = "meta"
HOST = "host"
"""The category of what is not on the device, and not counted."""
STEP_COPIES = {"adamw_8bit": 14.25, "adamw_4bit": 14.25, "stochastic": 10.25, "adafactor": 1.0, "muon": 3.6}
"""What an optimizer's step takes for a moment, in float32 copies of the largest tensor that it steps: growth of the
process measured on a CPU (torch 2.13, torchao, 33 M values). torch's fused AdamW takes none, and torchao's none where
they are compiled, as on a GPU."""


# -- counting ----------------------------------------------------------------------------------------------------------


class MemoryTracker(TorchDispatchMode):
    """Counts the storage of every shape-only tensor made while it is active, from its making to its end.

    Numbers asked of such a tensor are 1, and its copy on the host is an uninitialised one: losses and norms are read
    that way, and no shape depends on them. ``rows``: completions of the pack, as many as an index can distinguish;
    ``offload``: float32 gradients are in host memory.
    """

    def __init__(self, vocabulary: int, rows: int = 1, offload: bool = False) -> None:
        super().__init__()
        self.phase = "load"
        self.peaks: dict[str, dict[str, int]] = {}
        """Of each phase the bytes alive at its fullest, by category."""
        self._trained: set[tuple[int, ...]] = set()
        self._vocabulary, self._rows, self._offload = vocabulary, rows, offload
        self._held: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[Any]] = {}

    def watch(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Counts these as ``category``, from now on; those that are trained will have gradients of their shapes."""
        for tensor in tensors:
            self._see(tensor, category)
            if tensor.requires_grad:
                self._trained.add(tuple(tensor.shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.device.type == SHAPE:
            if func is aten._local_scalar_dense.default:
                return 1.0 if first.dtype.is_floating_point else 1
            if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
                return torch.empty(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if func is aten._unique2.default:
                rows = first.new_empty(self._rows)
                return rows, torch.empty_like(first), torch.empty_like(rows)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == SHAPE:
                self._see(leaf, self._category_of(leaf, func is aten.zeros_like.default))
        return out

    def _see(self, tensor: torch.Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, category, size))
            self._add(category, size)

    def _forget(self, key: int, category: str, size: int) -> None:
        del self._known[key]
        self._add(category, -size)

    def _add(self, category: str, size: int) -> None:
        if category == HOST:
            return
        self._held[category] += size
        if self._held.total() > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self._held)

    def _category_of(self, tensor: torch.Tensor, zeros: bool) -> str:
        if tuple(tensor.shape) in self._trained:
            if self._offload and tensor.dtype == torch.float32:
                return HOST
            if zeros or torch._C._current_graph_task_id() != -1:  # blank ones, or in the backward pass
                return "gradients"
        head = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        return "output head" if head else "activations"


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """torch's fused attention as it is in memory: inputs, output and one number a query row are kept, the scores are
    never whole. A tensor without a device would be given the plain one, with all its scores. The function is replaced,
    because a mode is not in force where checkpointing computes a layer again."""
    kept = F.scaled_dot_product_attention

    def shaped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if query.device.type == SHAPE:
            return _Fused.apply(query, key, value)
        return kept(query, key, value, *rest, **named)

    F.scaled_dot_product_attention = shaped
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


# -- the learner -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnerMemory:
    """What a learner takes of its device, by phase and category (bytes)."""

    phases: Mapping[str, Mapping[str, int]]
    """``load`` (resident from then on), ``learn`` (passes) and ``step`` (the optimizer's)."""
    parameters_trained: int
    parameters_total: int
    pack_tokens: int
    packed: bool
    probe: int
    """The proof's log-probs, beyond what is resident."""
    trained_bytes: int
    largest_trained: int
    """The largest tensor that is trained."""
    state_bytes: int
    """Of a checkpoint: what the optimizer keeps, and the weights that it steps."""


def measure(config: Config, folder: Path, prompt_tokens: int, *, on_cpu: bool) -> LearnerMemory:
    """Rehearses the learner of ``config`` on shapes alone; ``folder`` needs only the model's ``config.json``."""
    budget, offload = config.learner.microbatch_tokens, config.optimizer.offload
    learner = TorchLearner(_plain(config), folder, SHAPE, blank=True)
    groups = longest_groups(config, prompt_tokens)
    pack, _ = largest_pack(groups, budget, learner.packed, learner.vocabulary)
    rows = [packing.Row(0, group.prompt.token_ids, c.token_ids) for group in pack for c in group.completions]
    tracker = MemoryTracker(learner.vocabulary, len(rows), offload)
    tensors = learner.tensors_by_category()
    tracker.watch("weights", tensors["weights"])
    tracker.watch("reference", tensors["reference"])
    tracker.watch(HOST if offload else "float32 master weights", tensors["stepped"])
    tracker.watch(HOST if offload else "optimizer", tensors["moments"])
    with _head_as_on(on_cpu), _fused_attention(), tracker:
        tracker.phase = "learn"
        learner.rehearse(groups)
        tracker.phase = "probe"
        if config.sync.proof:
            learner.logprobs(_probe(config, prompt_tokens))
    load, learn = tracker.peaks["load"], tracker.peaks["learn"]
    probe = sum(tracker.peaks["probe"].values()) - sum(load.values()) if config.sync.proof else 0
    trained, stepped = tensors["trained"], sum(tensor.nbytes for tensor in tensors["stepped"])
    step = {**load, "gradients": 0 if offload else stepped}
    step["optimizer"] = step.get("optimizer", 0) + _step_bytes(config, trained, learner.vocabulary, on_cpu)
    passes = packing.make_microbatches(rows, budget, learner.packed)
    return LearnerMemory(
        {"load": load, "learn": learn, "step": step}, learner.parameters_trained, learner.parameters_total,
        sum(part.token_ids.numel() for part in passes), learner.packed, probe,
        sum(p.nbytes for p in trained), max(p.nbytes for p in trained),
        stepped + sum(tensor.nbytes for tensor in tensors["moments"]),
    )  # fmt: skip


def _plain(config: Config) -> Config:
    """Without what has no shape-only form: compiling, and tensors on another device (they are counted separately
    instead)."""
    learner = config.learner.model_copy(update={"compile": "off"})
    return config.model_copy(
        update={"learner": learner, "optimizer": config.optimizer.model_copy(update={"offload": False})}
    )


@contextlib.contextmanager
def _head_as_on(cpu: bool) -> Iterator[None]:
    """The output head works as on a CPU, or as on a GPU."""
    if cpu:
        token_logprobs.IN_ROWS.add(SHAPE)
    try:
        yield
    finally:
        token_logprobs.IN_ROWS.discard(SHAPE)


def _probe(config: Config, prompt_tokens: int) -> list[tuple[int, ...]]:
    """As ``learner.weight_sync.make_probe`` would make it of prompts of this length."""
    length = max(2, min(prompt_tokens, config.sync.probe_tokens))
    return [(1,) * length] * max(1, config.sync.probe_tokens // length)


def _step_bytes(config: Config, trained: Iterable[torch.Tensor], vocabulary: int, on_cpu: bool) -> int:
    name: str = config.optimizer.name
    if name == "adamw" and config.optimizer.master == "stochastic":
        name = "stochastic"
    if not on_cpu and name in ("adamw_8bit", "adamw_4bit", "stochastic"):
        return 0
    sizes = (p.numel() for p in trained if name != "muon" or vocabulary not in p.shape)  # muon steps the layers' alone
    return int(4 * STEP_COPIES.get(name, 0) * max(sizes, default=0))


# -- the model ---------------------------------------------------------------------------------------------------------


def model_size(config: ModelConfig, folder: Path) -> ModelSize:
    """Of the model in this folder, which needs only its ``config.json``."""
    held = loading.load(folder, config, SHAPE, blank=True)
    dense = loading.load(folder, config.model_copy(update={"quantize": "off"}), SHAPE, blank=True)
    head = dense.get_output_embeddings()
    linear = [part for part in dense.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    vocabulary = vocabulary_of(dense)

    def forward(tokens: int) -> int:
        tracker = MemoryTracker(vocabulary)
        tracker.watch("weights", [*dense.parameters(), *dense.buffers()])
        dense.config._attn_implementation = packing_support.plain_attention(dense)
        ids = torch.zeros(1, max(tokens, 1), dtype=torch.long, device=SHAPE)
        with _fused_attention(), tracker, torch.no_grad():
            tracker.phase = "forward"
            packing_support.decoder_of(dense)(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
        return sum(tracker.peaks["forward"].values()) - sum(tracker.peaks["load"].values())

    return ModelSize(
        config=json.loads((folder / "config.json").read_text()),
        dense=sum(p.nbytes for p in dense.parameters()),
        quantized=sum(tensor.nbytes for tensor in {id(t): t for t in nf4.stored(held)}.values()),
        head=head.weight.nbytes,
        layers=int(dense.config.num_hidden_layers),
        linear_widths=sum(part.in_features + part.out_features for part in linear),
        tied=head.weight is dense.get_input_embeddings().weight,
        vocabulary=vocabulary,
        forward=functools.cache(forward),
    )
