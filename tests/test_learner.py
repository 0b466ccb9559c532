"""The learner: the same gradient however the batch is cut, float32 master weights, no step that is not finite."""

import copy
import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common import device
from common.errors import RunFailure, UserError
from common.weights.handles import FolderWeights, fingerprint
from learner.loss import losses
from learner.model import loading
from learner.optimizer import MasterOptimizer
from learner.torch_learner import TorchLearner
from tests.making import GROUPS, config, group
from tests.test_families import MOVING
from tests.tiny import make_model, make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def weights(learner):
    return {name: p.detach().clone() for name, p in learner._model.named_parameters()}


def stepped(folder, groups=GROUPS, steps=1, **sections):
    learner = TorchLearner(config(**sections), folder, "cpu")
    for _ in range(steps):
        metrics = learner.update(groups)
    return weights(learner), metrics, learner


def difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


SPECS = [
    {},
    {"loss": "grpo", "importance_level": "sequence"},
    {"loss": "dr_grpo", "kl_coef": 0.1, "inner_updates": 2},
    {"loss": "dapo", "ratio": "sequence", "inner_updates": 2, "delta": 1.5},
    {"loss": "cispo", "clip_high": 4.0, "entropy_coef": 0.01},
    {"loss": "sapo", "importance": "mask", "inner_updates": 3},
    {"truncated": "mask", "delta": 3.0, "inner_updates": 2},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: " ".join(f"{k}={v}" for k, v in spec.items()) or "default")
def test_micro_batches_and_packing_change_nothing(folder, spec):
    """One big padded pass is the truth; packs and micro-batches of any size step to the same weights."""
    sgd_like = {"optimizer": {"lr": 1e-3, "eps": 1.0}}  # a large eps: AdamW then keeps the gradient's size
    groups = [*GROUPS, group(6, [8, 8], seed=4, finish="length")]
    whole, metrics, _ = stepped(
        folder, groups, **sgd_like, learner={**spec, "packing": "padded", "microbatch_tokens": 10**6}
    )
    assert metrics["packed"] == 0
    moved = difference(whole, weights(TorchLearner(config(), folder, "cpu")))
    for packing, budget in (("packed", 10**6), ("packed", 30), ("padded", 40)):
        cut, cut_metrics, _ = stepped(
            folder, groups, **sgd_like, learner={**spec, "packing": packing, "microbatch_tokens": budget}
        )
        assert difference(whole, cut) < 1e-3 * moved, (packing, budget)
        for key in ("loss", "grad_norm", "entropy", "logprob_diff_mean"):
            assert cut_metrics[key] == pytest.approx(metrics[key], rel=1e-3, abs=1e-6), key


def test_gradient_is_the_papers(folder):
    """On policy, without corrections: the gradient of -sum(advantage x log-prob) / tokens, by a plain forward."""
    learner = TorchLearner(
        config(learner={"importance": "off"}, optimizer={"lr": 1e-3, "max_grad_norm": 0}), folder, "cpu"
    )
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = sum(len(c.token_ids) for g in GROUPS for c in g.completions)
    total = torch.tensor(0.0)
    for g in GROUPS:
        for c in g.completions:
            logits = truth(torch.tensor([g.prompt.token_ids + c.token_ids])).logits[0].log_softmax(-1)
            for t, token in enumerate(c.token_ids):
                total = total - c.advantage * logits[len(g.prompt.token_ids) + t - 1, token] / tokens
    total.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in truth.parameters())).item()
    assert learner.update(GROUPS)["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_rewarded_completion_becomes_likelier_and_a_punished_one_less(folder):
    (one,) = [group(7, [5, 5], seed=9)]
    good, bad = (dataclasses.replace(c, advantage=a) for c, a in zip(one.completions, (1.0, -1.0), strict=True))
    one = dataclasses.replace(one, completions=(good, bad))
    learner = TorchLearner(config(learner={"importance": "off"}), folder, "cpu")
    asked = [one.prompt.token_ids + c.token_ids for c in one.completions]

    def likelihoods():
        return [sum(row[len(one.prompt.token_ids) - 1 :]) for row in learner.logprobs(asked)]

    before = likelihoods()
    learner.update([one])
    after = likelihoods()
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_masked_truncated_completions_leave_no_trace(folder):
    finished = GROUPS[0]
    cut = [dataclasses.replace(c, token_ids=c.token_ids, finish_reason="length") for c in GROUPS[1].completions]
    mixed = dataclasses.replace(finished, completions=finished.completions + tuple(cut))
    only = stepped(folder, [finished], learner={"truncated": "mask"})[0]
    both = stepped(folder, [mixed], learner={"truncated": "mask"})[0]
    assert difference(only, both) < 1e-6
    assert difference(only, stepped(folder, [mixed])[0]) > 1e-5


def test_nothing_that_counts_is_no_step(folder):
    learner = TorchLearner(config(), folder, "cpu")
    before = weights(learner)
    assert learner.update([]) == {}
    assert learner.version == 1
    assert difference(before, weights(learner)) == 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_not_finite_stops_before_the_step(folder, wrong):
    learner = TorchLearner(config(), folder, "cpu")
    before = weights(learner)
    bad = dataclasses.replace(
        GROUPS[0], completions=tuple(dataclasses.replace(c, advantage=wrong) for c in GROUPS[0].completions)
    )
    with pytest.raises(RunFailure, match="before step 1"):
        learner.update([bad])
    assert learner.version == 0
    assert difference(before, weights(learner)) == 0
    learner.update(GROUPS)  # and it can go on: no bad gradient is left over
    assert all(p.isfinite().all() for p in weights(learner).values())


def test_masters_keep_what_bfloat16_loses():
    """A hundred steps of 1e-5 on a weight of 1: bfloat16 alone would stay at 1 for ever."""
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([("w", weight)], config(optimizer={"lr": 1e-5}).optimizer)
    for _ in range(1000):
        (weight.float().sum()).backward()
        optimizer.step(1e-5)
    master = optimizer.state()["w/master"]
    assert master.mean().item() == pytest.approx(1 - 1000 * 1e-5, abs=1e-4)
    assert torch.equal(weight, master.bfloat16())
    plain = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        plain -= 1e-5
    assert plain.item() == 1.0


def test_gradients_of_micro_batches_add_up_in_float32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([("w", weight)], config(optimizer={"max_grad_norm": 0}).optimizer)
    for part in [256.0, *[1.0] * 64]:  # in bfloat16 256 + 1 is 256
        (weight * part).sum().backward()
    assert optimizer.clip() == 320.0


def test_a_run_of_one_step_moves_the_weights(folder):
    once, metrics, _ = stepped(folder, optimizer={"lr": 1e-3, "schedule": "linear"}, train={"steps": 1})
    assert metrics["lr"] == pytest.approx(5e-4)
    assert difference(once, weights(TorchLearner(config(), folder, "cpu"))) > 1e-4


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restored_learner_goes_on_bit_for_bit(folder, tmp_path, lora, dtype):
    sections = {"model": {"name": "unused", "dtype": dtype, "lora_rank": lora}}
    _, _, learner = stepped(folder, steps=2, **sections)
    learner.save(tmp_path)
    learner.update(GROUPS)
    again = TorchLearner(config(**sections), folder, "cpu")
    again.restore(tmp_path)
    assert again.version == 2
    again.update(GROUPS)
    assert difference(weights(learner), weights(again)) == 0


def test_checkpoint_of_another_model_is_refused(folder, tmp_path):
    stepped(folder)[2].save(tmp_path)
    other = TorchLearner(config(model={"name": "unused", "dtype": "float32", "lora_rank": 2}), folder, "cpu")
    with pytest.raises(UserError, match="another model"):
        other.restore(tmp_path)


def test_lora_trains_the_adapter_alone_and_the_base_is_its_reference(folder):
    sections = {"model": {"name": "unused", "dtype": "float32", "lora_rank": 4}, "learner": {"kl_coef": 0.5}}
    learner = TorchLearner(config(**sections), folder, "cpu")
    base = learner.logprobs([GROUPS[0].prompt.token_ids])
    first = learner.update(GROUPS)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert learner.update(GROUPS)["kl"] > 1e-5
    handle = learner.publish_weights()
    assert handle.kind == "adapter"
    assert {".lora_" in name for name, _ in handle.open()} == {True}
    assert learner.logprobs([GROUPS[0].prompt.token_ids]) != base
    with learner._model.disable_adapter():
        assert learner.logprobs([GROUPS[0].prompt.token_ids]) == base


@pytest.mark.parametrize("lora", [0, 4])
def test_exported_model_computes_what_the_learner_does(folder, tmp_path, lora):
    learner = stepped(folder, steps=3, model={"name": "unused", "dtype": "float32", "lora_rank": lora})[2]
    learner.export(tmp_path, merged=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = GROUPS[1].prompt.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = torch.tensor(learner.logprobs([ids])[0])
    assert torch.allclose(logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])], expected, atol=1e-4)
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("lora", [0, 4])
def test_perturbed_moves_the_log_probs_and_is_undone(folder, lora):
    learner = TorchLearner(config(model={"name": "unused", "dtype": "float32", "lora_rank": lora}), folder, "cpu")
    ids = [GROUPS[1].prompt.token_ids]
    before, kept = learner.logprobs(ids), weights(learner)
    with learner.perturbed(seed=1):
        moved = sum(abs(a - b) for a, b in zip(learner.logprobs(ids)[0], before[0], strict=True)) / len(before[0])
    assert moved > 0.2
    assert difference(weights(learner), kept) == 0


def test_published_weights_are_the_folders_before_any_step(folder):
    learner = TorchLearner(config(), folder, "cpu")
    assert fingerprint(learner.publish_weights().open()) == fingerprint(FolderWeights(str(folder)).open())


def test_coefficients_of_the_whole_step_reach_every_micro_batch(folder):
    """Were they computed per micro-batch, a long group would weigh as much as a short one."""
    long, short = group(5, [8, 8], seed=5), group(5, [1, 1], seed=6)
    masks = torch.zeros(4, 8)
    for row, length in enumerate([8, 8, 1, 1]):
        masks[row, :length] = 1
    assert torch.equal(losses.token_mean(masks, 8), masks / 18)
    whole = stepped(folder, [long, short], optimizer={"lr": 1e-3, "eps": 1.0}, learner={"microbatch_tokens": 10**6})[0]
    cut = stepped(folder, [long, short], optimizer={"lr": 1e-3, "eps": 1.0}, learner={"microbatch_tokens": 8})[0]
    assert difference(whole, cut) < 1e-6


def test_unknown_lora_target(folder):
    with pytest.raises(UserError, match="lora_targets"):
        TorchLearner(config(model={"name": "unused", "lora_rank": 2, "lora_targets": ["nope"]}), folder, "cpu")


@pytest.mark.slow
def test_compiled_layers_step_as_the_others_do(folder):
    sgd_like = {"optimizer": {"lr": 1e-3, "eps": 1.0}}
    plain = stepped(folder, steps=2, **sgd_like)[0]
    before = weights(TorchLearner(config(), folder, "cpu"))
    compiled = stepped(folder, steps=2, **sgd_like, learner={"compile": "on"})[0]
    assert difference(plain, compiled) < 1e-3 * difference(plain, before)


def test_compiling_without_a_compiler_is_refused_or_left(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert not loading.compiles("auto", "cpu")
    assert not loading.compiles("off", "cpu")
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        loading.compiles("on", "cpu")


def test_completions_of_no_advantage_cost_nothing_and_count(folder):
    """They are not computed, but the mean over tokens counts theirs."""
    (one,) = [group(7, [5, 6, 4], seed=9)]
    idle = dataclasses.replace(one.completions[1], advantage=0.0)
    with_idle = dataclasses.replace(one, completions=(one.completions[0], idle, one.completions[2]))
    kept = {"learner": {"importance": "off"}, "optimizer": {"lr": 1e-3, "eps": 1.0, "max_grad_norm": 0}}
    _, metrics, learner = stepped(folder, [with_idle], **kept)
    assert metrics["tokens_completion"] == 5 + 4
    assert metrics["tokens_learned"] == 5 + 6 + 4
    # The entropy bonus, too small to matter, makes them all go through the model.
    other = {**kept, "learner": {"importance": "off", "entropy_coef": 1e-12}}
    through, through_metrics, _ = stepped(folder, [with_idle], **other)
    assert through_metrics["tokens_completion"] == 5 + 6 + 4
    assert difference(weights(learner), through) < 1e-7


def test_groups_without_signal_are_computed_where_they_are_not_dropped(folder):
    """For the metrics alone: the step is the same."""
    flat = dataclasses.replace(
        GROUPS[0], completions=tuple(dataclasses.replace(c, advantage=0.0) for c in GROUPS[0].completions)
    )
    sgd_like = {"optimizer": {"lr": 1e-3, "eps": 1.0}}
    dropped, few, _ = stepped(folder, [flat, GROUPS[1]], **sgd_like)
    kept, all_, _ = stepped(folder, [flat, GROUPS[1]], **sgd_like, learner={"drop_zero_variance": False})
    assert difference(dropped, kept) < 1e-7
    assert few["tokens_completion"] < all_["tokens_completion"] == all_["tokens_learned"] == few["tokens_learned"]


def test_the_heap_is_trimmed_only_once_it_has_grown():
    trims = []
    heap = device._Heap(lambda: trims.append(1))
    for size in (100, 120, 100, 120, 121, 125, 131):  # two steps need 120: nothing to trim up to 132
        heap.release(size)
    assert not trims
    heap.release(133)
    assert trims == [1]
    for size in (60, 150, 60, 150, 60, 150):  # on the fresh heap the work needs more: that is allowed
        heap.release(size)
    assert trims == [1]


EVER_NEW_SHAPES = """
import psutil, torch
from common.device import _trim, set_threads
set_threads(1)
states, answer = torch.zeros(2000 * 576).bfloat16(), torch.zeros(2000 * 1536).bfloat16()
weight = torch.zeros(1536, 576).bfloat16()
def resident(tokens):
    for T in tokens:
        torch.mm(states[: T * 576].view(T, 576), weight.t(), out=answer[: T * 1536].view(T, 1536))
    _trim()
    return psutil.Process().memory_info().rss
print(resident(range(1999, 1000, -4)), resident(range(1000, 1999, 2)))
"""


@pytest.mark.slow
@pytest.mark.skipif(device.quick_dtype("cpu") == "float32", reason="compiles no products in bfloat16")
def test_ever_new_shapes_do_not_make_a_process_grow():
    """torch's default keeps 0.6 MiB of each of the last thousand: 300 MiB here."""
    ran = subprocess.run([sys.executable, "-c", EVER_NEW_SHAPES], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    before, after = map(int, ran.stdout.split())
    assert after - before < 50 << 20


@pytest.mark.parametrize("family", ["mamba", "gpt_oss", "gptj"])
def test_a_model_that_cannot_be_packed_is_read_and_learns_padded(tmp_path, family, caplog):
    """None of these takes SDPA, which a loader must not insist on."""
    folder = make_tiny(tmp_path / family, family=family)
    learner = TorchLearner(config(), folder, "cpu")
    assert "padded path" in caplog.text
    metrics = learner.update(GROUPS)
    assert metrics["packed"] == 0
    assert math.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("family", "settings", "lora"),
    [
        ("phimoe", {}, 0),  # draws experts at random in training mode
        ("mixtral", {"router_jitter_noise": 0.5}, 0),
        ("opt", {"layerdrop": 0.9}, 0),
        ("llama", {"attention_dropout": 0.3}, 4),
        ("llama4_text", {}, 0),
        ("modernbert-decoder", {}, 0),
    ],
)
def test_checkpointing_computes_layers_again_and_changes_nothing(tmp_path, family, settings, lora):
    make_model(family, **settings).save_pretrained(tmp_path)
    found = []
    for checkpointing in (False, True):
        spec = config(
            model={"name": "unused", "dtype": "float32", "lora_rank": lora},
            learner={"gradient_checkpointing": checkpointing}, optimizer={"lr": 1e-3, "eps": 1.0},
        )  # fmt: skip
        learner = TorchLearner(spec, tmp_path, "cpu")
        layer = next(part for part in learner._model.modules() if isinstance(part, GradientCheckpointingLayer))
        calls = []
        layer.register_forward_pre_hook(lambda layer, _, calls=calls: calls.append(layer.training))
        metrics = learner.update(GROUPS)
        assert calls == [False] * (1 + checkpointing)
        assert not any(part.training for part in learner._model.modules())
        found.append((weights(learner), metrics))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert difference(found[0][0], found[1][0]) < 1e-7


def test_rwkvs_weights_are_those_of_its_files_after_passes(tmp_path):
    made = make_model("rwkv")
    made.save_pretrained(tmp_path)
    learner = TorchLearner(config(optimizer={"lr": 1e-30}), tmp_path, "cpu")
    assert math.isfinite(learner.update(GROUPS)["loss"])
    assert difference(weights(learner), dict(made.named_parameters())) == 0


def test_checkpointing_of_a_family_that_cannot_is_refused(tmp_path):
    make_model("jetmoe").save_pretrained(tmp_path)
    assert math.isfinite(TorchLearner(config(), tmp_path, "cpu").update(GROUPS)["loss"])
    with pytest.raises(UserError, match=r"gradient_checkpointing=true does not work with a 'jetmoe' model"):
        TorchLearner(config(learner={"gradient_checkpointing": True}), tmp_path, "cpu")


def test_a_model_that_looks_both_ways_is_refused(tmp_path):
    make_model("gemma3_text", use_bidirectional_attention=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.name='unused': in this model tokens see those that follow"):
        TorchLearner(config(), tmp_path, "cpu")


class NoKernel(TorchLearner):
    """On a device whose packed kernels crash."""

    def _logprobs_of(self, model, pack, transform):
        if pack.layout is not None:
            raise RuntimeError("no kernel image is available")
        return super()._logprobs_of(model, pack, transform)


def test_a_crash_of_the_packed_pass_is_said_as_it_is(folder, caplog):
    said = r"its packed pass fails \(RuntimeError: no kernel image is available\)"
    with pytest.raises(UserError, match=f"cannot be packed: {said}"):
        NoKernel(config(learner={"packing": "packed"}), folder, "cpu")
    caplog.clear()
    assert not NoKernel(config(), folder, "cpu").packed
    assert re.search(rf"\(padded path\): {said}", caplog.text)


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_rows_beyond_the_length_of_a_longrope_are_learned_from_packed_and_padded(tmp_path, packing):
    """The log-probs that the probe asks for as well: each row's as alone."""
    family, settings = MOVING["longrope"]
    make_model(family, **copy.deepcopy(settings)).save_pretrained(tmp_path)
    learner = TorchLearner(config(learner={"packing": packing}), tmp_path, "cpu")
    assert learner.packed == (packing == "packed")
    asked = [tuple(range(5, 5 + length)) for length in (10, 12, 20)]
    together = learner.logprobs(asked)
    for one, found in zip(asked, together, strict=True):
        assert found == pytest.approx(learner.logprobs([one])[0], abs=1e-5)
    assert learner.update(GROUPS)["packed"] == learner.packed


def test_layers_are_compiled_wherever_a_family_keeps_them(tmp_path):
    for family in ("gpt2", "llama"):
        learner = TorchLearner(config(learner={"compile": "on"}), make_tiny(tmp_path / family, family=family), "cpu")
        names = learner._model._no_split_modules
        layers = [part for part in learner._model.modules() if type(part).__name__ in names]
        assert layers
        assert all(layer._compiled_call_impl is not None for layer in layers)


def test_what_is_made_for_a_pack_goes_with_its_pass(folder):
    """The biases of all packs of a step together can be gigabytes."""
    made = []
    learner = TorchLearner(config(learner={"microbatch_tokens": 30, "inner_updates": 2, "kl_coef": 0.1}), folder, "cpu")
    passes_of = learner._passes
    learner._passes = lambda *asked: made.append(passes_of(*asked)) or made[-1]
    learner.update(GROUPS)
    passes = made[0][1]
    assert len(passes) > 1
    assert not any(pack.layout.cache for pack in passes)
