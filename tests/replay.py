"""A sampler that answers as an earlier run's rollouts say, and holds real weights: two runs then learn from the same
completions, whatever their engines would have drawn. Used as ``sampler.name = "tests/replay.py:Replay"``."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from common import atomic_files
from common.types import Completion, Group
from sampler.hf import HfSampler


class Replay(HfSampler):
    @staticmethod
    def check_options(options):
        assert set(options) <= {"rollouts"}, options

    def __init__(self, setup, rollouts):
        super().__init__(setup)
        self._rows: dict[tuple[int, str], list[dict]] = {}
        for file in sorted(Path(rollouts).glob("step-*.jsonl")):
            for row in atomic_files.read_json_lines(file):
                self._rows.setdefault((row["policy_version"], row["prompt_id"]), []).append(row)

    def generate(self, prompts, params):
        if params.min_tokens:  # a rehearsal, of which no run keeps anything
            return super().generate(prompts, params)
        future: Future[list[Group]] = Future()
        future.set_result([Group(prompt, self._answers(prompt, params.n)) for prompt in prompts])
        return future

    def _answers(self, prompt, n):
        rows = self._rows[self.version, prompt.id]
        assert len(rows) == n, (prompt.id, len(rows))
        return tuple(
            Completion(
                tuple(row["token_ids"]), row["completion"], tuple(row["logprobs"]), row["finish_reason"], self.version
            )
            for row in rows
        )
