"""Computes a group's prompt once, in vLLM on a CPU: what the prefix cache cannot share is copied.

vLLM shares whole blocks of a prompt, and a CPU's block is 32 tokens at the least: of each completion but a group's
first the rest of the prompt, 16 tokens on average, would be computed again, and of short prompts that is most of the
work. Here the group's first sequence computes the prompt; the others wait for that one step, and start from a copy of
its last, partly filled block. Keys and values are those of the same tokens at the same places, so that nothing but
rounding changes.

It is a connector, vLLM's interface for keys and values that come from elsewhere
(``vllm.distributed.kv_transfer.kv_connector.v1.base``). Left out: more than one kind of cache (sliding windows beside
full attention, state-space layers), where nothing is copied. Used by ``vllm.py``, whose argument names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.v1.kv_cache_interface import FullAttentionSpec


@dataclass
class Copies(KVConnectorMetadata):
    """Blocks to copy before the next forward pass, in every layer."""

    source: list[int]
    target: list[int]


class PartialBlockConnector(KVConnectorBase_V1, SupportsHMA):
    """One of these plans, beside vLLM's scheduler; another, beside the model, copies."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block = int(vllm_config.cache_config.block_size)
        groups = kv_cache_config.kv_cache_groups
        self._plain = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
        self._first: dict[tuple[Any, ...], Any] = {}  # of the requests with this prompt: the one that computes it
        self._copies = Copies([], [])
        self._caches: list[torch.Tensor] = []

    # -- beside the scheduler ----------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        rest = self._end(request) - num_computed_tokens
        if not self._plain or rest <= 0 or request.skip_reading_prefix_cache:
            return 0, False
        if request.num_tokens > request.num_prompt_tokens:  # it was preempted, and starts again with what it wrote
            return 0, False
        first = self._first.get(self._key(request))
        if first is None or first is request or first.is_finished():
            self._first[self._key(request)] = request
            return 0, False
        if first.num_computed_tokens < self._end(request):
            return None, False  # asked again in the next step, when it has been computed
        return (rest if rest < self._block else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            assert self._kv_cache_manager is not None
            first = self._kv_cache_manager.get_blocks(self._first[self._key(request)].request_id)
            place = self._end(request) // self._block
            self._copies.source.append(first.get_block_ids()[0][place])
            self._copies.target.append(blocks.get_block_ids()[0][place])

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        copies, self._copies = self._copies, Copies([], [])
        return copies

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._first.get(self._key(request)) is request:
            del self._first[self._key(request)]
        return False, None

    @staticmethod
    def _end(request: Any) -> int:
        """Tokens of the prompt that can be shared: the last one is computed for its log-probs."""
        return int(request.num_prompt_tokens) - 1

    @staticmethod
    def _key(request: Any) -> tuple[Any, ...]:
        adapter = request.lora_request.lora_int_id if request.lora_request else 0
        return (adapter, *request.prompt_token_ids)

    # -- beside the model --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        copies = self._get_connector_metadata()
        assert isinstance(copies, Copies)
        if copies.target:
            source, target = torch.tensor(copies.source), torch.tensor(copies.target)
            for cache in self._caches:
                cache[target] = cache[source]

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return
