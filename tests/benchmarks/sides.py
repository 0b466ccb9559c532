"""A side of a comparison: a process of its own that holds one trainer and does one thing each time it is told.

Both sides of a comparison are alive at once and told in turn, so they meet the same machine; the idle one waits on a
pipe and computes nothing. Kinds of side:

- ``trl``: TRL's trainer (``trl_side.py``). ``learn``: a step on the load's own completions; ``step``: a whole step.
- ``learner``: ``TorchLearner`` alone. ``learn``: ``update`` on the same; ``rate``: the machine's matrix products.
- ``loop``: the run's own loop (``learner/train.py``) with vLLM in process, rewards in a worker process, sync and proof.
  ``step``: one of its steps; ``copy``: a plain copy of the bytes that a sync sends; ``write`` and ``bare``: the load's
  requests through ``VllmSampler`` and through its engine's own ``generate``.

The parent's part is ``Side``; the child's is the rest. Left out: what is compared (``__main__.py``).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.config import Config, load
from common.device import dtype_of, set_threads
from common.errors import RunFailure
from common.types import Completion, Group, Prompt, SamplerSetup, SamplingParams
from tests.benchmarks.loads import Load, groups_of, peak_gib, reset_peak, reward_of

ANSWER_S = 1800
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Spec:
    """What a side is made of; plain values, because it travels to the child as JSON."""

    kind: Literal["trl", "learner", "loop"]
    folder: str
    load: Mapping[str, int]
    words: tuple[str, ...] = ()
    """``section.key=value`` over the benchmark's own, for ours."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """GRPOConfig's, ``rows`` (of a micro-batch) and ``weights`` (dtype), for TRL; the engine's, for ``loop``."""


# -- in the parent -----------------------------------------------------------------------------------------------------


class Side:
    """The child, to be told. Use it as a context manager."""

    def __init__(self, spec: Spec) -> None:
        self._what = f"{spec.kind} side"
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log", prefix="bench-")  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.sides", json.dumps(dataclasses.asdict(spec))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._ready = False

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *unused: object) -> None:
        self._child.kill()
        self._child.wait()
        self._log.close()

    def ask(self, word: str) -> dict[str, float]:
        """Tells the child and waits for its answer. ``elsewhere`` is the share of all cores that processes other than
        the child were busy with meanwhile.

        Raises ``RunFailure`` with the child's last words when it dies or does not answer in time.
        """
        if not self._ready:
            self._answer("starting")
            self._ready = True
        assert self._child.stdin is not None
        started, all_s, own_s = time.perf_counter(), _busy_s(), self._own_s()
        self._child.stdin.write(word + "\n")
        self._child.stdin.flush()
        answer = self._answer(word)
        others_s = (_busy_s() - all_s) - (self._own_s() - own_s)
        took_s = time.perf_counter() - started
        return {**answer, "elsewhere": max(0.0, others_s / took_s / (os.cpu_count() or 1))}

    def _answer(self, word: str) -> dict[str, float]:
        assert self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            line = self._child.stdout.readline() if selector.select(ANSWER_S) else ""
        if not line:
            self._log.flush()
            last = Path(self._log.name).read_text()[-2000:]
            raise RunFailure(f"the benchmark's {self._what} gave no answer to {word!r}; it said:\n{last}")
        return dict(json.loads(line))

    def _own_s(self) -> float:
        """CPU seconds of the child and of the children it has waited for."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / TICKS


def _busy_s() -> float:
    """CPU seconds that this machine's cores have worked since it started."""
    user, nice, system, _, _, irq, soft, steal, *_ = (
        int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + soft + steal) / TICKS


# -- in the child ------------------------------------------------------------------------------------------------------


class Quit(Exception):
    """The parent has hung up."""


@dataclass
class Pipe:
    """The child's end: one word in, one line of numbers out."""

    answers: Any
    base_gib: float

    def word(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise Quit
        return line.strip()

    def answer(self, numbers: Mapping[str, float]) -> None:
        held = {"peak_gib": peak_gib() - self.base_gib, "base_gib": self.base_gib}
        self.answers.write(json.dumps({**numbers, **held}) + "\n")
        self.answers.flush()


def config_of(spec: Spec) -> Config:
    one = Load(**spec.load)
    return load(
        None,
        [
            f"model.name={spec.folder}", f"train.prompts_per_step={one.groups}", f"train.group_size={one.group_size}",
            f"sampler.max_tokens={one.most}", "train.steps=1000000", "optimizer.lr=1e-9", "eval.questions=0",
            "run.save_every=0", "sync.tolerance=0.5", "task.name=tests.benchmarks.sides:Sums", *spec.words,
        ],
    )  # fmt: skip


def learner_side(spec: Spec, groups: Sequence[Group], pipe: Pipe) -> None:
    from learner.torch_learner import TorchLearner

    config = config_of(spec)
    learner = TorchLearner(config, Path(spec.folder), "cpu")
    pipe.answer({})
    while True:
        word = pipe.word()
        if word == "rate":
            pipe.answer({"flops": product_rate(config.model.dtype)})
            continue
        assert word == "learn", word
        started = time.perf_counter()
        metrics = learner.update(groups)
        learn_s = time.perf_counter() - started
        pipe.answer({"learn_s": learn_s, "tokens": metrics["tokens_learned"]})


def product_rate(dtype: str, rounds: int = 4) -> float:
    """Floating-point operations a second: the best of a few large products, square and as tall as a layer's."""
    import torch

    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 4096, 4096), (4096, 576, 1536), (4096, 1536, 1536),
                                 (8192, 2048, 2048)):  # fmt: skip
        left, right, out = (
            torch.randn(shape).to(dtype_of(dtype)) for shape in ((rows, inner), (inner, columns), (rows, columns))
        )
        torch.mm(left, right, out=out)
        for _ in range(rounds):
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - started))
    return best


class Sums:
    """The loop's task: its reward is ``loads.reward_of``; the prompts are the load's, put in elsewhere."""

    reward_weights: Mapping[str, float] = {"sum": 1.0}

    def __init__(self) -> None:
        self.rewards = {"sum": lambda prompt, completion: reward_of(completion.token_ids)}

    def prompts(self, split: str) -> list[Prompt]:
        return []

    def is_correct(self, prompt: Prompt, completion: Completion) -> bool:
        return False


class EndsAsLoad:
    """A sampler whose k-th completion of a prompt is asked to be as long as the load's k-th; the rest is the real one.

    One request a completion, all in flight at once: vLLM makes the same of a request for several.
    """

    def __init__(self, sampler: Any, groups: Sequence[Group]) -> None:
        self._sampler = sampler
        self._lengths = {group.prompt.id: [len(one.token_ids) for one in group.completions] for group in groups}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        asked, seed = [], params.seed
        for prompt in prompts:
            for length in self._lengths[prompt.id]:
                one = dataclasses.replace(params, n=1, max_tokens=length, seed=seed)
                asked.append(self._sampler.generate([prompt], one))
                seed = None  # the first has emptied the cache and seeded the engine
        answers = iter([future.result()[0].completions[0] for future in asked])
        groups: Future[list[Group]] = Future()
        groups.set_result([Group(p, tuple(next(answers) for _ in self._lengths[p.id])) for p in prompts])
        return groups


class Watch:
    """The loop's tracker: keeps the step's numbers."""

    def __init__(self) -> None:
        self.metrics: Mapping[str, float] = {}

    def phase(self, text: str) -> None: ...

    def rollouts(self, step: int, groups: Sequence[Group]) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics


def loop_side(spec: Spec, groups: Sequence[Group], pipe: Pipe) -> None:
    from common.prompts import PromptStream
    from common.rewards.scorer import Scorer
    from deploy.colocated import SharedDevice
    from deploy.components import MAX_CONCURRENT_COMPLETIONS
    from learner.checkpoint import Checkpoints
    from learner.torch_learner import TorchLearner
    from learner.train import Loop, train
    from learner.weight_sync import WeightSync, make_probe
    from sampler.engine.vllm import VllmSampler

    config, one, prompts = config_of(spec), Load(**spec.load), [group.prompt for group in groups]
    with Scorer(config.task) as scorer, never_ending(Path(spec.folder)) as folder:
        setup = SamplerSetup(
            str(folder),
            config.model.dtype,
            one.prompt + one.most,
            min(one.groups * one.group_size, MAX_CONCURRENT_COMPLETIONS),
        )
        sampler = VllmSampler(setup, **{**config.sampler.options, **spec.settings})
        try:
            learner = TorchLearner(config, Path(spec.folder), "cpu")
            placement, watch = SharedDevice(sampler, learner), Watch()
            probe = make_probe(prompts, config.sync.probe_tokens, one.prompt)
            sync = WeightSync(learner, sampler, placement, probe, config.sync, config.timeouts.sync_s)
            loop = Loop(
                config, learner, EndsAsLoad(sampler, groups), placement, scorer, PromptStream(prompts, 0), sync, watch,
                Checkpoints(Path(folder) / "none", 1), lambda: 0.0, lambda: 0, config.timeouts.generate_s,
            )  # fmt: skip
            sync.challenge()
            sync()
            writing = Writing(sampler, prompts, one)
            room = [tensor.clone() for _, tensor in learner.publish_weights().open()]

            def copy() -> dict[str, float]:
                started = time.perf_counter()
                for kept, (_, tensor) in zip(room, learner.publish_weights().open(), strict=True):
                    kept.copy_(tensor)
                return {"copy_s": time.perf_counter() - started}

            does: dict[str, Callable[[], dict[str, float]]] = {
                "copy": copy, "write": writing.ours, "bare": writing.bare, "plain": lambda: writing.bare(logprobs=None)
            }  # fmt: skip
            begun = False

            def stopping() -> bool:  # asked by the loop before each step
                nonlocal begun
                pipe.answer(_of_step(watch.metrics) if begun else {})
                while (word := pipe.word()) != "step":
                    pipe.answer(does[word]())
                begun = True
                return False

            train(loop, lambda step: None, stopping)
        finally:
            sampler.close()


def _of_step(metrics: Mapping[str, float]) -> dict[str, float]:
    names = {"whole_s": "seconds_step", "sample_s": "seconds_sample", "score_s": "seconds_score",
             "learn_s": "seconds_learn", "sync_s": "seconds_sync", "proof_s": "seconds_proof",
             "sync_bytes": "sync_bytes", "tokens": "tokens_learned"}  # fmt: skip
    return {name: metrics[key] for name, key in names.items()}


class Writing:
    """The load's requests, every completion of its largest length, through our sampler and through vLLM alone."""

    def __init__(self, sampler: Any, prompts: Sequence[Prompt], load: Load) -> None:
        self._sampler, self._prompts, self._load = sampler, prompts, load
        self._seed = 0

    def ours(self) -> dict[str, float]:
        self._seed += 1
        params = SamplingParams(n=self._load.group_size, max_tokens=self._load.most, seed=self._seed)
        started = time.perf_counter()
        groups = self._sampler.generate(self._prompts, params).result()
        took_s = time.perf_counter() - started
        written = sum(len(one.token_ids) for group in groups for one in group.completions)
        return {"tokens": written, "write_s": took_s, "tokens_per_s": written / took_s}

    def bare(self, logprobs: int | None = 0) -> dict[str, float]:
        import torch
        import vllm
        from vllm.inputs import tokens_input

        params = vllm.SamplingParams(
            n=self._load.group_size, max_tokens=self._load.most, temperature=1.0, logprobs=logprobs,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        inputs = [tokens_input(list(prompt.token_ids)) for prompt in self._prompts]
        engine = self._sampler._llm
        engine.reset_prefix_cache()
        started = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):  # as our sampler: compiling a small function would take 15 s
            outputs = engine.generate(inputs, params, use_tqdm=False)
        took_s = time.perf_counter() - started
        written = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        return {"tokens": written, "write_s": took_s, "tokens_per_s": written / took_s}


@contextmanager
def never_ending(folder: Path) -> Iterator[Path]:
    """The same model whose end-of-sequence token is one that it does not write: lengths are then what was asked for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    kept = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    number, token = max((n, str(t)) for n, t in tokenizer.added_tokens_decoder.items() if n not in kept)
    with tempfile.TemporaryDirectory(prefix="bench-model-") as name:
        copy = Path(name)
        tokenizer.eos_token = token
        tokenizer.save_pretrained(copy)
        for file in folder.iterdir():
            if file.name in ("config.json", "generation_config.json"):
                values = json.loads(file.read_text())
                (copy / file.name).write_text(json.dumps({**values, "eos_token_id": number}))
            elif not (copy / file.name).exists():
                (copy / file.name).symlink_to(file.resolve())
        yield copy


def trl_side(spec: Spec, groups: Sequence[Group], pipe: Pipe) -> None:
    from tests.benchmarks.trl_side import Gate, trainer_on

    done: list[dict[str, float]] = [{}]

    def wanted() -> str:
        pipe.answer(done[-1])
        return pipe.word()

    with tempfile.TemporaryDirectory(prefix="bench-trl-") as out:
        trainer_on(Path(spec.folder), groups, Gate(wanted, done.append), Path(out), **spec.settings).train()


BODIES: dict[str, Callable[[Spec, Sequence[Group], Pipe], None]] = {
    "trl": trl_side,
    "learner": learner_side,
    "loop": loop_side,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; only answers may go down the pipe
    values = json.loads(sys.argv[1])
    spec = Spec(**{**values, "words": tuple(values["words"])})
    # A side's memory begins after its imports.
    importlib.import_module("tests.benchmarks.trl_side" if spec.kind == "trl" else "learner.torch_learner")
    importlib.import_module("transformers.models.auto.modeling_auto")
    set_threads(0)
    groups = groups_of(Load(**spec.load), vocabulary_of(Path(spec.folder)))
    with suppress(Quit):
        BODIES[spec.kind](spec, groups, Pipe(answers, reset_peak()))


def vocabulary_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


if __name__ == "__main__":
    main()
