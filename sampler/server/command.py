"""What a vLLM server must be started with to serve as ``sampler.name="remote"``: its command line, its environment, and
the settings that a running one must show. Used by ``sampler/server/client.py`` and by ``nanogrpo server``.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from common.errors import UserError
from common.types import SamplerSetup
from sampler.engine.arguments import lora_rank


def server_command(setup: SamplerSetup, url: str = "http://127.0.0.1:8000") -> tuple[dict[str, str], list[str]]:
    """The environment variables and the command line of a server for this run, on the device of ``setup``. A key, where
    one is wanted, goes into the server's VLLM_API_KEY."""
    on_cpu, where = setup.device == "cpu", urlsplit(url)
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if setup.adapter is not None:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if on_cpu:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # The `vllm` command of the CPU build does not start.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"] if on_cpu else ["vllm", "serve"]
    words = [*program, setup.model_folder]
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
