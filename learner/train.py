"""``train``: the only training loop, the same for one process and for many machines.

It knows the contracts and nothing of who implements them. ``max_staleness + 1`` requests to the sampler are kept in
flight: 0 is strictly on policy; more lets sampling and learning overlap where they run on separate devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.config import Config
from common.errors import OutOfMemory, RunFailure, UserError, is_out_of_memory
from common.prompts import PromptStream
from common.protocols import GroupsFuture, Learner, Placement, Sampler
from common.rewards.scorer import Scorer, Scoring
from common.types import Completion, Group, Prompt, SamplingParams
from common.watchdog import result, time_limit
from learner.checkpoint import Checkpoints
from learner.loss import advantages
from learner.selection import Selection
from learner.weight_sync import WeightSync


class RunTracker(Protocol):
    """A tracker that also shows what is waited for."""

    def phase(self, text: str) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rollouts(self, step: int, groups: Sequence[Group]) -> None: ...


@dataclass
class Request:
    """Groups asked for and not yet learned from, with what it takes to ask again."""

    number: int
    state: dict[str, Any]
    """The prompt stream before its prompts were taken."""
    prompts: list[Prompt]
    future: Future[list[Group]]
    scores: Scoring
    """Of the groups that the future has reported so far; the others are scored when it is done."""


@dataclass
class Loop:
    """The parts of a run and its position; ``train`` moves it on."""

    config: Config
    learner: Learner
    sampler: Sampler
    placement: Placement
    scorer: Scorer
    stream: PromptStream
    sync: WeightSync
    tracker: RunTracker
    checkpoints: Checkpoints
    memory_gib: Callable[[], float]
    restarts: Callable[[], int]
    answer_s: float
    """Seconds that a request to the sampler may take, with the replacement of what is lost meanwhile."""
    selection: Selection = field(init=False)
    requests_made: int = 0
    in_flight: deque[Request] = field(default_factory=deque)
    in_hand: list[Request] = field(default_factory=list)
    """Answered, for the step that is being sampled: what a run that ends there asks no more."""

    def __post_init__(self) -> None:
        self.selection = Selection(self.stream, self.config.train.selection, self.config.train.seed)

    def limit(self, side: str, doing: str, timeout: str) -> contextlib.AbstractContextManager[None]:
        """Ends the process, naming ``side``, if the block takes longer than this one of the timeouts."""
        return time_limit(side, doing, getattr(self.config.timeouts, timeout), f"timeouts.{timeout}")

    def ask(self, prompts: list[Prompt], params: SamplingParams, doing: str) -> Future[list[Group]]:
        with self.limit("sampler", doing, "generate_s"):
            return self.sampler.generate(prompts, params)

    def answer(self, future: Future[list[Group]], doing: str) -> list[Group]:
        return result(future, "sampler", doing, self.answer_s, "timeouts.generate_s")

    def state(self) -> dict[str, Any]:
        """The position in the data: the answers already there (after a sync, all, unless weights are swapped in
        flight), and the first request that a resumed run must make again."""
        answered = []
        unanswered = None
        for request in [*self.in_hand, *self.in_flight]:
            if not request.future.done() or request.future.exception() is not None:
                unanswered = request
                break
            groups = [dataclasses.asdict(group) for group in request.future.result()]
            answered.append({"number": request.number, "state": request.state, "groups": groups})
        return {
            "stream": unanswered.state if unanswered else self.stream.state(),
            "selection": self.selection.state(),
            "requests_made": unanswered.number if unanswered else self.requests_made,
            "in_flight": answered,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.stream.restore(state["stream"])
        self.selection.restore(state.get("selection", {}))
        self.requests_made = int(state["requests_made"])
        for answered in state["in_flight"]:
            groups = [_group_of(values) for values in answered["groups"]]
            future: Future[list[Group]] = Future()
            future.set_result(groups)
            prompts = [group.prompt for group in groups]
            request = Request(int(answered["number"]), answered["state"], prompts, future, self.scorer.begin())
            self.in_flight.append(request)

    def save(self) -> None:
        doing = f"writing checkpoint {self.learner.version}"
        self.tracker.phase(f"disk: {doing}")
        with self.limit("learner", doing, "load_s"):
            self.checkpoints.save(self.learner.version, self.learner, self.state())


def train(loop: Loop, evaluate: Callable[[int], object], stopping: Callable[[], bool]) -> bool:
    """Trains until ``config.train.steps`` and returns True, or, once ``stopping()``, saves and returns False.

    ``evaluate(step)`` is called when one is due. The sampler must hold the learner's weights when this is called.
    """
    config, learner = loop.config, loop.learner
    while learner.version < config.train.steps and not stopping():
        started = time.perf_counter()
        step = learner.version + 1
        scored, metrics = _sample(loop, step)
        groups = batch_of(scored, config.train.prompts_per_step)
        metrics |= _batch_metrics(scored) | {"groups": float(sum(map(advantages.has_signal, groups)))}
        loop.tracker.rollouts(step, scored)

        learning = time.perf_counter()
        loop.tracker.phase(f"learner: step {step}, {len(groups)} groups")
        with loop.placement.learning(), loop.limit("learner", f"doing step {step}", "update_s"):
            metrics |= learner.update(groups)
        metrics["seconds_learn"] = time.perf_counter() - learning

        loop.tracker.phase(f"sampler: taking the weights of version {learner.version}")
        metrics |= loop.sync()
        metrics |= {
            "version": float(learner.version),
            "memory_peak_gib": loop.memory_gib(),
            "restarts": float(loop.restarts()),
            "seconds_step": time.perf_counter() - started,
        }
        loop.tracker.log(step, metrics)
        if config.eval.questions and config.eval.every and step % config.eval.every == 0 and step < config.train.steps:
            evaluate(step)
        if (config.run.save_every and step % config.run.save_every == 0) or step == config.train.steps:
            loop.save()
    if learner.version >= config.train.steps:
        return True
    loop.save()
    return False


def sampling_params(config: Config) -> SamplingParams:
    """How a training step draws its completions, but for the seed."""
    sampler = config.sampler
    return SamplingParams(
        config.train.group_size, sampler.max_tokens, temperature=sampler.temperature, top_p=sampler.top_p,
        top_k=sampler.top_k, stop=sampler.stop,
    )  # fmt: skip


def batch_of(scored: Sequence[Group], size: int) -> list[Group]:
    """The groups that a step learns from, ``size`` where there are as many: first those with signal.

    Groups without signal make up the rest. Their advantages are 0, but the step's means count them, as TRL's do,
    and their KL and entropy belong to the loss like any other's.
    """
    return sorted(scored, key=lambda group: not advantages.has_signal(group))[:size]


def rehearse(loop: Loop, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Before the first step: the longest request through the sampler, the largest pack through the learner, a sync, and
    a checkpoint to the disk.

    Nothing is kept: weights, moments, version, data stream and requests are those of a run without it, bit for bit.
    ``prompts`` are the run's; the longest are taken. Returns seconds, the checkpoint's bytes, and the peak in GiB.
    Raises ``OutOfMemory``, and ``RunFailure`` when the disk is full.
    """
    config, seconds = loop.config, dict[str, float]()
    size, length, group_size = config.train.prompts_per_step, config.sampler.max_tokens, config.train.group_size
    longest = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))[:size]
    batch = [longest[number % len(longest)] for number in range(size)]
    params = dataclasses.replace(sampling_params(config), min_tokens=length, stop=(), seed=config.train.seed % 2**31)

    @contextlib.contextmanager
    def part(name: str, side: str, what: str) -> Iterator[None]:
        loop.tracker.phase(f"rehearsal: {what}")
        started = time.perf_counter()
        with _memory_of(side):
            yield
        seconds[name] = time.perf_counter() - started

    with part("sample", "sampler", f"{size} x {group_size} completions of {length} tokens"), loop.placement.sampling():
        doing = "writing the rehearsal's request"
        groups = loop.answer(loop.ask(batch, params, doing), doing)
    limit = loop.limit("learner", "doing the rehearsal's pack", "update_s")
    with part("learn", "learner", "the largest pack through the learner"), loop.placement.learning(), limit:
        loop.learner.rehearse(groups)
    with part("sync", "run", "the weights to the sampler"):
        loop.sync()
    limit = loop.limit("learner", "writing a checkpoint for trial", "load_s")
    with part("save", "learner", "a checkpoint to the disk"), limit:
        written = loop.checkpoints.rehearse(loop.learner)
    return seconds | {"checkpoint_bytes": written, "peak_gib": loop.memory_gib()}


@contextlib.contextmanager
def _memory_of(side: str) -> Iterator[None]:
    """Turns running out of memory into an ``OutOfMemory`` that names the side."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # a service on another machine reports it in a ``RunFailure``
        if not is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:200]
        raise OutOfMemory(f"the {side} ran out of memory in the rehearsal of the longest batch ({message})") from error


def _sample(loop: Loop, step: int) -> tuple[list[Group], dict[str, float]]:
    """Scored groups with advantages: one request's, topped up by further ones while too few groups have signal."""
    config = loop.config
    wanted, rounds = config.train.prompts_per_step, config.train.dynamic_sampling_rounds
    scored: list[Group] = []
    sample_s = score_s = 0.0
    skipped, passed_over = 0, loop.stream.passed_over
    size = wanted
    for round_ in range(1 + rounds):
        started = time.perf_counter()
        loop.tracker.phase(f"sampler: writing {size} x {config.train.group_size} completions for step {step}")
        with loop.placement.sampling():
            _fill(loop, size)
            request = loop.in_flight.popleft()
            groups = _result(loop, request)
        loop.in_hand.append(request)
        sample_s += time.perf_counter() - started

        started = time.perf_counter()
        loop.tracker.phase(f"task: scoring {sum(len(group.completions) for group in groups)} completions")
        done, errors = request.scores.result(groups)
        score_s += time.perf_counter() - started
        skipped += len(errors)
        if config.learner.truncated == "penalize":
            limit, overlong = config.sampler.max_tokens, config.learner.overlong_tokens
            done = [advantages.soft_overlong(group, limit, overlong) for group in done]
        scored += done
        useful = sum(advantages.has_signal(group) for group in scored)
        if useful >= wanted or round_ == rounds:
            break
        if not config.train.max_staleness:  # with staleness the next request is another step's
            # As many as are likely to yield the missing groups.
            size = min(wanted, math.ceil((wanted - useful) * (len(scored) + 1) / (useful + 1)))
    loop.in_hand.clear()
    loop.selection.observe(scored)
    return advantages.assign(scored, config.learner.advantage), {
        "seconds_sample": sample_s,
        "seconds_score": score_s,
        "groups_skipped_reward_error": float(skipped),
        "prompts_dropped": float(loop.stream.passed_over - passed_over),
    }


def _fill(loop: Loop, size: int) -> None:
    """Keeps ``max_staleness + 1`` requests in flight, new ones of ``size`` prompts, but none beyond the last step."""
    config = loop.config
    steps_left = config.train.steps - loop.learner.version
    while len(loop.in_flight) < min(config.train.max_staleness + 1, steps_left):
        state = loop.stream.state()
        try:
            with loop.limit("task", "making its prompts", "load_s"):
                prompts = loop.selection.take(size)
        except UserError:  # of very many prompts only some were looked at before the run
            if loop.learner.version:
                with loop.placement.learning():
                    loop.save()
            raise
        # A number of its own for every request, so that no two draw alike and a resumed run draws the same.
        seed = (config.train.seed * 1_000_003 + loop.requests_made) % 2**31
        params = dataclasses.replace(sampling_params(config), seed=seed)
        future = loop.ask(prompts, params, f"writing request {loop.requests_made}")
        scores = loop.scorer.begin()
        if isinstance(future, GroupsFuture):
            future.on_group(scores.add)
        loop.in_flight.append(Request(loop.requests_made, state, prompts, future, scores))
        loop.requests_made += 1


def _result(loop: Loop, request: Request) -> list[Group]:
    """The request's groups, checked: one a prompt, in order, not staler than allowed."""
    groups = loop.answer(request.future, f"writing request {request.number} ({len(request.prompts)} prompts)")
    asked, got = [prompt.id for prompt in request.prompts], [group.prompt.id for group in groups]
    if asked != got:
        raise RunFailure(f"the sampler answered other prompts than asked: {got[:3]}... instead of {asked[:3]}...")
    for group in groups:
        if len(group.completions) != loop.config.train.group_size:
            raise RunFailure(
                f"the sampler wrote {len(group.completions)} completions of prompt {group.prompt.id!r} instead of "
                f"train.group_size={loop.config.train.group_size}"
            )
        for completion in group.completions:
            if len(completion.logprobs) != len(completion.token_ids):
                raise RunFailure(f"the sampler gave a completion of prompt {group.prompt.id!r} without all log-probs")
            lag = loop.learner.version - completion.policy_version
            if not 0 <= lag <= loop.config.train.max_staleness:
                raise RunFailure(
                    f"the sampler wrote with version {completion.policy_version} while the learner is at "
                    f"{loop.learner.version}; train.max_staleness={loop.config.train.max_staleness} allows no such lag"
                )
    return groups


def _group_of(values: Mapping[str, Any]) -> Group:
    """A group from the values of ``dataclasses.asdict``, read back from JSON."""

    def made(kind: Any, fields: Mapping[str, Any]) -> Any:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    completions = tuple(made(Completion, fields) for fields in values["completions"])
    return Group(made(Prompt, values["prompt"]), completions)


def _batch_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The metrics that need the completions alone, over every group sampled for the step."""
    completions = [completion for group in groups for completion in group.completions]
    if not completions:
        raise RunFailure(
            "no group of this step could be scored: every one had a reward that failed; see the log, and fix the "
            "task's rewards"
        )
    rewards = [completion.reward for completion in completions if completion.reward is not None]
    lengths = [len(completion.token_ids) for completion in completions]
    versions = [completion.policy_version for completion in completions]
    mean = sum(rewards) / len(rewards)
    metrics = {
        "reward_mean": mean,
        "reward_std": (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5,
        "groups_sampled": float(len(groups)),
        "zero_variance_fraction": sum(not advantages.has_signal(group) for group in groups) / len(groups),
        "completion_tokens_mean": sum(lengths) / len(lengths),
        "completion_tokens_min": float(min(lengths)),
        "completion_tokens_max": float(max(lengths)),
        "truncated_fraction": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "sampler_version_min": float(min(versions)),
        "sampler_version_max": float(max(versions)),
    }
    for name in completions[0].rewards:
        metrics[f"reward/{name}"] = sum(c.rewards[name] for c in completions) / len(completions)
    return metrics
