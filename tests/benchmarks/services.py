"""What sampler and learner cost as services of one machine: tokens a second with one and two replicas of one core
each, seconds of a sync by transport and model size, and what overlapping the two brings. Writes
``runs/bench/services.{json,md}``.

``python -m tests.benchmarks.services [throughput] [sync] [staleness]`` (all when none is named; about 40 minutes).
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common import atomic_files
from common.config import Config, build, resolved_toml
from common.types import SamplingParams
from deploy import components
from deploy.cluster import separate
from learner.model import resolve
from learner.weight_sync import WeightSync, make_probe
from tests.benchmarks.loads import Load, groups_of

OUT = Path("runs/bench")
SERVICES = {"mode": "ray", "address": "private", "sampler_cpus": 0.5, "learner_cpus": 0.5}


def spec(folder: Path | None = None, sync: dict[str, Any] | None = None, **services: Any) -> Config:
    model = {"name": str(folder)} if folder else {}
    return build(
        {
            "model": model,
            "sampler": {"max_tokens": 64},
            "train": {"threads": 1, "prompts_per_step": 16},
            "eval": {"questions": 0},
            "sync": sync or {},
            "cluster": SERVICES | services,
        }
    )


@contextmanager
def parts_of(config: Config) -> Iterator[tuple[Any, components.Prepared]]:
    OUT.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(OUT / "config.toml", resolved_toml(config))
    ready = components.prepare(config)
    with separate.parts(ready, OUT.absolute(), print) as parts:
        yield parts, ready


def throughput() -> list[dict[str, Any]]:
    """Sixteen prompts of 96 tokens, eight completions each of exactly 64 tokens unless they end."""
    rows = []
    for count in (1, 2):
        with parts_of(spec(samplers=count)) as (parts, _):
            parts.sampler.load_weights(parts.learner.publish_weights(), 0)
            prompts = [group.prompt for group in groups_of(Load(16, 8, 96, 6, 16), 49152)]
            best = 0.0
            for seed in range(4):  # the first warms up
                started = time.perf_counter()
                groups = parts.sampler.generate(prompts, SamplingParams(n=8, max_tokens=64, seed=seed)).result()
                tokens = sum(len(one.token_ids) for group in groups for one in group.completions)
                best = max(best, tokens / (time.perf_counter() - started) if seed else 0.0)
        rows.append({"what": f"sampling with {count} replica(s) of one core", "value": best, "unit": "tokens/s"})
        print(rows[-1], flush=True)
    return rows


def half_billion(like: Path) -> Path:
    """A model of random weights in the shape of Qwen2.5-0.5B, under the demo model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = OUT / "random-0.5B"
    if not (folder / "config.json").exists():
        shape = AutoConfig.for_model(
            "qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with torch.device("cpu"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        for file in like.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
                shutil.copyfile(file, folder / file.name)
    return folder.absolute()


def sync() -> list[dict[str, Any]]:
    rows = []
    demo = resolve.prepare(components.resolve_dtype(build({}), "cpu").model)
    for name, folder in (("135M", None), ("0.5B", half_billion(demo))):
        for transport, samplers, ranks in (
            ("shared_memory", 1, 1), ("collective", 1, 1), ("collective", 2, 1), ("shared_memory", 1, 2),
        ):  # fmt: skip
            if name == "0.5B" and samplers + ranks > 2:
                continue  # two engines or two ranks of it do not fit in this machine's memory beside each other
            config = spec(folder, {"transport": transport}, samplers=samplers, learner_ranks=ranks)
            with parts_of(config) as (parts, ready):
                probe = make_probe(ready.train, config.sync.probe_tokens, ready.longest_prompt)
                send = WeightSync(
                    parts.learner, parts.sampler, parts.placement, probe, config.sync, 600, config.model.dtype
                )
                found = [send() for _ in range(4)][1:]
            best = {key: min(one[key] for one in found) for key in ("seconds_sync", "seconds_proof", "sync_bytes")}
            what = f"sync of {name}, {transport}, {samplers} sampler(s), {ranks} rank(s)"
            rows.append(
                {
                    "what": what,
                    "value": best["seconds_sync"],
                    "unit": f"s, and the proof {best['seconds_proof']:.2f} s; {best['sync_bytes'] / 1e6:.0f} MB",
                }
            )
            print(rows[-1], flush=True)
    return rows


def staleness(steps: int = 10) -> list[dict[str, Any]]:
    """The demo's task and model, one core for each side, learning from this step's completions or the last one's."""
    runs = {}
    for lag in (0, 1):
        folder = OUT / f"staleness-{lag}"
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            sys.executable, "-m", "deploy.cli", "train", "deploy/configs/demo.toml", "cluster.mode=ray",
            "cluster.address=private", f"train.max_staleness={lag}", f"train.steps={steps}", "train.threads=1",
            "train.prompts_per_step=16", "eval.questions=0", "run.save_every=0", "run.console=plain",
            f"run.folder={folder}",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        runs[lag] = atomic_files.read_json_lines(folder / "metrics.jsonl")
    rows = []
    for lag, metrics in runs.items():
        seconds = [row["seconds_step"] for row in metrics[1:]]
        rows.append({"what": f"step at staleness {lag}", "value": sum(seconds) / len(seconds), "unit": "s"})
        late = [row["reward_mean"] for row in metrics[-4:]]
        rows.append({"what": f"reward at staleness {lag}, last 4 steps", "value": sum(late) / 4, "unit": "reward"})
    took = sum(row["seconds_step"] for row in runs[1])  # the faster one's whole time
    within, spent = [], 0.0
    for row in runs[0]:
        spent += row["seconds_step"]
        if spent <= took:
            within.append(row["reward_mean"])
    tail = within[-4:]
    what = f"reward at staleness 0, last 4 of the {len(within)} steps that fit into the {took:.0f} s of staleness 1"
    rows.append({"what": what, "value": sum(tail) / max(1, len(tail)), "unit": "reward"})
    return rows


def main() -> None:
    chosen = sys.argv[1:] or ["throughput", "sync", "staleness"]
    rows: list[dict[str, Any]] = []
    for name in chosen:
        rows += {"throughput": throughput, "sync": sync, "staleness": staleness}[name]()
    OUT.mkdir(parents=True, exist_ok=True)
    dtype = components.resolve_dtype(build({}), "cpu").model.dtype
    head = f"{datetime.date.today().isoformat()}, SmolLM2-135M (and random weights in Qwen2.5-0.5B's shape), {dtype}"
    atomic_files.write_json(OUT / "services.json", {"head": head, "rows": rows})
    lines = [head, "", "| what | value | unit |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['value']:.2f} | {row['unit']} |" for row in rows]
    atomic_files.write_text(OUT / "services.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
