"""What a step costs on this machine, side by side in one run: packed against padded learning, the sampler against bare
vLLM, a weight sync against a plain copy of the same bytes. Writes ``runs/bench/results.{json,md}``.

The model is the demo's; the lengths stand in the table. Every figure is the best of three after a warm-up.
"""

from __future__ import annotations

import datetime
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm

from common import files
from common.config import build
from common.device import set_threads
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from learner import model as models
from learner.learner import TorchLearner
from sampler.vllm import VllmSampler

SHAPES = {
    "short": {"groups": 16, "prompt": 96, "completion": (6, 16)},
    "gsm8k": {"groups": 4, "prompt": 160, "completion": (40, 200)},
    "few-shot": {"groups": 2, "prompt": 800, "completion": (40, 200)},
}
GROUP_SIZE = 8


def best_of_three(work: Callable[[], Any]) -> float:
    work()
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def groups_of(shape: dict[str, Any], vocabulary: int) -> list[Group]:
    draw = random.Random(0)
    groups = []
    for number in range(shape["groups"]):
        prompt = Prompt(str(number), (), token_ids=tuple(draw.randrange(vocabulary) for _ in range(shape["prompt"])))
        completions = []
        for _ in range(GROUP_SIZE):
            tokens = tuple(draw.randrange(vocabulary) for _ in range(draw.randint(*shape["completion"])))
            drawn = (-10.0,) * len(tokens)
            completions.append(Completion(tokens, "", drawn, "stop", 0, {}, 0.0, draw.gauss(0, 1)))
        groups.append(Group(prompt, tuple(completions)))
    return groups


def learn(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name, shape in SHAPES.items():
        seconds = {}
        for packing in ("packed", "padded"):
            spec = build({"learner": {"packing": packing}, "optimizer": {"lr": 1e-9}, "train": {"steps": 10**6}})
            learner = TorchLearner(spec, folder, "cpu")
            groups = groups_of(shape, 49152)
            seconds[packing] = best_of_three(lambda learner=learner, groups=groups: learner.update(groups))
        rows.append({"what": f"learner step, {name}", "ours_s": seconds["packed"], "against": "padded",
                     "other_s": seconds["padded"], "lengths": str(shape)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def sample_and_sync(folder: Path) -> list[dict[str, Any]]:
    setup = SamplerSetup(str(folder), "bfloat16", 384, 128)
    sampler = VllmSampler(setup)
    groups = groups_of(SHAPES["short"], 49152)
    prompts = [group.prompt for group in groups]
    params = SamplingParams(n=GROUP_SIZE, max_tokens=16, seed=0)
    ours = best_of_three(lambda: sampler.generate(prompts, params).result())

    engine = sampler._llm
    bare = vllm.SamplingParams(n=GROUP_SIZE, max_tokens=16, temperature=1.0)
    inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]

    def plain() -> None:
        engine.reset_prefix_cache()
        engine.generate(inputs, bare, use_tqdm=False)

    with torch.compiler.set_stance("force_eager"):
        other = best_of_three(plain)
    lengths = str(SHAPES["short"])
    rows = [
        {
            "what": "sampler request",
            "ours_s": ours,
            "against": "bare vLLM, no log-probs",
            "other_s": other,
            "lengths": lengths,
        }
    ]

    learner = TorchLearner(build({}), folder, "cpu")
    handle = learner.publish_weights()
    sync = best_of_three(lambda: sampler.load_weights(handle, 1))
    copy = best_of_three(lambda: [tensor.clone() for _, tensor in handle.open()])
    rows.append({"what": "weight sync", "ours_s": sync, "against": "plain copy of the bytes", "other_s": copy,
                 "lengths": f"{sum(t.numel() * t.element_size() for _, t in handle.open()) / 1e6:.0f} MB"})  # fmt: skip
    sampler.close()
    return rows


def main() -> None:
    set_threads(0)
    folder = models.prepare(build({}).model)
    rows = sample_and_sync(folder) + learn(folder)
    machine = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), platform.processor())  # fmt: skip
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{machine}, {torch.get_num_threads()} threads",
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, vllm {vllm.__version__}",
    }
    out = Path("runs/bench")
    files.write_json(out / "results.json", {**head, "rows": rows})
    lines = [
        ", ".join(head.values()),
        "",
        "| what | ours, s | against | its s | times | lengths |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['ours_s']:.2f} | {row['against']} | {row['other_s']:.2f} | "
        f"{row['other_s'] / row['ours_s']:.2f} | {row['lengths']} |"
        for row in rows
    ]
    files.write_text(out / "results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
