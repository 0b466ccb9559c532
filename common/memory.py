"""How a sampler back end estimates the memory that it will need.

``memory_needed(setup, options, model, room) -> SamplerMemory`` is an optional attribute of a back end
(``common.protocols.Sampler``); the memory plan asks it. Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.device import dtype_of

GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """The size of a model in its number format, without loading its weights."""

    config: Mapping[str, Any]
    """The contents of its config.json."""
    dense: int
    """Its weights, a tied output head once."""
    quantized: int
    """The same with those in 4 bits that ``model.quantize`` puts there."""
    head: int
    layers: int
    linear_widths: int
    """The in and out widths of every linear layer but the head, added up: times its rank, an adapter's weights."""
    tied: bool
    vocabulary: int
    forward: Callable[[int], int]
    """The activations of a forward pass of so many tokens without gradient."""


@dataclass(frozen=True)
class Room:
    """The memory available to the sampler; None where it is unknown."""

    total: int | None
    """All of the device's memory."""
    free: int | None
    """What of it is free when the sampler starts, after its context on a GPU."""
    probe_tokens: int
    """Of the proof of a sync; 0 without one."""


@dataclass(frozen=True)
class OptionValues:
    """Values of one of the back end's options that take less memory, in the order to try them."""

    name: str
    values: tuple[Any, ...]
    cost: str
    """In words, for people."""
    is_series: bool = False
    """Each goes further than the one before it: where one does not help, the next will not either."""


@dataclass(frozen=True)
class SamplerMemory:
    """What a sampler takes of its device."""

    held: Mapping[str, int] = field(default_factory=dict)
    """While it is awake, by part."""
    activations: int = 0
    """Besides, while it writes."""
    probe: int = 0
    """Besides, while it answers the proof's probe."""
    asleep: Mapping[str, int] = field(default_factory=dict)
    """What ``sleep`` leaves, by part."""
    asleep_on_host: int = 0
    """What waits in host memory meanwhile."""
    cache: int = 0
    """The key-value cache, which ``held`` contains."""
    cache_per_token: int = 0
    shortfall: int = 0
    """Bytes missing for the least that it starts with."""
    notes: tuple[str, ...] = ()
    """Sentences for people."""
    cheaper: tuple[OptionValues, ...] = ()


def cache_bytes_per_token(model_config: Mapping[str, Any], dtype: str, tensor_parallel: int = 1) -> int:
    """Keys and values of one token in all layers, on each device; ``model_config`` is a config.json."""
    config = model_config.get("text_config") or model_config
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads", 16)
    width = config.get("head_dim") or config.get("hidden_size", 1024) // config.get("num_attention_heads", 16)
    size = dtype_of(dtype).itemsize
    return int(config.get("num_hidden_layers", 24) * 2 * max(1, heads // tensor_parallel) * width * size)
