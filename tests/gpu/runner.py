"""Runs checks one after another, each alone in a process, and keeps every result.

A check is a function ``module:name`` of one argument, a ``Report``; it notes figures as it goes, and raises where
something is wrong. A crash, a CUDA error or an endless loop costs that check and no other: the process gets its time
limit and is then killed with all that it started. The JSON file is written whole after every check, so that nothing is
lost when this process is killed.

Left out: what the checks are (``checks.py``), and how they are shown (``__main__.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import atomic_files

ROOT = Path(__file__).parent.parent.parent
LINES = 12  # of its traceback that a failed check's result keeps


@dataclass(frozen=True)
class Check:
    name: str
    function: str
    """``module:name``."""
    limit_s: float
    """After so long it is taken to hang."""
    usual_s: float
    """It is not begun with less than this left of the budget."""
    what: str = ""
    needs: str = ""
    """A package without which it is skipped."""
    not_on_cpu: str = ""
    """Why it is skipped without a GPU, if it is."""

    def skipped(self, on_cpu: bool) -> str:
        """Why it makes no sense here, as far as that is known before it is begun."""
        if on_cpu and self.not_on_cpu:
            return self.not_on_cpu
        lacking = self.needs and importlib.util.find_spec(self.needs) is None
        return f"{self.needs} is not installed" if lacking else ""


@dataclass
class Result:
    name: str
    outcome: str
    """passed, failed, skipped or not run."""
    why: str = ""
    seconds: float = 0.0
    processor_s: float = 0.0
    """Of all its processes that have ended."""
    figures: dict[str, Any] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)
    """Of the traceback, where it failed."""


class Skip(Exception):
    """Raised by a check that has no sense here; the text says why."""


class Report:
    """What a check says while it runs. Every figure is on disk before the next line of the check."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.figures: dict[str, Any] = {}

    def note(self, **figures: Any) -> None:
        """Measured figures; units are in their names."""
        self.figures |= {name: _short(value) for name, value in figures.items()}
        atomic_files.write_json(self._path, {"figures": self.figures})

    def end(self, outcome: str, why: str = "", last_lines: Sequence[str] = ()) -> None:
        told = {"figures": self.figures, "outcome": outcome, "why": why, "last_lines": list(last_lines)}
        atomic_files.write_json(self._path, told)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def work(function: str, path: Path) -> None:
    """In the check's own process: runs it and writes down how it ended."""
    report = Report(path)
    try:
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(report)
    except Skip as skip:
        report.end("skipped", str(skip))
    except BaseException as error:
        lines = traceback.format_exc().rstrip().split("\n")
        why = " ".join(str(error).split())[:300]
        report.end("failed", f"{type(error).__name__}: {why}" if why else type(error).__name__, lines[-LINES:])
        raise
    else:
        report.end("passed")


def run(
    checks: Sequence[Check],
    path: Path,
    header: dict[str, Any],
    budget_s: float | None = None,
    on_cpu: bool = True,
    before: Callable[[int, Check], None] = lambda place, check: None,
    after: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The results in order, and all of it in the JSON file at ``path``, written again after each check.

    ``budget_s`` is for all together: a check that no longer fits is listed as not run, and one that the budget ends
    midway too.
    """
    started = time.monotonic()
    results: list[Result] = []
    for place, check in enumerate(checks):
        left = float("inf") if budget_s is None else budget_s - (time.monotonic() - started)
        if why := check.skipped(on_cpu):
            results.append(Result(check.name, "skipped", why))
        elif left < check.usual_s:
            results.append(Result(check.name, "not run", f"{max(left, 0):.0f} s left, and it takes {check.usual_s:g}"))
        else:
            before(place, check)
            try:
                results.append(_alone(check, left))
            except KeyboardInterrupt:
                results.append(Result(check.name, "not run", "interrupted"))
                results += [Result(one.name, "not run", "interrupted") for one in checks[place + 1 :]]
                write(path, header, results, time.monotonic() - started)
                return results
        write(path, header, results, time.monotonic() - started)
        after(results[-1])
    return results


def write(path: Path, header: dict[str, Any], results: Sequence[Result], seconds: float) -> None:
    counts = {name: sum(one.outcome == name for one in results) for name in ("passed", "failed", "skipped", "not run")}
    told = [asdict(one) for one in results]
    atomic_files.write_json(path, {**header, "seconds": round(seconds, 1), "counts": counts, "checks": told})


def _alone(check: Check, left_s: float) -> Result:
    """One check in a process of its own, killed with all that it started when its time is over."""
    with tempfile.TemporaryDirectory(prefix="check-") as place:
        said, log = Path(place) / "result.json", Path(place) / "log"
        words = [sys.executable, "-m", "tests.gpu.runner", check.function, str(said)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", "TMPDIR": place}
        begun, used = time.monotonic(), _processor_s()
        limit = min(check.limit_s, left_s)
        with log.open("w") as out, _group(words, out, environment) as process:
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
        result = _told(check.name, said)
        result.seconds, result.processor_s = round(time.monotonic() - begun, 1), round(_processor_s() - used, 1)
        if code is None and limit < check.limit_s:
            result.outcome, result.why = "not run", f"the budget ended {limit:.0f} s into it"
        elif code is None:
            result.outcome, result.why = "failed", f"it took longer than its limit of {check.limit_s:g} s"
        elif not result.outcome:
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            result.outcome, result.why = "failed", f"its process {how} without a word"
        if result.outcome in ("failed", "not run") and not result.last_lines:
            result.last_lines = log.read_text(errors="replace").rstrip().split("\n")[-LINES:]
        return result


@contextlib.contextmanager
def _group(words: Sequence[str], out: Any, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:  # whatever it started, and did not end, goes with it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _told(name: str, said: Path) -> Result:
    told = json.loads(said.read_text()) if said.is_file() else {}
    words = {key: told[key] for key in ("why", "figures", "last_lines") if key in told}
    return Result(name, told.get("outcome", ""), **words)


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    # By its module's own name, or ``Skip`` here would be another than the checks raise.
    importlib.import_module("tests.gpu.runner").work(sys.argv[1], Path(sys.argv[2]))
