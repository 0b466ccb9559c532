"""Adapters of every kind, over a dense base and over one held in 4 bits: what is trained, sent, merged and served; and
a learner that waits on the host while the sampler works."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from common.config import load
from common.device import dtype_of
from common.errors import UserError
from common.types import AdapterSpec, SamplerSetup
from common.weights.handles import FolderWeights, SharedMemoryWeights, fingerprint
from deploy import components
from deploy.colocated import SharedDevice
from learner.model import adapters, for_sampler, loading, nf4, saving
from learner.torch_learner import TorchLearner
from learner.weight_sync import WeightSync, make_probe
from sampler.hf import HfSampler
from sampler.scripted import ScriptedSampler
from tests.making import GROUPS, config
from tests.test_sync import Separate
from tests.tiny import make_tiny

VARIANTS = ["lora", "rslora", "dora"]
IDS = (5, 6, 7, 300, 301, 17, 42, 43, 44, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def spec(cache=None, variant="lora", quantize="off", dtype="float32", more=None, **sections):
    fields = {"name": "unused", "dtype": dtype, "lora_rank": 4, "lora_variant": variant, "quantize": quantize}
    made = config(model=fields | (more or {}), sync={"tolerance": 0.05}, **sections)
    return made if cache is None else made.model_copy(update={"model": at(made.model, cache)})


def at(model, cache):
    return model.model_copy(update={"cache_folder": str(cache)})


def shaken(learner, size=0.05):
    """Every part of the adapter away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in learner._model.named_parameters():
            if p.requires_grad:
                scale = size * float(p.abs().mean()) if "magnitude" in name else size
                p.add_(torch.randn(p.shape, generator=generator) * scale)
    return learner


def plain_logprobs(model):
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    return logits[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:])]


def own(learner):
    return torch.tensor(learner.logprobs([IDS])[0])


@pytest.mark.parametrize("quantize", ["off", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_and_exported_weights_compute_what_the_adapter_does(folder, tmp_path, variant, quantize):
    learner = shaken(TorchLearner(spec(variant=variant, quantize=quantize), folder, "cpu"))
    expected = own(learner)
    with learner._model.disable_adapter():
        assert (own(learner) - expected).abs().mean() > 0.1
    learner.export(tmp_path, merged=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (plain_logprobs(merged) - expected).abs().max() < 1e-4
    assert not hasattr(merged.config, "quantization_config")
    sent = dict(learner.publish_weights(merged=True).open())
    assert sent.keys() == dict(merged.named_parameters()).keys()


def test_the_scale_is_the_variants(folder):
    """rsLoRA, section 3 of arXiv 2312.03732: alpha / sqrt(rank)."""
    for variant, scale in (("lora", 16 / 4), ("rslora", 16 / 2), ("dora", 16 / 4)):
        made = adapters.adapter_config(spec(variant=variant, more={"lora_targets": ["q_proj"]}).model, folder)
        assert (made.use_rslora, made.use_dora) == (variant == "rslora", variant == "dora")
        layer = TorchLearner(spec(variant=variant), folder, "cpu")._model.get_submodule(
            "base_model.model.model.layers.0.mlp.up_proj"
        )
        assert layer.scaling["default"] == scale


@pytest.mark.parametrize(
    ("quantize", "variant"), [("off", "rslora"), ("off", "dora"), ("nf4", "lora"), ("nf4", "dora")]
)
def test_a_sync_is_proved_and_the_challenge_reaches_every_part(folder, cache, variant, quantize):
    made = spec(cache, variant, quantize)
    learner = TorchLearner(made, folder, "cpu")
    before = own(learner)
    base = for_sampler.sampler_base(folder, made.model, "vllm", "cpu")
    adapter = None
    if adapters.sends_adapter(made.model):
        adapter = AdapterSpec(4, adapters.adapter_config(made.model, folder).to_dict())
    setup = SamplerSetup(dtype="float32", max_model_tokens=64, max_sequences=8, adapter=adapter, **base)
    sampler = ScriptedSampler(setup)
    probe = make_probe([group.prompt for group in GROUPS], 32, 32)
    sync = WeightSync(learner, sampler, Separate(), probe, made.sync, 60)
    with learner.perturbed(seed=7):
        assert (own(learner) - before).abs().mean() > 0.2
    assert torch.equal(own(learner), before)
    assert learner.publish_weights().kind == ("full" if variant == "dora" else "adapter")
    assert sync.challenge()["probe_diff"] < 1e-4
    for _ in range(2):
        assert sync()["probe_diff"] < 1e-4
        learner.update(GROUPS)
    assert not torch.equal(own(learner), before)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_acts_in_the_training_pass_alone(folder, variant):
    """Outside it the adapter computes what the sampler computes, before the first step too; inside, checkpointing draws
    the same again."""
    more = {"lora_dropout": 0.4}
    made = spec(variant=variant, more=more)
    learner = TorchLearner(made, folder, "cpu")
    adapter = None
    if adapters.sends_adapter(made.model):
        adapter = AdapterSpec(4, adapters.adapter_config(made.model, folder).to_dict())
    setup = SamplerSetup(
        model_folder=str(folder), dtype="float32", max_model_tokens=64, max_sequences=8, adapter=adapter
    )
    probe = make_probe([group.prompt for group in GROUPS], 32, 32)
    sync = WeightSync(learner, ScriptedSampler(setup), Separate(), probe, made.sync, 60)
    assert sync.challenge()["probe_diff"] < 1e-4
    assert sync()["probe_diff"] < 1e-4
    shaken(learner)
    plain = shaken(TorchLearner(spec(variant=variant), folder, "cpu"))
    assert torch.equal(own(learner), own(plain))
    again = shaken(
        TorchLearner(spec(variant=variant, more=more, learner={"gradient_checkpointing": True}), folder, "cpu")
    )
    losses = [one.update(GROUPS)["grad_norm"] for one in (learner, plain, again)]
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert sync()["probe_diff"] < 1e-4
    assert torch.equal(own(learner), own(learner))


def test_gradients_over_4_bits_are_those_over_the_dequantized_base(folder, cache):
    """Also after passes without gradient, where bitsandbytes would repack its layers for inference. In bfloat16, which
    is itself some percent off on these wild weights, no further from float32 than over a dense base."""

    def gradient(quantize, dtype, place):
        learner = shaken(TorchLearner(spec(cache, quantize=quantize, dtype=dtype), place, "cpu"))
        own(learner)
        logprobs = learner._model(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
        logprobs[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:])].sum().backward()
        return {n: p.grad for n, p in learner._model.named_parameters() if p.requires_grad}

    off = {}
    for dtype in ("float32", "bfloat16"):
        place = for_sampler.dequantized(folder, spec(cache, quantize="nf4", dtype=dtype).model, "cpu")
        truth = gradient("off", "float32", place)
        assert len(truth) == 2 * 7 * 2
        for quantize, found in (("nf4", gradient("nf4", dtype, folder)), ("off", gradient("off", dtype, place))):
            assert found.keys() == truth.keys()
            each = [(found[name] - grad).norm() / grad.norm() for name, grad in truth.items()]
            off[quantize, dtype] = float(torch.stack(each).mean())
    assert off["nf4", "float32"] < 1e-4
    assert off["nf4", "bfloat16"] < 1.5 * off["off", "bfloat16"] < 0.1, off


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dequantized_folder_is_the_learners_base_to_the_bit(folder, cache, dtype):
    made = spec(cache, quantize="nf4", dtype=dtype).model
    place = for_sampler.dequantized(folder, made, "cpu")
    written = (place / "model.safetensors").stat().st_mtime_ns
    assert for_sampler.dequantized(folder, made, "cpu") == place
    assert (place / "model.safetensors").stat().st_mtime_ns == written
    dense = AutoModelForCausalLM.from_pretrained(place, dtype=dtype_of(dtype))
    held, base = loading.load(folder, made, "cpu"), AutoModelForCausalLM.from_pretrained(folder)
    changed = set()
    for name, value in saving.full_tensors(held, dtype_of(dtype)):
        assert torch.equal(value, dense.get_parameter(name)), name
        if not torch.equal(value, base.get_parameter(name).to(value.dtype)):
            changed.add(name.split(".")[-2])
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (place / "tokenizer.json").exists()
    # Made again from dequantized weights the codes differ: both sides must start from the original.
    again = dict(saving.full_tensors(loading.load(place, made, "cpu"), dtype_of(dtype)))
    if dtype == "bfloat16":
        assert any(not torch.equal(again[name], value) for name, value in dense.named_parameters())
    assert for_sampler.sampler_base(folder, made, "vllm", "cpu") == {"model_folder": str(place), "quantize": "off"}
    assert for_sampler.sampler_base(folder, made, "vllm", "gpu") == {"model_folder": str(folder), "quantize": "nf4"}


def test_shapes_alone_say_what_4_bits_take(folder):
    made = spec(quantize="nf4").model
    held, blank = loading.load(folder, made, "cpu"), loading.load(folder, made, "meta", blank=True)

    def sizes(model):
        return {n: (p.shape, p.dtype) for n, p in model.named_parameters()}, sum(t.nbytes for t in nf4.stored(model))

    assert sizes(held) == sizes(blank)
    total = sum(nf4.weights_in(p) for p in held.parameters())
    assert total == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_the_reference_under_4_bits_is_the_rounded_base(folder, cache):
    sections = {"learner": {"kl_coef": 0.5}}
    made = spec(cache, quantize="nf4", **sections)
    learner = TorchLearner(made, folder, "cpu")
    dense = AutoModelForCausalLM.from_pretrained(for_sampler.dequantized(folder, made.model, "cpu"))
    assert learner.update(GROUPS)["kl"] == pytest.approx(0, abs=1e-6)
    assert learner.update(GROUPS)["kl"] > 1e-6
    with learner._model.disable_adapter():
        assert (own(learner) - plain_logprobs(dense)).abs().max() < 1e-5


@pytest.mark.parametrize(("variant", "quantize"), [("rslora", "nf4"), ("dora", "off")])
def test_a_restored_adapter_goes_on_bit_for_bit(folder, tmp_path, variant, quantize):
    made = spec(variant=variant, quantize=quantize, optimizer={"name": "adamw_8bit"})
    learner = TorchLearner(made, folder, "cpu")
    learner.update(GROUPS)
    learner.save(tmp_path)
    learner.update(GROUPS)
    again = TorchLearner(made, folder, "cpu")
    again.restore(tmp_path)
    again.update(GROUPS)
    assert torch.equal(own(learner), own(again))
    other = TorchLearner(spec(variant=variant, quantize=quantize, optimizer={"name": "adafactor"}), folder, "cpu")
    with pytest.raises(UserError, match="another optimizer"):
        other.restore(tmp_path)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([r".*layers\.1\.mlp\.(up|down)_proj"], {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}),
    ],
)
def test_targets_by_name_or_by_pattern(folder, targets, expected):
    made = spec(more={"lora_targets": targets, "lora_rank": 3})
    assert set(adapters.adapter_config(made.model, folder).target_modules) == expected
    learner = TorchLearner(made, folder, "cpu")
    trained = {n for n, p in learner._model.named_parameters() if p.requires_grad}
    assert trained
    for name in trained:
        assert any(f"{one}.lora_" in name for one in expected), name
        assert 3 in learner._model.get_parameter(name).shape


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["nope"], r"is no module of this model; its linear layers are down_proj"),
        (["q_proj", "lm_head"], r"takes in 'lm_head', but adapters on the embeddings or the output head \(which are"),
        (["embed_tokens"], r"takes in 'model\.embed_tokens'"),
        ([r".*(head|q_proj)"], r"takes in 'lm_head'"),
        (["(q_proj"], r"is not a regular expression"),
    ],
)
def test_wrong_targets_are_one_sentence(folder, targets, said):
    with pytest.raises(UserError, match=rf"model\.lora_targets=.*{said}"):
        TorchLearner(spec(more={"lora_targets": targets}), folder, "cpu")


def test_4_bits_cannot_be_divided_among_ranks():
    with pytest.raises(UserError, match=r"model\.quantize='nf4' cannot be divided among cluster\.learner_ranks=2"):
        load(None, [
            "model.name=unused", "model.lora_rank=4", "model.quantize=nf4", "cluster.mode=ray",
            "cluster.learner_ranks=2", "learner.compile=off", "task.name=warmup",
        ])  # fmt: skip


# -- on the host while the sampler works -------------------------------------------------------------------------------


class Watched:
    """A sampler that writes down in which order the two sides give up and take memory."""

    def __init__(self, learner, calls):
        self._learner, self._calls = learner, calls

    def sleep(self):
        self._calls.append("sampler sleeps")

    def wake(self, part):
        held = "nothing" if self._learner._weights.away else "all"
        held = "weights" if self._learner._averages.away and held == "all" else held
        self._calls.append(f"sampler wakes {part}, learner holds {held}")


@pytest.mark.parametrize(("lora", "quantize"), [(0, "off"), (4, "nf4")])
def test_a_learner_that_slept_learns_the_same(folder, tmp_path, lora, quantize):
    fields = {"name": "unused", "dtype": "bfloat16", "quantize": quantize, "lora_rank": lora}
    optimizer = {"name": "adamw_8bit"}
    steady = TorchLearner(config(model=fields, optimizer=optimizer), folder, "cpu")
    learner = TorchLearner(
        config(model=fields, optimizer=optimizer, memory={"offload_while_sampling": True}), folder, "cpu"
    )
    calls = []
    placement = SharedDevice(Watched(learner, calls), learner)
    for _ in range(2):
        with placement.sampling():
            tensors = [*nf4.stored(learner._model), *learner._optimizer.state().values()]
            assert sum(t.untyped_storage().size() for t in tensors) == 0
        with placement.learning():
            learner.update(GROUPS)
        with placement.syncing():
            assert learner._averages.away and not learner._weights.away
            sent = {name: t.clone() for name, t in learner.publish_weights().open()}
        steady.update(GROUPS)
        for name, tensor in steady.publish_weights().open():
            assert torch.equal(tensor, sent[name]), name
    assert calls == 2 * [
        "sampler wakes all, learner holds nothing", "sampler sleeps", "sampler wakes weights, learner holds weights",
        "sampler wakes cache, learner holds weights",
    ]  # fmt: skip
    learner.sleep()
    (tmp_path / "slept").mkdir()
    (tmp_path / "steady").mkdir()
    learner.save(tmp_path / "slept")  # from the host
    steady.save(tmp_path / "steady")
    files = [(tmp_path / name / "state.safetensors").read_bytes() for name in ("slept", "steady")]
    assert files[0] == files[1]
    assert learner._weights.away
    learner.export(tmp_path / "model")  # and this brings the weights back
    assert not learner._weights.away


def test_on_a_cpu_there_is_nowhere_to_wait():
    made = config(memory={"offload_while_sampling": True}, train={"device": "cpu"})
    with pytest.raises(UserError, match=r"memory\.offload_while_sampling=true has no effect on a CPU"):
        components.prepare(made)


# -- real vLLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.parametrize(("variant", "quantize"), [("rslora", "off"), ("lora", "nf4"), ("dora", "nf4")])
def test_vllm_computes_what_the_learner_computes(folder, cache, variant, quantize):
    from sampler.engine.vllm import VllmSampler

    made = spec(cache, variant, quantize)
    learner = TorchLearner(made, folder, "cpu")
    adapter = None
    if adapters.sends_adapter(made.model):
        adapter = AdapterSpec(4, adapters.adapter_config(made.model, folder).to_dict())
    base = for_sampler.sampler_base(folder, made.model, "vllm", "cpu")
    setup = SamplerSetup(dtype="float32", max_model_tokens=64, max_sequences=16, adapter=adapter, **base)
    sampler = VllmSampler(setup)
    try:
        probe = make_probe([group.prompt for group in GROUPS], 32, 32)
        sync = WeightSync(learner, sampler, Separate(), probe, made.sync, 60)
        assert sync.challenge()["probe_diff"] < 0.01
        for _ in range(2):
            assert sync()["probe_diff"] < 0.01  # as under LoRA over a dense base (tests/test_vllm.py)
            learner.update(GROUPS)
    finally:
        sampler.close()
        gc.collect()


MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "jamba", "gpt_neox")
"""Families that transformers holds under other names than their files, one of each kind."""


@pytest.mark.parametrize("family", MOE)
def test_what_is_sent_and_exported_is_what_the_files_hold(tmp_path, family):
    """Bit for bit and name by name: experts apart, buffers that belong to a model (a router's bias) among them. A
    sampler that holds the model as the learner does takes it back."""
    folder = make_tiny(tmp_path / "model", tied=False, family=family)
    files = dict(FolderWeights(str(folder)).open())
    learner = TorchLearner(config(), folder, "cpu")
    offer = learner.publish_weights()
    same(dict(offer.open()), files)
    shared = SharedMemoryWeights.write(offer.open(), "full", bucket_bytes=5000, place=tmp_path)
    same(dict(shared.open()), files)
    assert shared.sent() == offer.sent()
    learner.export(tmp_path / "final")
    same(dict(FolderWeights(str(tmp_path / "final")).open()), files)
    sampler = HfSampler(SamplerSetup(str(folder), "float32", 64, 8))
    expected = sampler.logprobs([IDS])
    with learner.perturbed(seed=1):
        sampler.load_weights(offer, 1)
        moved = torch.tensor(sampler.logprobs([IDS])[0])
        assert torch.allclose(moved, own(learner), atol=1e-4)
    assert (moved - torch.tensor(expected[0])).abs().mean() > 0.05
    assert sampler.load_weights(FolderWeights(str(folder)), 2) == fingerprint(files.items())
    assert sampler.logprobs([IDS]) == expected


def same(found, files):
    assert found.keys() == files.keys()
    for name, tensor in files.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_experts_by_hand(tmp_path):
    """Mixtral's files as they were published: w1 gates, w3 goes up, w2 comes down, an expert each."""
    folder = make_tiny(tmp_path, tied=False, family="mixtral")
    learner = TorchLearner(config(), folder, "cpu")
    sent, experts = dict(learner.publish_weights().open()), learner._model.model.layers[1].mlp.experts
    for number in range(4):
        gate, up = experts.gate_up_proj[number].chunk(2)
        for name, weight in (("w1", gate), ("w3", up), ("w2", experts.down_proj[number])):
            assert torch.equal(sent[f"model.layers.1.block_sparse_moe.experts.{number}.{name}.weight"], weight)


def halves(operation):
    """As if the files held both halves of an MLP in one tensor."""
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    return [WeightConverter("mlp.gate_up_proj.weight", parts, operations=[operation])]


def test_weights_that_share_a_tensor_of_the_files_wait_for_each_other(folder):
    model = loading.load(folder, config().model, "cpu")
    held = dict(model.named_parameters())
    model._weight_conversions = halves(Chunk(dim=0))
    sent = list(saving.full_tensors(model, torch.float32))
    assert len(sent) == len(held) - 2  # one less in each of two layers
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        both = torch.cat([held[f"{mlp}.gate_proj.weight"], held[f"{mlp}.up_proj.weight"]])
        assert torch.equal(dict(sent)[f"{mlp}.gate_up_proj.weight"], both)


def test_a_model_that_cannot_be_turned_back_is_refused(folder):
    class OneWay(Chunk):
        @property
        def reverse_op(self):
            raise NotImplementedError("no way back")

    model = loading.load(folder, config().model, "cpu", blank=True)
    saving.check_names(model)
    model._weight_conversions = halves(OneWay(dim=0))
    with pytest.raises(UserError, match=r"'llama' model.*\(no way back\)"):
        saving.check_names(model)


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
SHARED = {"shared_expert_gate", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "reached"),
    # The last has dense layers and shared experts too, of whose names peft makes something else than adapters on them.
    [("qwen3_moe", ATTENTION), ("qwen2_moe", ATTENTION | SHARED), ("glm4_moe", ATTENTION)],
)
def test_all_linear_and_nf4_say_what_they_leave_out(tmp_path, cache, family, reached, caplog):
    folder = make_tiny(tmp_path, family=family)
    made = spec(cache, quantize="nf4")
    learner = TorchLearner(made, folder, "cpu")
    lora, nf4 = (record.message for record in caplog.records if "of the weights in the layers" in record.message)
    assert lora.startswith("model.lora_targets=['all-linear']")
    assert nf4.startswith("model.quantize='nf4'")
    for said in (lora, nf4):
        assert "mlp.experts.gate_up_proj, mlp.experts.down_proj" in said
        assert "self_attn" not in said
    adapted = {n.split(".lora_")[0].split(".")[-1] for n, p in learner._model.named_parameters() if p.requires_grad}
    assert adapted == reached
    # vLLM would round the experts too, so it is given the learner's numbers, whatever the device.
    assert for_sampler.sampler_quantize(folder, made.model, "vllm", "gpu") == "off"
    if "gate_proj" not in reached:
        with pytest.raises(UserError, match=r"names gate_proj, but this model's experts are held as one tensor"):
            adapters.adapter_config(spec(more={"lora_targets": ["q_proj", "gate_proj"]}).model, folder)


def test_a_dense_model_leaves_nothing_out(folder, cache, caplog):
    made = spec(cache, quantize="nf4")
    TorchLearner(made, folder, "cpu")
    assert not [record for record in caplog.records if "of the weights in the layers" in record.message]
    assert for_sampler.sampler_quantize(folder, made.model, "vllm", "gpu") == "nf4"
