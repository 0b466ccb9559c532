"""How much a CPU process's heap grows under a learner's tensors, found by asking this process's own C library for them.

Memory that is asked for and never written costs nothing, so shape-only tensors can be given addresses as real ones are
(``learner/memory.py``). Between them the small things of a training step, which the run on shapes makes too, take up
the slivers that the alignment of tensors leaves; neighbours of a sliver in use can no longer be joined, and where a
freed block does not fit the next request the heap grows. That is a tenth to a third of a learner's memory on a CPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

ALIGNMENT = 64  # torch's, of every tensor
MAPPED = 1 << 30  # bytes from which a block is mapped by itself and not in the heap


class Heap:
    """Blocks by number. ``grown`` is None where the C library is another than glibc, or addresses run out."""

    def __init__(self) -> None:
        self._libc: Any = None
        self._blocks: dict[int, tuple[int, int]] = {}
        self._mapped = 0
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
            libc.free.argtypes = [ctypes.c_void_p]
            libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
            libc.malloc_trim.argtypes = [ctypes.c_size_t]
        except (OSError, AttributeError):
            return
        libc.mallopt(-3, MAPPED)  # as common.device.set_threads: freed blocks are kept
        libc.mallopt(-1, (1 << 31) - 1)
        self._libc, self._place = libc, ctypes.c_void_p()
        self.trim()
        self._start = libc.sbrk(0)

    def take(self, number: int, size: int) -> None:
        if self._libc is None:
            return
        if self._libc.posix_memalign(ctypes.byref(self._place), ALIGNMENT, size):
            self.close()
            return
        self._blocks[number] = (self._place.value or 0, size)
        if size >= MAPPED:
            self._mapped += size

    def free(self, number: int) -> None:
        place, size = self._blocks.pop(number, (0, 0))
        if place:
            self._libc.free(place)
            if size >= MAPPED:
                self._mapped -= size

    def trim(self) -> None:
        """As ``common.device.release``, which the loop calls between phases."""
        if self._libc is not None:
            self._libc.malloc_trim(0)

    @property
    def grown(self) -> int | None:
        """Bytes now."""
        return None if self._libc is None else int(self._libc.sbrk(0)) - int(self._start) + self._mapped

    def close(self) -> None:
        """Gives everything back."""
        for number in list(self._blocks):
            self.free(number)
        self.trim()
        self._libc = None
