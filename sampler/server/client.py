"""``sampler.name="remote"``: a vLLM server that was started separately, driven over HTTP, for a sampler that outlives
runs, or that lives where only a port is open.

Token ids go in and come out, one request for each prompt. Full weights are written to a folder that both sides see, and
the server reads them from there (``/collective_rpc``, which needs ``VLLM_SERVER_DEV_MODE=1``); an adapter is loaded
from there under a name that was never used before. Left out: starting and stopping the server, several servers,
sleeping. Anyone who reaches the port of a server in developer mode controls it, with or without the key: keep the port
on the host or behind a tunnel.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import ipaddress
import itertools
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

from common.errors import RunFailure, UserError
from common.protocols import GroupsFuture, WeightHandle
from common.tokenizer import check_room, load_tokenizer
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import FolderWeights, InlineWeights, SharedMemoryWeights, fingerprint, shared_memory_folder
from sampler.engine.arguments import needs_head, with_head
from sampler.engine.sampling import check_temperature, prompt_seed, sampling_arguments, stop_string
from sampler.server.command import check_settings, server_command, shell_line
from sampler.server.http import MEET_S, VllmHttp, follow, in_order, read_key

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
        self._sends_head = needs_head(json.loads((Path(setup.model_folder) / "config.json").read_text()))
        self._pending: set[Future[list[Group]]] = set()
        self._calls, self._adapters = itertools.count(), itertools.count()
        self._run = uuid.uuid4().hex[:12]  # distinguishes this sampler's adapters and cache entries from all others'
        self._version = 0
        self._adapter: str | None = None
        self._http: VllmHttp | None = None
        self._closing = contextlib.ExitStack()
        place, url = _weights_place(options), options["url"]
        place.mkdir(exist_ok=True)
        try:
            self._closing.enter_context(_only_sampler_of(url.rstrip("/"), place))
            self._scratch = shared_memory_folder("nanogrpo-remote", place)
            self._closing.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            cure = f"the server for this run is started by `{shell_line(*server_command(setup, url))}`"
            limit_s = float(options.get("timeout_s", 1800))
            self._http = VllmHttp(url, options.get("api_key_env"), limit_s, setup.max_sequences, cure)
            self._closing.callback(self._http.close)
            self._meet(self._http, options.get("seed_requests"))
        except BaseException:
            self.close()
            raise
        self._http.met = True

    # -- meeting the server: all that could make a later request wrong is found out before the first -------------------

    def _meet(self, http: VllmHttp, seed_requests: bool | None) -> None:
        listed = http.call("/v1/models", doing="listing its models", timeout_s=MEET_S)
        models = listed.get("data", []) if isinstance(listed, dict) else []
        base: dict[str, Any] = next((model for model in models if not model.get("parent")), {})
        if not isinstance(base.get("max_model_len"), int):
            raise UserError(
                f"the server at {http.url} is not vLLM's: it lists no model with a max_model_len; {http.cure}"
            )
        self._base: str = base["id"]
        shown = http.call("/server_info?config_format=json", doing="telling its settings", optional=True)
        settings = (shown or {}).get("vllm_config")
        settings = settings if isinstance(settings, dict) else {}
        check_settings(http.url, base["max_model_len"], settings, self._setup, seed_requests)
        self.seeds_prompts = seed_requests is not False
        self.takes_adapters = bool(settings.get("lora_config", "unknown")) and http.has("/v1/unload_lora_adapter")
        self._check_logprobs(http, self._check_tokenizer(http))
        self._serve_folder(http)

    def _check_tokenizer(self, http: VllmHttp) -> list[int]:
        """A short text's token ids, once the server makes the same of it."""
        folder = self._setup.model_folder
        tokenizer = load_tokenizer(folder, self._setup.trust_remote_code)
        ids = [int(token) for token in tokenizer.encode(_SAMPLE, add_special_tokens=False)]
        body = {"model": self._base, "prompt": _SAMPLE, "add_special_tokens": False}
        theirs = http.call("/tokenize", body, doing="tokenizing a line", optional=True)
        if isinstance(theirs, dict) and theirs.get("tokens") != ids:
            raise UserError(
                f"the server at {http.url} serves {self._base!r}, whose tokenizer is not that of model.name "
                f"({folder!r}); start it with this model: {http.cure}"
            )
        return ids[: max(2, min(16, self._setup.max_model_tokens - 8))]

    def _check_logprobs(self, http: VllmHttp, ids: list[int]) -> None:
        """With top-k 1 one token is left to draw, so that its log-prob is 0 if it is of the distribution drawn from."""
        body = self._body(ids, SamplingParams(max_tokens=4, top_k=1))
        (choice,) = http.start(self._choices(body, "writing a first completion")).result()
        if not choice.get("token_ids"):
            raise UserError(f"the server at {http.url} returns no token ids; it needs vLLM 0.11 or newer")
        if any(abs(value) > 1e-3 for value in choice["logprobs"]["token_logprobs"]):
            raise UserError(
                f"the server at {http.url} returns log-probs of another distribution than it draws from; start it with "
                "--logprobs-mode processed_logprobs"
            )

    def _serve_folder(self, http: VllmHttp) -> None:
        """Version 0, whatever the server was left with."""
        if http.has("/collective_rpc"):
            self._load_full(FolderWeights(self._setup.model_folder).open())
        elif self._setup.adapter is None or not self.takes_adapters:
            raise UserError(
                f"the server at {http.url} takes no weights; start it with VLLM_SERVER_DEV_MODE=1: {http.cure}"
            )
        # Else the base is the server's own; the proof of the first sync compares it with the learner's.

    # -- the contract --------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        http, version = self._server(), self._version
        check_room(prompts, params.max_tokens, self._setup.max_model_tokens)
        # The same blocks must be computed and not found, or rounding differs between two equal requests.
        salt = {} if params.seed is None else {"cache_salt": f"{self._run}-{next(self._calls)}"}
        future = GroupsFuture()

        async def write(index: int, prompt: Prompt, body: dict[str, Any]) -> Group:
            group = await self._group(prompt, params.n, body, version)
            future.group_done(index, group)
            return group

        work = []
        for index, prompt in enumerate(prompts):
            body = self._body(prompt.token_ids, params) | salt
            if params.seed is not None and self.seeds_prompts:
                body["seed"] = prompt_seed(params.seed, params.seed_offset + index)
            work.append(write(index, prompt, body))
        started = http.start(in_order(work))
        self._pending.add(started)
        started.add_done_callback(self._pending.discard)
        follow(future, started)
        return future

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._server().start(in_order([self._prompt_logprobs(sequence) for sequence in sequences])).result()

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self._server()
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
        if self._http is not None and self._adapter is not None:
            self._http.leave("/v1/unload_lora_adapter", {"lora_name": self._adapter})
        self._http = self._adapter = None
        self._closing.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _server(self) -> VllmHttp:
        if self._http is None:
            raise RunFailure("the remote sampler was called after it was closed")
        return self._http

    def _body(self, token_ids: Sequence[int], params: SamplingParams) -> dict[str, Any]:
        """A request that leaves nothing to the defaults of the server or of the model's generation_config.json."""
        return sampling_arguments(params, self._setup.end_tokens) | {
            "model": self._adapter or self._base,
            "prompt": list(token_ids),
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "return_token_ids": True,
        }

    async def _choices(self, body: dict[str, Any], doing: str) -> list[dict[str, Any]]:
        http = self._server()
        answer = await http.ask("/v1/completions", body, doing=doing)
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise RunFailure(f"the sampler server at {http.url} gave no completion while {doing}; is it vLLM's?")
        return sorted(answer["choices"], key=lambda choice: int(choice["index"]))

    async def _group(self, prompt: Prompt, n: int, body: dict[str, Any], version: int) -> Group:
        choices = await self._choices(body, f"writing completions of prompt {prompt.id!r}")
        reasons = {choice["finish_reason"] for choice in choices}
        if len(choices) != n or not reasons <= {"stop", "length"}:
            raise RunFailure(
                f"the sampler server at {self._server().url} gave {len(choices)} of {n} completions of prompt "
                f"{prompt.id!r}, finished by {sorted(map(str, reasons))}; another client may have aborted them"
            )
        completions = [
            Completion(
                token_ids=tuple(choice["token_ids"]),
                text=choice["text"] + stop_string(choice.get("stop_reason")),
                logprobs=tuple(choice["logprobs"]["token_logprobs"]),
                finish_reason=choice["finish_reason"],
                policy_version=version,
            )
            for choice in choices
        ]
        return Group(prompt, tuple(completions))

    async def _prompt_logprobs(self, sequence: Sequence[int]) -> list[float]:
        if len(sequence) < 2:
            return []
        body = self._body(sequence, SamplingParams(max_tokens=1)) | {"prompt_logprobs": 0}
        (choice,) = await self._choices(body, "giving the log-probs of a prompt")
        entries = choice["prompt_logprobs"][1:]
        return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, sequence[1:], strict=True)]

    def _load_full(self, tensors: Tensors) -> str:
        sent: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                sent.add(name)
                yield name, tensor

        source = with_head(noted()) if self._sends_head else noted()
        written = SharedMemoryWeights.write(source, "full", bucket_bytes=_FILE_BYTES, place=self._scratch)
        try:
            arrived = fingerprint(pair for pair in written.open() if pair[0] in sent)
            body = {"method": "reload_weights", "kwargs": {"weights_path": written.folder}}
            doing = f"reading the weights in {written.folder} (which must be the same folder over there)"
            self._server().call("/collective_rpc", body, doing=doing)
        finally:
            written.remove()
        self._forget_cache()
        self._drop_adapter()
        return arrived

    def _forget_cache(self) -> None:
        http, deadline = self._server(), time.monotonic() + _RESET_S
        while True:
            answer = http.call("/reset_prefix_cache", {}, doing="forgetting its prefix cache")
            if not isinstance(answer, dict) or answer.get("success", True):
                return
            if time.monotonic() > deadline:
                raise RunFailure(
                    f"the sampler server at {http.url} did not forget its prefix cache within {_RESET_S:g} s; "
                    "another client keeps it in use"
                )
            time.sleep(0.05)  # blocks of requests just ended are freed a moment later

    def _load_adapter(self, handle: WeightHandle) -> str:
        http = self._server()
        if not self.takes_adapters:
            raise UserError(
                f"the server at {http.url} takes no adapters; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        name = f"nanogrpo-{self._run}-{next(self._adapters)}"  # one it has seen would be served from its cache
        folder = self._scratch / name
        folder.mkdir()
        file = folder / "adapter_model.safetensors"
        file.write_bytes(InlineWeights.of(handle.open(), "adapter").data)
        (folder / "adapter_config.json").write_text(json.dumps(dict(handle.adapter_config or {})))
        doing = f"reading the adapter in {folder} (which must be the same folder over there)"
        http.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, doing=doing)
        self._drop_adapter()
        self._adapter = name
        return FolderWeights(str(folder)).sent()[0]

    def _drop_adapter(self) -> None:
        old, self._adapter = self._adapter, None
        if old is not None:
            self._server().call("/v1/unload_lora_adapter", {"lora_name": old}, doing="forgetting an adapter")
            shutil.rmtree(self._scratch / old, ignore_errors=True)


@contextlib.contextmanager
def _only_sampler_of(url: str, place: Path) -> Iterator[None]:
    """Two runs that give one server their weights would both train on the other's completions."""
    path = place / f"nanogrpo-remote-{os.getuid()}-{hashlib.sha256(url.encode()).hexdigest()[:12]}.lock"
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(opened).st_nlink > 0  # else its last holder has removed it just now
        except BlockingIOError:
            free = False
        if not free:
            raise UserError(
                f"another sampler gives its weights to the server at {url} ({path} is locked); wait for it, or start "
                "another server on another port"
            )
        yield
        path.unlink(missing_ok=True)
        fcntl.flock(opened, fcntl.LOCK_UN)  # closing alone would leave it with processes forked since
    finally:
        os.close(opened)


# -- options -----------------------------------------------------------------------------------------------------------


def _check_url(url: Any) -> None:
    if url is None:
        raise UserError("sampler.options.url is missing, and sampler 'remote' needs it; set it to http://HOST:PORT")
    if "@" in str(url):  # what stands before it may be a key
        raise UserError(
            "sampler.options.url holds a user name; leave it out and name a key in sampler.options.api_key_env"
        )
    if str(url).rstrip("/").endswith("/v1"):
        raise UserError(f"sampler.options.url={url!r} ends with /v1; leave that out")
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        parts = urlsplit(url)
        if (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and not parts.query + parts.fragment
        ):
            return
    raise UserError(f"sampler.options.url={url!r} is not of the form http://HOST:PORT")


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
