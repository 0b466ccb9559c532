"""Files are whole or not there: after errors, full disks, missing rights, and SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import atomic_files
from common.errors import RunFailure, UserError

ROOT = Path(__file__).parent.parent


def start(code: str, *words: object, prefix: tuple[str, ...] = (), **options: object) -> subprocess.Popen[str]:
    """A Python process that runs ``code`` with the repository's packages."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*prefix, sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- whole files ---


def test_a_folder_made_twice_at_once_stays_the_first_ones(tmp_path: Path) -> None:
    """Its reader never finds it gone. One that lacks a file is replaced."""
    with atomic_files.atomic_folder(tmp_path / "a", replace=False) as late:
        (late / "one").write_text("late")
        with atomic_files.atomic_folder(tmp_path / "a", replace=False) as early:
            (early / "one").write_text("early")
    assert [file.read_text() for file in (tmp_path / "a").iterdir()] == ["early"]
    with atomic_files.atomic_folder(tmp_path / "a", replace=False) as more:
        (more / "one").write_text("late")
        (more / "two").write_text("late")
    assert [file.read_text() for file in (tmp_path / "a").iterdir()] == ["late", "late"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_files.write_text(path, "one")
    atomic_files.write_text(path, "zwei ünï \u2028")
    assert path.read_text(encoding="utf-8") == "zwei ünï \u2028"
    assert names(path.parent) == ["a.txt"]


def test_json_is_strict_whatever_the_numbers(tmp_path: Path) -> None:
    atomic_files.write_json(
        tmp_path / "a.json", {"a": [1, 2.5, float("nan")], "b": {"c": float("-inf")}, "d": "\ud800 é"}
    )
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))
    assert read == {"a": [1, 2.5, None], "b": {"c": None}, "d": "\ufffd é"}


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_files.write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_name_that_is_a_folder_or_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"cannot be written .* choose another folder"):
            atomic_files.write_text(path, "x")
    with pytest.raises(UserError, match="cannot be written"), atomic_files.atomic_folder(tmp_path / "file"):
        pytest.fail("the body ran")
    assert names(tmp_path) == ["file", "folder"]


# --- whole folders ---


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "checkpoint"
    with atomic_files.atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
        assert folder.name.startswith(".")
        assert folder.parent == target.parent
    assert (target / "sub" / "a").read_text() == "1"
    assert names(target.parent) == ["checkpoint"]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_files.atomic_folder(tmp_path / "final") as folder:
            (folder / text).write_text(text)
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["new"]


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyboardInterrupt(), FileNotFoundError(2, "missing", "elsewhere")]
)
def test_a_body_that_raises_leaves_the_old_folder_and_its_own_error(tmp_path: Path, error: BaseException) -> None:
    with atomic_files.atomic_folder(tmp_path / "final") as folder:
        (folder / "a").write_text("old")

    def write() -> None:
        with atomic_files.atomic_folder(tmp_path / "final") as folder:
            (folder / "a").write_text("new")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert (tmp_path / "final" / "a").read_text() == "old"
    assert names(tmp_path) == ["final"]


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_files.atomic_folder(tmp_path / "final") as folder:
            (folder / "a").write_text("x")
        atomic_files.write_text(tmp_path / "b", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "final").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644


def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path: Path) -> None:
    (tmp_path / ".final.replaced-12-0123abcd").mkdir()  # as after the first rename
    (tmp_path / ".final.replaced-12-0123abcd" / "a").write_text("old")
    (tmp_path / ".final.partial-12-0123abcd").mkdir()
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / ".step.jsonl.partial-7-89abcdef").write_text("half")
    (tmp_path / ".keep").write_text("not ours")
    atomic_files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".keep", "final", "rollouts"]
    assert not names(tmp_path / "rollouts")
    assert (tmp_path / "final" / "a").read_text() == "old"


# --- logs ---

rows = st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3), max_size=6)


@given(rows=rows, cut=st.floats(0, 1))
def test_a_log_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], cut: float
) -> None:
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    ends = [0]
    for row in rows:
        atomic_files.append_line(path, atomic_files.to_json(row))
        ends.append(path.stat().st_size)
    path.touch()
    length = round(cut * ends[-1])
    os.truncate(path, length)
    whole = [json.loads(atomic_files.to_json(row)) for row, end in zip(rows, ends[1:], strict=True) if end <= length]
    assert atomic_files.read_json_lines(path) == whole
    atomic_files.append_line(path, '{"next": 1}')
    assert atomic_files.read_json_lines(path) == [*whole, {"next": 1}]
    assert path.read_bytes().count(b"\n") == len(whole) + 1
    assert path.read_bytes().endswith(b"\n")


def test_a_log_that_is_not_there_is_empty_and_a_line_break_is_refused(tmp_path: Path) -> None:
    assert atomic_files.read_lines(tmp_path / "none.jsonl") == []
    with pytest.raises(AssertionError, match="line break"):
        atomic_files.append_line(tmp_path / "a.jsonl", "one\ntwo")


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    text = json.dumps({"text": "a\u2028b\x85c\x0cd"}, ensure_ascii=False)
    atomic_files.append_line(tmp_path / "a.jsonl", text)
    assert atomic_files.read_lines(tmp_path / "a.jsonl") == [text]


def test_resuming_drops_later_steps_and_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "é": 1}\n{"step": 3}\n{"step": 2.0, "again": 1}\n{"ste')
    atomic_files.truncate_after(path, "step", 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "é": 1}\n{"step": 2.0, "again": 1}\n'
    atomic_files.truncate_after(path, "step", 0)
    assert path.read_text() == ""
    atomic_files.truncate_after(tmp_path / "none.jsonl", "step", 0)
    assert names(tmp_path) == ["metrics.jsonl"]


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not JSON"):
        atomic_files.truncate_after(path, "step", 1)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(UserError, match="line 2: not an object"):
        atomic_files.read_json_lines(path)
    path.write_text('{"time": 1}\n')
    with pytest.raises(UserError, match="line 1: has no number 'step'"):
        atomic_files.truncate_after(path, "step", 1)


# --- the disk says no ---


def test_a_full_device_is_a_failure_with_path_and_cure() -> None:
    with pytest.raises(RunFailure, match="no space left to write /dev/full; free some"):
        atomic_files.append_line(Path("/dev/full"), "x")


FULL_DISK = """
import json, os, sys
from pathlib import Path
from common import atomic_files as files
from common.errors import RunFailure

folder = Path(sys.argv[1])
big = "x" * 2_000_000


def refused(act):
    try:
        act()
    except RunFailure as failure:
        assert "no space left to write" in str(failure) and str(folder) in str(failure), failure
        return
    raise AssertionError("a full disk was not noticed")


def fill(write):
    with files.atomic_folder(folder / "checkpoint") as partial:
        (partial / "small").write_text("new")
        write(partial / "big")


def as_torch_says(path):
    try:
        path.write_text(big)
    except OSError:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed") from None


files.write_text(folder / "a.json", "[1]")
files.append_line(folder / "log.jsonl", "[1]")
with files.atomic_folder(folder / "checkpoint") as partial:
    (partial / "small").write_text("old")
free = os.statvfs(folder).f_bavail

refused(lambda: files.write_text(folder / "a.json", json.dumps(big)))
refused(lambda: files.append_line(folder / "log.jsonl", json.dumps(big)))
refused(lambda: fill(lambda path: path.write_text(big)))
refused(lambda: fill(as_torch_says))

assert sorted(os.listdir(folder)) == ["a.json", "checkpoint", "log.jsonl"], os.listdir(folder)
assert (folder / "a.json").read_text() == "[1]"
assert (folder / "log.jsonl").read_text() == "[1]\\n"
assert os.listdir(folder / "checkpoint") == ["small"] and (folder / "checkpoint" / "small").read_text() == "old"
assert os.statvfs(folder).f_bavail == free, "something that did not fit still takes room"
files.append_line(folder / "log.jsonl", "[2]")
print("ok")
"""


def test_a_full_disk_leaves_every_previous_file_whole(tmp_path: Path) -> None:
    """A real full disk: a file system of one megabyte, in a mount namespace of its own."""
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("needs Linux user namespaces to mount a small file system")
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    process = start(FULL_DISK, tmp_path, prefix=(*namespace, "sh", "-c", mount, str(tmp_path)))
    assert finish(process) == "ok\n"


QUOTA = """
import resource, sys
from pathlib import Path
from common import atomic_files as files
from common.errors import RunFailure

path = Path(sys.argv[1])
files.append_line(path, '"first"')
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for act in (lambda: files.append_line(path, "x" * 2000), lambda: files.write_text(path, "x" * 2000)):
    try:
        act()
    except RunFailure as failure:
        print(failure)
"""


def test_a_line_that_fits_only_in_part_is_taken_back(tmp_path: Path) -> None:
    """With a limit on the file's size the system writes what fits, and only the second write fails."""
    path = tmp_path / "log.jsonl"
    said = finish(start(QUOTA, path)).splitlines()
    assert said == [f"{path} cannot be written (file too large); check the disk and try again"] * 2
    assert path.read_text() == '"first"\n'
    assert names(tmp_path) == ["log.jsonl"]


FORBIDDEN = """
import os, sys
from pathlib import Path
from common import atomic_files as files
from common.errors import UserError

folder = Path(sys.argv[1])
if os.getuid() == 0:
    os.setuid(65534)
acts = [
    lambda: files.write_text(folder / "a", "x"),
    lambda: files.append_line(folder / "a", "x"),
    lambda: files.atomic_folder(folder / "b").__enter__(),
    lambda: files.lock_folder(folder / "c").__enter__(),
]
for act in acts:
    try:
        act()
    except UserError as error:
        print(error)
"""


def test_missing_rights_are_the_users_to_mend() -> None:
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to every other user
        os.chmod(outside, 0o555)
        said = finish(start(FORBIDDEN, outside)).splitlines()
    assert [line.split()[0] for line in said] == [f"{outside}/{name}" for name in "aabc"]
    assert all("permission denied); choose another folder or fix its permissions" in line for line in said)


# --- SIGKILL ---

WRITER = """
import itertools, json, sys
from pathlib import Path
from common import atomic_files as files

folder, first = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for number in itertools.count(first):
    with files.atomic_folder(folder / "checkpoint") as partial:
        for name in "abc":
            (partial / name).write_text(str(number) * 30_000)
    files.append_line(folder / "log.jsonl", json.dumps({"step": number, "text": "x" * 50_000}))
    files.write_json(folder / "state.json", {"step": number, "text": "x" * 50_000})
"""


@pytest.mark.slow
def test_whatever_moment_a_writer_is_killed_every_file_is_whole(tmp_path: Path) -> None:
    moments = random.Random(5)
    reached = 0
    for _ in range(12):
        writer = start(WRITER, tmp_path, reached)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, 0.25))
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=10)

        atomic_files.remove_leftovers(tmp_path)
        assert set(names(tmp_path)) <= {"checkpoint", "log.jsonl", "state.json"}
        if (tmp_path / "checkpoint").exists():
            texts = [(tmp_path / "checkpoint" / name).read_text() for name in "abc"]
            assert len(set(texts)) == 1
            assert len(texts[0]) % 30_000 == 0
            assert texts[0]
        else:
            assert reached == 0, "the folder is gone"
        log = atomic_files.read_json_lines(tmp_path / "log.jsonl")
        assert [row["step"] for row in log] == list(range(len(log)))
        assert all(len(row["text"]) == 50_000 for row in log)
        if (tmp_path / "state.json").exists():
            state = json.loads((tmp_path / "state.json").read_text())
            assert len(state["text"]) == 50_000
            assert state["step"] < len(log)
        reached = len(log)
    assert reached > 0, "the writer never came to write"


# --- one process a folder ---

HOLDER = """
import os, sys, time
from pathlib import Path
from common import atomic_files as files

with files.lock_folder(Path(sys.argv[1])):
    if sys.argv[2] == "alone" or os.fork() == 0:  # the worker itself says that it runs
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def to_kill() -> Iterator[list[int]]:
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_folder_in_use_names_the_process_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    holder = start(HOLDER, tmp_path / "run", "alone")
    assert holder.stdout is not None
    assert holder.stdout.readline()
    lock = atomic_files.lock_folder
    with pytest.raises(UserError, match=f"run is in use by the running process {holder.pid}; .* choose another folder"):
        lock(tmp_path / "run").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=10)
    for _ in range(2):  # it is free again after each
        with (
            lock(tmp_path / "run"),
            pytest.raises(UserError, match=f"process {os.getpid()};"),
        ):
            lock(tmp_path / "run").__enter__()


def test_a_worker_that_outlives_the_killed_run_does_not_keep_the_folder(tmp_path: Path, to_kill: list[int]) -> None:
    holder = start(HOLDER, tmp_path, "with-worker")
    assert holder.stdout is not None
    to_kill.append(int(holder.stdout.readline()))
    with pytest.raises(UserError, match="in use"):
        atomic_files.lock_folder(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=10)
    os.kill(to_kill[0], 0)  # the worker is still there
    with atomic_files.lock_folder(tmp_path):
        pass
