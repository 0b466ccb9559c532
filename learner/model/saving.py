"""The model's tensors under the names of its own files, and the trained model's folder."""

from __future__ import annotations

import copy
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn

from common.errors import RunFailure, UserError, first_line
from learner.distributed import RankGroup, full_tensor
from learner.model.loading import causal_of
from learner.model.nf4 import dense

# Of a model's folder, not of the trained model's: weights in any format, what is written for the trained one, the card.
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.npz",
    "*.index.json", "config.json", "adapter_*", "README*", ".*",
)  # fmt: skip
_together: WeakKeyDictionary[nn.Module, dict[str, frozenset[str]]] = WeakKeyDictionary()


def full_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, and every buffer that belongs to the files, under the names and in the shapes that its files have
    (``_as_in_files``), a tied output head once; what is sliced over ranks is gathered in ``dtype``, one tensor at a
    time, so that all ranks must iterate; what is held in 4 bits comes dense.
    """
    return _as_in_files(model, ((name, full_tensor(dense(tensor), dtype)) for name, tensor in held(model)))


def merged_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the base with the adapter added, one at a time; named and gathered as ``full_tensors``'."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers: dict[str, Any] = {name: part for name, part in base.named_modules() if isinstance(part, BaseTunerLayer)}

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in held(base):
            owner, _, leaf = name.rpartition(".")
            value = full_tensor(dense(tensor), dtype)
            if owner in layers and leaf == "weight":
                value = _merged(layers[owner], value.float()).to(value.dtype)
            yield name, value

    return _as_in_files(base, merged())


def held(causal: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's own parameters and persistent buffers, as they are; of layers under an adapter those of the base,
    under the names that they have without it."""
    for name, parameter in causal.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter
    for path, part in causal.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip(".").replace(".base_layer.", "."), buffer


def _as_in_files(causal: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """These, which are all that ``held`` names, under the names and in the shapes of the model's files.

    transformers holds some weights otherwise than the files do: the experts of a layer as one tensor, modules under new
    names. Every engine knows the files' names and few know those, so the weights take the way back that
    ``save_pretrained`` takes, piece by piece: only what goes into one tensor of the files waits for its other parts.
    """
    groups = names_together(causal)
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        waiting[name] = tensor
        if groups[name] <= waiting.keys():
            pieces = {part: waiting.pop(part) for part in groups[name]}
            yield from _turned_back(causal, pieces).items()
    assert not waiting, sorted(waiting)


def names_together(causal: Any) -> Mapping[str, frozenset[str]]:
    """Of each weight, by its name in memory: those with which it shares a tensor of the files, itself included. Found
    once a model, on shapes. Raises as ``check_names``."""
    if causal in _together:
        return _together[causal]
    groups: dict[str, set[str]] = {}
    owners: dict[str, str] = {}
    for name, blank in _on_meta(causal).items():
        groups[name] = {name}
        for key in _turned_back(causal, {name: blank}):
            mates = groups[owners.setdefault(key, name)] | groups[name]
            groups.update(dict.fromkeys(mates, mates))
    _together[causal] = {name: frozenset(mates) for name, mates in groups.items()}
    return _together[causal]


def check_names(model: Any) -> None:
    """Raises ``UserError`` for a model whose weights transformers cannot turn back into those of its files."""
    causal = causal_of(model)
    _turned_back(causal, _on_meta(causal))


def _on_meta(causal: Any) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty((getattr(tensor, "quant_state", None) or tensor).shape, dtype=tensor.dtype, device="meta")
        for name, tensor in held(causal)
    }


def _turned_back(causal: Any, tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(causal, tensors)  # type: ignore[no-any-return]
    except Exception as error:  # of any kind: an operation without a way back, or one that lacks what it needs
        raise UserError(
            f"model.name: this {causal.config.model_type!r} model is held in memory otherwise than in its files, and "
            f"transformers cannot turn it back for the sampler ({first_line(error)}); use another model, or an "
            "adapter (model.lora_rank)"
        ) from error


@torch.no_grad()
def _merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A float32 base weight with this layer's adapter in it."""
    weight = weight + layer.get_delta_weight("default").float()
    if "default" not in layer.lora_magnitude_vector:
        return weight
    # DoRA, equation 5 (arXiv 2402.09353): each row as long as its learned magnitude.
    magnitude = layer.lora_magnitude_vector["default"].weight.float()
    return weight * (magnitude / weight.norm(dim=1))[:, None]


def export(model: Any, source: Path, folder: Path, merged: bool, dtype: torch.dtype, ranks: RankGroup) -> None:
    """Writes a Hugging Face folder: the model with the source's tokenizer; under LoRA the adapter, or merged.

    All ranks gather, rank 0 writes.
    """
    state: dict[str, torch.Tensor] | None = None
    if merged or not hasattr(model, "peft_config"):
        tensors = merged_tensors(model, dtype) if hasattr(model, "peft_config") else full_tensors(model, dtype)
        state = {}
        for name, tensor in tensors:  # one at a time: a second whole model might not fit on the device
            if ranks.rank == 0:
                state[name] = tensor.to("cpu").contiguous()
    with ranks.raise_on_any("exporting the model"):
        if ranks.rank == 0:
            write_folder(model, source, folder, state)


def write_folder(model: Any, source: Path, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """The model's folder with these weights; without any, the adapter's. What belongs to the tokenizer, the template
    and generation is the source's, byte for byte."""
    try:
        if state is None:
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            _save(_unquantized(causal_of(model)), folder, state)
        _copy_belongings(source, folder)
    except (OSError, SafetensorError) as error:
        raise RunFailure(
            f"the model cannot be written to {str(folder)!r} ({first_line(error)}); free space on that disk"
        ) from error
    os.chmod(folder, 0o755)


def _save(model: Any, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The model with these weights. transformers refuses to write generation settings that it read without complaint
    (a temperature without do_sample, as in most chat models of 2023), so they are written separately, unchanged."""
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            model.generation_config = GenerationConfig()
        # The names are the files' already.
        model.save_pretrained(folder, state_dict=state, save_original_format=False)
    finally:
        if settings is not None:
            model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def try_export(model: Any, source: Path, ranks: RankGroup) -> None:
    """Writes all of the final model's folder but the weights, and removes it again: what would keep it from being
    written ends a run before its first step, and not after the last.

    Raises ``UserError`` for a model whose folder cannot be written.
    """
    with ranks.raise_on_any("trying to write the model's folder"), tempfile.TemporaryDirectory() as folder:
        if ranks.rank:
            return
        try:
            if hasattr(model, "peft_config"):
                model.save_pretrained(folder, save_embedding_layers=False, state_dict={})
            else:
                _save(model, Path(folder), {})
            _copy_belongings(source, Path(folder))
        except Exception as error:  # of any kind: the model's family has its own checks, and its files may be anything
            raise UserError(
                f"model.name: a model trained from {str(source)!r} could not be written ({first_line(error)}); repair "
                "the files of that folder"
            ) from error


def _copy_belongings(source: Path, folder: Path) -> None:
    # Which class a tokenizer is of goes by config.json, which peft does not write beside an adapter.
    shape = [] if (folder / "config.json").is_file() else [source / "config.json"]
    for file in belongings(source) + shape:
        copy_to = folder / file.relative_to(source)
        copy_to.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy_to)


def belongings(source: Path) -> list[Path]:
    """The files of a model's folder that its weights do not replace: whatever its tokenizer may read (for which there
    is no list: code of its own reads what it likes), generation settings, licence."""
    found = [file for file in source.iterdir() if not any(fnmatch.fnmatch(file.name, name) for name in _NOT_COPIED)]
    found += source.glob("additional_chat_templates/*.jinja")
    return sorted(file for file in found if file.is_file())


def _unquantized(model: Any) -> Any:
    """The model, or where it is held in 4 bits an empty dense one like it, to save dense weights with."""
    if not getattr(model, "is_quantized", False):
        return model
    shape = copy.deepcopy(model.config)
    del shape.quantization_config
    with torch.device("meta"):
        plain = type(model)._from_config(shape)
    plain.generation_config = model.generation_config
    return plain
