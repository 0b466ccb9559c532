"""``TorchLearner``: groups in, one optimizer step and its metrics out.

It owns the model that is trained, its reference, the optimizer and the version. Randomness in a step (dropout) is
seeded by the run's seed, the version and the rank, so there is no random state to keep. Alone it is one process; with
``learner/distributed.py``'s ranks several processes are one learner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from common import atomic_files
from common.config import Config
from common.device import dtype_of, release
from common.errors import RunFailure, UserError
from common.types import Group
from common.weights.handles import InProcessWeights
from learner import rehearsal
from learner.attention import packed_cpu
from learner.batch import packing_support
from learner.batch.packing import Pack, Row, make_microbatches, shard
from learner.distributed import (
    RankGroup,
    collective,
    forward,
    lost_in_words,
    read_state,
    shapes_in,
    write_state,
)
from learner.loss import advantages, losses
from learner.model import adapters, loading, nf4, noise, saving
from learner.optimizer import HostOffload, MasterOptimizer, learning_rate
from learner.token_logprobs import SamplingTransform, forward_backward, from_logits, token_logprobs

log = logging.getLogger("nanogrpo.learner")
ALONE = RankGroup()
METRICS = {
    "loss": "loss", "ratio_mean": "ratio_mean", "clipped_mean": "clip_fraction", "kl_mean": "kl",
    "entropy_mean": "entropy", "importance_mean": "importance_mean", "importance_max": "importance_max",
    "sampler_difference_mean": "logprob_diff_mean", "sampler_difference_max": "logprob_diff_max",
}  # fmt: skip
"""The losses' statistics to their documented names."""


class TorchLearner:
    """A ``Learner`` in this process, on one device; or one of several ranks that are a learner together.

    Among ranks every method is called on each of them with the same arguments, ends with the same results, and raises
    ``distributed.RankLost`` when a rank is lost; what ``publish_weights`` returns is opened on each of them. Groups are
    divided, everything computed from them is a sum over ranks, so the weights are those of one process.

    ``blank`` reads no weights, checks nothing and steps nothing: for the memory estimate, on tensors of a shape alone.
    """

    def __init__(
        self, config: Config, folder: Path, device: str, ranks: RankGroup = ALONE, *, blank: bool = False
    ) -> None:
        packed_cpu.register()
        self.version = 0
        self._config, self._folder, self._device, self._ranks = config, folder, device, ranks
        self._dtype = dtype_of(config.model.dtype)
        self._lora, self._blank = config.model.lora_rank > 0, blank
        assert ranks.size == 1 or not config.optimizer.offload, "ranks divide the optimizer's memory already"
        sampler = config.sampler
        self._plain = SamplingTransform(chunk=config.learner.head_tokens)
        self._transform = SamplingTransform(
            sampler.temperature, sampler.top_p, sampler.top_k, config.learner.head_tokens
        )
        self._model: Any = self._loaded(adapter=self._lora)
        if not adapters.sends_adapter(config.model) or config.run.export_merged:
            saving.check_names(self._model)
        for sentence in [] if blank or ranks.rank else adapters.left_out(self._model, config.model):
            log.warning("%s", sentence)
        self._reference: Any = None
        if config.learner.kl_coef > 0 and not self._lora:
            self._reference = self._loaded(adapter=False, trained=False)
        self._kind_of = packing_support.kind_of_length(loading.causal_of(self._model).config)
        if not blank:
            with lost_in_words(ranks.rank, "loading"):
                self._check_forward()
            saving.try_export(self._model, folder, ranks)
        self.packed = self._choose_packing()
        if config.learner.gradient_checkpointing:
            loading.checkpoint_layers(self._model)
        compiled = loading.compiles(config.learner.compile, device)
        if compiled and not blank:
            loading.compile_layers(self._model)
        trained = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self._optimizer = MasterOptimizer(
            trained, config.optimizer, matrices=loading.layer_matrices(self._model), seed=config.train.seed,
            compiled=device != "cpu" or compiled,
        )  # fmt: skip
        self._held = [p for _, p in trained if not isinstance(p, DTensor)]
        assert ranks.size == 1 or all(p.dtype == torch.float32 for p in self._held), "their gradients would be missed"
        self._weights, self._averages = self._parts()
        self.parameters_trained = sum(p.numel() for _, p in trained)
        self.parameters_total = sum(nf4.weights_in(p) for p in self._model.parameters())
        self.vocabulary = rehearsal.vocabulary_of(self._model)

    def _loaded(self, adapter: bool, trained: bool = True) -> Any:
        """The model on the device; among ranks it is read into host memory, and only its slices go to the device."""
        config, ranks = self._config, self._ranks
        model = loading.load(self._folder, config.model, self._device if ranks.size == 1 else "cpu", blank=self._blank)
        model.requires_grad_(trained and not adapter)
        if adapter:
            model = adapters.add_adapter(model, config.model, self._folder, config.train.seed)
        held = [p for p in model.parameters() if p.requires_grad] if adapter else []
        ranks.shard(loading.causal_of(model), self._dtype, held)
        return model

    def _logprobs_of(self, model: Any, pack: Pack, transform: SamplingTransform) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [K], without gradient."""
        return forward(loading.causal_of(model), lambda: token_logprobs(model, pack.to(self._device), transform))

    def _choose_packing(self) -> bool:
        requested = self._config.learner.packing
        if requested == "padded":
            return False
        why = packing_support.why_not_packed(self._model)
        if not why and not self._blank:
            with lost_in_words(self._ranks.rank, "loading"):
                why = packing_support.wrong_when_packed(self._model, self._plainly, self._dtype)
                if self._ranks.all_reduce_max(int(bool(why))):  # or ranks might choose differently
                    why = why or "another rank's packed log-probs are wrong"
        if why and requested == "packed":
            family = loading.causal_of(self._model).config.model_type
            raise UserError(
                f"learner.packing='packed' but this {family!r} model cannot be packed: {why}; "
                "use learner.packing='auto'"
            )
        if why and not self._blank:
            log.warning("every prompt is repeated for each of its completions (padded path): %s", why)
        return not why

    def _plainly(self, model: Any, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        return self._logprobs_of(model, pack, self._plain)

    def _check_forward(self) -> None:
        if wrong := packing_support.check(self._model, self._plainly, from_logits, self._dtype):
            other = "" if self._dtype == torch.float32 else " or model.dtype='float32'"
            raise UserError(f"model.name={self._config.model.name!r}: {wrong}; use another model{other}")

    # -- learning ----------------------------------------------------------------------------------------------------

    @collective("updating")
    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """``inner_updates`` optimizer steps on these groups, whose completions carry advantages; none, and no
        metrics, when no token of them counts.

        Raises ``RunFailure`` before a step whose loss or gradient is not finite.
        """
        learner = self._config.learner
        rows, inputs = self._batch(groups)
        if not rows:
            self.version += 1
            return {}
        packs, passes = self._passes(rows, len(inputs.mask_BT) - 1, self.packed)
        seed = self._config.train.seed * 1_000_003 + self.version
        torch.manual_seed(seed * self._ranks.size + self._ranks.rank)
        if learner.inner_updates > 1:
            inputs = dataclasses.replace(inputs, old_BT=self._table(self._model, passes, inputs.mask_BT))
        if learner.kl_coef > 0:
            inputs = dataclasses.replace(inputs, reference_BT=self._reference_table(passes, inputs.mask_BT))
        metrics: dict[str, float] = {}
        try:
            with loading.training(self._model):
                for inner in range(learner.inner_updates):
                    metrics = self._step(passes, inputs, inner)
        finally:
            self._optimizer.zero_grad()
        self.version += 1
        if learner.inner_updates == 1:  # the ratio was 1 everywhere
            del metrics["ratio_mean"], metrics["clip_fraction"]
        if learner.importance == "off":
            del metrics["importance_mean"], metrics["importance_max"]
        counts_P3 = [(pack.prompt_tokens, len(pack.row_K), pack.token_ids.numel()) for pack in packs] or [(0, 0, 0)]
        prompt_tokens, completion_tokens, computed = self._ranks.sum(
            torch.tensor(counts_P3, device=self._device).sum(0)
        ).tolist()
        return metrics | {
            "tokens_prompt": float(prompt_tokens),
            "tokens_completion": float(completion_tokens),
            "tokens_computed": float(computed),
            "tokens_learned": inputs.num_tokens,
            "packed": float(self.packed),
        }

    def _step(self, passes: Sequence[Pack], inputs: losses.LossInputs, inner: int) -> dict[str, float]:
        """Update ``inner`` on this batch."""
        causal, parts = loading.causal_of(self._model), []
        if len(passes) > 1:
            self._optimizer.blank_gradients()
        for pack in passes:
            loss = losses.ChunkedLoss(pack.row_K, pack.column_K, inputs, self._config.learner)
            stats = forward(causal, functools.partial(forward_backward, self._model, pack, loss, self._transform))
            parts.append(losses.total_stats(stats))
            pack.free_cache()
        self._optimizer.drop_blanks()
        total = losses.mean_stats(self._ranks.gather_stats(parts))
        if not math.isfinite(total["loss"]):  # only now: a rank that stopped earlier would leave the others
            raise RunFailure(self._not_finite("loss", total["loss"]))
        self._ranks.sum_gradients(self._held)
        norm = self._optimizer.clip()
        if not math.isfinite(norm):
            raise RunFailure(self._not_finite("gradient norm", norm))
        updates = self._config.learner.inner_updates
        lr = learning_rate(self._config.optimizer, self.version * updates + inner, self._config.train.steps * updates)
        if not self._blank:
            self._optimizer.step(lr)
        named = {name: total[statistic] for statistic, name in METRICS.items() if statistic in total}
        return named | {"grad_norm": norm, "lr": lr}

    def _passes(self, rows: Sequence[Row], idle: int, packed: bool) -> tuple[list[Pack], list[Pack]]:
        """This rank's packs, and the passes it makes: the same, and dummies (row ``idle``, whose loss is 0) until all
        ranks have equally many, so that all issue the same collectives."""
        ranks, budget = self._ranks, self._config.learner.microbatch_tokens
        own = rows if ranks.size == 1 else shard(rows, ranks.size, packed)[ranks.rank]
        packs = [pack.to(self._device) for pack in make_microbatches(own, budget, packed, self._kind_of)]
        if ranks.size == 1:
            return packs, packs
        missing = ranks.all_reduce_max(len(packs)) - len(packs)
        (dummy,) = make_microbatches([Row(idle, rows[0].prompt[:1], rows[0].completion[:1])], budget, packed)
        return packs, packs + [dummy.to(self._device)] * missing

    def _batch(self, groups: Sequence[Group]) -> tuple[list[Row], losses.LossInputs]:
        """What is computed of the step, and its tensors; B completions, T the longest. Among ranks the last row is a
        dummy with a mask of 0, for dummy passes."""
        pairs = [(group.prompt.token_ids, completion) for group in groups for completion in group.completions]
        B, T = len(pairs), max((len(completion.token_ids) for _, completion in pairs), default=0)
        spec = self._config.learner
        advantages_B = torch.zeros(B)
        mask_BT, sampler_BT = torch.zeros(B, T), torch.zeros(B, T)
        rows: list[Row] = []
        for index, (prompt, completion) in enumerate(pairs):
            assert completion.advantage is not None, "a completion without advantage reached the learner"
            length = len(completion.token_ids)
            advantages_B[index] = completion.advantage
            sampler_BT[index, :length] = torch.tensor(completion.logprobs)
            if advantages.counts(completion, spec):
                mask_BT[index, :length] = 1.0
                if advantages.has_gradient(completion, spec):
                    rows.append(Row(index, prompt, completion.token_ids))
        coef_BT = losses.LOSSES[spec.loss].coefficients(mask_BT, self._config.sampler.max_tokens)
        dummy, num_tokens = int(self._ranks.size > 1), float(mask_BT.sum())
        advantages_BT, mask_BT, sampler_BT, coef_BT = (
            torch.cat([values_BT, values_BT.new_zeros(dummy, T)]).to(self._device)
            for values_BT in (advantages_B[:, None].expand(B, T), mask_BT, sampler_BT, coef_BT)
        )
        return rows, losses.LossInputs(advantages_BT, mask_BT, sampler_BT, coef_BT, num_tokens)

    def _table(self, model: Any, passes: Sequence[Pack], like_BT: torch.Tensor) -> torch.Tensor:
        """The model's log-probs [B, T] of the tokens of these passes, without gradient; 0 elsewhere."""
        out_BT = torch.zeros_like(like_BT)
        for pack in passes:
            out_BT[pack.row_K, pack.column_K] = self._logprobs_of(model, pack, self._transform)[0]
            pack.free_cache()
        return out_BT

    def _reference_table(self, passes: Sequence[Pack], like_BT: torch.Tensor) -> torch.Tensor:
        if self._reference is not None:
            return self._table(self._reference, passes, like_BT)
        with self._model.disable_adapter():
            return self._table(self._model, passes, like_BT)

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"the learner stopped before step {self.version + 1}: the {what} is {value}; the batch is kept in the "
            "rollouts. Lower optimizer.lr or optimizer.max_grad_norm, and look at the batch's rewards and log-probs"
        )

    def rehearse(self, groups: Sequence[Group]) -> None:
        """The largest pack that groups of these prompts can make, every completion ``max_tokens`` long, through
        forward, backward and optimizer at rate 0. Weights, moments, version and random state are as before, bit for
        bit."""
        config, version = self._config, self.version
        full = rehearsal.pad_to_max_tokens(groups, config.sampler.max_tokens)
        pack, more = rehearsal.largest_pack(full, config.learner.microbatch_tokens, self.packed, self.vocabulary)
        self._config = rehearsal.at_rate_zero(config)
        try:
            with torch.random.fork_rng():
                if more:  # a later pack finds the gradients of those before it
                    self._optimizer.blank_gradients()
                self.update(rehearsal.repeated(pack, self._ranks.size, self.vocabulary))
        finally:
            self._config, self.version = config, version
            self._optimizer.reset()

    def tensors_by_category(self) -> dict[str, list[torch.Tensor]]:
        """Every tensor that is held between steps, not copied: ``weights`` and, of them, those ``trained``; the
        ``reference``; what is ``stepped`` (float32 master weights, or weights themselves) and its ``moments``."""
        state = self._optimizer.state()
        return {
            "weights": [*nf4.stored(self._model), *self._model.buffers()],
            "trained": [p for p in self._model.parameters() if p.requires_grad],
            "reference": list(nf4.stored(self._reference)) if self._reference is not None else [],
            "stepped": [value for name, value in state.items() if name.endswith(("/master", "/weight"))],
            "moments": [value for name, value in state.items() if not name.endswith(("/master", "/weight"))],
        }

    # -- weights -----------------------------------------------------------------------------------------------------

    def publish_weights(self, merged: bool = False) -> InProcessWeights:
        """The live tensors, not copied: the adapter under LoRA, unless ``merged`` or DoRA; every weight else.

        With several ranks all of them open the handle, and each gathers every full tensor in turn.
        """
        self.wake("weights")
        if not self._lora:
            return InProcessWeights("full", lambda: self._gathered(saving.full_tensors))
        if merged or not adapters.sends_adapter(self._config.model):
            return InProcessWeights("full", lambda: self._gathered(saving.merged_tensors))
        described = adapters.adapter_dict(self._model)
        return InProcessWeights("adapter", lambda: iter(adapters.adapter_tensors(self._model).items()), described)

    def _gathered(
        self, tensors: Callable[[Any, torch.dtype], Iterator[tuple[str, torch.Tensor]]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        with lost_in_words(self._ranks.rank, "gathering weights"):
            yield from tensors(self._model, self._dtype)

    @collective("computing log-probs")
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs at temperature 1; [T - 1] numbers for a sequence of T tokens."""
        rows = [Row(index, tuple(ids[:1]), tuple(ids[1:])) for index, ids in enumerate(sequences)]
        longest = max((len(ids) - 1 for ids in sequences), default=0)
        if longest < 1:
            return [[] for _ in sequences]
        _, passes = self._passes(rows, len(rows), packed=False)
        answer_BT = torch.zeros(len(rows) + 1, longest)
        # A probe of some ten tokens is not worth the seconds that compiling this pass would take. The compiled pass
        # is held against the sampler by the step's logprob_diff_mean.
        with torch.compiler.set_stance("force_eager"):
            for pack in passes:
                answer_BT[pack.row_K, pack.column_K] = self._plainly(self._model, pack)[0].cpu()
        answer_BT[-1] = 0  # the dummies'
        answer_BT = self._ranks.sum(answer_BT.to(self._device))
        return [row_T[: len(ids) - 1] for row_T, ids in zip(answer_BT.tolist(), sequences, strict=False)]

    @contextlib.contextmanager
    def perturbed(self, seed: int) -> Iterator[None]:
        """Inside, every trained weight carries seeded noise (``learner/model/noise.py``)."""
        self.wake("weights")
        with contextlib.ExitStack() as stack:
            with lost_in_words(self._ranks.rank, "gathering weights"):
                stack.enter_context(noise.perturbed(self._model, self._dtype, seed))
            yield

    # -- the device, shared with a sampler ---------------------------------------------------------------------------

    def _parts(self) -> tuple[HostOffload, HostOffload]:
        """The device's tensors that can wait on the host: the weights, and what only the optimizer needs. None of them
        unless memory.offload_while_sampling asks for it."""
        if not self._config.memory.offload_while_sampling or self._blank:
            return HostOffload(()), HostOffload(())
        weights = HostOffload(t for model in (self._model, self._reference) if model for t in nf4.stored(model))
        moments = (t for t in self._optimizer.state().values() if t.device.type == torch.device(self._device).type)
        return weights, HostOffload(moments, besides=weights)

    def sleep(self, part: Literal["moments", "all"] = "all") -> None:
        """Gives unused device memory back while the sampler works; with memory.offload_while_sampling the optimizer's
        moments and float32 master weights, or all that is held, wait on the host until ``wake``."""
        self._averages.offload()
        if part == "all":
            self._weights.offload()
        release(self._device)

    def wake(self, part: Literal["weights", "all"] = "all") -> None:
        """Undo of ``sleep``, of the weights alone or of everything."""
        self._weights.onload()
        if part == "all":
            self._averages.onload()

    # -- files -------------------------------------------------------------------------------------------------------

    @collective("saving")
    def save(self, folder: Path) -> None:
        """Float32 master weights (or weights) and moments in ``folder``: ``state.safetensors``, or each rank's slices
        in a file of its own; the version in ``learner.json``. Any number of ranks can read them."""
        state = {name: self._weights.held(self._averages.held(t)) for name, t in self._optimizer.state().items()}
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
        with self._ranks.raise_on_any("saving"):
            if self._ranks.rank == 0:
                atomic_files.write_json(folder / "learner.json", {"version": self.version, "ranks": self._ranks.size})

    @collective("restoring")
    def restore(self, folder: Path) -> None:
        """Undo of ``save``, by any number of ranks. Raises ``UserError`` when the state belongs to another model."""
        self.wake()
        shapes = shapes_in(folder)
        own = {name: value.shape for name, value in self._optimizer.state().items()}
        weights = tuple(name for name in own if name.endswith(("/master", "/weight")))
        if {name.rpartition("/")[0] for name in shapes} != {name.rpartition("/")[0] for name in weights} or any(
            shapes.get(name, own[name]) != own[name] for name in weights
        ):
            raise UserError(f"checkpoint {str(folder)!r} belongs to another model or adapter; resume with its own")
        if not set(weights) <= shapes.keys() <= own.keys() or any(own[name] != shapes[name] for name in shapes):
            raise UserError(
                f"checkpoint {str(folder)!r} was written by another optimizer than "
                f"{self._config.optimizer.name!r} with master={self._config.optimizer.master!r}; resume with its own "
                "(optimizer.name, optimizer.master)"
            )
        tensors = self._optimizer.blank_state(shapes)
        read_state(tensors, folder)
        self._optimizer.load_state(tensors)
        self.version = int(json.loads((folder / "learner.json").read_text())["version"])

    @collective("exporting")
    def export(self, folder: Path, merged: bool = False) -> None:
        self.wake("weights")
        saving.export(self._model, self._folder, folder, merged, self._dtype, self._ranks)
