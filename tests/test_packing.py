"""Packed log-probs and gradients against the padded float32 forward, for every family that may be packed."""

import functools
import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from learner.attention import packed_cpu
from learner.batch.packing import Row, make_microbatches
from learner.batch.packing_support import FAMILIES
from learner.token_logprobs import token_logprobs
from tests import tiny as tinies
from tests.parity import MIXED, assert_equal, beginnings, make_rows, naive_logprobs, run
from tests.tiny import VOCAB_SIZE, make_model

packed_cpu.register()


@pytest.fixture(scope="module")
def tiny():
    return functools.cache(lambda family="llama", **settings: make_model(family, **settings))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_equals_padded(tiny, family):
    rows = make_rows(MIXED)
    packed = run(tiny(family), rows, packed=True)
    assert_equal(packed, run(tiny(family), rows, packed=False))
    for row in (rows[0], rows[3]):  # and neither leaves something out that eager attention honours
        truth = naive_logprobs(tiny(family), row)
        assert torch.allclose(packed[0][row.index, : len(row.completion)], truth, atol=1e-4)


def test_every_family_that_may_be_packed_has_a_tiny_model_and_is_tested_above():
    assert set(tinies.FAMILIES) == FAMILIES


# What a family's configuration can switch on; each is honoured.
SETTINGS = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0, "attention_bias": True}),
    ("mistral", {"sliding_window": 1}),  # a token sees itself alone
    ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}),
    ("phi", {"qk_layernorm": True, "partial_rotary_factor": 1.0}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("cohere", {"use_qk_norm": True, "logit_scale": 0.3}),
    ("olmo", {"clip_qkv": 0.5}),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}),
]


@pytest.mark.parametrize(("family", "switched"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_of_a_family_are_honoured(family, switched):
    rows = make_rows(MIXED)
    model, plain = make_model(family, **switched), make_model(family)
    packed = run(model, rows, packed=True)
    assert_equal(packed, run(model, rows, packed=False))
    assert torch.allclose(packed[0][3, :20], naive_logprobs(model, rows[3]), atol=1e-4)
    assert not torch.allclose(packed[0], run(plain, rows, packed=True)[0], atol=1e-3), "the setting changed nothing"


@pytest.mark.parametrize("packed", [True, False])
def test_both_equal_one_sequence_at_a_time(tiny, packed):
    rows = make_rows(MIXED)
    logprobs, _, _ = run(tiny(), rows, packed, budget=40)
    for row in rows:
        assert torch.allclose(logprobs[row.index, : len(row.completion)], naive_logprobs(tiny(), row), atol=1e-5)


def test_a_completion_sees_neither_its_siblings_nor_other_groups(tiny):
    rows = make_rows(MIXED)
    alone, _, _ = run(tiny(), rows, packed=True)
    changed = [rows[0], *(Row(r.index, r.prompt, tuple((t + 1) % VOCAB_SIZE for t in r.completion)) for r in rows[1:])]
    beside, _, _ = run(tiny(), changed, packed=True)
    assert torch.allclose(alone[0], beside[0], atol=1e-6)
    assert not torch.allclose(alone[1:], beside[1:], atol=1e-2)


SIZES = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), min_size=1, max_size=6)), min_size=1, max_size=5
)


@given(
    SIZES,
    st.integers(8, 200),
    st.sampled_from(["llama", "gemma2", "mistral", "qwen2", "olmoe"]),
    st.sampled_from([1, 2, 3, VOCAB_SIZE]),
)
@example([(1, [1])], 200, "llama", VOCAB_SIZE)  # one token in, one out
@example([(7, [1, 1, 1])], 200, "gemma2", VOCAB_SIZE)  # no completion has inputs
@example([(9, [0, 0]), (4, [0, 5]), (3, [0])], 200, "llama", VOCAB_SIZE)  # empty completions; groups of nothing else
@example([(9, [0, 0])], 200, "llama", VOCAB_SIZE)
@example([(30, [4] * 32)], 4096, "llama", VOCAB_SIZE)  # a large group
@example([(30, [4] * 32)], 4096, "gemma2", 2)  # many the same, and many that share a prefix
@example([(9, [5, 5, 5])], 4096, "llama", 1)  # all the same
@example([(9, [5, 7]), (12, [3]), (10, [1, 9])], 4096, "mistral", 1)  # completions that go on like other prompts
@example([(500, [3, 0, 9]), (2, [4]), (499, [1])], 4096, "llama", VOCAB_SIZE)  # a long and a short prompt in a pack
@example([(450, [40, 2]), (390, [60])], 4096, "gemma2", VOCAB_SIZE)
@example([(450, [40, 2]), (390, [60])], 500, "mistral", VOCAB_SIZE)
@example([(450, [140, 2]), (390, [260])], 4096, "mistral", 1)  # a long run that others leave midway
@example([(2, [400, 1, 300])], 4096, "qwen2", VOCAB_SIZE)  # long completions of a short prompt
def test_any_groups_in_any_budget(tiny, sizes, budget, family, alphabet):
    rows = make_rows(sizes, alphabet=alphabet)
    model = tiny(family)
    assert_equal(run(model, rows, packed=True, budget=budget), run(model, rows, packed=False, budget=10**6))


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), min_size=1, max_size=6)), min_size=1, max_size=9
    ),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([1, 2, 3, VOCAB_SIZE]),
)
def test_plan_holds_every_token_once_and_keeps_the_budget(sizes, budget, packed, alphabet):
    rows = make_rows(sizes, alphabet=alphabet)
    packs = make_microbatches(rows, budget, packed)
    wanted = {(row.index, t): token for row in rows for t, token in enumerate(row.completion)}
    found = {}
    for pack in packs:
        places = list(zip(pack.row_K.tolist(), pack.column_K.tolist(), strict=True))
        assert not found.keys() & set(places)
        found |= dict(zip(places, pack.target_P[pack.pair_K].tolist(), strict=True))
        assert pack.pairs_U[-1] == len(pack.target_P) and pack.tokens_P[-1] == len(places)
        alone = pack.token_ids.numel() == max(len(rows[index].inputs) for index in pack.row_K.tolist())
        assert pack.token_ids.numel() <= budget or alone
    assert found == wanted


def test_each_prompt_once_in_a_group():
    rows = make_rows([(50, [4] * 8)])
    (pack,) = make_microbatches(rows, 1000, packed=True)
    assert pack.token_ids.numel() == 50 + 8 * 3
    assert pack.prompt_tokens == 50
    assert len(pack.predict_U) == 8 * 3 + 1, "all first tokens are predicted by the prompt's last one"


@given(SIZES, st.sampled_from([1, 2, 3, VOCAB_SIZE]))
def test_a_pack_holds_each_beginning_once_in_the_order_of_the_tokens(sizes, alphabet):
    rows = [row for row in make_rows(sizes, alphabet=alphabet) if row.completion]
    if not rows:
        return
    (pack,) = make_microbatches(rows, 10**6, packed=True)
    once = beginnings(rows)
    assert pack.token_ids[0].tolist() == [one[-1] for one in once]
    assert pack.position_ids[0].tolist() == [len(one) - 1 for one in once]
    pairs = {(row.inputs[: len(row.prompt) + t], token) for row in rows for t, token in enumerate(row.completion)}
    assert len(pack.target_P) == len(pairs) and len(pack.predict_U) == len({one for one, _ in pairs})


def test_prompts_that_begin_alike_come_into_one_pack():
    rng = random.Random(1)
    examples = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(100)) for _ in range(3)]
    rows = []
    for number in range(12):  # the three take turns
        prompt = (*examples[number % 3], *(rng.randrange(VOCAB_SIZE) for _ in range(10)))
        rows += [Row(len(rows) + i, prompt, (number, i)) for i in range(2)]
    packs = make_microbatches(rows, 160, packed=True)
    assert [pack.token_ids.numel() for pack in packs] == [100 + 4 * (10 + 1)] * 3
    assert [pack.prompt_tokens for pack in packs] == [140] * 3


def test_a_sequence_beyond_the_budget_goes_alone_and_the_others_stay_together():
    rows = make_rows([(300, [5])] + [(20, [2])] * 6)
    assert sorted(pack.token_ids.numel() for pack in make_microbatches(rows, 130, packed=True)) == [6 * 21, 304]
    twice = [Row(i, rows[0].prompt, rows[0].completion) for i in range(3)]
    assert [pack.token_ids.numel() for pack in make_microbatches(twice, 130, packed=True)] == [304]


def test_many_groups_that_share_a_long_beginning_fill_their_passes():
    """Each pass repeats the beginning, so the least possible number of passes is far from the real one."""
    beginning = tuple(range(300))
    rows = [Row(i, (*beginning, i % 7, i, i), (i, 1)) for i in range(128)]
    packs = make_microbatches(rows, 320, packed=True)
    assert max(pack.token_ids.numel() for pack in packs) <= 320
    assert len(packs) <= 32


def test_passes_are_even_where_nothing_is_alike():
    rows = [Row(n, (n, *range(1, length)), (7,)) for n, length in enumerate((100, 60, 60, 20, 40, 40))]
    assert [pack.token_ids.numel() for pack in make_microbatches(rows, 170, packed=True)] == [160, 160]


def test_groups_that_share_nothing_fill_their_passes_the_largest_first():
    """In the order of their tokens they would take four passes."""
    rows = [Row(n, (n, *range(1, length)), (7,)) for n, length in enumerate((100, 100, 70, 70, 30, 100))]
    assert [pack.token_ids.numel() for pack in make_microbatches(rows, 170, packed=True)] == [170, 170, 130]


def test_a_pack_on_another_device_is_the_same_without_its_cache():
    (pack,) = make_microbatches(make_rows(MIXED), 10**6, packed=True)
    assert pack.to("cpu") is pack
    pack.layout.once("mask", lambda: "made here")
    moved = pack.to("meta")
    assert {moved.row_K.device.type, moved.layout.seen_T.device.type, moved.layout.tiles[0].key_BS.device.type} == {
        "meta"
    }
    assert (moved.pairs_U, moved.prompt_tokens, moved.layout.cache) == (pack.pairs_U, pack.prompt_tokens, {})
    pack.free_cache()
    assert pack.layout.cache == {}


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}])
def test_sampler_settings_shape_the_distribution(tiny, options):
    """A token inside the kept set has the kept set's log-prob, by the definition of top-k and top-p."""
    rows = make_rows([(9, [6, 6])])
    logprobs, _, _ = run(tiny(), rows, packed=True, **options)
    model = tiny()
    model.config._attn_implementation = "eager"
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt + row.completion])).logits[0] / options.get("temperature", 1.0)
        for t, token in enumerate(row.completion):
            p = logits[len(row.prompt) + t - 1].softmax(-1)
            order = p.argsort(descending=True)
            before = p[order].cumsum(0) - p[order]
            kept = order[: options.get("top_k") or len(order)]
            kept = kept[before[: len(kept)] < options.get("top_p", 1.0)]
            kept = torch.tensor([*{*kept.tolist(), token}])
            assert logprobs[row.index, t].item() == pytest.approx((p[token] / p[kept].sum()).log().item(), abs=1e-4)


def test_entropy_is_that_of_the_distribution(tiny):
    model = tiny()
    (pack,) = make_microbatches(make_rows([(9, [6])]), 1000, packed=True)
    _, entropy_K = token_logprobs(model, pack)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        p = model(pack.token_ids).logits[0].softmax(-1)
    assert torch.allclose(entropy_K[0], -(p[8] * p[8].log()).sum(), atol=1e-4)
