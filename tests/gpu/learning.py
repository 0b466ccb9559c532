"""The learner's checks: output head, updates, optimizers, memory.

The truth is float32 on the CPU; what is compared with what is in ``tests/test_logprobs.py`` and
``tests/test_optim.py``.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from common.config import load
from common.device import dtype_of, quick_dtype
from learner import token_logprobs
from learner.torch_learner import TorchLearner
from tests.gpu.place import GIB, device, folder_of, seconds
from tests.gpu.runner import Report, Skip
from tests.making import GROUPS, config, group

# -- head, updates -----------------------------------------------------------------------------------------------------


def head(report: Report) -> None:
    """The output head's log-probs, entropies and gradients against autograd over all logits in float32."""
    from learner.token_logprobs import SamplingTransform
    from tests.test_logprobs import POSITIONS, D, K, OneLayer, V, Weighted, made_up_pack, truth

    where = device()
    wrong = []
    cases: list[tuple[SamplingTransform, dict[str, float]]] = [
        (SamplingTransform(chunk=16), {}),
        (SamplingTransform(temperature=0.7, top_k=9), {}),
        (SamplingTransform(temperature=2.0), {"final_logit_softcapping": 5.0, "logit_scale": 0.5}),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        worst = 0.0
        for drawn, settings in cases if dtype == torch.float32 else cases[::2]:  # rounding moves a cut
            torch.manual_seed(0)
            layer, target = nn.Linear(D, V).to(dtype), torch.randperm(V)[:K]
            position = POSITIONS["again"]
            target = target[torch.arange(K) % 14]
            hidden, weight = torch.randn(K, D).to(dtype), torch.randn(K)
            exact, leaf = nn.Linear(D, V), hidden.float().requires_grad_()
            exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
            cap, scale = settings.get("final_logit_softcapping"), settings.get("logit_scale", 1.0)
            logprob_K, entropy_K = truth(exact, leaf[position], target, drawn, cap, scale)
            loss = (weight * logprob_K).sum() + 0.3 * (weight * entropy_K).sum()
            wanted = [logprob_K, entropy_K, *torch.autograd.grad(loss, [leaf, *exact.parameters()])]

            pack, order = made_up_pack(position, target)
            for name, value in vars(pack).items():
                if isinstance(value, torch.Tensor):
                    setattr(pack, name, value.to(where))
            layer, mine = layer.to(where), hidden.to(where).requires_grad_()
            model = OneLayer(layer, mine, **settings)
            got = token_logprobs.token_logprobs(model, pack, drawn)
            token_logprobs.forward_backward(model, pack, Weighted(weight[order].to(where), 0.3, False), drawn)
            gradients = [mine.grad, *(parameter.grad for parameter in layer.parameters())]
            back = torch.argsort(order)
            found = [*(one.cpu()[back] for one in got), *gradients]
            for one, other in zip(found, wanted, strict=True):
                worst = max(worst, float((one.detach().float().cpu() - other.detach()).norm() / other.detach().norm()))
        allowed = 1e-4 if dtype == torch.float32 else 3e-2
        report.note(**{f"{str(dtype).removeprefix('torch.')}_error": worst})
        if not worst < allowed:
            wrong.append(f"{dtype}: off by {worst:.2g}, allowed {allowed:g}")
    assert not wrong, "; ".join(wrong)


UPDATES: list[dict[str, Any]] = [
    {},
    {"loss": "grpo", "importance_level": "sequence"},
    {"loss": "dr_grpo", "kl_coef": 0.1, "inner_updates": 2},
    {"loss": "dapo", "ratio": "sequence", "inner_updates": 2, "delta": 1.5},
    {"loss": "cispo", "clip_high": 4.0, "entropy_coef": 0.01},
    {"loss": "sapo", "importance": "mask", "inner_updates": 3, "gradient_checkpointing": True},
]


def updates(report: Report) -> None:
    """A float32 update with every loss: packed in micro-batches here, padded in one pass on the CPU."""
    where = device()
    eps = {"lr": 1e-3, "eps": 1.0}  # a large eps: AdamW's step keeps the gradient's size, instead of its sign alone
    worst, worst_metric = 0.0, 0.0
    with folder_of() as folder:
        for spec in UPDATES if where != "cpu" else UPDATES[:2]:
            learners = []
            for place, cut in (("cpu", {"packing": "padded"}), (where, {"packing": "packed", "microbatch_tokens": 30})):
                learner = TorchLearner(config(learner={**spec, **cut, "compile": "off"}, optimizer=eps), folder, place)
                learners.append((learner, learner.update(GROUPS)))
            (truth, wanted), (mine, found) = learners
            start = load_file(folder / "model.safetensors")
            for name, p in mine._model.named_parameters():
                moved = dict(truth._model.named_parameters())[name].detach() - start[name]
                off = (p.detach().cpu() - start[name] - moved).norm() / moved.norm().clamp_min(1e-7)
                worst = max(worst, float(off))
            keys = ("loss", "grad_norm", "entropy", "logprob_diff_mean")
            for key in [key for key in keys if key in wanted]:
                worst_metric = max(worst_metric, abs(found[key] - wanted[key]) / max(1e-3, abs(wanted[key])))
            report.note(step_error=worst, metric_error=worst_metric)
    assert worst < 1e-2, f"the steps are off by {worst:.2g}"
    assert worst_metric < 1e-2, f"a metric is off by {worst_metric:.2g}"


def bfloat16(report: Report) -> None:
    """Training steps in bfloat16: finite, in float32's direction, compiled and not; tokens a second."""
    where = device()
    if quick_dtype(where) != "bfloat16":
        raise Skip("this device has no instructions for bfloat16")
    eps = {"lr": 1e-3, "eps": 1.0}
    with folder_of() as folder:
        start, moved = load_file(folder / "model.safetensors"), {}
        kinds: list[tuple[str, str, str]] = [("truth", "float32", "off"), ("plain", "bfloat16", "off")]
        if where != "cpu":
            kinds.append(("compiled", "bfloat16", "on"))
        for name, dtype, compiled in kinds:
            spec = config(
                model={"name": "unused", "dtype": dtype}, learner={"compile": compiled, "microbatch_tokens": 64},
                optimizer=eps,
            )  # fmt: skip
            learner = TorchLearner(spec, folder, "cpu" if name == "truth" else where)
            metrics = learner.update(GROUPS)
            state = learner._optimizer.state()
            before = {key: value.to(dtype_of(dtype)).float() for key, value in start.items()}
            moved[name] = torch.cat([(state[f"{key}/master"].cpu() - before[key]).flatten() for key in sorted(start)])
            assert all(value == value for value in metrics.values()), metrics
            if name != "truth":
                alike = float(torch.cosine_similarity(moved[name], moved["truth"], dim=0))
                report.note(**{f"{name}_loss": metrics["loss"], f"{name}_direction_cosine": alike})
                assert alike > 0.97, f"{name}: the step goes another way than float32's (cosine {alike:.3f})"
                if where == "cpu":  # the benchmarks measure it
                    continue
                longer = [group(40, [30] * 8, seed=seed) for seed in range(8)]
                tokens = learner.update(longer)["tokens_computed"]
                took = seconds(where, lambda learner=learner, longer=longer: learner.update(longer))
                report.note(**{f"{name}_tokens_per_s": tokens / took})


# -- optimizers --------------------------------------------------------------------------------------------------------


def optimizers(report: Report) -> None:
    """Every optimizer: the same steps here as on the CPU, the same with offload, and saved and restored bit for bit."""
    from common.config import OptimizerConfig
    from learner.optimizer import HostOffload, MasterOptimizer
    from tests.test_optim import KINDS, MATRICES, named, parameters

    where = device()
    has_torchao = importlib.util.find_spec("torchao") is not None
    left_out, wrong = [], []

    def walked(place: str, steps: int = 3, state: Any = None, **fields: Any) -> tuple[Any, Any]:
        model = {name: nn.Parameter(p.detach().to(place)) for name, p in parameters().items()}
        optimizer = MasterOptimizer(
            model.items(), OptimizerConfig(**fields), matrices=MATRICES, seed=3, compiled=place != "cpu"
        )
        if state is not None:
            optimizer.load_state({name: value.to(place) for name, value in state.items()})
        for number in range(steps):
            torch.manual_seed(100 + number)
            points = [0.1 * torch.randn(p.shape) for p in model.values()]
            losses = [
                ((p.float() - point.to(place)) ** 2).sum() for p, point in zip(model.values(), points, strict=True)
            ]
            torch.stack(losses).sum().backward()
            optimizer.clip()
            optimizer.step(1e-2)
        return model, optimizer

    for kind in KINDS if where != "cpu" else KINDS[:1] + KINDS[3:5]:
        if (kind.get("name", "").endswith("bit") or kind.get("master")) and not has_torchao:
            left_out.append(named(kind))
            continue
        started = time.perf_counter()
        name = named(kind).replace(" ", "_")
        mine, optimizer = walked(where, **kind)
        truth, _ = walked("cpu", **kind)
        start = parameters()
        moved = torch.cat([(truth[key] - start[key]).detach().float().flatten() for key in start])
        found = torch.cat([(mine[key].cpu() - start[key]).detach().float().flatten() for key in start])
        off = float((found - moved).norm() / moved.norm())
        report.note(**{f"{name}_error": off, f"{name}_s": time.perf_counter() - started})
        # What rounds at random draws another way on another device; a bfloat16 weight near 0.1 moves by 1e-2 a step.
        if not off < (0.1 if kind.get("master") or kind.get("name", "").endswith("bit") else 0.02):
            wrong.append(f"{name}: its steps are off by {off:.2g}")
        state = {key: value.detach().cpu().clone() for key, value in optimizer.state().items()}
        one, _ = walked(where, steps=1, state=state, **kind)
        other, _ = walked(where, steps=1, state=state, **kind)
        if any(not torch.equal(one[key], other[key]) for key in one):
            wrong.append(f"{name}: two steps from one state differ")
        if where != "cpu" and not kind.get("master"):
            away, _ = walked(where, offload=True, **kind)
            apart = max(float((away[key] - mine[key]).abs().max()) for key in mine)
            report.note(**{f"{name}_offloaded_apart": apart})
            if not apart < 2e-2:
                wrong.append(f"{name}: offloaded it is {apart:.2g} off")
    if left_out:
        report.note(left_out=f"{', '.join(left_out)}: torchao is not installed")

    tensors = [torch.randn(1 << 20, device=where), torch.randn(1 << 10, device=where).bfloat16()]
    before, offloaded = [one.clone() for one in tensors], HostOffload(tensors)
    held = torch.cuda.memory_allocated() if where != "cpu" else 0
    offloaded.offload()
    if where != "cpu":
        report.note(offload_frees_mib=(held - torch.cuda.memory_allocated()) / 2**20)
        assert held - torch.cuda.memory_allocated() >= 4 << 20, "offloaded tensors keep their memory"
    assert torch.equal(offloaded.held(tensors[0]), before[0].cpu())
    offloaded.onload()
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True)), (
        "offloaded tensors came back changed"
    )
    assert not wrong, "; ".join(wrong)


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(report: Report) -> None:
    """The learner's planned peak against what the card's allocator saw, full weights and LoRA, and tokens a second."""
    from learner import memory_estimate as memories
    from learner import rehearsal
    from learner.model import resolve
    from tests.benchmarks.memory import GROUP_SIZE, LONG, METHODS, SHORT, random_model

    where = device()
    if (free := torch.cuda.mem_get_info()[0]) < 12 * GIB:
        raise Skip(f"full weights of 0.5 B need 12 GiB, and {free / GIB:.1f} are free")
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        folder = str(random_model("Qwen2.5-0.5B", Path(place)))
        for method in METHODS:
            for label, lengths, prompts in (("short", SHORT, 4), ("long", LONG, 2)):
                spec = load(None, [
                    f"model.name={folder}", "model.dtype=bfloat16", f"sampler.max_tokens={lengths[1]}",
                    f"learner.microbatch_tokens={lengths[2]}", "learner.compile=off",
                    f"train.group_size={GROUP_SIZE}", f"train.prompts_per_step={prompts}", *METHODS[method],
                ])  # fmt: skip
                planned = memories.measure(spec, resolve.prepare(spec.model), lengths[0], on_cpu=False)
                peak = max(sum(parts.values()) for parts in planned.phases.values())
                gc.collect()
                torch.cuda.empty_cache()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                learner = TorchLearner(spec, Path(folder), where)
                groups = rehearsal.longest_groups(spec, lengths[0])
                tokens = learner.update(groups)["tokens_computed"]
                took = seconds(where, lambda learner=learner, groups=groups: learner.update(groups), times=2)
                real = torch.cuda.max_memory_allocated() - held
                key = f"{method}_{label}"
                report.note(**{
                    f"{key}_planned_gib": peak / GIB, f"{key}_measured_gib": real / GIB,
                    f"{key}_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
                    f"{key}_error": peak / real - 1, f"{key}_tokens_per_s": tokens / took,
                })  # fmt: skip
                if not abs(peak / real - 1) < 0.15:
                    wrong.append(f"{key}: planned {peak / GIB:.2f} GiB, measured {real / GIB:.2f}")
                del learner
    assert not wrong, "; ".join(wrong)
