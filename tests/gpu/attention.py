"""The checks of packed attention: each kernel alone, then whole passes of many families.

The truth is dense or padded float32 on the CPU, which the ordinary tests hold to still slower ones
(``tests/parity.py``).
"""

from __future__ import annotations

from typing import Any

import torch

from learner.attention import packed_cpu, packed_gpu
from tests import parity
from tests.gpu.place import device, seconds
from tests.gpu.runner import Report
from tests.tiny import make_model

SCALE = 0.3
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt2", "olmoe")


def kernels(report: Report) -> None:
    """Packed attention, forward and backward, against dense float32 under a mask made by nested loops."""
    where = device()
    few = [(None, None), (7, None), (16, 0.5)]  # flex_attention is compiled for each, some ten seconds a time
    wide = [(4, 2, 64), (4, 4, 128), (6, 2, 96), (4, 1, 256)]
    ways: list[tuple[str, torch.dtype, Any, list[Any], list[Any]]] = [
        ("flex float32", torch.float32, packed_gpu.attend, wide[:1], few),
        ("flex bfloat16", torch.bfloat16, packed_gpu.attend, wide, few),
    ]
    if where == "cpu":
        ways = [("tiled float32", torch.float32, _tiled, wide[:1], parity.WAYS)]
    wrong = []
    for way, dtype, call, shapes, settings in ways:
        # Of bfloat16's 8 bits of mantissa; a wrong mask, scale or head is off by a tenth or more.
        allowed = 1e-4 if dtype == torch.float32 else 2e-2
        worst = 0.0
        for heads in shapes:
            for sizes in parity.SIZES[:3]:
                for window, softcap in settings:
                    label = f"{way}, heads {heads}, sizes {sizes}, window {window}, softcap {softcap}"
                    print(label, flush=True)  # the last one, should the card be lost in it
                    try:
                        apart = _attention_error(where, dtype, call, heads, sizes, window, softcap)
                    except Exception as error:
                        wrong.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                        if len(wrong) > 20:
                            raise
                        continue
                    worst = max(worst, apart)
                    if not apart < allowed:
                        wrong.append(f"{label}: off by {apart:.2g}")
        report.note(**{f"{way.replace(' ', '_')}_error": worst, f"{way.replace(' ', '_')}_allowed": allowed})
    if where != "cpu":
        _kernel_speed(report, where)
    assert not wrong, f"{len(wrong)} wrong, among them: " + "; ".join(wrong[:6])


def _attention_error(
    where: str, dtype: torch.dtype, call: Any, heads: tuple[int, int, int], sizes: Any, window: Any, softcap: Any
) -> float:
    """The largest share that the output or a gradient is off by, in its norm."""
    layout, tokens = parity.layout_of(sizes, device=where)
    truth_states = [one.detach().to(dtype).float().requires_grad_() for one in parity.states(tokens, *heads)]
    truth = parity.dense(*truth_states, parity.seen_from_the_words(sizes, window), SCALE, softcap)
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [truth, *torch.autograd.grad((truth * weights.float()).sum(), truth_states)]
    mine = [one.detach().to(where, dtype).requires_grad_() for one in truth_states]
    out = call(*mine, layout, SCALE, window, softcap)
    found = [out, *torch.autograd.grad(out, mine, weights.to(where))]
    return max(
        float((one.float().cpu() - other).norm() / other.norm().clamp_min(1e-6))
        for one, other in zip(found, wanted, strict=True)
        if other.norm() > 1e-5  # a token that sees itself alone has no gradient by its query
    )


def _tiled(query: Any, key: Any, value: Any, layout: Any, scale: float, window: Any, softcap: Any) -> torch.Tensor:
    out, _ = packed_cpu.packed_attention(
        None, query, key, value, None, scaling=scale, sliding_window=window, softcap=softcap, layout=layout
    )  # fmt: skip
    return out.transpose(1, 2)


def _kernel_speed(report: Report, where: str) -> None:
    """Forward and backward of a usual pack, and of one with a long prompt, milliseconds a layer."""
    for name, sizes in (("gsm8k", [(160, [200] * 8)] * 4), ("few_shot", [(1500, [150] * 16)])):
        layout, tokens = parity.layout_of(sizes, device=where)
        mine = [one.detach().to(where, torch.bfloat16).requires_grad_() for one in parity.states(tokens, 16, 8, 64)]

        def both(mine: Any = mine, layout: Any = layout) -> None:
            out = packed_gpu.attend(*mine, layout, SCALE)
            torch.autograd.grad(out, mine, torch.ones_like(out))

        report.note(**{f"{name}_tokens": tokens, f"{name}_flex_ms": 1000 * seconds(where, both)})


def families(report: Report) -> None:
    """Whole packed passes on the device, log-probs and all gradients, against padded float32 on the CPU."""
    where = device()
    wrong = []
    for family in FAMILIES if where != "cpu" else ("gemma2", "mistral"):
        rows = parity.make_rows(parity.MIXED)
        truth = parity.run(make_model(family), rows, packed=False)
        for dtype in (torch.float32, torch.bfloat16) if where != "cpu" else (torch.float32,):
            model = make_model(family).to(where, dtype)
            found = parity.errors(parity.run(model, rows, packed=True), truth)
            gradient = max(found["gradients"].values())
            name = f"{family}_{str(dtype).removeprefix('torch.')}"
            if dtype == torch.float32:
                allowed, allowed_gradient = 1e-3, 1e-3
            else:  # what the padded pass loses by that number format, which is no matter of packing
                padded = parity.errors(parity.run(model, rows, packed=False), truth)
                allowed = 2 * padded["logprob"] + 0.05
                allowed_gradient = 2 * max(padded["gradients"].values()) + 0.02
            report.note(**{f"{name}_logprob": found["logprob"], f"{name}_gradient": gradient})
            if not (found["logprob"] < allowed and gradient < allowed_gradient):
                wrong.append(
                    f"{name}: log-probs {found['logprob']:.2g} (allowed {allowed:.2g}), gradients {gradient:.2g} "
                    f"(allowed {allowed_gradient:.2g})"
                )
    assert not wrong, "; ".join(wrong)
