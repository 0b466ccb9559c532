"""The optimizers against slow truths and against torch's own classes, saved and restored between any two steps; memory
parked on the host."""

import gc
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.config import OptimizerConfig
from common.errors import UserError
from learner.optimizer import HostOffload, MasterOptimizer
from tests.making import config

STOCHASTIC = {"master": "stochastic"}
KINDS = [
    {},
    {"name": "adamw_8bit"},
    {"name": "adamw_4bit"},
    {"name": "adafactor"},
    {"name": "muon"},
    STOCHASTIC,
    {"name": "adamw_8bit"} | STOCHASTIC,
    {"name": "adamw_4bit"} | STOCHASTIC,
]
MATRICES = {"layers.0.up", "layers.0.down"}
SHAPES = {"embed": (96, 64), "layers.0.up": (64, 128), "layers.0.down": (128, 64), "layers.0.norm": (64,)}


def named(kind):
    return " ".join(kind.values()) or "adamw"


def parameters(dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape).mul(0.1).to(dtype)) for name, shape in SHAPES.items()}


def made(model, seed=3, **fields):
    return MasterOptimizer(model.items(), OptimizerConfig(**fields), matrices=MATRICES, seed=seed)


def backward(model, number):
    """A gradient of this step's own: of the squared distance to a point that moves."""
    torch.manual_seed(100 + number)
    loss = sum(((p.float() - 0.1 * torch.randn(p.shape)) ** 2).sum() for p in model.values())
    loss.backward()


def stepped(optimizer, model, numbers, lr=1e-2):
    for number in numbers:
        backward(model, number)
        optimizer.clip()
        optimizer.step(lr)


def bits(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_adamw_is_the_papers():
    """Algorithm 2 of arXiv 1711.05101, a weight at a time in float64."""
    model = parameters(torch.float32)
    optimizer = made(model, weight_decay=0.1, betas=(0.8, 0.9), max_grad_norm=0.0)
    truth = {name: p.detach().numpy().astype(np.float64) for name, p in model.items()}
    first, second = ({name: np.zeros_like(value) for name, value in truth.items()} for _ in range(2))
    for t in range(1, 6):
        backward(model, t)
        grads = {name: p.grad.numpy().astype(np.float64) for name, p in model.items()}
        optimizer.step(0.01 * t)
        for name, grad in grads.items():
            decay = 0.1 if grad.ndim >= 2 else 0.0
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            change = (first[name] / (1 - 0.8**t)) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-8)
            truth[name] -= 0.01 * t * (change + decay * truth[name])
    for name, p in model.items():
        assert np.abs(p.detach().numpy() - truth[name]).max() < 1e-6, name


def test_adafactor_and_muon_are_torchs_own_on_float32_copies():
    for kind in ("adafactor", "muon"):
        model = parameters()
        optimizer = made(model, name=kind, weight_decay=0.1, max_grad_norm=0.0)
        copies = {name: nn.Parameter(p.detach().float()) for name, p in model.items()}
        rest = [p for name, p in copies.items() if name not in MATRICES]
        if kind == "adafactor":
            own = [torch.optim.Adafactor([p], lr=1e-2, weight_decay=0.1 * (p.dim() > 1)) for p in copies.values()]
        else:
            inner = [copies[name] for name in MATRICES]
            own = [torch.optim.Muon(inner, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
            own += [torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1 * (p.dim() > 1)) for p in rest]
        for number in range(4):
            backward(model, number)
            for name, (_, master) in optimizer._pairs.items():
                copies[name].grad = master.grad.clone()
            optimizer.step(1e-2)
            for one in own:
                one.step()
        state = optimizer.state()
        for name, copied in copies.items():
            assert torch.allclose(state[f"{name}/master"], copied, atol=1e-6), (kind, name)
            assert torch.equal(model[name], state[f"{name}/master"].bfloat16()), (kind, name)


def test_muons_steps_are_of_adamws_size_and_orthogonal():
    moved = {}
    for kind in ("adamw", "muon"):
        model = parameters()
        before = bits(model)
        stepped(made(model, name=kind), model, range(1))
        moved[kind] = {name: (model[name] - before[name]).float() for name in model}
    for name in MATRICES:
        ratio = moved["muon"][name].norm() / moved["adamw"][name].norm()
        assert 0.1 < ratio < 0.5, name  # the paper's 0.2: the usual size of AdamW's step, whose first one is 1
        values = torch.linalg.svdvals(moved["muon"][name])
        assert values[0] / values[-1] < 2.5, name
    assert torch.allclose(moved["muon"]["embed"], moved["adamw"]["embed"])


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2], *KINDS[5:]], ids=named)
def test_a_regression_is_learned_about_as_well_as_with_adamw(kind):
    """Mean squared error of a two-layer net after 80 steps: at most twice AdamW's on float32 master weights."""

    def error(**fields):
        torch.manual_seed(0)
        x, up, down = torch.randn(256, 64), torch.randn(64, 128) / 8, torch.randn(128, 64) / 11
        wanted = torch.tanh(x @ up) @ down
        model = parameters()
        optimizer = made(model, **fields)
        for step in range(80):
            out = torch.tanh(x @ model["layers.0.up"].float()) @ model["layers.0.down"].float()
            loss = ((out - wanted) ** 2).mean()
            loss.backward()
            optimizer.clip()
            optimizer.step(1e-2 * (1 - step / 80))
        return float(loss.detach())

    start = float((torch.tanh(torch.randn(256, 64)) ** 2).mean())
    truth = error()
    found = error(**kind)
    assert truth < 0.1 * start
    assert found < 2 * truth, (found, truth)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_restored_it_goes_on_bit_for_bit(kind, tmp_path):
    model = parameters()
    optimizer = made(model, **kind)
    stepped(optimizer, model, range(3))
    state = {name: tensor.contiguous().clone() for name, tensor in optimizer.state().items()}
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    save_file(state, tmp_path / "state.safetensors")
    stepped(optimizer, model, range(3, 6))

    read = load_file(tmp_path / "state.safetensors")
    other = parameters(seed=1)
    again = made(other, **kind)
    blank = again.blank_state(read)
    assert blank.keys() == read.keys()
    for key, tensor in blank.items():
        tensor.copy_(read[key])
    again.load_state(blank)
    torch.manual_seed(999)  # what is drawn outside has no part in it
    stepped(again, other, range(3, 6))
    assert same(bits(model), bits(other)) == []
    assert same(bits(optimizer.state()), bits(again.state())) == []


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_all_memory_is_there_from_the_start_and_reset_is_the_start(kind):
    model = parameters()
    optimizer = made(model, **kind)
    start = bits(model)
    at_first = bits(optimizer.state())
    places = {key: tensor.data_ptr() for key, tensor in optimizer.state().items()}
    stepped(optimizer, model, range(2))
    assert {key: tensor.data_ptr() for key, tensor in optimizer.state().items()} == places
    once = bits(model)
    assert len(same(start, once)) == len(start)

    optimizer.reset()
    weights = {key for key in at_first if key.endswith(("/master", "/weight"))}
    now = bits(optimizer.state())
    assert set(same(at_first, now)) <= weights
    optimizer.load_state(at_first)
    with torch.no_grad():
        for name, parameter in model.items():
            assert torch.equal(parameter, start[name])
    stepped(optimizer, model, range(2))
    assert same(once, bits(model)) == []


def test_bytes_kept_a_weight():
    """The module's figures, on the matrices."""
    wanted = {"adamw": 12, "adamw_8bit": 4 + 2, "adamw_4bit": 4 + 1, "adafactor": 4, "muon": 8, "stochastic": 2 + 8,
              "adamw_8bit stochastic": 2 + 2, "adamw_4bit stochastic": 2 + 1}  # fmt: skip
    for kind in KINDS:
        state = made(parameters(), **kind).state()
        for name in MATRICES:
            held = sum(tensor.nbytes for key, tensor in state.items() if key.startswith(name))
            each = held / (64 * 128)
            assert wanted[named(kind)] <= each < wanted[named(kind)] + 0.15, (kind, each)


@pytest.mark.slow
def test_stochastic_rounding_is_right_on_average_and_seeded():
    def walked(seed):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = MasterOptimizer([("w", weight)], OptimizerConfig(lr=1e-5, **STOCHASTIC), seed=seed)
        for _ in range(200):
            weight.float().sum().backward()
            optimizer.step(1e-5)
        return weight.detach().float()

    one = walked(1)
    # To nearest, bfloat16 would stay at 1: its neighbour below is 0.0039 away. 4096 weights: the mean is sharp.
    assert one.mean().item() == pytest.approx(1 - 200 * 1e-5, abs=2e-4)
    assert one.unique().numel() > 1
    assert torch.equal(one, walked(1))
    assert not torch.equal(one, walked(2))


def test_the_step_leaves_the_random_state_outside_alone():
    model = parameters()
    optimizer = made(model, **STOCHASTIC)
    backward(model, 0)
    torch.manual_seed(5)
    optimizer.step(1e-2)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("kind", KINDS[:5], ids=named)
def test_offloaded_it_takes_the_same_steps(kind):
    model, offloaded = parameters(), parameters()
    stepped(made(model, **kind), model, range(3))
    stepped(made(offloaded, offload=True, **kind), offloaded, range(3))
    assert same(bits(model), bits(offloaded)) == []


def test_compiled_it_is_seeded_too():
    """As on a GPU; a good ten seconds of compiling."""
    seen = []
    for seed in (3, 3, 4):
        weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        optimizer = MasterOptimizer([("w", weight)], OptimizerConfig(**STOCHASTIC), seed=seed, compiled=True)
        for _ in range(3):
            weight.float().sum().backward()
            torch.rand(seed)
            optimizer.step(1e-3)
        seen.append(weight.detach().clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"offload": True, "master": "stochastic"}}, r"optimizer\.offload=true keeps float32 master"),
        ({"optimizer": {"offload": True}}, r"optimizer\.offload=true works with one learner rank only"),
        ({"optimizer": {"name": "muon"}}, r"optimizer\.name='muon' cannot step .*learner_ranks=2"),
        ({"optimizer": {"name": "adamw_8bit"}}, r"optimizer\.name='adamw_8bit' cannot step"),
        ({"optimizer": {"master": "stochastic"}}, r"optimizer\.master='stochastic' cannot step"),
    ],
)
def test_what_cannot_stand_together_is_one_sentence(sections, said):
    cluster = {"mode": "ray", "learner_ranks": 2}
    with pytest.raises(UserError, match=said):
        config(model={"name": "unused", "dtype": "bfloat16"}, cluster=cluster, **sections)


def test_parked_tensors_are_the_same_when_they_come_back():
    base = torch.randn(8, 6)
    tied, view, weight = base, base[2:5, 1:], nn.Parameter(torch.randn(7).bfloat16())
    codes = torch.randint(0, 255, (9,), dtype=torch.uint8)
    other = torch.randn(3)
    before = [t.detach().clone() for t in (base, view, weight, codes)]
    first = HostOffload([base, tied, view, weight])
    second = HostOffload([weight, codes, other], besides=first)
    second.offload()
    assert codes.untyped_storage().size() == 0 and weight.untyped_storage().size() > 0
    first.offload()
    first.offload()
    for t in (base, view, weight):
        assert t.untyped_storage().size() == 0
    assert torch.equal(first.held(view), before[1])
    assert torch.equal(first.held(weight), before[2])
    assert torch.equal(second.held(codes), before[3])
    first.onload()
    first.onload()
    second.onload()
    for t, was in zip((base, view, weight, codes), before, strict=True):
        assert torch.equal(t, was)
        assert first.held(t) is t
    view.add_(1)
    assert torch.equal(base[2:5, 1:], before[1] + 1)  # still one memory


def test_a_parameter_that_no_pass_reaches_is_not_stepped():
    """Of blank gradients those that nothing was added to go; the rest are what they would have been without."""
    made = []
    for blank in (False, True):
        torch.manual_seed(0)
        used, idle = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        spec = OptimizerConfig(lr=0.1, weight_decay=0.1)
        optimizer = MasterOptimizer([("used", used), ("idle", idle)], spec)
        before = idle.detach().clone()
        for _ in range(2):
            if blank:
                optimizer.blank_gradients()
            for _ in range(2):
                (used * 3).sum().backward()
            optimizer.drop_blanks()
            optimizer.step(0.1)
        assert torch.equal(idle, before)
        made.append(used.detach())
    assert torch.equal(*made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_is_let_go_is_gone(dtype):
    parameter = torch.nn.Parameter(torch.randn(4, 4, dtype=dtype))
    optimizer = MasterOptimizer([("one", parameter)], OptimizerConfig())
    parameter.sum().backward()
    gone = [weakref.ref(optimizer), weakref.ref(parameter)]
    del optimizer, parameter
    gc.collect()
    assert [one() for one in gone] == [None, None]
