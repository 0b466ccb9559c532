"""Which models are packed: refused for what they are, and caught by the probe where they are not what they say."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaForCausalLM

from common.errors import UserError
from learner import attention, families
from learner.attention import packed_attention
from learner.logprobs import score
from learner.packing import plan
from tests import tiny
from tests.parity import MIXED, make_rows
from tests.tiny import make_model

attention.register()
EXACT = families.tolerance(torch.float32)
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


def test_every_refused_family_has_a_tiny_model_and_a_reason():
    assert set(REASONS) == set(tiny.UNPACKABLE)
    assert not families.FAMILIES & set(tiny.UNPACKABLE)
    assert not families.FAMILIES & families.REFUSED.keys()


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_a_tested_family_is_packed_and_its_probe_agrees(family):
    model = make_model(family)
    assert families.why_not_packed(model) == ""
    assert families.probe(model, score) < EXACT


@pytest.mark.parametrize("family", sorted(REASONS))
def test_a_model_that_cannot_be_packed_is_refused_by_name_and_by_the_probe(family):
    model = make_model(family)
    assert REASONS[family] in families.why_not_packed(model)
    if family != "biogpt":  # which would be right, but says nothing about its attention
        assert families.probe(model, score) > 30 * EXACT


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt_oss", "recurrent_gemma", "gemma2", "stablelm", "lfm2"])
def test_the_padded_path_computes_what_the_model_computes(family):
    """With the attention named by ``plain_attention`` rows beside a longer one equal the model's own, one at a time
    by eager attention, which leaves nothing out."""
    model = make_model(family)
    rows = make_rows(MIXED)
    (pack,) = plan(rows, 10**6, packed=False)
    with torch.no_grad():
        model.config._attn_implementation = families.plain_attention(model)
        logits = model(pack.token_ids, attention_mask=pack.attention_mask, use_cache=False).logits
        found_K = logits.flatten(0, 1).float().log_softmax(-1)[pack.predict_U[pack.at_P], pack.target_P][pack.pair_K]
        model.config._attn_implementation = "eager"
        for row in rows:
            ids = torch.tensor([row.prompt + row.completion])
            own = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            truth = own[len(row.prompt) - 1 : -1].gather(1, ids[0, len(row.prompt) :, None])[:, 0]
            mine = pack.row_K == row.index
            assert torch.allclose(found_K[mine][pack.column_K[mine].argsort()], truth, atol=1e-4), family


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
    assert reason in families.why_not_packed(model)


def test_a_convolution_refuses_the_model():
    model = make_model("llama")
    model.model.layers[0].mixer = nn.Conv1d(4, 4, 2)
    assert "convolution 'model.layers.0.mixer'" in families.why_not_packed(model)


def test_code_that_came_with_the_model_is_not_the_tested_one():
    class Theirs(LlamaForCausalLM):
        """Calls itself a llama."""

    model = Theirs(make_model("llama").config)
    assert "comes with the model" in families.why_not_packed(model)


def test_a_rotary_embedding_that_moves_with_the_longest_row():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = make_model("llama", rope_parameters=rope, max_position_embeddings=32)
    assert "dynamic" in families.why_not_packed(model)
    assert "dynamic" in families.why_not_packed(model, longest=33)
    assert families.why_not_packed(model, longest=32) == ""
    # A row's log-probs really depend on the company: 20 tokens alone, and beside 60.
    alone, beside = (make_rows(sizes) for sizes in ([(10, [10])], [(10, [10]), (30, [30])]))
    with torch.no_grad():
        (one,) = plan(alone, 10**6, packed=True)
        (both,) = plan(beside, 10**6, packed=True)
        assert not torch.allclose(score(model, one)[0], score(model, both)[0][both.row_K == 0], atol=1e-3)


# -- the probe ---------------------------------------------------------------------------------------------------------


def broken(change):
    """The packed attention under a Llama, its arguments changed on the way: what a model's own code might do."""

    def attend(module, query, key, value, attention_mask, **named):
        query, key, value, named = change(query, key, value, named)
        return packed_attention(module, query, key, value, attention_mask, **named)

    AttentionInterface.register(attention.NAME, attend)


CHANGES = {
    "no layout": lambda q, k, v, named: (q, k, v, named | {"layout": None}),
    "another scale": lambda q, k, v, named: (q, k, v, named | {"scaling": 0.05}),
    "keys of the token before": lambda q, k, v, named: (q, k.roll(1, 2), v, named),
    "values of another completion": lambda q, k, v, named: (q, k, v.flip(2), named),
    "a window": lambda q, k, v, named: (q, k, v, named | {"sliding_window": 3}),
    "not a number": lambda q, k, v, named: (q, k, v * math.nan, named),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_probe_finds(change, caplog):
    caplog.set_level(logging.INFO, "nanogrpo.learner")
    broken(CHANGES[change])
    try:
        difference = families.probe(make_model("llama"), score)
    finally:
        attention.register()
    assert difference > 30 * EXACT
    assert families.probe(make_model("llama"), score) < EXACT
    assert ("layout" in caplog.text) == (change == "no layout")


def test_the_probe_finds_positions_that_run_on():
    model = make_model("llama")
    inner = model.model.forward

    def without_positions(*args, position_ids=None, **named):  # a model that counts for itself
        return inner(*args, **named)

    model.model.forward = without_positions
    assert families.probe(model, score) > 30 * EXACT


def test_the_probe_in_bfloat16_is_rounding():
    model = make_model("qwen3").to(torch.bfloat16)
    assert families.probe(model, score) < families.tolerance(torch.bfloat16)


def test_sinks_and_biases_are_refused_by_the_attention_itself():
    (pack,) = plan(make_rows([(3, [2])]), 100, packed=True)
    states = torch.zeros(1, 2, 4, 8)
    for extra in ({"s_aux": torch.zeros(2)}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(UserError, match="sinks or biases"):
            packed_attention(SimpleNamespace(), states, states, states, None, layout=pack.layout, **extra)
