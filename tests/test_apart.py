"""The helper process whose copies do the measuring."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest

from common.errors import RunFailure, UserError
from learner.apart import Apart


def where(wait_s=0.0):
    time.sleep(wait_s)
    return os.getpid(), os.getppid()


def wrong(words):
    raise UserError(words)


def die(number):
    if number:
        os.kill(os.getpid(), number)
    os.abort()


@pytest.fixture
def apart():
    one = Apart("json")
    yield one
    one.close()


def test_each_call_has_a_copy_of_its_own(apart):
    (one, helper), (other, same) = apart.call(where, limit_s=60), apart.call(where, limit_s=60)
    assert helper == same != os.getpid() and one != other
    apart.close()
    assert not psutil.pid_exists(helper)
    assert apart.call(where, limit_s=60)[1] != helper


def test_what_is_raised_is_raised_here(apart):
    with pytest.raises(UserError, match=r"^learner\.x=1 is wrong$"):
        apart.call(wrong, "learner.x=1 is wrong", limit_s=60)


@pytest.mark.parametrize("number", [signal.SIGKILL, 0])
def test_a_copy_that_dies_is_said(apart, number):
    with pytest.raises(RunFailure, match=r"the process of die died \(exit code -(9|6)\); it last said"):
        apart.call(die, number, limit_s=60)
    assert apart.call(where, limit_s=60)


def test_a_copy_without_an_answer_is_ended(apart):
    _, helper = apart.call(where, limit_s=60)
    with pytest.raises(RunFailure, match=r"where did not answer within 0\.5 s"):
        apart.call(where, 600.0, limit_s=0.5)
    assert not psutil.pid_exists(helper)
    assert apart.call(where, limit_s=60)


def test_an_interrupted_call_leaves_no_answer_for_the_next(apart, monkeypatch):
    assert apart.call(where, limit_s=60)
    poll = apart._pipe.poll

    def interrupted(limit_s):
        poll(limit_s)
        raise KeyboardInterrupt

    monkeypatch.setattr(
        apart, "_pipe", SimpleNamespace(send=apart._pipe.send, poll=interrupted, close=apart._pipe.close)
    )
    with pytest.raises(KeyboardInterrupt):
        apart.call(where, limit_s=60)
    with pytest.raises(UserError):
        apart.call(wrong, "no", limit_s=60)


def test_a_helper_that_cannot_import_says_so():
    with pytest.raises(RunFailure, match="No module named 'no_such_module'"):
        Apart("no_such_module").call(where, limit_s=60)


def test_it_ends_with_the_process_that_started_it(apart):
    """Also while a copy works."""
    import multiprocessing

    fork = multiprocessing.get_context("spawn")
    queue = fork.Queue()
    process = fork.Process(target=_start_and_wait, args=(queue,))
    process.start()
    helper = queue.get(timeout=120)
    copies = psutil.Process(helper).children()
    process.kill()
    process.join()
    until = time.monotonic() + 60
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in copies) or psutil.pid_exists(helper):
        if psutil.pid_exists(helper) and psutil.Process(helper).status() == psutil.STATUS_ZOMBIE:
            break
        assert time.monotonic() < until
        time.sleep(0.1)


def _start_and_wait(queue):
    one = Apart("json")
    _, helper = one.call(where, limit_s=60)
    one._pipe.send((where, (600.0,), []))
    until = time.monotonic() + 60
    while not psutil.Process(helper).children() and time.monotonic() < until:
        time.sleep(0.05)
    queue.put(helper)
    time.sleep(600)
