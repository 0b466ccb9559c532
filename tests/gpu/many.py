"""The checks of several processes: the broadcast of weights, and the ranks of one learner.

With one GPU a group of one goes through NCCL and FSDP2 all the same; two ranks need two GPUs, or a CPU.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor import DTensor

from common.device import collective_backend
from common.weights import broadcast
from common.weights.broadcast import Broadcast
from common.weights.handles import fingerprint
from learner.distributed import RankGroup, read_state, shapes_in, write_state
from learner.torch_learner import TorchLearner
from tests.gpu.place import GIB, device
from tests.gpu.runner import Report, Skip
from tests.making import GROUPS, config
from tests.tiny import make_tiny

BUCKET = 8 << 20


def _tensors(where: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "large": torch.randn(3 << 20, generator=draw).to(where),  # more than a bucket
        "bf16": torch.randn(1000, 37, generator=draw).bfloat16().to(where),
        "turned": torch.randn(64, 32, generator=draw).to(where).t(),
        "empty": torch.empty(0, 3, device=where),
        "count": torch.tensor([-(2**63), 2**63 - 1]).to(where),
    }


def _own_card(rank: int) -> str:
    """This rank's device; each process sees one card, as a service on a cluster does."""
    torch.set_num_threads(1)
    if device() == "cpu":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return "cpu"
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def _started(work: Any, *arguments: Any) -> None:
    torch.multiprocessing.start_processes(work, arguments, nprocs=2, start_method="spawn")


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _two(where: str) -> None:
    if where != "cpu" and torch.cuda.device_count() < 2:
        raise Skip("two ranks need two GPUs, and one is here")


# -- the broadcast -----------------------------------------------------------------------------------------------------


def broadcast_one(report: Report) -> None:
    """NCCL with one rank: joining, the sender's buckets and waits, leaving."""
    where = device()
    with tempfile.TemporaryDirectory() as place:
        here = str(torch.empty(0, device=where).device)
        group, store = broadcast._connect(f"file://{place}/store", 0, 1, "nccl", here, 60)
        alone = Broadcast(group, store, 0, 1, here, 60)
        for _ in range(2):
            tensors = _tensors(where)
            started = time.perf_counter()
            told, sent = alone.send(iter(tensors.items()), BUCKET)
            report.note(bytes=sent, send_s=time.perf_counter() - started)
            assert told == fingerprint(iter(tensors.items()))
        alone.close()


def _member(rank: int, folder: Path) -> None:
    where = _own_card(rank)
    tensors = _tensors(where)
    member = Broadcast.join(f"file://{folder}/store", rank, 2, collective_backend(where), where, 60)
    for _ in range(2):
        if rank == 0:
            started = time.perf_counter()
            _, sent = member.send(iter(tensors.items()), BUCKET)
            (folder / "rate").write_text(str(sent / (time.perf_counter() - started) / GIB))
        else:
            arrived = dict(member.receive())
            assert arrived.keys() == tensors.keys()
            assert all(torch.equal(arrived[name], tensors[name]) for name in tensors)
            assert all(one.device.type == torch.device(where).type for one in arrived.values())
    member.close()


def broadcast_two(report: Report) -> None:
    """From one process to another, bit for bit: NCCL between two GPUs, gloo on a CPU."""
    where = device()
    _two(where)
    with tempfile.TemporaryDirectory() as place:
        _started(_member, Path(place))
        report.note(backend=collective_backend(where), gib_per_s=float((Path(place) / "rate").read_text()))


# -- ranks -------------------------------------------------------------------------------------------------------------


def _rank(rank: int, size: int, folder: Path, url: str) -> None:
    where = _own_card(rank)
    ranks = RankGroup.join(rank, size, url, where, 120)
    if size == 1:  # a group of one all the same
        options = {"backend": collective_backend(where), "rank": 0, "world_size": 1}
        dist.init_process_group(store=dist.HashStore(), **options)
        ranks._mesh = dist.device_mesh.init_device_mesh(torch.device(where).type, (1,))
    learner = TorchLearner(_spec(), folder / "model", where, ranks)
    assert all(isinstance(p, DTensor) for p in learner._model.parameters()), "nothing was sliced"
    metrics = [learner.update(GROUPS) for _ in range(2)]
    weights = {name: tensor.cpu().clone() for name, tensor in learner.publish_weights().open()}
    saved = folder / f"saved-{size}"
    saved.mkdir(exist_ok=True)
    state = learner._optimizer.state()
    write_state(state, saved)
    assert shapes_in(saved) == {name: value.shape for name, value in state.items()}
    read_state(state, saved)
    if rank == 0:
        torch.save((metrics, weights), folder / f"ranks-{size}.pt")
    if size == 1:
        dist.destroy_process_group()
    else:
        ranks.leave()


def _spec() -> Any:
    return config(optimizer={"lr": 1e-2, "eps": 1.0}, learner={"microbatch_tokens": 30, "compile": "off"})


def _ranks(report: Report, size: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_tiny(folder / "model")
        if size == 1:
            _rank(0, 1, folder, "")
        else:
            _started(_rank, size, folder, f"tcp://127.0.0.1:{_port()}")
        alone = TorchLearner(_spec(), folder / "model", "cpu")
        wanted = [alone.update(GROUPS) for _ in range(2)]
        truth = dict(alone.publish_weights().open())
        found, weights = torch.load(folder / f"ranks-{size}.pt")
        assert truth.keys() == weights.keys()
        start = dict(TorchLearner(_spec(), folder / "model", "cpu").publish_weights().open())
        moved = max(float((truth[name] - start[name]).abs().max()) for name in truth)
        apart = max(float((truth[name] - weights[name]).abs().max()) for name in truth)
        metric = max(
            abs(one[key] - other[key]) / max(1e-3, abs(other[key]))
            for one, other in zip(found, wanted, strict=True)
            for key in ("loss", "grad_norm")
        )
        report.note(step_error=apart / moved, metric_error=metric)
        assert apart < 1e-2 * moved, f"the weights are {apart / moved:.2g} of the step off those of one process"
        assert metric < 1e-2, f"a metric is off by {metric:.2g}"


def ranks_one(report: Report) -> None:
    """FSDP2 in a group of one: sharding, steps, gathering and a checkpoint, against one plain process on the CPU."""
    _ranks(report, 1)


def ranks_two(report: Report) -> None:
    """The same with two ranks: two GPUs, or gloo on a CPU."""
    _two(device())
    _ranks(report, 2)
