"""What a sampler back end is asked and answers about the memory it will need; the memory plan asks.

``memory_needed(setup, options, model, room) -> SamplerMemory`` is an optional attribute of a back end
(``common.protocols.Sampler``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """A model whose weights nobody has loaded; sizes in bytes, of the setup's number format."""

    config: Mapping[str, Any]
    """The contents of its config.json."""
    weights: int
    """As ``SamplerSetup.quantize`` asks for them, a tied output head once."""
    head: int
    adapter: int
    """Of the adapter that ``SamplerSetup.adapter`` names; 0 without."""
    kv_per_token: int
    """Keys and values of one token in all layers."""
    tied: bool
    vocabulary: int
    forward: Callable[[int], int]
    """The activations of a forward pass of so many tokens without gradient."""


@dataclass(frozen=True)
class Room:
    """What the sampler is to fit into."""

    total: int | None
    """All of the device's memory, bytes; None where nobody knows."""
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
    """Bytes of the sampler's device, by part."""

    held: Mapping[str, int] = field(default_factory=dict)
    """All the time while it is awake."""
    activations: int = 0
    """Besides, while it writes."""
    probe: int = 0
    """Besides, while it answers the proof's probe."""
    asleep: Mapping[str, int] = field(default_factory=dict)
    """What ``sleep`` leaves; the same as ``held`` where it gives nothing back."""
    asleep_on_host: int = 0
    """What waits in host memory meanwhile."""
    cache: int = 0
    """The key-value cache, which ``held`` contains."""
    cache_per_token: int = 0
    shortfall: int = 0
    """Bytes that it lacks for the least that it starts with."""
    notes: tuple[str, ...] = ()
    """Sentences for people."""
    cheaper: tuple[OptionValues, ...] = ()
