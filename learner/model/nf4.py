"""4-bit bases: how they are held, and made whole.

Under ``quantize="nf4"`` (QLoRA, arXiv 2305.14314) every linear layer but the output head is held as 4-bit codes, with
an 8-bit scale for each 64 weights and a float32 one for each 256 of those (double quantization, as vLLM's bitsandbytes
plug-in does it too): 4.13 bits a weight. Both sides must compute with the same rounded base, or the proof and the
importance weights would carry the rounding. Codes made again from dequantized weights are other codes (the scales are
rounded once more), so both sides start from the original files; a sampler that holds no 4-bit weights loads the
folder that ``dequantized`` makes, which has exactly the numbers that the learner computes with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from common.config import ModelConfig
from common.device import dtype_of

BLOCK, SUPER_BLOCK = 64, 256  # weights to an 8-bit scale, 8-bit scales to a float32 one


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def loading_arguments(config: ModelConfig, device: str) -> dict[str, Any]:
    """What makes transformers load the linear layers as NF4, a layer at a time, on the device itself."""
    from transformers import BitsAndBytesConfig

    _bitsandbytes()
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype_of(config.dtype),
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": how, "device_map": {"": device}}


def blank_nf4(model: Any, dtype: torch.dtype) -> None:
    """Puts 4-bit layers, of the right sizes and without values, in the place of the linear ones."""
    bnb = _bitsandbytes()
    state = bnb.functional.QuantState
    head = model.get_output_embeddings()
    for name, part in list(model.named_modules()):
        if not isinstance(part, nn.Linear) or part is head:
            continue
        blocks = -(-part.weight.numel() // BLOCK)
        scales = state(
            torch.empty(-(-blocks // SUPER_BLOCK)), code=torch.empty(256), blocksize=SUPER_BLOCK, dtype=torch.float32
        )
        about = state(
            torch.empty(blocks, dtype=torch.uint8), part.weight.shape, torch.empty(16), BLOCK, "nf4", dtype,
            torch.empty(()), scales,
        )  # fmt: skip
        codes = torch.empty(-(-part.weight.numel() // 2), 1, dtype=torch.uint8)
        layer = bnb.nn.Linear4bit(part.in_features, part.out_features, False, dtype, True, "nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            codes, quant_state=about, blocksize=BLOCK, quant_type="nf4", module=layer, bnb_quantized=True
        )
        layer.quant_state, layer.bias, layer.support_avx512bf16_for_cpu = about, part.bias, False
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_quantized = True


def dense(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight, as the forward pass uses them: dequantized if it is held in 4 bits."""
    about = getattr(weight, "quant_state", None)
    if about is None:
        return weight.detach()
    return _bitsandbytes().functional.dequantize_4bit(weight.data, about)  # type: ignore[no-any-return]


def weights_in(parameter: torch.Tensor) -> int:
    """How many weights this parameter holds."""
    about = getattr(parameter, "quant_state", None)
    return parameter.numel() if about is None else math.prod(about.shape)


def stored(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that the parameters are held in: themselves, and the scales of those held in 4 bits."""
    for parameter in model.parameters():
        yield parameter
        about = getattr(parameter, "quant_state", None)
        for part in (about, getattr(about, "state2", None)):
            for value in vars(part).values() if part is not None else ():
                if isinstance(value, torch.Tensor):
                    yield value
