"""An engine that hangs inside our own wait ends the process, with the side and the setting in one sentence."""

import contextlib
import dataclasses
import os
import re
import sys
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from common.errors import RunFailure
from common.types import Prompt, SamplingParams
from common.watchdog import result, time_limit
from deploy.colocated import SharedDevice
from deploy.components import closing
from deploy.sample import sample
from learner.evaluate import evaluate
from learner.train import Loop, Request, _fill, _result, rehearse
from learner.weight_sync import WeightSync
from sampler.engine.vllm import Answer
from tests.making import config

PROMPT = Prompt("p", (), {}, "", (1, 2, 3))


class Stuck:
    """An engine in this process whose step never returns. Its futures work inside ``result``, as vLLM's do."""

    takes_adapters = True
    version = 3

    def pump(self):
        time.sleep(1000)

    def generate(self, prompts, params):
        return Answer(self, len(prompts), list)

    def hang(self, *args, **kwargs):
        time.sleep(1000)

    close = sleep = wake = load_weights = logprobs = rehearse = save = hang

    @contextlib.contextmanager
    def perturbed(self, seed):
        self.hang()
        yield

    def publish_weights(self, merged):
        return None


@contextlib.contextmanager
def at_once():
    yield


FREE = SimpleNamespace(sampling=at_once, learning=at_once, syncing=at_once)


def loop(**changed):
    limits = dict.fromkeys(("generate_s", "update_s", "sync_s", "load_s"), 0.2)
    values = {field.name: None for field in dataclasses.fields(Loop) if field.init} | {
        "config": config(timeouts=limits), "sampler": Stuck(), "learner": Stuck(), "placement": FREE,
        "tracker": SimpleNamespace(phase=lambda text: None), "answer_s": 0.2, "in_flight": [], "in_hand": [],
        "requests_made": 0,
        "stream": SimpleNamespace(state=dict), "checkpoints": SimpleNamespace(save=Stuck().hang),
    }  # fmt: skip
    return Loop(**values | changed)


def sync():
    return WeightSync(Stuck(), Stuck(), FREE, [(1, 2, 3)], config().sync, 0.2)


def asked(prompts):
    done: Future = Future()
    done.set_result([SimpleNamespace(prompt=prompt, completions=()) for prompt in prompts])
    return SimpleNamespace(generate=lambda prompts, params: done)


def enter(context):
    with context:
        pass


SHARED = SharedDevice(Stuck(), Stuck(), 0.2)
AWAKE = SimpleNamespace(sleep=lambda *part: None, wake=lambda *part: None)
WAITS = {
    "the loop's request": (
        lambda: _result(loop(), Request(7, {}, [PROMPT], Stuck().generate([PROMPT], SamplingParams()), None)),
        "the sampler was still writing request 7", "timeouts.generate_s",
    ),
    "the task's prompts": (
        lambda: _fill(
            loop(learner=SimpleNamespace(version=0), stream=SimpleNamespace(state=dict, take=Stuck().hang)), 2
        ),
        "the task was still making its prompts", "timeouts.load_s",
    ),
    "the rehearsal's request": (
        lambda: rehearse(loop(), [PROMPT]), "the sampler was still writing the rehearsal's request",
        "timeouts.generate_s",
    ),
    "the rehearsal's pack": (
        lambda: rehearse(loop(sampler=asked([PROMPT])), [PROMPT]),
        "the learner was still doing the rehearsal's pack", "timeouts.update_s",
    ),
    "an evaluation": (
        lambda: evaluate(Stuck(), [PROMPT], list, SamplingParams(temperature=0.0), timeout_s=0.2),
        "the sampler was still answering an evaluation", "timeouts.generate_s",
    ),
    "a question of the command line": (
        lambda: sample(SimpleNamespace(config=loop().config), Stuck(), [PROMPT], 1, greedy=True),
        "the sampler was still answering 1 prompts", "timeouts.generate_s",
    ),
    "the sampler's end": (
        lambda: enter(closing(Stuck(), loop().config)), "the sampler was still closing", "timeouts.sync_s",
    ),
    "a checkpoint": (lambda: loop().save(), "the learner was still writing checkpoint 3", "timeouts.load_s"),
    "the challenge's noise": (
        lambda: sync().challenge(), "the learner was still putting noise on its weights", "timeouts.sync_s",
    ),
    "a weight transfer": (lambda: sync()(), "the sampler was still taking the weights of version 3", "timeouts.sync_s"),
    "the learner's sleep": (
        lambda: enter(SHARED.sampling()), "the learner was still giving its memory back", "timeouts.sync_s",
    ),
    "the sampler's wake": (
        lambda: enter(dataclasses.replace(SHARED, learner=AWAKE).sampling()),
        "the sampler was still taking its memory", "timeouts.sync_s",
    ),
    "the sampler's sleep": (
        lambda: enter(SHARED.learning()), "the sampler was still giving its memory back", "timeouts.sync_s",
    ),
    "the learner's wake": (
        lambda: enter(dataclasses.replace(SHARED, sampler=AWAKE).learning()),
        "the learner was still taking its memory", "timeouts.sync_s",
    ),
    "making room for a sync": (
        lambda: enter(SHARED.syncing()), "the learner was still making room for a sync", "timeouts.sync_s",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Exit status and last words of a process for each wait; all hang at once."""
    folder, started = tmp_path_factory.mktemp("ends"), {}
    for name, (call, _, _) in WAITS.items():
        with (folder / name).open("w") as words:
            started[name] = os.fork()
            if not started[name]:
                sys.stderr = words
                with contextlib.suppress(BaseException):
                    call()
                os._exit(0)
    return {name: (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (folder / name).read_text())
            for name, pid in started.items()}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_a_hang_inside_a_wait_ends_in_a_sentence(ends, name):
    status, words = ends[name]
    assert status == 1, words
    sentence = next(line for line in words.splitlines() if line.startswith("failed:"))
    assert WAITS[name][1] in sentence
    assert re.search(rf"after [\d.]+ s; raise {WAITS[name][2]} if it needs longer", sentence)
    assert "in hang" in words or "in pump" in words  # the stack that says where


def test_a_wait_that_can_end_does_so_and_leaves_the_process_alive():
    with pytest.raises(RunFailure, match=r"the sampler was still waiting after 0\.05 s; raise timeouts\.x if"):
        result(Future(), "sampler", "waiting", 0.05, "timeouts.x")


def test_what_the_work_itself_raises_passes_through():
    failed: Future = Future()
    failed.set_exception(TimeoutError("the engine's own"))
    with pytest.raises(TimeoutError, match="the engine's own"):
        result(failed, "sampler", "waiting", 5, "timeouts.x")


def test_work_in_time_is_left_alone():
    done: Future = Future()
    done.set_result(5)
    with time_limit("sampler", "working", 5, "timeouts.x"):
        assert result(done, "sampler", "waiting", 5, "timeouts.x") == 5
