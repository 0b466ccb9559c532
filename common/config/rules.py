"""The rules between settings: which have no effect beside others, and which conflict with each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config.schema import ClusterConfig, Config


def unused_settings(config: Config) -> dict[str, str]:
    """The keys that change nothing in this run, each with the reason."""
    model, learner, optimizer, train, cluster = (
        config.model, config.learner, config.optimizer, config.train, config.cluster
    )  # fmt: skip
    plain, one_update = config.task.prompt_format == "plain", learner.inner_updates == 1
    sends_adapter = model.lora_rank > 0 and model.lora_variant != "dora"
    local_model = Path(model.name).expanduser().exists() or model.name.startswith("package:")
    weights_are_the_tokens = learner.importance == "off" or learner.importance_level == "sequence"
    never_clips = "learner.inner_updates is 1, so the policy ratio is always 1 and nothing is clipped"
    clips = "learner.clip_low learner.delta"
    sapo = "learner.sapo_tau_positive learner.sapo_tau_negative"
    transport = "sync.transport sync.bucket_mib"
    services = " ".join(f"cluster.{name}" for name in ClusterConfig.model_fields if name != "mode")
    rules = [  # when, keys, reason
        (local_model, "model.revision", "model.name is a local file, which has no revisions"),
        (model.lora_rank == 0, "model.lora_alpha model.lora_dropout model.lora_targets model.lora_variant "
         "run.export_merged", "model.lora_rank is 0, so no adapter is trained"),
        (not model.name.endswith(".gguf") and model.quantize == "off", "model.cache_folder",
         "only GGUF and 4-bit models are converted"),
        (plain and not config.task.system_prompt, "task.system_prompt",
         "an empty system prompt adds nothing to a plain prompt"),
        (plain, "task.template_options", "a plain prompt goes through no template"),
        (config.task.sandbox == "none", "task.reward_memory_gib task.sandbox_paths task.sandbox_environment",
         "task.sandbox is none"),
        (learner.kl_coef == 0, "learner.kl_estimator", "learner.kl_coef is 0, so no KL is computed"),
        (learner.importance == "off", "learner.importance_level learner.importance_cap", "learner.importance is off"),
        (learner.truncated != "penalize", "learner.overlong_tokens", "learner.truncated is not penalize"),
        (one_update and weights_are_the_tokens and learner.kl_coef == 0 and learner.ratio == "sequence",
         "learner.ratio", "with one update a batch the sequence's gradient is the tokens'"),
        (learner.loss != "sapo", sapo, "learner.loss is not sapo"),
        (learner.loss == "sapo", f"learner.clip_high {clips}", "sapo gates softly and never clips"),
        (learner.loss == "cispo", clips, "cispo caps the ratio at clip_high only"),
        (one_update, f"{sapo} {clips}", never_clips),
        (one_update and learner.loss != "cispo", "learner.clip_high", never_clips),
        (train.group_size == 1 and learner.advantage != "leave_one_out", "train.group_size",
         f"a group of 1 has no spread, so learner.advantage={learner.advantage} gives 0 and nothing is learned; use at "
         "least 2"),
        (train.group_size == 1 and learner.advantage == "leave_one_out", "train.group_size",
         "leave_one_out needs the mean of the others; use at least 2"),
        (model.lora_rank > 0 or model.dtype == "float32", "optimizer.master",
         "the weights that are trained are float32 already"),
        (optimizer.name == "muon" and sends_adapter, "optimizer.betas optimizer.eps",
         "muon steps all of the adapter's matrices"),
        (optimizer.name == "adafactor", "optimizer.betas optimizer.eps", "adafactor has no such setting"),
        (optimizer.schedule == "constant", "optimizer.min_lr_ratio", "optimizer.schedule is constant"),
        (not config.sync.proof, "sync.challenge sync.probe_tokens sync.tolerance", "sync.proof is off"),
        (config.eval.questions == 0, "eval.every eval.samples eval.k",
         "eval.questions is 0, so nothing is evaluated"),
        (config.eval.samples == 0, "eval.k", "eval.samples is 0, so pass@k is not measured"),
        (not learner.drop_zero_variance and train.dynamic_sampling_rounds > 0, "train.dynamic_sampling_rounds",
         "learner.drop_zero_variance is off, so no group is replaced"),
        (config.eval.every >= train.steps, "eval.every", "the end of the run is evaluated anyway"),
        (config.run.rollouts_every == 0, "run.rollouts_gzip", "run.rollouts_every is 0, so no rollouts are written"),
        (cluster.mode == "local", f"{services} {transport} sampler.tensor_parallel sampler.in_flight_updates "
         "timeouts.start_s timeouts.pulse_s", "cluster.mode is local: sampler and learner share this process"),
        (cluster.mode == "ray", "memory.offload_while_sampling", "each side has devices of its own"),
        (config.memory.plan == "off", "memory.device_gib", "memory.plan is off"),
        (cluster.address == "private", "cluster.spread cluster.on_lost_node", "a private cluster has one node"),
        (sends_adapter and cluster.mode == "ray", transport, "an adapter travels with the call, not by a transport"),
        (train.max_staleness == 0, "sampler.in_flight_updates",
         "train.max_staleness is 0, so nothing is in flight at a sync"),
    ]  # fmt: skip
    return {key: why for when, keys, why in rules if when for key in keys.split()}


def second_names(values: dict[str, Any]) -> Iterator[str]:
    """Sentences for settings written under a removed second name; afterwards ``values`` has the first name."""
    learner = values.get("learner")
    if not isinstance(learner, dict):
        return
    if learner.get("loss") == "bnpo":
        learner["loss"] = "dapo"
        yield "learner.loss='bnpo' is the same as 'dapo' here; write learner.loss='dapo'"
    if "dual_clip" in learner:
        bound = learner.pop("dual_clip")
        learner["delta"] = min((limit for limit in (learner.get("delta"), bound) if limit), default=0.0)  # both applied
        yield f"learner.dual_clip={bound!r} is learner.delta under another name; write learner.delta={bound!r}"


def conflicts(config: Config) -> Iterator[str]:
    """Settings that are each valid but contradict each other."""
    learner, optimizer = config.learner, config.optimizer
    if "" in config.sampler.stop:
        yield (
            f"sampler.stop={list(config.sampler.stop)} holds an empty string, which would end every completion at its "
            "first token; leave it out"
        )
    if 0 < learner.delta <= 1 + learner.clip_high:
        yield f"learner.delta={learner.delta} must be above 1 + learner.clip_high={1 + learner.clip_high:g}, or 0 (off)"
    if config.model.quantize != "off" and config.model.lora_rank == 0:
        yield (
            f"model.quantize={config.model.quantize!r} needs an adapter to train: set model.lora_rank (8 or 16), "
            "or quantize='off'"
        )
    if learner.compile != "off" and config.cluster.learner_ranks > 1:
        yield (
            f"learner.compile={learner.compile!r} is known for one learner rank only, and cluster.learner_ranks="
            f"{config.cluster.learner_ranks}; set it to 'off'"
        )
    if optimizer.master == "stochastic" and optimizer.name in ("adafactor", "muon"):
        yield f"optimizer.master='stochastic' is not known to optimizer.name={optimizer.name!r}; use 'float32'"
    if learner.truncated == "penalize" and learner.overlong_tokens > config.sampler.max_tokens:
        yield (
            f"learner.overlong_tokens={learner.overlong_tokens} is more than "
            f"sampler.max_tokens={config.sampler.max_tokens}; use at most that"
        )
    if config.eval.samples and max(config.eval.k, default=0) > config.eval.samples:
        yield f"eval.k={list(config.eval.k)} asks for more than eval.samples={config.eval.samples}; raise eval.samples"
    if config.optimizer.warmup_steps > config.train.steps * learner.inner_updates:
        yield (
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is longer than the run of "
            f"{config.train.steps * learner.inner_updates} updates; use fewer"
        )
    if learner.loss == "cispo" and learner.clip_high < 1:
        yield (
            f"learner.clip_high={learner.clip_high} caps cispo's ratio below 1, where every token starts; "
            "use 5 or so (as in MiniMax-M1)"
        )
    if config.train.max_staleness > 1 and not config.sampler.in_flight_updates:
        yield (
            f"train.max_staleness={config.train.max_staleness} overlaps no more than 1 and learns from older "
            "completions: every sync waits for all completions in flight; set it to 1, or "
            "sampler.in_flight_updates=true, with which long completions go on through a sync"
        )
    if config.train.max_staleness and learner.importance == "off":
        yield (
            f"train.max_staleness={config.train.max_staleness} learns from older weights' completions, which "
            "learner.importance='off' would not correct; use truncate or mask"
        )
    ranks, stochastic = config.cluster.learner_ranks, optimizer.master == "stochastic"
    if optimizer.offload and stochastic:
        yield (
            "optimizer.offload=true keeps float32 master weights in host memory, and optimizer.master='stochastic' has "
            "none; set one of them back"
        )
    if ranks > 1 and config.model.lora_rank == 0 and (optimizer.name != "adamw" or stochastic):
        asked = "master='stochastic'" if stochastic else f"name={optimizer.name!r}"
        yield (
            f"optimizer.{asked} cannot step weights that are divided among cluster.learner_ranks={ranks}; use "
            "optimizer.name='adamw' with master='float32' (ranks divide its memory), an adapter, or one rank"
        )
    if ranks > 1 and config.model.quantize != "off":
        yield (
            f"model.quantize={config.model.quantize!r} cannot be divided among cluster.learner_ranks={ranks}; set it "
            "to 'off', or learn with one rank"
        )
    if optimizer.offload and config.cluster.learner_ranks > 1:
        yield (
            f"optimizer.offload=true works with one learner rank only, and cluster.learner_ranks="
            f"{config.cluster.learner_ranks}; set one of them back (ranks share the optimizer's memory already)"
        )
    if config.sampler.name == "remote" and config.cluster.samplers > 1:
        yield (
            f"cluster.samplers={config.cluster.samplers} cannot share the one server of sampler.name='remote'; "
            "set it to 1, and give the server more devices instead"
        )
    if config.sampler.in_flight_updates and config.model.lora_rank and config.model.lora_variant != "dora":
        yield (
            "sampler.in_flight_updates=true cannot be had with model.lora_rank above 0, because a completion in flight "
            "keeps its adapter; set it to false"
        )
    if learner.loss in ("cispo", "sapo") and learner.ratio == "sequence":
        yield f"learner.ratio=sequence is not defined for learner.loss={learner.loss}; use token"
