"""A request's parameters for vLLM and how its answer is read, for the engine in this process and for a server."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from common.errors import UserError, brief
from common.types import Completion, SamplingParams


def check_temperature(temperature: float) -> None:
    """vLLM 0.32 refuses temperatures above 2, and draws by 0.01 where one below that is asked for, which the learner
    would not know. 0 is greedy."""
    if temperature and not 0.01 <= temperature <= 2:
        raise UserError(
            f"sampler.temperature={temperature:g} is none that vLLM draws by; use 0.01 to 2, or sampler.name='hf'"
        )


def sampling_arguments(params: SamplingParams, end_tokens: Sequence[int]) -> dict[str, Any]:
    """The fields of vLLM's ``SamplingParams``, all but the seed."""
    return {
        "n": params.n,
        "max_tokens": params.max_tokens,
        "min_tokens": params.min_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop": list(params.stop),
        "stop_token_ids": list(end_tokens),
        "skip_special_tokens": False,
        "logprobs": 0,
    }


def prompt_seed(seed: int, place: int) -> int:
    """A seed for one prompt, far from every other's: vLLM counts it up for each completion of a group."""
    return random.Random(f"{seed}/{place}").getrandbits(31)


def part_seed(seed: int, offset: int) -> int:
    """A seed for a part of a request, its own for every ``offset``; that of a whole request (offset 0) is its own.

    torch's CPU generator uses 32 bits. Multiples of the golden ratio of that range are all different and far from each
    other.
    """
    return (seed + 0x9E3779B1 * offset) % 2**32


def stop_string(reason: Any) -> str:
    """What vLLM cut off a completion's text: the stop string that ended it. A token that ended it is no part of the
    text."""
    return reason if isinstance(reason, str) else ""


def vllm_params(**fields: Any) -> Any:
    """vLLM's ``SamplingParams`` of a request that is answered once it is whole."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns vLLM's own kind of error, which other processes may not even be able to unpickle, into ours."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except VLLMClientError as error:
        raise UserError(f"vLLM refuses what it was asked to write: {brief(error)}") from error


def completion_of(output: Any) -> Completion:
    """What the engine wrote, with the versions of the weights that wrote it."""
    # vLLM notes which of the names given to set_weight_version was in force at each token.
    versions = tuple(int(span.version) for span in output.weight_versions for _ in range(span.start, span.end))
    assert len(versions) == len(output.token_ids), (output.weight_versions, len(output.token_ids))
    return Completion(
        token_ids=tuple(output.token_ids),
        text=output.text + stop_string(output.stop_reason),
        logprobs=tuple(entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)),
        finish_reason="length" if output.finish_reason == "length" else "stop",
        policy_version=min(versions),
        token_versions=versions if len(set(versions)) > 1 else (),
    )
