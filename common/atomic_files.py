"""Files written whole or not at all, so that a kill, a full disk or a power cut leaves no half of one behind.

``write_text``, ``write_json``, ``write_bytes`` and ``atomic_folder`` put a whole file or folder where the old one was;
``append_line`` grows a log, whose last line a kill may tear: every reader and writer here drops it then. Whatever goes
wrong with the disk is one sentence with the path and the cure, and the previous file stays.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path, "partial")
        try:
            partial.write_bytes(data)
            _fsync(partial)  # before the rename: a power cut could otherwise keep the new name and lose the bytes
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _fsync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Inside, an empty folder to fill; after it, the same folder under ``path``, in place of whatever stood there.
    Without ``replace`` it is dropped where one with the same files stands there: another process has made it meanwhile.

    If the body raises, nothing of it stays, ``path`` is as it was, and the error is raised unchanged; but a full disk
    is a ``RunFailure`` even where a library has an error of its own for it (torch and safetensors do).
    """
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    with scratch_folder(path) as partial:
        yield partial
        with disk_errors(path):
            for folder, _, names in os.walk(partial):
                for name in [*names, ""]:
                    _fsync(Path(folder, name))
            _put(partial, path, replace)
            _fsync(path.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Inside, an empty folder beside ``path``, on the same disk; it is removed afterwards with its contents. Errors are
    handled as in ``atomic_folder``."""
    with disk_errors(path):
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
    """One whole line at the end of the file, or none if the disk is full. A torn line that a killed process left there
    is dropped first."""
    assert "\n" not in text, f"a line of a log cannot hold a line break: {text!r}"
    data = text.encode("utf-8") + b"\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                end = os.pread(file.fileno(), end, 0).rfind(b"\n") + 1
                file.truncate(end)
            try:
                while data:  # once, unless the disk fills up: then the second write raises
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise


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
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path} cannot be read ({reason}); check the path and its permissions") from error
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
    """Keeps only the whole lines whose ``key`` is at most ``value``: those that a resumed run does not write again."""
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

    ``default`` converts a value that JSON cannot hold, as in ``json.dumps``.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, default=default)
    except ValueError:  # a number that is not finite somewhere
        finite = json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)
        text = json.dumps(finite, ensure_ascii=False, indent=indent)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Inside, the folder (made if need be) is this process's. The process's death, however it died, lets another in,
    and a forked worker that outlives it does not keep it.

    Raises ``UserError`` with the other's process id if a live process holds it.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock, file = FileLock(path / LOCK_NAME, fallback_to_soft=False), path / LOCK_NAME
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = file.read_text(encoding="ascii", errors="replace").strip() or "unknown"
            raise UserError(
                f"{path} is in use by the running process {holder}; wait for it, stop it, or choose another folder"
            ) from None
    try:
        with disk_errors(path):
            file.write_text(f"{os.getpid()}\n")  # for the message above only
        yield
    finally:
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half written below the folder. Only for who holds its lock."""
    with disk_errors(folder):
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


def _put(new: Path, place: Path, replace: bool) -> None:
    """Renames a folder into place, over one that stands there. Killed between the two renames that this takes,
    ``remove_leftovers`` puts the old one back."""
    try:
        os.rename(new, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not replace and {file.name for file in new.iterdir()} <= {file.name for file in place.iterdir()}:
            return
        old = _beside(place, "replaced")
        os.rename(place, old)
        try:
            os.rename(new, place)
        except BaseException:
            os.rename(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)


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
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into one sentence with the path and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(path) from error
        kind: type[Exception] = UserError
        reason, cure = (error.strerror or str(error)).lower(), "choose another folder or fix its permissions"
        if error.errno in _WRONG_KIND:
            if error.filename and str(error.filename) != str(path):
                reason += f" at {error.filename}"
            cure = "choose another folder or move that away"
        elif error.errno not in _NOT_ALLOWED:
            kind, cure = RunFailure, "check the disk and try again"
        raise kind(f"{path} cannot be written ({reason}); {cure}") from error


def _no_space(path: Path) -> RunFailure:
    return RunFailure(f"no space left to write {path}; free some on that disk or write to another one")


def _is_no_space(error: BaseException, partial: Path) -> bool:
    """Whether an error raised while the folder was filled means a full disk, also where a library raised it."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    if not isinstance(error, Exception) or isinstance(error, UserError | RunFailure):
        return False
    if f"os error {errno.ENOSPC}" in str(error) or os.strerror(errno.ENOSPC).lower() in str(error).lower():
        return True
    with suppress(OSError):
        return shutil.disk_usage(partial).free < 2**16  # what did not fit has used up the rest
    return False
