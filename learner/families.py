"""Which models may be packed: known before the run, and tried on the loaded model.

A pack is exact only where attention alone lets tokens see each other, where it goes through transformers' attention
interface with the pack's layout, and where positions come from ``position_ids``. ``why_not_packed`` reads that off
the configuration and the modules; a family is packed only when ``tests/test_packing.py`` has shown its log-probs and
gradients equal to the padded ones. ``probe`` then compares the two on the loaded model itself, since another
version of transformers or another setting of the family may differ from what was tested. Everything else learns by
the padded path. Left out: the packing itself (``learner/packing.py``) and its attention. Used by
``learner/learner.py`` when it loads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from common.errors import RunFailure
from learner.model import causal_of
from learner.packing import Pack, Row, plan

log = logging.getLogger("nanogrpo.learner")

FAMILIES = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "cwm", "diffllama", "ernie4_5", "ernie4_5_moe", "exaone4",
    "flex_olmo", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hyperclovax", "llama", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3",
    "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "starcoder2", "vaultgemma",
})  # fmt: skip
"""``model_type``s whose packed log-probs and gradients are tested equal to the padded ones."""

REFUSED = {
    "bloom": "its position bias (ALiBi) counts tokens of the whole sequence",
    "mpt": "its position bias (ALiBi) counts tokens of the whole sequence",
    "doge": "it computes a mask of its own in every layer",
    "nemotron": "it does not hand the pack's layout to its attention",
    "stablelm": "it does not hand the pack's layout to its attention",
    "recurrent_gemma": "its recurrent layers carry a state from token to token",
    "rwkv": "its recurrent layers carry a state from token to token",
    "xlstm": "its recurrent layers carry a state from token to token",
}
"""``model_type``s known to go wrong where nothing in their configuration says so."""

ATTENDING = frozenset({"full_attention", "sliding_attention"})  # layer types that the packed attention honours


def why_not_packed(model: Any, longest: int | None = None) -> str:
    """Why this model's prompts must be repeated (padded path), as half a sentence; empty when it may be packed.

    ``longest``: tokens of the longest prompt with its completion, where known: some rotary embeddings change beyond
    a length, for all rows of a pass at once. Nothing is computed; ``probe`` does.
    """
    causal = causal_of(model)
    config = causal.config
    reasons = (
        _not_causal(config),
        _mixing_layers(causal),
        _position_bias(config),
        _sinks(causal),
        _two_ways(config),
        _moving_rope(config, longest),
        _unknown(causal),
    )
    return next((reason for reason in reasons if reason), "")


def probe(model: Any, score: Callable[[Any, Pack], tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean |packed - padded| log-prob, nats, on a made-up pack of two groups; infinity when the packed pass fails.

    ``score`` is ``learner.logprobs.score`` with the model's device seen to. Compare with ``tolerance``. It finds
    tokens that see what they must not (a neighbour's state, another group), wrong positions and a lost layout;
    it is too short to meet a sliding window or a chunk of thousands of tokens, which ``why_not_packed`` judges.
    """
    tokens = causal_of(model).get_input_embeddings().num_embeddings
    drawn = torch.randint(tokens, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rows: list[Row] = []
    at = 0
    for prompt_length, lengths in ((6, (5, 1, 4)), (3, (4, 6))):
        # Each prompt, and each completion of a prompt, goes on from a beginning that another one has as well.
        prompt, at = (*drawn[62:], *drawn[at : at + prompt_length]), at + prompt_length
        for length in lengths:
            rows.append(Row(len(rows), prompt, (*drawn[61:62], *drawn[at : at + length])))
            at += length
    answers = []
    with torch.no_grad():
        for packed in (False, True):
            (pack,) = plan(rows, 4096, packed)
            try:
                logprob_K, _ = score(model, pack)
            except Exception as error:  # whatever a model does with a pass it was not made for
                if not packed or isinstance(error, torch.OutOfMemoryError | RunFailure):
                    raise
                log.info("the packed pass of this model fails: %s", str(error).partition("\n")[0])
                return math.inf
            order = torch.argsort(pack.row_K * 64 + pack.column_K)
            answers.append(logprob_K.float().cpu()[order.cpu()])
    difference = float((answers[0] - answers[1]).abs().mean())
    return difference if math.isfinite(difference) else math.inf


def tolerance(dtype: torch.dtype) -> float:
    """The largest ``probe`` that passes for rounding, nats. SmolLM2-135M shows 4e-6 in float32 and 0.08 in bfloat16;
    with a wrong scale, positions that run on, or a shifted key it shows 0.4 to 2.9 in both (measured on a CPU)."""
    return 1e-3 if dtype == torch.float32 else 0.2


def plain_attention(model: Any) -> str:
    """transformers' attention for the padded path: ``sdpa``, or ``eager`` for models on which SDPA would leave
    something out without a word (Gemma 2's soft-capping, gpt-oss's sinks), or that add a mask of their own to the
    scores and take the boolean one made for SDPA for numbers (GPT-J, BLOOM, MPT)."""
    causal = causal_of(model)
    capped = getattr(causal.config, "attn_logit_softcapping", None)
    return "sdpa" if getattr(causal, "_supports_sdpa", False) and not capped else "eager"


def _not_causal(config: Any) -> str:
    return "it is an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else ""


def _mixing_layers(causal: Any) -> str:
    """State-space, recurrent, convolutional and chunked layers: they mix tokens by place in the pass."""
    kinds = {
        str(kind) for key in ("layer_types", "layers_block_type") for kind in getattr(causal.config, key, None) or ()
    }
    # transformers names Mamba's mixers, too, linear attention.
    if unknown := sorted(kinds - ATTENDING - {"attention"}):
        return f"its layers of the kind {', '.join(unknown)} mix neighbouring tokens of a pack"
    for name, module in causal.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return f"its convolution {name!r} mixes neighbouring tokens of a pack"
    if getattr(causal.config, "attention_chunk_size", None):
        return "its attention is cut into chunks by place in the sequence"
    return ""


def _position_bias(config: Any) -> str:
    biased = getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi"
    return "its position bias (ALiBi) counts tokens of the whole sequence" if biased else ""


def _sinks(causal: Any) -> str:
    names = [name for name, _ in causal.named_parameters() if "sink" in name.rpartition(".")[2]]
    return f"its attention sinks ({names[0]}) are not known to the packed attention" if names else ""


def _two_ways(config: Any) -> str:
    return "its attention looks both ways" if getattr(config, "use_bidirectional_attention", None) else ""


def _moving_rope(config: Any, longest: int | None) -> str:
    """Rotary embeddings chosen anew by the longest row of each pass: a row's log-probs depend on its neighbours."""
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        kind, bound = rope.get("rope_type"), config.max_position_embeddings
        if kind == "longrope":
            bound = rope.get("original_max_position_embeddings", 0)
        if kind in ("dynamic", "longrope") and (longest is None or longest > bound):
            return (
                f"its rotary embedding ({kind}) changes for all rows of a pass when one is longer than {bound} tokens"
            )
    return ""


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """One, or one for each kind of layer."""
    if isinstance(parameters, dict):
        yield parameters
        for value in parameters.values():
            yield from _ropes(value)


def _unknown(causal: Any) -> str:
    kind = causal.config.model_type
    if kind in REFUSED:
        return REFUSED[kind]
    if not getattr(causal, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    own = next(one for one in type(causal).__mro__ if not one.__name__.startswith("FSDP"))  # sharded, it has two more
    if not own.__module__.startswith("transformers."):
        return "its code comes with the model and has not been tested"
    return "" if kind in FAMILIES else f"the family {kind!r} has not been tested"
