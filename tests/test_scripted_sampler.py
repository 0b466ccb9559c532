"""The scripted sampler says its lines, keeps its books, and breaks in the ways it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import RunFailure, UserError
from common.types import AdapterSpec, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import fingerprint
from sampler.conformance.reference import Lora, ReferenceModel, handle_of, perturbed
from sampler.scripted import ScriptedSampler
from tests.tiny import make_tiny

A, B = (Prompt(name, (), text=f"text of {name}", token_ids=(40, 41, 42)) for name in "ab")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


def _setup(folder: Path | str = "no model here", **changes: Any) -> SamplerSetup:
    values: dict[str, Any] = {"dtype": "float32", "max_model_tokens": 192, "max_sequences": 8}
    return SamplerSetup(model_folder=str(folder), **(values | changes))


def _texts(sampler: ScriptedSampler, prompts: list[Prompt], **params: Any) -> list[list[str]]:
    groups = sampler.generate(prompts, SamplingParams(**params)).result()
    return [[one.text for one in group.completions] for group in groups]


def test_lines_are_said_in_turn() -> None:
    sampler = ScriptedSampler(_setup(), {"a": ["one", "two", "three"], "text of b": ["x"]}, default=["?"])
    assert _texts(sampler, [A, B], n=2) == [["one", "two"], ["x", "x"]]
    assert _texts(sampler, [A], n=2) == [["three", "one"]]
    assert _texts(sampler, [Prompt("c", (), token_ids=(1,))]) == [["?"]]
    said = ScriptedSampler(_setup(), lambda prompt, turn: f"{prompt.id}{turn}")
    assert _texts(said, [A, B], n=2) == [["a0", "a1"], ["b0", "b1"]]


def test_tokens_without_a_model_are_bytes() -> None:
    sampler = ScriptedSampler(_setup(), {"a": ["né", (5, 6, 7, 8, 9, 10)]}, logprobs=-0.5)
    text, tokens = sampler.generate([A], SamplingParams(n=2, max_tokens=5)).result()[0].completions
    assert (text.token_ids, text.logprobs, text.finish_reason) == (tuple("né".encode()), (-0.5,) * 3, "stop")
    assert (tokens.token_ids, len(tokens.logprobs), tokens.finish_reason) == ((5, 6, 7, 8, 9), 5, "length")
    with pytest.raises(RunFailure, match="no model in 'no model here'"):
        sampler.logprobs([(1, 2)])


def test_tokens_of_the_folder(folder: Path) -> None:
    sampler = ScriptedSampler(_setup(folder), {"a": ["five 日"]}, logprobs="model")
    one = sampler.generate([A], SamplingParams(temperature=0.7, max_tokens=20)).result()[0].completions[0]
    assert (one.text, one.token_ids[-1], one.finish_reason) == ("five 日", 3, "stop")
    reference = ReferenceModel(str(folder))
    logits_TV = reference.logits(dict(reference.weights()), A.token_ids + one.token_ids)[0] / 0.7
    right = [logits_TV.log_softmax(-1)[2 + place, token].item() for place, token in enumerate(one.token_ids)]
    assert one.logprobs == pytest.approx(right, abs=1e-4)
    given = ScriptedSampler(_setup(folder), logprobs=lambda prompt, ids: [-float(token) for token in ids])
    assert given.generate([A], SamplingParams()).result()[0].completions[0].logprobs == (-3.0,)


def test_answers_that_are_too_short_are_said_over_again(folder: Path) -> None:
    sampler = ScriptedSampler(_setup(folder), {"a": ["five", "", (5, 6)]})
    params = SamplingParams(n=3, max_tokens=20, min_tokens=7)
    five, empty, tokens = sampler.generate([A], params).result()[0].completions
    said = five.token_ids[: five.token_ids.index(five.token_ids[0], 1)]
    assert five.token_ids == (*(said * 7)[:7], 3)
    assert five.text.startswith("fivefive")
    assert (empty.token_ids, empty.finish_reason) == ((0,) * 7 + (3,), "stop")
    assert (tokens.token_ids, tokens.finish_reason) == ((5, 6, 5, 6, 5, 6, 5), "stop")
    whole = sampler.generate([A], SamplingParams(max_tokens=9, min_tokens=9)).result()[0].completions[0]
    assert (len(whole.token_ids), len(whole.logprobs), whole.finish_reason) == (9, 9, "length")


def test_books_are_kept() -> None:
    sampler = ScriptedSampler(_setup())
    params = SamplingParams(n=2)
    weights = {"w": torch.ones(3)}
    before = sampler.generate([A], params)
    sent = sampler.load_weights(handle_of(weights), 5)
    weights["w"].zero_()
    after = sampler.generate([B], params)
    sampler.sleep()
    sampler.wake("weights")
    sampler.close()
    sampler.close()
    assert before.result()[0].completions[0].policy_version == 0
    assert after.result()[0].completions[1].policy_version == 5
    assert sent == fingerprint([("w", torch.ones(3))])
    assert torch.equal(sampler.received["w"], torch.ones(3))
    assert sampler.calls == [
        ("generate", ("a",), params),
        ("load_weights", "full", 5),
        ("generate", ("b",), params),
        ("sleep",),
        ("wake", "weights"),
        ("close",),
        ("close",),
    ]
    with pytest.raises(RunFailure, match="after it was closed"):
        sampler.generate([A], params)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"sampler\.options\.fault='rusty' is none of stale"):
        ScriptedSampler(_setup(), fault="rusty")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has 3 tokens, which with max_tokens=190 is more than the 192"):
        ScriptedSampler(_setup()).generate([A], SamplingParams(max_tokens=190))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fault", [None, "stale", "stale_head", "corrupt"])
def test_faults_in_whole_weights(fault: Any, tied: bool, tmp_path: Path) -> None:
    """What each fault leaves right (the version, the fingerprint) and what it leaves wrong (what is computed)."""
    folder = make_tiny(tmp_path, tied=tied)
    sampler, reference = ScriptedSampler(_setup(folder), fault=fault), ReferenceModel(str(folder))
    old = dict(reference.weights())
    old = {name: tensor.clone() for name, tensor in old.items()}
    new = perturbed(old, seed=1)
    ids = tuple(range(30, 50))
    assert sampler.logprobs([ids])[0] == pytest.approx(reference.logprobs(old, ids), abs=1e-4)
    arrived = sampler.load_weights(handle_of(new), 1)
    assert sampler.version == 1
    assert (arrived == fingerprint(iter(new.items()))) is (fault != "corrupt")
    got = sampler.logprobs([ids])[0]
    if fault == "corrupt":  # one number of many: these tokens may not show it, so the fingerprint must
        return
    assert (got == pytest.approx(reference.logprobs(new, ids), abs=1e-4)) is (fault is None)
    assert (got == pytest.approx(reference.logprobs(old, ids), abs=1e-4)) is (fault == "stale")


def test_an_adapter_that_is_not_served(folder: Path) -> None:
    reference = ReferenceModel(str(folder))
    base = {name: tensor.clone() for name, tensor in reference.weights()}
    lora = Lora.on(reference, str(folder))
    adapter, ids = lora.tensors(seed=1), tuple(range(30, 50))
    setup = _setup(folder, adapter=AdapterSpec(lora.rank, lora.config))
    for fault, served in ((None, lora.merged(base, adapter)), ("ignore_adapter", base)):
        sampler = ScriptedSampler(setup, fault=fault)  # type: ignore[arg-type]
        assert sampler.load_weights(handle_of(adapter, "adapter", lora.config), 1) == fingerprint(
            iter(adapter.items()), lora.config
        )
        assert sampler.logprobs([ids])[0] == pytest.approx(reference.logprobs(served, ids), abs=1e-3)
