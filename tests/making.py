"""Groups and configurations that tests share."""

import random
from typing import Any

from common.config import Config, build
from common.types import Completion, Group, Prompt
from tests.tiny import VOCAB_SIZE

QUIET = ("memory.plan=off", "memory.rehearsal=false", "run.tensorboard=false", "run.report=false", "task.sandbox=none")
"""Settings of a run in a test that is about something else: each of these takes seconds."""
EVERYTHING = ("memory.plan=refuse", "memory.rehearsal=true", "run.tensorboard=true", "run.report=true",
              "task.sandbox=bubblewrap")  # fmt: skip
"""The defaults again, for a test that is about them."""


def config(**sections: dict[str, Any]) -> Config:
    """A small float32 run; a section given here is laid over it."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": "unused", "dtype": "float32"},
        "sampler": {"max_tokens": 8},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 4, "prompts_per_step": 2, "group_size": 4},
    }
    return build({key: base.get(key, {}) | sections.get(key, {}) for key in base.keys() | sections.keys()})


def group(prompt_length: int, lengths: list[int], seed: int = 0, finish: str = "stop") -> Group:
    """Random tokens with random log-probs, rewards and advantages."""
    draw = random.Random(seed)
    prompt = Prompt(f"p{seed}", (), {}, "", tuple(draw.randrange(VOCAB_SIZE) for _ in range(prompt_length)))
    completions = []
    for length in lengths:
        completions.append(
            Completion(
                token_ids=tuple(draw.randrange(VOCAB_SIZE) for _ in range(length)),
                text="",
                logprobs=tuple(-8 + draw.gauss(0, 2) for _ in range(length)),
                finish_reason=finish,  # type: ignore[arg-type]
                policy_version=0,
                rewards={"right": 1.0},
                reward=draw.random(),
                advantage=draw.gauss(0, 1),
            )
        )
    return Group(prompt, tuple(completions))


GROUPS = [group(5, [3, 1, 8, 2], seed=1), group(20, [8, 8, 4, 1], seed=2), group(9, [2, 2], seed=3)]
