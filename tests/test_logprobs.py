"""The hand-written backward pass of the output head: against autograd in float32, and where bfloat16 could cancel."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from learner import token_logprobs
from learner.batch import packing
from learner.batch.packing import Row
from learner.token_logprobs import Drawn

V, D, K = 384, 64, 40


class OneLayer:
    """As much of a model as the head's pass asks for: what it is given are the hidden states."""

    def __init__(self, head, **config):
        self.head, self.config = head, SimpleNamespace(_attn_implementation="", **config)

    def get_output_embeddings(self):
        return self.head


def made_up_pack(position, target):
    """Tokens of one row, each predicted at its position; and where each stands in the pack's order."""
    pack = SimpleNamespace(**packing._targets([(position, Row(0, (0,), tuple(target.tolist())))]))
    return pack, pack.column_K


# Each position once; a few positions over and over, some with the same token again.
POSITIONS = {"once": torch.arange(K), "again": torch.arange(K) % 7}


def truth(head, hidden, target, drawn, cap=None, scale=1.0):
    logits = head(hidden).float()
    if cap:
        logits = torch.tanh(logits / cap) * cap
    logits = logits * scale / drawn.temperature
    if drawn.top_k:
        out = logits < logits.topk(drawn.top_k).values[:, -1:]
        logits = logits.masked_fill(out.scatter(1, target[:, None], False), -1e30)
    log_p = logits.log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)


@pytest.mark.parametrize(
    ("drawn", "config"),
    [
        (Drawn(), {}),
        (Drawn(temperature=0.7, chunk=16), {}),
        (Drawn(top_k=9, temperature=1.3), {}),
        (Drawn(chunk=33), {"final_logit_softcapping": 3.0}),
        (Drawn(), {"logits_scaling": 4.0}),
        (Drawn(temperature=2.0), {"logit_scale": 0.5, "final_logit_softcapping": 5.0}),
    ],
)
@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("positions", POSITIONS)
def test_gradients_are_autograds(drawn, config, entropy, positions):
    torch.manual_seed(0)
    head, target, position = nn.Linear(D, V), torch.randperm(V)[:K], POSITIONS[positions]
    if positions == "again":
        target = target[torch.arange(K) % 14]
    hidden, weight = torch.randn(K, D, requires_grad=True), torch.randn(K)
    scale = config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    expected = truth(head, hidden[position], target, drawn, config.get("final_logit_softcapping"), scale)
    leaves = [hidden, *head.parameters()]
    loss = (weight * expected[0]).sum() + entropy * (weight * expected[1]).sum()
    wanted = torch.autograd.grad(loss, leaves)
    inner = token_logprobs._Head(OneLayer(head, **config), drawn)
    pack, order = made_up_pack(position, target)
    chunks, rows, weight = inner.chunks(pack), hidden[inner.positions(pack)], weight[order]
    assert len(rows) == (K if positions == "once" else 14 if drawn.cuts else 7)

    found = token_logprobs._Score.apply(inner, chunks, rows, *inner.parameters)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other[order], atol=1e-5)
    scored = (weight * found[0]).sum() + entropy * (weight * found[1]).sum()

    def loss_of(logprob, spread, part):
        spread = spread if entropy else spread.detach()
        return (weight[part] * (logprob + entropy * spread)).sum(), {"tokens": torch.tensor(float(len(logprob)))}

    stats = []
    learned = token_logprobs._Learn.apply(inner, chunks, loss_of, stats, rows, *inner.parameters)
    assert sum(float(one["tokens"]) for one in stats) == K
    for result in (scored, learned):
        assert torch.allclose(result, loss, atol=1e-4)
        for one, other in zip(torch.autograd.grad(result, leaves, retain_graph=True), wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-5), (one - other).abs().max()


@pytest.mark.parametrize("probability", [0.5, 0.99, 0.9999])
def test_confident_tokens_keep_their_gradient_in_bfloat16(probability):
    """g - g p cancels where p is near 1; autograd's own bfloat16 pass, which subtracts in float32, is the measure."""
    torch.manual_seed(0)
    head, target = nn.Linear(D, V, bias=False).bfloat16(), torch.randint(V, (K,))
    hidden = torch.randn(K, D)
    with torch.no_grad():  # along the target's row until it has the probability
        row = head.weight.float()[target]
        for _ in range(60):
            p = head.float()(hidden).softmax(-1).gather(1, target[:, None])
            hidden += (torch.logit(torch.tensor(probability)) - torch.logit(p, 1e-6)) * row / row.square().sum(1, True)
        head.bfloat16()
    hidden, weight = hidden.bfloat16(), torch.randn(K)

    def gradient(of):
        leaf = hidden.detach().clone().requires_grad_()
        return torch.autograd.grad((weight * of(leaf)).sum(), leaf)[0].float()

    inner, (pack, _) = token_logprobs._Head(OneLayer(head), Drawn()), made_up_pack(torch.arange(K), target)
    ours = gradient(lambda leaf: token_logprobs._Score.apply(inner, inner.chunks(pack), leaf, *inner.parameters)[0])
    plain = gradient(lambda leaf: truth(head, leaf, target, Drawn())[0])
    exact_head = nn.Linear(D, V, bias=False)
    exact_head.weight.data = head.weight.detach().float()
    exact = gradient(lambda leaf: truth(exact_head, leaf.float(), target, Drawn())[0])
    assert (ours - exact).norm() < 2 * (plain - exact).norm() + 1e-3 * exact.norm()
