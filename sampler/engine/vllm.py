"""vLLM in this process, on a CPU or a GPU build: the sampler of every real run.

The engine stays in this process, so that tensors are passed without a copy. It works in ``pump``, a step at a time,
and requests join and leave between steps; one thread makes every call, ``result`` of its futures included. Weights go
in through ``reload_weights``: after loading, vLLM repacks its linear layers, and its model's own ``load_weights`` fails
on them. Over several devices the shards live in worker processes, which read the weights from shared memory.

What only a CPU needs is in ``cpu_patches.py``. Sleeping and waking, and the base in 4 bits, need a GPU and have not yet
run on one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from common.errors import RunFailure, UserError, brief
from common.protocols import GroupsFuture, WeightHandle
from common.tokenizer import check_room
from common.types import Group, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import Fingerprint, FolderWeights, SharedMemoryWeights, shared_memory_folder, weight_files
from sampler.engine import cpu_patches
from sampler.engine.arguments import OURS, engine_arguments, environment, needs_head
from sampler.engine.memory import memory_needed
from sampler.engine.sampling import (
    check_temperature,
    completion_of,
    part_seed,
    prompt_seed,
    refusals,
    sampling_arguments,
    vllm_params,
)
from sampler.engine.stored_weights import ArrivedAdapter, adapter_faults, reload_weights, weight_faults


class Answer(GroupsFuture):
    """What ``generate`` returns. Waiting for it does the engine's work, other requests' too, so only the thread that
    owns the sampler may wait, and only by ``result`` or ``exception``."""

    def __init__(self, sampler: VllmSampler, size: int, finish: Callable[[int, Any], Any]) -> None:
        super().__init__()
        self._sampler, self._finish = sampler, finish
        self._answers: list[Any] = [None] * size
        self._left = size
        self.set_running_or_notify_cancel()  # or it could be cancelled, and the engine would still work on it

    def take(self, place: int, output: Any) -> None:
        """The engine's output for one of the prompts; with the last of them the future is done."""
        self._answers[place] = self._finish(place, output)
        self.group_done(place, self._answers[place])
        self._left -= 1
        if not self._left:
            self.set_result(self._answers)

    def result(self, timeout: float | None = None) -> Any:
        """The groups. Raises ``concurrent.futures.TimeoutError`` once ``timeout`` seconds have passed (looked at after
        each step), and ``RunFailure`` if the engine failed, or was closed, before they were written."""
        self._work(timeout)
        return super().result(timeout=0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``, working like ``result``."""
        self._work(timeout)
        return super().exception(timeout=0)

    def _work(self, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not self.done() and (end is None or time.monotonic() < end) and self._sampler.pump():
            pass


class VllmSampler:
    """A vLLM engine in this process; ``**options`` are arguments of ``vllm.LLM`` and win over the defaults here."""

    takes_adapters = True
    free_options = frozenset({
        "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "cpu_offload_gb",
        "max_num_seqs", "max_num_batched_tokens", "enforce_eager",
    })  # fmt: skip
    seeds_prompts: bool
    """On a GPU, where vLLM takes a seed for each prompt; not on the CPU."""

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises ``UserError`` for an option that vLLM does not know or that is not the user's to set, and when vLLM
        is not installed."""
        for key in options:
            if key in OURS:
                raise UserError(f"sampler.options.{key} is set by nanogrpo itself; use {OURS[key]}")
        environment()
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

    @staticmethod
    def check_sampling(params: SamplingParams) -> None:
        """Raises ``UserError`` for a temperature that vLLM refuses, or would replace silently."""
        check_temperature(params.temperature)

    @staticmethod
    def completions_at_once(options: Mapping[str, Any]) -> int:
        """vLLM's ``max_num_seqs``; 256 unless it is set, vLLM's own number for CPUs and for cards below 70 GiB."""
        return int(options.get("max_num_seqs") or 256)

    memory_needed = staticmethod(memory_needed)

    def __init__(self, setup: SamplerSetup, **options: Any) -> None:
        self.check_options(options)
        if setup.in_flight_updates and setup.adapter is not None:
            raise UserError(
                "sampler.in_flight_updates=true cannot be had with an adapter: a completion in flight keeps its "
                "own; set it to false, or model.lora_rank to 0"
            )
        self._llm: Any = None
        self._setup = setup
        self._on_cpu = setup.device == "cpu"
        self.seeds_prompts = not self._on_cpu
        self._asleep = False
        self._broken = ""  # what went wrong in a step, after which the engine is not to be trusted
        self._torn = ""  # says that a transfer of weights stopped half-way; the next one fixes it
        self._adapter: Any = None  # the LoRARequest served now
        self._adapter_count = 0
        self._arrived = Fingerprint()  # of the last transfer
        self._numbers = itertools.count()
        self._open: dict[str, tuple[Answer, int]] = {}  # by the engine's request id: whose, and which of its prompts
        self._model: dict[str, Any] = json.loads((Path(setup.model_folder) / "config.json").read_text())
        self._scratch = shared_memory_folder("nanogrpo-sampler")
        self._sends_head = setup.adapter is None and needs_head(self._model)
        try:
            self._start(options)
        except BaseException:
            self.close()
            raise

    def _start(self, options: dict[str, Any]) -> None:
        import vllm

        setup = self._setup
        served = dataclasses.replace(setup, model_folder=str(self._own_files(Path(setup.model_folder))))
        try:
            self._llm = vllm.LLM(**(engine_arguments(served, self._model, self._sends_head) | options))
        except Exception as error:  # of any kind: a model class of vLLM's may not even be whole
            vllm.distributed.cleanup_dist_env_and_memory()  # or its groups would be the next engine's
            sentence = f"vLLM cannot start with model {setup.model_folder!r}: {type(error).__name__}: {brief(error)}"
            # vLLM refuses arguments, models and too little memory by ValueError; anything else broke on its way.
            raise (UserError if isinstance(error, ValueError) else RunFailure)(sentence) from error
        if self._on_cpu:
            self._llm.collective_rpc(cpu_patches.patch_worker, args=(setup.tensor_parallel > 1,))
        if setup.adapter is None:
            self.load_weights(FolderWeights(setup.model_folder), version=0)
        else:
            self._llm.llm_engine.set_weight_version("0")

    def _own_files(self, folder: Path) -> Path:
        """The folder, or where it holds a second set of weights and vLLM is to read them from it, which would then take
        both, one of links to all but those."""
        weights = weight_files(folder) if self._setup.adapter is not None else []
        if not weights or {*folder.glob("*.safetensors")} == {*weights}:
            return folder
        links = self._scratch / folder.name
        links.mkdir()
        for file in folder.iterdir():
            if file.suffix != ".safetensors" or file in weights:
                (links / file.name).symlink_to(file.absolute())
        return links

    # -- the contract ------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        self._ready()
        check_room(prompts, params.max_tokens, self._setup.max_model_tokens)
        fields = sampling_arguments(params, self._setup.end_tokens)
        seeds: list[int | None] = [None] * len(prompts)
        if params.seed is not None and self.seeds_prompts:
            seeds = [prompt_seed(params.seed, params.seed_offset + place) for place in range(len(prompts))]
        with refusals():
            requests = [vllm_params(**fields, seed=seed) for seed in seeds]
        if params.seed is not None:
            if not self._open:
                # The same blocks must be computed and not found, or rounding differs between two equal requests.
                self._forget()
            if self._on_cpu:
                seed = part_seed(params.seed, params.seed_offset)
                self._llm.collective_rpc(cpu_patches.seed_worker, args=(seed,))
        return self._begin(
            [prompt.token_ids for prompt in prompts],
            requests,
            lambda place, output: Group(prompts[place], tuple(map(completion_of, output.outputs))),
        )

    def pump(self) -> bool:
        """One step of the engine for every request in flight; says whether any is left.

        Raises nothing: if the step fails, the future of every request in flight holds a ``RunFailure``.
        """
        if not self._open:
            return False
        try:
            # On the CPU vLLM would spend 15 s compiling one small log-prob function that runs as fast without.
            with torch.compiler.set_stance("force_eager") if self._on_cpu else contextlib.nullcontext():
                outputs = self._llm.llm_engine.step()
        except Exception as error:
            died = getattr(self._llm.llm_engine.model_executor, "is_failed", False)  # then the error says "cancelled"
            why = "one of its worker processes died" if died else brief(error)
            self._broken = f"the vLLM sampler failed while writing: {why}"
            self._drop(self._broken, error)
            return False
        for output in outputs:
            if output.finished:
                answer, place = self._open.pop(output.request_id)
                answer.take(place, output)
        return bool(self._open)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._ready()
        ask = vllm_params(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        outputs = self._begin(sequences, [ask] * len(sequences), lambda place, output: output).result()
        return [
            [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], sequence[1:], strict=True)]
            for out, sequence in zip(outputs, sequences, strict=True)
        ]

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        self._alive()
        if not self._setup.in_flight_updates:
            self._drain()
        swapping = bool(self._open)
        if swapping:  # no step may run, not even one already on its way to the device
            self._llm.sleep(level=0, mode="keep")
        self._torn = f"the vLLM sampler was left with a part of the weights of version {version}"
        try:
            if handle.kind == "adapter":
                arrived: Fingerprint = ArrivedAdapter(handle.adapter_config or {})
                self._load_adapter(arrived.watch(handle.open()), arrived.adapter_config or {})
            else:
                arrived = self._load_full(handle)
        except Exception as error:
            self._drop(self._torn, error)
            if isinstance(error, UserError):
                raise
            raise RunFailure(f"the vLLM sampler could not load weights of version {version}: {brief(error)}") from error
        finally:
            if swapping:
                self._llm.wake_up(tags=["scheduling"])
        # What requests in flight have cached is dropped too: they compute all their tokens again, with these weights.
        self._forget(swapping)
        self._llm.llm_engine.set_weight_version(str(version))
        self._torn, self._arrived = "", arrived
        return arrived.digest()

    def check_weights(self, fingerprint: str) -> list[str]:
        """Compares what the engine stores with what last arrived, bit for bit; see
        ``sampler/engine/stored_weights.py``."""
        self._alive()
        arrived = self._arrived
        if arrived.digest() != fingerprint:
            return ["the transfer was not completed"]
        if isinstance(arrived, ArrivedAdapter):
            served = 0 if self._adapter is None else self._adapter.lora_int_id
            found = self._llm.collective_rpc(adapter_faults, args=(served, arrived))
        else:
            found = self._llm.collective_rpc(weight_faults, args=(arrived.sums,))
        return list(dict.fromkeys(fault for faults in found for fault in faults))

    def sleep(self) -> None:
        if self._on_cpu or not self._setup.shares_device or self._asleep:
            return
        self._drain()
        # Level 2 drops the weights, which the next sync sends anyway; an adapter's base must be kept (level 1).
        self._llm.sleep(level=1 if self._setup.adapter is not None else 2)
        self._asleep = True

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        if not self._asleep:
            return
        self._llm.wake_up(tags={"weights": ["weights"], "cache": ["kv_cache"], "all": None}[part])
        self._asleep = part == "weights"

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            for answer in {answer for answer, _ in self._open.values()}:
                answer.set_exception(RunFailure("the vLLM sampler was closed before it had answered"))
            self._open.clear()
            with contextlib.suppress(AttributeError):
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _begin(
        self, prompts: Sequence[Sequence[int]], params: Sequence[Any], finish: Callable[[int, Any], Any]
    ) -> Answer:
        from vllm.inputs import tokens_input

        answer = Answer(self, len(prompts), finish)
        if not prompts:
            answer.set_result([])
        added: list[str] = []
        try:
            with refusals():
                for place, (token_ids, asked) in enumerate(zip(prompts, params, strict=True)):
                    number = str(next(self._numbers))
                    inputs = tokens_input(list(token_ids))
                    self._llm.llm_engine.add_request(number, inputs, asked, lora_request=self._adapter)
                    self._open[number] = (answer, place)
                    added.append(number)
        except BaseException:  # those before one that is refused must not stay behind
            self._llm.llm_engine.abort_request(added)
            for number in added:
                del self._open[number]
            raise
        return answer

    def _drain(self) -> None:
        while self.pump():
            pass
        self._alive()

    def _forget(self, swapping: bool = False) -> None:
        """Empties the prefix cache. vLLM leaves it as it is, and only logs that, while a block is still in use: on a
        GPU the engine is a step ahead of the outputs it has returned, and that step may hold some.

        Raises ``RunFailure`` when blocks stay in use; what they hold may be by old weights.
        """
        for _ in range(4):
            if self._llm.reset_prefix_cache(reset_running_requests=swapping):
                return
            if not self._open:  # the step ahead belongs to no request
                self._llm.llm_engine.step()
        raise RunFailure("the vLLM sampler cannot empty its prefix cache: some of its blocks stay in use")

    def _drop(self, why: str, error: BaseException) -> None:
        """Ends every request in flight with a ``RunFailure``."""
        open_, self._open = self._open, {}
        for answer in {answer for answer, _ in open_.values()}:
            failure = RunFailure(why)
            failure.__cause__ = error
            answer.set_exception(failure)
        with contextlib.suppress(Exception):  # an engine that failed may not be able to do even this
            self._llm.llm_engine.abort_request(list(open_))

    def _load_full(self, handle: WeightHandle) -> Fingerprint:
        if self._on_cpu:
            self._llm.collective_rpc(cpu_patches.pack_experts_again)
        if self._setup.tensor_parallel == 1:
            arrived: Fingerprint = self._llm.collective_rpc(reload_weights, args=(handle, self._sends_head))[0]
            return arrived
        arrived = Fingerprint()
        shared = SharedMemoryWeights.write(arrived.watch(handle.open()), "full")
        try:
            self._llm.collective_rpc(reload_weights, args=(shared, self._sends_head))
        finally:
            shared.remove()
        return arrived

    def _load_adapter(self, tensors: Iterator[tuple[str, torch.Tensor]], config: dict[str, Any]) -> None:
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
        if self._llm is None:
            raise RunFailure("the vLLM sampler was called after it was closed")
        if self._broken:
            raise RunFailure(self._broken)

    def _ready(self) -> None:
        self._alive()
        if self._asleep:
            raise RunFailure("the vLLM sampler was called while asleep; wake it first")
        if self._torn:
            raise RunFailure(self._torn)
