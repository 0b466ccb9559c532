"""Runs submitted to a Ray cluster of two nodes (tests/cluster/two_nodes.py), one of which is killed on the way."""

import subprocess
from pathlib import Path

import pytest

from common import atomic_files
from tests.cluster.disturb import Run, words
from tests.cluster.two_nodes import HEAD, NODE, SETTINGS, SPREAD, furthest, lacking, two_nodes, wait_for
from tests.tiny import make_tiny

STEPS = 8

pytestmark = [
    pytest.mark.full,
    pytest.mark.ray,
    pytest.mark.timeout(300),  # nodes that start, and processes that import torch on each
    pytest.mark.skipif(bool(lacking()), reason=lacking() or "never"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, model) -> Path:
    """The folder of the run that all the others must equal."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run = Run(words(model, folder, STEPS, *SETTINGS), folder.parent / "log")
    assert run.wait() == 0, run.said
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with two_nodes(tmp_path_factory.mktemp("two")) as made:
        yield made


def assert_learned_alike(folder: Path, plain: Path) -> None:
    """The same tokens and numbers until after the loss at least, and the same weights if it stays so to the end.

    Two replicas and two ranks add up in another order than one process. Of some 4000 draws one in a while falls within
    that rounding of a boundary and becomes another token, from where on the runs rightly part.
    """
    for step in range(1, STEPS + 1):
        mine, theirs = (
            atomic_files.read_json_lines(one / "rollouts" / f"step-{step:06d}.jsonl") for one in (folder, plain)
        )
        if [row["token_ids"] for row in mine] != [row["token_ids"] for row in theirs]:
            assert step > 5, f"other tokens at step {step}"
            return
        a, b = (atomic_files.read_json_lines(one / "metrics.jsonl")[step - 1] for one in (folder, plain))
        for key in ("loss", "grad_norm", "entropy", "reward_mean"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (step, key)
    assert furthest(folder, plain) < 1e-5


def test_waits_for_another_node_and_ends_as_one_process_would(cluster, model, one_process, tmp_path):
    assert cluster.listening() == []
    run = cluster.submit(words(model, tmp_path / "run", STEPS, *SETTINGS, *SPREAD))
    run.wait_for_step(4)
    cluster.kill_node()
    wait_for(run, "waiting for room for learner rank")
    cluster.add_node()
    assert run.wait() == 0, run.said
    assert cluster.exit_code() == 0

    for service in ("sampler", "learner"):
        assert {HEAD, NODE} == places(run, service), run.said
    rows = atomic_files.read_json_lines(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["sync_transport"] for row in rows[:3]} == {2.0}, "a collective broadcast, before the loss"
    assert rows[-1]["restarts"] >= 2, "a sampler and the learner were lost"
    rewards = [row["reward_mean"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05, rewards
    assert_learned_alike(run.folder, one_process)


def test_doctor_finds_two_nodes_that_agree(cluster):
    run = cluster.submit_words("doctor", "--cluster")
    assert run.wait() == 0, run.said
    assert f"node {HEAD}" in run.said and f"node {NODE}" in run.said
    assert "gloo adds up" in run.said


def test_too_small_a_cluster_and_a_wrong_token_are_sentences(cluster, model, tmp_path):
    (tmp_path / "run.toml").touch()
    train = ["python", "-m", "deploy.cli", "train", str(tmp_path / "run.toml")]
    usual = (*SETTINGS, *SPREAD, f"cluster.address={HEAD}:6379")
    other = tmp_path / "token"
    other.write_text("0" * 64)
    # Ray itself tries for 20 s.
    refused = cluster.inside([*train, *words(model, tmp_path / "refused", STEPS, *usual)], other)
    larger = words(model, tmp_path / "larger", STEPS, *usual, "cluster.learner_ranks=4")
    small = cluster.inside([*train, *larger])

    said = sentence(small)
    assert "cluster.learner_ranks=4" in said and "6 CPU in 6 parts" in said and "2 CPU of it has no place" in said
    assert "the cluster refused this process's token" in sentence(refused)


def test_goes_on_with_what_is_left(cluster, model, one_process, tmp_path):
    run = cluster.submit(words(model, tmp_path / "run", STEPS, *SETTINGS, *SPREAD, "cluster.on_lost_node=shrink"))
    run.wait_for_step(4)
    cluster.kill_node()
    assert run.wait() == 0, run.said
    assert "the learner goes on with 1 of 2 ranks" in run.said
    rows = atomic_files.read_json_lines(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert (rows[0]["sync_transport"], rows[-1]["sync_transport"]) == (2.0, 1.0)  # all on one host now
    assert rows[0]["restarts"] == 0 and rows[-1]["restarts"] >= 2
    assert_learned_alike(run.folder, one_process)


def places(run: Run, service: str) -> set[str]:
    """The nodes that the run said its services were on."""
    line = next(line for line in run.said.splitlines() if line.startswith(f"{service} ") and "on node" in line)
    return {word.split(" ")[0] for word in line.split("on node ")[1:]}


def sentence(process: subprocess.Popen[str]) -> str:
    """The one line in which a command told the user's mistake."""
    said, _ = process.communicate(timeout=120)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in said, said
    return lines[0]
