"""Ranks: the processes that share one learner's weights, gradients and work, by FSDP2 (``fully_shard``).

Each rank holds a slice of every weight and computes its own part of the batch; a layer's weights are gathered just
before it computes and its gradients are summed, not averaged, just after. Each rank runs the same program in the same
order, for a collective waits for all of them; none waits longer than the time limit given to ``RankGroup.join``. Alone
(``RankGroup()``) there is no process group and nothing here does anything.

Here too: the files of sharded state, which any number of ranks can read. Who does which part of a batch is
``learner/batch/packing.py``; how processes are started and replaced is ``deploy/``. Used by
``learner/torch_learner.py``.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common.device import collective_backend
from common.errors import RunFailure
from common.weights.rendezvous import open_store

Result = TypeVar("Result")


class RankLost(RunFailure):
    """Another rank of this learner died or does not answer: this one cannot go on, and all must be restarted."""


class RankGroup:
    """The processes of one learner, and this one's place among them. ``RankGroup()`` is one process alone."""

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.size, self.device = 0, 1, device
        self._mesh: Any = None

    @classmethod
    def join(cls, rank: int, size: int, url: str, device: str, timeout_s: float) -> RankGroup:
        """Waits until all ``size`` ranks are here; no collective of theirs takes longer than ``timeout_s``.

        ``url`` is ``tcp://IP:PORT``, where rank 0 listens on that address alone, or ``file:///path`` for one host, a
        file that does not exist yet. Raises ``RankLost`` when the others do not come.
        """
        assert 0 <= rank < size, (rank, size)
        ranks = cls(device)
        if size == 1:
            return ranks
        assert not dist.is_initialized(), "this process is a rank already"
        ranks.rank, ranks.size = rank, size
        limit, kind = timedelta(seconds=timeout_s), torch.device(device).type
        try:
            dist.init_process_group(
                collective_backend(device), store=open_store(url, rank, size, limit), rank=rank, world_size=size,
                timeout=limit,
            )  # fmt: skip
            ranks._mesh = dist.device_mesh.init_device_mesh(kind, (size,))
        except OSError as error:
            raise RunFailure(f"the learner's rank {rank} cannot listen on {url} ({error.strerror})") from error
        except RuntimeError as error:
            raise RankLost(
                f"the learner's rank {rank} waited {timeout_s:g} s in vain for the other {size - 1} at {url} "
                f"({_first_sentence(error)})"
            ) from error
        return ranks

    def leave(self) -> None:
        """Ends the group, on this rank. Leaving twice is allowed. Ranks that wait for it get ``RankLost``: at once when
        this process ends, at the time limit while it lives, for a learner's weights keep the connections."""
        if self._mesh is not None:
            self._mesh = None
            dist.destroy_process_group()

    # -- collectives: each is called on every rank -------------------------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place; bit for bit the same on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(int(one) for one in self.gather(torch.tensor(number, device=self.device)))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, by rank; all of one shape."""
        if self.size == 1:
            return [tensor]
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(every, tensor.contiguous())
        return every

    def gather_stats(self, parts: Sequence[Mapping[str, torch.Tensor]]) -> list[Mapping[str, torch.Tensor]]:
        """Every rank's micro-batch statistics, as many from each, in one list."""
        if self.size == 1:
            return list(parts)
        keys = list(parts[0])
        mine_PK = torch.stack([torch.stack([part[key].float() for key in keys]) for part in parts])
        return [dict(zip(keys, row_K, strict=True)) for every_PK in self.gather(mine_PK) for row_K in every_PK]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients of parameters that every rank holds whole, in one go."""
        held = list(parameters)
        if self.size == 1 or not held:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for parameter, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
            parameter.grad = part.view_as(parameter)

    @contextlib.contextmanager
    def raise_on_any(self, what: str) -> Iterator[None]:
        """If the body, which must hold no collective, fails on one rank, then every rank raises."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised below, once the other ranks know
            if self.size == 1:
                raise
            failure = error
        failed = self.gather(torch.tensor(int(failure is not None), device=self.device)) if self.size > 1 else []
        if failure is not None:
            raise failure
        if any(failed):
            raise RunFailure(
                f"the learner's rank {[int(one) for one in failed].index(1)} failed at {what}; its own message says why"
            )

    # -- weights -----------------------------------------------------------------------------------------------------

    def shard(self, model: Any, dtype: torch.dtype, held: Iterable[nn.Parameter] = ()) -> None:
        """Slices a causal language model's weights over the ranks: a group for each decoder layer, one for the rest.

        They compute in ``dtype``; what is trained is kept in float32 and its gradients are summed in float32. The
        parameters in ``held`` (an adapter) stay whole on every rank. The model may lie on the CPU: only its slices
        move to the device. Nothing happens without a group.
        """
        if self._mesh is None:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # Inputs are not cast: alone they are not either, and models keep some in float32 on purpose.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        kept = set(held)
        for parameter in kept:
            parameter.data = parameter.data.to(self.device)
        names = set(getattr(model, "_no_split_modules", None) or ())
        layers = [part for part in model.modules() if type(part).__name__ in names and part is not model]
        for part in [*reversed(layers), model]:  # inner ones first
            for parameter in part.parameters():
                if parameter.requires_grad and parameter not in kept and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            fully_shard(part, mesh=self._mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=kept)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor
        model.computed = types.MethodType(lambda _, function: function(), model)
        register_fsdp_forward_method(model, "computed")


def forward(model: Any, function: Callable[[], Result]) -> Result:
    """``function()`` as the forward pass of ``model``: inside, a sharded model's weights outside its layers are whole.

    Its own ``forward`` is not called, because log-probs take another way through it (``learner/token_logprobs.py``).
    """
    return model.computed(function) if hasattr(model, "computed") else function()


def full_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A weight as one tensor on every rank, without gradient; a sliced one is cast to ``dtype`` before it is gathered,
    so that few bytes travel. A collective for a sliced one; any other comes back as it is."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    sliced: Any = tensor if dtype is None else tensor.to(dtype)
    return sliced.full_tensor()  # type: ignore[no-any-return]


def own_slice(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a tensor that every rank has whole, cut as ``like`` is; all of it if that is whole."""
    if not isinstance(like, DTensor):
        return full
    cut = distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut.to_local()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# -- files of sharded state --------------------------------------------------------------------------------------------


def write_state(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Each rank's slices as a safetensors file of its own, ``shard-0000N-...``; a collective.

    torch.distributed.checkpoint's own format keeps a pickle beside the tensors; its Hugging Face one does not.
    Raises ``RunFailure`` on every rank when one of them cannot write.
    """
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(tensors, storage_writer=writer)
    except checkpoint.CheckpointException as error:
        raise RunFailure(_cause(error)) from error


def shapes_in(folder: Path) -> dict[str, torch.Size]:
    """Name and whole shape of each tensor in the safetensors files there, however many ranks wrote them."""
    from torch.distributed import checkpoint

    found: Mapping[str, Any] = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: about.size for name, about in found.items()}


def read_state(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Fills these tensors, each rank its own slices, from the files there; a collective, if there are many ranks."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone: just so
        try:
            checkpoint.load(
                tensors,
                storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)),
                no_dist=not dist.is_initialized(),
            )
        except checkpoint.CheckpointException as error:
            raise RunFailure(f"the learner's state in {folder} cannot be read: {_cause(error)}") from error


def _cause(error: Any) -> str:
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {failure}"


# -- what can go wrong -------------------------------------------------------------------------------------------------


def is_lost(error: Exception) -> bool:
    """Whether a collective failed. gloo has no class for its errors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@contextlib.contextmanager
def lost_in_words(rank: int, what: str) -> Iterator[None]:
    """Turns a collective's error into ``RankLost``."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise RankLost(
            f"the learner's rank {rank} lost another rank while {what} ({_first_sentence(error)})"
        ) from error


def _first_sentence(error: BaseException) -> str:
    """Of what torch says, without the place in its own source."""
    return str(error).strip().split("\n")[0].split("] ", 1)[-1].split(". ")[0]


def collective(what: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Marks a method that all ranks call together: it raises ``RankLost`` when one of them died or is late."""

    def mark(method: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(method)
        def marked(self: Any, *args: Any, **kwargs: Any) -> Result:
            with lost_in_words(self._ranks.rank, what):
                return method(self, *args, **kwargs)

        return marked

    return mark
