"""``python -m tests.gpu [NAMES] [--minutes N] [--json FILE]``: the checks, a table, and a JSON file.

README.md beside this file says how to run it on a bare machine.
"""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.gpu import runner
from tests.gpu.checks import CHECKS
from tests.gpu.runner import ROOT, Check, Result

COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow", "not run": "yellow"}
SHOWN = 6  # figures of a check in the table; the file has all

Names = Annotated[list[str] | None, typer.Argument(help="Checks to run, in this order; all of them without.")]
Minutes = Annotated[
    float | None, typer.Option(help="A budget for the whole; what no longer fits is listed as not run.")
]
Json = Annotated[Path, typer.Option("--json", help="Where the results go, written whole after every check.")]
Listed = Annotated[bool, typer.Option("--list", help="Say what there is, and end.")]


def main(
    names: Names = None, minutes: Minutes = None, path: Json = Path("gpu-checks.json"), listed: Listed = False
) -> None:
    """The first hour on a GPU: every check alone in a process, in the order of what they decide."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    known = {check.name: check for check in CHECKS}
    if unknown := [name for name in names or () if name not in known]:
        console.print(f"no check is called {', '.join(unknown)}; there are {', '.join(known)}", markup=False)
        raise typer.Exit(2)
    if listed:
        for check in CHECKS:
            console.print(f"{check.name:15} {check.what} (at most {check.limit_s:g} s)", markup=False, highlight=False)
        return
    chosen = [known[name] for name in names] if names else list(CHECKS)
    header = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **_about()}
    console.print(_headline(header), markup=False, highlight=False)

    on_cpu = "memory_gib" not in header
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the check in flight is ended, all is written

    def before(place: int, check: Check) -> None:
        console.print(f"[{place + 1}/{len(chosen)}] {check.name}: {check.what}", markup=False, highlight=False)

    def after(result: Result) -> None:
        line = f"      {result.outcome} in {result.seconds:.0f} s" + (f": {result.why}" if result.why else "")
        console.print(line, style=COLOURS[result.outcome], markup=False, highlight=False)

    results = runner.run(chosen, path, header, None if minutes is None else 60 * minutes, on_cpu, before, after)
    console.print(_table(results))
    for result in results:
        if result.outcome == "failed":
            console.print(f"\n{result.name}:", style="red")
            console.print("\n".join(result.last_lines), markup=False, highlight=False)
    counts = [sum(one.outcome == name for one in results) for name in ("passed", "failed", "skipped", "not run")]
    console.print(f"\n{counts[0]} passed, {counts[1]} failed, {counts[2] + counts[3]} skipped", highlight=False)
    console.print(f"all figures are in {path}", markup=False, highlight=False)
    raise typer.Exit(1 if counts[1] else 0)


def _about() -> dict[str, Any]:
    """Asked of a process of its own: this one touches no card."""
    words = [sys.executable, "-c", "import json; from tests.gpu.place import about; print(json.dumps(about()))"]
    try:
        ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return {"card": "unknown: no answer within 240 s"}
    if ran.returncode:
        return {"card": f"unknown: {ran.stderr.strip().split(chr(10))[-1]}"}
    found: dict[str, Any] = json.loads(ran.stdout.strip().split("\n")[-1])
    return found


def _headline(header: dict[str, Any]) -> str:
    card = str(header["card"])
    if "memory_gib" in header:
        card += f", {header['memory_gib']} GiB, {header['cards']} of them, capability {header['capability']}"
        card += f", CUDA {header['cuda']}, driver {header.get('driver', 'unknown')}"
    versions = ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items())
    return f"{header['date']}  {card}\npython {header.get('python', 'unknown')}, {versions}"


def _table(results: list[Result]) -> Table:
    table = Table(title="The first hour on a GPU")
    for column in ("check", "outcome", "seconds", "measured, or why not"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for result in results:
        figures = [f"{name} {value}" for name, value in result.figures.items() if value is not None]
        more = [f"and {len(figures) - SHOWN} more"] if len(figures) > SHOWN else []
        said = [result.why, *figures[:SHOWN], *more] if result.why else [*figures[:SHOWN], *more]
        outcome = f"[{COLOURS[result.outcome]}]{result.outcome}[/]"
        table.add_row(result.name, outcome, f"{result.seconds:.1f}", ", ".join(said).replace("[", "\\["))
    return table


if __name__ == "__main__":
    typer.run(main)
