"""LoRA adapters: their configuration, what they leave out, their tensors."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import ModelConfig
from common.errors import UserError, first_line
from learner.model.loading import causal_of, on_shapes
from learner.model.nf4 import weights_in
from learner.model.resolve import is_hub_id
from learner.model.saving import held


def sends_adapter(config: ModelConfig) -> bool:
    """Whether a sampler that takes adapters gets one; else it gets full weights, merged where there is an adapter."""
    return config.lora_rank > 0 and config.lora_variant != "dora"


def adapter_config(config: ModelConfig, folder: Path) -> Any:
    """peft's configuration of the adapter that ``config`` describes. Raises ``UserError`` for wrong targets."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a fraction is right too
        lora_dropout=config.lora_dropout,
        use_rslora=config.lora_variant == "rslora",
        use_dora=config.lora_variant == "dora",
        target_modules=_targets(config, folder),
        # A hub id means the same model on any machine; a path only here.
        base_model_name_or_path=config.name if is_hub_id(config.name) else str(folder),
        revision=config.revision if is_hub_id(config.name) else None,
        task_type="CAUSAL_LM",
    )


def _targets(config: ModelConfig, folder: Path) -> list[str]:
    """The modules that get an adapter, by their last names, or by whole names where a pattern chose them; from the
    model's shape alone."""
    asked, label = list(config.lora_targets), f"model.lora_targets={list(config.lora_targets)}"
    model = on_shapes(folder, config)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {name: part for name, part in model.named_modules() if name}
    if asked == ["all-linear"]:
        linear = (name for name, part in names.items() if isinstance(part, nn.Linear) and part is not head)
        inner = {name.split(".")[-1] for name in linear}
        if not (inner := inner - _taken_for_experts(model, inner)):
            raise UserError(f"{label}: this model has no linear layer that can take an adapter; set model.lora_rank=0")
        return sorted(inner)
    pattern = asked[0] if len(asked) == 1 and not re.fullmatch(r"[\w.-]+", asked[0]) else ""
    try:
        chosen = [
            name
            for name in names
            if (re.fullmatch(pattern, name) if pattern else any(f".{name}".endswith(f".{one}") for one in asked))
        ]
    except re.error as error:
        raise UserError(f"{label} is not a regular expression ({error}); fix it, or list module names") from None
    for name in chosen:
        if names[name] is head or names[name] is embeddings:
            tied = " (which are one weight here)" if getattr(model.config, "tie_word_embeddings", False) else ""
            raise UserError(
                f"{label} takes in {name!r}, but adapters on the embeddings or the output head{tied} are not trained "
                "here; leave it out ('all-linear' does)"
            )
    if not chosen:
        known = sorted({name.split(".")[-1] for name, part in names.items() if isinstance(part, nn.Linear)})
        raise UserError(f"{label} is no module of this model; its linear layers are {', '.join(known)}")
    if experts := _taken_for_experts(model, {name.split(".")[-1] for name in chosen} | ({*asked} - {pattern})):
        raise UserError(
            f"{label} names {', '.join(sorted(experts))}, but this model's experts are held as one tensor, which takes "
            "no adapter here; leave them out ('all-linear' does)"
        )
    return sorted(name for name in chosen if isinstance(names[name], nn.Linear)) if pattern else asked


def _taken_for_experts(model: Any, names: Iterable[str]) -> set[str]:
    """Of these module names, those that peft takes for the experts of such a model, which transformers holds as one
    tensor: it would put an adapter of another kind on that tensor, and none on a dense layer of the same name."""
    from peft import LoraConfig

    if importlib.util.find_spec("peft.utils.transformers_weight_conversion") is None:  # a peft that does not do so
        return set()
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = set()
    for name in names:
        alone = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(alone, model=model, conversions=None)
        except ValueError:  # it belongs to a part that must be named with others
            found.add(name)
        if alone.target_parameters:
            found.add(name)
    return found


def left_out(model: Any, config: ModelConfig) -> list[str]:
    """What ``lora_targets=["all-linear"]`` and ``quantize`` do not reach in this model's layers, a sentence each: both
    are for linear layers, and the experts of most models are not (transformers holds those of a layer as one tensor).
    """
    causal = causal_of(model)
    adapted = {name for name, part in causal.named_modules() if hasattr(part, "lora_A")}
    inside = [(name, p) for name, p in held(causal) if p.dim() > 1 and re.search(r"\.\d+\.", name)]
    every = sum(weights_in(p) for _, p in inside)
    said = []
    for requested, missed, what in (
        (config.lora_rank > 0 and list(config.lora_targets) == ["all-linear"],
         [(name, p) for name, p in inside if name.rpartition(".")[0] not in adapted],
         "model.lora_targets=['all-linear'] puts no adapter on {:.1%} of the weights in the layers (no linear layers, "
         "or of the same name as experts)"),
        (config.quantize != "off", [(name, p) for name, p in inside if getattr(p, "quant_state", None) is None],
         f"model.quantize={config.quantize!r} leaves {{:.1%}} of the weights in the layers as they are (no linear "
         "layers)"),
    ):  # fmt: skip
        if requested and missed:
            kinds = dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name, _ in missed)
            share = sum(weights_in(p) for _, p in missed) / every
            said.append(f"{what.format(share)}: {', '.join(kinds)}")
    return said


def adapter_dict(model: Any) -> dict[str, Any]:
    """The contents of ``adapter_config.json`` for this peft model: plain JSON values."""
    values = model.peft_config["default"].to_dict()
    return json.loads(json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def add_adapter(model: Any, config: ModelConfig, folder: Path, seed: int) -> Any:
    """The model under a fresh LoRA adapter (float32; no change at first), in evaluation mode. Raises ``UserError`` for
    wrong targets."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        return get_peft_model(model, adapter_config(config, folder)).eval()
    except ValueError as error:
        raise UserError(f"model.lora_targets={list(config.lora_targets)}: {first_line(error)}") from None


def adapter_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    """The adapter's tensors under the names of peft's ``adapter_model.safetensors``."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub about the base model, at every sync.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
