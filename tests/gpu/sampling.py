"""The samplers' checks: the contract, and small whole runs; hf first, then vLLM where it is installed.

On a CPU vLLM goes through the part of its contract that a sync needs; the ordinary tests hold it to all of it there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common.types import SamplerSetup, SamplingParams
from sampler.conformance import CHECKS, ContractError, Harness
from sampler.conformance.reference import ReferenceModel, handle_of, perturbed
from tests.gpu import grpo
from tests.gpu.place import GIB, device, folder_of
from tests.gpu.runner import Report, Skip

SYNCED = ("fingerprint", "logprobs", "weights", "output_head", "seed", "sleep_wake")


def _contract(report: Report, make: Any, names: Sequence[str], dtype: str, where: str) -> None:
    """Every check of the contract, going on after one that fails."""
    wrong = []
    with folder_of() as folder, Harness(make, folder, dtype=dtype, device=where) as env:
        for name in names:
            started = time.perf_counter()
            try:
                CHECKS[name](env)
            except ContractError as error:
                wrong.append(str(error))
                print(error, flush=True)
            report.note(**{f"{name}_s": time.perf_counter() - started})
    report.note(dtype=dtype, passed=len(names) - len(wrong), of=len(names))
    assert not wrong, f"{len(wrong)} of {len(names)} fail: " + "; ".join(wrong)


def hf_contract(report: Report) -> None:
    """``check_sampler`` on the hf sampler in float32."""
    from sampler.hf import HfSampler

    _contract(report, HfSampler, tuple(CHECKS), "float32", device())


def hf_run(report: Report) -> None:
    """A whole run with the hf sampler: the reward of a toy task rises, and both sides' log-probs agree."""
    where = device()
    with folder_of() as folder:
        steps = 8 if where == "cpu" else 20
        spec = grpo.config_of(folder, "model.dtype=float32", "sampler.name=hf", f"train.steps={steps}")
        report.note(**(found := grpo.trained(spec)))
    assert found["logprob_diff_max"] < 1e-2, f"sampler and learner differ by {found['logprob_diff_max']:.2g} nats"
    assert found["reward_last_third"] > 1.2 * found["reward_first_third"], "the reward did not rise"


# -- vLLM --------------------------------------------------------------------------------------------------------------


def _vllm() -> Any:
    from sampler.engine.vllm import VllmSampler

    VllmSampler.check_options({})  # sets its environment before it is imported
    return VllmSampler


@contextlib.contextmanager
def _engine(folder: Path, dtype: str, where: str, setup: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    sampler = _vllm()(SamplerSetup(str(folder), dtype, 192, 64, device=where, **(setup or {})), **options)
    try:
        yield sampler
    finally:
        sampler.close()


def _dtype(where: str) -> str:
    return "float32" if where == "cpu" else "bfloat16"


def vllm_engine(report: Report) -> None:
    """Starts; notes runner, scheduling, attention and tokens a second; its log-probs are the reference's."""
    where = device()
    with folder_of() as folder:
        started = time.perf_counter()
        with _engine(folder, _dtype(where), where) as sampler:
            report.note(start_s=time.perf_counter() - started)
            engine = sampler._llm.llm_engine.vllm_config
            (runner,) = sampler._llm.collective_rpc(_runner_of)
            report.note(
                runner=runner,
                v2=bool(engine.use_v2_model_runner),
                asynchronous=bool(engine.scheduler_config.async_scheduling),
                graphs=str(engine.compilation_config.cudagraph_mode),
                cache_blocks=engine.cache_config.num_gpu_blocks,
            )  # fmt: skip
            env = Harness(lambda setup: sampler, folder, _dtype(where), where)
            prompts = [env.prompt("Which is larger, 17 or 9?", name=f"p{number}") for number in range(8)]
            params = SamplingParams(n=8, max_tokens=100, seed=1)
            sampler.generate(prompts, params).result()
            started = time.perf_counter()
            groups = sampler.generate(prompts, params).result()
            tokens = sum(len(one.token_ids) for group in groups for one in group.completions)
            report.note(tokens_per_s=tokens / (time.perf_counter() - started))
            off = _off_by(env.reference, {0: env.base}, groups)
            report.note(logprob_diff_mean=off, allowed=env.tolerance)
            assert off < env.tolerance, f"log-probs are {off:.3g} nats off on average"
    if where != "cpu":
        assert engine.use_v2_model_runner and engine.scheduler_config.async_scheduling, (
            "not what vLLM 0.32 does by default"
        )


def _runner_of(worker: Any) -> str:
    kind = type(worker.model_runner)
    backends = {
        type(getattr(layer, "impl", None)).__name__
        for layer in worker.model_runner.get_model().modules()
        if getattr(layer, "impl", None) is not None
    }
    return f"{kind.__module__}.{kind.__name__}, attention {', '.join(sorted(backends)) or 'unknown'}"


def _off_by(reference: ReferenceModel, weights: dict[int, Any], groups: Sequence[Any]) -> float:
    """Mean |sampler - reference| log-prob, each token under the weights whose version it carries."""
    off = []
    for group in groups:
        for one in group.completions:
            versions = one.token_versions or (one.policy_version,) * len(one.token_ids)
            ids, first = group.prompt.token_ids + one.token_ids, len(group.prompt.token_ids) - 1
            for version in set(versions):
                expected = reference.logprobs(weights[version], ids)[first:]
                off += [
                    abs(mine - right)
                    for mine, right, by in zip(one.logprobs, expected, versions, strict=True)
                    if by == version
                ]
    return sum(off) / len(off)


def vllm_contract(report: Report) -> None:
    """``check_sampler``: reload, sleep and wake, seeds, stops; bfloat16 on a GPU, on a CPU what a sync needs."""
    where = device()
    names = SYNCED if where == "cpu" else tuple(name for name in CHECKS if name != "adapter")
    _contract(report, _vllm(), names, _dtype(where), where)


def vllm_lora(report: Report) -> None:
    """Adapters: the contract's check."""
    where = device()
    _contract(report, _vllm(), ("adapter",), _dtype(where), where)


def vllm_sleep(report: Report) -> None:
    """What a sleeping engine gives back, three times over, and that it serves the same afterwards."""
    where = device()
    with folder_of() as folder, _engine(folder, "bfloat16", where, gpu_memory_utilization=0.3) as sampler:
        env = Harness(lambda setup: sampler, folder, "bfloat16", where)
        ids = env.long_prompt(60).token_ids
        before = sampler.logprobs([ids])[0]
        free = torch.cuda.mem_get_info()[0]
        for round_ in range(3):
            started = time.perf_counter()
            sampler.sleep()
            asleep = torch.cuda.mem_get_info()[0]
            slept = time.perf_counter()
            sampler.wake("weights")
            sampler.load_weights(handle_of(env.base), round_ + 1)
            sampler.wake("cache")
            woken = time.perf_counter()
            report.note(
                freed_gib=(asleep - free) / GIB, sleep_s=slept - started, wake_and_reload_s=woken - slept,
                lost_gib=(free - torch.cuda.mem_get_info()[0]) / GIB,
            )  # fmt: skip
            after = sampler.logprobs([ids])[0]
            apart = max(abs(one - other) for one, other in zip(before, after, strict=True))
            report.note(apart=apart)
            assert apart < 0.05, f"after sleep and wake its log-probs are {apart:.3g} nats off"
        share = 0.3 * torch.cuda.get_device_properties(0).total_memory
        assert asleep - free > 0.5 * share, "a sleeping engine gave little of its share back"


def vllm_in_flight(report: Report) -> None:
    """Weights swapped under requests in flight: each token by the weights whose version it carries."""
    where = device()
    with folder_of() as folder, _engine(folder, "bfloat16", where, {"in_flight_updates": True}) as sampler:
        env = Harness(lambda setup: sampler, folder, "bfloat16", where)
        weights = {0: env.base, 4: perturbed(env.base, seed=1), 5: perturbed(env.base, seed=2)}
        prompts = [env.prompt("3 7 1 9 4", "a"), env.prompt("Which is larger?", "b")]
        asked = sampler.generate(prompts, SamplingParams(n=8, max_tokens=90, seed=1))
        for version in (4, 5):
            for _ in range(20):
                sampler.pump()
            assert not asked.done(), "the request was over before the weights were swapped"
            sampler.load_weights(handle_of(weights[version]), version)
        groups = asked.result(timeout=120)
        kinds = {one.token_versions for group in groups for one in group.completions}
        report.note(versions=len(kinds), logprob_diff_mean=(off := _off_by(env.reference, weights, groups)))
        assert all(list(versions) == sorted(versions) for versions in kinds)
        assert any(set(versions) == {0, 4, 5} for versions in kinds), kinds
        assert off < env.tolerance, f"log-probs are {off:.3g} nats off on average"


def vllm_run(report: Report) -> None:
    """A whole run with vLLM, sampler and learner taking turns on the device."""
    device()
    with folder_of() as folder:
        spec = grpo.config_of(
            folder, "model.dtype=bfloat16", "sampler.name=vllm", "train.steps=20",
            "sampler.options.gpu_memory_utilization=0.3",
        )  # fmt: skip
        report.note(**(found := grpo.trained(spec)))
    assert found["logprob_diff_mean"] < 0.1, f"sampler and learner differ by {found['logprob_diff_mean']:.2g} nats"
    assert found["reward_last_third"] > 1.2 * found["reward_first_third"], "the reward did not rise"


# -- the 8 GB recipe ---------------------------------------------------------------------------------------------------

CARD = 8 * GIB
_HOLD = """
import sys, torch
leave = int(sys.argv[1])
torch.zeros(1, device="cuda")
held = []
while (more := torch.cuda.mem_get_info()[0] - leave) > 0:
    held.append(torch.empty(min(more, 1 << 30), dtype=torch.uint8, device="cuda"))
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _small_card(leave: int) -> Iterator[None]:
    """Another process holds all of the card but so many bytes. torch's own limit of a process's share would count
    what a sleeping vLLM has given back as still held."""
    words = [sys.executable, "-c", _HOLD, str(leave)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline().strip() == "held", "the card cannot be filled"
            yield
        finally:
            holder.kill()


def large_folder(place: Path) -> Path:
    """A model of Llama-3.2-1B's shape with random weights, and a tokenizer of as many tokens."""
    from tests.benchmarks.memory import random_model
    from tests.tiny import make_tokenizer

    folder = random_model("Llama-3.2-1B", place)
    make_tokenizer().save_pretrained(folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    known = made["model"]["vocab"]
    known |= {f"filler{number}": number for number in range(len(known), 128256)}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def rehearsal_8gb(report: Report) -> None:
    """The rehearsal of deploy/configs/gsm8k-8gb.toml with 8 GiB of the card free: the longest request, the largest
    pack and a sync; the most used, against the plan."""
    from common.config import load
    from deploy.memory_plan.estimate import CONTEXT, DeviceSpec, Planner

    device()
    total = torch.cuda.get_device_properties(0).total_memory
    if torch.cuda.mem_get_info()[0] < CARD:
        raise Skip(f"{torch.cuda.mem_get_info()[0] / GIB:.1f} GiB of the card are free, not 8")
    recipe = grpo.ROOT / "deploy" / "configs" / "gsm8k-8gb.toml"
    with tempfile.TemporaryDirectory() as place:
        folder = large_folder(Path(place))
        words = [f"model.name={folder}", f"task.name={grpo.TOY}", "task.options.words=115", "model.dtype=bfloat16",
                 "eval.questions=0", "run.console=off"]  # fmt: skip
        spec = load(recipe, words, drop_unused=True)
        plan = Planner(spec, folder, 512, DeviceSpec("GPU", True, CARD)).plan(spec)
        report.note(planned_gib=plan.peak / GIB, planned_worst=plan.devices[0].worst, plan_fits=plan.fits)
        # vLLM's share is of the whole card, this one's.
        share = spec.sampler.options["gpu_memory_utilization"] * CARD / total
        spec = load(recipe, [*words, f"sampler.options.gpu_memory_utilization={share}"], drop_unused=True)
        with _small_card(CARD - CONTEXT), _least_free() as least:  # this process has its context already
            found = grpo.rehearsed(spec)
        report.note(**found, used_gib=(CARD - least[0]) / GIB)
    assert least[0] > 0, "nothing was left"


@contextlib.contextmanager
def _least_free() -> Iterator[list[int]]:
    """The least that was free on the card meanwhile, looked at fifty times a second."""
    least, over = [torch.cuda.mem_get_info()[0]], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            least[0] = min(least[0], torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield least
    finally:
        over.set()
        watcher.join()
