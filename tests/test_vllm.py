"""Real vLLM: the whole path of the weights and its defects that the proof must catch, several requests in flight at
once, weights swapped under them, and what happens when the engine fails."""

import gc
import json
import random
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import active_children

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import RunFailure, UserError
from common.memory import cache_bytes_per_token
from common.types import AdapterSpec, Prompt, SamplerSetup, SamplingParams
from common.weights.handles import FolderWeights
from learner.model import adapters
from learner.torch_learner import TorchLearner
from learner.weight_sync import SyncError, WeightSync, make_probe
from sampler.conformance.reference import ReferenceModel, handle_of, perturbed
from sampler.engine.arguments import CPU_BLOCK, cache_bytes, engine_arguments
from sampler.engine.cpu_patches import chosen_logprobs
from sampler.engine.sampling import part_seed, prompt_seed
from sampler.engine.vllm import VllmSampler
from tests import weight_faults
from tests.making import GROUPS, config
from tests.test_sync import Separate
from tests.tiny import make_tiny

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tied"), tied=True)


def make(folder, kind=VllmSampler, lora=0, dtype="float32", tolerance=0.02, **options):
    spec = config(model={"name": "unused", "dtype": dtype, "lora_rank": lora}, sync={"tolerance": tolerance})
    learner = TorchLearner(spec, folder, "cpu")
    adapter = AdapterSpec(lora, adapters.adapter_config(spec.model, folder).to_dict()) if lora else None
    sampler = kind(SamplerSetup(str(folder), dtype, 64, 16, adapter=adapter), **options)
    probe = make_probe([group.prompt for group in GROUPS], 32, 32)
    return learner, sampler, WeightSync(learner, sampler, Separate(), probe, spec.sync, 60, dtype)


@pytest.fixture
def closing():
    made = []
    yield made.append
    for sampler in made:
        sampler.close()
    gc.collect()


@pytest.mark.parametrize("lora", [0, 4])
def test_vllm_follows_the_learner(folder, closing, lora):
    learner, sampler, sync = make(folder, lora=lora)
    closing(sampler)
    assert sync.challenge()["probe_diff"] < 0.01
    for _ in range(2):
        assert sync()["probe_diff"] < 0.01
        learner.update(GROUPS)
    prompt = Prompt("p", (), token_ids=GROUPS[0].prompt.token_ids)
    (answer,) = sampler.generate([prompt], SamplingParams(n=3, max_tokens=4, seed=1)).result()
    assert {completion.policy_version for completion in answer.completions} == {1}


@pytest.mark.parametrize(
    ("family", "silent"), [("gemma2", True), ("gemma3_text", False), ("cohere2", False), ("gpt2", True)]
)
def test_a_sync_reaches_the_head_however_it_is_tied(tmp_path, closing, family, silent):
    """By the embedding module itself, or by a layer of its own; in a config.json that may not even say so."""
    folder = make_tiny(tmp_path, tied=True, family=family)
    if silent:
        values = json.loads((folder / "config.json").read_text())
        del values["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(values))
    _, sampler, sync = make(folder)
    closing(sampler)
    assert sync.challenge()["probe_diff"] < 0.001
    assert sync()["probe_diff"] < 0.001


def test_a_tied_head_that_keeps_its_old_weights_is_caught(folder, closing, monkeypatch):
    """What vLLM's reload does to a tied output head when it is not untied: everything new but the head."""
    monkeypatch.setattr("sampler.engine.vllm.needs_head", lambda model: False)
    _, sampler, sync = make(folder)
    closing(sampler)
    with pytest.raises(SyncError, match="other weights"):
        sync.challenge()


def test_an_adapter_served_from_the_cache_is_caught(folder, closing):
    """vLLM keeps adapters by id: a new one under an old id is not looked at."""

    class SameId(VllmSampler):
        def _load_adapter(self, tensors, described):
            self._adapter_count = 0
            self._adapter = None
            folder = self._scratch / "adapter-1"
            if folder.exists():
                folder.rename(self._scratch / f"old-{id(tensors)}")
            super()._load_adapter(tensors, described)

    _, sampler, sync = make(folder, SameId, lora=4)
    closing(sampler)
    sync.challenge()
    with pytest.raises(SyncError):
        sync()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu_memory_utilisation": 0.5}, "gpu_memory_utilization"),
        ({"model": "x"}, "model.name"),
        ({"logprobs_mode": "raw_logits"}, "set by nanogrpo itself"),
        ({"tensor_parallel_size": 2}, r"use sampler\.tensor_parallel"),
        ({"block_size": 7}, "cannot start"),
    ],
)
def test_wrong_options_are_one_sentence(folder, options, said):
    with pytest.raises(UserError, match=said) as caught:
        VllmSampler(SamplerSetup(str(folder), "float32", 64, 16), **options)
    assert "\n" not in str(caught.value)


CONFIG = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


def test_the_cache_holds_every_sequence_at_full_length():
    """By hand: 30 layers x (keys and values) x 3 heads x 64 wide x 2 bytes; a sequence of 100 tokens takes 5 blocks of
    32 at most, one of them begun for the next token."""
    assert cache_bytes_per_token(CONFIG, "bfloat16") == 30 * 2 * 3 * 64 * 2
    assert cache_bytes_per_token({"text_config": CONFIG, "hidden_size": 7}, "float32", 3) == 30 * 2 * 1 * 64 * 4
    on_cpu = SamplerSetup("unused", "bfloat16", 100, 20)
    assert cache_bytes(CONFIG, on_cpu) == 23040 * 20 * 5 * 32
    assert cache_bytes(CONFIG, replace(on_cpu, max_sequences=1)) == 64 << 20
    assert cache_bytes(CONFIG, replace(on_cpu, max_model_tokens=8000, max_sequences=200)) == 4 << 30
    assert cache_bytes(CONFIG, replace(on_cpu, device="gpu", max_sequences=1)) == 23040 * 5 * 32


def test_a_base_in_4_bits_is_asked_for_on_a_gpu_under_an_adapter_only():
    lora = AdapterSpec(8, {"target_modules": ["q_proj"]})
    setup = SamplerSetup("unused", "bfloat16", 100, 20, device="gpu", adapter=lora, quantize="nf4")
    if find_spec("vllm_bnb_plugin") is None:
        with pytest.raises(UserError, match=r"model\.quantize='nf4' .* `pip install vllm-bnb-plugin`"):
            engine_arguments(setup, CONFIG, untie=False)
    else:
        arguments = engine_arguments(setup, CONFIG, untie=False)
        assert arguments["quantization"] == "bitsandbytes"
        assert "load_format" not in arguments
    # Merged weights (DoRA) are sent whole; on the CPU the folder's own are the dequantized ones.
    for other in (replace(setup, adapter=None), replace(setup, device="cpu"), replace(setup, quantize="off")):
        assert "quantization" not in engine_arguments(other, CONFIG, untie=False)


def test_the_log_prob_of_the_token_drawn_is_bit_for_bit_that_of_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(1)
    logits_NV = 3 * torch.randn(11, 500, generator=generator)
    logits_NV[3, 10:] = -torch.inf  # a cut
    token_ids = torch.arange(11) % 10
    got = chosen_logprobs(logits_NV, 0, token_ids)
    assert torch.equal(got.logprobs, logits_NV.log_softmax(-1).gather(-1, token_ids[:, None]))
    assert got.logprob_token_ids[:, 0].tolist() == token_ids.tolist()


# -- requests in flight ------------------------------------------------------------------------------------------------

# Longer than a block of the cache, so that its beginning is found there again.
PROMPTS = [Prompt(f"p{index}", (), token_ids=tuple(range(20 + index, 70 + 9 * index))) for index in range(3)]


def serve(folder, closing, **changes):
    sampler = VllmSampler(SamplerSetup(str(folder), "float32", 192, 16, **changes))
    closing(sampler)
    reference = ReferenceModel(str(folder))
    return sampler, reference, {name: tensor.clone() for name, tensor in reference.weights()}


def versions_of(completion):
    return completion.token_versions or (completion.policy_version,) * len(completion.token_ids)


def off_by(reference, weights, groups):
    """The largest |log-prob - reference|, each token's under the weights of its version."""
    worst = 0.0
    for group in groups:
        start = len(group.prompt.token_ids) - 1
        for completion in group.completions:
            versions, token_ids = versions_of(completion), completion.token_ids
            assert len(versions) == len(token_ids) == len(completion.logprobs) > 0
            assert completion.policy_version == min(versions)
            for version in set(versions):
                right = reference.logprobs(weights[version], group.prompt.token_ids + token_ids)[start:]
                rows = zip(versions, completion.logprobs, right, strict=True)
                worst = max([worst, *(abs(got - wanted) for number, got, wanted in rows if number == version)])
    return worst


def test_a_request_alone_is_what_vllm_itself_writes(folder, closing):
    """Bit for bit ``LLM.generate`` from the same state of the generator, whatever was written before."""
    from vllm import SamplingParams as VllmParams

    sampler, _, _ = serve(folder, closing)
    params = SamplingParams(n=4, max_tokens=30, temperature=0.8, top_p=0.95, seed=5)
    sampler.generate(PROMPTS, SamplingParams(n=2, max_tokens=9)).result()
    (first, again) = (sampler.generate(PROMPTS, params).result() for _ in range(2))
    assert first == again
    sampler._llm.reset_prefix_cache()
    torch.manual_seed(5)
    own = VllmParams(n=4, max_tokens=30, temperature=0.8, top_p=0.95, logprobs=0, skip_special_tokens=False)
    with torch.compiler.set_stance("force_eager"):
        outputs = sampler._llm.generate([{"prompt_token_ids": list(p.token_ids)} for p in PROMPTS], own, use_tqdm=False)
    for group, output in zip(first, outputs, strict=True):
        for completion, right in zip(group.completions, output.outputs, strict=True):
            assert (list(completion.token_ids), completion.text) == (list(right.token_ids), right.text)
            assert list(completion.logprobs) == [
                entry[token].logprob for entry, token in zip(right.logprobs, right.token_ids, strict=True)
            ]


def check_against_computed_anew(sampler, groups):
    """The engine's own log-probs of the same tokens, each sequence read at once."""
    for group in groups:
        asked = [(*group.prompt.token_ids, *completion.token_ids) for completion in group.completions]
        for completion, again in zip(group.completions, sampler.logprobs(asked), strict=True):
            assert completion.logprobs == pytest.approx(again[-len(completion.token_ids) :], abs=1e-4)


def random_prompts(seed, lengths):
    draw = random.Random(seed)
    return [Prompt(str(L), (), token_ids=tuple(draw.choices(range(3, 60), k=L))) for L in lengths]


@pytest.mark.parametrize("lora", [0, 4])
def test_a_prompt_is_computed_once_for_its_group(folder, closing, lora):
    """Whatever its length against a block of the cache; and a copy is as good as what is computed again."""
    _, sampler, sync = make(folder, lora=lora)
    closing(sampler)
    sync()
    scheduler = sampler._llm.llm_engine.engine_core.engine_core.scheduler
    plan, computed = scheduler.schedule, []

    def watched(*args, **kwargs):
        planned = plan(*args, **kwargs)
        computed.append(planned.total_num_scheduled_tokens)
        return planned

    scheduler.schedule = watched
    lengths = (1, 7, 32, 33, 50)
    prompts = random_prompts(0, lengths)
    params = SamplingParams(n=3, max_tokens=4, seed=1)
    groups = sampler.generate(prompts, params).result()
    written = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    # Of the others of a group only the prompt's last token, and of no completion its own last.
    assert sum(computed) == sum(lengths) + (3 - 1) * len(lengths) + written - 3 * len(lengths)
    # More sequences than there is room for at once: the one that computed a prompt may end before others of its group.
    assert scheduler.max_num_running_reqs < 8 * len(lengths)
    groups += sampler.generate(prompts, replace(params, n=8)).result()
    check_against_computed_anew(sampler, groups)


def test_sequences_put_off_for_want_of_cache_are_written_as_well(folder, closing):
    """vLLM takes the blocks of some away and begins them again when there is room."""
    per_token = cache_bytes_per_token(json.loads((folder / "config.json").read_text()), "float32")
    _, sampler, sync = make(folder, kv_cache_memory_bytes=9 * CPU_BLOCK * per_token)
    closing(sampler)
    sync()
    scheduler = sampler._llm.llm_engine.engine_core.engine_core.scheduler
    put_off, preempt = [], scheduler._preempt_request

    def watched(request, *args, **kwargs):
        put_off.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = watched
    groups = sampler.generate(random_prompts(1, (12, 20, 25, 29)), SamplingParams(n=6, max_tokens=24, seed=1)).result()
    assert len(put_off) > 4
    check_against_computed_anew(sampler, groups)


def test_requests_are_in_flight_together(folder, closing):
    """A short one overtakes a long one; log-probs and new weights between them disturb neither. A prefix cache that is
    in use is not taken for an empty one: vLLM answers its reset with False, and keeps it."""
    sampler, reference, base = serve(folder, closing)
    new = perturbed(base, seed=1)
    assert not sampler.pump()
    long = sampler.generate(PROMPTS[:2], SamplingParams(n=3, max_tokens=60, seed=1))
    with pytest.raises(FutureTimeout):
        long.result(timeout=0)
    assert not long.cancel()
    for _ in range(5):
        assert sampler.pump()
    with pytest.raises(RunFailure, match="cannot empty its prefix cache"):
        sampler._forget()
    short = sampler.generate(PROMPTS[1:], SamplingParams(n=2, max_tokens=4, temperature=0.7, seed=1))
    assert [group.prompt for group in short.result(timeout=60)] == PROMPTS[1:]
    assert not long.done()
    ids = PROMPTS[0].token_ids
    assert sampler.logprobs([ids, ids[:9]])[1] == pytest.approx(reference.logprobs(base, ids[:9]), abs=1e-4)
    assert not long.done()
    sampler.load_weights(handle_of(new), 1)
    assert long.done()
    assert not sampler.pump()
    assert off_by(reference, {0: base}, long.result()) < 1e-3
    assert {completion.policy_version for group in long.result() for completion in group.completions} == {0}
    assert sampler.logprobs([ids])[0] == pytest.approx(reference.logprobs(new, ids), abs=1e-4)


def test_weights_swapped_in_flight(folder, closing):
    """What was written stays as it is; what follows is by the new weights alone, which also read all before it."""
    sampler, reference, base = serve(folder, closing, in_flight_updates=True)
    weights = {0: base, 4: perturbed(base, seed=1), 5: perturbed(base, seed=2)}
    first = sampler.generate(PROMPTS, SamplingParams(n=3, max_tokens=60, seed=1))
    for _ in range(10):
        sampler.pump()
    sampler.load_weights(handle_of(weights[4]), 4)
    second = sampler.generate(PROMPTS[:1], SamplingParams(n=3, max_tokens=30, seed=2))  # its beginning was cached
    ids = PROMPTS[1].token_ids
    assert sampler.logprobs([ids])[0] == pytest.approx(reference.logprobs(weights[4], ids), abs=1e-4)
    for _ in range(10):
        sampler.pump()
    assert not first.done()
    assert not second.done()
    sampler.load_weights(handle_of(weights[5]), 5)
    third = sampler.generate(PROMPTS, SamplingParams(max_tokens=3))
    answers = [future.result(timeout=60) for future in (first, second, third)]
    assert max(off_by(reference, weights, groups) for groups in answers) < 1e-3
    seen = [{versions_of(completion) for group in groups for completion in group.completions} for groups in answers]
    assert all(list(versions) == sorted(versions) for kinds in seen for versions in kinds)
    assert any(set(versions) == {0, 4, 5} and versions[:11] == (0,) * 10 + (4,) for versions in seen[0])
    assert any(set(versions) == {4, 5} for versions in seen[1])
    assert {version for versions in seen[2] for version in versions} == {5}
    assert not any(completion.token_versions for group in answers[2] for completion in group.completions)


def test_an_adapter_cannot_be_swapped_in_flight(folder):
    setup = SamplerSetup(str(folder), "float32", 64, 16, adapter=AdapterSpec(4, {}), in_flight_updates=True)
    with pytest.raises(UserError, match=r"sampler\.in_flight_updates=true cannot be had with an adapter"):
        VllmSampler(setup)


def lose_model(worker):
    worker.model_runner.model = None


def test_failures_reach_every_request_in_flight(folder, closing):
    """A transfer cut off half-way, which the next one fixes; a step that fails, which nothing fixes; closing."""
    sampler, reference, base = serve(folder, closing, in_flight_updates=True)
    params = SamplingParams(n=2, max_tokens=30, seed=1)
    ids = PROMPTS[0].token_ids

    class CutOff:
        kind, adapter_config = "full", None

        def open(self):
            yield from list(perturbed(base, seed=1).items())[:5]
            raise ConnectionError("the learner is gone")

    work = sampler.generate(PROMPTS, params), sampler.generate(PROMPTS[:1], params)
    sampler.pump()
    with pytest.raises(RunFailure, match=r"could not load weights of version 7: the learner is gone"):
        sampler.load_weights(CutOff(), 7)
    for future in work:
        assert isinstance(future.exception(timeout=0), RunFailure)
    for call in (lambda: sampler.generate(PROMPTS, params), lambda: sampler.logprobs([ids])):
        with pytest.raises(RunFailure, match="left with a part of the weights of version 7"):
            call()
    new = perturbed(base, seed=2)
    sampler.load_weights(handle_of(new), 8)
    assert off_by(reference, {8: new}, sampler.generate(PROMPTS, params).result(timeout=60)) < 1e-3

    work = sampler.generate(PROMPTS, params), sampler.generate(PROMPTS[:1], params)
    sampler.pump()
    sampler._llm.collective_rpc(lose_model)
    assert not sampler.pump()
    for future in work:
        with pytest.raises(RunFailure, match=r"the vLLM sampler failed while writing: .*NoneType"):
            future.result(timeout=60)
    with pytest.raises(RunFailure, match="failed while writing"):
        sampler.load_weights(handle_of(base), 9)


def test_closing_ends_requests_in_flight(folder, closing):
    sampler, _, _ = serve(folder, closing)
    future = sampler.generate(PROMPTS, SamplingParams(max_tokens=30))
    with pytest.raises(UserError, match="Token id 1000000 is out of vocabulary"):  # and the one before it is taken back
        sampler.generate([PROMPTS[0], Prompt("wrong", (), token_ids=(10**6,))], SamplingParams(max_tokens=5))
    assert len(sampler._open) == len(PROMPTS)
    sampler.pump()
    sampler.close()
    with pytest.raises(RunFailure, match="closed before it had answered"):
        future.result(timeout=60)
    assert not sampler.pump()


@pytest.mark.full
def test_two_devices(folder, closing):
    """Shards in two processes: weights (a tied head too) and seeds reach both, and the death of one is reported."""
    sampler, reference, base = serve(folder, closing, tensor_parallel=2)
    new = perturbed(base, seed=1)
    params = SamplingParams(n=3, max_tokens=20, seed=3)
    for version, tensors in ((0, base), (1, new)):
        if version:
            sampler.load_weights(handle_of(tensors), version)
        first, again = (sampler.generate(PROMPTS, params).result(timeout=120) for _ in range(2))
        assert first == again
        assert off_by(reference, {version: tensors}, first) < 1e-3
    ids = PROMPTS[2].token_ids
    assert sampler.logprobs([ids])[0] == pytest.approx(reference.logprobs(new, ids), abs=1e-4)
    future = sampler.generate(PROMPTS, params)
    sampler.pump()
    workers = [process for process in active_children() if process.name.startswith("VllmWorker")]
    assert len(workers) == 2
    workers[0].kill()
    with pytest.raises(RunFailure, match="one of its worker processes died"):
        future.result(timeout=120)


# -- seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_seeds_of_prompts_are_far_apart(seed):
    """vLLM gives the k-th completion of a prompt the prompt's seed + k; no two completions of a request may share."""
    seeds = sorted(prompt_seed(seed, place) for place in range(256))
    assert seeds == sorted(prompt_seed(seed, place) for place in range(256))
    assert min(seeds) >= 0 and max(seeds) < 2**31
    assert min(b - a for a, b in pairwise(seeds)) > 64


def test_seeds_of_parts_are_all_different():
    """Also from those of the next requests, which count their seeds up by one; a whole request's is its own."""
    assert part_seed(7, 0) == 7
    seeds = [part_seed(seed, offset) for seed in range(1000, 1200) for offset in range(200)]
    assert len(set(seeds)) == len(seeds)
    torch.manual_seed(part_seed(1000, 3))
    drawn = torch.rand(4)
    torch.manual_seed(part_seed(1000, 4))
    assert not torch.equal(drawn, torch.rand(4))


def test_an_engine_that_breaks_at_its_start_is_no_mistake_of_the_users(folder):
    """Its worker is no worker: nothing that vLLM refuses, but something that fails on the way."""
    with pytest.raises(RunFailure, match=r"vLLM cannot start with model .*: TypeError: ") as caught:
        VllmSampler(SamplerSetup(str(folder), "float32", 64, 16), worker_cls="builtins.int")
    assert "\n" not in str(caught.value)


def test_weights_beside_those_that_the_index_names_are_not_served(tmp_path, closing):
    """Under an adapter vLLM reads the base itself, and would take every file of the folder."""
    folder = make_tiny(tmp_path / "two")
    described = adapters.adapter_config(config(model={"name": "unused", "lora_rank": 4}).model, folder).to_dict()
    setup = SamplerSetup(str(folder), "float32", 64, 16, adapter=AdapterSpec(4, described))
    alone = VllmSampler(setup)
    closing(alone)
    right = alone.logprobs([[5, 6, 7, 8]])
    alone.close()
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "older.safetensors")
    beside = VllmSampler(setup)
    closing(beside)
    assert beside.logprobs([[5, 6, 7, 8]]) == right


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_reach_the_engine_under_the_names_of_the_files(tmp_path, closing, family):
    """A layer's experts are one tensor in the learner, many in the files, and packed in the engine: after every sync
    all of them are the learner's."""
    folder = make_tiny(tmp_path, tied=False, family=family)
    learner, sampler, sync = make(folder)
    closing(sampler)
    files = {name for name, _ in FolderWeights(str(folder)).open()}
    assert {name for name, _ in learner.publish_weights().open()} == files
    assert any(".experts.3." in name for name in files)
    assert sync.challenge()["probe_diff"] < 0.001
    before = learner.logprobs([GROUPS[0].prompt.token_ids])
    for _ in range(2):
        assert sync()["probe_diff"] < 0.001
        learner.update(GROUPS)
    assert learner.logprobs([GROUPS[0].prompt.token_ids]) != before
    assert sync()["probe_diff"] < 0.001


def test_experts_that_are_not_packed_again_are_caught(tmp_path, closing, monkeypatch):
    """What vLLM's reload does by itself on a CPU."""
    monkeypatch.setattr("sampler.engine.cpu_patches.pack_experts_again", lambda worker: None)
    _, sampler, sync = make(make_tiny(tmp_path, tied=False, family="qwen3_moe"))
    closing(sampler)
    with pytest.raises(SyncError, match="other weights"):
        sync.challenge()


def test_an_adapter_on_experts_is_refused_on_a_cpu_before_anything_loads(tmp_path):
    folder = make_tiny(tmp_path, family="qwen3_moe")
    setup = SamplerSetup(str(folder), "float32", 64, 16, adapter=AdapterSpec(4, {"target_modules": ["q_proj"]}))
    described = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"no adapter on a mixture of experts.*model\.lora_variant='dora'"):
        engine_arguments(setup, described, untie=False)
    assert engine_arguments(replace(setup, device="gpu"), described, untie=False)["enable_lora"]
    assert engine_arguments(setup, {"model_type": "llama"}, untie=False)["enable_lora"]


def test_the_engine_says_how_many_completions_it_takes_at_once(folder):
    from deploy.components import at_once

    assert VllmSampler.completions_at_once({}) == 256
    assert at_once(config(sampler={"name": "vllm", "options": {"max_num_seqs": 1024}})) == 1024
    assert at_once(config(sampler={"name": "hf"})) == 64
    assert at_once(config(sampler={"name": "hf", "options": {"batch_size": 7}})) == 7
    assert engine_arguments(SamplerSetup(str(folder), "float32", 64, 900), {}, False)["max_num_seqs"] == 900


# -- what the engine stores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "lora"), [("bfloat16", 0), ("bfloat16", 4), ("float32", 0)])
def test_every_fault_behind_the_fingerprint_is_caught_at_that_sync(folder, closing, dtype, lora):
    """From the start and later on, each between two right syncs of a training, which pass."""
    learner, sampler, sync = make(folder, weight_faults.FaultyVllm, lora, dtype, tolerance=0)
    closing(sampler)
    sync.challenge()
    sync()
    for early in (True, False):
        for fault in weight_faults.ADAPTER if lora else weight_faults.FULL:
            learner.update(GROUPS)
            words = weight_faults.caught(sampler, sync, fault, early)
            assert "does not hold what it was sent" in words, (fault, early, words)


def stored_of(worker):
    return worker.stored_weights


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_every_layout_is_followed(tmp_path, closing, family):
    """Transposed with biases, and stacked experts: one load after another, and any tensor that is off is named."""
    folder = make_tiny(tmp_path, family=family)
    base = dict(FolderWeights(str(folder)).open())
    sampler, _, _ = serve(folder, closing)
    for seed in range(3):
        assert sampler.check_weights(sampler.load_weights(handle_of(perturbed(base, seed)), seed)) == []
    (stored,) = sampler._llm.collective_rpc(stored_of)
    loaded = stored._changed
    for name, right in sampler._arrived.sums.items():
        arrived = stored.arriving()
        for sent, tensor in perturbed(base, 2).items():
            arrived.add(sent, tensor * (1.001 if sent == name else 1))
        stored._changed = loaded
        assert name in " ".join(stored.faults(arrived.sums)), name
        assert right != arrived.sums[name]
