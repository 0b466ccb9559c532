"""The first hour on a GPU: its runner loses nothing to a check that fails, crashes or hangs, and keeps its budget."""

import json
import time
from dataclasses import replace

import psutil
import pytest
import typer

from tests.gpu.__main__ import main
from tests.gpu.checks import CHECKS
from tests.gpu.runner import ROOT, Check, run


def check(name, limit_s=60.0, usual_s=0.0):
    return Check(name, f"tests.gpu_samples:{name}", limit_s, usual_s)


def told(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_check_is_alone_and_every_result_is_kept(tmp_path):
    path, files = tmp_path / "results.json", []
    checks = [check(name) for name in ("passes", "fails", "crashes", "leaves", "skips")] + [check("hangs", limit_s=2)]
    checks.append(check("passes"))
    results = run(checks, path, {"card": "none"}, after=lambda result: files.append(told(path)))
    outcomes = ["passed", "failed", "failed", "failed", "skipped", "failed", "passed"]
    assert [one.outcome for one in results] == outcomes
    assert [len(one["checks"]) for one in files] == list(range(1, 8))  # whole after each
    assert files[-1]["card"] == "none"
    assert files[-1]["counts"] == {"passed": 2, "failed": 4, "skipped": 1, "not run": 0}

    passed, failed, crashed, left, skipped, hung, _ = files[-1]["checks"]
    assert passed["figures"] == {"error": 0.125, "tokens_per_s": 123500.0}
    assert (failed["why"], failed["figures"]) == ("AssertionError: off by 3.5", {"error": 3.5})
    assert failed["last_lines"][-1] == "AssertionError: off by 3.5"
    assert "SIGSEGV" in crashed["why"] and crashed["figures"] == {"reached": 1}
    assert any("crashes" in line for line in crashed["last_lines"])  # faulthandler's
    assert "code 7" in left["why"] and left["last_lines"] == ["the last words"]
    assert skipped["why"] == "two GPUs are needed"
    assert "its limit of 2 s" in hung["why"]
    assert not psutil.pid_exists(hung["figures"]["child"]) or dead(hung["figures"]["child"])


def dead(pid):
    """Killed, and waiting for whoever adopted it."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_listed_as_not_run(tmp_path):
    path = tmp_path / "results.json"
    checks = [check("passes", usual_s=0.1), check("passes", usual_s=100), check("hangs", usual_s=0.2), check("passes")]
    results = run(checks, path, {}, budget_s=3)
    assert [one.outcome for one in results] == ["passed", "not run", "not run", "not run"]
    assert "it takes 100" in results[1].why
    assert "the budget ended" in results[2].why
    assert [one["outcome"] for one in told(path)["checks"]] == [one.outcome for one in results]


def test_what_makes_no_sense_here_is_not_begun(tmp_path):
    checks = [replace(check("hangs"), needs="no_such_package"), replace(check("hangs"), not_on_cpu="a card is asked")]
    results = run(checks, tmp_path / "results.json", {})
    assert [one.outcome for one in results] == ["skipped", "skipped"]
    assert [one.why for one in results] == ["no_such_package is not installed", "a card is asked"]


def test_checks_are_chosen_by_name(tmp_path, capsys):
    with pytest.raises(typer.Exit) as raised:
        main(["kernel"], path=tmp_path / "results.json")
    assert raised.value.exit_code == 2
    assert "no check is called kernel; there are imports, kernels" in " ".join(capsys.readouterr().out.split())


def test_names_are_different_and_functions_are_there():
    assert len({one.name for one in CHECKS}) == len(CHECKS)
    for one in CHECKS:
        module, _, name = one.function.partition(":")
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f"def {name}(report: Report)" in source, one
        assert one.usual_s < one.limit_s
