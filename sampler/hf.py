"""transformers as a sampler: the slow reference that runs anywhere and that the fast back ends are compared with.

A plain loop over the model's own forward with its key-value cache. Each prompt is computed once for its whole group,
prompts of different lengths are padded on the left, and a finished completion leaves the batch. Left out: paged or
shared caches, continuous batching, quantization; sampler/engine/vllm.py is for speed.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common.device import dtype_of, release
from common.errors import RunFailure, UserError, brief, first_line
from common.memory import ModelSize, Room, SamplerMemory, cache_bytes_per_token
from common.protocols import WeightHandle
from common.sampling_filters import logprobs_of, process
from common.tokenizer import check_room, decode, end_of_sequence_ids, load_tokenizer
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import Fingerprint, bit_sum

# Shapes: P prompts, R completions of a batch, N of them not finished yet, T tokens, V vocabulary.

_ADAPTER_MATHS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_LOGITS_AT_ONCE = 2**26  # numbers; 256 MiB of float32


def is_tied(model_config: Mapping[str, Any]) -> bool:
    """Whether the output head is the input embedding: as this config.json says, or where it does not, as transformers
    takes such a model."""
    if "tie_word_embeddings" in model_config:
        return bool(model_config["tie_word_embeddings"])
    from transformers import AutoConfig

    try:
        return bool(getattr(AutoConfig.for_model(model_config["model_type"]), "tie_word_embeddings", False))
    except (KeyError, ValueError):  # a model with code of its own
        return False


def load_model(folder: str | Path, dtype: str, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The folder's causal language model, ready to run. Raises ``UserError`` when transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype_of(dtype), trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"its files lack {sorted(report['missing_keys'])[:3]}")
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.name: {str(folder)!r} cannot be loaded by sampler 'hf' ({brief(error)}); "
            "name a folder with a causal language model that transformers knows"
        ) from error
    return model.to(device).eval()


class HfSampler:
    """A transformers model that serves the folder's weights as version 0 until ``load_weights`` loads others.

    ``batch_size``: completions computed at once; lower it when memory is short. Equal seeds give equal completions:
    each draws from its own row of uniform numbers, so that the batch size, the device and a split of the request
    (``SamplingParams.seed_offset``) change nothing but rounding. Log-probs are those of the distribution drawn from; a
    greedy completion's are of temperature 1, without top-p or top-k, as vLLM's are. ``generate`` works before it
    returns.
    """

    takes_adapters = True
    free_options = frozenset({"batch_size"})
    seeds_prompts = True

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises ``UserError`` for a wrong ``batch_size``."""
        size = options.get("batch_size", 64)
        if type(size) is not int or size < 1:
            raise UserError(f"sampler.options.batch_size={size!r} must be a whole number of at least 1")

    @staticmethod
    def completions_at_once(options: Mapping[str, Any]) -> int:
        """A batch."""
        return int(options.get("batch_size", 64))

    @staticmethod
    def memory_needed(setup: SamplerSetup, options: Mapping[str, Any], model: ModelSize, room: Room) -> SamplerMemory:
        """See ``common.memory``. It keeps its memory while it sleeps."""
        rows = min(setup.max_sequences, HfSampler.completions_at_once(options))
        token = 2 * cache_bytes_per_token(model.config, setup.dtype)  # it is copied as it grows
        cache = rows * setup.max_model_tokens * token
        held = {"sampler weights": model.dense, "KV cache": cache}
        activations = model.forward(setup.max_model_tokens) + rows * model.vocabulary * 12
        return SamplerMemory(held, activations, activations, held, 0, cache, token)

    def __init__(self, setup: SamplerSetup, batch_size: int = 64) -> None:
        HfSampler.check_options({"batch_size": batch_size})
        if setup.tensor_parallel > 1:
            raise UserError(
                f"sampler.tensor_parallel={setup.tensor_parallel} cannot be had with sampler.name='hf', which uses one "
                "device; set it to 1, or use sampler.name='vllm'"
            )
        if setup.in_flight_updates:
            raise UserError(
                "sampler.in_flight_updates=true has no effect with sampler.name='hf', which takes weights only between "
                "requests; set it to false, or use sampler.name='vllm'"
            )
        if setup.threads:
            torch.set_num_threads(setup.threads)
        self.setup = setup
        self.tokenizer = load_tokenizer(setup.model_folder, setup.trust_remote_code)
        self.end_ids = (*end_of_sequence_ids(setup.model_folder, self.tokenizer), *setup.end_tokens)
        self.model: Any = load_model(setup.model_folder, setup.dtype, setup.device, setup.trust_remote_code)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and setup.max_model_tokens > context:
            raise UserError(
                f"the longest prompt plus sampler.max_tokens comes to {setup.max_model_tokens} tokens, more than the "
                f"model's context of {context}; lower sampler.max_tokens or shorten the prompts"
            )
        self.version = 0
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(setup.seed)
        self._asleep: set[str] = set()
        self._arrived: Fingerprint | None = None  # of the last transfer
        self._converted = Fingerprint()  # of what came of those of its tensors that the model holds otherwise
        # Before an adapter is attached, which renames modules but keeps these very tensors.
        self._targets: dict[str, torch.Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._adapted: Any = None if setup.adapter is None else _attach(self.model, setup.adapter.config)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        self._ready("generate")
        self._check_prompts(prompts, params)
        generator, before = self._generator, 0
        if params.seed is not None:
            # The rows of the prompts that stand before these in the whole request are drawn and left.
            generator, before = torch.Generator().manual_seed(params.seed), params.seed_offset * params.n
        owner_R = [index for index in range(len(prompts)) for _ in range(params.n)]
        uniform_RT = torch.rand(before + len(owner_R), params.max_tokens, generator=generator, dtype=torch.float64)
        uniform_RT = uniform_RT[before:].to(self.setup.device)
        completions: list[Completion] = []
        with self._computing():
            for start in range(0, len(owner_R), self._batch_size):
                part = slice(start, start + self._batch_size)
                completions += self._complete(prompts, owner_R[part], uniform_RT[part], params)
        written = iter(completions)
        future: Future[list[Group]] = Future()
        future.set_result([Group(prompt, tuple(islice(written, params.n))) for prompt in prompts])
        return future

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._ready("logprobs")
        answers: list[list[float]] = []
        longest = max(map(len, sequences), default=1)
        rows = max(1, _LOGITS_AT_ONCE // (longest * self.model.config.get_text_config().vocab_size))
        with self._computing():
            for start in range(0, len(sequences), rows):
                batch = sequences[start : start + rows]
                # Padded on the right: a causal model's earlier positions never see it, so no mask is needed.
                ids_BT = self._padded(batch, "right")
                logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
                logprobs_N = logprobs_of(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
                logprobs_BT = logprobs_N.view(len(batch), ids_BT.shape[1] - 1).tolist()
                answers += [row[: len(sequence) - 1] for sequence, row in zip(batch, logprobs_BT, strict=True)]
        return answers

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self._ready("load_weights", "weights")
        arrived = Fingerprint(handle.adapter_config)
        self._arrived = None
        tensors = arrived.watch(handle.open())
        with torch.no_grad():
            if handle.kind == "adapter":
                self._load_adapter(tensors, handle.adapter_config)
            else:
                self._load_full(tensors)
        self.version, self._arrived = version, arrived
        return arrived.digest()

    def check_weights(self, fingerprint: str) -> list[str]:
        """Compares every parameter, bit for bit, with the tensor that came for it last, and an adapter's scaling with
        the configuration that came with it."""
        self._ready("check_weights", "weights")
        if self._arrived is None or self._arrived.digest() != fingerprint:
            return ["the transfer was not completed"]
        held: Mapping[str, torch.Tensor] = self._targets
        right = {name: sent for name, sent in self._arrived.sums.items() if name in held} | self._converted.sums
        faults: list[str] = []
        if self._arrived.adapter_config is not None:
            from peft import get_peft_model_state_dict

            held, right = get_peft_model_state_dict(self._adapted, save_embedding_layers=False), self._arrived.sums
            faults = self._wrong_scalings(self._arrived.adapter_config)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):  # a tied head under both names
            if self._targets.get(name, parameter) is not parameter:
                faults.append(f"{name} is no longer the tensor that weights are loaded into")
        for name, sent in right.items():
            tensor = held.get(name)
            # In a wider format the numbers are the same, and go back exactly.
            if tensor is None or bit_sum(tensor.to(sent.dtype)) != sent.bits:
                faults.append(f"{name} holds other values than those sent")
        return faults

    def _wrong_scalings(self, config: Mapping[str, Any]) -> list[str]:
        faults = []
        for name, layer in self._adapted.named_modules():
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, dict) and "default" in scaling:
                right = lora_scaling(config, name.removeprefix("base_model.model."))
                if scaling["default"] != right:
                    faults.append(f"the adapter of {name} is multiplied by {scaling['default']:g} and not by {right:g}")
                if "default" not in layer.active_adapters or layer.disable_adapters:
                    faults.append(f"the adapter of {name} is not in use")
        return faults

    def sleep(self) -> None:
        self._ready("sleep", "nothing")
        self._asleep = {"weights", "cache"}
        if self.setup.device != "cpu":
            self.model.to("cpu")
            release(self.setup.device)

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        self._ready("wake", "nothing")
        if part != "cache":
            self.model.to(self.setup.device)
        self._asleep -= {"weights", "cache"} if part == "all" else {part}

    def use_adapter(self, on: bool) -> None:
        """Serve the adapter on the base, or the base alone; beside the contract, decided by what was last loaded."""
        if on:
            self._adapted.base_model.enable_adapter_layers()
        else:
            self._adapted.base_model.disable_adapter_layers()

    def close(self) -> None:
        self.model = self._adapted = None
        self._targets = {}
        release(self.setup.device)

    def _complete(
        self, prompts: Sequence[Prompt], owner_R: list[int], uniform_RT: torch.Tensor, params: SamplingParams
    ) -> Iterator[Completion]:
        """A batch: a completion of each prompt whose place is in ``owner_R``, drawn by its row of numbers."""
        used = [prompt.token_ids for prompt in prompts[owner_R[0] : owner_R[-1] + 1]]
        mask_PT = self._padded([[1] * len(prompt) for prompt in used], "left")
        out = self._forward(self._padded(used, "left"), mask_PT, None)
        prompt_of_N = self._tensor(owner_R) - owner_R[0]
        cache = out.past_key_values
        cache.reorder_cache(prompt_of_N)  # from a row for each prompt to a row for each completion
        logits_NV, mask_NT = out.logits[:, -1][prompt_of_N], mask_PT[prompt_of_N]

        ids: list[list[int]] = [[] for _ in owner_R]
        logprobs: list[list[float]] = [[] for _ in owner_R]
        texts: list[str | None] = [None] * len(owner_R)  # of those that ended
        going = list(range(len(owner_R)))
        ends_E = self._tensor(self.end_ids)
        for step in range(params.max_tokens):
            if step < params.min_tokens:
                logits_NV = logits_NV.index_fill(-1, ends_E, -torch.inf)
            token_N, logprob_N = _draw(logits_NV, uniform_RT[going, step], params)
            for row, token, logprob in zip(going, token_N.tolist(), logprob_N.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row].append(logprob)
                texts[row] = self._text_if_ended(ids[row], params)
            keep = [place for place, row in enumerate(going) if texts[row] is None]
            if not keep or step + 1 == params.max_tokens:
                break
            if len(keep) < len(going):
                going = [going[place] for place in keep]
                keep_N = self._tensor(keep)
                cache.reorder_cache(keep_N)
                token_N, mask_NT = token_N[keep_N], mask_NT[keep_N]
            mask_NT = torch.cat([mask_NT, torch.ones_like(mask_NT[:, :1])], dim=-1)
            logits_NV = self._forward(token_N[:, None], mask_NT, cache).logits[:, -1]
        for row, text in enumerate(texts):
            yield Completion(
                token_ids=tuple(ids[row]),
                text=self._decode(ids[row]) if text is None else text,
                logprobs=tuple(logprobs[row]),
                finish_reason="length" if text is None else "stop",
                policy_version=self.version,
            )

    def _forward(self, ids_NT: torch.Tensor, mask_NT: torch.Tensor, cache: Any) -> Any:
        """The newest tokens through the model, which adds them to the cache; families differ in what they take."""
        positions_NT = (mask_NT.cumsum(-1) - 1).clamp(min=0)[:, -ids_NT.shape[1] :]
        taken = inspect.signature(self.model.forward).parameters
        more = {"position_ids": positions_NT, "logits_to_keep": 1}
        return self.model(
            input_ids=ids_NT,
            attention_mask=mask_NT,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in more.items() if name in taken},
        )

    def _text_if_ended(self, ids: list[int], params: SamplingParams) -> str | None:
        """A completion's text, if its newest token ends it."""
        if ids[-1] in self.end_ids:
            return self._decode(ids[:-1])
        if not params.stop or len(ids) <= params.min_tokens:
            return None
        text, early = self._decode(ids), len(self._decode(ids[: params.min_tokens]))
        # A stop string counts when its last character is written after the first ``min_tokens``.
        places = ((text.find(stop, max(0, early + 1 - len(stop))), len(stop)) for stop in params.stop)
        ends = [place + length for place, length in places if place >= 0]
        return text[: min(ends)] if ends else None

    def _decode(self, token_ids: Sequence[int]) -> str:
        return decode(self.tokenizer, token_ids)

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.setup.device)

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> torch.Tensor:
        return pad_sequence([self._tensor(row) for row in rows], batch_first=True, padding_side=side)

    def _load_full(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        loaded: set[int] = set()
        others: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            if name in self._targets:
                self._copy(name, tensor, loaded)
            else:
                others[name] = tensor
        converted, unknown = _converted(self.model, others) if others else ({}, [])
        self._converted = Fingerprint()
        for name, tensor in self._converted.watch(iter(converted.items())):
            self._copy(name, tensor, loaded)
        parameters = ((name, target) for name, target in self._targets.items() if isinstance(target, nn.Parameter))
        _check_names("weights", [name for name, target in parameters if id(target) not in loaded], unknown)
        if self._adapted is not None:
            self.use_adapter(False)  # whole weights: an older adapter is not part of them

    def _copy(self, name: str, tensor: torch.Tensor, loaded: set[int]) -> None:
        target = self._targets[name]
        if target.shape != tensor.shape:
            raise RunFailure(
                f"the hf sampler was sent {name!r} of shape {tuple(tensor.shape)} where the model has "
                f"{tuple(target.shape)}"
            )
        tensor = tensor.to(target)
        # A tied output head arrives once or twice; twice it must be the same, for only one can be kept.
        if id(target) in loaded and not torch.equal(target, tensor):
            raise RunFailure(f"the hf sampler was sent {name!r} unlike the weight that the model ties it to")
        target.copy_(tensor)
        loaded.add(id(target))

    def _load_adapter(self, tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any] | None) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        if self._adapted is None:
            raise RunFailure("the hf sampler was sent an adapter but was set up without one (SamplerSetup.adapter)")
        for key in _ADAPTER_MATHS:
            mine = getattr(self._adapted.peft_config["default"], key)
            if (sent := (config or {}).get(key, mine)) != mine:
                raise RunFailure(f"the hf sampler was sent an adapter with {key}={sent!r} but was set up for {mine!r}")
        arrived = {name: tensor.detach().clone() for name, tensor in tensors}
        expected = get_peft_model_state_dict(self._adapted)
        _check_names("an adapter", sorted(expected.keys() - arrived.keys()), sorted(arrived.keys() - expected.keys()))
        set_peft_model_state_dict(self._adapted, arrived)
        self.use_adapter(True)

    def _ready(self, verb: str, *parts: str) -> None:
        if self.model is None:
            raise RunFailure(f"the hf sampler was asked to {verb} after it was closed")
        if self._asleep & set(parts or ("weights", "cache")):
            raise RunFailure(f"the hf sampler was asked to {verb} while asleep; wake it first")

    def _check_prompts(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        for prompt in prompts:
            if not prompt.token_ids:
                raise UserError(f"prompt {prompt.id!r} has no tokens; render it with common.tokenizer.render first")
        check_room(prompts, params.max_tokens, self.setup.max_model_tokens)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Without gradients; an error inside transformers becomes one sentence."""
        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise RunFailure(
                f"the hf sampler ran out of memory with sampler.options.batch_size={self._batch_size}; lower it"
            ) from error
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RunFailure(
                f"the hf sampler cannot compute with model_type {self.model.config.model_type!r}: transformers' own "
                f"forward pass with a cache ended in {type(error).__name__}: {brief(error)}; use sampler.name='vllm'"
            ) from error


def _converted(model: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors under names of the model's files (each expert of a layer by itself) as the model holds them (the experts
    as one), by transformers' own way of loading; and the names that it does not know.

    Raises ``RunFailure`` for tensors that do not fit together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with torch.device("meta"):
        shell = type(model)(model.config)
    mapping: Any = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(weight_mapping=mapping, device_map={"": str(model.device)})
    found, _ = convert_and_load_state_dict_in_model(shell, dict(tensors), how)
    if found.conversion_errors or found.mismatched_keys:
        wrong = ", ".join([*found.conversion_errors, *(str(key) for key in found.mismatched_keys)])
        raise RunFailure(f"the hf sampler was sent weights that do not fit together or the model: {wrong[:300]}")
    converted = {name: tensor for name, tensor in shell.state_dict().items() if not tensor.is_meta}
    return converted, sorted(found.unexpected_keys)


def _draw(
    logits_NV: torch.Tensor, uniform_N: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row and its log-prob: the inverse of the cumulative distribution at ``uniform_N``."""
    if params.temperature == 0:
        token_N = logits_NV.argmax(-1)
        return token_N, logprobs_of(logits_NV, token_N)
    logits_NV = process(logits_NV, params.temperature, params.top_p, params.top_k)
    cumulative_NV = logits_NV.double().softmax(-1).cumsum(-1)
    reached_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
    # The first token whose cumulative probability is above: one of probability 0 never is.
    token_N = torch.searchsorted(cumulative_NV, reached_N1, right=True)[:, 0].clamp(max=logits_NV.shape[-1] - 1)
    return token_N, logprobs_of(logits_NV, token_N)


def _attach(model: Any, config: Mapping[str, Any]) -> Any:
    """The model under the LoRA adapter of ``config``; it starts as no change."""
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(model, LoraConfig.from_peft_type(**config)).eval()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise UserError(f"the adapter's configuration does not fit this model: {first_line(error)}") from error


def lora_scaling(config: Mapping[str, Any], module: str) -> float:
    """What peft multiplies the adapter of ``module`` (its name in the model) by, under this ``adapter_config``."""

    def of(key: str, patterns: str) -> Any:
        given = (config.get(patterns) or {}).items()
        return next((value for name, value in given if re.match(rf"(.*\.)?({name})$", module)), config[key])

    rank, alpha = of("r", "rank_pattern"), of("lora_alpha", "alpha_pattern")
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


def _check_names(what: str, missing: Sequence[str], unknown: Sequence[str]) -> None:
    for names, trouble in ((missing, "misses"), (unknown, "holds names that the model does not have:")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise RunFailure(f"the hf sampler was sent {what}, but the transfer {trouble} {shown}")
