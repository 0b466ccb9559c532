"""What only several machines can get wrong: the nodes of a Ray cluster looked at from inside, and compared.

A small actor on every node runs the machine's checks there, tells the time, and talks to the others over TCP and in a
collective, on the address that Ray uses. The actors take no core and no device, so this runs beside a training run.
Left out: joining the cluster, and NCCL between GPUs. Used by ``deploy/doctor/machine.py``; needs Ray.
"""

from __future__ import annotations

import datetime
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common import device
from deploy.doctor.machine import Finding, source_checksum, this_machine, versions

MIB = 2**20
_ANSWER_S = 180.0  # a node's first answer: a worker starts there and imports torch
_TALK_S = 10.0  # one connection to another node
_COLLECTIVE_S = 90.0  # processes that import torch, meet and add
_SENT_MIB = 4
_NONCE_BYTES = 16


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
        answers, silent = _ask({name: probe.machine.remote(folder) for name, probe in probes.items()}, _ANSWER_S)
        for name in probes:
            yield f"node {name}", answers[name] if name in answers else [_mute(name, silent[name])]
        yield "between the nodes", _between({name: probes[name] for name in answers}, folder)
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
    text = f"{len(nodes)} ({', '.join(nodes)}), {offered}"
    loop = [name for name, (_, ip) in nodes.items() if ip.startswith("127.") or ip == "::1"]
    if loop and len(nodes) > len(loop):
        cure = f"{loop[0]} is known by a loopback address; start it again with ray start --node-ip-address=ITS_ADDRESS"
        return Finding("nodes", text, "wrong", cure)
    return Finding("nodes", text)


def _between(probes: Mapping[str, Any], folder: str) -> list[Finding]:
    """What must agree or talk, asked of the nodes that answered."""
    findings = []
    answers, silent = _ask({name: probe.versions.remote() for name, probe in probes.items()}, _ANSWER_S)
    findings += [*compare(answers), *(_mute(name, why) for name, why in silent.items())]
    findings += _clocks(probes)
    if folder:
        findings += _shared_folder(probes, folder)
    if len(probes) > 1:
        findings += _connections(probes)
        findings.append(_collective(probes))
    return findings


def compare(per_node: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """One line for everything that must be the same on all nodes; ``per_node``: name -> package -> version."""
    findings = []
    for what in sorted({key for found in per_node.values() for key in found}):
        holders: dict[str, list[str]] = {}
        for name, found in per_node.items():
            holders.setdefault(found.get(what) or "missing", []).append(name)
        if len(holders) == 1:
            findings.append(Finding(f"same {what}", next(iter(holders))))
            continue
        text = "; ".join(f"{version} on {', '.join(names)}" for version, names in holders.items())
        cure = f"install the same {what} on every node"
        if what == "source":
            cure = "put the same copy of nanogrpo on every node, or send it along: ray job submit --working-dir ."
        findings.append(Finding(f"same {what}", text, "wrong", cure))
    return findings


def clock(name: str, offset_s: float, round_trip_s: float) -> Finding:
    """``offset_s``: how far the node's clock is ahead of ours, known to half of ``round_trip_s``."""
    text = f"{offset_s:+.3f} s, give or take {round_trip_s / 2:.3f}"
    if abs(offset_s) > 1 + round_trip_s / 2:
        return Finding(f"clock of {name}", text, "warn", "set the clocks by NTP (chrony or systemd-timesyncd)")
    return Finding(f"clock of {name}", text)


def connection(source: str, target: str, mib_per_s: float, trouble: str) -> Finding:
    """One direction of a pair: ``trouble`` says why nothing arrived, else the rate there and back."""
    what = f"{source} to {target}"
    if trouble:
        cure = f"let {source} open TCP connections to every port of {target} (firewall, routes, --node-ip-address)"
        return Finding(what, trouble, "wrong", cure)
    text = f"{mib_per_s:.0f} MiB/s"
    if mib_per_s < 20:
        return Finding(what, text, "warn", "weights of 3 GiB take minutes at every sync; look for a faster network")
    return Finding(what, text)


def _clocks(probes: Mapping[str, Any]) -> list[Finding]:
    findings = []
    for name, probe in probes.items():
        best: tuple[float, float] | None = None
        for _ in range(5):  # the quickest of a few round trips knows the offset best
            before = time.time()
            answers, silent = _ask({name: probe.clock.remote()}, _TALK_S)
            after = time.time()
            if silent:
                findings.append(_mute(name, silent[name]))
                break
            trip = after - before, answers[name] - (before + after) / 2
            best = min(best, trip) if best else trip
        else:
            assert best is not None
            findings.append(clock(name, best[1], best[0]))
    return findings


def _connections(probes: Mapping[str, Any]) -> list[Finding]:
    """Every ordered pair; all the sources at once, each one target after another."""
    doors, silent = _ask({name: probe.open_door.remote() for name, probe in probes.items()}, _TALK_S)
    findings = [_mute(name, why) for name, why in silent.items()]
    asked = {
        (source, target): probe.visit.remote(*doors[target])
        for source, probe in probes.items()
        for target in doors
        if source != target
    }
    answers, troubles = _ask(asked, _TALK_S * (len(doors) + 1))
    for source, target in asked:
        rate, trouble = answers.get((source, target), (0.0, troubles.get((source, target), "")))
        findings.append(connection(source, target, rate, trouble))
    return findings


def _collective(probes: Mapping[str, Any]) -> Finding:
    """An all-reduce over gloo by one process on each node, as the learner's ranks do it."""
    names = list(probes)
    what = f"collective over {len(names)} nodes"
    place, silent = _ask({names[0]: probes[names[0]].hold_meeting.remote()}, _TALK_S)
    if silent:
        return _mute(names[0], silent[names[0]])
    host, port = place[names[0]]
    asked = {
        name: probe.all_reduce.remote(rank, len(names), host, port) for rank, (name, probe) in enumerate(probes.items())
    }
    answers, silent = _ask(asked, _COLLECTIVE_S + _TALK_S)
    troubles = {name: silent.get(name) or answers[name] for name in names if silent.get(name) or answers.get(name)}
    if troubles:
        text = "; ".join(f"{name}: {why}" for name, why in troubles.items())
        cure = "gloo needs TCP both ways between all nodes on any port, on the interface of Ray's address"
        return Finding(what, text, "wrong", cure)
    return Finding(what, "gloo adds up")


def _shared_folder(probes: Mapping[str, Any], folder: str) -> list[Finding]:
    """Each node writes a file there which all the others must read."""
    findings = []
    names, word = list(probes), secrets.token_hex(8)
    written, troubles = _ask({name: probe.leave.remote(folder, word) for name, probe in probes.items()}, _TALK_S * 3)
    asked = {name: probe.find.remote(list(written.values()), word) for name, probe in probes.items()}
    seen, more = _ask(asked, _TALK_S * 3)
    _ask({name: probe.clear.remote() for name, probe in probes.items()}, _TALK_S * 3)
    for name in names:
        blind = [writer for writer, file in written.items() if file not in seen.get(name, ())]
        what, trouble = f"{folder} on {name}", troubles.get(name) or more.get(name, "")
        cure = "put run.folder on storage that every node mounts at the same path, writable for this user"
        if trouble:
            findings.append(Finding(what, trouble, "wrong", cure))
        elif blind:
            findings.append(Finding(what, f"does not see what {', '.join(blind)} wrote", "wrong", cure))
        else:
            findings.append(Finding(what, "seen and written"))
    return findings


class Probe:
    """One node's part in the checks; an actor. ``ip``: the address that Ray knows the node by."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._left: list[Path] = []
        self._meeting: socket.socket | None = None

    def machine(self, folder: str) -> list[Finding]:
        return [*this_machine(folder, needs_token=True), address_of(self._ip)]

    def versions(self) -> dict[str, str]:
        found = versions()
        found["python"] = ".".join(found["python"].split(".")[:2])
        del found["nanogrpo"]  # may be installed on some and sent along to others: the source is what counts
        return {**found, "source": source_checksum()}

    def clock(self) -> float:
        return time.time()

    def open_door(self) -> tuple[str, int, bytes]:
        """Listens on the node's address until the process ends. Returns where, and the word that opens."""
        word = secrets.token_bytes(_NONCE_BYTES)
        server = _listen(self._ip)
        threading.Thread(target=_echo, args=(server, word), daemon=True).start()
        return self._ip, server.getsockname()[1], word

    def visit(self, host: str, port: int, word: bytes) -> tuple[float, str]:
        """Sends a few MiB to another node's door and reads them back. Returns MiB a second and what went wrong."""
        data = secrets.token_bytes(_SENT_MIB * MIB)
        try:
            with socket.create_connection((host, port), timeout=_TALK_S) as link:
                link.sendall(word)
                begin = time.monotonic()
                sender = threading.Thread(target=_send, args=(link, data), daemon=True)
                sender.start()
                back = _receive(link, len(data))
                seconds = time.monotonic() - begin
        except OSError as error:
            return 0.0, f"{host}:{port}: {error}"
        if back != data:
            return 0.0, f"{host}:{port}: {len(back)} of {len(data)} bytes came back, or others"
        return 2 * _SENT_MIB / seconds, ""

    def hold_meeting(self) -> tuple[str, int]:
        """A socket for the collective's meeting, on the node's address alone."""
        self._meeting = _listen(self._ip)
        return self._ip, self._meeting.getsockname()[1]

    def all_reduce(self, rank: int, size: int, host: str, port: int, limit_s: float = _COLLECTIVE_S) -> str:
        """Runs this node's part in a process of its own, which can be ended; returns what went wrong."""
        door = self._meeting.fileno() if self._meeting else -1
        args = f"{self._ip!r}, {rank}, {size}, {host!r}, {port}, {door}"
        call = f"from deploy.doctor.cluster import add_up; add_up({args})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", call], env=environment, pass_fds=() if door < 0 else (door,),
                capture_output=True, text=True, timeout=limit_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end after {limit_s:g} s"
        return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended"])[-1][:200]

    def leave(self, folder: str, word: str) -> str:
        """Writes a file of its own into the folder, which is made if need be."""
        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        file = place / f".doctor-{secrets.token_hex(8)}"
        self._left.append(file)
        file.write_text(word)
        return str(file)

    def find(self, files: Sequence[str], word: str) -> list[str]:
        """Those of the files that are seen from here; network storage may take some seconds to show them."""
        end = time.monotonic() + _TALK_S
        while True:
            seen = [file for file in files if _reads(file) == word]
            if len(seen) == len(files) or time.monotonic() > end:
                return seen
            time.sleep(0.5)

    def clear(self) -> None:
        for file in self._left:
            file.unlink(missing_ok=True)


def interface_of(ip: str) -> str:
    """The network interface that has this address; empty if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.split("%")[0] == ip for address in addresses):
            return name
    return ""


def address_of(ip: str) -> Finding:
    """Whether the address that Ray tells the other nodes is one of this machine's own."""
    name = interface_of(ip)
    if not name:
        cure = "no interface here has it; start Ray again with --node-ip-address set to one that the others reach"
        return Finding("address", ip, "wrong", cure)
    return Finding("address", f"{ip} on {name}")


def add_up(ip: str, rank: int, size: int, host: str, port: int, door: int) -> None:
    """One rank of an all-reduce over gloo; raises when it does not come out right. ``door``: rank 0's listening socket
    (so that the meeting is held on that address alone), -1 elsewhere."""
    import torch
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=_COLLECTIVE_S - 10)
    device.bind_collectives(ip)
    store = dist.TCPStore(host, port, size, rank == 0, limit, master_listen_fd=door if rank == 0 else None)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    ones = torch.full((MIB,), float(rank + 1))
    dist.all_reduce(ones)
    if not bool((ones == size * (size + 1) / 2).all()):
        raise ValueError(f"the sum is wrong: {ones[0].item():g} instead of {size * (size + 1) / 2:g}")
    dist.barrier()
    dist.destroy_process_group()


def _ask(calls: Mapping[Any, Any], timeout_s: float) -> tuple[dict[Any, Any], dict[Any, str]]:
    """The answers, and why there is none, of calls that run at once."""
    answers, silent = {}, {}
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    for name, ref in calls.items():
        if ref not in ready:
            silent[name] = f"no answer after {timeout_s:g} s"
            continue
        try:
            answers[name] = ray.get(ref, timeout=_TALK_S)
        except Exception as error:  # whatever happens over there is a finding here
            silent[name] = _last_line(error)
    return answers, silent


def _mute(name: str, why: str) -> Finding:
    if "No module named" in why:
        cure = "install nanogrpo there as here, or send it along: ray job submit --working-dir . -- ..."
    else:
        cure = f"look into Ray's logs on that node (/tmp/ray/session_latest/logs), or start it again: {name}"
    return Finding(f"node {name}", why, "wrong", cure)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _listen(ip: str) -> socket.socket:
    return socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET, backlog=64)


def _echo(server: socket.socket, word: bytes) -> None:
    """Sends back what each visitor with the right word sends, until the process ends."""
    while True:
        link, _ = server.accept()
        threading.Thread(target=_serve, args=(link, word), daemon=True).start()


def _serve(link: socket.socket, word: bytes) -> None:
    with link:
        link.settimeout(_TALK_S)
        try:
            if secrets.compare_digest(_receive(link, len(word)), word):
                _send(link, _receive(link, _SENT_MIB * MIB))
        except OSError:
            return


def _send(link: socket.socket, data: bytes) -> None:
    try:
        link.sendall(data)
    except OSError:  # the reading side tells
        return


def _receive(link: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes, or fewer where the other side closes."""
    data = bytearray()
    while len(data) < count:
        part = link.recv(min(MIB, count - len(data)))
        if not part:
            break
        data += part
    return bytes(data)


def _reads(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
