"""The learner's memory before the run: its own code on tensors that have a shape and no memory.

The model is built on torch's meta device and updated there: the packing, forward pass, output head, loss, backward pass
and optimizer of the run, on the largest pack that the run can make (``learner/rehearsal.py``). A ``Ledger`` sees every
operation and counts the storage alive, by part.

Left out: the sampler, who is awake when and what a CPU's heap makes of it (``deploy/memory_plan/estimate.py``), and
whatever lies outside torch's tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from common.config import Config
from learner import token_logprobs
from learner.batch import packing, packing_support
from learner.batch.packing import Row
from learner.model import loading, nf4
from learner.rehearsal import largest_pack, longest_groups, repeated, untouched, vocabulary_of
from learner.torch_learner import TorchLearner

aten = torch.ops.aten
SHAPE = "meta"


# -- counting ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most bytes alive at once in a phase, and what they were."""

    bytes: int
    parts: Mapping[str, int]


class Ledger(TorchDispatchMode):
    """Counts the storage of every shape-only tensor made while it is active, from its making to its end.

    Numbers asked of such a tensor are 1, and its copy on the host is an uninitialised one: losses and norms are read
    that way, and no shape hangs on them.
    """

    def __init__(self, vocabulary: int, offload: bool = False) -> None:
        super().__init__()
        self.phase = "load"
        self.peaks: dict[str, Peak] = {}
        self.trained: set[tuple[int, ...]] = set()
        self.rows = 1
        """Completions of the pack: how many different ones an index can name."""
        self._vocabulary, self._offload = vocabulary, offload
        self._held: Counter[str] = Counter()
        self._total = 0
        self._known: dict[int, tuple[str, int, Any]] = {}  # storage -> part, bytes, weak reference

    def watch(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Counts these as ``part``, from now on."""
        for tensor in tensors:
            for piece in _pieces(tensor):
                self._see(piece, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device.type == SHAPE:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten._to_copy.default and args[0].device.type == SHAPE and _to_host(kwargs):
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten._unique2.default and args[0].device.type == SHAPE:
            rows = args[0].new_empty(self.rows)
            return rows, torch.empty_like(args[0]), torch.empty_like(rows)
        out = func(*args, **kwargs)
        extra = _scratch(func, args)
        if extra:
            self._add("scratch", extra)
        zeros = func is aten.zeros_like.default
        leaves = [out] if isinstance(out, torch.Tensor) else tree_flatten(out)[0]
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device.type == SHAPE:
                self._see(leaf, self._part_of(leaf, zeros))
        if extra:
            self._take_off("scratch", extra)
        return out

    def _see(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not (size := storage.nbytes()):
            return
        self._known[key] = (part, size, weakref.ref(storage, lambda _: self._gone(key)))
        self._add(part, size)

    def _add(self, part: str, size: int) -> None:
        if part.startswith("host"):
            return
        self._held[part] += size
        self._total += size
        before = self.peaks.get(self.phase)
        if before is None or self._total > before.bytes:
            self.peaks[self.phase] = Peak(self._total, dict(self._held))

    def _gone(self, key: int) -> None:
        part, size, _ = self._known.pop(key)
        self._take_off(part, size)

    def _take_off(self, part: str, size: int) -> None:
        if part.startswith("host"):
            return
        self._held[part] -= size
        self._total -= size

    def _part_of(self, tensor: torch.Tensor, zeros: bool) -> str:
        shape = tuple(tensor.shape)
        if self._offload and shape in self.trained and tensor.dtype == torch.float32:
            return "host gradients"
        if self.phase == "step":
            return "optimizer"
        if (zeros or torch._C._current_graph_task_id() != -1) and shape in self.trained:
            return "gradients"  # blank ones, or in the backward pass
        if len(shape) > 1 and shape[-1] == self._vocabulary:
            return "output head"
        return "activations"


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's own storage, or those of the tensors that a wrapper (torchao's) is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _pieces(getattr(tensor, name))
    else:
        yield tensor


def _to_host(kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"


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
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


# -- the measurement ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LearnerMemory:
    """What a learner takes, by phase (bytes)."""

    phases: Mapping[str, Peak]
    """``load`` (resident from then on), ``score`` (passes without gradient, where there are any), ``learn``, ``step``
    (the optimizer's). Parts named ``host ...`` are not on the device and not counted."""
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
    """Runs the learner of ``config`` on shapes alone; ``folder`` needs only the model's ``config.json``."""
    if on_cpu:
        token_logprobs.IN_ROWS.add(SHAPE)  # the output head works as on a CPU
    try:
        return _measure(config, folder, prompt_tokens, on_cpu)
    finally:
        token_logprobs.IN_ROWS.discard(SHAPE)


def _measure(config: Config, folder: Path, prompt_tokens: int, on_cpu: bool) -> LearnerMemory:
    offload = config.optimizer.offload
    learner = TorchLearner(_plain(config), folder, SHAPE, blank=True)
    model, optimizer = learner._model, learner._optimizer
    optimizer._stochastic = optimizer._compiled = False  # no random state here, and nothing to compile
    ledger = Ledger(vocabulary_of(model), offload)
    ledger.trained = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    ledger.watch("weights", [*nf4.stored(model), *model.buffers()])
    if learner._reference is not None:
        ledger.watch("reference", nf4.stored(learner._reference))
    masters, moments = _optimizer_tensors(optimizer)
    ledger.watch("host masters" if offload else "float32 masters", masters)
    ledger.watch("host moments" if offload else "optimizer", moments)
    _still_where_fused(optimizer, on_cpu)
    learner._optimizer = _Phased(optimizer, ledger)  # type: ignore[assignment]
    groups = longest_groups(config, prompt_tokens)
    pack, more = largest_pack(groups, config.learner.microbatch_tokens, learner.packed, vocabulary_of(model))
    ledger.rows = sum(len(group.completions) for group in pack)
    with _fused_attention(), ledger, untouched(learner):
        ledger.phase = "learn"
        # A second pass finds the first one's gradients, and what it left free.
        learner.update(repeated(pack, 2 if more else 1, vocabulary_of(model)))
        ledger.phase = "probe"
        if config.sync.proof:
            learner.logprobs(_probe(config, prompt_tokens))
    resident = ledger.peaks["load"].bytes
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    probe = ledger.peaks.pop("probe").bytes - resident if config.sync.proof else 0
    rows = [Row(0, group.prompt.token_ids, one.token_ids) for group in pack for one in group.completions]
    passes = packing.make_microbatches(rows, config.learner.microbatch_tokens, learner.packed)
    tokens = sum(one.token_ids.numel() for one in passes)
    return LearnerMemory(
        ledger.peaks, learner.parameters_trained, learner.parameters_total, tokens, learner.packed,
        probe, sum(trained), max(trained), sum(t.nbytes for t in optimizer.state().values()),
    )  # fmt: skip


def _probe(config: Config, prompt_tokens: int) -> list[tuple[int, ...]]:
    """As ``learner.weight_sync.probe_of`` would make it of prompts of this length."""
    length = max(2, min(prompt_tokens, config.sync.probe_tokens))
    return [(1,) * length] * max(1, config.sync.probe_tokens // length)


def _plain(config: Config) -> Config:
    """Without what has no shape-only form: compiling, and tensors on another device (they are told apart instead)."""
    return config.model_copy(
        update={
            "learner": config.learner.model_copy(update={"compile": "off"}),
            "optimizer": config.optimizer.model_copy(update={"offload": False}),
        }
    )


SHALLOW = (2, 4)  # layers


def measure_quickly(config: Config, folder: Path, prompt_tokens: int, *, on_cpu: bool) -> LearnerMemory:
    """``measure`` of two shallow copies of the model, the other layers taken to be like those between them."""
    shape = json.loads((folder / "config.json").read_text())
    layers = int(shape.get("num_hidden_layers") or 0)
    if layers <= SHALLOW[1] + 1:
        return measure(config, folder, prompt_tokens, on_cpu=on_cpu)
    found = []
    for count in SHALLOW:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "config.json").write_text(json.dumps(_shallower(shape, layers, count)))
            for file in folder.glob("*.py"):  # a model with code of its own
                (Path(place) / file.name).symlink_to(file.absolute())
            found.append(measure(config, Path(place), prompt_tokens, on_cpu=on_cpu))
    low, high = found
    times = (layers - SHALLOW[1]) / (SHALLOW[1] - SHALLOW[0])

    def on(one: int, other: int) -> int:
        return int(other + max(0, other - one) * times)

    phases = {}
    for name, peak in high.phases.items():
        before = low.phases.get(name, peak)
        parts = {part: on(before.parts.get(part, 0), size) for part, size in peak.parts.items()}
        phases[name] = Peak(sum(parts.values()), parts)
    return LearnerMemory(
        phases,
        on(low.parameters_trained, high.parameters_trained),
        on(low.parameters_total, high.parameters_total),
        high.pack_tokens,
        high.packed,
        on(low.probe, high.probe),
        on(low.trained_bytes, high.trained_bytes),
        high.largest_trained,
        on(low.state_bytes, high.state_bytes),
    )


def _shallower(shape: dict[str, Any], layers: int, count: int) -> dict[str, Any]:
    """The same config.json for so many layers; lists of one entry a layer are cut."""
    cut = {key: value[:count] if isinstance(value, list) and len(value) == layers else value
           for key, value in shape.items()}  # fmt: skip
    return cut | {"num_hidden_layers": count} | ({"max_window_layers": count} if "max_window_layers" in cut else {})


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is counted of a model, in bytes of its number format unless said otherwise."""

    bytes: int
    """As the learner holds it, a tied head once."""
    dense_bytes: int
    """The same where nothing is in 4 bits."""
    head_bytes: int
    layer_bytes: int
    layers: int
    tied: bool
    vocabulary: int
    linear: tuple[tuple[int, int], ...]
    """In and out widths of every linear layer but the head."""

    def adapter_bytes(self, rank: int) -> int:
        """Of an adapter on all of them, in 16 bits, as a sampler holds it."""
        return 2 * rank * sum(one + other for one, other in self.linear)


def shape_of(config: Config, folder: Path) -> Shape:
    model = loading.load(folder, config.model, SHAPE, blank=True)
    dense = loading.load(folder, config.model.model_copy(update={"quantize": "off"}), SHAPE, blank=True)
    head, embeddings = dense.get_output_embeddings(), dense.get_input_embeddings()
    linear = [part for part in dense.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    layers = int(dense.config.num_hidden_layers)
    return Shape(
        sum(t.untyped_storage().nbytes() for t in {id(t): t for t in nf4.stored(model)}.values()),
        sum(p.nbytes for p in dense.parameters()),
        head.weight.nbytes,
        (sum(p.nbytes for p in dense.parameters()) - head.weight.nbytes) // layers,
        layers,
        head.weight is embeddings.weight,
        int(head.weight.shape[0]),
        tuple((part.in_features, part.out_features) for part in linear),
    )


def forward_bytes(config: Config, folder: Path, tokens: int) -> int:
    """The activations of a forward pass of so many tokens without gradient, one layer's at a time: bytes."""
    shape = json.loads((folder / "config.json").read_text())
    layers = int(shape.get("num_hidden_layers") or SHALLOW[0])
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(_shallower(shape, layers, min(layers, SHALLOW[0]))))
        model = loading.load(Path(place), config.model.model_copy(update={"quantize": "off"}), SHAPE, blank=True)
    ledger = Ledger(vocabulary_of(model))
    ledger.watch("weights", [*model.parameters(), *model.buffers()])
    model.config._attn_implementation = packing_support.plain_attention(model)
    ids = torch.zeros(1, max(tokens, 1), dtype=torch.long, device=SHAPE)
    with _fused_attention(), ledger, torch.no_grad():
        ledger.phase = "sample"
        packing_support.decoder_of(model)(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
    return ledger.peaks["sample"].bytes - ledger.peaks["load"].bytes


class _Phased:
    """The optimizer, telling the ledger when it works."""

    def __init__(self, optimizer: Any, ledger: Ledger) -> None:
        self._optimizer, self._ledger = optimizer, ledger

    def step(self, *arguments: Any) -> Any:
        self._ledger.phase = "step"
        answer = self._optimizer.step(*arguments)
        self._ledger.phase = "learn"
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _still_where_fused(optimizer: Any, on_cpu: bool) -> None:
    """torch's fused step, and torchao's compiled one on a GPU, take no memory to speak of and know no shape-only
    tensors; the others are run."""
    for part in optimizer._optimizers:
        fused = any(group.get("fused") for group in part.param_groups)
        if fused or (not on_cpu and type(part).__module__.startswith("torchao")):
            part.step = lambda *_: None


def _optimizer_tensors(optimizer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The float32 copies that the optimizer steps, and its moments: what its ``state`` names."""
    state = optimizer.state()
    masters = [value for name, value in state.items() if name.endswith("/master")]
    return masters, [value for name, value in state.items() if not name.endswith(("/master", "/weight"))]


def _scratch(func: Any, args: Sequence[Any]) -> int:
    """Bytes that an operation takes and gives back inside its kernel, where nothing sees them."""
    if func is aten.logsumexp.default:  # exp(input - max), before it is summed
        return int(args[0].numel() * args[0].element_size())
    return 0
