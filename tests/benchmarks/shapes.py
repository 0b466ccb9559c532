"""The published shapes of well-known models, as config.json files without weights: what a memory plan needs.

Used by ``tests/benchmarks/memory.py`` and the tests of the plan where no hub can be reached. Run on real weights they
would only be noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# layers, width, inner width, query heads, key heads, head width, vocabulary, tied output head
_LLAMA = {
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256, True),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128, 128256, True),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256, False),
}
_QWEN2 = {
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 128, 151936, True),
    "Qwen2.5-3B": (36, 2048, 11008, 16, 2, 128, 151936, True),
    "Qwen2.5-7B": (28, 3584, 18944, 28, 4, 128, 152064, False),
}
_QWEN3 = {
    "Qwen3-0.6B": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 128, 151936, True),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, 128, 151936, True),
}
FAMILIES = {"llama": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}
NAMES = tuple(name for family in FAMILIES.values() for name in family)
_OF = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def config_of(name: str) -> dict[str, Any]:
    """The contents of config.json of one of ``NAMES``."""
    family = next(family for family, models in FAMILIES.items() if name in models)
    layers, width, inner, heads, keys, head, vocabulary, tied = FAMILIES[family][name]
    return {
        "model_type": family,
        "architectures": [_OF[family]],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": head,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "dtype": "bfloat16",
    }


def write(name: str, folder: Path) -> Path:
    """``folder/name/config.json``; returns that folder."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config_of(name), indent=1))
    return place
