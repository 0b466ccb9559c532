"""The values that travel between sampler, task and learner: frozen, plain, picklable, importable without torch.

Left out on purpose: tensors (the learner makes its own) and anything that belongs to one back end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
LARGEST_REWARD = 1e6
"""Of a reward and of its weight, either sign: sums and squares of them stay far from overflowing."""
Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": "..."}


@dataclass(frozen=True)
class Prompt:
    """A question of a task, and what the model is shown of it.

    A task fills ``id``, ``messages`` and ``data``; ``common.tokenizer.Renderer`` adds ``text`` and ``token_ids``.
    """

    id: str
    """Unique and stable within a split: ``train-17``."""
    messages: tuple[Message, ...]
    """The conversation up to the turn that the model writes."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the task needs to score an answer (JSON values only: it is written to the rollouts)."""
    text: str = ""
    """The prompt as the model sees it, after the chat template."""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One answer to a prompt, stamped by the sampler that wrote it, then scored."""

    token_ids: tuple[int, ...]
    """What was generated, with the end token where the model wrote one."""
    text: str
    """The decoded tokens with a stop string that ended them, special tokens (a task's tags may be some) as they are
    written; without the end token, and without what a token holds beyond the stop string."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each token under the distribution it was **drawn from**
    (after temperature, top-p and top-k; at temperature 0, which draws nothing, under the model's own at temperature 1);
    same length as ``token_ids``."""
    finish_reason: FinishReason
    """``stop``: the model ended it (EOS or a stop string); ``length``: it was cut at ``max_tokens``."""
    policy_version: int
    """Version of the weights that wrote it, as the sampler knows it; the oldest, where they changed on the way."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Each named reward, before its weight."""
    reward: float | None = None
    """The weighted sum of ``rewards``; None until scored."""
    advantage: float | None = None
    """How much better than its group; None until assigned."""
    token_versions: tuple[int, ...] = ()
    """Version behind each token, where weights were swapped in the middle of it (``sampler.in_flight_updates``);
    empty when ``policy_version`` wrote them all."""


@dataclass(frozen=True)
class Group:
    """A prompt and the completions sampled for it."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. Names and meanings are vLLM's."""

    n: int = 1
    """Completions per prompt."""
    max_tokens: int = 128
    min_tokens: int = 0
    """No completion ends before it has so many tokens: until then the model's end-of-sequence tokens cannot be drawn
    (the log-probs are of the distribution without them), and stop strings count only in what is written later. At most
    ``max_tokens``; equal to it, every completion has that length."""
    temperature: float = 1.0
    """0 is greedy: the likeliest token each time, whatever top_p and top_k are."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they are part of its text, and the tokens are kept."""
    seed: int | None = None
    """Fixes the request: same weights, prompts and seed give the same completions. None draws freely."""
    seed_offset: int = 0
    """How many prompts stand before these in the request of which they are a part. A back end that seeds each prompt
    (``Sampler.seeds_prompts``) counts on from here, so that a request split over replicas draws as if it were whole."""


@dataclass(frozen=True)
class AdapterSpec:
    """The LoRA adapter a sampler must be ready to serve."""

    rank: int
    config: Mapping[str, Any]
    """The contents of peft's ``adapter_config.json``."""

    @property
    def layers(self) -> list[str]:
        """The last names of the modules that have a part of it."""
        return sorted({str(name).rpartition(".")[2] for name in self.config["target_modules"]})


@dataclass(frozen=True)
class SamplerSetup:
    """What every sampler back end is given when it is made, besides its own ``[sampler.options]``."""

    model_folder: str
    """A local Hugging Face folder (safetensors, config, tokenizer)."""
    dtype: str
    """``bfloat16``, ``float16`` or ``float32``."""
    max_model_tokens: int
    """The longest prompt plus completion that will be asked for."""
    max_sequences: int
    """The most completions that will be asked for at once."""
    device: str = "cpu"
    seed: int = 0
    shares_device: bool = True
    """The learner lives on the same device, so memory must be left for it."""
    adapter: AdapterSpec | None = None
    quantize: str = "off"
    """``nf4``: hold the base under the adapter in 4 bits (bitsandbytes' NF4 with double quantization, made from the
    files of ``model_folder`` as they are), so that it equals the learner's base bit for bit."""
    trust_remote_code: bool = False
    threads: int = 0
    """CPU threads; 0 leaves the library's choice."""
    tensor_parallel: int = 1
    """Devices that this sampler spreads the model over."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a completion besides those that the model folder names (its tokenizer's end-of-sequence token and
    generation_config.json's): the chat template's own end of a turn."""
    in_flight_updates: bool = False
    """``load_weights`` does not wait for in-flight requests: they continue under the new weights, and each completion
    records which version wrote each token."""
