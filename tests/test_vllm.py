"""Real vLLM: the whole path of the weights, and the defects of that path that the proof must catch."""

import gc

import pytest

from common.errors import UserError
from common.types import AdapterSpec, Prompt, SamplerSetup, SamplingParams
from learner import model as models
from learner.learner import TorchLearner
from learner.sync import SyncError, WeightSync, probe_of
from tests.making import GROUPS, config
from tests.test_sync import Separate
from tests.tiny import make_tiny

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tied"), tied=True)


def make(folder, kind=None, lora=0, **options):
    from sampler.vllm import VllmSampler

    spec = config(model={"name": "unused", "dtype": "float32", "lora_rank": lora}, sync={"tolerance": 0.02})
    learner = TorchLearner(spec, folder, "cpu")
    adapter = AdapterSpec(lora, models.adapter_config(spec.model, folder).to_dict()) if lora else None
    sampler = (kind or VllmSampler)(SamplerSetup(str(folder), "float32", 64, 16, adapter=adapter), **options)
    probe = probe_of([group.prompt for group in GROUPS], 32, 32)
    return learner, sampler, WeightSync(learner, sampler, Separate(), probe, spec.sync, 60)


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
    assert {one.policy_version for one in answer.completions} == {1}


def test_a_tied_head_that_keeps_its_old_weights_is_caught(folder, closing):
    """What vLLM's reload does to a tied output head when it is not untied: everything new but the head."""
    from sampler.vllm import VllmSampler

    class Tied(VllmSampler):
        def _must_untie(self):
            return False

    _, sampler, sync = make(folder, Tied)
    closing(sampler)
    with pytest.raises(SyncError, match="other weights"):
        sync.challenge()


def test_an_adapter_served_from_the_cache_is_caught(folder, closing):
    """vLLM keeps adapters by id: a new one under an old id is not looked at."""
    from sampler.vllm import VllmSampler

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
        ({"block_size": 7}, "cannot start"),
    ],
)
def test_wrong_options_are_one_sentence(folder, options, said):
    from sampler.vllm import VllmSampler

    with pytest.raises(UserError, match=said) as caught:
        VllmSampler(SamplerSetup(str(folder), "float32", 64, 16), **options)
    assert "\n" not in str(caught.value)
