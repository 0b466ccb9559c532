"""Loading the model from its folder, whole or on shapes alone, and how its layers compute: compiled, checkpointed, in
training mode where that changes nothing."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.config import ModelConfig
from common.device import dtype_of
from common.errors import UserError, first_line
from learner.model import intact
from learner.model.nf4 import blank_nf4, loading_arguments
from learner.model.resolve import config_json

# At their import, which may be transformers' doing: kernels that nothing here needs are missing, and the like.
for _noisy in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


def check_files(folder: Path, config: ModelConfig) -> None:
    """Raises ``UserError`` for a model that cannot be loaded from its files, by their headers and their first and last
    numbers. Not for one with code of its own, which may do as it likes while it is loaded."""
    label = f"model.name={config.name!r}"
    if "auto_map" not in config_json(folder):
        load(folder, config.model_copy(update={"quantize": "off"}), "meta")
    intact.refuse_not_finite_samples(folder, label)


def load(folder: Path, config: ModelConfig, device: str, attention: str = "eager", *, blank: bool = False) -> Any:
    """The causal language model on ``device``, in ``config.dtype``, without dropout until ``train()`` is called.

    ``blank`` makes it from its shape alone, reading no weights: for fake tensors (``learner/memory_estimate.py``). On
    the device ``meta`` the headers of its files are read, and no weights.
    Raises ``UserError`` for a model that transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    label = f"model.name={config.name!r}"
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        if getattr(shape, "is_encoder_decoder", False):
            raise UserError(f"{label} is an encoder-decoder; name a causal language model")
        if looks_both_ways(shape):
            raise UserError(f"{label}: in this model tokens see those that follow; name a causal language model")
        if hasattr(shape, "rescale_every"):
            # Else RWKV halves the weights of later layers, in place, in its first pass in evaluation mode, and these
            # would be trained, sent and saved. Without it the outputs are the same but for float16's range.
            shape.rescale_every = 0
        how = {
            "dtype": dtype_of(config.dtype), "attn_implementation": attention,
            "trust_remote_code": config.trust_remote_code,
        }  # fmt: skip
        if blank:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(shape, **how)
                if config.quantize == "nf4":
                    blank_nf4(model, dtype_of(config.dtype))
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
            model.config.use_cache = False
            return model.eval()
        quantized = loading_arguments(config, device) if config.quantize == "nf4" else {}
        if device == "meta":
            quantized = {"device_map": device}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=shape, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, and refused
            **how, **quantized,
        )  # fmt: skip
        model, report = loaded
    except (torch.OutOfMemoryError, UserError):
        raise
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{label} cannot be loaded: {first_line(error)}") from error
    # transformers fills what is missing with random numbers and only logs it.
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UserError(
            f"{label}: its files lack {len(absent)} weights or hold them in another shape "
            f"({', '.join(absent[:3])}...); download or convert it again"
        )
    for name, parameter in model.named_parameters():
        intact.refuse_not_finite(name, parameter, label)
    if not quantized:
        model = model.to(device)
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # Else the first pass without gradients would repack the layer for good: scales rounded to bfloat16, and a
            # product through which no gradient goes back.
            part.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model.eval()


def looks_both_ways(config: Any) -> bool:
    """Whether tokens see those after them: the model is an encoder (EmbeddingGemma), whatever class it is loaded as.
    "vision" is about the tokens of an image alone."""
    return getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")


def on_shapes(folder: Path, config: ModelConfig) -> Any:
    """The model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)


def layer_matrices(model: Any) -> set[str]:
    """The names of the matrices inside the layers: those of numbered modules; no embedding, no output head."""
    causal = causal_of(model)
    outer = {id(p) for part in (causal.get_input_embeddings(), causal.get_output_embeddings()) if part is not None
             for p in part.parameters()}  # fmt: skip
    return {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2 and id(p) not in outer and any(piece.isdigit() for piece in name.split("."))
    }


def compiles(requested: str, device: str) -> bool:
    """Whether ``learner.compile`` is to be done. Raises ``UserError`` for ``on`` where a CPU has no C++ compiler."""
    able = device != "cpu" or any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    if requested == "on" and not able:
        raise UserError("learner.compile='on' needs a C++ compiler on a CPU; install g++, or set it to 'auto' or 'off'")
    return able and requested != "off"


def compile_layers(model: Any) -> None:
    """Has each decoder layer compiled when it is first used; all of them share what is made. Attention is left as it
    is."""
    causal = causal_of(model)
    names = set(getattr(causal, "_no_split_modules", None) or ())
    for layer in (part for part in causal.modules() if type(part).__name__ in names):
        layer.compile(dynamic=True)


def checkpoint_layers(model: Any) -> None:
    """Has the activations of each decoder layer computed again in the backward pass, inside ``training``.

    Raises ``UserError`` for a family whose layers transformers cannot compute again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    causal = causal_of(model)
    layers: list[Any] = [part for part in causal.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers or not getattr(causal, "supports_gradient_checkpointing", False):
        raise UserError(
            f"learner.gradient_checkpointing=true does not work with a {causal.config.model_type!r} model, whose "
            "layers transformers cannot compute again; set it to false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(_computed_again, layer)


def _computed_again(layer: nn.Module, call: Callable[..., Any], *inputs: Any) -> Any:
    """A checkpointed call of this layer. Its training flag, which makes transformers checkpoint it, is down while it
    computes."""

    def computed(*inputs: Any) -> Any:
        flag, layer.training = layer.training, False
        try:
            return call(*inputs)
        finally:
            layer.training = flag

    return checkpoint(computed, *inputs, use_reentrant=False)


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    """Inside, an adapter's dropout acts and layers that ``checkpoint_layers`` has marked are checkpointed. The model
    itself stays in evaluation mode: the sampler is, and in training mode routers draw experts at random, inputs get
    noise, and whole layers are skipped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts: list[nn.Module] = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    adapted: list[Any] = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    for layer in adapted:
        parts += [layer, *layer.lora_dropout.modules()]
    assert not any(part.training for part in parts)
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part in parts:
            part.training = False


def causal_of(model: Any) -> Any:
    """The causal language model under a possible adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
