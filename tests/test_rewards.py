"""Scoring in worker processes: right numbers in the right places, and no way for a bad reward to become a score."""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import TaskConfig
from common.errors import RunFailure, UserError
from common.rewards.scorer import Scorer, _weights
from common.types import Completion, Group, Prompt

ROOT = Path(__file__).parent.parent
LIMIT_S = 1.0

# What the completion says is what the reward does.
TASK = """
    import os, re, subprocess, sys, threading, time
    import my_words

    def do(prompt, completion):
        verb, _, rest = completion.text.partition(" ")
        if verb == "raise":
            raise KeyError(rest)
        if verb == "quit":
            sys.exit(rest)
        if verb == "hang":
            time.sleep(600)
        if verb == "regex":  # never gives up the interpreter
            re.match(r"(a+)+$", "a" * 60 + "b")
        if verb == "die":
            os._exit(7)
        if verb == "die_later":
            threading.Timer(0.2, lambda: os._exit(7)).start()
        if verb == "killed":
            os.kill(os.getpid(), 9)
        if verb == "sigterm":
            os.kill(os.getpid(), 15)
            started = subprocess.Popen(["sleep", "60"])
            started.terminate()
            return started.wait(5)
        if verb == "print":
            print(rest)
            print(rest.upper(), file=sys.stderr)
        if verb == "sleep":
            time.sleep(float(rest))
        if verb == "child":
            subprocess.Popen(["sleep", rest])
            time.sleep(600)
        if verb == "leave":
            subprocess.Popen(["sleep", rest])
        if verb == "fork":  # both come back
            if os.fork() == 0 and rest == "escape":
                raise NameError("only the copy")
            return len(completion.text)
        if verb == "deep":
            do(prompt, completion)
        if verb == "pid":
            return os.getpid()
        if verb == "torch":
            return float("torch" in sys.modules)
        if verb == "count":
            return len(prompt.data["numbers"]) + len(completion.token_ids)
        if verb == "return":
            return eval(rest)
        if verb == "word":
            return my_words.value
        return 0.5

    class Task:
        def __init__(self, second=2.0):
            self.rewards = {"first": do, "second": lambda prompt, completion: second * len(completion.text)}
            self.reward_weights = {"first": 1.0, "second": 0.0}
        def prompts(self, split):
            return []
        def is_correct(self, prompt, completion):
            if completion.text.startswith(("return", "hang")):
                return do(prompt, completion)
            return "yes" in completion.text
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("task")
    (folder / "my_words.py").write_text("value = 42")
    (folder / "my_task.py").write_text(textwrap.dedent(TASK))
    return f"{folder}/my_task.py:Task"


def config(task: str, **changes) -> TaskConfig:
    return TaskConfig.model_validate({"name": task, "reward_timeout_s": LIMIT_S} | changes)


@pytest.fixture(scope="module")
def stops(task):
    with Scorer(config(task, on_reward_timeout="stop")) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def skips(task):
    with Scorer(config(task, on_reward_error="skip", reward_workers=2)) as scorer:
        yield scorer


def group(*texts: str, name: str = "train-0") -> Group:
    completions = tuple(Completion((1, 2), text, (-1.0, -2.0), "stop", 3) for text in texts)
    return Group(Prompt(name, ({"role": "user", "content": "?"},), {"numbers": [1, 2, 3]}), completions)


def first(groups: list[Group]) -> list[list[float]]:
    return [[completion.rewards["first"] for completion in group.completions] for group in groups]


def test_scores(stops):
    given = [group("return 1", "return -2.5", name="a"), group("count", "word", "return True", name="b")]
    scored, errors = stops.score(given)
    assert errors == []
    assert first(scored) == [[1.0, -2.5], [5.0, 42.0, 1.0]]
    assert [completion.rewards["second"] for completion in scored[0].completions] == [16.0, 22.0]
    for before, after in zip(given, scored, strict=True):  # nothing else is touched
        assert after.prompt == before.prompt
        for old, new in zip(before.completions, after.completions, strict=True):
            assert (new.token_ids, new.text, new.logprobs) == (old.token_ids, old.text, old.logprobs)
            assert (new.policy_version, new.advantage) == (3, None)
            assert new.reward == new.rewards["first"]  # second has weight 0
            assert isinstance(new.rewards["first"], float)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), max_size=9))
def test_order_is_kept_across_workers(skips, values):
    groups = [group(*(f"return {value!r}" for value in row), name=f"p{i}") for i, row in enumerate(values)]
    scored, errors = skips.score(groups)
    assert errors == []
    assert [group.prompt.id for group in scored] == [group.prompt.id for group in groups]
    assert first(scored) == values


def test_weights(task):
    with Scorer(config(task, reward_weights={"second": -3.0}, options={"second": 10})) as scorer:
        assert scorer.weights == {"first": 1.0, "second": -3.0}
        [scored], _ = scorer.score([group("return 7")])
    assert scored.completions[0].rewards == {"first": 7.0, "second": 80.0}
    assert scored.completions[0].reward == 7.0 - 3.0 * 80.0


def test_unknown_weights_and_options_are_refused_before_anything_starts(task):
    with pytest.raises(UserError, match=r"reward_weights\.frist=1.0: .*it has first, second"):
        Scorer(config(task, reward_weights={"frist": 1.0}))
    for weight in (math.nan, math.inf, 1e308, True, "1"):  # the task's own
        with pytest.raises(UserError, match=r"first=.* is no number between -1e\+06 and 1e\+06"):
            _weights(SimpleNamespace(rewards={"first": len}, reward_weights={"first": weight}), {})
    with pytest.raises(UserError, match=r"task\.options\.secnd"):
        Scorer(config(task, options={"secnd": 1}))


def test_a_task_that_does_not_import_is_refused_at_once(tmp_path):
    (tmp_path / "my_bad.py").write_text("x = 1\nimport absent_module\n")
    with pytest.raises(UserError, match=r"my_bad\.py, line 2.*absent_module"):
        Scorer(config(f"{tmp_path}/my_bad.py:Task"))


FAILURES = [
    ("raise of hope", "KeyError: 'of hope'"),
    ("quit now", "SystemExit: now"),
    ("hang", "ran past task.reward_timeout_s=1"),
    ("regex", "ran past task.reward_timeout_s=1"),
    ("die", "its worker process died (exit code 7"),
    ("killed", "its worker process died (killed by signal 9"),
    ("return float('nan')", "returned nan, which is not finite"),
    ("return 1e200", "returned 1e+200, which is beyond 1e+06"),
    ("return -float('inf')", "returned -inf, which is not finite"),
    ("return None", "returned None, which is not a number"),
    ("return '0.5'", "returned '0.5', which is not a number"),
    ("return 1j", "returned 1j, which is not a number"),
    ("return 10**400", "OverflowError"),
    ("deep", "RecursionError"),
]


@pytest.mark.parametrize(("text", "error"), FAILURES)
def test_a_bad_reward_stops_the_run(stops, caplog, text, error):
    caplog.set_level(logging.INFO, "nanogrpo.rewards")
    groups = [group("return 1", name="good"), group("return 2", text, "return 3", name="train-17")]
    with pytest.raises(RunFailure) as caught:
        stops.score(groups)
    sentence = str(caught.value)
    assert "reward 'first' failed on completion 1 of prompt 'train-17'" in sentence
    assert error in sentence
    ran_over = "ran past" in error or "died" in error or error == "RecursionError"
    assert ("task.on_reward_timeout=skip" if ran_over else "task.on_reward_error=skip") in sentence
    assert "\n" not in sentence
    assert {record.name for record in caplog.records} == {"nanogrpo.rewards"}
    assert not [record for record in caplog.records if record.levelno > logging.INFO], (
        "the sentence is not written twice"
    )
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert repr(text) in logged
    assert error in logged
    assert first(stops.score([group("return 4")])[0]) == [[4.0]], "the next request must work"


@pytest.mark.parametrize(("text", "error"), FAILURES)
def test_a_bad_reward_leaves_its_group_out(skips, caplog, text, error):
    caplog.set_level(logging.INFO, "nanogrpo.rewards")
    groups = [group(f"return {i}", "return 8", name=f"p{i}") for i in range(5)]
    groups[1] = group("return 1", text, name="bad")
    groups[3] = group(text, "return 3", name="bad too")
    scored, errors = skips.score(groups)
    assert [group.prompt.id for group in scored] == ["p0", "p2", "p4"]
    assert first(scored) == [[0.0, 8.0], [2.0, 8.0], [4.0, 8.0]]
    assert [(e.group.prompt.id, e.index, e.reward) for e in errors] == [("bad", 1, "first"), ("bad too", 0, "first")]
    assert all(error in e.error for e in errors)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all(error in warning and "\n" not in warning for warning in warnings)
    assert sum(repr(text) in record.getMessage() for record in caplog.records) == 2


def test_by_default_only_what_any_completion_can_bring_about_is_left_out(task):
    with Scorer(config(task)) as scorer:
        scored, errors = scorer.score([group("return 1", "hang"), group("return 2")])
        assert first(scored) == [[2.0]]
        assert [error.ran_over for error in errors] == [True]
        with pytest.raises(RunFailure, match=r"KeyError.*task\.on_reward_error=skip"):
            scorer.score([group("raise hope")])


def test_a_failure_is_one_line_with_the_users_file_and_line_and_its_traceback_goes_to_the_log(task, skips, caplog):
    caplog.set_level(logging.INFO, "nanogrpo.rewards")
    _, [error] = skips.score([group("raise \x1b[31mhope")])
    file = task.rpartition(":")[0]
    line = next(i for i, text in enumerate(Path(file).read_text().splitlines(), 1) if "raise KeyError" in text)
    assert str(error).endswith(f"({file}, line {line})")
    assert str(error).isprintable()
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [str(error)]
    whole = "\n".join(r.getMessage() for r in caplog.records)
    assert "Traceback (most recent call last)" in whole
    assert f'File "{file}", line {line}, in do' in whole


def test_every_completion_keeps_its_own_reward_when_the_reward_forks(stops, caplog):
    """The copy comes back from the reward too, by itself or by its exception."""
    caplog.set_level(logging.INFO, "nanogrpo.rewards")
    texts = [f"fork {'x' * n}" for n in range(8)]
    texts += ["fork escape", "fork"]
    for _ in range(3):
        assert first(stops.score([group(*texts)])[0]) == [[float(len(text)) for text in texts]]
    assert any("forked came back" in record.getMessage() for record in caplog.records)


def test_the_limit_is_for_one_completion_and_not_for_the_group(stops):
    started = time.monotonic()
    scored, _ = stops.score([group(*["sleep 0.35"] * 5)])
    assert first(scored) == [[0.5] * 5]
    assert time.monotonic() - started > 1.5 * LIMIT_S


def test_a_worker_that_died_between_two_requests_is_nobodys_fault(stops):
    stops.score([group("die_later")])
    time.sleep(0.6)
    assert first(stops.score([group("return 1")])[0]) == [[1.0]]


def test_what_a_late_reward_started_dies_with_it(stops):
    with pytest.raises(RunFailure, match="ran past"):
        stops.score([group("child 611.5")])
    assert gone("611.5")


def sleeps(word: str) -> bool:
    """Whether ``sleep WORD`` runs: inside its walls a worker does not know the number that its process has here."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if file.read_bytes() == f"sleep\0{word}\0".encode():
                return True
    return False


def gone(word: str, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not sleeps(word):
            return True
        time.sleep(0.05)
    return False


def test_prints_go_to_the_log(task, caplog, capfd):
    caplog.set_level(logging.INFO, "nanogrpo.rewards")
    with Scorer(config(task)) as scorer:
        scored, _ = scorer.score([group("print hello", "return 1")])
    assert first(scored) == [[0.5, 1.0]]
    logged = [record.getMessage() for record in caplog.records]
    assert "a reward printed: hello" in logged
    assert "a reward printed: HELLO" in logged
    out, err = capfd.readouterr()
    assert "hello" not in (out + err).lower()


def test_correct(stops, skips):
    groups = [group("yes", "no", "yes yes"), group(), group("no")]
    for scorer in (stops, skips):
        assert scorer.correct(groups) == [[True, False, True], [], [False]]


@pytest.mark.parametrize(("text", "error"), [("return None", "neither True nor False"), ("hang", "ran past")])
def test_correct_never_makes_an_answer_up(stops, skips, text, error):
    groups = [group("yes", text, name="bad"), group("yes", "no", name="good")]
    with pytest.raises(RunFailure, match=rf"'is_correct' failed on completion 1 of prompt 'bad': .*{error}"):
        stops.correct(groups)
    assert skips.correct(groups) == [[], [True, False]]


def test_no_groups(stops):
    assert stops.score([]) == ([], [])
    assert stops.correct([]) == []


def test_data_that_cannot_travel_is_the_tasks_mistake(stops):
    bad = Group(Prompt("p", (), {"f": lambda: 1}), group("return 1").completions)
    with pytest.raises(UserError, match=r"'p' data .* JSON"):
        stops.score([bad])
    assert first(stops.score([group("return 1")])[0]) == [[1.0]]


def test_sigterm_to_a_whole_job_leaves_the_scores_of_the_step_that_is_finished(stops):
    """What a reward starts still ends by it."""
    assert first(stops.score([group("sigterm")])[0]) == [[-15.0]]


def test_workers_are_other_processes_without_torch(task):
    import torch  # noqa: F401 - here it is, and there it must not be

    with Scorer(config(task, reward_workers=2)) as scorer:
        scored, _ = scorer.score([group("pid", "torch"), group("pid", "torch")])
    for pid, torch_is_there in first(scored):
        assert pid != os.getpid()
        assert not torch_is_there


@pytest.mark.parametrize(
    ("source", "options"),
    [("from common.tasks.warmup import Warmup as Base", {}), ("from common.tasks.gsm8k import Gsm8k as Base", {})],
)
def test_built_in_tasks_do_not_bring_torch_into_a_worker(tmp_path, source, options):
    (tmp_path / "my_watch.py").write_text(
        f"import sys\n{source}\n"
        "class Watch(Base):\n"
        "    def __init__(self, **options):\n"
        "        super().__init__(**options)\n"
        "        self.rewards = {**self.rewards, 'torch': lambda p, c: 'torch' in sys.modules}\n"
        "        self.reward_weights = {**self.reward_weights, 'torch': 0.0}\n"
    )
    answered = Group(Prompt("p", (), {"answer": "7"}), (Completion((), "<answer>7</answer>", (), "stop", 0),))
    with Scorer(config(f"{tmp_path}/my_watch.py:Watch", options=options, reward_timeout_s=20)) as scorer:
        [scored], _ = scorer.score([answered])
    assert scored.completions[0].rewards["correct"] == 1.0
    assert scored.completions[0].rewards["torch"] == 0.0


def test_a_task_is_found_in_a_worker_wherever_it_is_found_here(task, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(task.rpartition(":")[0]).parent))
    with Scorer(config("my_task:Task")) as scorer:
        assert first(scorer.score([group("word")])[0]) == [[42.0]]


def test_overhead(task):
    """128 trivial completions; 10 to 20 ms on an idle 2-core machine."""
    groups = [group(*["return 1"] * 8, name=f"p{i}") for i in range(16)]
    with Scorer(config(task)) as scorer:
        scorer.score(groups)
        took = []
        for _ in range(5):
            started = time.monotonic()
            scorer.score(groups)
            took.append(time.monotonic() - started)
    assert min(took) < 0.5


def test_ctrl_c_is_not_held_up_by_a_reward_that_hangs(task):
    with contextlib.ExitStack() as stack:
        kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        stack.callback(signal.signal, signal.SIGINT, kept)
        scorer = stack.enter_context(Scorer(config(task, reward_timeout_s=60)))
        scorer.score([group("return 1")])
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            scorer.score([group("hang"), group("hang")])
        assert time.monotonic() - started < 10
        assert first(scorer.score([group("return 1")])[0]) == [[1.0]]


def test_closing(task):
    scorer = Scorer(config(task))
    scorer.score([group("leave 612.5")])
    assert sleeps("612.5")
    scorer.close()
    scorer.close()
    assert gone("612.5")


SCRIPT = """
import sys, time
from common.config import TaskConfig
from common.rewards.scorer import Scorer, _weights
from common.types import Completion, Group, Prompt

print("main runs", flush=True)  # no guard: a worker must not run this again
scorer = Scorer(TaskConfig(name=sys.argv[1], reward_timeout_s=0.5))
group = Group(Prompt("p", ()), (Completion((), "leave 613.5", (), "stop", 0),))
print(scorer.score([group])[0][0].completions[0].reward, flush=True)
time.sleep(600)
"""


def test_workers_neither_run_the_main_script_again_nor_outlive_it(task, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), task], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == "main runs\n"
        assert lines.readline() == "0.5\n"
        assert sleeps("613.5")
        process.kill()
        process.wait()
        assert gone("613.5")
        assert lines.read() == ""


# -- groups that come one by one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4)])
def test_in_whatever_order_groups_arrive_the_results_are_those_of_each_scored_alone(skips, order):
    """Those never added are scored at the end; adding one again changes nothing."""
    texts = [("return 1/3", "word"), ("return 2", "raise hope"), ("count",), ("die", "return 1"), ("return 0.1 + 0.2",)]
    groups = [group(*own, name=f"p{index}") for index, own in enumerate(texts)]
    alone = [skips.score([each]) for each in groups]
    scoring = skips.begin()
    for index in (*order, order[0]):
        scoring.add(index, groups[index])
    scored, errors = scoring.result(groups)
    assert scored == [each for groups, _ in alone for each in groups]
    assert [(error.group, error.index, error.error) for error in errors] == [
        (error.group, error.index, error.error) for _, failures in alone for error in failures
    ]
    assert [error.group.prompt.id for error in errors] == ["p1", "p3"]


def test_a_failure_in_the_middle_stops_its_own_request_alone(stops):
    failing, other = stops.begin(), stops.begin()
    failing.add(1, group("hang", name="bad"))
    other.add(0, group("return 1"))
    with pytest.raises(RunFailure, match="completion 0 of prompt 'bad': ran past"):
        failing.result([group("return 2"), group("hang", name="bad"), group("return 3")])
    assert first(other.result([group("return 1")])[0]) == [[1.0]]


def test_only_the_workers_of_the_request_that_is_given_up_are_interrupted(task):
    with Scorer(config(task, reward_workers=2, reward_timeout_s=60)) as scorer:
        scorer.score([group("return 1")] * 4)
        given_up, other = scorer.begin(), scorer.begin()
        given_up.add(0, group("child 615.5"))
        other.add(0, group("sleep 1.5", "return 2"))
        assert not gone_before_it_came("615.5")
        for answer in given_up._stop():
            answer.result(60)
        assert gone("615.5")
        assert first(other.result([group("sleep 1.5", "return 2")])[0]) == [[0.5, 2.0]]


def gone_before_it_came(word: str) -> bool:
    deadline = time.monotonic() + 60
    while not sleeps(word) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not sleeps(word)


def test_closing_with_work_pending_ends_it_and_leaves_no_group_out(task):
    """A worker that ``close`` has ended is no reward's failure: with ``skip`` its group would go missing."""
    scorer = Scorer(config(task, reward_timeout_s=600, on_reward_timeout="skip"))
    scoring, logged = scorer.begin(), []
    groups = [group(f"child 616.{index}", name=f"p{index}") for index in range(4)]
    scoring.add(0, groups[0])

    def wait_for_it():
        with pytest.raises(RunFailure, match="ended before every completion was scored") as caught:
            scoring.result(groups)
        logged.append(caught.value)

    waiting = threading.Thread(target=wait_for_it, daemon=True)
    waiting.start()
    assert not gone_before_it_came("616.0")
    scorer.close()
    waiting.join(60)
    assert logged
    assert gone("616.0")
    scoring.add(9, group("return 1"))  # a back end that is not closed yet may still report
    with pytest.raises(RunFailure, match="ended before"):
        scorer.score(groups)


@pytest.mark.parametrize("added", [(0, "other"), (5, "late")])
def test_a_group_reported_otherwise_than_answered_is_the_samplers_failure(stops, added):
    scoring = stops.begin()
    scoring.add(added[0], group("return 1", name=added[1]))
    with pytest.raises(RunFailure, match="the sampler reported other groups"):
        scoring.result([group("return 1")])
