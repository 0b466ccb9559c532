"""TRL's GRPOTrainer on a load: its own ``train()``, one step each time it is told.

What is put in from outside is data and nothing else: prompts as token ids, and for ``learn`` the load's completions in
place of ``generate``'s. What is timed is TRL's: ``on_step_begin`` to ``on_step_end``, which holds padding, rewards,
advantages, one forward and backward pass a micro-batch (on policy it takes its own detached log-probs for the old
ones, so there is no further pass), clipping and the optimizer's step. For ``step`` its ``generate`` writes; a logits
processor ends each completion at the length that the load gives it, so that both sides write equally many tokens.

Used by ``sides.py``, and by ``tests/test_benchmarks.py`` for the gradient.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessor, TrainerCallback

from common.types import Group
from tests.benchmarks.loads import reward_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the vLLM version, which none of this uses
    from trl import GRPOConfig, GRPOTrainer


class EndAt(LogitsProcessor):
    """Lets row r end at its ``lengths[r]``-th token and nowhere else."""

    def __init__(self, lengths: Sequence[int], eos: Sequence[int]) -> None:
        self._lengths, self._eos, self._written = torch.tensor(lengths), list(eos), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._written += 1
        scores = scores.clone()
        scores[:, self._eos] = -torch.inf
        due = (self._lengths == self._written).nonzero()[:, 0]
        scores[due] = -torch.inf
        scores[due, self._eos[0]] = 0.0
        return scores


class Fed(GRPOTrainer):
    """The trainer on token ids. ``writes`` says whether it writes completions itself."""

    groups: Sequence[Group]
    writes = False
    sampling_s = 0.0

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, None, dict[str, Any]]:
        numbers, seen = [int(prompt) for prompt in prompts], Counter[int]()
        self._asked = []
        for number in numbers:
            self._asked.append(self.groups[number].completions[seen[number] % self.args.num_generations].token_ids)
            seen[number] += 1
        return [list(self.groups[number].prompt.token_ids) for number in numbers], None, {}

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **named: Any) -> tuple[Any, Any]:
        started = time.perf_counter()
        if self.writes:
            ends = EndAt([len(ids) for ids in self._asked], self.eos_token_ids)
            own = type(self.model).generate
            self.model.generate = lambda **options: own(self.model, **options, logits_processor=[ends])
            answer = super()._generate_single_turn(prompt_ids, *rest, **named)
            assert [len(ids) for ids in answer[0]] == [len(ids) for ids in self._asked]
        else:
            answer = [list(ids) for ids in self._asked], None
        self.sampling_s = time.perf_counter() - started
        return answer


class Gate(TrainerCallback):
    """Before each step asks ``wanted()`` for ``learn`` or ``step``; after it gives ``done`` the seconds and tokens."""

    def __init__(self, wanted: Callable[[], str], done: Callable[[dict[str, float]], None]) -> None:
        self._wanted, self._done = wanted, done
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.writes = self._wanted() == "step"
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        whole_s = time.perf_counter() - self._started
        sampling_s = self.trainer.sampling_s
        tokens = sum(float(part["completion_mask"].sum()) for part in self.trainer._buffered_inputs)
        self._done({"whole_s": whole_s, "sample_s": sampling_s, "learn_s": whole_s - sampling_s, "tokens": tokens})


def trainer_on(
    folder: Path, groups: Sequence[Group], gate: Gate, out: Path, weights: str = "bfloat16", rows: int = 0,
    **settings: Any,
) -> Fed:  # fmt: skip
    """TRL on these groups. ``weights`` is the dtype that the model is loaded in, ``rows`` a micro-batch's (0: all at
    once), ``settings`` are GRPOConfig's."""
    every = len(groups) * len(groups[0].completions)
    rows = rows or every
    chosen = {
        "use_cpu": True, "bf16": True, "gradient_checkpointing": False, "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": every // rows, "num_generations": len(groups[0].completions),
        "max_completion_length": max(len(one.token_ids) for group in groups for one in group.completions),
        "shuffle_dataset": False, "learning_rate": 1e-9, "max_steps": 1_000_000, "save_strategy": "no",
        "report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "output_dir": str(out),
        "model_init_kwargs": {"dtype": weights, "attn_implementation": "sdpa"}, **settings,
    }  # fmt: skip

    def reward(completion_ids: Sequence[list[int]], **rest: Any) -> list[float]:
        return [reward_of(ids) for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = Fed(
        model=str(folder),
        reward_funcs=reward,
        args=GRPOConfig(**chosen),
        train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(groups))]),
        processing_class=tokenizer,
        callbacks=[gate],
    )
    trainer.groups = groups
    gate.trainer = trainer
    return trainer
