"""The whole update through the packed path, against the padded one and against TRL's own numbers.

The slow truth: each sequence alone through the plain model, its log-probs and entropies into TRL's ``_compute_loss``,
the gradients that TRL gives back on to the weights by autograd, and torch's own AdamW. Groups are unequal, one
completion is empty, several advantages are zero.
"""

import dataclasses
import functools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner.attention import packed_cpu
from learner.loss import advantages
from learner.torch_learner import TorchLearner
from learner.train import Loop, train
from tests import trl_reference
from tests.making import config, group
from tests.test_sync import Separate
from tests.tiny import make_model, make_tiny

packed_cpu.register()
LONGEST = 8  # sampler.max_tokens in tests/making.py
# eps as large as the gradients: AdamW's step then keeps their size, instead of their sign alone.
OPTIMIZER = {"lr": 0.02, "eps": 1.0, "max_grad_norm": 0, "betas": (0.9, 0.95), "weight_decay": 0.0}
SPECS: list[dict[str, Any]] = [
    {"loss": "grpo"},
    {"loss": "dapo", "importance_level": "sequence", "importance": "mask"},
    {"loss": "dapo"},
    {"loss": "dr_grpo", "kl_coef": 0.2},
    {"loss": "cispo", "clip_high": 1.5, "entropy_coef": 0.05},
    {"loss": "sapo", "importance": "off"},
    {"loss": "dapo", "ratio": "sequence", "importance": "off", "kl_coef": 0.1, "entropy_coef": 0.02},
    {"loss": "grpo", "inner_updates": 2, "clip_low": 0.01, "clip_high": 0.02, "kl_coef": 0.1},
    {"loss": "dapo", "inner_updates": 2, "ratio": "sequence", "importance_level": "sequence"},
    {"loss": "dapo", "inner_updates": 2, "importance": "mask", "delta": 1.05, "clip_high": 0.01},
    {"loss": "dr_grpo", "inner_updates": 2, "ratio": "sequence", "importance": "off"},
    {"loss": "cispo", "inner_updates": 2, "clip_high": 1.01, "importance_level": "sequence", "importance": "truncate"},
    {"loss": "sapo", "inner_updates": 2, "kl_coef": 0.1, "entropy_coef": 0.02},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def groups():
    """Four completions a prompt. The sampler's log-probs are near the model's, as a run's are."""
    model = fresh()
    made = [group(5, [3, 1, 8, 2], seed=1), group(40, [8, 0, 4, 1], seed=2), group(9, [2, 6, 5, 7], seed=3)]
    zero = {(0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)}  # among them a whole group
    draw = torch.Generator().manual_seed(4)
    out = []
    for g, one in enumerate(made):
        completions = []
        for c, each in enumerate(one.completions):
            near = each
            if each.token_ids:
                with torch.no_grad():
                    own_T, _ = read(model, one.prompt.token_ids, each.token_ids)
                noise_T = 0.6 * torch.randn(own_T.shape, generator=draw)
                near = dataclasses.replace(each, logprobs=tuple((own_T + noise_T).tolist()))
            completions.append(dataclasses.replace(near, advantage=0.0 if (g, c) in zero else each.advantage))
        out.append(dataclasses.replace(one, completions=tuple(completions)))
    return out


def fresh():
    """The folder's model, without a file: the same seed makes the same weights."""
    model = make_model("llama")
    model.config._attn_implementation = "eager"
    return model


def read(model, prompt, completion):
    """Log-probs and entropies [T] of a completion, by a plain pass over its sequence alone."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(completion)[:, None])[:, 0], -(logits.exp() * logits).sum(-1)


def padded(rows_T):
    return torch.stack([torch.nn.functional.pad(row_T, (0, LONGEST - len(row_T))) for row_T in rows_T])


def read_all(model, groups):
    pairs = [(one.prompt.token_ids, each.token_ids) for one in groups for each in one.completions]
    found = [read(model, *pair) if pair[1] else (torch.zeros(0), torch.zeros(0)) for pair in pairs]
    return [padded(column) for column in zip(*found, strict=True)]


def by_trl(groups, spec):
    """Weights after the update, and the loss of its last step."""
    model, completions = fresh(), [each for one in groups for each in one.completions]
    lengths_B = torch.tensor([len(each.token_ids) for each in completions])
    batch = {
        "sampler_BT": padded([torch.tensor(each.logprobs) for each in completions]),
        "mask_BT": (torch.arange(LONGEST) < lengths_B[:, None]).float(),
        "lengths_B": lengths_B,
        "rewards_B": torch.zeros(len(completions)),
        "advantages_B": torch.tensor([each.advantage for each in completions]),
        "group_size": 4,
    }
    importance = spec.get("importance", "truncate")
    words = {
        "loss_type": spec["loss"],
        "level": spec.get("ratio", "token"),
        "delta": spec.get("delta"),
        "importance": None if importance == "off" else f"{spec.get('importance_level', 'token')}_{importance}",
        "max_tokens": LONGEST,
        **{key: spec[key] for key in ("clip_low", "clip_high", "kl_coef", "entropy_coef") if key in spec},
    }
    with torch.no_grad():
        old_BT, _ = read_all(model, groups)
    optimizer = torch.optim.AdamW(
        model.parameters(), **{key: OPTIMIZER[key] for key in ("lr", "eps", "betas", "weight_decay")}
    )
    for _ in range(spec.get("inner_updates", 1)):
        logprobs_BT, entropy_BT = read_all(model, groups)
        told = trl_reference.run(
            logprobs_BT=logprobs_BT.detach(), entropy_BT=entropy_BT.detach(), old_BT=old_BT, reference_BT=old_BT,
            **batch, **words,
        )  # fmt: skip
        optimizer.zero_grad()
        torch.autograd.backward((logprobs_BT, entropy_BT), (told.gradient_BT, told.entropy_gradient_BT))
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, told.loss


def by_us(folder, groups, spec, **settings):
    learner = TorchLearner(config(learner={**spec, **settings}, optimizer=OPTIMIZER), folder, "cpu")
    metrics = learner.update(groups)
    return {name: p.detach() for name, p in learner._model.named_parameters()}, metrics


@functools.cache
def before():
    return {name: p.detach() for name, p in fresh().named_parameters()}


def assert_moved_alike(one, other):
    assert one.keys() == other.keys() == before().keys()
    moved = {name: other[name] - before()[name] for name in other}
    largest = max(float(change.norm()) for change in moved.values())
    assert largest > 1e-3
    for name, change in moved.items():  # a change that is nothing but rounding is compared with the largest
        error = (one[name] - before()[name] - change).norm() / change.norm().clamp_min(1e-2 * largest)
        assert error < 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: " ".join(f"{key}={value}" for key, value in spec.items()))
def test_a_packed_update_is_the_padded_one_and_trls(folder, groups, spec):
    wanted, loss = by_trl(groups, spec)
    whole, metrics = by_us(folder, groups, spec, packing="packed", microbatch_tokens=10**6)
    assert metrics["packed"] == 1
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert_moved_alike(whole, wanted)
    cut, _ = by_us(folder, groups, spec, packing="packed", microbatch_tokens=50)
    assert_moved_alike(cut, wanted)
    repeated, metrics = by_us(folder, groups, spec, packing="padded", microbatch_tokens=100)
    assert metrics["packed"] == 0
    assert_moved_alike(repeated, wanted)


@pytest.mark.parametrize(
    "spec",
    [
        {"loss": "dapo"},
        {"loss": "grpo", "kl_coef": 0.2, "inner_updates": 2},
        {"loss": "dr_grpo", "entropy_coef": 0.05},
        {"loss": "cispo", "kl_coef": 0.1, "entropy_coef": 0.02, "inner_updates": 2, "clip_high": 1.5},
    ],
    ids=lambda spec: spec["loss"],
)
def test_a_step_of_the_loop_with_groups_without_signal_is_trls(folder, groups, spec):
    """The middle group's rewards are equal, but for rounding: the averages count it, its KL and entropy stay."""
    rewards = [[1.0, 0.0, 0.5, 0.0], [0.1 + 0.2, 0.15 + 0.15, 0.3, 0.3], [0.0, 0.0, 0.0, 1.0]]
    scored = [
        dataclasses.replace(
            one, completions=tuple(dataclasses.replace(c, reward=r) for c, r in zip(one.completions, own, strict=True))
        )
        for one, own in zip(groups, rewards, strict=True)
    ]
    made = config(learner=spec, optimizer=OPTIMIZER, train={"steps": 1, "prompts_per_step": 3, "group_size": 4},
                  eval={"questions": 0})  # fmt: skip
    learner = TorchLearner(made, folder, "cpu")
    done: Future[Any] = Future()
    done.set_result(scored)
    rows: list[dict[str, float]] = []
    nothing = SimpleNamespace(
        generate=lambda prompts, params: done, state=dict,
        begin=lambda: SimpleNamespace(result=lambda groups: (groups, [])),
        take=lambda count: [one.prompt for one in scored], phase=lambda text: None, rollouts=lambda *step: None,
        log=lambda step, metrics: rows.append(metrics), save=lambda *state: None, passed_over=0,
    )  # fmt: skip
    loop = Loop(
        made, learner, nothing, Separate(), nothing, nothing, dict, nothing, nothing, lambda: 0.0, lambda: 0, 60.0
    )  # type: ignore[arg-type]
    assert train(loop, lambda step: None, lambda: False)
    wanted, loss = by_trl(advantages.assign(scored, "zscore"), spec)
    (metrics,) = rows
    assert metrics["groups"] == 2
    assert metrics["zero_variance_fraction"] == pytest.approx(1 / 3)
    assert metrics["tokens_learned"] == sum(len(c.token_ids) for one in scored for c in one.completions)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert_moved_alike({name: p.detach() for name, p in learner._model.named_parameters()}, wanted)


def test_every_choice_is_met():
    for key, values in {
        "loss": {"grpo", "dapo", "dr_grpo", "cispo", "sapo"},
        "ratio": {"token", "sequence"},
        "importance": {"off", "truncate", "mask"},
        "importance_level": {"token", "sequence"},
        "inner_updates": {1, 2},
    }.items():
        default = {"ratio": "token", "importance": "truncate", "importance_level": "token", "inner_updates": 1}
        assert {spec.get(key, default.get(key)) for spec in SPECS} == values
