"""The GPU's attention, as far as a CPU can show: what it sees, and what comes out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.attention import packed_gpu
from learner.attention.packed_cpu import packed_attention
from tests.parity import SIZES, WAYS, dense, layout_of, seen_from_the_words
from tests.parity import states as states_of
from tests.tiny import VOCAB_SIZE

SCALE = 0.3


def states(tokens):
    return states_of(tokens, heads=4, key_heads=2, width=8)


@pytest.mark.parametrize(("window", "softcap"), WAYS)
@pytest.mark.parametrize("alphabet", [2, VOCAB_SIZE])
@pytest.mark.parametrize("sizes", SIZES)
def test_both_devices_attention_is_the_dense_one(sizes, alphabet, window, softcap):
    layout, tokens = layout_of(sizes, alphabet)
    query, key, value = states(tokens)
    out, _ = packed_attention(
        None, query, key, value, None, scaling=SCALE, sliding_window=window, softcap=softcap, layout=layout
    )
    truth = dense(query, key, value, seen_from_the_words(sizes, window, alphabet), SCALE, softcap)
    assert torch.allclose(out.transpose(1, 2), truth, atol=1e-5)
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((truth * weights).sum(), (query, key, value))
    gradients = torch.autograd.grad((out.transpose(1, 2) * weights).sum(), (query, key, value))
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).norm() < 1e-5 * other.norm().clamp_min(1e-6)
    with torch.no_grad():  # PyTorch's reference of flex_attention has no backward pass on a CPU
        assert torch.allclose(packed_gpu.attend(query, key, value, layout, SCALE, window, softcap), truth, atol=1e-5)


@given(
    st.lists(
        st.tuples(st.integers(2, 20), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from([1, 2, VOCAB_SIZE]),
)
def test_the_mask_sees_what_the_words_say(sizes, window, alphabet):
    layout, tokens = layout_of(sizes, alphabet)
    at = torch.arange(tokens)
    truth = seen_from_the_words(sizes, window, alphabet)
    assert torch.equal(packed_gpu.seen(layout, tokens, window)(0, 0, at[:, None], at[None]), truth)


def test_blocks_that_nothing_sees_are_left_out():
    layout, tokens = layout_of([(3, [500] * 4)])
    mask = packed_gpu.block_mask(layout, tokens, None)
    assert mask.shape[-1] % packed_gpu.BLOCK == 0
    assert mask.sparsity() > 70  # causality alone would leave half


def test_a_packs_mask_is_made_once():
    layout, tokens = layout_of(SIZES[0])
    query, key, value = (one.detach() for one in states(tokens))
    for window in (None, 7, None, 7):
        packed_gpu.attend(query, key, value, layout, SCALE, window)
    assert list(layout.cache) == [("mask", None), ("mask", 7)]
