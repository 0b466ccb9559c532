"""The contracts between the parts. The docstrings are the contract; ``sampler/conformance/suite.py`` runs the
sampler's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from common.types import Completion, Group, Prompt, SamplingParams

if TYPE_CHECKING:
    import torch

Split = Literal["train", "test"]
Transport = Literal["same process", "shared memory", "collective", "with the call"]
RewardFunction = Callable[[Prompt, Completion], float]


class GroupsFuture(Future[list[Group]]):
    """A sampler's answer that also reports each group as soon as all of its completions are there."""

    def __init__(self) -> None:
        super().__init__()
        self._groups: dict[int, Group] = {}
        self._listeners: list[Callable[[int, Group], None]] = []
        self._reporting = threading.Lock()

    def group_done(self, index: int, group: Group) -> None:
        """For the back end, from any thread, before the future's result: ``group`` is the answer's entry ``index``."""
        with self._reporting:
            self._groups[index] = group
            listeners = list(self._listeners)
        for listener in listeners:
            listener(index, group)

    def on_group(self, listener: Callable[[int, Group], None]) -> None:
        """Calls ``listener(index, group)`` once for each group: here for those already there, and for each later one on
        the back end's thread, so it must neither wait nor raise."""
        with self._reporting:
            self._listeners.append(listener)
            groups = list(self._groups.items())
        for index, group in groups:
            listener(index, group)


class WeightHandle(Protocol):
    """One version of the weights, ready to be sent. Opening it any number of times gives the same tensors."""

    @property
    def kind(self) -> Literal["full", "adapter"]:
        """``full``: every weight by its Hugging Face name; ``adapter``: peft's LoRA tensors by peft's names."""
        ...

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        """peft's adapter configuration when ``kind`` is ``adapter``."""
        ...

    @property
    def transport(self) -> Transport:
        """How the tensors travel."""
        ...

    def sent(self) -> tuple[str, int]:
        """The fingerprint (``common.weights.handles.fingerprint``, with ``adapter_config``) and the bytes of what is
        offered, from the offering side."""
        ...

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields ``(name, tensor)``, a tensor at a time. A tensor may be read until ``load_weights`` returns; copy what
        is kept longer."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Writes completions. Calls take effect in the order made: ``load_weights`` never touches an earlier ``generate``.

    A back end is any callable ``make(setup: SamplerSetup, **options) -> Sampler``. Bad options raise ``UserError``; if
    it has a ``check_options(options)``, that is called before anything is loaded, and so is a
    ``check_sampling(params)`` with the ``SamplingParams`` of a training step, for what it cannot draw by.

    ``completions_at_once(options) -> int``, if there is one, is how many completions it works on at once with these
    options; further ones of a request wait. ``SamplerSetup.max_sequences`` is then no more than that.
    ``memory_needed(setup, options, model, room) -> SamplerMemory`` (``common.memory``), if there is one, is the memory
    that it takes, for the memory plan; without it the plan counts nothing for the sampler.

    More members are a back end's own choice; the first two are for resumed runs and the proof of a sync, the others
    for many machines:

    - ``free_options: frozenset[str]``: its options that only move memory or time; a resumed run may have others.
    - ``check_weights(fingerprint: str) -> list[str]``: one sentence for each tensor of the last transfer, whose
      fingerprint is given, that is not stored as it arrived, and for each that changed without being sent. It compares
      the tensors that the engine computes with, not those that passed through while loading: the probe cannot see a
      small part that stayed old.
    - ``seeds_prompts: bool``: a seed fixes each prompt's completions by the prompt's place in the request alone
      (``SamplingParams.seed_offset``), so that they do not depend on how the request is split over replicas.
    - ``pump() -> bool``: does a little of the requested work and returns whether any is left. A back end with it
      returns from ``generate`` at once and works in ``pump``, which its futures' ``result`` calls too; new requests may
      join at any time. One without it works inside ``generate``, or by itself.
    - ``many_at_once: bool``: works by itself on any number of requests; ``pump`` implies as much.
    """

    takes_adapters: bool
    """Whether ``load_weights`` accepts a handle of kind ``adapter``; if not, the learner sends merged weights."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Future[list[Group]]:
        """One group of ``params.n`` completions for each prompt, in the order of ``prompts``.

        A future that is a ``GroupsFuture`` reports each group once it is whole, in any order, and then answers with
        the same groups; they are scored while the others are written. Any other future is scored at its end.

        Raises ``UserError`` at once for a prompt that leaves no room for ``params.max_tokens`` in the context.
        """
        ...

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced natural-log probabilities at temperature 1, no top-p or top-k, under the weights served now.

        The answer for a sequence of T tokens has T - 1 numbers: entry t is log p(token t+1 | tokens 0..t).
        """
        ...

    def load_weights(self, handle: WeightHandle, version: int) -> str:
        """Serve these weights from the next call on, and forget every cache that the old ones filled.

        Returns ``common.weights.handles.fingerprint`` of the tensors, and of the handle's ``adapter_config``, as they
        **arrived** here.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory back, where the platform can. Weights may be lost: ``load_weights`` follows."""
        ...

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> None:
        """Undo ``sleep``: first ``weights`` (for a sync), then ``cache`` (for sampling), or both."""
        ...

    def close(self) -> None:
        """Free everything. Closing twice is allowed."""
        ...


class Learner(Protocol):
    """Turns groups into weight updates."""

    version: int
    """Optimizer steps done; stamped on what it publishes."""

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One step on these groups (advantages assigned). Returns metrics under their documented keys.

        Raises ``RunFailure`` before stepping if the loss or a gradient is not finite.
        """
        ...

    def rehearse(self, groups: Sequence[Group]) -> None:
        """The largest pass that groups of these prompts can make, every completion at full length, through forward,
        backward and a step at rate 0. Afterwards everything is as before, bit for bit."""
        ...

    def publish_weights(self, merged: bool = False) -> WeightHandle:
        """The current weights: the adapter alone under LoRA, unless ``merged``."""
        ...

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As ``Sampler.logprobs``, under the learner's weights."""
        ...

    def perturbed(self, seed: int) -> AbstractContextManager[None]:
        """Inside, every published weight carries seeded noise large enough to move the log-probs; outside, none does.

        The challenge of the sync's proof: a sampler that drops any part of a transfer cannot follow it.
        """
        ...

    def save(self, folder: Path) -> None:
        """Everything needed to resume exactly, into an existing empty folder."""
        ...

    def restore(self, folder: Path) -> None:
        """Undo of ``save``."""
        ...

    def export(self, folder: Path, merged: bool = False) -> None:
        """A Hugging Face folder: the model, or under LoRA the adapter (the merged model with ``merged``)."""
        ...


class Task(Protocol):
    """Prompts and rewards. A back end is any callable ``make(**options) -> Task``; it must be cheap to make,
    because every reward worker process makes its own."""

    reward_weights: Mapping[str, float]
    """The weight of each named reward."""
    rewards: Mapping[str, RewardFunction]
    """``(prompt, completion) -> number``; runs in a worker process under a time limit."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The split's questions, always the same ones in the same order. Train and test share none."""
        ...

    def is_correct(self, prompt: Prompt, completion: Completion) -> bool:
        """Whether the answer is right: what accuracy and pass@k count."""
        ...


class Placement(Protocol):
    """Which side holds the device when. On a shared device each phase puts the other side to sleep; else nothing
    happens."""

    def sampling(self) -> AbstractContextManager[None]: ...

    def learning(self) -> AbstractContextManager[None]: ...

    def syncing(self) -> AbstractContextManager[None]: ...


class Tracker(Protocol):
    """Takes the run's numbers and completions."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics."""
        ...

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Every completion of one step."""
        ...

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """One evaluation (``learner.evaluate.Evaluation.as_dict``)."""
        ...

    def close(self) -> None: ...
