"""What the hf sampler promises beyond the contract: transformers' own ``generate`` as a second opinion, transfers that
do not fit, adapters as peft saves them, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import plugins
from common.errors import RunFailure, UserError
from common.tasks.warmup import Warmup
from common.tokenizer import end_of_sequence_ids
from common.types import AdapterSpec, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import FolderWeights, fingerprint
from sampler.conformance.reference import Lora, ReferenceModel, forced, handle_of, perturbed
from sampler.hf import HfSampler, _draw
from tests.tiny import make_tiny

TEXTS = ("Which number is larger, 17 or 9? Answer with one number: ", "7", "naïve 日本語 🙂 über")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("untied"), tied=False)


def _setup(folder: Path, **changes: Any) -> SamplerSetup:
    values: dict[str, Any] = {"dtype": "float32", "max_model_tokens": 192, "max_sequences": 64}
    return SamplerSetup(model_folder=str(folder), **(values | changes))


def _prompts(sampler: HfSampler, *texts: str) -> list[Prompt]:
    return [
        Prompt(text, (), text=text, token_ids=tuple(sampler.tokenizer.encode(text, add_special_tokens=False)))
        for text in texts or TEXTS
    ]


# -- a second opinion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_greedy_equals_transformers_generate(family: str, tmp_path: Path) -> None:
    """Left padding, positions, cache, sliding window and the end token, as ``generate`` does them one at a time."""
    sampler = HfSampler(_setup(make_tiny(tmp_path, family=family, tied=False)))
    prompts = _prompts(sampler)
    groups = sampler.generate(prompts, SamplingParams(max_tokens=24, temperature=0)).result()
    for prompt, group in zip(prompts, groups, strict=True):
        ids_1T = torch.tensor([prompt.token_ids])
        out_1T = sampler.model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert group.completions[0].token_ids == tuple(out_1T[0, ids_1T.shape[1] :].tolist())


def test_serves_the_folder_as_version_0(tied: Path) -> None:
    sampler, reference = HfSampler(_setup(tied)), ReferenceModel(str(tied))
    ids = _prompts(sampler)[0].token_ids
    assert sampler.logprobs([ids])[0] == pytest.approx(reference.logprobs(dict(reference.weights()), ids), abs=1e-4)
    one = sampler.generate(_prompts(sampler), SamplingParams(max_tokens=2)).result()[0].completions[0]
    assert one.policy_version == 0


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_changes_nothing(batch_size: int, tied: Path) -> None:
    params = SamplingParams(n=4, max_tokens=16, temperature=0.9, top_p=0.9, seed=5)
    whole = HfSampler(_setup(tied))
    parts = HfSampler(_setup(tied), batch_size=batch_size)
    for one, two in zip(
        whole.generate(_prompts(whole), params).result(), parts.generate(_prompts(parts), params).result(), strict=True
    ):
        for a, b in zip(one.completions, two.completions, strict=True):
            assert a.token_ids == b.token_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_request_cut_in_two_draws_as_the_whole(cut: int, tied: Path) -> None:
    sampler = HfSampler(_setup(tied))
    prompts, params = _prompts(sampler), SamplingParams(n=3, max_tokens=16, temperature=0.9, seed=5)
    whole = sampler.generate(prompts, params).result()
    parts = sampler.generate(prompts[:cut], params).result()
    parts += sampler.generate(prompts[cut:], replace(params, seed_offset=cut)).result()
    for one, two in zip(whole, parts, strict=True):
        assert [a.token_ids for a in one.completions] == [b.token_ids for b in two.completions]


def test_draws_leave_the_global_generator_alone(tied: Path) -> None:
    """The learner in the same process uses it: what it draws must not depend on what the sampler drew."""
    sampler = HfSampler(_setup(tied))
    before = torch.get_rng_state()
    sampler.generate(_prompts(sampler), SamplingParams(n=2, max_tokens=4)).result()
    sampler.generate(_prompts(sampler), SamplingParams(n=2, max_tokens=4, seed=1)).result()
    assert torch.equal(torch.get_rng_state(), before)


def test_unseeded_draws_repeat_in_a_new_sampler(tied: Path) -> None:
    params = SamplingParams(n=3, max_tokens=8)
    first, second = (HfSampler(_setup(tied, seed=9)) for _ in range(2))
    other = HfSampler(_setup(tied, seed=10))
    groups = [sampler.generate(_prompts(sampler), params).result() for sampler in (first, second, other)]
    assert groups[0] == groups[1]
    assert groups[0] != groups[2]


@given(
    seed=st.integers(0, 2**31),
    uniform=st.sampled_from([0.0, 1e-12, 0.3, 0.999999, 1 - 2**-53]),
    top_p=st.sampled_from([0.1, 0.8, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
)
def test_no_draw_from_outside_the_cut(seed: int, uniform: float, top_p: float, top_k: int) -> None:
    logits_NV = 4 * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(temperature=0.7, top_p=top_p, top_k=top_k)
    token_N, logprob_N = _draw(logits_NV, torch.full((3,), uniform, dtype=torch.float64), params)
    assert torch.isfinite(logprob_N).all(), (token_N, logprob_N)
    if top_k:
        rank_N = (logits_NV > logits_NV.gather(-1, token_N[:, None])).sum(-1)
        assert (rank_N < top_k).all()


# -- transfers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_head_may_be_sent_or_not(with_head: bool, tied: Path) -> None:
    sampler, reference = HfSampler(_setup(tied)), ReferenceModel(str(tied))
    tensors = perturbed(dict(reference.weights()), seed=1)
    sent = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]} if with_head else tensors
    assert sampler.load_weights(handle_of(sent), 4) == fingerprint(iter(sent.items()))
    ids = _prompts(sampler)[0].token_ids
    assert sampler.logprobs([ids])[0] == pytest.approx(reference.logprobs(tensors, ids), abs=1e-4)


def test_a_tied_head_sent_apart_is_refused(tied: Path) -> None:
    sampler = HfSampler(_setup(tied))
    sent = dict(FolderWeights(str(tied)).open())
    sent["lm_head.weight"] = sent["model.embed_tokens.weight"] + 1
    with pytest.raises(RunFailure, match=r"lm_head\.weight.* ties it to"):
        sampler.load_weights(handle_of(sent), 1)


def test_what_is_missing_or_unknown_is_named(untied: Path) -> None:
    sampler = HfSampler(_setup(untied))
    whole = dict(FolderWeights(str(untied)).open())
    short = {name: tensor for name, tensor in whole.items() if "layers.1." not in name and name != "lm_head.weight"}
    with pytest.raises(RunFailure, match=r"misses model\.layers\.1\..* and \d+ more"):
        sampler.load_weights(handle_of(short), 1)
    with pytest.raises(RunFailure, match=r"misses lm_head\.weight$"):
        sampler.load_weights(handle_of({name: whole[name] for name in whole if name != "lm_head.weight"}), 1)
    with pytest.raises(RunFailure, match=r"does not have: model\.extra"):
        sampler.load_weights(handle_of({**whole, "model.extra": torch.zeros(1)}), 1)
    with pytest.raises(RunFailure, match=r"'model\.norm\.weight' of shape \(3,\) where the model has \(64,\)"):
        sampler.load_weights(handle_of({**whole, "model.norm.weight": torch.zeros(3)}), 1)
    assert sampler.version == 0


def test_other_number_formats_are_cast(untied: Path) -> None:
    sampler = HfSampler(_setup(untied))
    sent = {name: tensor.bfloat16() for name, tensor in FolderWeights(str(untied)).open()}
    assert sampler.load_weights(handle_of(sent), 1) == fingerprint(iter(sent.items()))
    assert torch.equal(sampler.model.model.norm.weight, sent["model.norm.weight"].float())


def test_an_adapter_as_peft_saves_it(tied: Path, tmp_path: Path) -> None:
    """A folder written by peft's ``save_pretrained``, against the peft model that wrote it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    handle = FolderWeights(str(tmp_path))
    assert handle.adapter_config is not None

    sampler = HfSampler(
        _setup(tied, adapter=AdapterSpec(4, json.loads((tmp_path / "adapter_config.json").read_text())))
    )
    ids = _prompts(sampler)[0].token_ids
    base = sampler.logprobs([ids])[0]
    sampler.load_weights(handle, 1)
    with torch.no_grad():
        right_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    right = [right_TV[place, token].item() for place, token in enumerate(ids[1:])]
    adapted = sampler.logprobs([ids])[0]
    assert adapted == pytest.approx(right, abs=1e-4)
    assert adapted != pytest.approx(base, abs=1e-2)
    # Whole weights replace the adapter too; the next adapter is back in force.
    sampler.load_weights(FolderWeights(str(tied)), 2)
    assert sampler.logprobs([ids])[0] == pytest.approx(base, abs=1e-5)
    sampler.load_weights(handle, 3)
    assert sampler.logprobs([ids])[0] == pytest.approx(right, abs=1e-4)


def test_an_adapter_that_does_not_fit_is_refused(tied: Path) -> None:
    lora = Lora.on(ReferenceModel(str(tied)), str(tied))
    tensors = lora.tensors(seed=1)
    with pytest.raises(RunFailure, match="set up without one"):
        HfSampler(_setup(tied)).load_weights(handle_of(tensors, "adapter", lora.config), 1)
    sampler = HfSampler(_setup(tied, adapter=AdapterSpec(lora.rank, lora.config)))
    with pytest.raises(RunFailure, match="lora_alpha=16 but was set up for 8"):
        sampler.load_weights(handle_of(tensors, "adapter", {**lora.config, "lora_alpha": 16}), 1)
    lost = next(iter(tensors))
    with pytest.raises(RunFailure, match=f"misses {lost}"):
        sampler.load_weights(handle_of({n: t for n, t in tensors.items() if n != lost}, "adapter", lora.config), 1)
    with pytest.raises(RunFailure, match=r"does not have: extra\.lora_A\.weight"):
        sampler.load_weights(handle_of({**tensors, "extra.lora_A.weight": torch.zeros(1)}, "adapter", lora.config), 1)


def test_an_adapter_for_another_model_is_refused(tied: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["no_such_layer"], "task_type": "CAUSAL_LM"}
    with pytest.raises(UserError, match="does not fit this model"):
        HfSampler(_setup(tied, adapter=AdapterSpec(4, config)))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_options(tied: Path) -> None:
    with pytest.raises(UserError, match=r"sampler\.options\.max_num_seqs=3 is not an option of sampler 'hf'"):
        plugins.check("sampler", "hf", {"max_num_seqs": 3}, 1)
    for wrong in (0, -1, 2.5, True, "many"):
        with pytest.raises(UserError, match=r"sampler\.options\.batch_size=.* whole number"):
            HfSampler(_setup(tied), batch_size=wrong)


def test_setups_that_cannot_work(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comes to 513 tokens, more than the model's context of 512"):
        HfSampler(_setup(tied, max_model_tokens=513))
    HfSampler(_setup(tied, max_model_tokens=512))
    with pytest.raises(UserError, match=r"sampler\.tensor_parallel=2 cannot be had with sampler\.name='hf'"):
        HfSampler(_setup(tied, tensor_parallel=2))
    with pytest.raises(UserError, match=r"sampler\.in_flight_updates=true has no effect with sampler\.name='hf'"):
        HfSampler(_setup(tied, in_flight_updates=True))
    with pytest.raises(UserError, match="tokenizer"):
        HfSampler(_setup(tmp_path))


def test_a_prompt_that_was_not_rendered(tied: Path) -> None:
    with pytest.raises(UserError, match="'p' has no tokens"):
        HfSampler(_setup(tied)).generate([Prompt("p", ())], SamplingParams())


def test_asleep_and_closed(tied: Path) -> None:
    sampler = HfSampler(_setup(tied))
    prompts = _prompts(sampler)
    sampler.sleep()
    for call in (lambda: sampler.generate(prompts, SamplingParams()), lambda: sampler.logprobs([(5, 6)])):
        with pytest.raises(RunFailure, match="while asleep"):
            call()
    with pytest.raises(RunFailure, match="while asleep"):
        sampler.load_weights(FolderWeights(str(tied)), 1)
    sampler.wake("weights")
    sampler.load_weights(FolderWeights(str(tied)), 1)
    with pytest.raises(RunFailure, match="while asleep"):
        sampler.generate(prompts, SamplingParams())
    sampler.wake("cache")
    sampler.generate(prompts, SamplingParams(max_tokens=1))
    sampler.close()
    sampler.close()
    for call in (
        lambda: sampler.generate(prompts, SamplingParams()),
        lambda: sampler.logprobs([(5, 6)]),
        lambda: sampler.load_weights(FolderWeights(str(tied)), 2),
        sampler.sleep,
        sampler.wake,
    ):
        with pytest.raises(RunFailure, match="after it was closed"):
            call()


def test_end_of_sequence_ids(tied: Path, tmp_path: Path) -> None:
    tokenizer = HfSampler(_setup(tied)).tokenizer
    assert end_of_sequence_ids(tied, tokenizer) == (3, 1)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_of_sequence_ids(tmp_path, tokenizer) == (3, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 8]}')
    assert end_of_sequence_ids(tmp_path, tokenizer) == (3, 8)
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_of_sequence_ids(tmp_path, tokenizer) == (3, 7)


def test_no_prompts_and_no_sequences(tied: Path) -> None:
    sampler = HfSampler(_setup(tied))
    assert sampler.generate([], SamplingParams()).result() == []
    assert sampler.logprobs([]) == []
    assert sampler.logprobs([(5,)]) == [[]]


# -- the text ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HfSampler, Prompt]:
    """A model whose tokenizer holds a task's tags as special tokens, and which writes <answer>18</answer>; its end
    token, and more."""
    folder = make_tiny(tmp_path_factory.mktemp("tagged"), tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reference, setup = ReferenceModel(str(folder)), _setup(folder, end_tokens=(2,))
    sampler = HfSampler(setup)
    (prompt,) = _prompts(sampler, "7")
    ids = sampler.tokenizer.encode("<answer>18</answer> or<|im_start|>", add_special_tokens=False)
    sampler.load_weights(handle_of(forced(reference, dict(reference.weights()), prompt.token_ids, ids)), 1)
    return folder, sampler, prompt


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "<answer>18</answer> or"),
        (("</answer>",), "<answer>18</answer>"),
        (("8", "</answer>"), "<answer>18"),
        (("r>18</a",), "<answer>18</a"),
        (("<|im_start|>",), "<answer>18</answer> or"),
    ],
)
def test_the_text_is_what_the_model_wrote(tagged: Any, stop: tuple[str, ...], text: str) -> None:
    """Tags that are special tokens and the stop string are in it, the token that ends the turn is not."""
    _, sampler, prompt = tagged
    params = SamplingParams(n=2, max_tokens=12, stop=stop)
    for one in sampler.generate([prompt], params).result()[0].completions:
        assert (one.text, one.finish_reason) == (text, "stop")
        assert sampler.tokenizer.decode(one.token_ids).startswith(text)


def test_a_built_in_task_pays_for_an_answer_that_a_stop_string_ended(tagged: Any) -> None:
    """Both ways of asking for the end give the rewards of the whole text."""
    _, sampler, prompt = tagged
    task = Warmup()
    asked = replace(prompt, data={"kind": "next", "question": "", "answer": "18"})
    (group,) = sampler.generate([asked], SamplingParams(max_tokens=12, stop=("</answer>",))).result()
    assert {name: reward(asked, group.completions[0]) for name, reward in task.rewards.items()} == {
        "correct": 1.0,
        "format": 1.0,
    }


def test_a_family_whose_cached_pass_fails_is_one_sentence(tmp_path: Path) -> None:
    """MiniMax's cache cannot be repeated for the completions of a prompt."""
    sampler = HfSampler(_setup(make_tiny(tmp_path / "minimax", family="minimax")))
    with pytest.raises(RunFailure, match=r"cannot compute with model_type 'minimax': .*; use sampler.name='vllm'"):
        sampler.generate(_prompts(sampler), SamplingParams(n=2, max_tokens=4)).result()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_checked_as_the_model_holds_them(family: str, tmp_path: Path) -> None:
    """They arrive one by one, as in the files, and are held as one tensor for each layer."""
    sampler = HfSampler(_setup(make_tiny(tmp_path, family=family, tied=False)))
    for seed in (1, 2):
        tensors = perturbed(dict(FolderWeights(str(tmp_path)).open()), seed)
        digest = sampler.load_weights(handle_of(tensors), seed)
        assert sampler.check_weights(digest) == []
    (name,) = [name for name in sampler.model.state_dict() if "layers.1." in name and "experts.gate_up_proj" in name]
    sampler.model.get_parameter(name).data[0, 0, 0] += 1
    assert sampler.check_weights(digest) == [f"{name} holds other values than those sent"]
