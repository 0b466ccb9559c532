"""What a vLLM server must be started with to serve as ``sampler.name="remote"``: its command line, its environment, and
a model it can take new weights for. Used by ``sampler/server/client.py``'s messages and by ``nanogrpo server``.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.types import SamplerSetup
from common.weights.handles import FolderWeights, weight_files
from sampler.engine.arguments import EMBEDDINGS
from sampler.hf import is_tied

HEAD = "lm_head.weight"


def server_command(
    setup: SamplerSetup, *, model_folder: str | None = None, host: str = "127.0.0.1", port: int = 8000
) -> tuple[dict[str, str], list[str]]:
    """The environment variables and the command line of a server for this run, on the device of ``setup``.

    ``model_folder`` is served in place of the setup's own: an untied copy (``prepare_for_server``), or the folder's
    path as the server's machine has it. A key, where one is wanted, goes into the server's VLLM_API_KEY.
    """
    on_cpu = setup.device == "cpu"
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if setup.adapter is not None:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if on_cpu:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    folder = model_folder or setup.model_folder
    # The `vllm` command of the CPU build does not start.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    words = words if on_cpu else ["vllm", "serve", folder]
    words += ["--host", host, "--port", str(port), "--dtype", setup.dtype]
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
    found = [name for name, _ in FolderWeights(str(source)).open() if name.endswith(EMBEDDINGS)]
    if not found:
        raise UserError(f"no embedding of a known name is in {str(source)!r} (known: {', '.join(EMBEDDINGS)})")
    out.mkdir(parents=True, exist_ok=True)
    weights = weight_files(source)
    for file in source.iterdir():
        if file.is_file() and (file.suffix != ".safetensors" or file in weights):
            shutil.copyfile(file, out / file.name)
    for file in (out / one.name for one in weights):
        tensors = load_file(file)
        if found[0] in tensors:
            tensors[HEAD] = tensors[found[0]].clone()
            save_file(tensors, file, metadata={"format": "pt"})
            index = out / "model.safetensors.index.json"
            if index.is_file():
                listed = json.loads(index.read_text())
                listed["weight_map"][HEAD] = file.name
                index.write_text(json.dumps(listed))
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}, indent=2))
    return out


def lora_rank(rank: int) -> int:
    """The least rank that vLLM can be set up for."""
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= min(rank, 512))
