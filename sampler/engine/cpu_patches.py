"""What only vLLM's CPU build needs: patches that run in the process of its engine, called there by name. A GPU runs
none of this.

vLLM on a CPU takes no seed with a request, so the generator that all draw from is seeded before one: there a seed
fixes a request only while no other is in flight. Used by ``vllm.py``; the arguments for a CPU are in ``arguments.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_ROWS = 4  # of logits turned into log-probs together


def patch_worker(worker: Any, own_process: bool) -> None:
    """Once the engine has started. A vLLM without the places that are patched fails here."""
    sampler = worker.model_runner.sampler
    assert callable(sampler.gather_logprobs) and sampler.logprobs_mode == "processed_logits", sampler.logprobs_mode
    sampler.gather_logprobs = chosen_logprobs
    _unpack_embedding(worker.model_runner.get_model())
    if own_process:  # as ``pump`` does in this one, and clean when killed
        torch.compiler.set_stance("force_eager")
        # All have opened the shared memory that they communicate through; unlinked, it is freed with the last of them.
        for line in Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []:
            if (file := line.split()[-1]).startswith("/dev/shm/vllm_dist_"):
                Path(file).unlink(missing_ok=True)


def seed_worker(worker: Any, seed: int) -> None:
    torch.manual_seed(seed)


def chosen_logprobs(logits_NV: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
    """In place of vLLM's ``Sampler.gather_logprobs``: log-probs of the given tokens [N], no others and no ranks, which
    would take a twelfth of vLLM's time.

    A few rows at a time, which then lie in the processor's cache: the same numbers in a quarter of the time.
    """
    from vllm.v1.outputs import LogprobsTensors

    assert num_logprobs == 0, num_logprobs
    parts = zip(logits_NV.split(_ROWS), token_ids[:, None].split(_ROWS), strict=True)
    chosen_N1 = torch.cat([rows.log_softmax(-1, dtype=torch.float32).gather(-1, ids) for rows, ids in parts])
    return LogprobsTensors(token_ids[:, None].to(torch.int32), chosen_N1, torch.zeros_like(token_ids))


def _unpack_embedding(model: torch.nn.Module) -> None:
    """Where the output head is a layer of its own vLLM packs the input embedding for products, too, and does so again
    at every reload. It is only looked up in, and as large as the head."""
    from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary

    class LookUp(vocabulary.UnquantizedEmbeddingMethod):
        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            pass

    layers = list(model.modules())
    if not any(isinstance(layer, vocabulary.ParallelLMHead) for layer in layers):
        return  # the embedding is the head
    for layer in layers:
        if (
            type(layer) is vocabulary.VocabParallelEmbedding
            and type(layer.quant_method) is vocabulary.UnquantizedEmbeddingMethod
        ):
            layer.quant_method = LookUp()
            # In place of the packed copy made at the start; still correct if a product is computed with it.
            vars(layer)["cpu_linear"] = torch.nn.functional.linear


def pack_experts_again(worker: Any) -> None:
    """Before a reload: vLLM packs the experts of a layer when their kernel is made, at the start alone, and a reload
    puts unpacked weights in their place, which the kernel then takes for packed ones. Without a kernel the reload makes
    one, as the start did."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for layer in worker.model_runner.get_model().modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None
