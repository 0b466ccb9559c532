"""Sampler and learner as services: the same numbers as one process, whatever is lost on the way.

Real Ray, real processes, on a private cluster of this machine that the tests share; tests/cluster/ holds what needs
more than one node, and strikes at random moments.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from common import atomic_files
from common.config import Config, load, resolved_toml
from common.device import quick_dtype
from common.errors import RunFailure, UserError
from common.types import Completion, Group, Prompt
from deploy import run as runs
from deploy.cluster import connection, supervisor
from tests.cluster.disturb import CLUSTER, Run, numbers, same, weights, words
from tests.making import EVERYTHING
from tests.tiny import make_tiny

ROOT = Path(__file__).parent.parent
FAULTY = f"sampler.name={ROOT / 'tests' / 'faulty.py'}:Faulty"
REPLAY = f"sampler.name={ROOT / 'tests' / 'replay.py'}:Replay"

TWO = ("cluster.samplers=2", "cluster.learner_ranks=2")

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shared():
    """A cluster of this machine, on loopback, that the runs of this module join; its services serve all of them."""
    import ray

    assert connection.connect("private")
    from deploy.cluster import resources  # imports Ray, which is told by connect what to listen on

    with resources.services_kept():
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


class Heard(Console):
    """A console that remembers what was said, and can press Ctrl-C once a step's line is printed."""

    def __init__(self, stop_after: int = 0) -> None:
        super().__init__(file=open(os.devnull, "w"))  # noqa: SIM115
        self.said: list[str] = []
        self._stop = re.compile(rf"step +{stop_after}/")

    def print(self, *args, **kwargs) -> None:
        super().print(*args, **kwargs)
        self.said += [str(one) for one in args]
        if args and self._stop.match(str(args[0])):
            os.kill(os.getpid(), signal.SIGINT)


def spec(tiny: Path, folder: Path, *more: str, steps: int = 6) -> Config:
    return load(None, words(tiny, folder, steps, *more))


def run(config: Config, folder: Path, *, resume: bool = False, stop_after: int = 0) -> Heard:
    console = Heard(stop_after)
    outcome = runs.run(config, folder, console, resume=resume)
    assert outcome.finished is not bool(stop_after)
    return console


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Ten steps in one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    run(spec(tiny, folder, steps=10), folder)
    return folder


# -- two replicas and two ranks (first: runs of one kind one after another share their services) -----------------------


def test_two_replicas_and_two_ranks_learn_the_same_from_the_same_completions(shared, tiny, alone, tmp_path):
    """Ten steps on the completions of the one process, weights broadcast: losses within 1e-5."""
    folder = tmp_path / "two"
    replayed = (REPLAY, f"sampler.options.rollouts={alone / 'rollouts'}", "sync.transport=collective")
    run(spec(tiny, folder, *CLUSTER, *TWO, *replayed, steps=10), folder)
    mine, theirs = numbers(folder), numbers(alone)
    assert len(mine) == 10
    for row, truth in zip(mine, theirs, strict=True):
        for key in ("grad_norm", "entropy", "reward_mean", "tokens_learned"):
            assert row[key] == pytest.approx(truth[key], rel=1e-5), (truth["step"], key)
        assert row["loss"] == pytest.approx(truth["loss"], abs=1e-5), truth["step"]
    one, other = weights(folder), weights(alone)
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=2e-4) for name in other)
    assert {row["sync_transport"] for row in atomic_files.read_json_lines(folder / "metrics.jsonl")} == {2}


def test_replicas_change_no_completion_where_requests_are_seeded(shared, tiny, alone, tmp_path):
    folder = tmp_path / "two"
    run(spec(tiny, folder, *CLUSTER, *TWO, steps=1), folder)
    mine, theirs = (atomic_files.read_json_lines(one / "rollouts" / "step-000001.jsonl") for one in (folder, alone))
    assert [(row["prompt_id"], row["token_ids"]) for row in mine] == [
        (row["prompt_id"], row["token_ids"]) for row in theirs
    ]


def test_a_replica_with_old_weights_is_found_by_name(shared, tiny, tmp_path):
    """It says that the bytes arrived, and serves the old ones."""
    folder = tmp_path / "run"
    options = (FAULTY, "sampler.options.fault=stale", f"sampler.options.marker={tmp_path / 'x'}", "optimizer.lr=0.1")
    with pytest.raises(RunFailure, match=r"sampler [01].*(old weights|other weights)"):
        run(spec(tiny, folder, *CLUSTER, *TWO, *options), folder)


def test_goes_on_with_another_number_of_ranks(shared, tiny, alone, tmp_path):
    """Two ranks' checkpoint read by one process, and the end is that of a run that never changed."""
    folder = tmp_path / "changed"
    replayed = (REPLAY, f"sampler.options.rollouts={alone / 'rollouts'}")
    run(spec(tiny, folder, *CLUSTER, *TWO, *replayed, steps=10), folder, stop_after=4)
    run(runs.config_of(folder, ["cluster.learner_ranks=1", "cluster.samplers=1"]), folder, resume=True)
    one, other = weights(folder), weights(alone)
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=2e-4) for name in other)


# -- the same numbers --------------------------------------------------------------------------------------------------


def test_one_replica_and_one_rank_give_the_numbers_of_one_process(shared, tiny, alone, tmp_path):
    """Bit for bit, over ten steps; and the weights really went from one process to another. With everything that a
    run does: the plan, the rehearsal, the report."""
    folder = tmp_path / "services"
    run(spec(tiny, folder, *CLUSTER, *EVERYTHING, steps=10), folder)
    assert same(folder, alone)
    rows = atomic_files.read_json_lines(folder / "metrics.jsonl")
    assert {row["sync_transport"] for row in rows} == {1}
    assert {row["sync_transport"] for row in atomic_files.read_json_lines(alone / "metrics.jsonl")} == {0}
    assert all(row["probe_diff"] < 1e-3 and row["sync_bytes"] > 1e5 for row in rows)


@pytest.mark.vllm
@pytest.mark.parametrize("lora", [0, 4])
def test_with_vllm_too(shared, tiny, tmp_path, lora):
    more = ["sampler.name=vllm"] + ([f"model.lora_rank={lora}", "run.export_merged=true"] if lora else [])
    folders = [tmp_path / "alone", tmp_path / "services"]
    for folder, extra in zip(folders, ([], CLUSTER), strict=True):
        run(spec(tiny, folder, *more, *extra, steps=3), folder)
    assert numbers(folders[0]) == numbers(folders[1])
    one, other = (weights(folder, merged=bool(lora)) for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in other)
    transports = {row["sync_transport"] for row in atomic_files.read_json_lines(folders[1] / "metrics.jsonl")}
    assert transports == ({3} if lora else {1})


# -- stopping and going on ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Six steps in one process, which equal those of services, by rank of the adapter."""
    folders: dict[int, Path] = {}

    def whole_of(lora: int) -> Path:
        if lora not in folders:
            folders[lora] = tmp_path_factory.mktemp("runs") / f"whole-{lora}"
            run(spec(tiny, folders[lora], f"model.lora_rank={lora}"), folders[lora])
        return folders[lora]

    return whole_of


@pytest.mark.parametrize(
    ("lora", "stop"),
    [(0, 3), (0, 4), (4, 2), *(pytest.param(*more, marks=pytest.mark.full) for more in ((0, 1), (4, 5)))],
)
def test_stopped_and_resumed_equals_never_stopped(shared, tiny, whole, tmp_path, lora, stop):
    """The stop points lie on and between checkpoints (every third step)."""
    folder = tmp_path / "stopped"
    run(spec(tiny, folder, *CLUSTER, f"model.lora_rank={lora}"), folder, stop_after=stop)
    run(runs.config_of(folder, []), folder, resume=True)
    assert same(folder, whole(lora))


def test_the_number_format_that_suits_the_cluster_is_said_and_kept(shared, tiny, tmp_path):
    import ray

    folder = tmp_path / "services"
    address = f"cluster.address={ray.get_runtime_context().gcs_address}"  # and it goes on without joining once more
    console = run(spec(tiny, folder, *CLUSTER, address, "model.dtype=auto", steps=1), folder)
    found = quick_dtype("cpu")  # its only node is this machine
    assert load(folder / "config.toml").model.dtype == found
    assert f"packed, {found}, cpu: " in " ".join(console.said)


def test_staleness_overlaps_and_resumes_exactly(shared, tiny, tmp_path):
    """With completions one step old the answers in flight are in the checkpoint: a resumed run still ends the same."""
    more = (*CLUSTER, "train.max_staleness=1")
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    run(spec(tiny, whole, *more), whole)
    rows = atomic_files.read_json_lines(whole / "metrics.jsonl")
    lags = [row["step"] - 1 - row["sampler_version_min"] for row in rows]
    assert lags == [0, 1, 1, 1, 1, 1]
    run(spec(tiny, folder, *more), folder, stop_after=4)
    run(runs.config_of(folder, []), folder, resume=True)
    assert same(folder, whole)


@pytest.mark.vllm
def test_weights_swapped_in_flight_leave_every_tokens_version(shared, tiny, tmp_path):
    folder = tmp_path / "swapped"
    more = ("sampler.name=vllm", "train.max_staleness=1", "sampler.in_flight_updates=true", "sampler.max_tokens=120")
    run(spec(tiny, folder, *CLUSTER, *more, "train.prompts_per_step=8", "task.options.words=1", steps=6), folder)
    mixed = 0
    for file in (folder / "rollouts").glob("step-*.jsonl"):
        for row in atomic_files.read_json_lines(file):
            versions = row["token_versions"]
            assert versions == sorted(versions)
            if versions:
                mixed += 1
                assert len(versions) == len(row["token_ids"])
                assert row["policy_version"] == versions[0] < versions[-1]
    assert mixed, "no completion saw two versions"


# -- what is lost is replaced ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["exit", "raise", "garbage", "hang", "exit_at_sync"])
def test_a_sampler_that_fails_is_replaced_and_nothing_changes(shared, tiny, alone, tmp_path, fault):
    folder, marker = tmp_path / "run", tmp_path / "happened"
    options = (FAULTY, f"sampler.options.fault={fault}", f"sampler.options.marker={marker}", "timeouts.generate_s=4")
    console = run(spec(tiny, folder, *CLUSTER, *options, "run.save_every=0", steps=3), folder)
    assert marker.exists()
    assert any("is being replaced (1 of 5)" in text for text in console.said)
    assert atomic_files.read_json_lines(folder / "metrics.jsonl")[-1]["restarts"] == 1
    assert numbers(folder) == numbers(alone)[:3]


def test_a_sampler_that_works_without_end_is_replaced(shared, tiny, alone, tmp_path):
    """It shows a pulse and reports each turn; only its work never ends."""
    folder, marker = tmp_path / "run", tmp_path / "happened"
    name = f"sampler.name={ROOT / 'tests' / 'faulty.py'}:Endless"
    options = (name, "sampler.options.fault=endless", f"sampler.options.marker={marker}", "timeouts.generate_s=4")
    console = run(spec(tiny, folder, *CLUSTER, *options, "run.save_every=0", steps=3), folder)
    assert any("was still writing after 4 s" in text for text in console.said)
    assert numbers(folder) == numbers(alone)[:3]


def test_a_sampler_that_always_fails_ends_the_run_in_a_sentence(shared, tiny, tmp_path):
    folder = tmp_path / "run"
    options = (FAULTY, "sampler.options.fault=raise", f"sampler.options.marker={tmp_path / 'x'}")
    config = spec(tiny, folder, *CLUSTER, *options, "sampler.options.always=true", "cluster.max_restarts=1")
    with pytest.raises(RunFailure, match=r"sampler 0 on node 127\.0\.0\.1.*the engine broke.*max_restarts"):
        run(config, folder)


@pytest.fixture(scope="module")
def undisturbed(shared, tiny, tmp_path_factory):
    """Thirty steps: of two replicas and two ranks, or of one process, which equal those of one of each."""

    @functools.cache
    def of(more: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "undisturbed"
        run(spec(tiny, folder, *more, steps=30), folder)
        return folder

    return of


ONE = (CLUSTER, (("learner", signal.SIGKILL), ("driver", signal.SIGKILL)), ())
BOTH = (
    (*CLUSTER, *TWO),
    (("sampler", signal.SIGKILL), ("learner", signal.SIGKILL), ("sampler", signal.SIGSTOP),
     ("learner", signal.SIGSTOP), ("driver", signal.SIGSTOP)),
    (*CLUSTER, *TWO),
)  # fmt: skip


@pytest.mark.timeout(400)  # losses; each new process imports torch for some seconds
@pytest.mark.parametrize(
    ("more", "strikes", "like"), [ONE, pytest.param(*BOTH, marks=pytest.mark.full)], ids=["one of each", "two of each"]
)
def test_struck_services_and_driver_leave_the_run_as_it_would_have_been(
    undisturbed, tiny, tmp_path, more, strikes, like
):
    """SIGKILL and SIGSTOP of a replica, a rank and the driver; and at last SIGTERM, for which Ray has a handler of its
    own: the run saves, and goes on. The real command, on a cluster of its own. The same with more rounds and a table:
    ``python -m tests.cluster.disturb``."""
    folder, limits = tmp_path / "struck", ("timeouts.pulse_s=10", "cluster.max_restarts=20")
    struck = Run(words(tiny, folder, 30, *more, *limits), tmp_path / "log")
    try:
        for place, (name, number) in enumerate(strikes):
            struck.wait_for_step(2 + 3 * place)
            struck.seconds_to_recover(name, number)
        struck.process.send_signal(signal.SIGTERM)
        assert struck.wait() == 130, struck.said
    finally:
        struck.end()
    assert "starting it again, from the last checkpoint" in struck.said
    assert f"saved at step {struck.step()}" in struck.said
    assert struck.step() < 30
    run(runs.config_of(folder, []), folder, resume=True)
    assert same(folder, undisturbed(like))


@pytest.mark.full
def test_sampler_and_learner_lost_together(tiny, alone, tmp_path):
    """Nobody is left who could give the new sampler its weights: the learner comes back first."""
    struck = Run(words(tiny, tmp_path / "run", 10, *CLUSTER, "sync.transport=collective"), tmp_path / "log")
    try:
        struck.wait_for_step(4)
        struck.strike("learner", signal.SIGKILL)
        struck.strike("sampler", signal.SIGKILL)
        assert struck.wait() == 0, struck.said
    finally:
        struck.end()
    assert same(tmp_path / "run", alone)


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_too_small_a_cluster_is_said_at_once(shared, tiny, tmp_path):
    folder = tmp_path / "run"
    started = time.monotonic()
    config = spec(tiny, folder, "cluster.mode=ray", "cluster.address=private", "cluster.samplers=4000")
    with pytest.raises(UserError, match=r"cluster\.samplers=4000.*do not fit.*4001 x 1 CPU.*127\.0\.0\.1"):
        run(config, folder)
    assert time.monotonic() - started < config.timeouts.start_s


def test_missing_room_packs_whole_parts(shared):
    from deploy.cluster import resources

    one = {"CPU": 1.0, "GPU": 2.0}
    assert not resources.missing_room([one, one], {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 8, "GPU": 2}})
    lacking = resources.missing_room([one], {"a": {"CPU": 8, "GPU": 1}, "b": {"CPU": 8, "GPU": 1}})
    assert "1 CPU and 2 GPU of it has no place (a has 8 CPU and 1 GPU; b has 8 CPU and 1 GPU)" in lacking


def test_the_wrong_address_is_one_sentence(tmp_path, tiny):
    run = Run(words(tiny, tmp_path / "run", 2, "cluster.mode=ray", "cluster.address=127.0.0.1:1"), tmp_path / "log")
    assert run.wait() == 2
    assert "error: cluster.address='127.0.0.1:1'" in run.said
    assert "Traceback" not in run.said


def test_staleness_needs_services_and_a_correction(tiny, tmp_path):
    with pytest.raises(UserError, match=r"train\.max_staleness=1.*cluster\.mode to ray"):
        run(spec(tiny, tmp_path / "run", "train.max_staleness=1"), tmp_path / "run")
    with pytest.raises(UserError, match=r"learner\.importance='off' would not correct"):
        spec(tiny, tmp_path, *CLUSTER, "train.max_staleness=1", "learner.importance=off")
    with pytest.raises(UserError, match=r"cluster\.samplers=2 has no effect: cluster\.mode is local"):
        spec(tiny, tmp_path, "cluster.samplers=2")


def test_services_with_other_versions_are_named(shared):
    from deploy.cluster.calls import ActorInfo, ActorRef
    from deploy.cluster.resources import check_versions

    versions = {"python": "3.11", "torch": "2.13.0", "vllm": "0.32.0"}
    first = ActorInfo("n1", "10.0.0.1", 1, versions, {})
    check_versions(ActorRef("sampler 0", None, 0, first), first)
    other = ActorRef("sampler 1", None, 1, ActorInfo("n2", "10.0.0.2", 2, versions | {"vllm": "0.33.0"}, {}))
    with pytest.raises(UserError, match=r"sampler 1 on node 10\.0\.0\.2.*vllm 0\.33\.0 instead of 0\.32\.0"):
        check_versions(other, first)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": (1, 9999)}, "vocabulary"),
        ({"logprobs": (-1.0,)}, "without all log-probs"),
        ({"logprobs": (-1.0, float("nan"))}, "that is none"),
        ({"logprobs": (-1.0, 2.0)}, "that is none"),
        ({}, ""),
    ],
)
def test_garbage_is_recognised(change, says):
    import dataclasses

    from common.types import SamplingParams
    from deploy.cluster.work_items import Request

    prompt = Prompt("p", ())
    (item,) = Request([prompt], SamplingParams(n=2)).items(1)
    good = Completion((1, 2), "", (-1.0, -2.0), "stop", 0)
    group = Group(prompt, (dataclasses.replace(good, **change), good))
    found = item.fault_of([group], 384)
    assert says in found if says else not found
    assert "other prompts" in item.fault_of([Group(Prompt("q", ()), group.completions)], 384)
    assert "3 completions" in item.fault_of([Group(prompt, (good, good, good))], 384)


# -- the process above the driver --------------------------------------------------------------------------------------

_CHILD = """
import os, signal, sys
from pathlib import Path
folder, how = Path(sys.argv[-1]) if '--resume' in sys.argv else Path(sys.argv[2]), 'KILLED'
folder.mkdir(exist_ok=True); (folder / 'config.toml').touch()
with open(folder / 'calls', 'a') as calls: calls.write(' '.join(sys.argv[1:]) + '\\n')
count = len((folder / 'calls').read_text().splitlines())
if count <= int(os.environ['KILLS']): os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(os.environ['CODE']))
"""


@pytest.mark.parametrize(("kills", "code", "ends"), [(0, 0, 0), (2, 0, 0), (1, 2, 2), (0, 130, 130), (9, 0, 1)])
def test_a_killed_driver_goes_on_and_one_that_ends_is_left_alone(tmp_path, monkeypatch, capfd, kills, code, ends):
    monkeypatch.setenv("KILLS", str(kills))
    monkeypatch.setenv("CODE", str(code))
    child = tmp_path / "child.py"
    child.write_text(_CHILD)
    folder = tmp_path / "run"
    command = [sys.executable, str(child), "train", str(folder)]
    assert supervisor.supervise(folder, 3, 30, resuming=False, command=command) == ends
    calls = (folder / "calls").read_text().splitlines()
    assert len(calls) == min(kills, 3) + 1
    assert calls[0] == f"train {folder} run.folder={folder}"
    assert calls[1:] == [f"train --resume {folder}"] * (len(calls) - 1)
    assert ("once more than cluster.max_restarts=3" in capfd.readouterr().err) is (kills > 3)


def guarded(tmp_path: Path, code: str, pulse_s: float = 30) -> subprocess.Popen[str]:
    """A guard over a child of this code, in a process of its own."""
    child = tmp_path / "child.py"
    child.write_text(code)
    folder, command = str(tmp_path / "run"), f"[sys.executable, {str(child)!r}, 'train']"
    program = (
        "import sys; from pathlib import Path; from deploy.cluster.supervisor import supervise; "
        f"sys.exit(supervise(Path({folder!r}), 1, {pulse_s}, resuming=False, command={command}))"
    )
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_driver_asked_to_stop_before_it_listens_is_not_started_again(tmp_path):
    started = tmp_path / "started"
    above = guarded(tmp_path, f"import time; open({str(started)!r}, 'a').write('x'); time.sleep(60)")
    while not started.exists():
        time.sleep(0.05)
    above.send_signal(signal.SIGTERM)
    assert above.wait(30) == 130
    assert started.read_text() == "x"


def test_a_stopped_driver_is_started_again_and_one_without_a_guard_ends(tmp_path):
    pids = tmp_path / "pids"
    above = guarded(
        tmp_path, f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)", 1
    )

    def started(count: int) -> list[int]:
        until = time.monotonic() + 60
        while not pids.exists() or len(pids.read_text().split()) < count:
            assert time.monotonic() < until
            time.sleep(0.05)
        return [int(pid) for pid in pids.read_text().split()]

    os.kill(started(1)[0], signal.SIGSTOP)
    second = started(2)[1]
    above.kill()
    above.wait()
    until = time.monotonic() + 30
    while psutil.pid_exists(second) and psutil.Process(second).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_resumed_run_may_change_where_it_runs(tiny, tmp_path):
    """Settings that the words make idle are left out; a word that is idle itself is still an error."""
    folder = tmp_path / "run"
    atomic_files.write_text(folder / "config.toml", resolved_toml(spec(tiny, folder, *CLUSTER, "cluster.samplers=2")))
    assert runs.config_of(folder, ["cluster.mode=local"]).cluster.samplers == 1
    with pytest.raises(UserError, match=r"cluster\.samplers=3 has no effect"):
        runs.config_of(folder, ["cluster.mode=local", "cluster.samplers=3"])


def test_the_pool_reports_groups_in_their_places(shared, tiny, tmp_path):
    """A request of three prompts in three items on two replicas, answered from the last to the first."""
    import ray

    from common.types import SamplerSetup, SamplingParams
    from common.weights.handles import InlineWeights
    from deploy.cluster.calls import ActorInfo, ActorRef, Restarts
    from deploy.cluster.sampler_pool import SamplerPool

    reported = []
    answer = (Completion((1, 2), "", (-1.0, -2.0), "stop", 0),)

    def start(index, setup):
        items = []

        def work(new, wait_s):
            items.extend(new)
            done = [item for item in items if item[1][0].id == f"p{2 - len(reported)}"]
            items[:] = [item for item in items if item not in done]
            return ray.put([(number, [Group(prompt, answer) for prompt in prompts]) for number, prompts, _ in done])

        calls = {"work": work, "pulse": lambda: ray.put(True)}
        handle = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})
        facts = {"many_at_once": True, "takes_adapters": True, "seeds_prompts": True}
        return ActorRef(f"sampler {index}", handle, index, ActorInfo("n1", "127.0.0.1", 1, {}, facts))

    def deliver(handle, actors, version):
        return dict.fromkeys(actors, handle.sent()[0]), {}

    config, setup = spec(tiny, tmp_path, *CLUSTER, *TWO), SamplerSetup(str(tiny), "float32", 64, 16)
    cluster = SimpleNamespace(start_sampler=start, end=lambda actors, limit_s: None)
    pool = SamplerPool(config, setup, 384, Restarts(0, print), cluster, deliver)
    pool.open()
    prompts = [Prompt(f"p{index}", (), token_ids=(1, 2)) for index in range(3)]
    future = pool.generate(prompts, SamplingParams(n=1, max_tokens=2))
    future.on_group(lambda index, group: reported.append((index, group.prompt.id, future.done())))
    pool.load_weights(InlineWeights.of([("w", torch.ones(2))], "full"), 0)  # until now no replica may work
    assert [group.prompt.id for group in future.result(30)] == ["p0", "p1", "p2"]
    assert reported == [(2, "p2", False), (1, "p1", False), (0, "p0", False)]
    pool.close()


def test_the_learners_weights_can_be_opened_here_too(shared, tiny, tmp_path):
    """The handle keeps its contract: opened any number of times, before samplers have loaded it and after."""
    from common.weights.handles import fingerprint
    from deploy import components
    from deploy.cluster import separate

    config = spec(tiny, tmp_path, *CLUSTER)
    (tmp_path / "config.toml").touch()
    with separate.parts(components.prepare(config), tmp_path, print) as parts:
        handle = parts.learner.publish_weights()
        assert handle.kind == "full" and handle.adapter_config is None
        sent, size = handle.sent()
        assert fingerprint(handle.open()) == sent and size > 1e5
        assert parts.sampler.load_weights(handle, 0) == sent == handle.sent()[0] == fingerprint(handle.open())
        assert handle.transport == "shared memory"
