"""What a run is made of: a configuration that was checked (``prepare``), its sampler, and its evaluation.

What is wrong with configuration, options, task, data or model folder is found in ``prepare``, before a model is loaded;
what needs the loaded model (an adapter's targets, say) before the first step. The parts of a whole run come
from ``deploy/colocated.py`` or ``deploy/cluster/separate.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import device as devices
from common import plugins
from common.config import Config, changed
from common.errors import LearnerLost, RunFailure, UserError, brief, is_out_of_memory
from common.prompts import MOST_PROMPTS, PromptStream, looked_at
from common.protocols import Learner, Placement, Sampler, Split, Task
from common.rewards import sandbox
from common.rewards.scorer import Scorer
from common.tasks import Prompts
from common.tokenizer import Renderer, Room, end_of_sequence_ids, load_tokenizer
from common.types import AdapterSpec, Prompt, SamplerSetup
from common.watchdog import time_limit
from common.weights.handles import FolderWeights
from deploy import extras
from deploy.cluster import connection
from learner.evaluate import Evaluation, evaluate
from learner.model import adapters, for_sampler, loading, resolve
from learner.train import sampling_params

log = logging.getLogger("nanogrpo")
MAX_CONCURRENT_COMPLETIONS = 256  # in flight, for a sampler back end that does not say how many it takes


@dataclasses.dataclass(frozen=True)
class Components:
    """What a run is made of, wherever it is."""

    sampler: Sampler
    learner: Learner
    placement: Placement
    summary: str
    """Two lines for people: the sampler and the learner."""
    memory_gib: Callable[[], float]
    answer_s: float
    """Seconds that a request to the sampler may take, with the replacement of what is lost meanwhile."""
    sync_s: float
    """Seconds that a sync may take, with the same."""
    restarts: Callable[[], int] = lambda: 0
    """Services replaced so far."""
    recover: Callable[[LearnerLost], None] | None = None
    """Replaces a lost learner by a fresh one; raises beyond ``cluster.max_restarts``."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A configuration that was found right, and what finding out has made."""

    config: Config
    folder: Path
    """The model's."""
    tokenizer: Any
    renderer: Renderer
    end_tokens: tuple[int, ...]
    """See ``SamplerSetup``."""
    asked: Sequence[Prompt]
    """The training prompts as the task made them."""
    train: Sequence[Prompt]
    """The same as the model sees them, each rendered when it is taken."""
    test: list[Prompt]
    """The questions of an evaluation."""
    room: Room
    """For prompts that are taken."""
    longest: list[Prompt]
    """The longest training prompts, as many as a step has, for the rehearsal."""
    longest_prompt: int
    """Tokens of the longest prompt that the run may see."""
    device: str

    def stream(self) -> PromptStream:
        return PromptStream(self.train, self.config.train.seed, self.room, self.asked)


def resolve_dtype(config: Config, device: str = "") -> Config:
    """The same with the number format that ``model.dtype="auto"`` means on this device; without one, on what the
    run computes on, for which a cluster may be asked.

    Raises ``UserError`` for a setting that has no effect in that format, and for a cluster that does not answer.
    """
    if config.model.dtype != "auto":
        return config
    if not device and config.cluster.mode == "ray":
        try:
            found = devices.quick_dtype("gpu" if connection.takes_gpus(config) else "cpu")
        except UserError as error:
            raise UserError(f"{error}; or set model.dtype, and the cluster need not be asked for GPUs") from None
    else:
        device = device or devices.pick(config.train.device)
        found = devices.quick_dtype(device)
    try:
        return changed(config, {"model.dtype": found})
    except UserError as error:
        kind = {"": "cluster", "cpu": "CPU"}.get(device, "GPU")
        raise UserError(f"model.dtype='auto' is {found!r} on this {kind}, where {error}") from None


def warn_if_slow(config: Config, device: str) -> None:
    """Warns where bfloat16 was requested and the device is slow in it."""
    if config.model.dtype == "bfloat16" and devices.quick_dtype(device) == "float32":
        log.warning("model.dtype='bfloat16' is many times slower here than 'float32': no instructions multiply it")


def prepare(config: Config, *, need_train: bool = True) -> Prepared:
    """Checks configuration, sampler, task, model and data, and resolves ``model.dtype``. Raises ``UserError`` for the
    first thing that is wrong."""
    alone = config.cluster.mode == "local"
    # For a run on a cluster this process computes nothing; a model that is only asked is asked here.
    device = devices.pick(config.train.device if alone or not need_train else "cpu")
    config = resolve_dtype(config)
    extras.check(config, training=need_train)
    if config.train.max_staleness and alone:
        raise UserError(
            f"train.max_staleness={config.train.max_staleness} has no use here: sampler and learner share this process "
            "and cannot overlap; set it to 0, or cluster.mode to ray"
        )
    if config.optimizer.offload and (config.train.device == "cpu" or (alone and device == "cpu")):
        raise UserError("optimizer.offload=true has no effect on a CPU, where everything is in host memory; remove it")
    if config.memory.offload_while_sampling and device == "cpu" and alone:
        raise UserError(
            "memory.offload_while_sampling=true has no effect on a CPU, where everything is in host memory; remove it"
        )
    sandbox.command(config.task)
    back_end = plugins.check("sampler", config.sampler.name, config.sampler.options, 1)
    if hasattr(back_end, "check_sampling"):
        back_end.check_sampling(sampling_params(config))
    for name in config.run.trackers if need_train else ():
        plugins.check("tracker", name, {}, 1)
    task = plugins.find_task(config.task)
    if need_train and not any({**task.reward_weights, **config.task.reward_weights}.values()):
        raise UserError("task.reward_weights: every reward has weight 0, so there is nothing to learn; raise one")
    folder = resolve.prepare(config.model)
    loading.check_files(folder, config.model)
    tokenizer = load_tokenizer(str(folder), config.model.trust_remote_code)
    rows = resolve.vocabulary(folder)
    shown = config.task
    renderer = Renderer(tokenizer, shown.prompt_format, shown.system_prompt, shown.template_options, rows)
    end_tokens = _end_tokens(folder, tokenizer, renderer, rows)
    asked = _questions(task, config, "train") if need_train else []
    tested = _questions(task, config, "test")
    test = [renderer(tested[place]) for place in range(len(tested))[: config.eval.questions]]
    held_out = {prompt.text for prompt in test}

    def training_prompt(place: int) -> Prompt:
        prompt = renderer(asked[place])
        if prompt.text in held_out:
            raise UserError(
                f"task.name={config.task.name!r} asks the same question in training and test ({prompt.text[-80:]!r}); "
                "accuracy would mean nothing; give the splits different questions"
            )
        return prompt

    room = Room(
        config.sampler.max_tokens, resolve.context_tokens(folder), config.sampler.max_prompt_tokens,
        drop=config.task.long_prompts == "drop",
    )  # fmt: skip
    train = Prompts(len(asked), training_prompt)
    # All test questions are known, so that no plan limits them: the same ones are asked by a run and of its model.
    kept = [prompt for prompt in test if room(prompt)]
    if test and not kept:
        raise UserError(
            f"task.long_prompts='drop' leaves none of the {len(test)} test questions; the longest may have "
            f"{room.longest} tokens; raise sampler.max_prompt_tokens, lower sampler.max_tokens or set eval.questions=0"
        )
    if len(kept) < len(test):
        log.warning("%d of %d test questions are too long and left out", len(test) - len(kept), len(test))
    if need_train:
        room, longest = _look(train, room, config)
    else:
        longest = []
    most = max((len(prompt.token_ids) for prompt in longest + kept), default=0)
    if need_train:
        resolve.check_rope(folder, most, config.sampler.max_tokens)
    return Prepared(
        config, folder, tokenizer, renderer, end_tokens, asked, train, kept, room, longest, most, device
    )  # fmt: skip


def _look(train: Sequence[Prompt], room: Room, config: Config) -> tuple[Room, list[Prompt]]:
    """Renders the prompts, or some of very many, to find what is wrong with them. Returns the room for those that
    are taken, and the longest prompts, as many as a step has; where not all were looked at, as long as that room."""
    places = looked_at(len(train))
    if not places:
        raise UserError(f"task.name={config.task.name!r} has no training questions")
    if len(train) > MOST_PROMPTS:
        raise UserError(
            f"task.name={config.task.name!r} has {len(train)} training prompts, and an epoch's order is kept of "
            f"{MOST_PROMPTS} at most; give fewer"
        )
    lengths = {}
    for place in places:
        prompt = train[place]
        if room(prompt):
            lengths[place] = len(prompt.token_ids)
    if not lengths:
        raise UserError(
            f"task.long_prompts='drop' leaves none of the {len(places)} training prompts looked at; the longest may "
            f"have {room.longest} tokens; raise sampler.max_prompt_tokens, lower sampler.max_tokens or shorten them"
        )
    if config.sync.proof and max(lengths.values()) < 2:
        raise UserError(
            "the training prompts are of one token each, and the proof of a sync compares log-probs inside a prompt; "
            "give the task longer prompts, or set sync.proof=false"
        )
    if dropped := len(places) - len(lengths):
        log.warning(
            "%d of %d training prompts are longer than %d tokens and left out", dropped, len(places), room.longest
        )
    first = heapq.nlargest(config.train.prompts_per_step, lengths, key=lengths.__getitem__)
    longest = [train[place] for place in first]
    if len(places) == len(train):
        return room, longest
    room = room.planning(max(lengths.values()))
    log.info(
        "%d of %d training prompts were looked at: up to %d tokens; the run is made for %d",
        len(places), len(train), max(lengths.values()), room.longest,
    )  # fmt: skip
    # The rehearsal is of what may come.
    ids = [prompt.token_ids * -(-room.longest // len(prompt.token_ids)) for prompt in longest]
    return room, [dataclasses.replace(p, token_ids=i[: room.longest]) for p, i in zip(longest, ids, strict=True)]


def _end_tokens(folder: Path, tokenizer: Any, renderer: Renderer, rows: int) -> tuple[int, ...]:
    """The chat template's end of a turn where the model does not have it among its own end tokens. Raises ``UserError``
    for an end token that the model cannot write."""
    named = end_of_sequence_ids(folder, tokenizer)
    for token in named:
        if rows and token >= rows:
            raise UserError(
                f"model.name: end token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is not among the {rows} "
                "rows of the model's embedding, so that no completion could end; resize the embedding, or correct "
                "eos_token_id in the folder's generation_config.json and tokenizer_config.json"
            )
    end = renderer.end_of_turn
    if end is None or end in named or (rows and end >= rows):
        return ()
    log.info(
        "the chat template ends a turn with %r, which is no end token of the model: completions end there too",
        tokenizer.convert_ids_to_tokens(end),
    )
    return (end,)


def _questions(task: Task, config: Config, split: Split) -> Sequence[Prompt]:
    """The split's prompts, each made and checked when it is looked at where the task makes them so. An error in the
    task is a ``UserError``."""
    label = f"task.name={config.task.name!r}: prompts({split!r})"

    def asked(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{label} raised {type(error).__name__}: {error}; fix the task") from error

    def listed() -> tuple[Any, int]:
        given = task.prompts(split)
        if not hasattr(given, "__getitem__") or not hasattr(given, "__len__"):  # a generator, say
            given = list(given)
        return given, len(given)

    def checked(place: int) -> Prompt:
        prompt = asked(lambda: given[place])
        if (
            not isinstance(prompt, Prompt) or not isinstance(prompt.id, str) or not isinstance(prompt.data, Mapping)
            or not all(isinstance(message, Mapping) for message in prompt.messages or ())
        ):  # fmt: skip
            raise UserError(
                f"{label} gave {str(prompt)[:80]!r}; give common.types.Prompt with a text as its id, role and content "
                "messages, and data by names"
            )
        return prompt

    given, size = asked(listed)
    prompts = Prompts(size, checked)
    system = config.task.system_prompt
    if split == "train" and system and size:
        shown = (prompts[place] for place in looked_at(size))
        if all(any(message.get("role") == "system" for message in prompt.messages or ()) for prompt in shown):
            raise UserError(
                f"task.system_prompt={system!r} has no effect: the task's prompts bring their own; remove it"
            )
    return prompts


def make_sampler(ready: Prepared, *, shares_device: bool = True, adapter_folder: Path | None = None) -> Sampler:
    """The run's sampler, serving the model's own weights, or the adapter in ``adapter_folder`` over them."""
    warn_if_slow(ready.config, ready.device)
    setup = sampler_setup(ready, shares_device=shares_device, adapter_folder=adapter_folder)
    return load_sampler(ready.config, setup, adapter_folder)


def sampler_setup(
    ready: Prepared, *, shares_device: bool = True, adapter_folder: Path | None = None, threads: int = 0,
    base: bool = True,
) -> SamplerSetup:  # fmt: skip
    """What the run's sampler must be ready for. Without ``base`` the model it starts from is left for its own node to
    find."""
    config = ready.config
    found = {"model_folder": str(ready.folder)}
    if base:
        found = for_sampler.sampler_base(ready.folder, config.model, config.sampler.name, ready.device)
    adapter = None
    if adapter_folder is not None:
        described = dict(FolderWeights(str(adapter_folder)).adapter_config or {})
        if described.get("use_dora"):
            raise UserError(
                f"the adapter in {str(adapter_folder)!r} is a DoRA, which samplers do not serve; name the merged model "
                "(final/merged, written with run.export_merged=true)"
            )
        adapter = AdapterSpec(int(described["r"]), described)
    elif adapters.sends_adapter(config.model):
        described = adapters.adapter_config(config.model, ready.folder).to_dict()
        adapter = AdapterSpec(config.model.lora_rank, described)
    wanted = max(
        config.train.prompts_per_step * config.train.group_size,
        len(ready.test) * max(config.eval.samples, 1),
    )
    return SamplerSetup(
        **found,
        dtype=config.model.dtype,
        max_model_tokens=ready.longest_prompt + config.sampler.max_tokens,
        max_sequences=min(wanted, at_once(config)),
        device=ready.device,
        seed=config.train.seed,
        shares_device=shares_device,
        adapter=adapter,
        trust_remote_code=config.model.trust_remote_code,
        threads=config.train.threads or threads,
        tensor_parallel=config.sampler.tensor_parallel,
        end_tokens=ready.end_tokens,
        in_flight_updates=config.sampler.in_flight_updates,
    )


def at_once(config: Config) -> int:
    """Completions that the run's sampler works on at once, as its back end says (``Sampler``); more wait in it."""
    says = getattr(plugins.find("sampler", config.sampler.name), "completions_at_once", None)
    return int(says(config.sampler.options)) if says is not None else MAX_CONCURRENT_COMPLETIONS


def load_sampler(config: Config, setup: SamplerSetup, adapter_folder: Path | None = None) -> Sampler:
    """The back end of ``sampler.name`` made from this setup, in this process."""
    devices.set_threads(setup.threads)  # before vLLM, which fixes them
    with time_limit("sampler", "loading its model", config.timeouts.load_s, "timeouts.load_s"):
        try:
            sampler: Sampler = plugins.make("sampler", config.sampler.name, config.sampler.options, setup)
        except (UserError, RunFailure):
            raise
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            log.info("the sampler did not start", exc_info=True)  # where: for the log alone
            label = f"sampler.name={config.sampler.name!r}"
            raise RunFailure(f"{label} could not start: {type(error).__name__}: {brief(error)}") from error
        if adapter_folder is not None:
            sampler.load_weights(FolderWeights(str(adapter_folder)), 0)
    devices.set_threads(setup.threads)  # and after it: on a GPU it leaves one
    return sampler


def ask_test_questions(ready: Prepared, sampler: Sampler, scorer: Scorer, answer_s: float) -> Evaluation:
    """Greedy accuracy on the test questions, and pass@k where asked for. ``answer_s`` limits each request."""
    config = ready.config
    drawn = dataclasses.replace(sampling_params(config), n=config.eval.samples, seed=0)
    greedy = dataclasses.replace(drawn, n=1, temperature=0.0, top_p=1.0, top_k=0)
    return evaluate(
        sampler, ready.test, scorer.correct, greedy, drawn if drawn.n else None, config.eval.k if drawn.n else (),
        timeout_s=answer_s, completions_at_once=at_once(config),
    )  # fmt: skip


@contextlib.contextmanager
def closing(sampler: Sampler, config: Config) -> Iterator[Sampler]:
    """The sampler, closed at the end of the block; an engine that cannot end does not keep the process for ever."""
    try:
        yield sampler
    finally:
        with time_limit("sampler", "closing", config.timeouts.sync_s, "timeouts.sync_s"):
            sampler.close()
