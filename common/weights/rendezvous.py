"""Where processes find one another before their first collective. Used by the broadcast of the weights and by the
learner's ranks."""

from __future__ import annotations

import socket
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist


def open_store(url: str, rank: int, size: int, limit: timedelta) -> dist.Store:
    """The store at ``tcp://IP:PORT``, where rank 0 listens on that address alone (by itself a TCPStore would on every
    address of the host), or at ``file:///path`` for one host. Raises ``OSError`` where rank 0 cannot listen."""
    place = urlsplit(url)
    if place.scheme == "file":
        store: dist.Store = dist.FileStore(place.path, size)
        store.set_timeout(limit)
        return store
    assert place.scheme == "tcp" and place.hostname and place.port, f"{url!r} is neither tcp://IP:PORT nor file:///path"
    listening: int | None = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in place.hostname else socket.AF_INET
        listening = socket.create_server((place.hostname, place.port), family=family, backlog=128).detach()
    return dist.TCPStore(
        place.hostname, place.port, size, rank == 0, limit, wait_for_workers=False, master_listen_fd=listening
    )
