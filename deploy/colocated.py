"""Sampler and learner in one process, taking turns on its device. Used by ``deploy/run.py``;
``deploy/cluster/separate.py`` is the same for services on Ray."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol

from common import device as devices
from common.config import TimeoutConfig
from common.protocols import Sampler
from common.watchdog import time_limit
from deploy.components import Components, Prepared, closing, make_sampler
from learner.torch_learner import TorchLearner


class Sleeps(Protocol):
    def sleep(self, part: Literal["moments", "all"] = "all") -> None: ...

    def wake(self, part: Literal["weights", "all"] = "all") -> None: ...


@dataclasses.dataclass(frozen=True)
class SharedDevice:
    """A ``Placement`` where sampler and learner take turns: the idle one frees its memory before the other takes it, so
    that the peak is the larger need and not the sum. A sync needs both sides' weights."""

    sampler: Sampler
    learner: Sleeps
    timeout_s: float = TimeoutConfig().sync_s
    """Of each side's making room or coming back (``timeouts.sync_s``)."""

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        with self._limit("learner", "giving its memory back"):
            self.learner.sleep("all")
        with self._limit("sampler", "taking its memory"):
            self.sampler.wake("all")
        yield

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        with self._limit("sampler", "giving its memory back"):
            self.sampler.sleep()
        with self._limit("learner", "taking its memory"):
            self.learner.wake("all")
        yield

    @contextlib.contextmanager
    def syncing(self) -> Iterator[None]:
        with self._limit("learner", "making room for a sync"):
            self.learner.sleep("moments")
            self.learner.wake("weights")
        with self._limit("sampler", "taking its memory"):
            self.sampler.wake("weights")
            self.sampler.wake("cache")  # the proof's probe needs it
        yield

    def _limit(self, side: str, doing: str) -> contextlib.AbstractContextManager[None]:
        return time_limit(side, doing, self.timeout_s, "timeouts.sync_s")


@contextlib.contextmanager
def parts(ready: Prepared) -> Iterator[Components]:
    timeouts = ready.config.timeouts
    with closing(make_sampler(ready), ready.config) as sampler:
        with time_limit("learner", "loading its model", timeouts.load_s, "timeouts.load_s"):
            learner = TorchLearner(ready.config, ready.folder, ready.device)
        yield Components(
            sampler,
            learner,
            SharedDevice(sampler, learner, timeouts.sync_s),
            f"sampler {ready.config.sampler.name}\nlearner {learner.parameters_trained / 1e6:.1f} M of "
            f"{learner.parameters_total / 1e6:.1f} M weights, {'packed' if learner.packed else 'padded'}, "
            f"{ready.config.model.dtype}, {ready.device}",
            memory_gib=lambda: devices.peak_memory_gib(ready.device),
            answer_s=timeouts.generate_s,
            sync_s=timeouts.sync_s,
        )
