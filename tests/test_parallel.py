"""R ranks are one learner: the same metrics, weights, log-probs and files as one process, on real groups of processes.

Two groups are started (2 ranks that meet by a file, 3 that meet by a port on loopback); each goes through all that is
asked of it and writes down what it saw, and the tests compare that with one process here.
"""

import contextlib
import dataclasses
import json
import math
import pickle
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.device import bind_collectives, collective_backend
from common.errors import RunFailure, UserError
from learner.batch.packing import Row, make_microbatches, shard
from learner.distributed import RankGroup, RankLost
from learner.torch_learner import TorchLearner
from tests.making import GROUPS, config, group
from tests.tiny import make_tiny

pytestmark = pytest.mark.slow

UNEVEN = [group(30, [8, 8, 8, 8, 8], seed=11), group(4, [1, 2], seed=12), group(3, [1], seed=13)]
ONE_GROUP = [group(6, [7, 2, 1, 5], seed=14)]
ONE_ROW = [group(6, [5], seed=15)]
BATCHES = [GROUPS, UNEVEN, ONE_GROUP, ONE_ROW]

EPS = {"optimizer": {"lr": 1e-2, "eps": 1.0}}  # a large eps: AdamW keeps the gradient's size, and so its rounding
LORA = {"name": "unused", "dtype": "float32", "lora_rank": 4}
CASES = {  # name: (tied, sections)
    "plain": (True, EPS | {"learner": {"microbatch_tokens": 30}}),
    "padded": (
        False,
        EPS | {"learner": {"packing": "padded", "microbatch_tokens": 40, "kl_coef": 0.1, "loss": "grpo"}},
    ),
    "inner": (
        False,
        EPS | {"learner": {"inner_updates": 2, "kl_coef": 0.1, "gradient_checkpointing": True, "entropy_coef": 0.01}},
    ),
    "lora": (
        True,
        EPS | {"model": LORA, "learner": {"inner_updates": 2, "kl_coef": 0.1, "gradient_checkpointing": True}},
    ),
    "bfloat16": (True, {"model": {"name": "unused", "dtype": "bfloat16"}, "learner": {"microbatch_tokens": 64}}),
    "experts": ("experts", EPS),  # one tensor a layer in memory, sliced over the ranks; many in the files
}
ASKED = [(5, 6, 7, 8, 9, 10, 11), (300, 2), (17,), (1, 1, 2, 3, 5, 8, 13, 21, 34)]
WRONG = dataclasses.replace(
    GROUPS[2], completions=tuple(dataclasses.replace(one, advantage=math.nan) for one in GROUPS[2].completions)
)


def models_of(folder: Path) -> dict[bool | str, Path]:
    return {True: folder / "tied", False: folder / "untied", "experts": folder / "experts"}


def made(folder: Path, name: str, ranks: RankGroup | None = None) -> TorchLearner:
    tied, sections = CASES[name]
    return TorchLearner(config(**sections), models_of(folder)[tied], "cpu", *([ranks] if ranks else []))


def taken(learner: TorchLearner) -> dict[str, torch.Tensor]:
    """What a sampler gets, all of it."""
    return {name: tensor.clone() for name, tensor in learner.publish_weights(merged=True).open()}


def seen(learner: TorchLearner, out: Path) -> None:
    """Several steps and all that can be asked, written down under ``out``."""
    out.mkdir(parents=True)
    steps = [learner.update(batch) for batch in BATCHES]
    save_file(taken(learner), out / "weights.safetensors")
    save_file(dict(learner.publish_weights().open()), out / "offered.safetensors")
    with learner.perturbed(seed=3):
        save_file(taken(learner), out / "perturbed.safetensors")
        perturbed = learner.logprobs(ASKED)
    save_file(taken(learner), out / "after.safetensors")
    numbers = {
        "steps": steps,
        "logprobs": learner.logprobs(ASKED),
        "perturbed": perturbed,
        "none": learner.logprobs([]),
    }
    (out / "numbers.json").write_text(json.dumps(numbers))


def raised(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def files_of_at_most(count: int):
    """A disk that takes so many bytes a file and then refuses, as a full one does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def listening() -> list[str]:
    return [one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]


def two_ranks(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    bind_collectives("127.0.0.1")
    ranks = RankGroup.join(rank, 2, f"file://{folder}/meet", "cpu", timeout_s=60)
    out = folder / f"two-{rank}"
    learners = {name: made(folder, name, ranks) for name in CASES}
    for name, learner in learners.items():
        if name in ("plain", "lora"):  # of several packs; it leaves no trace, as the comparison with one process shows
            learner.rehearse(BATCHES[0])
        seen(learner, out / name)
    notes = {"listening": listening()}

    for name in ("plain", "lora", "bfloat16"):
        (folder / f"state-two-{name}").mkdir(exist_ok=True)
        learners[name].save(folder / f"state-two-{name}")
        learners[name].export(folder / f"export-two-{name}", merged=True)
    learners["lora"].export(folder / "adapter-two")
    going_on = learners["plain"].update(GROUPS)
    save_file(taken(learners["plain"]), out / "gone-on.safetensors")

    for name in ("plain", "lora"):  # what one process wrote, read and written again
        again = made(folder, name, ranks)
        again.restore(folder / f"state-one-{name}")
        (folder / f"state-one-two-{name}").mkdir(exist_ok=True)
        again.save(folder / f"state-one-two-{name}")
        notes[f"version {name}"] = again.version
    notes["other model"] = raised(lambda: learners["lora"].restore(folder / "state-one-plain"))

    learner, before = learners["inner"], taken(learners["inner"])
    notes["not finite"] = raised(lambda: learner.update([GROUPS[0], GROUPS[1], WRONG]))
    after = taken(learner)
    notes["untouched"] = all(torch.equal(after[key], before[key]) for key in before)
    notes["went on"] = math.isfinite(learner.update(GROUPS)["loss"])

    (folder / "full").mkdir(exist_ok=True)
    with files_of_at_most(10_000 if rank == 1 else resource.RLIM_INFINITY):
        notes["full"] = raised(lambda: learners["plain"].save(folder / "full"))
    with files_of_at_most(10_000 if rank == 0 else resource.RLIM_INFINITY):
        notes["full export"] = raised(lambda: learners["plain"].export(folder / "full"))
    (out / "notes.json").write_text(json.dumps(notes | {"gone on": going_on}))

    ranks.leave()
    again, silent = RankGroup.join(rank, 2, f"file://{folder}/meet-again", "cpu", timeout_s=5), folder / "silent-0.txt"
    if rank == 0:
        silent.write_text(raised(lambda: made(folder, "plain", again)))
    else:
        wait_for(silent)  # there, but it does not take part


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def three_ranks(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    bind_collectives("127.0.0.1")
    ranks = RankGroup.join(rank, 3, f"tcp://127.0.0.1:{port}", "cpu", timeout_s=60)
    seen(made(folder, "plain", ranks), folder / f"three-{rank}" / "plain")
    again = made(folder, "plain", ranks)
    again.restore(folder / "state-two-plain")
    (folder / "state-two-three").mkdir(exist_ok=True)
    again.save(folder / "state-two-three")
    notes = {"listening": listening(), "version": again.version}
    (folder / f"three-{rank}" / "notes.json").write_text(json.dumps(notes))
    if rank < 2:  # the last one's process ends
        (folder / f"gone-{rank}.txt").write_text(raised(lambda: again.update(GROUPS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything seen: ``one/CASE``, ``two-RANK/CASE``, ``three-RANK/CASE``, and the files saved."""
    folder = tmp_path_factory.mktemp("ranks")
    for tied, path in models_of(folder).items():
        make_tiny(path, tied=tied is True, family="qwen3_moe" if tied == "experts" else "llama")
    for name in CASES:
        learner = made(folder, name)
        seen(learner, folder / "one" / name)
        (folder / f"state-one-{name}").mkdir()
        learner.save(folder / f"state-one-{name}")
        if name == "plain":
            learner.update(GROUPS)
            save_file(taken(learner), folder / "one" / "gone-on.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A server that has imported everything once and forks: five imports of torch would take most of the time.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    for work, count in ((two_ranks, 2), (three_ranks, 3)):
        torch.multiprocessing.start_processes(work, (folder, port), nprocs=count, start_method="forkserver")
    return folder


RUNS = [("two-0", name) for name in CASES] + [("two-1", name) for name in CASES]
RUNS += [(f"three-{rank}", "plain") for rank in range(3)]


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    assert {key: (t.dtype, t.shape) for key, t in one.items()} == {key: (t.dtype, t.shape) for key, t in other.items()}
    return max((one[key].float() - other[key].float()).abs().max().item() for key in one)


@pytest.mark.parametrize(("run", "name"), RUNS, ids=lambda value: value)
def test_ranks_learn_what_one_process_learns(folder, run, name):
    one, many = folder / "one" / name, folder / run / name
    mine, theirs = (json.loads((place / "numbers.json").read_text()) for place in (one, many))
    loose = 2e-2 if name == "bfloat16" else 1e-5
    for expected, found in zip(mine["steps"], theirs["steps"], strict=True):
        assert list(expected) == list(found)
        counts = {"tokens_completion", "tokens_learned", "packed", "lr"}
        assert {key: expected[key] for key in counts} == {key: found[key] for key in counts}
        for key in expected.keys() - counts - {"tokens_prompt", "tokens_computed"}:
            assert found[key] == pytest.approx(expected[key], rel=10 * loose, abs=loose / 10), key
    start = load_file(models_of(folder)[CASES[name][0]] / "model.safetensors")
    weights = load_file(one / "weights.safetensors")
    moved = apart(weights, {key: start[key].to(value.dtype) for key, value in weights.items()})
    assert moved > 1e-4
    for file in ("weights", "offered", "perturbed", "after"):
        expected, found = load_file(one / f"{file}.safetensors"), load_file(many / f"{file}.safetensors")
        if name == "bfloat16":
            assert apart(expected, found) <= 4 * 1e-3 * len(BATCHES), file
            close = sum(int((expected[k].float() - found[k].float()).abs().le(1e-3).sum()) for k in expected)
            assert close / sum(value.numel() for value in expected.values()) > 0.9, file
        else:
            assert apart(expected, found) < 1e-4 * moved, file
            for key in expected:
                assert (expected[key] - found[key]).norm() <= loose * expected[key].norm(), (file, key)
    for asked in ("logprobs", "perturbed"):
        assert [len(row) for row in theirs[asked]] == [len(one) - 1 for one in ASKED]
        flat, other = ([value for row in numbers[asked] for value in row] for numbers in (mine, theirs))
        assert (torch.tensor(flat) - torch.tensor(other)).abs().max() < (0.3 if name == "bfloat16" else 1e-3), asked
    assert theirs["none"] == []


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_and_gets_the_same_and_noise_leaves_no_trace(folder, name):
    one, other = folder / "two-0" / name, folder / "two-1" / name
    assert (one / "numbers.json").read_text() == (other / "numbers.json").read_text()
    for file in ("weights", "offered", "perturbed", "after"):
        first, second = load_file(one / f"{file}.safetensors"), load_file(other / f"{file}.safetensors")
        assert apart(first, second) == 0, file
    assert apart(load_file(one / "weights.safetensors"), load_file(one / "after.safetensors")) == 0
    assert apart(load_file(one / "weights.safetensors"), load_file(one / "perturbed.safetensors")) > 0.01


def test_at_most_one_prompt_is_computed_by_both_ranks(folder):
    def prompts(run):
        return [
            step["tokens_prompt"] for step in json.loads((folder / run / "inner" / "numbers.json").read_text())["steps"]
        ]

    one, two = prompts("one"), prompts("two-0")
    longest = 30
    assert all(alone <= shared <= alone + longest for alone, shared in zip(one, two, strict=True))
    assert two[2] == 2 * one[2]  # one group for two ranks


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint put together by hand: slices end to end in the order of their ranks; what is whole from any."""
    files = sorted(folder.glob("*.safetensors"))
    loaded = [load_file(file) for file in files]
    state = {}
    for key in sorted({key for one in loaded for key in one}):
        parts = [one[key] for one in loaded if key in one]
        state[key] = torch.cat(parts) if parts[0].dim() else parts[0]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys() and len(one) > 20
    return all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_state_is_read_by_any_number_of_ranks_bit_for_bit(folder, name):
    one = load_file(folder / f"state-one-{name}" / "state.safetensors")
    assert same(one, whole_state(folder / f"state-one-two-{name}"))  # one, then two
    again = made(folder, name)
    again.restore(folder / f"state-two-{name}")  # two, then one
    assert same(whole_state(folder / f"state-two-{name}"), again._optimizer.state())
    assert again.version == len(BATCHES)
    assert json.loads((folder / "two-0" / "notes.json").read_text())[f"version {name}"] == len(BATCHES)
    if name == "plain":
        assert len(list((folder / "state-two-three").glob("*.safetensors"))) == 3
        assert same(whole_state(folder / "state-two-plain"), whole_state(folder / "state-two-three"))
        again.update(GROUPS)
        assert apart(taken(again), load_file(folder / "two-0" / "gone-on.safetensors")) < 1e-6
        assert apart(load_file(folder / "one" / "gone-on.safetensors"), taken(again)) < 1e-6


def test_ranks_keep_what_bfloat16_loses(folder):
    state = whole_state(folder / "state-two-bfloat16")
    masters = {key.removesuffix("/master"): value for key, value in state.items() if key.endswith("/master")}
    published = load_file(folder / "two-0" / "bfloat16" / "weights.safetensors")
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert apart({key: value.bfloat16() for key, value in masters.items()}, published) == 0
    assert all(not torch.equal(value, value.bfloat16().float()) for value in masters.values())


unpickled: list[str] = []
sys.addaudithook(lambda event, _: unpickled.append(event) if event == "pickle.find_class" else None)


def test_a_checkpoint_holds_no_pickle(folder):
    for state in ("state-two-plain", "state-two-lora", "state-two-three", "state-one-plain"):
        names = {path.name for path in (folder / state).iterdir()}
        assert {Path(name).suffix for name in names} == {".safetensors", ".json"}
        assert all(load_file(folder / state / name) for name in names if name.endswith(".safetensors"))
    pickle.loads(pickle.dumps(Path("a")))
    assert unpickled  # the hook sees what it should
    unpickled.clear()
    made(folder, "lora").restore(folder / "state-two-lora")
    assert not unpickled


@pytest.mark.parametrize("name", ["plain", "lora", "bfloat16"])
def test_ranks_export_what_they_publish(folder, name):
    place = folder / f"export-two-{name}"
    published = load_file(folder / "two-0" / name / "weights.safetensors")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=published["model.norm.weight"].dtype)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert apart(published, {key: value.detach() for key, value in model.named_parameters()}) == 0
    assert (place / "tokenizer.json").exists()
    assert json.loads((place / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_ranks_export_the_adapter(folder):
    published = load_file(folder / "two-0" / "lora" / "offered.safetensors")
    assert same_names_and_bits(published, load_file(folder / "adapter-two" / "adapter_model.safetensors"))


def same_names_and_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_goes_wrong_on_one_rank_is_said_by_all(folder, rank):
    notes = json.loads((folder / f"two-{rank}" / "notes.json").read_text())
    assert notes["not finite"].startswith("RunFailure: the learner stopped before step 5: the loss is nan")
    assert notes["untouched"] and notes["went on"]
    assert notes["full"].startswith("RunFailure: the checkpoint of step 5 cannot be written (rank 1: ")
    assert notes["full export"].startswith("RunFailure: ")
    assert notes["other model"].startswith("UserError: checkpoint")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_fellow_is_gone_says_so(folder, rank):
    text = (folder / f"gone-{rank}.txt").read_text()
    assert text.startswith(f"RankLost: the learner's rank {rank} lost another rank while updating (")


def test_a_rank_whose_fellow_is_silent_says_so_in_time(folder):
    text = (folder / "silent-0.txt").read_text()
    assert text.startswith("RankLost: the learner's rank 0 lost another rank while loading (Timed out waiting 5000ms")


@pytest.mark.parametrize("run", ["two-0", "two-1", "three-0", "three-1", "three-2"])
def test_ranks_listen_on_loopback_alone(folder, run):
    assert set(json.loads((folder / run / "notes.json").read_text())["listening"]) == {"127.0.0.1"}


def test_who_waits_in_vain_says_so(tmp_path):
    with pytest.raises(RankLost, match=r"rank 0 waited 0\.5 s in vain for the other 1"):
        RankGroup.join(0, 2, f"file://{tmp_path}/meet", "cpu", timeout_s=0.5)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(RunFailure, match=f"rank 0 cannot listen on {url}") as caught:
            RankGroup.join(0, 2, url, "cpu", timeout_s=1)
    assert not isinstance(caught.value, RankLost)


def test_one_rank_needs_no_group():
    ranks = RankGroup.join(0, 1, "tcp://127.0.0.1:1", "cpu", timeout_s=1)
    assert (ranks.rank, ranks.size) == (0, 1)
    assert not torch.distributed.is_initialized()
    with pytest.raises(RunFailure, match="mine"), ranks.raise_on_any("trying"):
        raise RunFailure("mine")
    ranks.leave()


def test_collectives_need_an_address_of_this_machine():
    assert collective_backend("cpu") == "gloo"
    with pytest.raises(UserError, match=r"203\.0\.113\.7"):
        bind_collectives("203.0.113.7")


def rows(*lengths: tuple[int, list[int]]) -> list[Row]:
    """One prompt for each (prompt length, completion lengths)."""
    found: list[Row] = []
    for prompt, completions in lengths:
        found += [Row(len(found) + i, (len(found),) * prompt, (i,) * length) for i, length in enumerate(completions)]
    return found


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_shards_are_even_and_repeat_a_prompt_for_each_cut_at_most(ranks):
    batch = rows((10, [4] * 4), (2, [30, 30]), (20, [2, 2, 25]), (5, [1]), (8, [12] * 6), (3, [20, 9, 1]))
    parts = shard(batch, ranks, packed=True)
    assert sorted(row.index for part in parts for row in part) == list(range(len(batch)))
    sizes = [sum(pack.token_ids.numel() for pack in make_microbatches(part, 10**6, packed=True)) for part in parts]
    (whole,) = make_microbatches(batch, 10**6, packed=True)
    assert sum(sizes) <= whole.token_ids.numel() + (ranks - 1) * 20
    assert max(sizes) <= whole.token_ids.numel() / ranks + 20 + 30  # the longest prompt and completion


@pytest.mark.parametrize("packed", [True, False])
def test_a_group_is_sharded_where_ranks_would_be_idle(packed):
    batch = rows((10, [8, 1, 8, 1]), (3, [2]))
    parts = shard(batch, 3, packed)
    assert sorted(row.index for part in parts for row in part) == [0, 1, 2, 3, 4]
    assert all(parts)
    assert max(sum(len(row.inputs) for row in part) for part in parts) == (37 if packed else 21)  # 17 + 2 x 10, shared
    assert [len(part) for part in shard(rows((3, [5])), 3, packed)].count(1) == 1
    assert shard([], 2, packed) == [[], []]
