"""One process: makes every part of a run, puts sampler and learner on one device, and trains, evaluates or samples.

What is wrong with configuration, options, task, data or model folder is found in ``prepare``, before a model is loaded;
what only the loaded model can tell (an adapter's targets, say) before the first step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import signal
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console

from common import device as devices
from common import files, plugins, tracking
from common.config import Config, build, fields, resolved_toml
from common.console import ConsoleTracker
from common.errors import UserError
from common.prompts import PromptStream
from common.protocols import Sampler, Split, Task
from common.rewards import Scorer
from common.tokenizer import check_lengths, load_tokenizer, render
from common.types import AdapterSpec, Prompt, SamplerSetup, SamplingParams
from common.waits import bounded
from common.weights import FolderWeights
from deploy import report
from learner import model as models
from learner.checkpoint import Checkpoints
from learner.evaluate import Evaluation, evaluate
from learner.learner import TorchLearner
from learner.loop import Loop, train
from learner.sync import WeightSync, probe_of

log = logging.getLogger("nanogrpo")
_AT_ONCE = 256  # completions in work at most; vLLM queues what a request holds beyond


class Sleeps(Protocol):
    def sleep(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class SharedDevice:
    """A ``Placement`` where sampler and learner take turns: the one that does not work gives its memory back."""

    sampler: Sampler
    learner: Sleeps

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        self.learner.sleep()
        self.sampler.wake("all")
        yield

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        self.sampler.sleep()
        yield

    @contextlib.contextmanager
    def syncing(self) -> Iterator[None]:
        self.learner.sleep()
        # The proof's probe needs the cache too.
        self.sampler.wake("all")
        yield


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A configuration that was found right, and what finding out has made."""

    config: Config
    folder: Path
    """The model's."""
    tokenizer: Any
    train: list[Prompt]
    test: list[Prompt]
    """The questions of an evaluation."""
    longest_prompt: int
    device: str


def prepare(config: Config, *, need_train: bool = True) -> Prepared:
    """Checks configuration, sampler, task, model and data. Raises ``UserError`` for the first thing that is wrong."""
    device = devices.pick(config.train.device)
    if config.train.max_staleness:
        raise UserError(
            f"train.max_staleness={config.train.max_staleness} has no use here: sampler and learner share this process "
            "and cannot overlap; set it to 0"
        )
    if config.optimizer.offload and device == "cpu":
        raise UserError("optimizer.offload=true has no effect on a CPU, where everything is in host memory; remove it")
    back_end = plugins.find("sampler", config.sampler.name)
    if hasattr(back_end, "check_options"):
        back_end.check_options(config.sampler.options)
    for name in config.run.trackers:
        plugins.find("tracker", name)
    task = plugins.find_task(config.task)
    if need_train and not any({**task.reward_weights, **config.task.reward_weights}.values()):
        raise UserError("task.reward_weights: every reward has weight 0, so there is nothing to learn; raise one")
    folder = models.prepare(config.model)
    tokenizer = load_tokenizer(str(folder), config.model.trust_remote_code)
    shown = (config.task.prompt_format, config.task.system_prompt)
    train_prompts = render(tokenizer, _questions(task, config, "train"), *shown) if need_train else []
    test_prompts = render(tokenizer, _questions(task, config, "test")[: config.eval.questions], *shown)
    if shared := {prompt.text for prompt in train_prompts} & {prompt.text for prompt in test_prompts}:
        raise UserError(
            f"task.name={config.task.name!r} asks the same question in training and test ({min(shared)[-80:]!r}); "
            "accuracy would mean nothing; give the splits different questions"
        )
    if need_train and not train_prompts:
        raise UserError(f"task.name={config.task.name!r} has no training questions")
    context = models.context_tokens(folder)
    longest = max(
        check_lengths(prompts, config.sampler.max_tokens, config.sampler.max_prompt_tokens, context)
        for prompts in (train_prompts, test_prompts)
    )
    return Prepared(config, folder, tokenizer, train_prompts, test_prompts, longest, device)


def _questions(task: Task, config: Config, split: Split) -> list[Prompt]:
    """The split's prompts. A task that fails or gives something else is the mistake of who wrote it."""
    label = f"task.name={config.task.name!r}: prompts({split!r})"
    try:
        prompts = list(task.prompts(split))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{label} raised {type(error).__name__}: {error}; mend the task") from error
    for prompt in prompts:
        if not isinstance(prompt, Prompt) or not all({"role", "content"} <= set(m) for m in prompt.messages):
            raise UserError(
                f"{label} gave {str(prompt)[:80]!r}; give common.types.Prompt with role and content messages"
            )
    system = config.task.system_prompt
    if (
        split == "train"
        and system
        and prompts
        and all(any(m["role"] == "system" for m in prompt.messages) for prompt in prompts)
    ):
        raise UserError(f"task.system_prompt={system!r} has no effect: the task's prompts bring their own; remove it")
    return prompts


def make_sampler(ready: Prepared, *, shares_device: bool = True, adapter_folder: Path | None = None) -> Sampler:
    """The run's sampler, serving the model's own weights, or the adapter in ``adapter_folder`` over them."""
    config = ready.config
    adapter = None
    if adapter_folder is not None:
        described = dict(FolderWeights(str(adapter_folder)).adapter_config or {})
        adapter = AdapterSpec(int(described["r"]), described)
    elif config.model.lora_rank:
        described = models.adapter_config(config.model, ready.folder).to_dict()
        adapter = AdapterSpec(config.model.lora_rank, described)
    at_once = max(
        config.train.prompts_per_step * config.train.group_size,
        len(ready.test) * max(config.eval.samples, 1),
    )
    setup = SamplerSetup(
        model_folder=str(ready.folder),
        dtype=config.model.dtype,
        max_model_tokens=ready.longest_prompt + config.sampler.max_tokens,
        max_sequences=min(at_once, _AT_ONCE),
        device=ready.device,
        seed=config.train.seed,
        shares_device=shares_device,
        adapter=adapter,
        trust_remote_code=config.model.trust_remote_code,
        threads=config.train.threads,
    )
    devices.set_threads(config.train.threads)  # before vLLM, which fixes them
    with bounded("sampler", "loading its model", config.timeouts.load_s):
        sampler: Sampler = plugins.make("sampler", config.sampler.name, config.sampler.options, setup)
        if adapter_folder is not None:
            sampler.load_weights(FolderWeights(str(adapter_folder)), 0)
    devices.set_threads(config.train.threads)  # and after it: on a GPU it leaves one
    return sampler


def ask_test_questions(ready: Prepared, sampler: Sampler, scorer: Scorer) -> Evaluation:
    """Greedy accuracy on the test questions, and pass@k where asked for."""
    config = ready.config
    greedy = SamplingParams(max_tokens=config.sampler.max_tokens, temperature=0.0, stop=config.sampler.stop, seed=0)
    sampled = None
    if config.eval.samples:
        sampled = dataclasses.replace(
            greedy, n=config.eval.samples, temperature=config.sampler.temperature,
            top_p=config.sampler.top_p, top_k=config.sampler.top_k,
        )  # fmt: skip
    return evaluate(
        sampler, ready.test, scorer.correct, greedy, sampled, config.eval.k if sampled else (),
        timeout_s=config.timeouts.generate_s, completions_at_once=_AT_ONCE,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    finished: bool
    """False: it was stopped, and its last checkpoint is the step it reached."""
    step: int
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    """Evaluations as ``eval.jsonl`` holds them."""


def run(config: Config, folder: Path, console: Console, *, resume: bool = False) -> Outcome:
    """Trains in this process, writing everything into ``folder``; see the README for what it will hold."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_run_folder(folder, resume))
        stack.enter_context(_logging_to(folder / "run.log"))
        files.remove_leftovers(folder)
        ready = prepare(config)
        scorer = stack.enter_context(Scorer(config.task))
        if not resume:
            files.write_text(folder / "config.toml", resolved_toml(config))
        stopping = stack.enter_context(_stop_signals(console))

        console.print(
            f"model   {ready.folder}\n"
            f"task    {config.task.name}: {len(ready.train)} training and {len(ready.test)} test questions"
        )
        sampler = make_sampler(ready)
        stack.callback(sampler.close)
        with bounded("learner", "loading its model", config.timeouts.load_s):
            learner = TorchLearner(config, ready.folder, ready.device)
        console.print(
            f"sampler {config.sampler.name}\nlearner {learner.parameters_trained / 1e6:.1f} M of "
            f"{learner.parameters_total / 1e6:.1f} M weights, "
            f"{'packed' if learner.packed else 'padded'}, {ready.device}"
        )
        checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_last)
        stream = PromptStream(ready.train, config.train.seed)
        state = checkpoints.restore_latest(learner) if resume else None
        if resume:
            if learner.version > config.train.steps:
                raise UserError(
                    f"train.steps={config.train.steps} is less than the {learner.version} steps this run has done; "
                    "give more, or start another run"
                )
            files.write_text(folder / "config.toml", resolved_toml(config))
            tracking.rewind(folder, learner.version)

        placement = SharedDevice(sampler, learner)
        probe = probe_of(ready.train, config.sync.probe_tokens, ready.longest_prompt)
        sync = WeightSync(learner, sampler, placement, probe, config.sync, config.timeouts.sync_s)
        trackers: list[Any] = [tracking.JsonlTracker(folder)]
        if config.run.tensorboard:
            trackers.append(tracking.TensorBoardTracker(folder, learner.version))
        trackers += [_own_tracker(name, folder) for name in config.run.trackers]
        shown = ConsoleTracker(config.run.console, config.train.steps, learner.version, console)
        tracker = tracking.Trackers([*trackers, shown])
        stack.callback(tracker.close)
        loop = Loop(
            config, learner, sampler, placement, scorer, stream, sync, tracker, checkpoints,
            memory_gib=lambda: devices.peak_memory_gib(ready.device),
        )  # fmt: skip
        if state is not None:
            loop.restore(state)

        tracker.phase("sampler: following perturbed weights (the proof's challenge)")
        sync.challenge()
        sync()

        def measure(step: int) -> None:
            if ready.test:
                tracker.phase(f"evaluation: {len(ready.test)} test questions at step {step}")
                with placement.sampling():
                    tracker.evaluation(step, ask_test_questions(ready, sampler, scorer).as_dict())

        if learner.version == 0 and not files.read_lines(folder / "eval.jsonl"):
            measure(0)
        finished = train(loop, measure, stopping)
        if finished:
            measure(config.train.steps)
            tracker.phase("disk: writing the final model")
            with placement.learning():
                _export(learner, folder, config)
        tracker.close()
        report.write(folder)
        evaluations = report.by_step(files.read_json_lines(folder / "eval.jsonl"))
        asked = {row["step"]: row for row in evaluations}
        return Outcome(folder, finished, learner.version, asked.get(0), asked.get(config.train.steps))


def _own_tracker(name: str, folder: Path) -> Any:
    try:
        tracker = plugins.make("tracker", name, {}, folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"run.trackers: {name!r} raised {type(error).__name__}: {error}; mend it") from error
    lacking = [method for method in ("log", "rollouts", "evaluation", "close") if not hasattr(tracker, method)]
    if lacking:
        raise UserError(f"run.trackers: {name!r} has no {', '.join(lacking)}; see common.protocols.Tracker")
    return tracker


def _export(learner: TorchLearner, folder: Path, config: Config) -> None:
    with files.atomic_folder(folder / "final") as final:
        learner.export(final)
        if config.model.lora_rank and config.run.export_merged:
            (final / "merged").mkdir()
            learner.export(final / "merged", merged=True)


# -- the run folder, its log and its signals ---------------------------------------------------------------------------


def folder_of(config: Config) -> Path:
    """``run.folder`` with its {task}, {model} and {date} filled in."""
    words = {
        "task": Path(config.task.name.split(":")[0]).stem,
        "model": Path(config.model.name).stem,
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
    }
    try:
        return Path(config.run.folder.format(**words)).expanduser()
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"run.folder={config.run.folder!r} cannot be filled in ({error}); it knows {{task}}, {{model}} and {{date}}"
        ) from None


def config_of(folder: Path, words: Sequence[str]) -> Config:
    """The configuration that a run folder was made with, changed by ``words``."""
    from common.config import load

    if not (folder / "config.toml").is_file():
        raise UserError(f"--resume {str(folder)!r}: there is no run (no config.toml in it); name a run folder")
    saved = tomllib.loads((folder / "config.toml").read_text())
    config = load(folder / "config.toml", words)
    before = build(saved)
    free = {"eval", "run", "timeouts", "train.steps", "train.threads", "train.device"}
    for key, _ in fields():
        section, name = key.split(".")
        if section not in free and key not in free:
            old, new = (getattr(getattr(one, section), name) for one in (before, config))
            if old != new:
                raise UserError(
                    f"{key}={new!r} cannot change from {old!r} when a run is resumed, or it would not be the same run; "
                    "train.steps, eval, run and timeouts can"
                )
    if config.run.folder != before.run.folder:
        raise UserError(f"run.folder={config.run.folder!r} has no effect with --resume, which names the folder")
    return config


@contextlib.contextmanager
def _run_folder(folder: Path, resume: bool) -> Iterator[None]:
    if not resume and (folder / "config.toml").exists():
        raise UserError(
            f"run.folder={str(folder)!r} is in use by an earlier run; go on with it by --resume {folder}, or choose "
            "another"
        )
    # A start that failed leaves its lock and log; anything else is somebody's.
    if not resume and folder.is_dir() and {path.name for path in folder.iterdir()} - {files.LOCK_NAME, "run.log"}:
        raise UserError(f"run.folder={str(folder)!r} is not empty and holds no run; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.folder={str(folder)!r} cannot be made ({error.strerror}); choose another") from None
    with files.lock_folder(folder):
        yield


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Our own log lines go to the run's log; warnings also to the terminal, through the handlers set up before."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("nanogrpo")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _stop_signals(console: Console) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the run to save and stop after its step; a second Ctrl-C ends it at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        console.print("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without one")

    kept = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
