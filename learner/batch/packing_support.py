"""What the learner knows of model families: which may be packed, what stands behind the output head, which rows may
share a pass.

A pack is exact only where attention alone lets tokens see each other, goes through transformers' attention interface
with the pack's layout, and takes positions from ``position_ids``. ``why_not_packed`` reads that off the configuration
and the modules, and a family is packed only when ``tests/test_packing.py`` has shown its log-probs and gradients equal
to the padded ones. ``probe`` compares the two on the loaded model itself, ``check`` the padded path with the model's
own: another version of transformers, or another setting, may differ from what was tested.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from common.errors import RunFailure
from learner.batch.packing import Pack, Row, make_microbatches
from learner.distributed import is_lost
from learner.model.loading import causal_of, looks_both_ways
from learner.model.resolve import ropes

log = logging.getLogger("nanogrpo.learner")
Logprobs: TypeAlias = Callable[[Any, Pack], tuple[torch.Tensor, torch.Tensor]]
FromLogits: TypeAlias = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]

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
"""``model_type``s known to fail although nothing in their configuration shows it."""

EXACT = 1e-3
"""Mean |difference| of log-probs, nats, that rounding explains in float32 (it shows 4e-6 on SmolLM2-135M)."""
ROUGH = 0.5
"""The same in bfloat16, through the whole model by two ways (it shows 0.04 to 0.08 on made-up text)."""

ATTENDING = frozenset({"full_attention", "sliding_attention"})  # layer types that the packed attention honours


def why_not_packed(model: Any) -> str:
    """Why this model's prompts must be repeated (padded path), as half a sentence; empty when it may be packed. Nothing
    is computed; ``probe`` does."""
    return next(_reasons(causal_of(model)), "")


def _reasons(causal: Any) -> Iterator[str]:
    config = causal.config
    if getattr(config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder"
    # State-space, recurrent, convolutional and chunked layers mix tokens by place in the pass. transformers names
    # Mamba's mixers, too, linear attention.
    kinds = {str(kind) for key in ("layer_types", "layers_block_type") for kind in getattr(config, key, None) or ()}
    if unknown := sorted(kinds - ATTENDING - {"attention"}):
        yield f"its layers of the kind {', '.join(unknown)} mix neighbouring tokens of a pack"
    for name, module in causal.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            yield f"its convolution {name!r} mixes neighbouring tokens of a pack"
    if getattr(config, "attention_chunk_size", None):
        yield "its attention is cut into chunks by place in the sequence"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        yield "its position bias (ALiBi) counts tokens of the whole sequence"
    for name, _ in causal.named_parameters():
        if "sink" in name.rpartition(".")[2]:
            yield f"its attention sinks ({name}) are not known to the packed attention"
    if looks_both_ways(config):
        yield "its attention looks both ways"
    if config.model_type in REFUSED:
        yield REFUSED[config.model_type]
    if not getattr(causal, "_supports_attention_backend", False):
        yield "its attention does not go through transformers' attention interface"
    own = next(kind for kind in type(causal).__mro__ if not kind.__name__.startswith("FSDP"))  # a sharded one has two
    if not own.__module__.startswith("transformers."):
        yield "its code comes with the model and has not been tested"
    if config.model_type not in FAMILIES:
        yield f"the family {config.model_type!r} has not been tested"


def decoder_of(causal: Any) -> Any:
    """What makes the hidden states; transformers' ``get_decoder`` finds the whole model in Llama 4, and the output head
    in ModernBERT's decoder."""
    decoder = causal.get_decoder()
    return causal.model if decoder is causal or decoder is causal.get_output_embeddings() else decoder


class _Divided(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / self.by


def head_of(causal: Any) -> list[nn.Module]:
    """What makes raw logits of them: the output head, and what some families put before it."""
    config, head = causal.config, causal.get_output_embeddings()
    kind = getattr(config, "model_type", "")
    if kind == "modernbert-decoder":
        return [causal.lm_head, head]
    if kind == "minicpm3":
        return [_Divided(config.logits_scaling), head]
    if multiplier := getattr(config, "logits_mup_width_multiplier", None):  # Inkling
        return [_Divided(multiplier), head]
    return [head]


def behind_head(config: Any) -> tuple[float | None, float]:
    """``cap`` and ``factor`` of the logits ``factor x cap x tanh(raw / cap)`` (no cap: ``factor x raw``) that
    transformers makes of this family's raw ones. ``check`` finds what is not known here."""
    kind = getattr(config, "model_type", "")
    caps = (
        "final_logit_softcapping",  # Gemma 2 and later, NanoChat
        "logits_soft_cap",  # RecurrentGemma
        "output_logit_soft_cap",  # xLSTM
    )
    cap = next((value for key in caps if (value := getattr(config, key, None))), None)
    factor = 1.0
    if kind != "mpt":  # which has the key and does nothing with it
        factor *= getattr(config, "logit_scale", None) or 1.0  # Cohere
    factor *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scaling = 1.0 if kind == "minicpm3" else getattr(config, "logits_scaling", None) or 1.0
    return cap, factor * scaling if kind == "hyperclovax" else factor / scaling  # Granite divides


def check(model: Any, logprobs: Logprobs, from_logits: FromLogits, dtype: torch.dtype) -> str:
    """What is wrong with the padded path, as half a sentence, on a made-up sequence and against the model's own way;
    empty when nothing is. So the first sync does not blame the sampler for a model that the learner computes wrongly.

    ``logprobs`` and ``from_logits`` are ``learner.token_logprobs``'s, the first with device and ranks handled. It finds
    passes that fail or change the weights, models that look ahead, a head not known to ``behind_head``, and log-probs
    that differ by more than rounding.
    """
    family = causal_of(model).config.model_type
    parameters = list(model.parameters())
    written = [parameter._version for parameter in parameters]  # torch counts writes in place
    try:
        with torch.no_grad():
            ahead, behind, whole = _compared(model, logprobs, from_logits)
    except Exception as error:  # whatever a model does with a pass it was not made for
        if _is_machines(error):
            raise
        log.info("the forward pass of a %r model fails", family, exc_info=True)
        return f"a forward pass of this {family!r} model fails ({_brief(error)})"
    if written != [parameter._version for parameter in parameters]:
        return f"a forward pass of this {family!r} model changes its weights"
    if not ahead < tolerance(dtype):
        return f"this {family!r} model's log-probs depend on the tokens that follow, so it is no causal language model"
    if not behind < EXACT:
        return (
            f"this {family!r} model changes its logits behind the output head in a way that the learner does not know "
            f"(log-probs differ by {behind:.4f} nats)"
        )
    if not whole < (EXACT if dtype == torch.float32 else ROUGH):
        return f"the learner's log-probs of this {family!r} model differ from its own by {whole:.4f} nats"
    return ""


def _compared(model: Any, logprobs: Logprobs, from_logits: FromLogits) -> tuple[float, float, float]:
    """Mean |difference| of log-probs, nats: of tokens before others that are changed; of what is done behind the output
    head, ours and the model's own, in float32 whatever the model's format; of the whole padded path and the model's
    own."""
    causal = causal_of(model)
    vocabulary, device = causal.get_input_embeddings().num_embeddings, next(causal.parameters()).device
    ids = [(7 * t + 1) % vocabulary for t in range(16)]
    other = [*ids[:8], *((token + 5) % vocabulary for token in ids[8:])]
    target_K = torch.tensor(ids[8:], device=device)
    raw: list[torch.Tensor] = []

    def exactly(module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        raw.append(logits.float())
        return raw[-1]

    hook = causal.get_output_embeddings().register_forward_hook(exactly)
    causal.config._attn_implementation = "eager"  # the plainest
    try:
        logits_BTV = causal(torch.tensor([ids, other], device=device), use_cache=False).logits
    finally:
        hook.remove()
    own_BTV = logits_BTV.float().log_softmax(-1)
    own_K = own_BTV[0, 7:-1].gather(1, target_K[:, None])[:, 0]
    (pack,) = make_microbatches([Row(0, tuple(ids[:8]), tuple(ids[8:]))], 64, False, kind_of_length(causal.config))
    return (
        _mean_difference(own_BTV[0, :7], own_BTV[1, :7]),
        _mean_difference(from_logits(model, raw[0][0, 7:-1], target_K), own_K),
        _mean_difference(logprobs(model, pack)[0], own_K),
    )


def _mean_difference(values: torch.Tensor, others: torch.Tensor) -> float:
    return float((values - others).abs().mean())


def _is_machines(error: Exception) -> bool:
    """Whether the machine failed, and not the model's code."""
    return isinstance(error, torch.OutOfMemoryError | RunFailure) or is_lost(error)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}".rstrip(": ")


def probe(model: Any, logprobs: Logprobs) -> float:
    """Mean |packed - padded| log-prob, nats, on a made-up pack of two groups; infinity when it is no number. Raises
    whatever a pass raises.

    ``logprobs`` is ``learner.token_logprobs.token_logprobs`` with the device handled. Compare with ``tolerance``. It
    finds tokens that see what they must not (a neighbour's state, another group), wrong positions and a lost layout;
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
            (pack,) = make_microbatches(rows, 4096, packed)
            logprob_K, _ = logprobs(model, pack)
            order = torch.argsort(pack.row_K * 64 + pack.column_K)
            answers.append(logprob_K.float().cpu()[order.cpu()])
    difference = _mean_difference(*answers)
    return difference if math.isfinite(difference) else math.inf


def wrong_when_packed(model: Any, logprobs: Logprobs, dtype: torch.dtype) -> str:
    """What ``probe`` finds, as half a sentence; empty when nothing is wrong. Its traceback, if any, goes to the log."""
    try:
        difference = probe(model, logprobs)
    except Exception as error:  # whatever a kernel, or a model, does with a pass it was not made for
        if _is_machines(error):
            raise
        log.info("the packed pass of this model fails", exc_info=True)
        return f"its packed pass fails ({_brief(error)})"
    if difference <= tolerance(dtype):
        return ""
    if math.isinf(difference):
        return "its packed log-probs are not numbers"
    return f"its packed log-probs differ from the padded ones by {difference:.4f} nats"


def tolerance(dtype: torch.dtype) -> float:
    """The largest ``probe`` that passes for rounding, nats. SmolLM2-135M shows 4e-6 in float32 and 0.08 in bfloat16;
    with a wrong scale, positions that run on, or a shifted key it shows 0.4 to 2.9 in both (measured on a CPU)."""
    return EXACT if dtype == torch.float32 else 0.2


def plain_attention(model: Any) -> str:
    """transformers' attention for the padded path: ``sdpa``, or ``eager`` for models on which SDPA would silently leave
    something out (Gemma 2's soft-capping, gpt-oss's sinks), or that add a mask of their own to the scores and take the
    boolean one made for SDPA for numbers (GPT-J, BLOOM, MPT)."""
    causal = causal_of(model)
    capped = getattr(causal.config, "attn_logit_softcapping", None)
    return "sdpa" if getattr(causal, "_supports_sdpa", False) and not capped else "eager"


def kind_of_length(config: Any) -> Callable[[int], Hashable] | None:
    """A number of tokens to its kind, where rotary embeddings are chosen by the longest row of a pass (``dynamic`` and
    ``longrope``): rows of different kinds must not share a pass, or they would change each other. Else None."""
    bounds: list[tuple[bool, int]] = []
    for rope in ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") == "longrope":  # one of two
            bounds.append((False, rope["original_max_position_embeddings"]))
        elif "dynamic" in str(rope.get("rope_type")):  # another for every length
            bounds.append((True, config.max_position_embeddings))
    if not bounds:
        return None
    return lambda length: tuple(length > bound and (length if each else True) for each, bound in bounds)


def reset_rope(causal: Any) -> None:
    """Undoes what an earlier pass of longer rows has left of its dynamic rotary embedding: transformers would keep it
    for the next pass."""
    if "dynamic" not in str(getattr(causal.config, "rope_parameters", None)):
        return
    for part in causal.modules():
        for name, original in list(part.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                prefix = name.removesuffix("original_inv_freq")
                setattr(part, f"{prefix}inv_freq", original)
                setattr(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)
