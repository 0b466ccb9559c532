"""Which models are packed: refused for what they are, and caught by the probe where they are not what they say."""

import copy
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaForCausalLM

from common.errors import UserError
from learner.attention import packed_cpu
from learner.attention.packed_cpu import packed_attention
from learner.batch import packing_support
from learner.batch.packing import make_microbatches
from learner.model import resolve
from learner.token_logprobs import from_logits, token_logprobs
from tests import tiny
from tests.parity import MIXED, assert_equal, make_rows, naive_logprobs, run
from tests.tiny import make_model

packed_cpu.register()
EXACT = packing_support.tolerance(torch.float32)
REASONS = {
    "biogpt": "attention interface",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "gptj": "attention interface",
    "gpt_neo": "attention interface",
    "falcon": "attention interface",
    "doge": "mask of its own",
    "nemotron": "layout",
    "stablelm": "layout",
    "gpt_oss": "attention sinks (model.layers.0.self_attn.sinks)",
    "lfm2": "layers of the kind conv",
    "mamba": "layers of the kind linear_attention",
    "jamba": "layers of the kind linear_attention, mamba",
    "falcon_h1": "layers of the kind hybrid",
    "recurrent_gemma": "layers of the kind recurrent",
    "granitemoehybrid": "layers of the kind linear_attention",
    "qwen3_next": "layers of the kind linear_attention",
}


def packed_apart(model):
    """The probe's answer; infinity where a pass fails."""
    try:
        return packing_support.probe(model, token_logprobs)
    except Exception:
        return math.inf


def checked(model):
    return packing_support.check(model, token_logprobs, from_logits, model.dtype)


def test_every_refused_family_has_a_tiny_model_and_a_reason():
    assert set(REASONS) == set(tiny.UNPACKABLE)
    assert not packing_support.FAMILIES & set(tiny.UNPACKABLE)
    assert not packing_support.FAMILIES & packing_support.REFUSED.keys()


@pytest.mark.parametrize("family", sorted(packing_support.FAMILIES))
def test_a_tested_family_is_packed_and_its_probe_agrees(family):
    model = make_model(family)
    assert packing_support.why_not_packed(model) == ""
    assert packing_support.probe(model, token_logprobs) < EXACT


@pytest.mark.parametrize("family", sorted(REASONS))
def test_a_model_that_cannot_be_packed_is_refused_by_name_and_by_the_probe(family):
    model = make_model(family)
    assert REASONS[family] in packing_support.why_not_packed(model)
    if family != "biogpt":  # which would be right, but says nothing about its attention
        assert packed_apart(model) > 30 * EXACT


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt_oss", "recurrent_gemma", "gemma2", "stablelm", "lfm2"])
def test_the_padded_path_computes_what_the_model_computes(family):
    """With the attention named by ``plain_attention`` rows beside a longer one equal the model's own, one at a time
    by eager attention, which leaves nothing out."""
    model = make_model(family)
    rows = make_rows(MIXED)
    (pack,) = make_microbatches(rows, 10**6, packed=False)
    with torch.no_grad():
        model.config._attn_implementation = packing_support.plain_attention(model)
        logits = model(pack.token_ids, attention_mask=pack.attention_mask, use_cache=False).logits
        found_K = logits.flatten(0, 1).float().log_softmax(-1)[pack.predict_U[pack.at_P], pack.target_P][pack.pair_K]
        model.config._attn_implementation = "eager"
        for row in rows:
            ids = torch.tensor([row.prompt + row.completion])
            own = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            truth = own[len(row.prompt) - 1 : -1].gather(1, ids[0, len(row.prompt) :, None])[:, 0]
            mine = pack.row_K == row.index
            assert torch.allclose(found_K[mine][pack.column_K[mine].argsort()], truth, atol=1e-4), family


RECURRENT = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "minimax",
    "nemotron_h", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("family", RECURRENT)
def test_rows_beside_a_longer_one_are_as_alone_where_a_state_is_carried(family):
    """Log-probs and gradients of one padded pass, against each row in a pass of its own; the weights stay as they
    are."""
    model = make_model(family, **({"rescale_every": 0} if family == "rwkv" else {}))  # as it is loaded
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert packing_support.why_not_packed(model)
    assert checked(model) == ""
    rows = make_rows([(9, [31, 1]), (30, [10])])
    together, alone = run(model, rows, packed=False), run(model, rows, packed=False, budget=1)
    assert len(make_microbatches(rows, 10**6, packed=False)) == 1
    assert len(make_microbatches(rows, 1, packed=False)) == len(rows)
    assert_equal(together, alone)
    for row in rows:
        assert torch.allclose(alone[0][row.index, : len(row.completion)], naive_logprobs(model, row), atol=1e-4)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_pass_that_changes_the_weights_is_found():
    """RWKV's does, of several layers, in evaluation mode."""
    assert "a forward pass of this 'rwkv' model changes its weights" in checked(make_model("rwkv"))


# -- settings that take a tested family out ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"model_type": "my_llama"}, "the family 'my_llama' has not been tested"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "both ways"),
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ("llama", {"attention_chunk_size": 64}, "chunks"),
        ("llama", {"alibi": True}, "ALiBi"),
        ("llama", {"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_a_setting_that_packing_does_not_know_refuses_the_model(family, settings, reason):
    model = make_model(family)
    for key, value in settings.items():
        setattr(model.config, key, value)
    assert reason in packing_support.why_not_packed(model)


def test_a_convolution_refuses_the_model():
    model = make_model("llama")
    model.model.layers[0].mixer = nn.Conv1d(4, 4, 2)
    assert "convolution 'model.layers.0.mixer'" in packing_support.why_not_packed(model)


def test_code_that_came_with_the_model_is_not_the_tested_one():
    class Theirs(LlamaForCausalLM):
        """Calls itself a llama."""

    model = Theirs(make_model("llama").config)
    assert "comes with the model" in packing_support.why_not_packed(model)


# -- rotary embeddings that go by the longest row ----------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 32.0,
    "short_factor": [1 + i / 10 for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
}
MOVING = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": None}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
    ),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("moving", MOVING)
def test_rows_of_unlike_length_do_not_change_each_other(moving, packed):
    """Lengths of 10, 12, 16, 17, 20 and 40 tokens, the longest first and last: each as alone in a model just made."""
    family, settings = MOVING[moving]
    model = make_model(family, **copy.deepcopy(settings))
    assert packing_support.why_not_packed(model) == ""
    rows = make_rows([(9, [31, 1, 3, 11]), (12, [4, 5, 8]), (30, [10])])
    kind_of = packing_support.kind_of_length(model.config)
    packs = make_microbatches(rows, 10**6, packed, kind_of)
    assert len(packs) == (2 if moving == "longrope" else 4)
    for pack in packs:
        logprob_K, _ = token_logprobs(model, pack)
        for row in (row for row in rows if row.index in pack.row_K):
            mine = pack.row_K == row.index
            truth = naive_logprobs(make_model(family, **copy.deepcopy(settings)), row)
            assert torch.allclose(logprob_K[mine][pack.column_K[mine].argsort()], truth, atol=1e-4), row.index
    # Sharing one pass they do change each other, or this would show nothing.
    (pack,) = make_microbatches(rows, 10**6, packed)
    mine = pack.row_K == 2
    with torch.no_grad():
        shared = token_logprobs(model, pack)[0][mine][pack.column_K[mine].argsort()]
    assert (shared - naive_logprobs(make_model(family, **copy.deepcopy(settings)), rows[2])).abs().mean() > 0.02


def test_longrope_beyond_its_first_length_is_refused(tmp_path):
    """As saved today, as older configs have it, and in a text model of its own; what the learner says of lengths."""
    family, settings = MOVING["longrope"]
    config = make_model(family, **copy.deepcopy(settings)).config
    assert packing_support.kind_of_length(config)(16) != packing_support.kind_of_length(config)(17)
    old = {"original_max_position_embeddings": 16, "rope_scaling": {"type": "su", "short_factor": [1.0]}}
    layered = {
        "rope_parameters": {"full_attention": LONGROPE | {"original_max_position_embeddings": 16}, "other": None}
    }
    for values in (config.to_dict(), old, layered, {"text_config": old}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        resolve.check_rope(tmp_path, 10, 6)
        with pytest.raises(UserError, match=r"^sampler\.max_tokens=7 after prompts of up to 10 tokens .* the 16"):
            resolve.check_rope(tmp_path, 10, 7)
    (tmp_path / "config.json").write_text(json.dumps(make_model("llama").config.to_dict()))
    resolve.check_rope(tmp_path, 100, 100)


def test_other_rotary_embeddings_let_any_rows_share_a_pass():
    assert packing_support.kind_of_length(make_model("llama").config) is None
    assert packing_support.kind_of_length(make_model("gpt2").config) is None


# -- the padded path and the model's own -------------------------------------------------------------------------------

HEADS = [
    ("falcon_h1", {}),
    ("recurrent_gemma", {}),
    ("hyperclovax", {"logits_scaling": 3.0}),
    ("granite", {"logits_scaling": 3.0}),
    ("cohere", {"logit_scale": 0.3}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("nanochat", {"final_logit_softcapping": 2.0}),
    ("mpt", {"logit_scale": 0.5}),  # which transformers does not look at
    ("minicpm3", {}),
    ("modernbert-decoder", {}),
    ("llama4_text", {}),
    ("jetmoe", {}),
]


@pytest.mark.parametrize(("family", "settings"), HEADS)
def test_what_stands_behind_the_head_is_known(family, settings):
    model = make_model(family, **settings)
    assert checked(model) == ""
    for row in make_rows([(5, [7])]):
        (pack,) = make_microbatches([row], 100, packed=False)
        with torch.no_grad():
            assert torch.allclose(token_logprobs(model, pack)[0], naive_logprobs(model, row), atol=1e-4)
    if family not in ("jetmoe", "llama4_text"):  # whose experts rounding might change
        assert checked(model.to(torch.bfloat16)) == ""


class Scaled(LlamaForCausalLM):
    """A family that does something new with its logits."""

    factor = 1.0

    def forward(self, *args, **named):
        output = super().forward(*args, **named)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.002), ("bfloat16", 1.002), ("bfloat16", 0.9)])
def test_a_head_that_is_not_known_is_found(dtype, factor):
    model = Scaled(make_model("llama").config)
    model.load_state_dict(make_model("llama").state_dict())
    model.to(getattr(torch, dtype)).eval()
    assert checked(model) == ""
    model.factor = factor
    assert "changes its logits behind the output head" in checked(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_looks_ahead_is_no_causal_one(dtype):
    model = make_model("gemma3_text", use_bidirectional_attention=True).to(getattr(torch, dtype))
    assert "depend on the tokens that follow" in checked(model)


def test_a_model_whose_pass_fails_is_a_sentence(caplog):
    caplog.set_level(logging.INFO, "nanogrpo.learner")
    model = make_model("llama")
    model.model.layers[1].mlp = nn.Linear(3, 3)
    assert "a forward pass of this 'llama' model fails (RuntimeError: mat1 and mat2" in checked(model)
    assert "Traceback" in caplog.text


def test_hidden_states_that_the_head_is_not_given_are_found():
    model = make_model("modernbert-decoder")
    model.config.model_type = "another"
    assert "differ from its own" in checked(model)


# -- the probe ---------------------------------------------------------------------------------------------------------


def broken(change):
    """The packed attention under a Llama, its arguments changed on the way: what a model's own code might do."""

    def attend(module, query, key, value, attention_mask, **named):
        query, key, value, named = change(query, key, value, named)
        return packed_attention(module, query, key, value, attention_mask, **named)

    AttentionInterface.register(packed_cpu.NAME, attend)


CHANGES = {
    "no layout": lambda q, k, v, named: (q, k, v, named | {"layout": None}),
    "another scale": lambda q, k, v, named: (q, k, v, named | {"scaling": 0.05}),
    "keys of the token before": lambda q, k, v, named: (q, k.roll(1, 2), v, named),
    "values of another completion": lambda q, k, v, named: (q, k, v.flip(2), named),
    "a window": lambda q, k, v, named: (q, k, v, named | {"sliding_window": 3}),
    "not a number": lambda q, k, v, named: (q, k, v * math.nan, named),
}


SAID = {
    "no layout": "its packed pass fails (AssertionError: packed attention was called without a layout)",
    "not a number": "its packed log-probs are not numbers",
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_probe_finds(change, caplog):
    caplog.set_level(logging.INFO, "nanogrpo.learner")
    broken(CHANGES[change])
    try:
        difference = packed_apart(make_model("llama"))
        said = packing_support.wrong_when_packed(make_model("llama"), token_logprobs, torch.float32)
    finally:
        packed_cpu.register()
    assert difference > 30 * EXACT
    assert said.startswith(SAID.get(change, "its packed log-probs differ from the padded ones by "))
    assert packing_support.probe(make_model("llama"), token_logprobs) < EXACT
    assert packing_support.wrong_when_packed(make_model("llama"), token_logprobs, torch.float32) == ""
    # The traceback of a failure goes to the log, and no failure is a difference of "inf".
    assert ("Traceback" in caplog.text) == (change == "no layout")
    assert "inf" not in said


def test_the_probe_finds_positions_that_run_on():
    model = make_model("llama")
    inner = model.model.forward

    def without_positions(*args, position_ids=None, **named):  # a model that counts for itself
        return inner(*args, **named)

    model.model.forward = without_positions
    assert packing_support.probe(model, token_logprobs) > 30 * EXACT


def test_the_probe_in_bfloat16_is_rounding():
    model = make_model("qwen3").to(torch.bfloat16)
    assert packing_support.probe(model, token_logprobs) < packing_support.tolerance(torch.bfloat16)


def test_sinks_and_biases_are_refused_by_the_attention_itself():
    (pack,) = make_microbatches(make_rows([(3, [2])]), 100, packed=True)
    states = torch.zeros(1, 2, 4, 8)
    for extra in ({"s_aux": torch.zeros(2)}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(UserError, match="sinks or biases"):
            packed_attention(SimpleNamespace(), states, states, states, None, layout=pack.layout, **extra)
