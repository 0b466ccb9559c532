"""Into a Ray cluster and out of it again, and what its nodes have. Imports Ray only when it is needed, because what a
private cluster listens on is decided when it is imported.

Left out: what runs there (``resources.py``) and what may be wrong there (``deploy/doctor/cluster.py``).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import device as devices
from common.config import Config
from common.errors import UserError, brief
from common.watchdog import time_limit

_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0 when ray is imported: a private cluster keeps to loopback
Need = Mapping[str, float]


def knock(address: str) -> str:
    """Why nothing answers at ``HOST:PORT``; empty where something does. The other addresses are Ray's to find."""
    host, colon, number = address.rpartition(":")
    if not colon or not number.isdigit():
        return ""
    try:
        socket.create_connection((host.strip("[]"), int(number)), timeout=10).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""


def connect(address: str) -> bool:
    """Joins the cluster, if this process is in none yet; returns whether it now has one to leave. The cluster is the
    one at this address: ``auto`` (the job's, or this machine's), ``HOST:PORT``, or ``private`` (one of this machine
    alone, on loopback). Raises ``UserError`` when there is none, it cannot be reached, or the token is not right."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # answers that are no longer waited for
    if address == "private":
        os.environ.setdefault(_LOOPBACK_ONLY, "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"cluster.mode='ray' but ray does not import ({error}); install it with `pip install nanogrpo[ray]`"
        ) from None
    if ray.is_initialized():
        return False
    if knock(address):  # Ray itself would try for minutes
        raise UserError(
            f"cluster.address={address!r}: nothing answers there; start the head (ray start --head) and give its "
            "address and port"
        )
    options: dict[str, Any] = {"namespace": "nanogrpo", "log_to_driver": False, "logging_level": "ERROR"}
    if address == "private":
        _make_token()
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        options["address"] = address
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except Exception as error:
        raise UserError(f"cluster.address={address!r}: {_why(error, address)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler would end a run before it saves.
            signal.signal(signal.SIGTERM, on_terminate or signal.SIG_DFL)
    return True


def _why(error: Exception, address: str) -> str:
    """Why Ray could not join, and the cure."""
    if not isinstance(error, ValueError) and "token" in f"{error} {error.__cause__}".lower():
        # Ray 2.60 says so only in the cause's text.
        return (
            "the cluster refused this process's token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH (or "
            "~/.ray/auth_token) to the same token on every node"
        )
    if isinstance(error, ConnectionError) and address == "auto":
        return (
            "no Ray cluster runs on this machine; start one (ray start --head), submit the run to one (ray job "
            "submit), or set cluster.address to HOST:PORT or private"
        )
    if isinstance(error, ConnectionError):
        return "no Ray cluster answers there; check the address (ray status on the head)"
    if isinstance(error, ValueError):
        return f"that is not the address of a cluster ({brief(error)}); give HOST:PORT"
    return f"cannot join the cluster ({brief(error)})"


@contextlib.contextmanager
def joined(config: Config) -> Iterator[None]:
    """In the run's cluster, and out of it again if this process was in none. Raises ``UserError`` as ``connect``."""
    with time_limit("cluster", "taking this process in", config.timeouts.start_s, "timeouts.start_s"):
        mine = connect(config.cluster.address)
    try:
        yield
    finally:
        if mine:
            import ray

            ray.shutdown()


def _make_token() -> None:
    """A token for clusters of this user, where there is none: Ray would make one that everybody may read."""
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))


def takes_gpus(config: Config) -> bool:
    """Whether the run will compute on GPUs; the cluster is asked where the configuration leaves that open. Raises
    ``UserError`` as ``connect`` does."""
    if config.train.device != "auto" or config.cluster.address == "private":  # whose only node this machine is
        return config.train.device == "gpu" or devices.pick(config.train.device) != "cpu"
    with joined(config):
        return has_gpus()


def has_gpus() -> bool:
    return any(node.get("GPU") for node in nodes().values())


def nodes() -> dict[str, Need]:
    """What each living node has, by its address and the beginning of its id."""
    import ray

    return {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})": {
            kind: node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")
        }
        for node in ray.nodes()
        if node["Alive"]
    }
