"""What a vLLM server must be started with to serve as ``sampler.name="remote"``: its command line, its environment, the
settings that a running one must show, and a model that it can take new weights for. Used by
``sampler/server/client.py`` and by ``nanogrpo server``.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors.torch import load_file, save_file

from common.atomic_files import atomic_folder
from common.errors import UserError
from common.types import SamplerSetup
from common.weights.handles import weight_files
from sampler.engine.arguments import EMBEDDINGS, HEAD, lora_rank
from sampler.hf import is_tied


def server_command(
    setup: SamplerSetup, url: str = "http://127.0.0.1:8000", model_folder: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """The environment variables and the command line of a server for this run, on the device of ``setup``.

    ``model_folder`` is served in place of the setup's own: an untied copy (``prepare_for_server``), or the folder's
    path as the server's machine has it. A key, where one is wanted, goes into the server's VLLM_API_KEY.
    """
    on_cpu, where = setup.device == "cpu", urlsplit(url)
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if setup.adapter is not None:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if on_cpu:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    folder = model_folder or setup.model_folder
    # The `vllm` command of the CPU build does not start.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    words = words if on_cpu else ["vllm", "serve", folder]
    words += ["--host", where.hostname or "127.0.0.1", "--port", str(where.port or 8000), "--dtype", setup.dtype]
    words += ["--max-model-len", str(setup.max_model_tokens + 1)]  # for the token written after a scored prompt
    words += ["--logprobs-mode", "processed_logprobs"]
    if setup.trust_remote_code:
        words.append("--trust-remote-code")
    if on_cpu:
        words += ["--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
    if setup.adapter is not None:
        words += ["--enable-lora", "--max-lora-rank", str(lora_rank(setup.adapter.rank))]
        words += ["--lora-target-modules", *setup.adapter.layers]
    return environment, words


def shell_line(environment: Mapping[str, str], words: Sequence[str]) -> str:
    """Both in one line for a shell."""
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *words])


def check_settings(
    url: str, context: int, shown: Mapping[str, Any], setup: SamplerSetup, seed_requests: bool | None
) -> None:
    """Raises ``UserError`` for the first setting of a running server that this run cannot do with. ``context`` is the
    length of the server's longest sequence, ``shown`` its own account of itself, empty where it gives none.

    On a CPU a request with a seed whose prompt is computed in parts, or the log-probs of a prompt under an adapter that
    wraps the output head, kills the server.
    """

    def of(section: str, name: str) -> Any:
        return (shown.get(section) or {}).get(name)

    adapter, lora = setup.adapter, shown.get("lora_config") or {}
    on_cpu = of("device_config", "device") == "cpu"
    dtype = str(of("model_config", "dtype") or setup.dtype).removeprefix("torch.")
    rank = adapter.rank if adapter else 0
    most = lora.get("max_lora_rank", rank)
    wraps_head = bool(lora) and "lm_head" in (lora.get("target_modules") or ["lm_head"])
    table = (
        # (whether it is wrong, what is wrong and the cure)
        (
            context < setup.max_model_tokens,
            f"takes {context} tokens, fewer than the {setup.max_model_tokens} of this run's longest prompt and "
            f"sampler.max_tokens; start it with --max-model-len {setup.max_model_tokens + 1}",
        ),
        (
            dtype != setup.dtype,
            f"computes in {dtype}, this run in model.dtype={setup.dtype!r}; start it with --dtype {setup.dtype}",
        ),
        (
            of("load_config", "load_format") == "dummy",
            "was started with --load-format dummy, which cannot read weights later; leave it out",
        ),
        (
            rank > most,
            f"takes adapters up to rank {most}, model.lora_rank is {rank}; start it with --max-lora-rank "
            f"{lora_rank(rank)}",
        ),
        (
            on_cpu and wraps_head,
            "wraps its output head for adapters, and on a CPU dies of the next log-probs of a prompt; start it with "
            f"--lora-target-modules {' '.join(adapter.layers) if adapter else 'q_proj v_proj ...'}",
        ),
        (
            not shown and seed_requests is None,
            "does not show whether it can seed single requests; set sampler.options.seed_requests=true (on a GPU, or "
            "on a CPU with --no-enable-chunked-prefill), or false",
        ),
        (
            on_cpu and of("scheduler_config", "enable_chunked_prefill") and seed_requests is not False,
            "dies of a seeded request whose prompt it computes in parts, as vLLM on a CPU does; start it with "
            "--no-enable-chunked-prefill, or set sampler.options.seed_requests=false to give up reproducible "
            "completions",
        ),
    )
    for wrong, sentence in table:
        if wrong:
            raise UserError(f"the server at {url} {sentence}")


def prepare_for_server(model_folder: str | Path, out_folder: str | Path) -> Path:
    """Writes a copy of the model whose output head is a weight of its own, for servers that keep a tied one at its old
    values when weights are read again. Returns the folder to serve: the model's own where nothing is tied.

    Raises ``UserError`` for an ``out_folder`` that is not empty and for an embedding of an unknown name.
    """
    source, out = Path(model_folder), Path(out_folder)
    config = json.loads((source / "config.json").read_text())
    if not is_tied(config):
        return source
    if out.exists() and any(out.iterdir()):
        raise UserError(f"the folder {str(out)!r} is not empty; name a new one for the untied copy")
    with atomic_folder(out) as made:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(file, made / file.name)
        weight_map: dict[str, str] = {}
        for number, file in enumerate(weight_files(source)):
            tensors = {name: tensor for name, tensor in load_file(file).items() if name != HEAD}
            for name in [name for name in tensors if name.endswith(EMBEDDINGS)]:
                tensors[HEAD] = tensors[name].clone()
            save_file(tensors, made / f"model-{number:05}.safetensors", metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, f"model-{number:05}.safetensors")
        if HEAD not in weight_map:
            raise UserError(f"no embedding of a known name is in {str(source)!r} (known: {', '.join(EMBEDDINGS)})")
        (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (made / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}, indent=2))
    return out
