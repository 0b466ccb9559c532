"""The hand-written backward pass of the output head: against autograd in float32, and where bfloat16 could cancel."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from learner import token_logprobs
from learner.batch import packing
from learner.batch.packing import Row
from learner.token_logprobs import SamplingTransform

V, D, K = 384, 64, 40


class OneLayer:
    """As much of a model as a pass asks for; ``hidden`` are its states."""

    def __init__(self, head, hidden=None, **config):
        self.head, self.hidden = head, hidden
        self.config = SimpleNamespace(_attn_implementation="", **config)

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        return lambda **inputs: SimpleNamespace(last_hidden_state=self.hidden[None])


def made_up_pack(position, target):
    """Tokens of one row, each predicted at its position; and where each stands in the pack's order."""
    pack = SimpleNamespace(
        layout=None, token_ids=None, attention_mask=None, position_ids=None,
        **packing._targets([(position, Row(0, (0,), tuple(target.tolist())))]),
    )  # fmt: skip
    return pack, pack.column_K


@dataclass
class Weighted:
    weight: torch.Tensor
    entropy: float
    by_sequence: bool

    def __call__(self, logprob, entropy, part):
        entropy = entropy if self.entropy else entropy.detach()
        loss = (self.weight[part] * (logprob + self.entropy * entropy)).sum()
        return loss, {"loss": loss.detach(), "tokens": torch.tensor(float(len(logprob)))}


# Each position once; a few positions over and over, some with the same token again.
POSITIONS = {"once": torch.arange(K), "again": torch.arange(K) % 7}


def truth(head, hidden, target, transform, cap=None, scale=1.0):
    logits = head(hidden).float()
    if cap:
        logits = torch.tanh(logits / cap) * cap
    logits = logits * scale / transform.temperature
    if transform.top_k:
        out = logits < logits.topk(transform.top_k).values[:, -1:]
        logits = logits.masked_fill(out.scatter(1, target[:, None], False), -1e30)
    log_p = logits.log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)


@pytest.mark.parametrize(
    ("transform", "config"),
    [
        (SamplingTransform(), {}),
        (SamplingTransform(temperature=0.7, chunk=16), {}),
        (SamplingTransform(top_k=9, temperature=1.3), {}),
        (SamplingTransform(chunk=33), {"final_logit_softcapping": 3.0}),
        (SamplingTransform(), {"logits_scaling": 4.0}),
        (SamplingTransform(temperature=2.0), {"logit_scale": 0.5, "final_logit_softcapping": 5.0}),
    ],
)
@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("positions", POSITIONS)
def test_gradients_are_autograds(transform, config, entropy, positions):
    torch.manual_seed(0)
    head, target, position = nn.Linear(D, V), torch.randperm(V)[:K], POSITIONS[positions]
    if positions == "again":
        target = target[torch.arange(K) % 14]
    hidden, weight = torch.randn(K, D, requires_grad=True), torch.randn(K)
    scale = config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    expected = truth(head, hidden[position], target, transform, config.get("final_logit_softcapping"), scale)
    leaves = [hidden, *head.parameters()]
    loss = (weight * expected[0]).sum() + entropy * (weight * expected[1]).sum()
    wanted = torch.autograd.grad(loss, leaves)
    model = OneLayer(head, hidden, **config)
    pack, order = made_up_pack(position, target)
    rows = token_logprobs._Head(model, transform).positions(pack)
    assert len(rows) == (K if positions == "once" else 14 if transform.cuts else 7)
    for value, other in zip(token_logprobs.token_logprobs(model, pack, transform), expected, strict=True):
        assert torch.allclose(value, other[order], atol=1e-5)
    for by_sequence in (False, True):
        for leaf in leaves:
            leaf.grad = None
        weighted = Weighted(weight[order], entropy, by_sequence)
        stats = token_logprobs.forward_backward(model, pack, weighted, transform)
        assert sum(float(part["tokens"]) for part in stats) == K
        assert sum(float(part["loss"]) for part in stats) == pytest.approx(loss.item(), abs=1e-4)
        for leaf, other in zip(leaves, wanted, strict=True):
            assert torch.allclose(leaf.grad, other, atol=1e-5), (leaf.grad - other).abs().max()


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

    pack, _ = made_up_pack(torch.arange(K), target)
    leaf = hidden.detach().clone().requires_grad_()
    token_logprobs.forward_backward(OneLayer(head, leaf), pack, Weighted(weight, 0.0, False))
    ours = leaf.grad.float()
    plain = gradient(lambda leaf: truth(head, leaf, target, SamplingTransform())[0])
    exact_head = nn.Linear(D, V, bias=False)
    exact_head.weight.data = head.weight.detach().float()
    exact = gradient(lambda leaf: truth(exact_head, leaf.float(), target, SamplingTransform())[0])
    assert (ours - exact).norm() < 2 * (plain - exact).norm() + 1e-3 * exact.norm()
