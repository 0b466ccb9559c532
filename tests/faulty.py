"""A sampler that misbehaves once, at a chosen moment, in a chosen way; made again after that, it is well.

Used as ``sampler.name = "tests/faulty.py:Faulty"``. ``marker`` is a file that says that it has happened.
"""

import os
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from sampler.hf import HfSampler


class Faulty(HfSampler):
    @staticmethod
    def check_options(options):
        assert set(options) <= {"fault", "version", "marker", "always"}, options

    def __init__(self, setup, fault, marker, version=1, always=False):
        super().__init__(setup)
        self._fault, self._at, self._marker, self._always = fault, version, Path(marker), always

    def _now(self, *faults):
        if self._fault not in faults or self.version < self._at or (self._marker.exists() and not self._always):
            return False
        self._marker.touch()
        return True

    def generate(self, prompts, params):
        if self._now("raise"):
            raise RuntimeError("the engine broke")
        if self._now("exit"):
            os._exit(7)
        if self._now("hang"):
            time.sleep(1000)
        future = super().generate(prompts, params)
        if self._now("garbage"):
            groups = future.result()
            first = groups[0].completions[0]
            broken = replace(first, logprobs=(float("nan"), *first.logprobs[1:]))
            groups[0] = replace(groups[0], completions=(broken, *groups[0].completions[1:]))
        return future

    def load_weights(self, handle, version):
        if self._now("exit_at_sync"):
            os._exit(7)
        if self._now("stale"):
            self.version = version
            return handle.sent()[0]
        return super().load_weights(handle, version)


class Endless(Faulty):
    """Works, answers every question about itself, and never finishes, until the marker is there."""

    def generate(self, prompts, params):
        return Future() if self._now("endless") else super().generate(prompts, params)

    def pump(self):
        time.sleep(0.01)
        return True
