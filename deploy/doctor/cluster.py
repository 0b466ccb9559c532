"""Checks across machines: the nodes of a Ray cluster, each checked from inside, and compared.

A small actor on every node runs the machine's checks there and is a rank of an all-reduce, as the learner's are, on the
address that Ray uses. The actors take no core and no device, so this runs beside a training run. Left out: joining the
cluster (``deploy/cluster/connection.py``), and NCCL between GPUs. Needs Ray.
"""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common import device
from common.errors import UserError
from deploy.doctor.machine import Finding, judged, source_checksum, this_machine, versions
from learner.distributed import RankGroup

MIB = 2**20
_ANSWER_S = 180.0  # a node's first answer: a worker starts there and imports torch
_TALK_S = 10.0  # a small question
_COLLECTIVE_S = 30.0  # for all ranks to meet, and again for each sum
_SUMMED_MIB = 16
_SLOW_MIB_PER_S = 20


def look(folder: str = "") -> Iterator[tuple[str, list[Finding]]]:
    """Titles and findings: the cluster that this process has joined, each of its nodes, and what lies between them.

    ``folder`` is one that every node must see (empty: not asked).
    """
    nodes = alive_nodes()
    yield "cluster", [members(nodes, ray.cluster_resources())]
    actor: Any = ray.remote(Probe)
    probes = {
        name: actor.options(
            num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(ip)
        for name, (node_id, ip) in nodes.items()
    }
    try:
        answers, silent = _ask({name: probe.look.remote(folder) for name, probe in probes.items()}, _ANSWER_S)
        for name in probes:
            yield f"node {name}", answers[name][0] if name in answers else [_mute(name, silent[name])]
        there = {name: probes[name] for name in answers}
        findings = compare({name: found for name, (_, found) in answers.items()})
        if folder:
            findings += shared_folder(there, Path(folder).expanduser().absolute())
        if len(there) > 1:
            findings += collective(there)
        yield "between the nodes", findings
    finally:
        for probe in probes.values():
            ray.kill(probe)


def alive_nodes() -> dict[str, tuple[str, str]]:
    """Ray's id and address of every live node, by a name that is the address where that is unique."""
    alive = [(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    addresses = [ip for _, ip in alive]
    return {ip if addresses.count(ip) == 1 else f"{ip} ({node[:6]})": (node, ip) for node, ip in sorted(alive)}


def members(nodes: Mapping[str, tuple[str, str]], resources: Mapping[str, float]) -> Finding:
    """How many nodes there are and what they offer together."""
    offered = ", ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
    loop = [name for name, (_, ip) in nodes.items() if ip.startswith("127.") or ip == "::1"]
    cure = (
        f"{', '.join(loop)} is a loopback address; start that node again with ray start --node-ip-address=ITS_ADDRESS"
    )
    return judged(
        "nodes", f"{len(nodes)} ({', '.join(nodes)}), {offered}", (loop and len(nodes) > len(loop), "wrong", cure)
    )


def compare(per_node: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """One finding for everything that must be the same on all nodes; ``per_node``: name -> package -> version."""
    findings = []
    for what in sorted({key for found in per_node.values() for key in found}):
        holders: dict[str, list[str]] = {}
        for name, found in per_node.items():
            holders.setdefault(found.get(what) or "missing", []).append(name)
        differing = "; ".join(f"{version} on {', '.join(names)}" for version, names in holders.items())
        cure = f"install the same {what} on every node"
        if what == "source":
            cure = "put the same copy of nanogrpo on every node, or send it along: ray job submit --working-dir ."
        same = len(holders) == 1
        findings.append(judged(f"same {what}", next(iter(holders)) if same else differing, (not same, "wrong", cure)))
    return findings


def shared_folder(probes: Mapping[str, Any], folder: Path) -> list[Finding]:
    """This process makes a folder in it, each node leaves a file there, and this process looks for them."""
    cure = "put run.folder on storage that every node mounts at the same path, writable for this user"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
            marks = {name: probe.leave_mark.remote(place, name) for name, probe in probes.items()}
            _, troubles = _ask(marks, 2 * _TALK_S)
            _within(_TALK_S, lambda: {*os.listdir(place)} >= probes.keys() - troubles)
            seen = os.listdir(place)
    except OSError as error:
        return [Finding(str(folder), str(error), "wrong", cure)]
    found = {
        name: troubles.get(name) or ("seen and written" if name in seen else "what it wrote is not seen here")
        for name in probes
    }
    return [
        judged(f"{folder} on {name}", found[name], (found[name] != "seen and written", "wrong", cure)) for name in found
    ]


def collective(probes: Mapping[str, Any], limit_s: float = _COLLECTIVE_S) -> list[Finding]:
    """An all-reduce over gloo by one process on each node, as the learner's ranks do it: each is connected to every
    other one. Where it fails, each pair on its own, which shows who does not reach whom."""
    names = list(probes)
    what = f"collective of {', '.join(names)}"
    url, troubles = _ask({names[0]: probes[names[0]].rendezvous.remote()}, _TALK_S)
    rates: dict[str, float] = {}
    if url:
        sums = {
            name: probe.add_up.remote(rank, len(names), url[names[0]], limit_s)
            for rank, (name, probe) in enumerate(probes.items())
        }
        rates, troubles = _ask(sums, 3 * limit_s)
    if not troubles:
        slowest = min(rates.values())
        cure = "weights of 3 GiB take minutes at every sync; look for a faster network"
        return [judged(what, f"gloo adds up, {slowest:.0f} MiB/s", (slowest < _SLOW_MIB_PER_S, "warn", cure))]
    cure = "gloo needs TCP both ways between them on any port, on Ray's addresses (firewall, routes, --node-ip-address)"
    findings = [Finding(what, "; ".join(f"{name}: {why}" for name, why in troubles.items()), "wrong", cure)]
    for pair in itertools.combinations(names, 2) if len(names) > 2 else ():
        findings += collective({name: probes[name] for name in pair}, limit_s / 2)
    return findings


class Probe:
    """One node's part in the checks; an actor. ``ip``: the address that Ray knows the node by."""

    def __init__(self, ip: str) -> None:
        self._ip = ip

    def look(self, folder: str) -> tuple[list[Finding], dict[str, str]]:
        """The machine's checks, and what must be the same on every node."""
        found = versions()
        found["python"] = ".".join(found["python"].split(".")[:2])
        del found["nanogrpo"]  # may be installed on some and sent along to others: the source is what counts
        findings = [*this_machine(folder, needs_token=True), address_of(self._ip)]
        return findings, found | {"source": source_checksum()}

    def leave_mark(self, place: str, name: str) -> None:
        """Leaves a file of this name in the folder. Raises ``OSError`` where it does not see it."""
        _within(_TALK_S, lambda: os.path.isdir(place))
        Path(place, name).touch()

    def rendezvous(self) -> str:
        """Where the ranks meet: a free port of this node's address."""
        with socket.create_server((self._ip, 0), family=socket.AF_INET6 if ":" in self._ip else socket.AF_INET) as door:
            return f"tcp://{f'[{self._ip}]' if ':' in self._ip else self._ip}:{door.getsockname()[1]}"

    def add_up(self, rank: int, size: int, url: str, limit_s: float) -> float:
        """One rank of an all-reduce; returns MiB a second sent. Raises what goes wrong."""
        device.bind_collectives(self._ip)
        ranks = RankGroup.join(rank, size, url, "cpu", limit_s)
        try:
            ranks.sum(torch.zeros(1))  # all are here
            ones = torch.full((_SUMMED_MIB * MIB // 4,), float(rank + 1))
            begin = time.monotonic()
            ranks.sum(ones)
            seconds = time.monotonic() - begin
        finally:
            ranks.leave()
        wanted = size * (size + 1) / 2
        if not bool((ones == wanted).all()):
            raise ValueError(f"the sum is wrong: {ones[0].item():g} instead of {wanted:g}")
        return 2 * (size - 1) / size * _SUMMED_MIB / seconds


def address_of(ip: str) -> Finding:
    """Whether the address that Ray gives the other nodes is one of this machine's own."""
    try:
        device.bind_collectives(ip)
    except UserError:
        cure = "no interface here has it; start Ray again with --node-ip-address set to one that the others reach"
        return Finding("address", ip, "wrong", cure)
    return Finding("address", f"{ip} on {os.environ['GLOO_SOCKET_IFNAME']}")


def _within(limit_s: float, done: Callable[[], bool]) -> None:
    """Waits for it; network storage may take some seconds to show a file."""
    end = time.monotonic() + limit_s
    while not done() and time.monotonic() < end:
        time.sleep(0.5)


def _ask(calls: Mapping[str, Any], limit_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers of calls that run at once, and why there is none, by their names."""
    answers, silent = {}, {}
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=limit_s) if calls else ([], [])
    for name, ref in calls.items():
        if ref not in ready:
            silent[name] = f"no answer after {limit_s:g} s"
            continue
        try:
            answers[name] = ray.get(ref, timeout=_TALK_S)
        except Exception as error:  # whatever happens over there is a finding here
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            silent[name] = (lines[-1] if lines else type(error).__name__)[:300]
    return answers, silent


def _mute(name: str, why: str) -> Finding:
    if "No module named" in why:
        cure = "install nanogrpo there as here, or send it along: ray job submit --working-dir . -- ..."
    else:
        cure = f"look into Ray's logs on that node (/tmp/ray/session_latest/logs), or start it again: {name}"
    return Finding(f"node {name}", why, "wrong", cure)
