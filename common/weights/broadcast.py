"""The broadcast of weights from the learner to samplers in other processes, on any hosts: gloo or NCCL.

A little process group of its own, beside whatever group vLLM or FSDP has set up in the same process: a store and a
backend made directly, torch's default group untouched. Weights pass in buckets, so that neither side holds the whole
model, and every wait ends in a ``RunFailure``. Transfers that can be pickled are in common/weights/handles.py; used by
deploy/, which gives out the url and the ranks.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from common.errors import RunFailure
from common.protocols import Transport
from common.weights.handles import Fingerprint, Kind, Tensors, raw_bytes

_ALIGNED = 64  # bytes: where a tensor begins in a bucket, whatever its number format
T = TypeVar("T")


class Broadcast:
    """One member of the group; rank 0 sends, all others receive, as often as they like.

    After a ``RunFailure`` of the transport itself the member is closed, which its peers notice at once: all of them
    must join again, at another url.
    """

    def __init__(self, group: Any, store: Any, rank: int, size: int, device: str, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._group, self._store, self._device, self._timeout_s = group, store, device, timeout_s
        self._under_way: list[tuple[Any, torch.Tensor, float]] = []  # work, what it reads, when it was posted
        self._sent = 0  # buckets, for messages

    @classmethod
    def join(cls, url: str, rank: int, size: int, backend: str, device: str, timeout_s: float) -> Broadcast:
        """Returns when all ``size`` members have joined at ``url``: ``tcp://HOST:PORT``, where rank 0 listens, at that
        address alone, or ``file:///PATH`` of a file that is not there yet. A url serves one group.

        ``backend`` is ``gloo`` (at the interface that GLOO_SOCKET_IFNAME names) or ``nccl``; ``device`` is the torch
        device of the buckets, ``cpu`` for gloo. ``timeout_s`` bounds the joining, and later each wait for a peer.
        Raises ``RunFailure``.
        """
        assert 0 <= rank < size and size > 1, (rank, size)
        device = str(torch.empty(0, device=device).device)  # with its number: threads have current devices of their own
        try:
            group, store = _within(timeout_s, lambda: _connect(url, rank, size, backend, device, timeout_s))
        except (TimeoutError, RuntimeError, OSError) as error:
            raise RunFailure(
                f"rank {rank} of {size} could not join the broadcast of the weights at {url} within {timeout_s:g} s: "
                f"{_one_line(error)}"
            ) from None
        return cls(group, store, rank, size, device, timeout_s)

    def send(self, tensors: Tensors, bucket_bytes: int) -> tuple[str, int]:
        """Sends every tensor, exactly, and returns the fingerprint and the bytes of all.

        While one bucket is on its way the next is filled: at most two buckets of ``bucket_bytes``, and a tensor larger
        than that goes alone, from where it lies. When the source raises, the receivers are told, and the source's
        error goes on. Raises ``RunFailure`` when a receiver is dead, or takes nothing for ``timeout_s``.
        """
        assert self.rank == 0, f"rank {self.rank} receives"
        seen = Fingerprint()
        filling, spare = _Bucket(bucket_bytes, self._device), _Bucket(bucket_bytes, self._device)
        self._sent = 0
        try:
            for name, tensor in seen.watch(tensors):
                if not filling.has_room_for(tensor):
                    self._post_bucket(filling)
                    filling, spare = spare, filling
                    filling.clear()
                filling.add(name, tensor)
            self._post_bucket(filling)
            self._post_header({"sent": [seen.digest(), seen.bytes]}, 0)
            self._settle("its receivers to take the end")
        except BaseException as error:
            if self._group is not None:  # the source's failure, and not the transport's
                with contextlib.suppress(RunFailure):
                    self._post_header({"error": f"{type(error).__name__}: {_one_line(error)}"}, 0)
                    self._settle("its receivers to take the news that the source failed")
            raise
        return seen.digest(), seen.bytes

    def receive(self) -> Generator[tuple[str, torch.Tensor], None, tuple[str, int]]:
        """Yields ``(name, tensor)`` in the order sent, and returns the sender's fingerprint and bytes.

        Each bucket has its own memory, which lives as long as one of its tensors; the next is received while this one
        is used. Raises ``RunFailure`` when the sender says that its source failed, is dead, or is silent for
        ``timeout_s``. A receiver that stops midway leaves the group, and with that ends it.
        """
        assert self.rank > 0, "rank 0 sends"
        ahead = ThreadPoolExecutor(1, thread_name_prefix="weights")
        whole = False
        try:
            coming = ahead.submit(self._take)
            while True:
                header, data = coming.result()
                if "tensors" not in header:
                    whole = True
                    break
                coming = ahead.submit(self._take)
                for name, dtype, shape, start, stop in header["tensors"]:
                    yield name, data[start:stop].view(getattr(torch, dtype)).view(shape)
        finally:
            ahead.shutdown(wait=False)
            if not whole:
                self._leave(broken=True)
        if "error" in header:
            raise RunFailure(f"the learner's weights ended midway, because their source failed: {header['error']}")
        return header["sent"][0], header["sent"][1]

    def close(self) -> None:
        """Leaves the group. Closing twice is allowed."""
        self._leave(broken=False)

    def _leave(self, broken: bool) -> None:
        group, self._group, self._store = self._group, None, None
        self._under_way.clear()
        if group is not None:  # gloo's connections end with their last owner, and these two do nothing
            with contextlib.suppress(RuntimeError, TimeoutError):
                _within(self._timeout_s, group.abort if broken else group.shutdown)

    # -- the sender ---------------------------------------------------------------------------------------------------

    def _post_bucket(self, bucket: _Bucket) -> None:
        if bucket.tensors:
            self._post_header({"tensors": bucket.tensors}, bucket.filled)
            if bucket.filled:
                self._post(bucket.data[: bucket.filled])
            self._sent += 1

    def _post_header(self, header: dict[str, Any], data_bytes: int) -> None:
        self._settle(f"its receivers to take bucket {self._sent}")
        text = json.dumps(header).encode()
        self._post(torch.tensor([len(text), data_bytes], device=self._device))
        self._post(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device))

    def _post(self, tensor: torch.Tensor) -> None:
        self._under_way.append((self._start(tensor), tensor, time.monotonic()))

    def _settle(self, waiting_for: str) -> None:
        """Waits for everything under way."""
        while self._under_way:
            self._await(self._under_way[0][0], self._under_way[0][2], waiting_for)
            self._under_way.pop(0)

    # -- a receiver ---------------------------------------------------------------------------------------------------

    def _take(self) -> tuple[dict[str, Any], torch.Tensor]:
        """The next header and its bucket."""
        sizes = self._fill(torch.empty(2, dtype=torch.int64, device=self._device)).tolist()
        text = self._fill(torch.empty(sizes[0], dtype=torch.uint8, device=self._device))
        data = self._fill(torch.empty(sizes[1], dtype=torch.uint8, device=self._device))
        return json.loads(text.cpu().numpy().tobytes()), data

    def _fill(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            self._await(self._start(tensor), time.monotonic(), "the sender, rank 0")
        return tensor

    # -- both ---------------------------------------------------------------------------------------------------------

    def _start(self, tensor: torch.Tensor) -> Any:
        group = self._group
        if group is None:
            raise RunFailure("the broadcast of the weights was used after it had been closed; join again")
        try:
            return group.broadcast(tensor, 0)
        except RuntimeError as error:
            raise self._failure("its peers", 0, error) from None

    def _await(self, work: Any, started: float, waiting_for: str) -> None:
        try:
            while not work.is_completed():  # gloo has the same limit; NCCL's own wait only makes the stream wait
                if time.monotonic() - started > self._timeout_s:
                    raise RuntimeError("no answer")
                time.sleep(0.0002)
            work.wait()
        except RuntimeError as error:
            raise self._failure(waiting_for, time.monotonic() - started, error) from None

    def _failure(self, waiting_for: str, waited_s: float, error: RuntimeError) -> RunFailure:
        self._leave(broken=True)
        return RunFailure(
            f"the broadcast of the weights broke: rank {self.rank} of {self.size} waited {waited_s:.1f} s for "
            f"{waiting_for} (limit {self._timeout_s:g} s): {_one_line(error)}"
        )


class CollectiveWeights:
    """A receiver's ``WeightHandle``: opening it takes part in the broadcast, which the sender must start within the
    broadcast's ``timeout_s``."""

    def __init__(self, broadcast: Broadcast, kind: Kind, adapter_config: Mapping[str, Any] | None = None) -> None:
        self.kind, self.adapter_config = kind, adapter_config
        self._broadcast, self._opened = broadcast, False
        self._sent: tuple[str, int] | None = None

    @property
    def transport(self) -> Transport:
        return "collective"

    def sent(self) -> tuple[str, int]:
        """What the sender announced at the end: known once everything has been received."""
        if self._sent is None:
            raise RunFailure("the weights broadcast to this sampler have not been received to their end")
        return self._sent

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Receives, once. Raises ``RunFailure`` the second time, because nothing is sent twice."""
        if self._opened:
            raise RunFailure(
                "the weights broadcast to this sampler were opened a second time; load_weights must open its handle "
                "once and keep what it needs, or use sync.transport=shared_memory"
            )
        self._opened = True
        return self._receive()

    def _receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._sent = yield from self._broadcast.receive()


class _Bucket:
    """The sender's memory for tensors that travel together."""

    def __init__(self, room: int, device: str) -> None:
        self._memory = torch.empty(room, dtype=torch.uint8, device=device)
        self.clear()

    def clear(self) -> None:
        self.tensors: list[tuple[str, str, tuple[int, ...], int, int]] = []  # name, dtype, shape, start, stop
        self.data, self.filled = self._memory, 0

    def has_room_for(self, tensor: torch.Tensor) -> bool:
        return not self.tensors or self._start() + tensor.nbytes <= len(self._memory)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        start = self._start()
        stop = start + tensor.nbytes
        if stop > len(self._memory):
            self.data = raw_bytes(tensor).to(self._memory.device)
        else:
            self.data[start:stop].copy_(raw_bytes(tensor))
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.tensors.append((name, dtype, tuple(tensor.shape), start, stop))
        self.filled = stop

    def _start(self) -> int:
        return -(-self.filled // _ALIGNED) * _ALIGNED


def _connect(url: str, rank: int, size: int, backend: str, device: str, timeout_s: float) -> tuple[Any, Any]:
    limit = timedelta(seconds=timeout_s)
    parts = urlsplit(url)
    if parts.scheme == "file":
        store: Any = dist.FileStore(parts.path, size)
        store.set_timeout(limit)
    else:
        assert parts.scheme == "tcp" and parts.hostname and parts.port, url
        listening: int | None = None
        if rank == 0:  # left to itself the store would listen at every address of the host
            family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
            listening = socket.create_server((parts.hostname, parts.port), family=family).detach()
        store = dist.TCPStore(
            parts.hostname, parts.port, size, rank == 0, limit, wait_for_workers=False, master_listen_fd=listening
        )
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit), store
    assert backend == "nccl", backend
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * limit + timedelta(seconds=60)  # its own watchdog ends the process: ours must come first
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(torch.device(device))
    return group, store


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """Raises ``TimeoutError`` when the call takes longer; its thread then ends with whatever it waits for."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="join", daemon=True).start()
    try:
        return cast(T, answer.result(timeout_s))
    except TimeoutError:
        raise TimeoutError("not all had come") from None


def _one_line(error: BaseException) -> str:
    """The error's text, without gloo's place in its source and its advice."""
    text = re.sub(r"\[\S*\.(cc|cpp|h):\d+\] ", "", " ".join(str(error).split())).partition(" This is typically")[0]
    return text[:300] or type(error).__name__
