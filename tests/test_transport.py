"""Weights between processes: exact on every way, and every way to fail ends in one sentence and soon.

Where a failure must come at once, and not by the time limit, the limit is longer than the test may take.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from common.errors import RunFailure, UserError
from common.weights import handles
from common.weights.broadcast import Broadcast, CollectiveWeights
from common.weights.handles import (
    FolderWeights,
    InlineWeights,
    InProcessWeights,
    SharedMemoryWeights,
    fingerprint,
    raw_bytes,
    shared_memory_folder,
    weight_files,
)

SPAWN = multiprocessing.get_context("spawn")
LONG = 240  # seconds; a test that must not wait so long has half of it
BUCKET = 4096  # bytes
ADAPTER = {"peft_type": "LORA", "r": 4}


def everything() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    numbers = torch.randn(5, 7, generator=draw)
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return {
        "bf16": numbers.bfloat16(),
        "bf16.slice": torch.arange(9).bfloat16()[1:5],  # begins between two words
        "f16": numbers.half(),
        "f32": odd,
        "f64": numbers.double(),
        "i64": torch.tensor([-(2**63), 2**63 - 1, 0]),
        "i32": torch.arange(-3, 3, dtype=torch.int32),
        "i16": torch.arange(3, dtype=torch.int16),
        "i8": torch.arange(-2, 1, dtype=torch.int8),
        "u8": torch.arange(5, dtype=torch.uint8),
        "f8": numbers.to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "scalar.bool": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "transposed": numbers.t(),
        "strided": torch.arange(40.0).view(4, 10)[:, 1:9:2],
        "huge": torch.randn(3, BUCKET, generator=draw),
        "grad": torch.nn.Parameter(numbers + 1),
        "exact": torch.randn(BUCKET // 4, generator=draw),  # a bucket to the byte
        "last": torch.ones(1),
    }


def differences(arrived: dict[str, torch.Tensor]) -> list[str]:
    """Names whose number format, shape or bits are not those of ``everything``."""
    wanted = everything()
    return sorted(wanted.keys() ^ arrived.keys()) + [
        name
        for name, tensor in wanted.items()
        if name in arrived
        and (
            (tensor.dtype, tensor.shape) != (arrived[name].dtype, arrived[name].shape)
            or not torch.equal(raw_bytes(tensor), raw_bytes(arrived[name]))
        )
    ]


# -- the other processes ----------------------------------------------------------------------------------------------


def reader(pipe, handle):
    """Opens a pickled handle in a process of its own."""
    arrived = dict(handle.open())
    seen = fingerprint(arrived.items(), handle.adapter_config)
    pipe.send((differences(arrived), seen, handle.sent(), handle.kind, handle.adapter_config))


def member(pipe, url, rank, size, timeout_s, own_default_group):
    """Joins, and then does what the test says: a word for each time."""
    torch.set_num_threads(1)
    if own_default_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pipe.send("here")  # importing is no part of the time that joining may take
    assert pipe.recv() == "join"
    broadcast = Broadcast.join(url, rank, size, "gloo", "cpu", timeout_s)
    pipe.send("joined")
    while (word := pipe.recv()) != "close":
        try:
            pipe.send(_do(word, broadcast, pipe))
        except RunFailure as error:
            pipe.send(error)
    if own_default_group:
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    broadcast.close()
    broadcast.close()
    pipe.send("closed")


def _do(word, broadcast, pipe):
    handle = CollectiveWeights(broadcast, "full")
    if word == "receive":
        arrived = dict(handle.open())
        return differences(arrived), fingerprint(arrived.items()), handle.sent()
    if word == "wait midway":
        opened = handle.open()
        next(opened)
        pipe.send("midway")
        pipe.recv()
        return len(list(opened))
    if word == "stop midway":
        opened = handle.open()
        next(opened)
        del opened
        return "stopped"
    if word == "send, and wait midway":
        broadcast.send(_pausing(pipe), BUCKET)
    raise AssertionError(word)


def _pausing(pipe):
    for number in range(4):
        yield f"t{number}", torch.full((BUCKET,), float(number))
        if number == 2:
            pipe.send("midway")
            pipe.recv()


class Members:
    """A broadcast of this process and others of its own making; they are killed in the end."""

    def __init__(self, folder: Path):
        self.url = f"file://{folder}/store"
        self._started = []

    def start(self, ranks, size, timeout_s=LONG, own_default_group=False):
        """One process and a pipe to it for each rank. They wait for the others."""
        for rank in ranks:
            mine, theirs = SPAWN.Pipe()
            arguments = (theirs, self.url, rank, size, timeout_s, own_default_group)
            process = SPAWN.Process(target=member, args=arguments, daemon=True)
            process.start()
            theirs.close()  # or its end would not be seen here
            self._started.append((process, mine))
        return self._started[-len(ranks) :]

    def join(self, size, timeout_s=LONG, rank=0, **options):
        """This process joins as ``rank``, all others in new processes."""
        others = self.start([other for other in range(size) if other != rank], size, timeout_s, **options)
        assert [pipe.recv() for _, pipe in others] == ["here"] * len(others)
        for _, pipe in others:
            pipe.send("join")
        mine = Broadcast.join(self.url, rank, size, "gloo", "cpu", timeout_s)
        assert [pipe.recv() for _, pipe in others] == ["joined"] * len(others)
        return mine, others

    def close(self):
        for process, _ in self._started:
            process.kill()
            process.join()


@pytest.fixture
def members(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    made = Members(tmp_path)
    yield made
    made.close()


@pytest.fixture
def tiny_place(tmp_path):
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def much(count=64):
    """More than all buffers between two processes hold (MiB)."""
    for number in range(count):
        yield f"t{number}", torch.full((1 << 18,), float(number))


def failing(tensors):
    yield from tensors
    raise ValueError("the gather broke")


# -- the fingerprint ---------------------------------------------------------------------------------------------------


def test_fingerprint_of_a_large_tensor_sees_blocks_that_changed_places():
    tensor = torch.arange(3 << 20, dtype=torch.int32)
    moved = tensor.clone()
    moved[:4096], moved[2 << 20 : (2 << 20) + 4096] = tensor[2 << 20 : (2 << 20) + 4096], tensor[:4096]
    changed = tensor.clone()
    changed[-4097] += 1
    assert len({fingerprint([("a", t)]) for t in (tensor, moved, changed)}) == 3
    assert fingerprint([("a", tensor)]) == fingerprint([("a", tensor.clone())])


@pytest.mark.parametrize("block", [0, 1, 2, 63, 64, 4095])
@pytest.mark.parametrize("bit", [0, 15, 47, 63])
def test_fingerprint_sees_every_bit_of_every_block(block, bit):
    words = torch.randint(0, 2**62, (4096 * 512 + 3,), generator=torch.Generator().manual_seed(0))
    before = fingerprint([("a", words.view(torch.bfloat16))])
    words[block * 512 + 7] ^= -(2**63) if bit == 63 else 2**bit
    assert fingerprint([("a", words.view(torch.bfloat16))]) != before


def test_fingerprint_of_a_few_bytes_sees_each():
    for size in (1, 7, 8, 9, 4099):
        tensor = torch.zeros(size, dtype=torch.uint8)
        for place in {0, size // 2, size - 1}:
            changed = tensor.clone()
            changed[place] = 128
            assert fingerprint([("a", changed)]) != fingerprint([("a", tensor)]), (size, place)


def test_fingerprint_does_not_depend_on_where_a_tensor_begins():
    tensor = everything()["bf16.slice"]
    assert tensor.storage_offset() == 1
    assert fingerprint([("a", tensor)]) == fingerprint([("a", tensor.clone())])


@pytest.mark.parametrize("shape", [(576,), (64, 576)])
def test_fingerprint_sees_two_numbers_that_a_step_moved_in_opposite_directions(shape):
    """Each by one unit in the last place, wherever they lie: what a small step leaves of a norm in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=draw).bfloat16()
    before = fingerprint([("a", tensor)])
    for _ in range(300):
        moved = tensor.clone().view(torch.int16).flatten()
        one, other = torch.randperm(moved.numel(), generator=draw)[:2]
        moved[one] += 1
        moved[other] -= 1
        assert fingerprint([("a", moved.view(torch.bfloat16).view(shape))]) != before


def test_an_adapters_configuration_is_part_of_its_fingerprint(tmp_path):
    tensors, config = everything(), {"r": 4, "lora_alpha": 8, "target_modules": {"q_proj", "v_proj"}}
    one = fingerprint(tensors.items(), config)
    assert one == fingerprint(tensors.items(), {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8, "r": 4})
    for key, value in {"lora_alpha": 8.8, "r": 8, "use_rslora": True}.items():
        assert fingerprint(tensors.items(), config | {key: value}) != one
    for handle in (
        InlineWeights.of(tensors.items(), "adapter", config),
        InProcessWeights("adapter", lambda: iter(tensors.items()), config),
        SharedMemoryWeights.write(tensors.items(), "adapter", config, place=tmp_path),
    ):
        assert handle.sent()[0] == one


# -- handles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["inline", "shared_memory"])
def test_another_process_gets_exactly_what_was_offered(way, tmp_path):
    tensors, wanted = everything().items(), fingerprint(everything().items(), ADAPTER)
    if way == "inline":
        handle = InlineWeights.of(tensors, "adapter", ADAPTER)
    else:
        handle = SharedMemoryWeights.write(tensors, "adapter", ADAPTER, BUCKET, tmp_path)
    mine, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=reader, args=(theirs, handle))
    process.start()
    theirs.close()
    size = sum(tensor.nbytes for _, tensor in tensors)
    assert mine.recv() == ([], wanted, (wanted, size), "adapter", ADAPTER)
    process.join()
    again = pickle.loads(pickle.dumps(handle))
    assert again == handle
    assert differences(dict(again.open())) == differences(dict(again.open())) == []
    assert [name for name, tensor in again.open() if tensor.data_ptr() % tensor.element_size()] == []


def test_every_handle_tells_what_it_sends(tmp_path):
    tensors = everything()
    size = sum(tensor.nbytes for tensor in tensors.values())
    (tmp_path / "model.safetensors").write_bytes(InlineWeights.of(tensors.items(), "full").data)
    for handle in (InProcessWeights("full", lambda: iter(tensors.items())), FolderWeights(str(tmp_path))):
        assert handle.sent() == (fingerprint(tensors.items()), size)


def test_no_weights_at_all_are_weights_too(tmp_path):
    for handle in (InlineWeights.of([], "full"), SharedMemoryWeights.write([], "full", place=tmp_path)):
        assert list(handle.open()) == []
        assert handle.sent() == (fingerprint([]), 0)


# -- shared memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket", "files"),
    [
        (1, [[300], [100], [1], [5000], [4096], [0], [63]]),
        (400, [[300, 100], [1], [5000], [4096], [0, 63]]),
        (4096, [[300, 100, 1], [5000], [4096, 0], [63]]),
        (1 << 20, [[300, 100, 1, 5000, 4096, 0, 63]]),
    ],
)
def test_a_file_holds_a_bucket_or_one_larger_tensor(bucket, files, tmp_path):
    tensors = [(f"t{size}", torch.zeros(size, dtype=torch.uint8)) for size in (300, 100, 1, 5000, 4096, 0, 63)]
    handle = SharedMemoryWeights.write(tensors, "full", None, bucket, tmp_path)
    held = [load_file(file) for file in sorted(Path(handle.folder).iterdir())]
    assert [sorted(len(tensor) for tensor in one.values()) for one in held] == [sorted(sizes) for sizes in files]


def test_what_was_opened_outlives_the_removal_and_nothing_else_does(tmp_path):
    handle = SharedMemoryWeights.write(everything().items(), "full", None, BUCKET, tmp_path)
    other = dict(handle.open())
    other["f64"].zero_()  # a reader's own copy of the page
    arrived = dict(handle.open())
    handle.remove()
    handle.remove()
    assert differences(arrived) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunFailure, match="no longer"):
        next(handle.open())


def test_a_source_that_raises_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="the gather broke"):
        SharedMemoryWeights.write(failing(everything().items()), "full", None, BUCKET, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_shared_memory_is_told_in_one_sentence(tiny_place):
    first = SharedMemoryWeights.write([("a", torch.ones(1 << 16))], "full", place=tiny_place)
    with pytest.raises(RunFailure, match=r"next 1\.0 MiB .* 0\.\d MiB free in .*--shm-size.*sync.transport=collective"):
        SharedMemoryWeights.write(much(), "full", None, 1 << 20, tiny_place)
    assert [str(path) for path in tiny_place.iterdir()] == [first.folder]
    assert torch.equal(dict(first.open())["a"], torch.ones(1 << 16))


def test_folders_of_the_dead_are_swept_and_those_of_the_living_kept(tmp_path):
    code = (
        "import sys, pathlib; from common.weights.handles import shared_memory_folder as make;"
        "print(make('nanogrpo-left', pathlib.Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [Path(process.stdout.readline().strip()) for process in processes]
    mine = shared_memory_folder("nanogrpo-mine", tmp_path)
    others = [tmp_path / "nanogrpo-runs", tmp_path / "nanogrpo-locked"]  # somebody's own
    for folder in others:
        folder.mkdir()
    processes[0].kill()
    processes[0].communicate()
    new = shared_memory_folder("nanogrpo-new", tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([folders[1], mine, new, *others])
    processes[1].kill()
    processes[1].communicate()
    for folder in (mine, new):
        folder.rmdir()
    last = shared_memory_folder("nanogrpo-last", tmp_path)  # lets go of what was removed
    assert sorted(tmp_path.iterdir()) == sorted([last, *others])
    assert [folder for folder in handles._LOCKED if folder.parent == tmp_path] == [last]


# -- the broadcast -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_broadcast_is_exact_for_every_bucket_size_and_every_receiver(members):
    """Beside a default group of the receivers' own; also after a source that failed midway."""
    sender, others = members.join(3, own_default_group=True)
    wanted = fingerprint(everything().items()), sum(t.nbytes for t in everything().values())
    for bucket in (1, 64, BUCKET - 1, BUCKET, 1 << 20, None):
        for _, pipe in others:
            pipe.send("receive")
        if bucket is None:
            with pytest.raises(ValueError, match="the gather broke"):
                sender.send(failing(everything().items()), BUCKET)
            answers = [pipe.recv() for _, pipe in others]
            assert ["ValueError: the gather broke" in str(answer) for answer in answers] == [True, True], answers
            for _, pipe in others:
                pipe.send("receive")
        assert sender.send(everything().items(), bucket or BUCKET) == wanted
        assert [pipe.recv() for _, pipe in others] == [([], wanted[0], wanted)] * 2
    for _, pipe in others:
        pipe.send("close")
        assert pipe.recv() == "closed"
    assert not dist.is_initialized()


def test_tensors_stay_what_they_were_while_the_next_buckets_come(members):
    """The consumer here keeps everything until the end, as vLLM does, and is slow."""
    receiver, [(_, pipe)] = members.join(2, rank=1)
    pipe.send("send, and wait midway")
    kept = []
    for name, tensor in receiver.receive():
        if name == "t1":
            assert pipe.recv() == "midway"
            pipe.send("go on")
        kept.append((name, tensor))
    assert [(name, tensor.unique().tolist()) for name, tensor in kept] == [(f"t{n}", [n]) for n in range(4)]
    receiver.close()


@pytest.mark.parametrize("way", ["shared_memory", "collective"])
def test_the_whole_model_is_never_held(way, members, tmp_path):
    alive, most = set(), 0

    def source():
        nonlocal most
        for number in range(40):
            tensor = torch.full((1000,), float(number))
            alive.add(number)
            weakref.finalize(tensor, alive.discard, number)
            most = max(most, len(alive))
            yield f"t{number}", tensor
            del tensor

    if way == "shared_memory":
        SharedMemoryWeights.write(source(), "full", None, 5 * 4000, tmp_path)
        assert most <= 6
    else:
        sender, [(_, pipe)] = members.join(2)
        pipe.send("receive")
        sender.send(source(), 5 * 4000)
        assert most <= 2  # what the source made last, and what it makes
        sender.close()


def test_a_collective_handle_opens_once(members):
    receiver, [(_, pipe)] = members.join(2, rank=1)
    pipe.send("send, and wait midway")
    handle = CollectiveWeights(receiver, "adapter", ADAPTER)
    opened = handle.open()
    next(opened)
    with pytest.raises(RunFailure, match="not been received to their end"):
        handle.sent()
    assert pipe.recv() == "midway"
    pipe.send("go on")
    assert len(list(opened)) == 3
    assert handle.sent() == (fingerprint((f"t{n}", torch.full((BUCKET,), float(n))) for n in range(4)), 16 * BUCKET)
    assert (handle.kind, handle.adapter_config) == ("adapter", ADAPTER)
    with pytest.raises(RunFailure, match="second time"):
        handle.open()
    receiver.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["killed", "raised"])
def test_a_receiver_that_ends_midway_ends_the_others_at_once(end, members):
    sender, [(victim, one), (_, two)] = members.join(3)
    one.send("wait midway" if end == "killed" else "stop midway")
    two.send("receive")

    def source():
        for number, (name, tensor) in enumerate(much(256)):
            if number == 2 and end == "killed":
                assert one.recv() == "midway"
                os.kill(victim.pid, signal.SIGKILL)
            yield name, tensor

    with pytest.raises(RunFailure, match=r"broke: rank 0 of 3 waited .* for its receivers to take bucket"):
        sender.send(source(), 1 << 20)
    assert "rank 2 of 3 waited" in str(two.recv())
    with pytest.raises(RunFailure, match="join again"):
        sender.send(much(1), 1 << 20)


@pytest.mark.timeout(120)
def test_a_sender_that_is_killed_ends_the_receivers_at_once(members):
    receiver, others = members.join(3, rank=2)
    (victim, pipe), (_, other) = others
    other.send("receive")
    pipe.send("send, and wait midway")
    opened = receiver.receive()
    next(opened)
    assert pipe.recv() == "midway"
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(RunFailure, match=r"rank 2 of 3 waited .* for the sender"):
        list(opened)
    assert "rank 1 of 3 waited" in str(other.recv())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_receiver_that_is_stopped_ends_everyone_within_the_limit(members):
    sender, [(victim, one), (_, two)] = members.join(3, timeout_s=3)
    one.send("wait midway")
    two.send("receive")

    def source():
        for number, (name, tensor) in enumerate(much(256)):
            if number == 2:  # the first bucket is on its way
                assert one.recv() == "midway"
                os.kill(victim.pid, signal.SIGSTOP)
            yield name, tensor

    with pytest.raises(RunFailure, match=r"rank 0 of 3 waited 3\.\d s for its receivers to take .*limit 3 s"):
        sender.send(source(), 1 << 20)
    assert "rank 2 of 3 waited" in str(two.recv())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_silent_sender_ends_its_receivers_within_the_limit(members):
    receiver, [_] = members.join(2, timeout_s=2, rank=1)
    with pytest.raises(RunFailure, match=r"rank 1 of 2 waited 2\.\d s for the sender, rank 0 \(limit 2 s\)"):
        next(receiver.receive())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("scheme", "rank"), [("file", 0), ("file", 1), ("tcp", 0), ("tcp", 1)])
def test_joining_alone_ends_within_the_limit(scheme, rank, members):
    url = members.url if scheme == "file" else "tcp://127.0.0.1:29777"
    with pytest.raises(RunFailure, match=f"rank {rank} of 3 could not join .*{url} within 2 s"):
        Broadcast.join(url, rank, 3, "gloo", "cpu", timeout_s=2)


def test_only_loopback_listens_when_told_so(members):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        members.url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    before = listening()
    sender, [(_, pipe)] = members.join(2)
    new = [place for place in listening() if place not in before]
    assert len(new) == 2, new  # the meeting place, and gloo
    assert {address for address, _ in new} == {"0100007F"}, new
    pipe.send("receive")
    assert sender.send(everything().items(), BUCKET)[0] == pipe.recv()[1]
    sender.close()


def listening() -> list[tuple[str, str]]:
    """Where this process listens: address and port in hexadecimal, as the kernel writes them."""
    own = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(file))
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path("/proc/self/net", table).read_text().splitlines()]
    return [tuple(row[1].split(":")) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


def second_set(folder):
    """A folder of two shards and their index, with another format's weights beside them; the tensors of the shards."""
    tensors = {f"layer.{number}": torch.full((2,), float(number)) for number in range(4)}
    files = {name: f"model-0000{1 + number // 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    save_file({"layer.0": torch.zeros(2), "layers.0": torch.zeros(2)}, folder / "consolidated.safetensors")
    return tensors


def test_a_folder_gives_what_its_index_names(tmp_path):
    tensors = second_set(tmp_path)
    arrived = dict(FolderWeights(str(tmp_path)).open())
    assert {name: tensor.tolist() for name, tensor in arrived.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    save_file({"layer.0": torch.ones(2)}, tmp_path / "model.safetensors")  # transformers takes this one first
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    save_file({"lora": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert FolderWeights(str(tmp_path)).kind == "full"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert [path.name for path in weight_files(tmp_path)] == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"weight_map": {"a": "x.safetensors"}}', "lacks x.safetensors, which model.safetensors.index.json names"),
        ("{", "model.safetensors.index.json cannot be read"),
        ("[]", "model.safetensors.index.json cannot be read"),
        ('{"weight_map": {"a": 1}}', "lacks 1, which"),
        (None, "holds neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_folder_without_its_weights_says_so(tmp_path, index, said):
    save_file({"layer.0": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=said):
        weight_files(tmp_path)
