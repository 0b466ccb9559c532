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
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases on q, k and v
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer without positions
    "phi3": {},  # fused projections
    "olmo2": {},  # norms after the layers
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
    "gemma3_text": {
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {},  # norms on q and k
    "mistral": {"sliding_window": 16},  # shorter than the tests' sequences, so that the window is met
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16},  # soft-capped logits, scaled embeddings
}


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
    """Writes the model of ``family`` (a key of ``_FAMILIES``) into ``folder``; 2 layers, width 64.

    Two tokens end a completion: ``<|im_end|>`` (the tokenizer's) and ``<eos>`` (in generation_config only).
    """
    folder = Path(folder)
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        family,
        **{
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
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **_FAMILIES[family],
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norms around their own starting point (1, or 0 where the family adds 1 itself), everything else around 0.
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.1 * noise if "norm" in name else 0.25 * noise)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eos>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    return folder
