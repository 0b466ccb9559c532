"""The broadcast of weights from the learner to samplers in other processes, on any hosts: gloo or NCCL.

A process group of its own, beside whatever group vLLM or FSDP has set up in the same process: a store and a backend
made directly, torch's default group untouched. Weights pass in buckets, so that neither side holds the whole model,
and every wait ends in a ``RunFailure``. deploy/ gives out the url and the ranks.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from common.errors import RunFailure, brief
from common.protocols import Transport
from common.weights.handles import Fingerprint, Kind, Tensors, raw_bytes
from common.weights.rendezvous import open_store

_ALIGNED = 64  # bytes: the alignment of a tensor in a bucket, whatever its number format
T = TypeVar("T")


class Broadcast:
    """One member of the group; rank 0 sends, all others receive, as often as they like.

    After a ``RunFailure`` of the transport itself the member is closed, which its peers notice at once: all of them
    must join again, at another url.
    """

    def __init__(self, group: Any, store: Any, rank: int, size: int, device: str, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._group, self._store, self._device, self._timeout_s = group, store, device, timeout_s
        self._in_flight: list[tuple[Any, torch.Tensor, float]] = []  # work, what it reads, when it was posted
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
                f"{_cause(error)}"
            ) from None
        return cls(group, store, rank, size, device, timeout_s)

    def send(self, tensors: Tensors, bucket_bytes: int) -> tuple[str, int]:
        """Sends every tensor, exactly, and returns the fingerprint and the bytes of all.

        While one bucket is on its way the next is filled: at most two buckets of ``bucket_bytes``, and a tensor larger
        than that goes alone, from where it lies. When the source raises, the receivers are notified, and its error is
        raised here. Raises ``RunFailure`` when a receiver is dead, or takes nothing for ``timeout_s``.
        """
        assert self.rank == 0, f"rank {self.rank} receives"
        seen = Fingerprint()
        filling, spare = (_Bucket(torch.empty(bucket_bytes, dtype=torch.uint8, device=self._device)) for _ in range(2))
        self._sent = 0
        try:
            for name, tensor in seen.watch(tensors):
                if not filling.has_room_for(tensor):
                    self._post({"tensors": filling.tensors}, filling.data[: filling.filled])
                    filling, spare = spare, filling
                    filling.clear()
                filling.add(name, tensor)
            if filling.tensors:
                self._post({"tensors": filling.tensors}, filling.data[: filling.filled])
            self._post({"sent": [seen.digest(), seen.bytes]})
            self._settle("its receivers to take the end")
        except BaseException as error:
            if self._group is not None:  # the source's failure, and not the transport's
                with contextlib.suppress(RunFailure):
                    self._post({"error": f"{type(error).__name__}: {_cause(error)}"})
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
            while "tensors" in (message := coming.result())[0]:
                header, data = message
                coming = ahead.submit(self._take)
                for name, dtype, shape, start, stop in header["tensors"]:
                    yield name, data[start:stop].view(getattr(torch, dtype)).view(shape)
            whole = True
        finally:
            ahead.shutdown(wait=False)
            if not whole:
                self._leave(broken=True)
        end = message[0]
        if "error" in end:
            raise RunFailure(f"the learner's weights ended midway, because their source failed: {end['error']}")
        return end["sent"][0], end["sent"][1]

    def close(self) -> None:
        """Leaves the group. Closing twice is allowed."""
        self._leave(broken=False)

    def _leave(self, broken: bool) -> None:
        group, self._group, self._store = self._group, None, None
        self._in_flight.clear()
        if group is not None:  # gloo's connections end with their last owner, and these two do nothing
            with contextlib.suppress(RuntimeError, TimeoutError):
                _within(self._timeout_s, group.abort if broken else group.shutdown)

    def _post(self, header: Mapping[str, Any], data: torch.Tensor | None = None) -> None:
        """Starts a message on its way: the sizes of header and data, then both. The one before has arrived by then."""
        self._settle(f"its receivers to take bucket {self._sent}")
        text = json.dumps(header).encode()
        sizes = torch.tensor([len(text), 0 if data is None else len(data)], device=self._device)
        for part in (sizes, torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device), data):
            if part is not None and len(part):
                self._in_flight.append((self._start(part), part, time.monotonic()))
        self._sent += "tensors" in header

    def _settle(self, waiting_for: str) -> None:
        """Waits for everything in flight."""
        while self._in_flight:
            work, _, posted = self._in_flight[0]
            self._await(work, posted, waiting_for)
            self._in_flight.pop(0)

    def _take(self) -> tuple[dict[str, Any], torch.Tensor]:
        """The next message: its header and its bucket."""
        text_bytes, data_bytes = self._received(2, torch.int64).tolist()
        text = self._received(text_bytes, torch.uint8)
        return json.loads(text.cpu().numpy().tobytes()), self._received(data_bytes, torch.uint8)

    def _received(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(size, dtype=dtype, device=self._device)
        if size:
            self._await(self._start(tensor), time.monotonic(), "the sender, rank 0")
        return tensor

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
            f"{waiting_for} (limit {self._timeout_s:g} s): {_cause(error)}"
        )


class CollectiveWeights:
    """A receiver's ``WeightHandle``: opening it takes part in the broadcast, which the sender must start within the
    broadcast's ``timeout_s``."""

    transport: ClassVar[Transport] = "collective"

    def __init__(self, broadcast: Broadcast, kind: Kind, adapter_config: Mapping[str, Any] | None = None) -> None:
        self.kind, self.adapter_config = kind, adapter_config
        self._broadcast: Broadcast | None = broadcast
        self._sent: tuple[str, int] | None = None

    def sent(self) -> tuple[str, int]:
        """What the sender announced at the end: known once everything has been received."""
        if self._sent is None:
            raise RunFailure("the weights broadcast to this sampler have not been received to their end")
        return self._sent

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Receives, once. Raises ``RunFailure`` the second time, because nothing is sent twice."""
        broadcast, self._broadcast = self._broadcast, None
        if broadcast is None:
            raise RunFailure(
                "the weights broadcast to this sampler were opened a second time; load_weights must open its handle "
                "once and keep what it needs, or use sync.transport=shared_memory"
            )
        return self._receive(broadcast)

    def _receive(self, broadcast: Broadcast) -> Iterator[tuple[str, torch.Tensor]]:
        self._sent = yield from broadcast.receive()


class _Bucket:
    """The sender's memory for tensors that travel together."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
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
    store: Any = open_store(url, rank, size, limit)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit), store
    assert backend == "nccl", backend
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * limit + timedelta(seconds=60)  # its own watchdog ends the process: ours is earlier
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(torch.device(device))
    return group, store


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """Raises ``TimeoutError`` when the call takes longer; its thread then ends with whatever it waits for."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="join", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        raise TimeoutError("not all had come") from None


def _cause(error: BaseException) -> str:
    """The error in one line, without gloo's place in its source and its advice."""
    return re.sub(r"\[\S*\.(cc|cpp|h):\d+\] ", "", brief(error)).partition(" This is typically")[0]
