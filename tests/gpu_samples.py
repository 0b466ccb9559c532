"""Checks that pass, fail, crash, hang and say that they make no sense here: what the runner of ``tests/gpu`` must
survive. Used by ``tests/test_gpu_kit.py``, each in a process of its own."""

import os
import signal
import subprocess
import time


def passes(report):
    report.note(error=0.125, tokens_per_s=123456.789)


def fails(report):
    report.note(error=3.5)
    raise AssertionError("off by 3.5")


def crashes(report):
    report.note(reached=1)
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(report):
    print("the last words")
    os._exit(7)


def hangs(report):
    report.note(child=subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def skips(report):
    from tests.gpu.runner import Skip

    raise Skip("two GPUs are needed")


def slow(report):
    time.sleep(1.5)
