"""Which setting somebody means who writes another name: one misspelt, one in the wrong section, or another trainer's.

Used by ``common/config/reading.py`` for its errors. Imports without torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

ELSEWHERE = {
    "learning_rate": "optimizer.lr", "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps", "optim": "optimizer.name", "lr_scheduler_type": "optimizer.schedule",
    "grad_clip": "optimizer.max_grad_norm", "clip_grad": "optimizer.max_grad_norm",
    "max_steps": "train.steps", "num_steps": "train.steps", "total_steps": "train.steps",
    "num_train_epochs": "train.steps", "epochs": "train.steps", "total_epochs": "train.steps",
    "batch_size": "train.prompts_per_step", "train_batch_size": "train.prompts_per_step",
    "num_generations": "train.group_size", "num_return_sequences": "train.group_size", "g": "train.group_size",
    "rollout_n": "train.group_size", "per_device_train_batch_size": "learner.microbatch_tokens",
    "gradient_accumulation_steps": "learner.microbatch_tokens", "micro_batch_size": "learner.microbatch_tokens",
    "beta": "learner.kl_coef", "kl_beta": "learner.kl_coef", "kl_loss_coef": "learner.kl_coef",
    "kl_penalty": "learner.kl_estimator", "epsilon": "learner.clip_low", "clip_ratio": "learner.clip_low",
    "epsilon_high": "learner.clip_high", "clip_ratio_high": "learner.clip_high", "num_iterations":
    "learner.inner_updates", "ppo_epochs": "learner.inner_updates", "mu": "learner.inner_updates",
    "loss_type": "learner.loss", "scale_rewards": "learner.advantage", "adv_estimator": "learner.advantage",
    "importance_sampling_level": "learner.ratio", "mask_truncated_completions": "learner.truncated",
    "vllm_importance_sampling_cap": "learner.importance_cap", "use_liger_kernel": "learner.compile",
    "max_completion_length": "sampler.max_tokens", "max_new_tokens": "sampler.max_tokens",
    "max_response_length": "sampler.max_tokens", "max_prompt_length": "sampler.max_prompt_tokens",
    "use_vllm": "sampler.name", "vllm_gpu_memory_utilization": "sampler.options.gpu_memory_utilization",
    "gpu_memory_utilization": "sampler.options.gpu_memory_utilization",
    "tensor_model_parallel_size": "sampler.tensor_parallel", "model_name_or_path": "model.name",
    "model_path": "model.name", "model_id": "model.name", "torch_dtype": "model.dtype", "bf16": "model.dtype",
    "r": "model.lora_rank", "lora_r": "model.lora_rank", "target_modules": "model.lora_targets",
    "load_in_4bit": "model.quantize", "use_dora": "model.lora_variant", "use_rslora": "model.lora_variant",
    "output_dir": "run.folder", "save_steps": "run.save_every", "save_freq": "run.save_every",
    "save_total_limit": "run.keep_last", "report_to": "run.trackers", "logger": "run.trackers",
    "eval_steps": "eval.every", "test_freq": "eval.every", "async_level": "train.max_staleness",
    "reward_funcs": "task.name", "dataset_name": "task.name",
}  # fmt: skip
"""What TRL, verl, OpenRLHF, peft and transformers call a setting, in lower case, and its key here."""


def meant(key: str, known: Sequence[str]) -> str:
    """The ``section.key`` of ``known``, or the section, that ``key`` most likely stands for; empty when it is like
    none."""
    last = key.split(".")[-1]
    for name in known:  # the right name in the wrong section, or in none
        if name.split(".")[1] == last:
            return name
    if last.lower() in ELSEWHERE:
        return ELSEWHERE[last.lower()]
    sections = sorted({name.split(".")[0] for name in known})
    close = [] if "." in key else difflib.get_close_matches(key, sections, n=1)
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        near = difflib.get_close_matches(last, [name.split(".")[1] for name in known], n=1, cutoff=0.7)
        close = [name for name in known if near and name.split(".")[1] == near[0]]
    if not close:
        close = difflib.get_close_matches(key, sections, n=1)
    return close[0] if close else ""
