"""The GPU's attention, as far as a CPU can show: what it sees, how it cuts a pack into spans, and what comes out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.attention import packed_gpu
from learner.attention.packed_cpu import packed_attention
from tests.parity import SIZES, WAYS, dense, layout_of, reference_kernel, seen_from_the_words, varlen_on_shapes
from tests.parity import states as states_of
from tests.tiny import VOCAB_SIZE

SCALE = 0.3


def states(tokens):
    return states_of(tokens, heads=4, key_heads=2, width=8)


@pytest.mark.parametrize(("window", "softcap"), WAYS)
@pytest.mark.parametrize("alphabet", [2, VOCAB_SIZE])
@pytest.mark.parametrize("sizes", SIZES)
def test_both_ways_equal_the_cpus(sizes, alphabet, window, softcap):
    layout, tokens = layout_of(sizes, alphabet)
    query, key, value = states(tokens)
    out, _ = packed_attention(
        None, query, key, value, None, scaling=SCALE, sliding_window=window, softcap=softcap, layout=layout
    )
    truth = dense(query, key, value, seen_from_the_words(sizes, window, alphabet), SCALE, softcap)
    assert torch.allclose(out.transpose(1, 2), truth, atol=1e-5)
    with torch.no_grad():  # PyTorch's reference of flex_attention has no backward pass on a CPU
        assert torch.allclose(packed_gpu.by_flex(query, key, value, layout, SCALE, window, softcap), truth, atol=1e-5)
    by_varlen = packed_gpu.by_varlen(query, key, value, layout, SCALE, window, softcap, reference_kernel)
    assert torch.allclose(by_varlen, truth, atol=1e-5)
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((truth * weights).sum(), (query, key, value))
    found = torch.autograd.grad((by_varlen * weights).sum(), (query, key, value))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm().clamp_min(1e-6)


@given(
    st.lists(
        st.tuples(st.integers(2, 20), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from([1, 2, VOCAB_SIZE]),
)
def test_the_masks_and_the_spans_see_what_the_words_say(sizes, window, alphabet):
    layout, tokens = layout_of(sizes, alphabet)
    truth = seen_from_the_words(sizes, window, alphabet)
    at = torch.arange(tokens)
    assert torch.equal(packed_gpu.seen(layout, tokens, window)(0, 0, at[:, None], at[None]), truth)
    spans = packed_gpu.spans_of(layout)
    seen = torch.zeros_like(truth)
    for n in range(len(spans.query_ends) - 1):
        keys = spans.key_S[spans.key_ends[n] : spans.key_ends[n + 1]]
        queries = at[spans.query_ends[n] : spans.query_ends[n + 1]]
        for i, q in enumerate(queries.tolist()):
            last = len(keys) - len(queries) + i
            seen[q, keys[max(0, last + 1 - (window or 10**9)) : last + 1]] = True
    assert torch.equal(seen, truth)
    assert int(spans.copies_T.sum()) == len(spans.key_S)


def test_blocks_that_nothing_sees_are_left_out():
    layout, tokens = layout_of([(3, [500] * 4)])
    mask = packed_gpu._block_mask(layout, tokens, None)
    assert mask.shape[-1] % packed_gpu.BLOCK == 0
    assert mask.sparsity() > 70  # causality alone would leave half


def test_a_packs_mask_is_made_once_and_goes_with_it():
    layout, tokens = layout_of(SIZES[0])
    query, key, value = (one.detach() for one in states(tokens))
    kept = len(packed_gpu._MADE)
    for window in (None, 7, None, 7):
        packed_gpu.by_flex(query, key, value, layout, SCALE, window, None)
    made = packed_gpu._MADE[layout]
    assert len(made) == 2
    del layout, made
    assert len(packed_gpu._MADE) == kept


@pytest.mark.parametrize(
    ("dtype", "softcap", "sizes", "flash"),
    [
        (torch.bfloat16, None, [(50, [32] * 8)], True),
        (torch.float32, None, [(50, [32] * 8)], False),  # flash attention has 16 bits
        (torch.bfloat16, None, [(800, [150] * 8)], False),  # copies of long prompts
    ],
)
def test_the_rule_by_which_one_is_chosen(dtype, softcap, sizes, flash):
    layout, tokens = layout_of(sizes)
    query, _, value = (one.to(dtype) for one in states(tokens))
    assert packed_gpu.choose(query, value, layout, softcap) is flash
    wide = torch.zeros(1, 1, tokens, 512, dtype=dtype)
    assert not packed_gpu.choose(wide, wide, layout, softcap)


@pytest.mark.parametrize("window", [None, 7])
def test_torchs_varlen_takes_what_it_is_given(window):
    found, wanted = varlen_on_shapes(window)
    assert found == wanted
