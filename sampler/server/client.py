"""A vLLM server that was started separately, driven over HTTP: for a sampler that outlives runs, or that lives where
only a port is open.

Everything that depends on the ways of vLLM's server is in this file:

- token ids go in and come out, one request for each prompt; requests run in the background, on one thread;
- full weights are written to a folder that both sides see, and the server reads them from there
  (``/collective_rpc``, which needs ``VLLM_SERVER_DEV_MODE=1``). vLLM's own weight-transfer endpoints know GPU
  transports only;
- an adapter is written there too and loaded under a name that was never used before;
- a tied output head is sent explicitly, or a reload leaves it at its old values; whether that reaches this server's
  model is tried out at the start;
- on the CPU a request with a seed, or the log-probs of a prompt under an adapter that wraps the output head, kills
  the server unless it was started with the flags of ``server_command``; both are found out before.

Left out: starting and stopping the server, several servers, sleeping. Whoever reaches the server's port in developer
mode commands it, key or not: keep the port on the host or behind a tunnel.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import ipaddress
import itertools
import json
import os
import random
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch

from common.errors import RunFailure, UserError
from common.protocols import GroupsFuture, WeightHandle
from common.tokenizer import check_room, load_tokenizer
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import FolderWeights, InlineWeights, SharedMemoryWeights, fingerprint, shared_memory_folder
from sampler.engine.arguments import EMBEDDINGS, HEAD_IS_EMBEDDING, check_temperature
from sampler.engine.vllm import stop_string
from sampler.hf import is_tied
from sampler.server.command import HEAD, lora_rank
from sampler.server.http import START_S, Wire, follow, in_order, read_key

T = TypeVar("T")
Tensors = Iterable[tuple[str, torch.Tensor]]

_OPTIONS = ("url", "api_key_env", "weights_folder", "seed_requests", "timeout_s")
_RESET_S = 30.0
_FILE_BYTES = 1 << 30  # of weights written at a time
_SAMPLE = "Which number is larger, 17 or 9? Think first, then answer in one short line."


class RemoteSampler:
    """A vLLM server at ``url``, which serves the model folder's weights as version 0 once this is made.

    Options: ``url`` (``http://127.0.0.1:8000``); ``api_key_env``, the name of the environment variable that holds the
    server's key; ``weights_folder``, seen by both sides under one path (``/dev/shm`` where the url is on this host; a
    server that does not find it there dies); ``seed_requests``, whether requests carry their seeds (asked of the
    server; false gives up reproducible completions); ``timeout_s``, the longest that one request may take (1800).
    """

    takes_adapters: bool
    free_options = frozenset({"url", "api_key_env", "weights_folder", "timeout_s"})
    seeds_prompts: bool

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises ``UserError`` for an unknown option, a wrong value or a key that is not in the environment."""
        for key in options.keys() - set(_OPTIONS):
            if key in ("api_key", "key", "token"):  # a secret, not to be repeated
                raise UserError(
                    f"sampler.options.{key} would be written to the run folder; put the key into an environment "
                    "variable and name that in sampler.options.api_key_env"
                )
            close = difflib.get_close_matches(key, _OPTIONS, n=1)
            hint = f"did you mean {close[0]!r}? It" if close else "it"
            raise UserError(
                f"sampler.options.{key} is not an option of sampler 'remote'; {hint} takes {', '.join(_OPTIONS)}"
            )
        _check_url(options.get("url"))
        read_key(options.get("api_key_env"))
        _weights_place(options)
        if not isinstance(options.get("seed_requests", True), bool):
            raise UserError(f"sampler.options.seed_requests={options['seed_requests']!r} must be true or false")
        limit = options.get("timeout_s", 1.0)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
            raise UserError(f"sampler.options.timeout_s={limit!r} must be a number of seconds above 0")

    @staticmethod
    def check_sampling(params: SamplingParams) -> None:
        """As the vLLM sampler's: the server is vLLM's."""
        check_temperature(params.temperature)

    def __init__(self, setup: SamplerSetup, **options: Any) -> None:
        self.check_options(options)
        if setup.tensor_parallel > 1:
            raise UserError(
                f"sampler.tensor_parallel={setup.tensor_parallel} has no effect with sampler 'remote'; set it to 1 and "
                "start the server with --tensor-parallel-size"
            )
        if setup.in_flight_updates:
            raise UserError(
                "sampler.in_flight_updates=true cannot be had with sampler 'remote', which reads weights between "
                "requests only; set it to false"
            )
        self._setup = setup
        self._place = _weights_place(options)
        self._place.mkdir(exist_ok=True)
        self._pending: set[Future[list[Group]]] = set()
        self._calls, self._adapters = itertools.count(), itertools.count()
        self._run = uuid.uuid4().hex[:12]  # tells this sampler's adapters and cache entries from all others'
        self._version = 0
        self._adapter: str | None = None
        self._scratch: Path | None = None
        self._lock: tuple[int, Path] | None = None
        config = json.loads((Path(setup.model_folder) / "config.json").read_text())
        self._tied = is_tied(config)
        self._sends_head = self._tied and config.get("model_type") not in HEAD_IS_EMBEDDING
        self._wire: Wire | None = Wire(
            options["url"], options.get("api_key_env"), float(options.get("timeout_s", 1800)), setup
        )
        try:
            self._meet(options.get("seed_requests"))
        except BaseException:
            self.close()
            raise
        self._wire.met = True

    def __repr__(self) -> str:
        return f"RemoteSampler(url={self._wire.url if self._wire else 'closed'!r}, version={self._version})"

    # -- meeting the server --------------------------------------------------------------------------------------------

    def _meet(self, seed_requests: bool | None) -> None:
        """Finds out, before the first request of the run, all that could make a later one wrong."""
        wire = self._open()
        listed = wire.call("/v1/models", doing="listing its models", timeout_s=START_S)
        models = listed.get("data", []) if isinstance(listed, dict) else []
        base: dict[str, Any] = next((one for one in models if not one.get("parent")), {})
        if not isinstance(base.get("max_model_len"), int):
            raise UserError(
                f"the server at {wire.url} is not vLLM's: it lists no model with a max_model_len; {wire.cure}"
            )
        self._base: str = base["id"]
        self._context: int = base["max_model_len"]
        if self._context < self._setup.max_model_tokens:
            raise UserError(
                f"the server at {wire.url} takes {self._context} tokens, fewer than the {self._setup.max_model_tokens} "
                f"of this run's longest prompt and sampler.max_tokens; start it with --max-model-len "
                f"{self._setup.max_model_tokens + 1}"
            )
        shown = wire.call("/server_info?config_format=json", doing="telling its settings", optional=True)
        settings = (shown or {}).get("vllm_config")
        settings = settings if isinstance(settings, dict) else {}
        self._check_settings(settings)
        ids = self._check_tokenizer()
        self._check_logprobs(ids)
        self.takes_adapters = bool(
            wire.has("/v1/unload_lora_adapter", {"lora_name": f"{self._run}-none"})
            and settings.get("lora_config", "unknown")
        )
        self.seeds_prompts = self._check_seeds(seed_requests, settings)
        self._take_lock()
        self._scratch = shared_memory_folder("nanogrpo-remote", self._place)
        self._serve_folder(ids)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """``settings`` are empty where the server does not show them."""
        url = self._open().url
        dtype = str(_setting(settings, "model_config", "dtype") or "").removeprefix("torch.")
        if dtype and dtype != self._setup.dtype:
            raise UserError(
                f"the server at {url} computes in {dtype}, this run in model.dtype={self._setup.dtype!r}; start it "
                f"with --dtype {self._setup.dtype}"
            )
        if _setting(settings, "load_config", "load_format") == "dummy":
            raise UserError(
                f"the server at {url} was started with --load-format dummy, which cannot read weights later; leave "
                "it out"
            )
        lora = settings.get("lora_config") or {}
        adapter = self._setup.adapter
        if adapter and lora and adapter.rank > lora.get("max_lora_rank", adapter.rank):
            raise UserError(
                f"the server at {url} takes adapters up to rank {lora['max_lora_rank']}, model.lora_rank is "
                f"{adapter.rank}; start it with --max-lora-rank {lora_rank(adapter.rank)}"
            )
        if lora and _on_cpu(settings) and "lm_head" in (lora.get("target_modules") or ["lm_head"]):
            wanted = " ".join(adapter.layers) if adapter else "q_proj v_proj ..."
            raise UserError(
                f"the server at {url} wraps its output head for adapters, and on a CPU dies of the next log-probs of a "
                f"prompt; start it with --lora-target-modules {wanted}"
            )

    def _check_tokenizer(self) -> list[int]:
        """A short text's token ids, once the server makes the same of it."""
        wire, folder = self._open(), self._setup.model_folder
        tokenizer = load_tokenizer(folder, self._setup.trust_remote_code)
        ids = [int(token) for token in tokenizer.encode(_SAMPLE, add_special_tokens=False)]
        body = {"model": self._base, "prompt": _SAMPLE, "add_special_tokens": False}
        theirs = wire.call("/tokenize", body, doing="tokenizing a line", optional=True)
        if isinstance(theirs, dict) and theirs.get("tokens") != ids:
            raise UserError(
                f"the server at {wire.url} serves {self._base!r}, whose tokenizer is not that of model.name "
                f"({folder!r}); start it with this model: {wire.cure}"
            )
        return [token for token in ids if token][: max(2, min(16, self._setup.max_model_tokens - 8))]

    def _check_logprobs(self, ids: list[int]) -> None:
        """With top-k 1 one token is left to draw, so that its log-prob is 0 if it is of the distribution drawn from."""
        wire = self._open()
        params = SamplingParams(max_tokens=4, top_k=1)
        work = self._choices(self._body(ids, params), "writing a first completion")
        (choice,) = wire.start(work).result()
        if not choice.get("token_ids"):
            raise UserError(f"the server at {wire.url} returns no token ids; it needs vLLM 0.11 or newer")
        if any(abs(value) > 1e-3 for value in choice["logprobs"]["token_logprobs"]):
            raise UserError(
                f"the server at {wire.url} returns log-probs of another distribution than it draws from; start it with "
                "--logprobs-mode processed_logprobs"
            )

    def _check_seeds(self, wanted: bool | None, settings: Mapping[str, Any]) -> bool:
        chunked = _setting(settings, "scheduler_config", "enable_chunked_prefill")
        if wanted is False:
            return False
        if not settings and wanted is None:
            raise UserError(
                f"the server at {self._open().url} does not show whether it can seed single requests; set "
                "sampler.options.seed_requests=true (on a GPU, or on a CPU with --no-enable-chunked-prefill), or false"
            )
        if _on_cpu(settings) and chunked:
            raise UserError(
                f"the server at {self._open().url} dies of a seeded request whose prompt it computes in parts, as vLLM "
                "on a CPU does; start it with --no-enable-chunked-prefill, or set sampler.options.seed_requests=false "
                "to give up reproducible completions"
            )
        return True

    def _serve_folder(self, ids: list[int]) -> None:
        """Version 0, whatever the server was left with."""
        wire, adapted = self._open(), self._setup.adapter is not None and self.takes_adapters
        if not wire.has("/collective_rpc", {}):
            if adapted:  # the base is the server's own; the proof of the first sync compares it with the learner's
                return
            raise UserError(
                f"the server at {wire.url} takes no weights; start it with VLLM_SERVER_DEV_MODE=1: {wire.cure}"
            )
        folder = FolderWeights(self._setup.model_folder)
        if self._tied and not adapted:
            # Every token takes its neighbour's place: the same log-probs one id lower, if all of the model follows.
            self._load_full(
                (name, t.roll(-1, 0) if name.endswith((*EMBEDDINGS, HEAD)) else t) for name, t in folder.open()
            )
            (shifted,) = self.logprobs([[token - 1 for token in ids]])
            self._load_full(folder.open())
            (right,) = self.logprobs([ids])
            if sum(abs(a - b) for a, b in zip(shifted, right, strict=True)) / len(right) > 0.3:
                raise UserError(
                    f"the server at {wire.url} leaves the tied output head of {self._base!r} at its old weights; start "
                    f"it on an untied copy: sampler.server.prepare_for_server({self._setup.model_folder!r}, NEW_FOLDER)"
                )
        else:
            self._load_full(folder.open())

    def _take_lock(self) -> None:
        """Two runs that give one server their weights would both train on the other's completions."""
        url = self._open().url
        path = self._place / f"nanogrpo-remote-{os.getuid()}-{hashlib.sha256(url.encode()).hexdigest()[:12]}.lock"
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(opened).st_nlink:  # its last holder has removed it just now: the next one makes another
                raise BlockingIOError
        except BlockingIOError:
            os.close(opened)
            raise UserError(
                f"another sampler gives its weights to the server at {url} ({path} is locked); wait for it, or start "
                "another server on another port"
            ) from None
        self._lock = (opened, path)

    # -- the contract --------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        wire = self._open()
        check_room(prompts, params.max_tokens, self._setup.max_model_tokens)
        # The same blocks must be computed and not found, or rounding differs between two equal requests.
        salt = f"{self._run}-{next(self._calls)}" if params.seed is not None else None
        future = GroupsFuture()

        async def write(index: int, prompt: Prompt, body: dict[str, Any]) -> Group:
            group = await self._group(prompt, params, body)
            future.group_done(index, group)
            return group

        bodies = [self._body(p.token_ids, params, self._seed(params, i), salt) for i, p in enumerate(prompts)]
        work = [write(index, prompt, bodies[index]) for index, prompt in enumerate(prompts)]
        started = wire.start(in_order(work))
        self._pending.add(started)
        started.add_done_callback(self._pending.discard)
        follow(future, started)
        return future

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        wire = self._open()
        longest = max((len(sequence) for sequence in sequences), default=0)
        if longest >= self._context:
            raise UserError(
                f"a sequence of {longest} tokens leaves no room in the {self._context} tokens of the server at "
                f"{wire.url}; start it with --max-model-len {longest + 1}"
            )
        return wire.start(in_order([self._scored(sequence) for sequence in sequences])).result()

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self._open()
        futures.wait(set(self._pending))  # each ends within its own time limit
        arrived = self._load_adapter(handle) if handle.kind == "adapter" else self._load_full(handle.open())
        self._version = version
        return arrived

    def sleep(self) -> None:
        """The server keeps its memory."""

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        """Nothing slept."""

    def close(self) -> None:
        """Ends what is in flight, and lets go of the server without stopping it."""
        wire, self._wire = self._wire, None
        if wire is not None:
            if self._adapter is not None:
                wire.leave("/v1/unload_lora_adapter", {"lora_name": self._adapter})
            wire.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self._lock is not None:
            opened, path = self._lock
            path.unlink(missing_ok=True)
            fcntl.flock(opened, fcntl.LOCK_UN)  # closing alone would leave it with processes forked since
            os.close(opened)
        self._scratch, self._lock = None, None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _open(self) -> Wire:
        if self._wire is None:
            raise RunFailure("the remote sampler was called after it was closed")
        return self._wire

    def _seed(self, params: SamplingParams, index: int) -> int | None:
        """A prompt's own, far from every other's: vLLM counts it up for each completion of a group."""
        if params.seed is None or not self.seeds_prompts:
            return None
        return random.Random(f"{params.seed}/{params.seed_offset + index}").getrandbits(31)

    def _body(
        self, token_ids: Sequence[int], params: SamplingParams, seed: int | None = None, salt: str | None = None
    ) -> dict[str, Any]:
        """A request that leaves nothing to the defaults of the server or of the model's generation_config.json."""
        body: dict[str, Any] = {
            "model": self._adapter or self._base,
            "prompt": list(token_ids),
            "n": params.n,
            "max_tokens": params.max_tokens,
            "min_tokens": params.min_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(params.stop),
            "stop_token_ids": list(self._setup.end_tokens),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        return body | ({} if seed is None else {"seed": seed}) | ({} if salt is None else {"cache_salt": salt})

    async def _choices(self, body: dict[str, Any], doing: str) -> list[dict[str, Any]]:
        answer = await self._open().ask("/v1/completions", body, doing=doing)
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise RunFailure(
                f"the sampler server at {self._open().url} gave no completion while {doing}; is it vLLM's?"
            )
        return sorted(answer["choices"], key=lambda choice: int(choice["index"]))

    async def _group(self, prompt: Prompt, params: SamplingParams, body: dict[str, Any]) -> Group:
        version = self._version  # before the first wait: load_weights comes after
        choices = await self._choices(body, f"writing completions of prompt {prompt.id!r}")
        reasons = {choice["finish_reason"] for choice in choices}
        if len(choices) != params.n or not reasons <= {"stop", "length"}:
            raise RunFailure(
                f"the sampler server at {self._open().url} gave {len(choices)} of {params.n} completions of prompt "
                f"{prompt.id!r}, finished by {sorted(map(str, reasons))}; another client may have aborted them"
            )
        return Group(
            prompt,
            tuple(
                Completion(
                    token_ids=tuple(choice["token_ids"]),
                    text=choice["text"] + stop_string(choice.get("stop_reason")),
                    logprobs=tuple(choice["logprobs"]["token_logprobs"]),
                    finish_reason=choice["finish_reason"],
                    policy_version=version,
                )
                for choice in choices
            ),
        )

    async def _scored(self, sequence: Sequence[int]) -> list[float]:
        if len(sequence) < 2:
            return []
        body = self._body(sequence, SamplingParams(max_tokens=1)) | {"prompt_logprobs": 0}
        (choice,) = await self._choices(body, "giving the log-probs of a prompt")
        entries = choice["prompt_logprobs"][1:]
        return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, sequence[1:], strict=True)]

    def _load_full(self, tensors: Tensors) -> str:
        wire, added = self._open(), False

        def with_head() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal added
            embedding, added = None, self._sends_head
            for name, tensor in tensors:
                added = added and name != HEAD
                yield name, tensor
                if name.endswith(EMBEDDINGS):
                    embedding = tensor
            if added:
                if embedding is None:
                    raise UserError(
                        "the model ties its output head to an embedding of a name that is not known here "
                        f"(known: {', '.join(EMBEDDINGS)}); use sampler.name='hf', or an adapter (model.lora_rank)"
                    )
                yield HEAD, embedding

        written = SharedMemoryWeights.write(with_head(), "full", bucket_bytes=_FILE_BYTES, place=self._scratch)
        try:
            arrived = fingerprint(pair for pair in written.open() if not (added and pair[0] == HEAD))
            body = {"method": "reload_weights", "kwargs": {"weights_path": written.folder}}
            doing = f"reading the weights in {written.folder} (which must be the same folder over there)"
            wire.call("/collective_rpc", body, doing=doing)
        finally:
            written.remove()
        self._forget_cache()
        self._drop_adapter()
        return arrived

    def _forget_cache(self) -> None:
        deadline = time.monotonic() + _RESET_S
        while True:
            answer = self._open().call("/reset_prefix_cache", {}, doing="forgetting its prefix cache")
            if not isinstance(answer, dict) or answer.get("success", True):
                return
            if time.monotonic() > deadline:
                raise RunFailure(
                    f"the sampler server at {self._open().url} did not forget its prefix cache within {_RESET_S:g} s; "
                    "another client keeps it in use"
                )
            time.sleep(0.05)  # blocks of requests just ended are freed a moment later

    def _load_adapter(self, handle: WeightHandle) -> str:
        wire = self._open()
        if not self.takes_adapters or self._scratch is None:
            raise UserError(
                f"the server at {wire.url} takes no adapters; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        name = f"nanogrpo-{self._run}-{next(self._adapters)}"  # one it has seen would be served from its cache
        folder = self._scratch / name
        folder.mkdir()
        file = folder / "adapter_model.safetensors"
        file.write_bytes(InlineWeights.of(handle.open(), "adapter").data)
        (folder / "adapter_config.json").write_text(json.dumps(dict(handle.adapter_config or {})))
        doing = f"reading the adapter in {folder} (which must be the same folder over there)"
        wire.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, doing=doing)
        self._drop_adapter()
        self._adapter = name
        return FolderWeights(str(folder)).sent()[0]

    def _drop_adapter(self) -> None:
        old, self._adapter = self._adapter, None
        if old is not None and self._scratch is not None:
            self._open().call("/v1/unload_lora_adapter", {"lora_name": old}, doing="forgetting an adapter")
            shutil.rmtree(self._scratch / old, ignore_errors=True)


# -- options and answers -----------------------------------------------------------------------------------------------


def _check_url(url: Any) -> None:
    if url is None:
        raise UserError("sampler.options.url is missing, and sampler 'remote' needs it; set it to http://HOST:PORT")
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        right = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, right = None, False
    if parts is not None and parts.username is not None:
        raise UserError(
            "sampler.options.url holds a user name; leave it out and name a key in sampler.options.api_key_env"
        )
    if not right or parts is None or parts.query or parts.fragment:
        raise UserError(f"sampler.options.url={url!r} is not of the form http://HOST:PORT")
    if parts.path.rstrip("/").endswith("/v1"):
        raise UserError(f"sampler.options.url={url!r} ends with /v1; leave that out")


def _weights_place(options: Mapping[str, Any]) -> Path:
    """Where weights are written: this host's own folder in ``weights_folder``, since numbers of processes, by which
    left-over folders are known, mean nothing on another host."""
    named = options.get("weights_folder")
    if named is None:
        host = urlsplit(options["url"]).hostname or ""
        if not _is_here(host):
            raise UserError(
                f"sampler.options.weights_folder is missing, and the server is on another host ({host}); name a folder "
                "that both see under the same path"
            )
        named = "/dev/shm"
    if not isinstance(named, str) or not Path(named).is_dir() or not os.access(named, os.W_OK):
        raise UserError(f"sampler.options.weights_folder={named!r} is not a folder that can be written to; make it")
    if named == "/dev/shm":
        return Path(named)
    return Path(named).absolute() / f"nanogrpo-{socket.gethostname()}"


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname())


def _on_cpu(settings: Mapping[str, Any]) -> bool:
    return bool(_setting(settings, "device_config", "device") == "cpu")


def _setting(settings: Mapping[str, Any], section: str, name: str) -> Any:
    return (settings.get(section) or {}).get(name)
