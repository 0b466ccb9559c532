"""Tiny random models with a real tokenizer, made in a moment: the readable fakes that the tests run on.

``make_tiny(folder)`` writes a complete Hugging Face folder (float32 safetensors, config, generation config, fast
tokenizer with a ChatML template) that transformers, peft and vLLM load as they load any other. The weights are random
and much larger than a fresh model's, biases and norms included: the distributions are far from uniform, so that a
missing tensor, a wrong temperature or a shifted token moves the log-probs. It knows nothing; do not look for meaning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 384
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What the merges are learned from: a few words of English, digits, and characters of two, three and four bytes.
_CORPUS = (
    "system user assistant question answer the first letter of a word is the next number after ten is eleven",
    "which is larger seven or nine what is two plus three the answer is five <answer> </answer> <thinking> </thinking>",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 naïve café été über straße 日本語 日本 こんにちは 🙂 🎉",
)
_WINDOW: dict[str, Any] = {  # shorter than the tests' sequences, so that the window is met
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ADDED: dict[str, Any] = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {},  # attention beside the MLP
    "cohere2": _WINDOW,  # without positions where there is no window
    "cwm": {**_WINDOW, "bos_token_id": 1},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},  # two attentions a layer
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": _WINDOW,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16},  # soft-capped logits, scaled embeddings
    "gemma3_text": {**_WINDOW, "query_pre_attn_scalar": 32},
    "gemma3n_text": {**_WINDOW, **_ADDED, "num_kv_shared_layers": 0, "laurel_rank": 8},  # embeddings at every layer
    "gemma4_text": {**_WINDOW, **_ADDED, "global_head_dim": 32},
    "glm": {},
    "glm4": {},
    "glm4_moe": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "gpt2": {"n_inner": 128},  # learned positions; convolutions in name only
    "gpt_bigcode": {"n_inner": 128},  # learned positions, one key head
    "gpt_neox": {},  # a quarter of each head turns
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "llama": {},
    "ministral": {"sliding_window": 16},
    "ministral3": {},  # queries scaled by position
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
    "nanochat": {},
    "olmo": {},
    "olmo2": {},  # norms after the layers
    "olmo3": _WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},  # learned positions with an offset
    "persimmon": {},
    "phi": {},  # part of each head turns; biases everywhere, the head's too
    "phi3": {"sliding_window": 16},  # fused projections
    "phimoe": {"num_local_experts": 4},
    "qwen2": {},  # biases on q, k and v
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {},  # norms on q and k
    "qwen3_moe": _EXPERTS,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer without positions
    "starcoder2": {"sliding_window": 16},
    "vaultgemma": _WINDOW,
}
"""Families that may be packed, each with what makes it small and what is its own."""
UNPACKABLE: dict[str, dict[str, Any]] = {
    "biogpt": {},
    "bloom": {},
    "mpt": {},
    "gptj": {"rotary_dim": 16},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "falcon": {"head_dim": None, "new_decoder_architecture": True},
    "doge": {},
    "nemotron": {},
    "stablelm": {},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},  # attention sinks
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "lm_head_multiplier": 0.9,
    },
    "recurrent_gemma": {},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "layer_types": ["mamba", "attention"],
    },
    "qwen3_next": {
        **_EXPERTS,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
"""Families whose packed pass would be wrong or fail, for one reason each."""
UNTRIED: dict[str, dict[str, Any]] = {
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 32},  # no checkpointing
    "llama4_text": {  # chunks; a decoder hard to find
        "num_local_experts": 2,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 1,
    },
    "minicpm3": {  # hidden states divided before the head
        "dim_model_base": 16,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "modernbert-decoder": {"bos_token_id": 1, "cls_token_id": 2, "sep_token_id": 2, "local_attention": 16},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 32, "attn_layer_indices": [1], "mamba_chunk_size": 16},
    "falcon_mamba": {},
    "mamba2": {"num_heads": 4, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "minimax": {
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 16,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "attention"],
    },
    "rwkv": {"num_hidden_layers": 3, "rescale_every": 1, "attention_hidden_size": 64, "head_dim": None},
    "xlstm": {"num_heads": 2, "num_blocks": 2, "chunk_size": 16, "head_dim": None},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "chunk_size": 16,
        "head_dim": None,
    },
}
"""Families that are never packed, whose padded path has something of its own."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCAB_SIZE`` tokens: any text survives encoding and decoding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=1,
            show_progress=False,
        ),
    )
    assert bpe.get_vocab_size() == VOCAB_SIZE, bpe.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def make_tiny(folder: str | Path, tied: bool = True, family: str = "llama", seed: int = 0) -> Path:
    """Writes the model of ``family`` (a key of ``FAMILIES``) into ``folder``; 2 layers, width 64.

    Two tokens end a completion: ``<|im_end|>`` (the tokenizer's) and ``<eos>`` (in generation_config only).
    """
    folder = Path(folder)
    tokenizer = make_tokenizer()
    model = make_model(family, tied, seed, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eos>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    return folder


def make_model(family: str, tied: bool = True, seed: int = 0, eos: int = 3, pad: int = 0, **settings: Any) -> Any:
    """The model alone, in memory: a key of one of the three above, with further settings of its config."""
    wanted = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        **(FAMILIES | UNPACKABLE | UNTRIED)[family],
        **settings,
    }
    if wanted["head_dim"] is None:
        del wanted["head_dim"]
    config = AutoConfig.for_model(family, **wanted)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norms around their own starting point (1, or 0 where the family adds 1 itself), everything else around 0.
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.1 * noise if "norm" in name else 0.25 * noise)
    return model
