"""Files written whole or not at all, so that a kill, a full disk or a power cut leaves no half of one behind.

Three kinds of writing, by what they promise:

- ``write_text``, ``write_json``: a whole file; readers see the old one or the new one.
- ``atomic_folder``: a whole folder (a checkpoint, an exported model); the same promise.
- ``append_line``, ``append_bytes``: a log that grows; at worst the last line is torn, and every reader and writer here
  drops it.

Whatever goes wrong with the disk becomes one sentence with the path and the cure, and the previous file stays. Used by
the trackers, the checkpoints and whatever else writes into a run folder; what the files hold is none of its business.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gzip
import json
import math
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import RunFailure, UserError

LOCK_NAME = ".lock"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_WRONG_KIND = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-\d+-[0-9a-f]{8}")


def write_text(path: Path, text: str) -> None:
    """The text as a whole file (UTF-8); missing folders are made."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """The value as a whole, indented JSON file. Numbers that are not finite become null."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """The bytes as a whole file; missing folders are made."""
    with _in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path, "partial")
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                # Before the rename: a power cut could otherwise keep the new name and lose the bytes.
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Inside, an empty folder to fill; after it, the same folder under ``path``, in place of whatever stood there.

    If the body raises, nothing of it stays, ``path`` is as it was, and the error goes on as it is; but a full disk is
    a ``RunFailure`` even where a library reported it in its own words (torch and safetensors do).
    """
    with _in_words(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    with scratch_folder(path) as partial:
        yield partial
        with _in_words(path):
            for folder, _, names in os.walk(partial):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            _put(partial, path)
    with _in_words(path):
        _fsync(path.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Inside, an empty folder beside ``path``, on the same disk; after it, gone with what is in it. Errors go on as
    ``atomic_folder``'s do."""
    with _in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = _beside(path, "partial")
        # Not tempfile.mkdtemp: its folders are closed to other users, and the exported model should not be.
        scratch.mkdir()
    try:
        yield scratch
    except BaseException as error:
        if _is_no_space(error, scratch):  # asked before the half-written files are removed
            raise _no_space(path) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def append_line(path: Path, text: str) -> None:
    """One whole line at the end of the file. A torn line that a killed process left there is dropped first."""
    assert "\n" not in text, f"a line of a log cannot hold a line break: {text!r}"
    with _in_words(path):
        _append(path, text.encode("utf-8") + b"\n", lines=True)


def append_bytes(path: Path, data: bytes) -> None:
    """The bytes at the end of the file, in one write; none of them if the disk is full."""
    with _in_words(path):
        _append(path, data, lines=False)


def read_lines(path: Path) -> list[str]:
    """The whole lines of the file (``.gz``: compressed), without a torn last one; none if there is no file."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        return []
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); check the path and its permissions") from error
    # Not str.splitlines: it also breaks at U+2028 and its like, which JSON text may hold as they are.
    return [line.decode("utf-8", errors="replace") for line in data.split(b"\n")[:-1]]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log written with ``append_line``; see ``read_lines``."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); remove that line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not an object; remove that line")
        rows.append(row)
    return rows


def truncate_after(path: Path, key: str, value: float) -> None:
    """Keeps only the whole lines whose ``key`` is at most ``value``: what a resumed run has not to say again."""
    rows = read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(key), int | float):
            raise UserError(f"{path}, line {number}: has no number {key!r}; remove that line")
    kept = [line for line, row in zip(read_lines(path), rows, strict=True) if row[key] <= value]
    data = "".join(line + "\n" for line in kept).encode("utf-8")
    if path.exists() and path.stat().st_size != len(data):
        write_bytes(path, data)


def to_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Strict JSON, readable in every language: numbers that are not finite become null, lone surrogates U+FFFD.

    ``default`` says what to write for a value that JSON has no word for, as in ``json.dumps``.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, default=default)
    except ValueError:  # a number that is not finite somewhere
        text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent, default=default)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


class FolderLock:
    """Says that a live process works in the folder; released by ``release``, at the end of ``with``, or by the
    process's death, however it died. Made by ``lock_folder``."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Lets another process in. Releasing twice is allowed."""
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def lock_folder(path: Path) -> FolderLock:
    """Takes the folder for this process, making it if need be.

    Raises ``UserError`` with the other's process id if a live process holds it.
    """
    with _in_words(path):
        path.mkdir(parents=True, exist_ok=True)
        # The file is never removed: a process that had just opened it would then lock a file nobody else sees.
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode("ascii", errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"{path} is in use by the running process {holder}; wait for it, stop it, or choose another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        return FolderLock(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half written below the folder. Only for who holds its lock."""
    with _in_words(folder):
        for left in sorted(folder.rglob(".*")):
            match = _LEFT_OVER.fullmatch(left.name)
            if match is None or not left.exists():  # gone: it was inside another leftover
                continue
            place = left.with_name(match["name"])
            if match["kind"] == "replaced" and not place.exists():
                left.rename(place)  # killed between the two renames of _put: the old one is the only whole one
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


# A forked child shares the lock with its parent, and a worker that outlived a killed run would keep the folder taken.
_held: set[int] = set()


def _let_go_in_child() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


def _append(path: Path, data: bytes, *, lines: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if lines and end and os.pread(descriptor, 1, end - 1) != b"\n":
            end = os.pread(descriptor, end, 0).rfind(b"\n") + 1
            os.ftruncate(descriptor, end)
        try:
            written = 0
            while written < len(data):  # once, unless the disk fills up: then the second try says so
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _put(new: Path, place: Path) -> None:
    """Renames a folder into place. Where another stands the two swap names at once: ``place`` always exists."""
    try:
        os.rename(new, place)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(new, place):
        shutil.rmtree(new, ignore_errors=True)
    else:
        _put_in_two_steps(new, place)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE); False where the system or the file system has none (macOS, some NFS)."""
    libc = ctypes.CDLL(None, use_errno=True)
    current_folder, exchange = -100, 2
    if not hasattr(libc, "renameat2"):
        return False
    result: int = libc.renameat2(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange)
    if result and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return result == 0


def _put_in_two_steps(new: Path, place: Path) -> None:
    """The same without an exchange. Killed in the middle, ``remove_leftovers`` puts the old folder back."""
    aside = _beside(place, "replaced")
    os.rename(place, aside)
    os.rename(new, place)
    shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name in the same folder, so that the rename stays on one file system and no glob finds it."""
    beside = path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")
    assert _LEFT_OVER.fullmatch(beside.name), beside.name
    return beside


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into one sentence with the path and the cure."""
    try:
        yield
    except OSError as error:
        code = error.errno
        if code in _NO_SPACE:
            raise _no_space(path) from error
        if code in _NOT_ALLOWED:
            raise UserError(
                f"{path} cannot be written ({_reason(error)}); choose another folder or fix its permissions"
            ) from error
        if code in _WRONG_KIND:
            where = f" at {error.filename}" if error.filename and str(error.filename) != str(path) else ""
            raise UserError(
                f"{path} cannot be written ({_reason(error)}{where}); choose another folder or move that away"
            ) from error
        raise RunFailure(f"{path} cannot be written ({_reason(error)}); check the disk and try again") from error


def _no_space(path: Path) -> RunFailure:
    return RunFailure(f"no space left to write {path}; free some on that disk or write to another one")


def _is_no_space(error: BaseException, partial: Path) -> bool:
    """Whether the error that came while filling the folder is a full disk, be it in a library's own words."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    if not isinstance(error, Exception) or isinstance(error, UserError | RunFailure):
        return False
    if f"os error {errno.ENOSPC}" in str(error) or os.strerror(errno.ENOSPC).lower() in str(error).lower():
        return True
    with suppress(OSError):
        return shutil.disk_usage(partial).free < 2**16  # what did not fit has used up the rest
    return False


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
