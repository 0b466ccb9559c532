"""Packed log-probs and gradients against the padded float32 forward, for every family that may be packed."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from learner import attention
from learner.attention import FAMILIES
from learner.logprobs import can_pack, score
from learner.packing import Row, plan, stretches
from tests.tiny import VOCAB_SIZE, make_tiny

attention.register()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def get(family="llama"):
        if family not in made:
            folder = make_tiny(tmp_path_factory.mktemp(family), family=family)
            made[family] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return made[family]

    return get


def make_rows(sizes, seed=0):
    """``sizes``: for each group (prompt length, completion lengths)."""
    draw = random.Random(seed)
    rows = []
    for prompt_length, lengths in sizes:
        prompt = tuple(draw.randrange(VOCAB_SIZE) for _ in range(prompt_length))
        for length in lengths:
            rows.append(Row(len(rows), prompt, tuple(draw.randrange(VOCAB_SIZE) for _ in range(length))))
    return rows


def run(model, rows, packed, budget=10**6, **options):
    """Log-probs and entropies [B, T] and every gradient of a weighted sum of them."""
    model.zero_grad(set_to_none=True)
    shape = (len(rows), max(len(row.completion) for row in rows))
    weights = torch.linspace(0.5, 1.5, shape[0] * shape[1]).view(shape)
    logprobs, entropies = torch.zeros(shape), torch.zeros(shape)
    for pack in plan(rows, budget, packed):
        logprob_K, entropy_K = score(model, pack, **options)
        at = (pack.row_K, pack.column_K)
        (logprob_K * weights[at]).sum().backward()
        logprobs[at], entropies[at] = logprob_K.detach(), entropy_K.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logprobs, entropies, gradients


def assert_equal(one, other):
    assert torch.allclose(one[0], other[0], atol=1e-4), (one[0] - other[0]).abs().max()
    assert torch.allclose(one[1], other[1], atol=1e-4)
    assert one[2].keys() == other[2].keys()
    largest = max(gradient.norm() for gradient in other[2].values())
    for name, gradient in one[2].items():  # a gradient that is nothing but rounding is compared with the largest
        error = (gradient - other[2][name]).norm() / other[2][name].norm().clamp_min(1e-2 * largest)
        assert error < 1e-4, f"{name}: {error}"


MIXED = [(5, [3, 1, 7]), (30, [20, 2]), (1, [4]), (12, [1, 1])]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_equals_padded(tiny, family):
    model = tiny(family)
    rows = make_rows(MIXED)
    assert can_pack(model)
    assert_equal(run(model, rows, packed=True), run(model, rows, packed=False))


def naive_logprobs(model, row):
    """One sequence at a time through the whole model: the slow truth of both paths."""
    ids = torch.tensor([row.prompt + row.completion])
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        logits = model(ids).logits[0].float().log_softmax(-1)
    start = len(row.prompt)
    return torch.stack([logits[start + t - 1, token] for t, token in enumerate(row.completion)])


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


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=5
    ),
    st.integers(8, 200),
)
def test_any_groups_in_any_budget(tiny, sizes, budget):
    rows = make_rows(sizes)
    assert_equal(run(tiny(), rows, packed=True, budget=budget), run(tiny(), rows, packed=False, budget=budget))


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), min_size=1, max_size=6)), min_size=1, max_size=9
    ),
    st.integers(1, 200),
    st.booleans(),
)
def test_plan_holds_every_token_once_and_keeps_the_budget(sizes, budget, packed):
    rows = make_rows(sizes)
    packs = plan(rows, budget, packed)
    wanted = {(row.index, t): token for row in rows for t, token in enumerate(row.completion)}
    found = {}
    for pack in packs:
        places = list(zip(pack.row_K.tolist(), pack.column_K.tolist(), strict=True))
        assert not found.keys() & set(places)
        found |= dict(zip(places, pack.target_K.tolist(), strict=True))
        alone = len(set(pack.row_K.tolist())) == 1
        assert pack.token_ids.numel() <= budget or alone
    assert found == wanted


def test_each_prompt_once_in_a_group():
    rows = make_rows([(50, [4] * 8)])
    (pack,) = plan(rows, 1000, packed=True)
    assert pack.token_ids.numel() == 50 + 8 * 3 == stretches(rows)[0].tokens
    assert pack.prompt_tokens == 50


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


def test_entropy_is_that_of_the_distribution_and_has_a_gradient_when_asked(tiny):
    model = tiny()
    (pack,) = plan(make_rows([(9, [6])]), 1000, packed=True)
    _, entropy_K = score(model, pack, entropy=True)
    assert entropy_K.requires_grad
    assert not score(model, pack)[1].requires_grad
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        p = model(pack.token_ids).logits[0].softmax(-1)
    assert torch.allclose(entropy_K[0], -(p[8] * p[8].log()).sum(), atol=1e-4)
