"""What a vLLM engine stores of the weights that it was sent, compared with them bit for bit in the engine's process.

vLLM concatenates (q, k and v; the experts), shards over devices, pads, transposes and, on a CPU, packs linear layers
into blocks that cannot be read back. So each stored tensor is cut into *places*, rows that one sent tensor fills. Which
they are is found out by content when weights first come, among the sent tensors of the same layer; from then on each
place must hold the ``bit_sum`` of its own. One that holds its old values is stale, one that holds others is wrong, and
a tensor that was sent and fills no place was dropped.

- A layer that vLLM changes after loading (packs, quantizes, pads) is compared before the change; after the load it must
  still be what that made of it. A packed CPU layer must compute with the very product made then, and that product must
  give back some of the layer's columns exactly: asked for by unit vectors, it cannot round.
- What vLLM computes from a sent tensor (``_COMPUTED``) must change when that does, and only then.
- An adapter is compared number by number in the slot it is served from, scaling included (vLLM folds it into B).

Works the same on CPU and GPU, and on each shard. vLLM's own checker (``weight_checksum.py``) sees neither packed CPU
layers nor adapters, and cannot say what a hash should be. Used by sampler/engine/vllm.py; the last functions are called
in the engine's process by name.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from common.protocols import WeightHandle
from common.weights.handles import Fingerprint, Sum, bit_sum
from sampler.engine.arguments import with_head
from sampler.hf import lora_scaling

# Shapes: R rows, C columns of a tensor cut at its last dimension; C is 1 for a vector, which is concatenated too.

_COMPUTED = {"A_log": "A"}  # Mamba's -exp(A_log)
_COLUMNS = 8  # of a packed layer, asked for at each load
_VOCABULARY = 64  # vLLM pads vocabularies to multiples of this
Source = tuple[str, str]
"""A sent tensor's name, and its layout: ``""`` as it is, ``"T"`` transposed, ``"any"`` any order of its numbers,
``"cast"`` in the engine's narrower format, ``"rows a:b"`` or ``"columns a:b"`` a shard."""


class ArrivedAdapter(Fingerprint):
    """The fingerprint of an adapter that arrives, and its tensors."""

    def __init__(self, adapter_config: Mapping[str, Any]) -> None:
        super().__init__(adapter_config)
        self.kept: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        super().add(name, tensor)
        self.kept[name] = tensor.detach().clone()


class Arrived(Fingerprint):
    """The fingerprint of what arrives, and the sums of the other layouts in which the engine may keep a tensor: those
    in ``layouts`` by tensor, and all that there are of one that is not listed; without ``layouts`` only shards and
    casts."""

    def __init__(self, layouts: Mapping[str, Collection[str]] | None, rank: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks: dict[Source, tuple[int, int, int]] = {}
        """Rows, columns and sum."""
        self._layouts, self._rank, self._size, self._dtype = layouts, rank, size, dtype

    def add(self, name: str, tensor: torch.Tensor) -> None:
        super().add(name, tensor)
        rows_RC = _rows(tensor.detach())
        rows, columns = rows_RC.shape
        self.blocks[name, ""] = rows, columns, self.sums[name].bits
        listed = None if self._layouts is None else self._layouts.get(name)
        for layout in listed or self._possible(tensor):
            if layout == "cast":
                self.blocks[name, layout] = rows, columns, bit_sum(rows_RC.to(self._dtype))
            elif layout == "any":
                self.blocks[name, layout] = rows, columns, _order_free(rows_RC)
            elif layout:
                part = _part(rows_RC, layout)
                self.blocks[name, layout] = len(part), part.shape[1], bit_sum(part)

    def _possible(self, tensor: torch.Tensor) -> list[str]:
        rows, columns = _rows(tensor).shape
        layouts = ["T", "any"] if self._layouts is not None and tensor.dim() > 1 else []
        if tensor.is_floating_point() and tensor.element_size() > self._dtype.itemsize:
            layouts.append("cast")
        # Fewer parts than devices: keys and values, whose heads may be fewer.
        for parts in [count for count in range(2, self._size + 1) if self._size % count == 0]:
            part = self._rank * parts // self._size
            for kind, length in (("rows", rows), ("columns", columns)):
                if length % parts == 0:
                    layouts.append(f"{kind} {length // parts * part}:{length // parts * (part + 1)}")
        if self._size > 1:
            shard = -(-rows // _VOCABULARY) * _VOCABULARY // self._size
            layouts.append(f"rows {min(rows, shard * self._rank)}:{min(rows, shard * (self._rank + 1))}")
        return list(dict.fromkeys(layouts))


@dataclass
class _Place:
    """Rows of a stored tensor."""

    start: int
    stop: int
    sources: list[Source]
    """The sent tensors that may fill it: more than one as long as they are equal. Empty: padding."""
    bits: int
    """What it held after the load before."""


@dataclass
class _Changed:
    """A layer as it was when vLLM changed it."""

    seen: dict[str, list[int]]
    """The sums of each tensor's places, before."""
    after: dict[str, int] = field(default_factory=dict)
    product: Any = None
    """What a CPU layer computes with."""
    units_NC: torch.Tensor | None = None
    """Unit vectors, and what the product with them gives."""
    columns_NR: torch.Tensor | None = None


class StoredWeights:
    """Watches one model, whole or the shard of one device, from after the engine's start."""

    def __init__(self, model: nn.Module, rank: int = 0, size: int = 1) -> None:
        self._model, self._rank, self._size, self._loads = model, rank, size, 0
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._places: dict[str, list[_Place]] = {}
        self._from_folder: dict[str, set[str]] = {}  # the tensors of the folder that filled each
        self._own: dict[str, int] = {}  # what holds nothing that is sent
        self._arrived = Arrived(None, rank, size, self._dtype)
        self._before: dict[str, Sum] = {}  # what had been sent when it was last compared
        self._changed: dict[str, _Changed] = {}  # in this load
        self._drawn = random.Random(0)
        self._changing: dict[str, Any] = {name: layer for name, layer in model.named_modules() if _is_changed(layer)}
        self._names = {id(layer): name for name, layer in self._changing.items()}
        for method in {id(layer.quant_method): layer.quant_method for layer in self._changing.values()}.values():
            method.process_weights_after_loading = partial(self._change, method.process_weights_after_loading)

    def arriving(self) -> Arrived:
        """To watch the load that comes next with. The first is of the engine's own folder: it shows whether there are
        other than plain layouts, but its names need not be those that the learner sends."""
        self._loads += 1
        layouts: dict[str, set[str]] | None = None
        if self._loads == 2:
            plain = all(key in self._places for key, _ in self._look([]))
            layouts = None if plain else {}
            self._from_folder = {key: _names(places) for key, places in self._places.items()}
            self._places = {}
        elif self._loads > 2:
            layouts = defaultdict(set)
            for places in self._places.values():
                for name, layout in (source for place in places for source in place.sources):
                    layouts[name].add(layout)
        self._arrived, self._changed = Arrived(layouts, self._rank, self._size, self._dtype), {}
        return self._arrived

    def faults(self, sums: Mapping[str, Sum]) -> list[str]:
        """After the load: what is not stored as in ``sums``, which are those of the tensors sent."""
        arrived = self._arrived.sums
        if strange := [name for name in {**sums, **arrived} if sums.get(name) != arrived.get(name)]:
            return [f"{name} was loaded with other values than were sent" for name in strange]
        faults: list[str] = []
        filled: set[str] = set()
        for key, bits in self._look(faults):
            if (places := self._places.get(key)) is None:
                faults += self._foreign(key, bits[0])
                continue
            if key in sums and _names(places) - {key}:
                faults.append(f"{key} holds what was sent as another")  # one that came before its own
                continue
            filled |= _names(places)
            for place, sum_ in zip(places, bits, strict=True):
                faults += self._wrong(key, place, sum_)
        faults += [f"{name} was sent and is stored nowhere" for name in sums.keys() - filled if not _computed(name)]
        self._before = dict(sums)
        return faults

    # -- inside ------------------------------------------------------------------------------------------------------

    def _look(self, faults: list[str]) -> Iterator[tuple[str, list[int]]]:
        """The sums of every stored tensor's places; adds to ``faults`` the layers that are not what they were loaded
        as."""
        for name, layer in self._changing.items():
            changed = self._changed.get(name)
            if changed is None:
                keys = [f"{name}.{key}" for key in layer._parameters]
                if any(_names(self._places.get(key, [])) & self._arrived.sums.keys() for key in keys):
                    faults.append(f"{name} was not loaded and keeps its old weights")
                continue
            yield from changed.seen.items()
            now = vars(layer).get("cpu_linear")
            if now is not changed.product or not _gives(now, layer, changed):
                faults.append(f"{name} computes with other weights than those loaded last")
            tensors = dict(layer.named_parameters(recurse=False))
            if any(bit_sum(tensors[key]) != bits for key, bits in changed.after.items()):
                faults.append(f"{name} was changed after it was loaded")
        for name, parameter in self._model.named_parameters():
            owner = self._changing.get(name.rpartition(".")[0])
            if parameter.numel() and (owner is None or "cpu_linear" in vars(owner)):
                yield name, self._sums_of(name, parameter)

    def _wrong(self, key: str, place: _Place, bits: int) -> list[str]:
        """Compares a place with what was sent, and forgets those sources that it cannot be of."""
        before, place.bits = place.bits, bits
        if not place.sources:
            return [f"the padding of {key} changed"] if bits != before else []
        blocks = self._arrived.blocks
        if right := [source for source in place.sources if source in blocks and blocks[source][2] == bits]:
            place.sources = right
            return []
        name = place.sources[0][0]
        where = "" if key == name else f" in {key}"
        return [f"{name}{where} holds {'its old' if bits == before else 'other'} values"]

    def _foreign(self, key: str, bits: int) -> list[str]:
        """A tensor that no sent one fills: vLLM's own, or computed from one."""
        before, self._own[key] = self._own.get(key), bits
        owner, _, leaf = key.rpartition(".")
        sent = self._arrived.sums
        source = next((f"{owner}.{name}" for name, made in _COMPUTED.items() if made == leaf), "")
        if source in sent:
            moved = sent[source] != self._before.get(source)
            if before is not None and moved != (bits != before):
                return [f"{key}, computed from {source}, {'keeps its old values' if moved else 'changed alone'}"]
            return []
        folder = self._from_folder.get(key, set())
        if folder and not folder & sent.keys() and before in (None, bits):
            return []  # a part of the model that the learner does not have: were it sent by another name, it would fill
        columns = {block[1] for block in self._arrived.blocks.values()}
        tensor = self._model.get_parameter(key)
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] in columns:
            return [f"{key} holds nothing that was sent"]
        return [f"{key} changed, and nothing was sent for it"] if before not in (None, bits) else []

    def _sums_of(self, key: str, tensor: torch.Tensor) -> list[int]:
        """The sum of each place; of the whole tensor where it has none."""
        rows_RC = _rows(tensor.detach())
        if key not in self._places and (found := self._fill(key, rows_RC)):
            self._places[key] = found
        return [self._sum_of(rows_RC, place) for place in self._places.get(key, ())] or [bit_sum(rows_RC)]

    def _sum_of(self, rows_RC: torch.Tensor, place: _Place) -> int:
        part = rows_RC[place.start : place.stop]
        name, layout = place.sources[0] if place.sources else ("", "cast")
        if layout != "cast":
            # Kept in a wider format the numbers are the same, and go back exactly.
            sent = self._arrived.sums.get(name) or self._before.get(name)  # a swapped one may fill it before its own
            part = part.to(sent.dtype if sent else part.dtype)
        return _order_free(part) if layout == "any" else bit_sum(part)

    def _fill(self, key: str, rows_RC: torch.Tensor) -> list[_Place]:
        """The tensors, of those that have arrived, that fill this stored one."""
        sums, blocks = self._arrived.sums, self._arrived.blocks
        fits = {source: block for source, block in blocks.items() if _may_hold(key, source[0], sums)}
        known: dict[tuple[int, torch.dtype, int], list[Source]] = defaultdict(list)
        for source, (rows, columns, bits) in fits.items():
            if source[1] != "any" and columns == rows_RC.shape[1] and rows:
                dtype = rows_RC.dtype if source[1] == "cast" else sums[source[0]].dtype
                known[rows, dtype, bits].append(source)
        kinds = sorted(dict.fromkeys((rows, dtype) for rows, dtype, _ in known), key=lambda kind: -kind[0])
        places: list[_Place] = []
        start = 0
        while start < len(rows_RC):
            for rows, dtype in kinds:
                bits = bit_sum(rows_RC[start : start + rows].to(dtype))
                if start + rows <= len(rows_RC) and (rows, dtype, bits) in known:
                    places.append(_Place(start, start + rows, known[rows, dtype, bits], bits))
                    start += rows
                    break
            else:
                break
        if places and start < len(rows_RC):
            places.append(_Place(start, len(rows_RC), [], bit_sum(rows_RC[start:])))
        for source, (rows, columns, bits) in fits.items() if not places else ():
            whole = source[1] == "any" and rows * columns == rows_RC.numel()
            if whole and _order_free(rows_RC.to(sums[source[0]].dtype)) == bits:
                return [_Place(0, len(rows_RC), [source], bits)]
        return places

    def _change(self, original: Callable[[nn.Module], None], layer: nn.Module) -> None:
        """In place of a layer's ``process_weights_after_loading``."""
        name = self._names[id(layer)]
        tensors = {key: p for key, p in layer.named_parameters(recurse=False) if p.numel() and not p.is_meta}
        changed = _Changed({f"{name}.{key}": self._sums_of(f"{name}.{key}", p) for key, p in tensors.items()})
        weight = tensors.get("weight")
        if weight is not None and weight.dim() == 2:
            count = min(_COLUMNS, weight.shape[1])
            first = self._drawn.randrange(weight.shape[1] - count + 1)
            changed.columns_NR = weight.detach()[:, first : first + count].t().clone()
            changed.units_NC = weight.new_zeros(count, weight.shape[1])
            changed.units_NC[:, first : first + count].fill_diagonal_(1)
        original(layer)
        changed.product = vars(layer).get("cpu_linear")
        if changed.product is None:
            changed.after = {key: bit_sum(p) for key, p in layer.named_parameters(recurse=False)}
        self._changed[name] = changed


def _is_changed(layer: nn.Module) -> bool:
    """Whether vLLM keeps this layer otherwise than it is loaded."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    product, method = vars(layer).get("cpu_linear"), getattr(layer, "quant_method", None)
    if not callable(getattr(method, "process_weights_after_loading", None)):
        return False
    if isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
        return product is not None and product is not nn.functional.linear
    return any(True for _ in layer.named_parameters(recurse=False))


def _gives(product: Any, layer: Any, changed: _Changed) -> bool:
    """Whether the packed layer's product with unit vectors gives the columns that were packed."""
    if product is None:
        return True
    got_NR = product(changed.units_NC, layer.weight, None)
    # By value, since a sum with zeros loses the sign of -0; and some processors take subnormal numbers for 0.
    return changed.columns_NR is not None and torch.allclose(got_NR, changed.columns_NR, rtol=0, atol=1e-37)


def _may_hold(key: str, name: str, sums: Mapping[str, Sum]) -> bool:
    """Whether the stored tensor ``key`` may be filled by the sent ``name``: the one of its own name where there is one,
    else those of the same layer, and of any expert in it."""
    if key in sums:
        return key == name
    mine, theirs = ([part for part in path.split(".") if part.isdigit()] for path in (key, name))
    return theirs[: len(mine)] == mine


def _computed(name: str) -> bool:
    return name.rpartition(".")[2] in _COMPUTED


def _names(places: Collection[_Place]) -> set[str]:
    return {name for place in places for name, _ in place.sources}


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def _part(rows_RC: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "T":
        return rows_RC.t().contiguous()
    kind, _, span = layout.partition(" ")
    start, stop = map(int, span.split(":"))
    return rows_RC[start:stop] if kind == "rows" else rows_RC[:, start:stop].contiguous()


def _order_free(rows_RC: torch.Tensor) -> int:
    """A sum that no order of the numbers changes: of the squares of their bit patterns, and of these, modulo 2**64."""
    total = 0
    pattern = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows_RC.element_size()]
    for part in rows_RC.contiguous().view(pattern).flatten().split(1 << 20):
        wide = part.to(torch.int64)
        total += int((wide * wide * wide * 0x9E3779B1 + wide * wide).sum())
    return total % 2**64


# -- called in the engine's process by name ----------------------------------------------------------------------------


def reload_weights(worker: Any, handle: WeightHandle, sends_head: bool) -> Arrived:
    """Loads the weights. Returns what arrived."""
    if not hasattr(worker, "stored_weights"):
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        worker.stored_weights = StoredWeights(worker.model_runner.get_model(), rank, size)
    arrived: Arrived = worker.stored_weights.arriving()
    tensors = arrived.watch(handle.open())
    worker.reload_weights(weights_iterator=with_head(tensors) if sends_head else tensors)
    return arrived


def weight_faults(worker: Any, sums: Mapping[str, Sum]) -> list[str]:
    return list(worker.stored_weights.faults(sums))


def adapter_faults(worker: Any, lora_id: int, arrived: ArrivedAdapter) -> list[str]:
    """What of this adapter the engine does not serve as it arrived: A as it is, B times the scaling."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    manager = worker.model_runner.lora_manager._adapter_manager
    if lora_id not in manager.lora_index_to_id:
        return ["the adapter is not in the engine's slots"]
    slot = manager.lora_index_to_id.index(lora_id)
    mapper = getattr(worker.model_runner.get_model(), "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    config = arrived.adapter_config or {}
    sent: dict[tuple[str, bool], tuple[str, torch.Tensor]] = {}
    for name, tensor in arrived.kept.items():
        module, is_a = parse_fine_tuned_lora_name(name, mapper)
        if not is_a:
            scaling = lora_scaling(config, parse_fine_tuned_lora_name(name)[0])
            # As vLLM does it, in the number format that it keeps.
            tensor = tensor.to(manager.lora_config.lora_dtype)
            tensor = tensor if scaling == 1 else tensor * scaling
        sent[module, is_a] = (name, tensor)
    faults = []
    for module, layer in manager.modules.items():
        parts = manager.packed_modules.get(module) or [module]
        if not isinstance(getattr(layer, "lora_a_stacked", None), tuple):
            continue  # no linear layer: an adapter sent for it is reported at the end
        for is_a, stacks in ((True, layer.lora_a_stacked), (False, layer.lora_b_stacked)):
            pairs = [sent.pop((part, is_a), ("", None)) for part in parts]
            names, right = [name for name, _ in pairs], [tensor for _, tensor in pairs]
            if getattr(layer, "tp_size", 1) > 1 and any(names):
                cut = layer.slice_lora_a if is_a else layer.slice_lora_b
                right = cut(right) if len(right) > 1 else [cut(right[0])]
            for name, wanted, stack in zip(names, right, stacks, strict=True):
                held = stack[slot, 0]
                expected = torch.zeros_like(held)
                if wanted is not None:
                    expected[: wanted.shape[0], : wanted.shape[1]] = wanted
                if not torch.equal(held, expected):
                    faults.append(f"{name or f'the adapter of {module}'} is served with other values")
    return faults + [f"{name} was sent and is served nowhere" for name, _ in sent.values()]
