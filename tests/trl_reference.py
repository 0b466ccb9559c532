"""TRL's own GRPO code, run on given numbers instead of a model: the reference for our losses and advantages.

``_generate_and_score_completions`` (rewards to advantages, log-probs to importance weights) and ``_compute_loss`` are
TRL's, called as they are. The trainer is made without its ``__init__``, which would load a model; the three methods
below stand where a model, a sampler and reward functions would be asked.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the vLLM version, which none of this uses
    from trl.trainer.grpo_trainer import GRPOTrainer


class ModelFreeTrainer(GRPOTrainer):
    lengths_B: Tensor
    mask_BT: Tensor
    rewards_B1: Tensor
    logprobs_BT: Tensor
    entropy_BT: Tensor
    old_BT: Tensor
    sampler_BT: Tensor
    reference_BT: Tensor

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """The sampler's answer: ids, tool mask (TRL's way to leave tokens out of the loss) and log-probs, unpadded."""
        lengths = self.lengths_B.tolist()
        return (
            [[1]] * len(lengths),
            [[1] * length for length in lengths],
            [self.mask_BT[row, :length].long().tolist() for row, length in enumerate(lengths)],
            [""] * len(lengths),
            [self.sampler_BT[row, :length].tolist() for row, length in enumerate(lengths)],
            {}, None, [None] * len(lengths),
        )  # fmt: skip

    def _calculate_rewards(self, *unused: Any) -> Tensor:
        return self.rewards_B1

    def _get_per_token_logps_and_entropies(self, model: Any, *unused: Any, **flags: Any) -> tuple[Any, Any, None]:
        if flags.get("compute_entropy"):  # asked by _compute_loss; the others by _generate_and_score_completions
            return self.logprobs_BT, self.entropy_BT, None
        return (self.reference_BT if model is self.ref_model else self.old_BT), None, None


@dataclass(frozen=True)
class Reference:
    """What TRL made of the numbers."""

    loss: float
    gradient_BT: Tensor
    entropy_gradient_BT: Tensor
    advantages_B: Tensor
    metrics: dict[str, float]


def run(
    *,
    logprobs_BT: Tensor,
    old_BT: Tensor,
    sampler_BT: Tensor,
    reference_BT: Tensor,
    entropy_BT: Tensor,
    mask_BT: Tensor,
    lengths_B: Tensor,
    rewards_B: Tensor,
    group_size: int,
    advantages_B: Tensor | None = None,
    micro_batches: int = 1,
    max_tokens: int = 16,
    loss_type: str = "grpo",
    level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    importance: str | None = None,
    importance_cap: float = 2.0,
    kl_coef: float = 0.0,
    kl_correction: bool = True,
    entropy_coef: float = 0.0,
    scale_rewards: str = "group",
) -> Reference:
    """One step of TRL: score the batch, then the loss of each of ``micro_batches`` equal parts, added up.

    ``lengths_B`` are the completion lengths, the longest as wide as the tensors; ``mask_BT`` is 0 beyond them.
    ``importance`` is TRL's vllm_importance_sampling_mode, None for off. ``advantages_B`` overrides TRL's own.
    """
    logprobs_BT = logprobs_BT.detach().clone().requires_grad_()
    entropy_BT = entropy_BT.detach().clone().requires_grad_()
    rows = len(logprobs_BT)
    trainer = ModelFreeTrainer(
        old_BT=old_BT, sampler_BT=sampler_BT, reference_BT=reference_BT, mask_BT=mask_BT, lengths_B=lengths_B,
        rewards_B1=rewards_B[:, None], reward_weights=torch.ones(1), reward_funcs=[None], reward_func_names=["reward"],
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False), ref_model=SimpleNamespace(),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True,
            gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor,
        ),
        args=SimpleNamespace(
            # Two iterations on one generation: otherwise TRL takes the current log-probs for the old ones.
            steps_per_generation=micro_batches, gradient_accumulation_steps=micro_batches,
            gradient_checkpointing_kwargs=None, per_device_train_batch_size=rows, delta=delta,
            use_bias_correction_kl=kl_correction, sapo_temperature_pos=tau_positive, sapo_temperature_neg=tau_negative,
        ),
        num_iterations=2, current_gradient_accumulation_steps=micro_batches, num_generations=group_size,
        use_vllm=importance is not None, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=importance, vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=importance_cap,
        environment_factories=None, environments=None, tools=None, _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None, mask_truncated_completions=False, _is_vlm=False,
        multi_objective_aggregation="sum_then_normalize", scale_rewards=scale_rewards, beta=kl_coef,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, loss_type=loss_type,
        importance_sampling_level=level, epsilon_low=clip_low, epsilon_high=clip_high, max_completion_length=max_tokens,
        _entropy_bonus_enabled=entropy_coef != 0, entropy_coef=entropy_coef, use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)}, _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={}, _pending_metrics={}, log_multimodal=False,
    )  # fmt: skip
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * rows)
    scored_advantages_B = batch["advantages"]
    if advantages_B is not None:
        batch["advantages"] = advantages_B
    loss = torch.zeros((), dtype=logprobs_BT.dtype)
    for part in torch.arange(rows).chunk(micro_batches):
        trainer.logprobs_BT, trainer.entropy_BT = logprobs_BT[part], entropy_BT[part]
        shared = ("num_items_in_batch",)
        loss = loss + trainer._compute_loss(
            trainer.model, {key: value if key in shared else value[part] for key, value in batch.items()}
        )
    loss.backward()
    assert logprobs_BT.grad is not None
    return Reference(
        loss.item(),
        logprobs_BT.grad,
        torch.zeros_like(entropy_BT) if entropy_BT.grad is None else entropy_BT.grad,
        scored_advantages_B,
        {key: values[-1] for key, values in trainer._metrics["train"].items()},
    )
