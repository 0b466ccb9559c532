"""vLLM in this process, on a CPU or a GPU build: the sampler of every real run.

Everything that depends on vLLM's ways is in this file:

- the engine stays in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so that tensors are handed over as they are;
- weights go in through ``reload_weights``: after loading, vLLM repacks its linear layers, and its model's own
  ``load_weights`` fails on them;
- a tied output head is untied and sent explicitly: ``reload_weights`` leaves a tied head at its old values;
- on the CPU a request cannot carry a seed, so the generator it draws from is seeded before the request;
- on the CPU the cache's block is 32 tokens, so that short prompts are shared in a group (the default of 128 shares
  only longer ones).

Sleeping and waking need a GPU and have not yet run on one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch

from common.errors import RunFailure, UserError
from common.protocols import WeightHandle
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from common.weights import Fingerprint, FolderWeights

# Ours to set, because the loop depends on them; each with where the wish belongs instead.
_OURS = {
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
}
# Names of the input embedding, which is also the head of a tied model.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# Models whose vLLM class computes logits with the embedding module itself: nothing to untie, a reload reaches it.
_HEAD_IS_EMBEDDING = ("gemma", "gemma2", "gemma3_text")


class VllmSampler:
    """A vLLM engine in this process; ``**options`` are arguments of ``vllm.LLM`` and win over the defaults here."""

    takes_adapters = True

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises ``UserError`` for an option that vLLM does not know or that is not the user's to set, and when vLLM
        is not installed."""
        for key in options:
            if key in _OURS:
                raise UserError(f"sampler.options.{key} is set by nanogrpo itself; use {_OURS[key]}")
        _environment()
        try:
            from vllm.engine.arg_utils import EngineArgs
        except ImportError as error:
            raise UserError(
                f"sampler.name='vllm' but vllm does not import ({error}); install it with `pip install nanogrpo[cpu]` "
                "or `nanogrpo[gpu]`, or use sampler.name='hf'"
            ) from None
        known = {field.name for field in dataclasses.fields(EngineArgs)}
        for key in options:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"sampler.options.{key} is not an argument of vllm.LLM{hint}")

    def __init__(self, setup: SamplerSetup, **options: Any) -> None:
        self.check_options(options)
        import vllm

        self._setup = setup
        self._on_cpu = setup.device == "cpu"
        self._version = 0
        self._asleep = False
        self._adapter: Any = None  # the LoRARequest served now
        self._adapter_count = 0
        memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
        _sweep_scratch(memory)
        self._scratch = Path(tempfile.mkdtemp(prefix=f"nanogrpo-{_pid_space()}-{os.getpid()}-", dir=memory))
        self._untie = self._must_untie()
        try:
            self._llm: Any = vllm.LLM(**(self._arguments() | options))
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            self.close()
            raise UserError(f"vLLM cannot start with model {setup.model_folder!r}: {_one_line(error)}") from error
        if setup.adapter is None:
            try:
                self.load_weights(FolderWeights(setup.model_folder), version=0)
            except BaseException:
                self.close()
                raise

    def _arguments(self) -> dict[str, Any]:
        setup = self._setup
        arguments: dict[str, Any] = {
            "model": setup.model_folder,
            "dtype": setup.dtype,
            "trust_remote_code": setup.trust_remote_code,
            "max_model_len": setup.max_model_tokens,
            "max_num_seqs": min(setup.max_sequences, 256),
            "seed": setup.seed,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": 1,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
        if setup.adapter is None:  # the weights come through load_weights; with an adapter the base stays as loaded
            arguments["load_format"] = "dummy"
            if self._untie:
                arguments["hf_overrides"] = {"tie_word_embeddings": False}
        else:
            rank = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= min(setup.adapter.rank, 512))
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
            # Left to itself vLLM wraps the output head too, and on the CPU prompt log-probs then fail.
            arguments["lora_target_modules"] = sorted(setup.adapter.config["target_modules"])
        if self._on_cpu:
            # Compiling costs half a minute at every start; sequences are short here.
            arguments |= {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": self._cache_bytes()}
        elif setup.shares_device:
            arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}
        return arguments

    def _must_untie(self) -> bool:
        config = json.loads((Path(self._setup.model_folder) / "config.json").read_text())
        tied = bool(config.get("tie_word_embeddings", False))
        return tied and self._setup.adapter is None and config.get("model_type") not in _HEAD_IS_EMBEDDING

    def _cache_bytes(self) -> int:
        """Room for every sequence at full length, at most 4 GiB (vLLM queues what does not fit)."""
        config = json.loads((Path(self._setup.model_folder) / "config.json").read_text())
        heads = config.get("num_key_value_heads") or config.get("num_attention_heads", 16)
        width = config.get("head_dim") or config.get("hidden_size", 1024) // config.get("num_attention_heads", 16)
        size = 4 if self._setup.dtype == "float32" else 2
        block = 32
        tokens = self._setup.max_sequences * (-(-self._setup.max_model_tokens // block) + 1) * block
        return int(min(max(config.get("num_hidden_layers", 24) * 2 * heads * width * size * tokens, 64 << 20), 4 << 30))

    # -- the contract ------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        from vllm import SamplingParams as VllmParams
        from vllm.inputs import TokensPrompt

        self._alive()
        limit = self._setup.max_model_tokens
        for prompt in prompts:
            if len(prompt.token_ids) + params.max_tokens > limit:
                raise UserError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, which with max_tokens="
                    f"{params.max_tokens} is more than the {limit} this sampler was set up for; shorten the prompt "
                    "or lower sampler.max_tokens"
                )
        future: Future[list[Group]] = Future()
        if not prompts:
            future.set_result([])
            return future
        requests = [
            VllmParams(
                n=params.n,
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k or -1,
                stop=list(params.stop) or None,
                logprobs=0,
                seed=None if self._on_cpu or params.seed is None else _spread_seed(params.seed, index),
            )
            for index in range(len(prompts))
        ]
        if params.seed is not None:
            # The same blocks must be computed and not found, or rounding differs between two equal requests.
            self._llm.reset_prefix_cache()
            if self._on_cpu:
                self._llm.collective_rpc(_seed_worker, args=(params.seed,))
        inputs = [TokensPrompt(prompt_token_ids=list(prompt.token_ids)) for prompt in prompts]
        outputs = self._run(inputs, requests)
        future.set_result([self._group(prompt, out) for prompt, out in zip(prompts, outputs, strict=True)])
        return future

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        from vllm import SamplingParams as VllmParams
        from vllm.inputs import TokensPrompt

        self._alive()
        inputs = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        outputs = self._run(inputs, VllmParams(max_tokens=1, temperature=1.0, prompt_logprobs=0))
        return [
            [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], sequence[1:], strict=True)]
            for out, sequence in zip(outputs, sequences, strict=True)
        ]

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self._alive()
        arrived = Fingerprint()
        tensors = arrived.watch(handle.open())
        try:
            if handle.kind == "adapter":
                self._load_adapter(tensors, dict(handle.adapter_config or {}))
            else:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._with_head(tensors)})
        except UserError:
            raise
        except Exception as error:
            raise RunFailure(
                f"the vLLM sampler could not load weights of version {version}: {_one_line(error)}"
            ) from error
        self._llm.reset_prefix_cache()
        self._version = version
        return arrived.digest()

    def sleep(self) -> None:
        if self._on_cpu or not self._setup.shares_device or self._asleep:
            return
        # Level 2 drops the weights, which the next sync sends anyway; an adapter's base must be kept (level 1).
        self._llm.sleep(level=1 if self._setup.adapter is not None else 2)
        self._asleep = True

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        if not self._asleep:
            return
        self._llm.wake_up(tags={"weights": ["weights"], "cache": ["kv_cache"], "all": None}[part])
        self._asleep = part == "weights"

    def close(self) -> None:
        llm, self._llm = getattr(self, "_llm", None), None
        if llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            with contextlib.suppress(AttributeError):
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _run(self, inputs: list[Any], params: Any) -> list[Any]:
        # On the CPU vLLM would spend 15 s compiling one small log-prob function that runs as fast without.
        stance = torch.compiler.set_stance("force_eager") if self._on_cpu else contextlib.nullcontext()
        with stance:
            return list(self._llm.generate(inputs, params, use_tqdm=False, lora_request=self._adapter))

    def _group(self, prompt: Prompt, output: Any) -> Group:
        return Group(
            prompt,
            tuple(
                Completion(
                    token_ids=tuple(one.token_ids),
                    text=one.text,
                    logprobs=tuple(
                        entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)
                    ),
                    finish_reason="length" if one.finish_reason == "length" else "stop",
                    policy_version=self._version,
                )
                for one in output.outputs
            ),
        )

    def _with_head(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        sent_head, embedding = False, None
        for name, tensor in tensors:
            sent_head = sent_head or name == "lm_head.weight"
            yield name, tensor
            if name.endswith(_EMBEDDINGS):
                embedding = tensor
        if self._untie and not sent_head:
            if embedding is None:
                raise UserError(
                    "the model ties its output head to an embedding of a name that is not known here "
                    f"(known: {', '.join(_EMBEDDINGS)}); use sampler.name='hf', or an adapter (model.lora_rank)"
                )
            yield "lm_head.weight", embedding

    def _load_adapter(self, tensors: Iterator[tuple[str, torch.Tensor]], config: dict[str, Any]) -> None:
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        self._adapter_count += 1  # an id that vLLM has seen would be served from its cache
        folder = self._scratch / f"adapter-{self._adapter_count}"
        folder.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        old, self._adapter = self._adapter, LoRARequest(f"v{self._adapter_count}", self._adapter_count, str(folder))
        self._llm.llm_engine.add_lora(self._adapter)
        if old is not None:
            self._llm.llm_engine.remove_lora(old.lora_int_id)
            shutil.rmtree(old.lora_path, ignore_errors=True)

    def _alive(self) -> None:
        if getattr(self, "_llm", None) is None:
            raise RunFailure("the vLLM sampler was called after it was closed")


def _spread_seed(seed: int, index: int) -> int:
    """A seed for one prompt, far from every other's: vLLM counts it up for each completion of a group."""
    return random.Random(f"{seed}/{index}").getrandbits(31)


def _sweep_scratch(place: Path) -> None:
    """Removes what killed processes left in shared memory."""
    for folder in place.glob(f"nanogrpo-{_pid_space()}-*"):
        if not Path("/proc", folder.name.split("-")[2]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _pid_space() -> int:
    """Tells containers that share the memory but not their process ids apart."""
    return os.stat("/proc/self/ns/pid").st_ino if Path("/proc/self/ns/pid").exists() else 0


def _seed_worker(worker: Any, seed: int) -> None:
    torch.manual_seed(seed)


def _environment() -> None:
    """Set before vLLM is imported; what the user has set stays."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it pins this process, and the learner with it
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
