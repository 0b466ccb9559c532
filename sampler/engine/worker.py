"""What runs in the process of vLLM's engine, called there by name: seeds and patches of the CPU build, new weights on
their way in, and what is stored of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.weights.handles import SharedMemoryWeights, Sum
from sampler.engine import stored_weights
from sampler.engine.stored_weights import Arrived, StoredWeights

_ROWS = 4  # of logits turned into log-probs together on the CPU


def seed_worker(worker: Any, seed: int) -> None:
    torch.manual_seed(seed)


def score_chosen_only(worker: Any) -> None:
    """On the CPU: see ``_chosen_only``. A vLLM without this place fails here, at the start."""
    sampler = worker.model_runner.sampler
    assert callable(sampler.gather_logprobs) and sampler.logprobs_mode == "processed_logits", sampler.logprobs_mode
    sampler.gather_logprobs = _chosen_only


def _chosen_only(logits_NV: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
    """In place of vLLM's ``Sampler.gather_logprobs``: log-probs of the given tokens [N], no others and no ranks.

    A few rows at a time, which then lie in the processor's cache: the same numbers in a quarter of the time.
    """
    from vllm.v1.outputs import LogprobsTensors

    assert num_logprobs == 0, num_logprobs
    parts = zip(logits_NV.split(_ROWS), token_ids[:, None].split(_ROWS), strict=True)
    chosen_N1 = torch.cat([rows.log_softmax(-1, dtype=torch.float32).gather(-1, ids) for rows, ids in parts])
    return LogprobsTensors(token_ids[:, None].to(torch.int32), chosen_N1, torch.zeros_like(token_ids))


def embed_only(worker: Any) -> None:
    """On the CPU, where the output head is a layer of its own: vLLM packs the input embedding for products, too, and
    does so again at every reload. It is only looked up in, and as large as the head."""
    from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary

    class LookUp(vocabulary.UnquantizedEmbeddingMethod):
        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            pass

    layers = list(worker.model_runner.get_model().modules())
    if not any(isinstance(layer, vocabulary.ParallelLMHead) for layer in layers):
        return  # the embedding is the head
    for layer in layers:
        if (
            type(layer) is vocabulary.VocabParallelEmbedding
            and type(layer.quant_method) is vocabulary.UnquantizedEmbeddingMethod
        ):
            layer.quant_method = LookUp()
            # In place of the packed copy made at the start; right for whoever should ask for a product all the same.
            vars(layer)["cpu_linear"] = torch.nn.functional.linear


def pack_experts_again(worker: Any) -> None:
    """On the CPU, before a reload: vLLM packs the experts of a layer when their kernel is made, at the start alone, and
    a reload puts unpacked weights in their place, which the kernel then takes for packed ones. Without a kernel the
    reload makes one, as the start did."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for layer in worker.model_runner.get_model().modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def settle_worker(worker: Any) -> None:
    """On the CPU, once every worker process has started: as ``pump`` in this process, and clean when killed."""
    torch.compiler.set_stance("force_eager")
    # All have joined the shared memory that they talk through; without its name it goes with the last of them.
    for line in Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []:
        if (file := line.split()[-1]).startswith("/dev/shm/vllm_dist_"):
            Path(file).unlink(missing_ok=True)


def reload_from(worker: Any, weights: SharedMemoryWeights) -> None:
    worker.reload_weights(weights_iterator=arriving(worker).watch(weights.open()))


def _store_watched(worker: Any) -> None:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    worker.stored_weights = StoredWeights(worker.model_runner.get_model(), rank, size)


def arriving(worker: Any) -> Arrived:
    if not hasattr(worker, "stored_weights"):
        _store_watched(worker)
    arrived: Arrived = worker.stored_weights.arriving()
    worker.stored_weights.expect(arrived)
    return arrived


def weight_faults(worker: Any, sums: Mapping[str, Sum]) -> list[str]:
    return list(worker.stored_weights.faults(sums))


def adapter_faults(worker: Any, lora_id: int, arrived: Arrived) -> list[str]:
    return stored_weights.adapter_faults(worker.model_runner, lora_id, arrived)
