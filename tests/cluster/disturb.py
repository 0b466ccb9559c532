"""Runs ``nanogrpo train`` on a private cluster and disturbs it: kills or stops its services at chosen moments.

``Run`` starts the real command; ``strike`` sends a real signal to the service's real process; ``seconds_to_recover``
says how long it took until the run had gone a step further than it had been. As a program it does many rounds at
random moments and prints a table of recovery times::

    python -m tests.cluster.disturb --rounds 20
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import torch
from safetensors.torch import load_file

from common import atomic_files
from common.tracking.metrics import METRICS
from tests.making import QUIET
from tests.tiny import make_tiny

ROOT = Path(__file__).parent.parent.parent
TOY = f"{ROOT / 'tests' / 'toy.py'}:Toy"
CLUSTER = ("cluster.mode=ray", "cluster.address=private", "cluster.sampler_cpus=0.5", "cluster.learner_cpus=0.5")
SERVICES = {"sampler": "ray::SamplerService", "learner": "ray::LearnerService"}
_NOT_COMPARED = {"time", "restarts", "sync_transport"}


def words(model: Path, folder: Path, steps: int, *more: str) -> list[str]:
    """A small float32 run on a tiny model whose sampler and learner are exact."""
    return [
        f"model.name={model}", "model.dtype=float32", f"task.name={TOY}", "sampler.name=hf", "sampler.max_tokens=8",
        "optimizer.lr=1e-3", f"train.steps={steps}", "train.prompts_per_step=4", "train.group_size=4",
        "train.threads=1", "eval.questions=0", "run.save_every=3", "run.console=plain", f"run.folder={folder}",
        *QUIET, *more,
    ]  # fmt: skip


class Run:
    """One ``nanogrpo train``, in a process group of its own so that nothing outlives it."""

    def __init__(self, settings: list[str], log: Path, command: tuple[str, ...] = ()) -> None:
        self.folder = Path(next(word for word in settings if word.startswith("run.folder=")).partition("=")[2])
        self._log: IO[str] = log.open("a")
        self._log_path = log
        command = command or (sys.executable, "-m", "deploy.cli", "train", str(_empty_run_file(log.parent)), *settings)
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    @property
    def said(self) -> str:
        return self._log_path.read_text()

    def step(self) -> int:
        """The last step in its metrics."""
        rows = atomic_files.read_json_lines(self.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def wait_for_step(self, step: int, limit_s: float = 240) -> None:
        until = time.monotonic() + limit_s
        while self.step() < step:
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}:\n{self.said[-3000:]}"
            assert time.monotonic() < until, f"step {step} was not reached in {limit_s:g} s:\n{self.said[-3000:]}"
            time.sleep(0.02)

    def wait(self, limit_s: float = 300) -> int:
        try:
            return self.process.wait(limit_s)
        finally:
            self.end()

    def end(self) -> None:
        known = self._all()  # before it goes, and they with other parents
        with _gone_is_fine():
            self.process.kill()  # first: it would start its driver again
        for process in reversed(known):
            with _gone_is_fine():
                process.kill()
        self._log.close()

    def services(self, name: str) -> list[psutil.Process]:
        """The living processes of a service (``sampler``, ``learner``), or the ``driver``."""
        everything = self._all()
        if name == "driver":
            return [one for one in everything if one.ppid() == self.process.pid and "deploy.cli" in _title(one)]
        return sorted((one for one in everything if _title(one).startswith(SERVICES[name])), key=lambda one: one.pid)

    def strike(self, name: str, number: int, which: int = 0) -> psutil.Process:
        """Sends the signal to one of the service's processes, once there is one."""
        until = time.monotonic() + 120
        while not (found := self.services(name)) or len(found) <= which:
            assert time.monotonic() < until, f"no {name} to strike:\n{self.said[-3000:]}"
            time.sleep(0.05)
        found[which].send_signal(number)
        return found[which]

    def seconds_to_recover(self, name: str, number: int, which: int = 0) -> float:
        """Strikes, and waits until the run is a step further than it was."""
        before, started = self.step(), time.monotonic()
        self.strike(name, number, which)
        time.sleep(0.5)  # a step that had been done may still be written
        before = max(before, self.step())
        self.wait_for_step(before + 1)
        return time.monotonic() - started

    def _all(self) -> list[psutil.Process]:
        """Every process of the run: its session's, and those that Ray has put into sessions of their own."""
        try:
            above = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            above = []
        known = {one.pid for one in above}
        for one in psutil.process_iter():
            with _gone_is_fine():
                if one.pid not in known and os.getsid(one.pid) == self.process.pid and one.pid != self.process.pid:
                    above.append(one)
        return above


def weights(folder: Path, merged: bool = False) -> dict[str, torch.Tensor]:
    final = folder / "final" / ("merged" if merged else "")
    return load_file(next(final.glob("*model.safetensors")))


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics, without what a clock, a replaced service or another transport changes."""
    kept = {name for name in METRICS if not name.startswith(("seconds", "memory"))} - _NOT_COMPARED
    rows = atomic_files.read_json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k in kept or k.startswith("reward/")} for row in rows]


def same(one: Path, other: Path) -> bool:
    """Whether two runs gave the same weights, metrics and rollouts, bit for bit."""
    a, b = weights(one), weights(other)
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    texts = [[file.read_text() for file in sorted((run / "rollouts").glob("step-*.jsonl"))] for run in (one, other)]
    return equal and numbers(one) == numbers(other) and texts[0] == texts[1]


def _empty_run_file(folder: Path) -> Path:
    file = folder / "empty.toml"
    file.write_text("")
    return file


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _gone_is_fine() -> suppress:
    return suppress(psutil.Error, ProcessLookupError)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder to work in")
    chosen = parser.parse_args()
    draw = random.Random(chosen.seed)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    model = make_tiny(chosen.folder / "model")
    steps = 12 * chosen.per_run
    more = (*CLUSTER, "cluster.learner_ranks=2", "cluster.samplers=2", "timeouts.pulse_s=10", "cluster.max_restarts=50")
    undisturbed = Run(words(model, chosen.folder / "undisturbed", steps, *more), chosen.folder / "undisturbed.log")
    assert undisturbed.wait() == 0, undisturbed.said
    kinds = [(name, number) for name in ("sampler", "learner", "driver") for number in (signal.SIGKILL, signal.SIGSTOP)]
    print("| struck | signal | at step | seconds until a step further |\n|---|---|---|---|")
    done = 0
    while done < chosen.rounds:
        folder = chosen.folder / f"disturbed-{done}"
        run = Run(words(model, folder, steps, *more), folder.with_suffix(".log"))
        try:
            for place in range(min(chosen.per_run, chosen.rounds - done)):
                name, number = kinds[done % len(kinds)]
                run.wait_for_step(10 * place + draw.randrange(1, 8))
                time.sleep(draw.random() * 0.5)
                step = run.step()
                which = draw.randrange(2) if name != "driver" else 0
                seconds = run.seconds_to_recover(name, number, which)
                print(f"| {name} | {signal.Signals(number).name} | {step} | {seconds:.1f} |", flush=True)
                done += 1
            assert run.wait() == 0, run.said[-3000:]
        finally:
            run.end()
        print(
            f"same weights, metrics and rollouts as the undisturbed run: {same(folder, chosen.folder / 'undisturbed')}"
        )


if __name__ == "__main__":
    main()
