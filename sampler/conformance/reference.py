"""The slow reference that samplers are held to, and weights under which a model's answer is known beforehand.

A float32 forward through transformers on the CPU, one sequence at a time; weights changed in every tensor; weights that
make the model write given tokens; a LoRA adapter and the same thing merged by hand. Used by
sampler/conformance/suite.py and by tests; it knows nothing of samplers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from common.weights.handles import InProcessWeights
from sampler.hf import load_model

# Shapes: T tokens, D width, V vocabulary, K places whose next token is forced.

Tensors: TypeAlias = Mapping[str, torch.Tensor]


class ReferenceModel:
    """The model in float32 on the CPU, one sequence at a time: slow and simple."""

    def __init__(self, folder: str) -> None:
        self.model: Any = load_model(folder, "float32")
        head: Any = self.model.get_output_embeddings()
        self._parameters: dict[str, torch.Tensor] = dict(self.model.named_parameters())  # a tied head once
        self._held: Tensors | None = None
        self._hidden_TD = torch.empty(0)
        self.is_tied = head.weight is self.model.get_input_embeddings().weight
        self.head_name = next(name for name, tensor in self._parameters.items() if tensor is head.weight)
        """The output head's weight; the embedding's where they are tied."""
        head.register_forward_pre_hook(self._keep_hidden)

    def _keep_hidden(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._hidden_TD = inputs[0][0].float()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights held now, as a learner sends them: by Hugging Face name, a tied head once, no buffers."""
        for name, tensor in self._parameters.items():
            yield name, tensor.detach()

    def logits(self, tensors: Tensors, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] under these weights, and what the output head saw [T, D]. Do not change ``tensors`` later."""
        with torch.no_grad():
            if tensors is not self._held:
                for name, parameter in self._parameters.items():
                    parameter.copy_(tensors[name])
                self._held = tensors
            logits_TV = self.model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()
        return logits_TV, self._hidden_TD

    def logprobs(self, tensors: Tensors, token_ids: Sequence[int]) -> list[float]:
        """What ``Sampler.logprobs`` should say of one sequence."""
        logprobs_TV = self.logits(tensors, token_ids)[0].log_softmax(-1)
        return [logprobs_TV[place, token].item() for place, token in enumerate(token_ids[1:])]


def handle_of(
    tensors: Tensors, kind: Literal["full", "adapter"] = "full", adapter_config: Mapping[str, Any] | None = None
) -> InProcessWeights:
    """These tensors as a ``WeightHandle`` in this process."""
    return InProcessWeights(kind, lambda: iter(tensors.items()), adapter_config)


def perturbed(base: Tensors, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor with seeded noise of a fifth of its size: enough to move every log-prob."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=generator)
        size = tensor.float().square().mean().sqrt() if tensor.is_floating_point() else 0.0
        changed[name] = (tensor.float() + 0.2 * size * noise).to(tensor.dtype)
    return changed


def forced(
    reference: ReferenceModel, base: Tensors, prompt_ids: Sequence[int], token_ids: Sequence[int], margin: float = 30.0
) -> dict[str, torch.Tensor]:
    """Weights under which the model writes just these tokens after this prompt, at any temperature up to 1.

    Only the tokens' rows of the output head change. Token k's row moves by the least that puts its logit ``margin``
    above all others where it is due, and as far below where an earlier one is. With tied embeddings that also changes
    what the model reads, but only after the token was written: taken one at a time, the earlier places stand.
    The tokens must differ from each other and, where tied, from the prompt's; ``ValueError`` if it cannot be done.
    """
    repeated = sorted(set(token_ids) & set(prompt_ids)) if reference.is_tied else []
    if repeated or len(set(token_ids)) < len(token_ids):
        raise ValueError(f"cannot force {tuple(token_ids)}: repeated tokens {repeated} (choose another text or model)")
    tensors = dict(base)
    ids, start = list(prompt_ids), len(prompt_ids) - 1
    for token in token_ids:
        logits_TV, hidden_TD = reference.logits(tensors, ids)
        logits_KV, hidden_KD = logits_TV[start:], hidden_TD[start:]
        mine_K = logits_KV[:, token].clone()
        logits_KV[:, token] = -torch.inf
        best_K = logits_KV.max(-1).values
        wanted_K = torch.minimum(mine_K, best_K - margin)
        wanted_K[-1] = best_K[-1] + margin
        step_D = torch.linalg.lstsq(hidden_KD.double(), (wanted_K - mine_K).double()[:, None], driver="gelsd").solution
        tensors = _with_row_moved(tensors, reference.head_name, token, step_D)
        ids.append(token)
    chosen_KV = reference.logits(tensors, ids)[0][start:-1].softmax(-1)
    sure = chosen_KV.gather(-1, torch.tensor(token_ids)[:, None]).min().item()
    if sure < 0.9999:
        raise ValueError(f"cannot force {tuple(token_ids)}: one has probability {sure:.4f} (choose another model)")
    return tensors


def frequent(
    reference: ReferenceModel, base: Tensors, token: int, token_ids: Sequence[int], probability: float
) -> dict[str, torch.Tensor]:
    """Weights under which ``token`` has roughly this probability everywhere, fitted on a text that lacks it."""
    logits_TV, hidden_TD = reference.logits(base, token_ids)
    wanted_T = logits_TV.logsumexp(-1) + torch.tensor(probability).logit()
    step_D = torch.linalg.lstsq(hidden_TD.double(), (wanted_T - logits_TV[:, token]).double()[:, None]).solution
    return _with_row_moved(base, reference.head_name, token, step_D)


def _with_row_moved(tensors: Tensors, name: str, row: int, step_D: torch.Tensor) -> dict[str, torch.Tensor]:
    moved_VD = tensors[name].clone()
    moved_VD[row] += step_D[:, 0].to(moved_VD.dtype)
    return {**tensors, name: moved_VD}


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter on every linear layer but the output head, and the same thing merged by hand."""

    shapes: Mapping[str, tuple[int, int]]
    """(outputs, inputs) of each layer."""
    config: Mapping[str, Any]
    """The contents of peft's ``adapter_config.json``."""
    rank = 4
    scale = 2

    @classmethod
    def on(cls, reference: ReferenceModel, folder: str) -> Lora:
        head = reference.model.get_output_embeddings()
        shapes = {
            name: (layer.out_features, layer.in_features)
            for name, layer in reference.model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head
        }
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": folder,
            "r": cls.rank,
            "lora_alpha": cls.rank * cls.scale,
            "lora_dropout": 0.0,
            "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
            "bias": "none",
        }
        return cls(shapes, config)

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        """Random A and B under peft's names; their product is about as large as half the weights of a tiny model."""
        generator = torch.Generator().manual_seed(seed)
        pairs: dict[str, torch.Tensor] = {}
        for name, (outs, ins) in self.shapes.items():
            a = torch.randn(self.rank, ins, generator=generator) / ins**0.5
            b = torch.randn(outs, self.rank, generator=generator) * 0.2
            pairs |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        return pairs

    def merged(self, base: Tensors, adapter: Tensors) -> dict[str, torch.Tensor]:
        """``base`` with scale times B A added, float32."""
        whole = {name: tensor.float() for name, tensor in base.items()}
        for name in self.shapes:
            a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            whole[f"{name}.weight"] = whole[f"{name}.weight"] + self.scale * (b @ a)
        return whole
