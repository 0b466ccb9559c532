"""``TorchLearner``: groups in, one optimizer step and its metrics out.

It owns the model that is trained, its reference, the optimizer and the version. Randomness in a step (dropout) is
seeded by the run's seed, the version and the rank, so there is no random state to keep. Alone it is one process; with
``learner/parallel.py``'s ranks several processes are one learner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from common import files
from common.config import Config
from common.device import dtype_of, release
from common.errors import RunFailure, UserError
from common.types import Group
from common.weights import InProcessWeights
from learner import attention, losses
from learner import model as models
from learner.logprobs import can_pack, plain_attention, score
from learner.optim import MasterAdamW, learning_rate
from learner.packing import Pack, Row, plan, share
from learner.parallel import (
    Ranks,
    collective,
    forward,
    local,
    lost_in_words,
    own_slice,
    read_state,
    shapes_in,
    whole,
    write_state,
)

log = logging.getLogger("nanogrpo.learner")
ALONE = Ranks()
UNDERSTOOD = 0.5  # nats: bfloat16 alone gives 0.04 to 0.08 on made-up text; the sync's proof is the fine check


@dataclasses.dataclass
class _Batch:
    """The step's tensors; B completions, T the longest. Among ranks a last row counts for nothing: a pass over it
    keeps a rank that has fewer passes in step with the others."""

    rows: list[Row]
    advantages_B: torch.Tensor
    mask_BT: torch.Tensor
    sampler_BT: torch.Tensor
    coef_BT: torch.Tensor


class TorchLearner:
    """A ``Learner`` in this process, on one device; or one of several ranks that are a learner together.

    Among ranks every method is called on each of them with the same arguments, ends with the same results, and raises
    ``parallel.RankLost`` when a rank is gone; what ``publish_weights`` offers is opened on each of them. Groups are
    shared out, everything computed from them is a sum over ranks, so the weights are those of one process.
    """

    def __init__(self, config: Config, folder: Path, device: str, ranks: Ranks = ALONE) -> None:
        attention.register()
        self.version = 0
        self._config, self._folder, self._device, self._ranks = config, folder, device, ranks
        self._dtype = dtype_of(config.model.dtype)
        self._lora = config.model.lora_rank > 0
        if ranks.size > 1 and config.optimizer.offload:
            raise UserError(
                f"optimizer.offload=true cannot be had with cluster.learner_ranks={ranks.size}, which divide the "
                "optimizer's memory among them; set it to false, or learn with one rank"
            )
        self._model: Any = self._loaded(adapter=self._lora)
        self._reference: Any = None
        if config.learner.kl_coef > 0 and not self._lora:
            self._reference = self._loaded(adapter=False, trained=False)
        self.packed = self._choose_packing()
        with lost_in_words(ranks.rank, "loading"):
            self._check_forward()
        if config.learner.gradient_checkpointing:
            causal = models.causal_of(self._model)
            causal.gradient_checkpointing_enable({"use_reentrant": False})
            if self._lora:
                causal.enable_input_require_grads()
        trained = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self._optimizer = MasterAdamW(trained, config.optimizer)
        self._held = [p for _, p in trained if not isinstance(p, DTensor)]
        assert ranks.size == 1 or all(p.dtype == torch.float32 for p in self._held), "their gradients would be missed"
        self.parameters_trained = sum(p.numel() for _, p in trained)
        self.parameters_total = sum(p.numel() for p in self._model.parameters())

    def _loaded(self, adapter: bool, trained: bool = True) -> Any:
        """The model on the device; among ranks it is read into host memory, and only its slices go to the device."""
        config, ranks = self._config, self._ranks
        model = models.load(self._folder, config.model, self._device if ranks.size == 1 else "cpu")
        model.requires_grad_(trained)
        if adapter:
            model = models.add_adapter(model, config.model, self._folder, config.train.seed)
        held = [p for p in model.parameters() if p.requires_grad] if adapter else []
        ranks.shard(models.causal_of(model), self._dtype, held)
        return model

    def _score(self, model: Any, pack: Pack, *options: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(models.causal_of(model), lambda: score(model, pack.to(self._device), *options, **named))

    def _choose_packing(self) -> bool:
        wish = self._config.learner.packing
        able = can_pack(self._model)
        if wish == "packed" and not able:
            family = self._model.config.model_type
            raise UserError(
                f"learner.packing='packed' but {family!r} models are not known to pack exactly "
                f"(known: {', '.join(sorted(attention.FAMILIES))}); use learner.packing='auto'"
            )
        if wish == "auto" and not able:
            log.warning("this kind of model is not known to pack exactly: every prompt is repeated (padded path)")
        return able and wish != "padded"

    def _check_forward(self) -> None:
        """Our way through the model against its own, on one made-up sequence: an output head that scales or caps its
        logits in a way not known here is refused now, and not blamed on the sampler by the first sync."""
        causal = models.causal_of(self._model)
        ids = [(7 * t + 1) % causal.get_input_embeddings().num_embeddings for t in range(16)]
        causal.config._attn_implementation = plain_attention(causal.config)
        with torch.no_grad():
            logits_TV = causal(torch.tensor([ids], device=self._device), use_cache=False).logits[0].float()
            own_K = logits_TV.log_softmax(-1)[7:-1].gather(1, torch.tensor(ids[8:], device=self._device)[:, None])[:, 0]
            for packed in {False, self.packed}:
                (pack,) = plan([Row(0, tuple(ids[:8]), tuple(ids[8:]))], 64, packed)
                difference = float((self._score(self._model, pack)[0] - own_K).abs().mean())
                if not difference < UNDERSTOOD:
                    cure = "set learner.packing='padded'" if packed else "use another model"
                    raise UserError(
                        f"model.name={self._config.model.name!r}: the learner's log-probs differ from the model's own "
                        f"by {difference:.2f} nats ({'packed' if packed else 'padded'}); {cure}"
                    )

    # -- learning ----------------------------------------------------------------------------------------------------

    @collective("updating")
    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """``inner_updates`` optimizer steps on these groups, whose completions carry advantages; none, and no
        metrics, when no token of them counts.

        Raises ``RunFailure`` before a step whose loss or gradient is not finite.
        """
        learner, sampler = self._config.learner, self._config.sampler
        batch = self._batch(groups)
        if not batch.rows or not bool(batch.mask_BT.any()):
            self.version += 1
            return {}
        packs, passes = self._share_of(batch.rows, len(batch.mask_BT) - 1, self.packed)
        seed = self._config.train.seed * 1_000_003 + self.version
        torch.manual_seed(seed * self._ranks.size + self._ranks.rank)
        # Dropout, if the adapter has any, belongs to the training pass alone.
        old_BT = self._no_grad_logprobs(self._model, passes, batch) if learner.inner_updates > 1 else None
        reference_BT = self._reference_logprobs(passes, batch) if learner.kl_coef > 0 else None
        num_tokens = float(batch.mask_BT.sum())
        updates = self._config.train.steps * learner.inner_updates
        metrics: dict[str, float] = {}
        self._model.train(self._config.model.lora_dropout > 0 or learner.gradient_checkpointing)
        try:
            for inner in range(learner.inner_updates):
                parts = []
                for pack in passes:
                    logprob_K, entropy_K = self._score(
                        self._model, pack, sampler.temperature, sampler.top_p, sampler.top_k,
                        entropy=learner.entropy_coef > 0,
                    )  # fmt: skip
                    loss, stats = self._loss(batch, pack, logprob_K, entropy_K, old_BT, reference_BT, num_tokens)
                    loss.backward()
                    parts.append(stats)
                total = losses.mean_stats(self._ranks.gather_stats(parts))
                if not math.isfinite(total["loss"]):  # only now: a rank that stopped earlier would leave the others
                    raise RunFailure(self._not_finite("loss", total["loss"]))
                self._ranks.sum_gradients(self._held)
                norm = self._optimizer.clip()
                if not math.isfinite(norm):
                    raise RunFailure(self._not_finite("gradient norm", norm))
                lr = learning_rate(self._config.optimizer, self.version * learner.inner_updates + inner, updates)
                self._optimizer.step(lr)
                metrics = _named(total) | {"grad_norm": norm, "lr": lr}
        finally:
            self._optimizer.zero_grad()
            self._model.eval()
        self.version += 1
        if learner.inner_updates == 1:  # the ratio was 1 everywhere
            del metrics["ratio_mean"], metrics["clip_fraction"]
        if learner.importance == "off":
            del metrics["importance_mean"], metrics["importance_max"]
        prompt_tokens, completion_tokens = self._ranks.sum(
            torch.tensor(
                [sum(pack.prompt_tokens for pack in packs), sum(len(pack.target_K) for pack in packs)],
                device=self._device,
            )
        ).tolist()
        return metrics | {
            "tokens_prompt": float(prompt_tokens),
            "tokens_completion": float(completion_tokens),
            "tokens_learned": num_tokens,
            "packed": float(self.packed),
        }

    def _share_of(self, rows: Sequence[Row], idle: int, packed: bool) -> tuple[list[Pack], list[Pack]]:
        """This rank's packs, and the passes it makes: the same, and idle ones (row ``idle``) until all ranks have as
        many, because each pass gathers weights from all."""
        ranks, budget = self._ranks, self._config.learner.microbatch_tokens
        if ranks.size == 1:
            packs = plan(rows, budget, packed)
            return packs, packs
        packs = plan(share(rows, ranks.size, packed)[ranks.rank], budget, packed)
        missing = ranks.most(len(packs)) - len(packs)
        return packs, packs + plan([Row(idle, rows[0].prompt[:1], rows[0].completion[:1])], budget, packed) * missing

    def _loss(
        self, batch: _Batch, pack: Pack, logprob_K: torch.Tensor, entropy_K: torch.Tensor,
        old_BT: torch.Tensor | None, reference_BT: torch.Tensor | None, num_tokens: float,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """This pack's part of the step's loss, on its own rows of the batch."""
        spec = self._config.learner
        rows_R, local_K = pack.row_K.unique(return_inverse=True)

        def spread(values_K: torch.Tensor) -> torch.Tensor:
            empty = torch.zeros(len(rows_R), batch.mask_BT.shape[1], device=self._device)
            return empty.index_put((local_K.to(self._device), pack.column_K.to(self._device)), values_K)

        def mine(values: torch.Tensor) -> torch.Tensor:
            return values[rows_R].to(self._device)

        logprobs_RT = spread(logprob_K)
        return losses.total_loss(
            spec.loss,
            logprobs_RT,
            # On policy the old policy is this one: the ratio is 1 and its gradient is the policy gradient.
            logprobs_RT.detach() if old_BT is None else mine(old_BT),
            mine(batch.sampler_BT),
            mine(batch.advantages_B),
            mine(batch.mask_BT),
            mine(batch.coef_BT),
            ratio=spec.ratio,
            clip_low=spec.clip_low,
            clip_high=spec.clip_high,
            delta=spec.delta,
            dual_clip=spec.dual_clip,
            tau_positive=spec.sapo_tau_positive,
            tau_negative=spec.sapo_tau_negative,
            importance=spec.importance,
            importance_level=spec.importance_level,
            importance_cap=spec.importance_cap,
            reference_logprobs_BT=None if reference_BT is None else mine(reference_BT),
            kl_coef=spec.kl_coef,
            kl_estimator=spec.kl_estimator,
            entropy_BT=spread(entropy_K),
            entropy_coef=spec.entropy_coef,
            num_tokens=num_tokens,
        )

    def _batch(self, groups: Sequence[Group]) -> _Batch:
        pairs = [(group.prompt.token_ids, one) for group in groups for one in group.completions]
        B, T = len(pairs), max((len(one.token_ids) for _, one in pairs), default=0)
        advantages_B = torch.zeros(B)
        mask_BT, sampler_BT = torch.zeros(B, T), torch.zeros(B, T)
        rows: list[Row] = []
        for index, (prompt, one) in enumerate(pairs):
            assert one.advantage is not None, "a completion without advantage reached the learner"
            length = len(one.token_ids)
            advantages_B[index] = one.advantage
            sampler_BT[index, :length] = torch.tensor(one.logprobs)
            if length and not (self._config.learner.truncated == "mask" and one.finish_reason == "length"):
                mask_BT[index, :length] = 1.0
                rows.append(Row(index, prompt, one.token_ids))
        coef_BT = losses.token_coefficients(self._config.learner.loss, mask_BT, self._config.sampler.max_tokens)
        if self._ranks.size == 1:
            return _Batch(rows, advantages_B, mask_BT, sampler_BT, coef_BT)
        idle = torch.zeros(1, T)
        return _Batch(
            rows,
            torch.cat([advantages_B, idle.new_zeros(1)]),
            *(torch.cat([values_BT, idle]) for values_BT in (mask_BT, sampler_BT, coef_BT)),
        )

    def _no_grad_logprobs(self, model: Any, packs: Sequence[Pack], batch: _Batch) -> torch.Tensor:
        sampler = self._config.sampler
        out_BT = torch.zeros_like(batch.mask_BT)
        with torch.no_grad():
            for pack in packs:
                logprob_K, _ = self._score(model, pack, sampler.temperature, sampler.top_p, sampler.top_k)
                out_BT[pack.row_K, pack.column_K] = logprob_K.cpu()
        return out_BT

    def _reference_logprobs(self, packs: Sequence[Pack], batch: _Batch) -> torch.Tensor:
        if not self._lora:
            assert self._reference is not None
            return self._no_grad_logprobs(self._reference, packs, batch)
        with self._model.disable_adapter():
            return self._no_grad_logprobs(self._model, packs, batch)

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"the learner stopped before step {self.version + 1}: the {what} is {value}; the batch is kept in the "
            "rollouts. Lower optimizer.lr or optimizer.max_grad_norm, and look at the batch's rewards and log-probs"
        )

    # -- weights -----------------------------------------------------------------------------------------------------

    def publish_weights(self, merged: bool = False) -> InProcessWeights:
        """Lends the live tensors: the adapter under LoRA, unless ``merged``; every weight else.

        Among ranks a full offer is opened by all, each of which gets every whole tensor in turn, gathered for it alone.
        """
        if not self._lora:
            return InProcessWeights("full", lambda: self._gathered(models.full_tensors))
        if merged:
            return InProcessWeights("full", lambda: self._gathered(models.merged_tensors))
        described = models.adapter_dict(self._model)
        return InProcessWeights("adapter", lambda: iter(models.adapter_tensors(self._model).items()), described)

    def _gathered(
        self, tensors: Callable[[Any, torch.dtype], Iterator[tuple[str, torch.Tensor]]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        with lost_in_words(self._ranks.rank, "gathering weights"):
            yield from tensors(self._model, self._dtype)

    @collective("computing log-probs")
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs at temperature 1; [T - 1] numbers for a sequence of T tokens."""
        rows = [Row(i, tuple(one[:1]), tuple(one[1:])) for i, one in enumerate(sequences)]
        longest = max((len(one) - 1 for one in sequences), default=0)
        if longest < 1:
            return [[] for _ in sequences]
        _, passes = self._share_of(rows, len(rows), packed=False)
        answer_BT = torch.zeros(len(rows) + 1, longest)
        with torch.no_grad():
            for pack in passes:
                answer_BT[pack.row_K, pack.column_K] = self._score(self._model, pack)[0].cpu()
        answer_BT[-1] = 0  # the idle row
        answer_BT = self._ranks.sum(answer_BT.to(self._device))
        return [row_T[: len(one) - 1] for row_T, one in zip(answer_BT.tolist(), sequences, strict=False)]

    @contextlib.contextmanager
    def perturbed(self, seed: int) -> Iterator[None]:
        """Seeded noise on every trained weight: a tenth of each tensor's own spread, so each layer's part shows in
        the log-probs; an adapter's zero half gets noise that makes its update as large."""
        generator = torch.Generator().manual_seed(seed)
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        kept = {name: local(p.detach()).to("cpu", copy=True) for name, p in trained.items()}
        with torch.no_grad(), lost_in_words(self._ranks.rank, "gathering weights"):
            for name, parameter in trained.items():
                full = whole(parameter, self._dtype)
                noise = torch.randn(full.shape, generator=generator) * self._noise_scale(name, full)
                # Rounded as the model's own weights are, also where this rank keeps float32 ones of its own.
                local(parameter).copy_(own_slice(full + noise.to(full.device, full.dtype), parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in trained.items():
                    local(parameter).copy_(kept[name])

    def _noise_scale(self, name: str, parameter: torch.Tensor) -> float:
        """Of noise on this whole weight; a collective under LoRA."""
        if self._lora and ".lora_B." in name:
            rank, alpha = self._config.model.lora_rank, self._config.model.lora_alpha
            layer = self._model.get_submodule(name.split(".lora_B.")[0])
            down = layer.lora_A["default"].weight
            update = alpha / rank * math.sqrt(rank) * float(down.float().std())  # spread of alpha/r x B x A for B ~ 1
            base = float(whole(layer.base_layer.weight).float().std())
            return 0.1 * base / max(update, 1e-12)
        spread = parameter.float().std() if parameter.numel() > 1 else parameter.float().abs().mean()
        return 0.1 * float(spread if float(spread) > 0 else 1.0)

    # -- the device, shared with a sampler ---------------------------------------------------------------------------

    def sleep(self) -> None:
        """Gives unused device memory back while the sampler works."""
        release(self._device)

    # -- files -------------------------------------------------------------------------------------------------------

    @collective("saving")
    def save(self, folder: Path) -> None:
        """float32 masters and AdamW's averages in ``folder``: ``state.safetensors``, or each rank's slices in a file
        of its own; the version in ``learner.json``. Any number of ranks can read them."""
        state = self._optimizer.state()
        try:
            if self._ranks.size == 1:  # the same as write_state would, without a second copy in memory
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
                save_file(tensors, folder / "state.safetensors")
            else:
                write_state(state, folder)
        except (SafetensorError, RunFailure) as error:
            raise RunFailure(
                f"the checkpoint of step {self.version} cannot be written ({error}); free space on that disk"
            ) from error
        with self._ranks.together("saving"):
            if self._ranks.rank == 0:
                files.write_json(folder / "learner.json", {"version": self.version, "ranks": self._ranks.size})

    @collective("restoring")
    def restore(self, folder: Path) -> None:
        """Undo of ``save``, by any number of ranks. Raises ``UserError`` when the state belongs to another model."""
        shapes = shapes_in(folder)
        wanted = {name: value.shape for name, value in self._optimizer.state().items() if name.endswith("/master")}
        if wanted != {name: shape for name, shape in shapes.items() if name.endswith("/master")}:
            raise UserError(f"checkpoint {str(folder)!r} belongs to another model or adapter; resume with its own")
        tensors = self._optimizer.blank_state(shapes)
        read_state(tensors, folder)
        self._optimizer.load_state(tensors)
        self.version = int(json.loads((folder / "learner.json").read_text())["version"])

    @collective("exporting")
    def export(self, folder: Path, merged: bool = False) -> None:
        models.export(self._model, self._folder, folder, merged, self._dtype, self._ranks)


def _named(stats: dict[str, float]) -> dict[str, float]:
    """The losses' statistics under their documented names."""
    names = {
        "loss": "loss", "ratio_mean": "ratio_mean", "clipped_mean": "clip_fraction", "kl_mean": "kl",
        "entropy_mean": "entropy", "importance_mean": "importance_mean", "importance_max": "importance_max",
        "sampler_difference_mean": "logprob_diff_mean", "sampler_difference_max": "logprob_diff_max",
    }  # fmt: skip
    return {new: stats[old] for old, new in names.items() if old in stats}
