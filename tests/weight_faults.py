"""Weights that an engine did not take, or took wrongly, behind the fingerprint of what arrived: each kind, and whether
the proof catches it at that sync.

``FaultyVllm`` is ``VllmSampler`` with one fault at a time, in the engine alone. Used by tests/test_vllm.py on tiny
models, and on the demo's model by::

    python -m tests.weight_faults                     # the table: full and adapter, both number formats, early and late
    python -m tests.weight_faults --clean 200 FOLDER  # syncs of a real training, and the proof's share of a step
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common.atomic_files import read_json_lines
from common.config import load
from common.tokenizer import load_tokenizer
from common.types import AdapterSpec, SamplerSetup
from common.weights.handles import FolderWeights
from deploy import run as runs
from learner.model import adapters, resolve
from learner.torch_learner import TorchLearner
from learner.weight_sync import SyncError, WeightSync
from sampler.engine.vllm import VllmSampler
from tests.making import group
from tests.test_sync import Separate

DEMO = Path(__file__).parent.parent / "deploy" / "configs" / "demo.toml"
Tensors = Iterator[tuple[str, torch.Tensor]]

# What arrives of these tensors is replaced by what was sent last in full health; from the start it is left out,
# and half of an adapter is none.
OLD = {
    "the output head old": ("lm_head.weight",),
    "a norm old": ("layers.1.input_layernorm.weight",),
    "a layer skipped": (".layers.1.",),
    "every MLP old": (".mlp.",),
    "q of one layer old": ("layers.1.self_attn.q_proj.weight",),
    "one lora_A old": ("layers.1.self_attn.v_proj.lora_A",),
    "all old": ("",),
}
SCALED = {
    "a matrix x 1.01": ("layers.1.self_attn.o_proj.weight", 1.01),
    "a matrix x 1.1": ("layers.0.mlp.gate_proj.weight", 1.1),
    "a norm x 1.01": ("layers.0.post_attention_layernorm.weight", 1.01),
    "all x 1.01": ("", 1.01),
    "one lora_B x 1.01": ("layers.1.self_attn.q_proj.lora_B", 1.01),
    "every lora_B x 1.01": (".lora_B.", 1.01),
}
SWAPPED = {
    "two layers swapped": ("layers.0.", "layers.1."),
    "q and o swapped": ("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj"),
    "two adapters swapped": ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"),
}
FULL = (
    "the output head old", "a norm old", "a layer skipped", "every MLP old", "q of one layer old",
    "half the tensors old", "all old", "two layers swapped", "q and o swapped", "a matrix x 1.01", "a matrix x 1.1",
    "a norm x 1.01", "all x 1.01", "one number of a norm off", "one number of a matrix off", "a packed layer old",
)  # fmt: skip
ADAPTER = (
    "one lora_A old", "half the tensors old", "all old", "the last adapter served", "two adapters swapped",
    "one lora_B x 1.01", "every lora_B x 1.01", "lora_alpha x 1.1", "one number off",
)  # fmt: skip


class FaultyVllm(VllmSampler):
    """``fault`` is one of ``FULL`` or ``ADAPTER``, or empty."""

    fault = ""
    effective = False
    """Whether the last load was other than a right one: a weight that training did not move has no old value."""
    _old: dict[str, torch.Tensor]

    def load_weights(self, handle: Any, version: int) -> str:
        self.effective = False
        coming = {name: tensor.detach().clone() for name, tensor in handle.open()}
        digest = super().load_weights(handle, version)
        if not self.fault:
            self._old = coming
        return digest

    def restart(self) -> None:
        """As at a start, with the fault from the first load on."""
        self._old, self._adapter = {}, None
        if self._setup.adapter is None:
            self._llm.collective_rpc(_forget_watching)
            self.load_weights(FolderWeights(self._setup.model_folder), 0)

    def _load_full(self, handle: Any) -> Any:
        (product,) = self._llm.collective_rpc(_alter, args=(self._altered,))
        arrived = super()._load_full(handle)
        self._damage(product)
        return arrived

    def _load_adapter(self, tensors: Tensors, config: dict[str, Any]) -> None:
        if self.fault == "lora_alpha x 1.1":
            config, self.effective = config | {"lora_alpha": config["lora_alpha"] * 1.1}, True
        if self.fault == "the last adapter served":
            list(tensors)
            self.effective = True
            return
        super()._load_adapter(self._altered(tensors), config)
        self._damage(None)

    def _damage(self, product: Any) -> None:
        if self.fault in ("one number of a norm off", "a packed layer old", "one number off"):
            self._llm.collective_rpc(_damage, args=(self.fault, product))
            self.effective = True

    def _altered(self, tensors: Tensors) -> Tensors:
        fault = self.fault
        for index, (name, tensor) in enumerate(tensors):
            sent_name, sent = name, tensor
            if any(part in name for part in OLD.get(fault, ())) or (fault == "half the tensors old" and index % 2):
                kept = self._old.get("model.embed_tokens.weight" if name == "lm_head.weight" else name)
                if kept is None and ".lora_" in name:
                    kept = torch.zeros_like(tensor)
                if kept is None:
                    self.effective = True
                    continue
                tensor = kept
            part, factor = SCALED.get(fault, ("", 1))
            if factor != 1 and part in name:
                tensor = tensor * factor
            one, other = SWAPPED.get(fault, ("?", "?"))
            name = name.replace(one, "?").replace(other, one).replace("?", other)
            if fault == "one number of a matrix off" and name.endswith("layers.1.self_attn.k_proj.weight"):
                tensor = tensor.clone()
                tensor[3, 4] *= 1.01
            self.effective |= name != sent_name or not torch.equal(tensor, sent)
            yield name, tensor


def _alter(worker: Any, altered: Callable[[Tensors], Tensors]) -> Any:
    """From now on what has arrived is altered before it is loaded. Returns the product of one layer."""
    vars(worker).pop("reload_weights", None)
    right = worker.reload_weights
    worker.reload_weights = lambda weights_iterator: right(weights_iterator=altered(weights_iterator))
    layers = dict(worker.model_runner.get_model().named_modules())
    return vars(layers["model.layers.1.mlp.down_proj"]).get("cpu_linear")


def _forget_watching(worker: Any) -> None:
    for layer in worker.model_runner.get_model().modules():
        vars(getattr(layer, "quant_method", torch.nn.Identity())).pop("process_weights_after_loading", None)
    del worker.stored_weights


def _damage(worker: Any, fault: str, product: Any) -> None:
    model = worker.model_runner.get_model()
    if fault == "a packed layer old":
        model.get_submodule("model.layers.1.mlp.down_proj").cpu_linear = product
    elif fault == "one number of a norm off":
        model.get_parameter("model.layers.1.input_layernorm.weight").data[5] *= 1.01
    else:
        modules = worker.model_runner.lora_manager._adapter_manager.modules
        next(iter(modules.values())).lora_a_stacked[0][0, 0, 1, 2] += 0.01


def caught(sampler: FaultyVllm, sync: WeightSync, fault: str, early: bool) -> str:
    """The words of the error that this fault's sync ends in; empty where it passes. A clean sync follows."""
    sampler.fault = fault
    try:
        if early:
            sampler.restart()
        (sync.challenge if early else sync)()
        words = "" if sampler.effective else "nothing to catch"
    except SyncError as error:
        words = str(error)
    sampler.fault = ""
    if early:
        sampler.restart()
    sync()
    return words


def table() -> None:
    groups = [group(length, [12, 9, 14, 10], seed) for seed, length in enumerate((24, 31))]
    for dtype in ("bfloat16", "float32"):
        for lora in (0, 16):
            config = load(DEMO, [f"model.dtype={dtype}", f"model.lora_rank={lora}", "optimizer.lr=2e-5"])
            folder = resolve.prepare(config.model)
            learner = TorchLearner(config, folder, "cpu")
            adapter = AdapterSpec(lora, adapters.adapter_config(config.model, folder).to_dict()) if lora else None
            sampler = FaultyVllm(SamplerSetup(str(folder), dtype, 128, 16, adapter=adapter))
            # Of real text: rounding moves the log-probs of random tokens by more.
            probe = [tuple(load_tokenizer(str(folder)).encode(__doc__ or "")[:120])]
            sync = WeightSync(learner, sampler, Separate(), probe, config.sync, 600, dtype)
            sync.challenge()
            sync()
            for early in (True, False):
                for fault in ADAPTER if lora else FULL:
                    learner.update(groups)
                    words = caught(sampler, sync, fault, early)
                    kind, when = "adapter" if lora else "full", "from the start" if early else "later"
                    print(f"| {dtype} | {kind} | {when} | {fault} | {words.partition(': ')[2] or words or 'MISSED'} |")
            sampler.close()


def clean(syncs: int, folder: Path, words: list[str]) -> None:
    """A training of the demo's kind: every sync proved, and what that cost."""
    with open(os.devnull, "w") as nowhere:
        asked = load(
            DEMO, [f"train.steps={syncs}", "eval.questions=0", "run.save_every=0", "run.console=plain", *words]
        )
        outcome = runs.run(asked, folder, Console(file=nowhere))
    rows = read_json_lines(folder / "metrics.jsonl")
    shares = [row["seconds_proof"] / row["seconds_step"] for row in rows[1:]]
    print(
        f"{len(rows)} of {syncs} syncs passed, finished: {outcome.finished}; the proof took "
        f"{statistics.median(row['seconds_proof'] for row in rows[1:]):.3f} s of steps of "
        f"{statistics.median(row['seconds_step'] for row in rows[1:]):.2f} s, {statistics.median(shares):.1%} (median)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=int, default=0, metavar="SYNCS")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("words", nargs="*", help="settings of the clean run: key=value")
    asked = parser.parse_args()
    if asked.clean:
        clean(asked.clean, asked.folder, asked.words)
    else:
        table()
