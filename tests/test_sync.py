"""The proof after every sync: a sampler that does not hold the learner's weights is caught, whichever way it fails."""

import contextlib
import math

import pytest

from common.types import AdapterSpec, Prompt, SamplerSetup
from learner.model import adapters
from learner.torch_learner import TorchLearner
from learner.weight_sync import SyncError, WeightSync, beginning_of, make_probe, weighted_difference
from sampler.hf import HfSampler
from sampler.scripted import ScriptedSampler
from tests.making import GROUPS, config
from tests.tiny import make_tiny


class Separate:
    """Each side has its own device: nobody sleeps."""

    def syncing(self):
        return contextlib.nullcontext()

    sampling = learning = syncing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tied"), tied=True)


def make(folder, fault, lora=0, lr=1e-3, **sync):
    spec = config(
        model={"name": "unused", "dtype": "float32", "lora_rank": lora}, optimizer={"lr": lr},
        sync={"tolerance": 0.05, **sync},
    )  # fmt: skip
    learner = TorchLearner(spec, folder, "cpu")
    adapter = None
    if lora:
        adapter = AdapterSpec(lora, adapters.adapter_config(spec.model, folder).to_dict())
    setup = SamplerSetup(str(folder), "float32", 64, 8, adapter=adapter)
    sampler = ScriptedSampler(setup, fault=fault)
    probe = make_probe([group.prompt for group in GROUPS], 32, 32)
    return learner, sampler, WeightSync(learner, sampler, Separate(), probe, spec.sync, 60)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_faithful_sampler_passes_step_after_step(folder, lora):
    learner, _, sync = make(folder, None, lora)
    assert sync.challenge()["probe_diff"] < 1e-4
    for _ in range(3):
        metrics = sync()
        assert metrics["probe_diff"] < 1e-4
        assert metrics["sync_bytes"] > 0
        assert metrics["seconds_sync"] > 0
        assert metrics["seconds_proof"] > 0
        learner.update(GROUPS)


@pytest.mark.parametrize(
    ("fault", "lora", "said"),
    [
        ("stale", 0, "other weights"),
        ("stale", 4, "other weights"),
        ("stale_head", 0, "other weights"),
        ("ignore_adapter", 4, "other weights"),
        ("corrupt", 0, "did not receive"),
        ("corrupt", 4, "did not receive"),
    ],
)
def test_the_challenge_catches(folder, fault, lora, said):
    _, _, sync = make(folder, fault, lora)
    with pytest.raises(SyncError, match=said):
        sync.challenge()


@pytest.mark.parametrize(("fault", "lora"), [("stale", 0), ("stale", 4), ("ignore_adapter", 4)])
def test_one_small_step_is_caught_without_the_challenge(folder, fault, lora):
    """The step moves the log-probs by less than the tolerance; that the sampler's did not move at all tells."""
    learner, _, sync = make(folder, fault, lora, lr=2e-4 if lora else 1e-4, challenge=False)
    assert sync.challenge() == {}
    sync()
    learner.update(GROUPS)
    learner.update(GROUPS)
    with pytest.raises(SyncError, match="bit for bit"):
        sync()


def test_an_old_head_is_caught_by_the_tolerance_once_training_has_moved_it(folder):
    learner, _, sync = make(folder, "stale_head", lr=0.02, challenge=False)
    sync()
    learner.update(GROUPS)
    with pytest.raises(SyncError, match="differ by"):
        sync()


LONG_PROBE = [tuple(range(first, first + 40)) for first in (20, 80, 140)]


@pytest.mark.parametrize("fault", [None, "stale"])
def test_the_whole_probe_is_asked_first_and_its_beginning_at_each_step(folder, fault):
    """The stale sampler is found out by the short probe too, whose old answer the first sync has taken down."""
    learner, sampler, sync = make(folder, fault, lr=1e-4, challenge=fault is None)
    sync = WeightSync(learner, sampler, Separate(), LONG_PROBE, sync._config, 60)

    def asked():
        return [call[1] for call in sampler.calls if call[0] == "logprobs"]

    sync.challenge()
    sync()
    assert asked() == [1, 3] * (1 if fault else 2)
    learner.update(GROUPS)
    learner.update(GROUPS)
    if fault:
        with pytest.raises(SyncError, match="bit for bit"):
            sync()
    else:
        assert sync()["probe_diff"] < 1e-4
    assert asked()[-2:] == [3, 1]  # that of the first sync, and this


@pytest.mark.parametrize("wrong", [10, 120])
def test_the_whole_probe_decides_where_its_beginning_disagrees(folder, wrong):
    """A few tokens far off are rounding's doing; all of them are not."""
    learner, sampler, sync = make(folder, None)
    sync = WeightSync(learner, sampler, Separate(), LONG_PROBE, sync._config, 60)
    sync.challenge()
    sync()
    learner.update(GROUPS)
    truly = sampler.logprobs

    def off(sequences):
        left, answers = wrong, []
        for row in truly(sequences):
            answers.append([value + 0.3 * (place < left) for place, value in enumerate(row)])
            left -= len(row)
        return answers

    sampler.logprobs = off
    if wrong == 10:  # of 117, and counted by its probability
        assert 0.3 * 10 / 117 < sync()["probe_diff"] < 0.045
    else:
        with pytest.raises(SyncError, match="other weights"):
            sync()
    assert [call[1] for call in sampler.calls if call[0] == "logprobs"][-2:] == [1, 3]


def test_tokens_that_nobody_draws_count_a_tenth():
    likely, unlikely = math.log(0.4), math.log(1e-6)
    assert weighted_difference([likely, unlikely], [likely, unlikely + 1]) == pytest.approx(0.1 / 0.5)
    assert weighted_difference([likely, unlikely], [likely - 1, unlikely]) == pytest.approx(0.4 / 0.5)
    # Likely on either side is likely: the sampler's answer is worth as much as the learner's.
    assert weighted_difference([unlikely, likely], [likely, likely]) == pytest.approx((likely - unlikely) / 2)
    assert weighted_difference([unlikely] * 9, [unlikely - 2] * 9) == pytest.approx(2)  # none likely: a plain mean
    for bad in (math.nan, -math.inf):
        assert not weighted_difference([likely, likely], [likely, bad]) < 1e9


def test_the_beginning_of_a_probe():
    assert beginning_of(LONG_PROBE, 64) == [LONG_PROBE[0], LONG_PROBE[1][:24]]
    assert beginning_of(LONG_PROBE, 41) == LONG_PROBE[:1]  # a single token has no log-prob
    assert beginning_of(LONG_PROBE, 500) == LONG_PROBE


def test_proof_off_checks_nothing_and_says_nothing(folder):
    learner, sampler, sync = make(folder, "stale")
    off = WeightSync(learner, sampler, Separate(), sync._probe, config(sync={"proof": False}).sync, 60)
    assert off.challenge() == {}
    assert off().keys() == {"seconds_sync", "sync_bytes", "sync_transport"}


def test_a_sampler_that_takes_no_adapters_gets_merged_weights(folder):
    learner, _, sync = make(folder, None, lora=4)
    plain = ScriptedSampler(SamplerSetup(str(folder), "float32", 64, 8))
    plain.takes_adapters = False
    merged = WeightSync(learner, plain, Separate(), sync._probe, sync._config, 60)
    assert merged.challenge()["probe_diff"] < 1e-3
    assert merged()["probe_diff"] < 1e-3


def test_probe_is_real_text_of_the_asked_length():
    prompts = [Prompt(str(n), (), token_ids=tuple(range(n))) for n in (1, 5, 30)]
    assert make_probe(prompts, 12, 10) == [tuple(range(5)), tuple(range(7))]


# -- what the sampler stores -------------------------------------------------------------------------------------------


class Partial(HfSampler):
    """Does to ``tensors`` what ``fault`` does, after their fingerprint was taken, and to the adapter's scaling."""

    fault = staticmethod(lambda tensors: tensors)
    factor = 1.0

    def _load_full(self, tensors):
        super()._load_full(self.fault(tensors))

    def _load_adapter(self, tensors, config):
        super()._load_adapter(self.fault(tensors), config)
        for layer in self._adapted.modules():
            if isinstance(getattr(layer, "scaling", None), dict):  # an attention layer's is a number
                layer.scaling["default"] *= self.factor


def old(part, held):
    return lambda tensors: ((n, held[n] if part in n else t) for n, t in tensors)


def scaled(part, factor):
    return lambda tensors: ((n, t * factor if part in n else t) for n, t in tensors)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_part_that_is_not_taken_is_caught_at_that_sync(folder, lora):
    learner, scripted, sync = make(folder, None, lora, lr=1e-5)
    sampler = Partial(scripted.setup)
    sync = WeightSync(learner, sampler, Separate(), sync._probe, sync._config, 60)
    sync.challenge()
    learner.update(GROUPS)  # an adapter's A moves only once its B is not zero
    parts = ["q_proj.lora_A", "layers.1."] if lora else ["layers.1.input_layernorm", "embed_tokens", ".mlp.", ""]
    faults = [(part, scaled(part, 1.001)) for part in (["lora_B"] if lora else ["o_proj", "norm"])]
    for part, fault in [(part, None) for part in parts] + faults:
        held = {name: tensor.clone() for name, tensor in learner.publish_weights().open()}
        sync()
        learner.update(GROUPS)
        sampler.fault = fault or old(part, held)
        with pytest.raises(SyncError, match=f"does not hold what it was sent.*{part}"):
            sync()
        sampler.fault = scaled("", 1)
        sync()
    if lora:
        sampler.factor = 1.1
        with pytest.raises(SyncError, match=r"multiplied by .* and not by"):
            sync()


def test_the_tolerance_goes_by_the_number_format(folder):
    """0.01 nats is rounding in bfloat16 and a fault in float32, unless sync.tolerance says so."""
    learner, sampler, sync = make(folder, None)
    truly = sampler.logprobs
    sampler.logprobs = lambda sequences: [[value + 0.01 for value in row] for row in truly(sequences)]
    for dtype, tolerance, passes in (("bfloat16", 0, True), ("float32", 0, False), ("float32", 0.05, True)):
        spec = config(sync={"tolerance": tolerance, "challenge": False}).sync
        again = WeightSync(learner, sampler, Separate(), sync._probe, spec, 60, dtype)
        if passes:
            assert again()["probe_diff"] == pytest.approx(0.01, abs=1e-3)
        else:
            with pytest.raises(SyncError, match=r"more than 0\.005 \(sync\.tolerance"):
                again()
    # Noise on the weights makes rounding show more.
    sampler.logprobs = lambda sequences: [[value + 0.007 for value in row] for row in truly(sequences)]
    again = WeightSync(learner, sampler, Separate(), sync._probe, config().sync, 60, "float32")
    again.challenge()
    with pytest.raises(SyncError, match=r"more than 0\.005"):
        again()
