"""``nanogrpo doctor``: the checks of this machine, and with ``--cluster`` those of every node of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from common.errors import UserError
from common.watchdog import time_limit
from deploy.cluster import connection
from deploy.doctor.machine import Finding, show, this_machine

_JOIN_S = 120  # seconds that joining a cluster may take, a private one's start included


def diagnose(console: Console, cluster: bool, address: str, folder: str = "") -> bool:
    """Prints one line a check, then what to do; False when anything is wrong.

    ``cluster`` looks at every node of the Ray cluster at ``address`` (as ``cluster.address``) too, and leaves it at the
    end. ``folder`` is a run folder that all nodes must see; empty checks the current folder's disk only.
    """
    right = show(console, "this machine", this_machine(folder, needs_token=cluster and address != "private"))
    for title, findings in _cluster(address, folder) if cluster else ():
        right = show(console, title, findings) and right
    return right


def _cluster(address: str, folder: str) -> Iterator[tuple[str, list[Finding]]]:
    try:
        with time_limit("cluster", "taking this process in", _JOIN_S):
            connection.connect(address)
    except UserError as error:
        yield "cluster", [Finding("connection", address, "wrong", str(error))]
        return
    import ray  # only now: what it listens on is configured above

    from deploy.doctor.cluster import look

    try:
        yield from look(folder)
    finally:
        ray.shutdown()
