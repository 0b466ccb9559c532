"""Trackers by name, each against its real library, offline; read back by the library's own means."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from common import plugins
from common.errors import RunFailure, UserError
from common.tracking.trackers import Mlflow, OwnTracker, Trackio, Wandb
from tests.test_tracking import EVALUATION, Recorder, metrics

ROOT = Path(__file__).parent.parent
NAMES = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}
ODD = {"reward/[x] é": 0.5}  # a user's reward may have any name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"file://{tmp_path / 'mlflow'}", "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('[train]\nsteps = 4\n[task]\nname = "toy"\n[task.options]\nwords = 3\n')
    return run


def write(name, folder, steps=(1, 2)):
    """A run of these steps, made as a run makes it."""
    tracker = OwnTracker(name, lambda: NAMES[name](folder))
    if steps[0] == 1:
        tracker.evaluation(0, EVALUATION)
    for step in steps:
        tracker.log(step, metrics(step, loss=float(step)) | ODD)
        tracker.rollouts(step, [])
    assert tracker._state == "well"
    tracker.close()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_offered_by_name_and_asks_for_its_extra(name, monkeypatch):
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["nanogrpo.trackers"]
    assert plugins.find("tracker", entries[name]) is NAMES[name]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^run.trackers='{name}' needs .*pip install 'nanogrpo\[{name}\]'"):
        plugins.check("tracker", entries[name], {}, 1)


def test_mlflow(folder, caplog):
    mlflow = pytest.importorskip("mlflow")
    write("mlflow", folder)
    write("mlflow", folder, steps=(2, 3))  # resumed: step 2 once more
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("nanogrpo").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "4"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in losses) == [(1, 1.0), (2, 2.0), (2, 2.0), (3, 3.0)]
    assert run.data.metrics["reward/_x_ é"] == 0.5
    assert run.data.metrics["eval/accuracy"] == EVALUATION["accuracy"]
    assert run.data.metrics["eval/pass_4"] == 0.75
    assert not caplog.records


def records_of(data, block=32768):
    """The records of a file of wandb's: LevelDB's log format after a header of 7 bytes."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:  # no header fits: the rest of the block is empty
            place += block - place % block
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb(folder, caplog):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    write("wandb", folder)
    time.sleep(1.1)  # its folders are named by the second
    write("wandb", folder, steps=(3,))
    rows, ids = [], set()
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            if record.history.item:
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert len(ids) == 1
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert any(row.get("eval/accuracy") == EVALUATION["accuracy"] for row in rows)
    assert all(row["reward/[x] é"] == 0.5 for row in rows if "loss" in row)
    assert not caplog.records


def test_trackio(folder, caplog):
    pytest.importorskip("trackio")
    # It fixes its folder when it is imported.
    code = "import sys; from tests.test_trackers import *; write('trackio', Path(sys.argv[1]))"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "left out" not in done.stderr
    (database,) = Path(os.environ["TRACKIO_DIR"]).glob("nanogrpo*.db")
    with sqlite3.connect(database) as rows:
        written = [(name, step, json.loads(text)) for name, step, text in
                   rows.execute("select run_name, step, metrics from metrics")]  # fmt: skip
    assert len({name for name, _, _ in written}) == 1
    losses = sorted((step, values["loss"]) for _, step, values in written if "loss" in values)
    assert losses == [(1, 1.0), (1, 1.0), (2, 2.0), (2, 2.0)]


# -- one that is somebody's own, and fails --


class Failing(Recorder):
    def log(self, step, metrics):
        super().log(step, metrics)
        raise ValueError("the disk\nis on fire")


class Hanging(Recorder):
    def log(self, step, metrics):
        time.sleep(1000)


def test_one_that_raises_is_left_out_and_still_closed(caplog):
    caplog.set_level(logging.INFO)
    heard = Failing(fails=True)
    tracker = OwnTracker("mine.py:Mine", lambda: heard)
    tracker.log(1, {})
    tracker.log(2, {})
    tracker.evaluation(2, {})
    tracker.close()
    assert heard.heard == [("log", 1), "close"]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said[0] == (
        "run.trackers: 'mine.py:Mine' is left out from here on, because its log raised ValueError: the disk is on fire"
    )
    assert "its close raised RunFailure" in said[1]
    traced = [record for record in caplog.records if record.exc_info]
    assert all(record.levelno == logging.INFO for record in traced)  # the traceback is for the log
    assert len(traced) == 2


def test_one_that_hangs_is_left_out():
    heard = Hanging()
    tracker = OwnTracker("mine.py:Mine", lambda: heard, limit_s=0.1)
    tracker.log(1, {})
    tracker.log(2, {})
    tracker.close()
    assert heard.heard == []


def test_one_that_cannot_be_made_says_so():
    def make():
        raise UserError("no key")

    with pytest.raises(UserError, match="no key"):
        OwnTracker("mine.py:Mine", make)
    with pytest.raises(RunFailure, match=r"tracker 'mine.py:Mine' was still starting after 0\.1 s"):
        OwnTracker("mine.py:Mine", lambda: time.sleep(1000), limit_s=0.1)


def test_it_is_made_and_called_on_one_thread():
    import threading

    threads = set()

    class Bound(Recorder):
        def __init__(self):
            super().__init__()
            threads.add(threading.get_ident())

        def log(self, step, metrics):
            threads.add(threading.get_ident())

        def phase(self, text):
            threads.add(text)

    tracker = OwnTracker("mine", Bound)
    tracker.log(1, {})
    tracker.phase("learner: updating")
    assert len(threads) == 2 and "learner: updating" in threads
