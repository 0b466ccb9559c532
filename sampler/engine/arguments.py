"""What vLLM's engine is started with: the arguments that are ours, those that a user may set, its cache in bytes; and
the output head of a tied model, which has to be sent as a weight of its own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.memory import cache_bytes_per_token
from common.types import SamplerSetup
from sampler.hf import is_tied

if TYPE_CHECKING:
    import torch

# Set by nanoGRPO, because the loop depends on them; each with the setting to use instead.
OURS = {
    "model": "model.name",
    "dtype": "model.dtype",
    "tokenizer": "model.name",
    "trust_remote_code": "model.trust_remote_code",
    "seed": "train.seed",
    "enable_lora": "model.lora_rank",
    "lora_target_modules": "model.lora_targets",
    "max_lora_rank": "model.lora_rank",
    "max_model_len": "sampler.max_prompt_tokens and sampler.max_tokens",
    "logprobs_mode": "nothing: the learner needs the log-probs of the distribution drawn from",
    "load_format": "nothing: the weights come from the learner",
    "hf_overrides": "nothing: the output head is untied here",
    "skip_tokenizer_init": "nothing: stop strings need the tokenizer",
    "tensor_parallel_size": "sampler.tensor_parallel",
}
HEAD = "lm_head.weight"
# Names of the input embedding, which is also the head of a tied model.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# Models whose vLLM class computes logits with the embedding module itself: nothing to untie, a reload reaches it.
HEAD_IS_EMBEDDING = ("gemma2", "gemma3n_text", "cohere", "cohere2", "cohere2_moe")
CPU_BLOCK = 32  # tokens of a block of the cache on the CPU


def engine_arguments(setup: SamplerSetup, model_config: Mapping[str, Any], untie: bool) -> dict[str, Any]:
    """The arguments of ``vllm.LLM`` for this setup, before the user's options; ``model_config`` is the folder's
    config.json, ``untie`` gives a tied output head weights of its own.

    Raises ``UserError`` for a base in 4 bits on a GPU without vLLM's bitsandbytes plugin, and for an adapter on a
    mixture of experts on a CPU, where vLLM has no kernel for the experts beside one.
    """
    on_cpu = setup.device == "cpu"
    arguments: dict[str, Any] = {
        "model": setup.model_folder,
        "dtype": setup.dtype,
        "trust_remote_code": setup.trust_remote_code,
        "max_model_len": setup.max_model_tokens,
        "max_num_seqs": setup.max_sequences,
        "seed": setup.seed,
        # On the CPU the logits of the distribution drawn from, of which chosen_logprobs takes the log-prob.
        "logprobs_mode": "processed_logits" if on_cpu else "processed_logprobs",
        "max_logprobs": 1,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if setup.adapter is None:  # the weights come through load_weights; with an adapter the base stays as loaded
        arguments["load_format"] = "dummy"
        if untie:
            arguments["hf_overrides"] = {"tie_word_embeddings": False}
    else:
        if on_cpu and _has_experts(model_config):
            raise UserError(
                f"model.lora_rank={setup.adapter.rank}: vLLM on a CPU serves no adapter on a mixture of experts; set "
                "model.lora_variant='dora' (merged weights are sent), model.lora_rank=0, or sampler.name='hf'"
            )
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(setup.adapter.rank)}
        # By default vLLM wraps the output head too, and on the CPU prompt log-probs then fail.
        arguments["lora_target_modules"] = setup.adapter.layers
        if setup.quantize == "nf4" and not on_cpu:
            if importlib.util.find_spec("vllm_bnb_plugin") is None:
                raise UserError(
                    "model.quantize='nf4' with sampler.name='vllm' on a GPU needs vLLM's bitsandbytes plugin, which is "
                    "not installed; `pip install vllm-bnb-plugin`, or set model.quantize='off'"
                )
            arguments["quantization"] = "bitsandbytes"  # NF4 with nested scales, from the folder's own weights
    if setup.tensor_parallel > 1:  # not "ray", which vLLM would take inside a Ray actor: the devices are all here
        arguments |= {"tensor_parallel_size": setup.tensor_parallel, "distributed_executor_backend": "mp"}
    if on_cpu:
        # Compiling costs half a minute at every start; sequences are short here.
        arguments |= {"enforce_eager": True, "block_size": CPU_BLOCK}
        arguments["kv_transfer_config"] = {
            "kv_connector": "PartialBlockConnector",
            "kv_connector_module_path": "sampler.engine.partial_block_connector",
            "kv_role": "kv_consumer",
        }
        arguments["kv_cache_memory_bytes"] = cache_bytes(model_config, setup)
    elif setup.shares_device:
        arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}
    return arguments


def lora_rank(rank: int) -> int:
    """The least rank that vLLM can be set up for."""
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= min(rank, 512))


def needs_head(model_config: Mapping[str, Any]) -> bool:
    """Whether the output head has to be sent as a weight of its own: vLLM's reload leaves a tied one as it was."""
    return is_tied(model_config) and model_config.get("model_type") not in HEAD_IS_EMBEDDING


def with_head(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a tied model, and the embedding once more as the output head where no head is among them."""
    embedding, has_head = None, False
    for name, tensor in tensors:
        yield name, tensor
        has_head = has_head or name == HEAD
        if name.endswith(EMBEDDINGS):
            embedding = tensor
    if has_head:
        return
    if embedding is None:
        raise UserError(
            "the model ties its output head to an embedding of a name that is not known here "
            f"(known: {', '.join(EMBEDDINGS)}); use sampler.name='hf', or an adapter (model.lora_rank)"
        )
    yield HEAD, embedding


def _has_experts(model_config: Mapping[str, Any]) -> bool:
    """By the names that models give to their number of experts (those that vLLM looks for)."""
    config = model_config.get("text_config") or model_config
    names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    return any((config.get(name) or 0) != 0 for name in names)


def cache_bytes(model_config: Mapping[str, Any], setup: SamplerSetup) -> int:
    """The key-value cache, bytes on each device: room for every sequence at full length.

    On the CPU this is what vLLM is given, from 64 MiB to 4 GiB (it queues what does not fit). On a GPU vLLM takes what
    ``gpu_memory_utilization`` (a share of the whole card: 0.5 where the learner is on it too, else vLLM's own 0.92)
    leaves beside its weights and its largest step, however little is needed; ``sampler.options.kv_cache_memory_bytes``
    overrules both and fixes the cache alone. There this is what the run would use at most, without the bounds.
    """
    tokens = setup.max_sequences * (-(-setup.max_model_tokens // CPU_BLOCK) + 1) * CPU_BLOCK
    wanted = cache_bytes_per_token(model_config, setup.dtype, setup.tensor_parallel) * tokens
    return min(max(wanted, 64 << 20), 4 << 30) if setup.device == "cpu" else wanted


def environment() -> None:
    """Set before vLLM is imported; what the user has set stays."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it pins this process, and the learner with it
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
