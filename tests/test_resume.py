"""Going on with a run: what may change and what may not, what is compared with what, and signals that stop one."""

import dataclasses
import hashlib
import json
import logging
import os
import pty
import re
import shutil
import signal

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from common import atomic_files
from common.config import fields, load, may_change, resolved_toml
from common.errors import UserError
from common.prompts import PromptStream
from common.types import Prompt
from deploy import run as runs
from deploy.cli import app
from deploy.resume import anchored, check_task, kept
from deploy.stopping import Stopping, on_stop_signals
from learner.checkpoint import Checkpoints
from tests.test_run import ROOT, final, metrics, rollouts, run, spec, words
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """One uninterrupted run of 4 steps, with checkpoints of 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(spec(tiny, "eval.questions=0"), folder).finished
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """The same as it was after its second step."""
    folder = tmp_path / "stopped"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    shutil.rmtree(folder / "final")
    return folder


class Nothing:
    """A learner without weights, for folders that only need to look like a run's."""

    def save(self, folder):
        pass


def made(folder, config, step=2, prompts=()):
    """What a run has written at its checkpoint, but for weights."""
    atomic_files.write_text(folder / "config.toml", resolved_toml(config))
    stream = PromptStream(list(prompts) or [Prompt("0", ({"role": "user", "content": "a"},))], config.train.seed)
    Checkpoints(folder / "checkpoints", 2, kept(config)).save(step, Nothing(), {"stream": stream.state()})
    return folder


def close(one, other):
    assert one.keys() == other.keys()
    for name in other:
        assert torch.allclose(one[name], other[name], atol=2e-5), name


# -- what may change --


def test_a_run_goes_on_with_less_memory_to_the_same_end(finished, stopped):
    """As our own advice for a run out of memory has it. Only rounding differs."""
    less = [
        "learner.microbatch_tokens=60", "learner.head_tokens=7", "learner.gradient_checkpointing=true",
        "learner.packing=padded", "sampler.options.batch_size=2", "sync.challenge=false", "task.reward_workers=2",
        "task.reward_timeout_s=30", "task.on_reward_error=skip", "sync.tolerance=0.2", "run.keep_last=1",
    ]  # fmt: skip
    assert run(runs.config_of(stopped, less), stopped, resume=True).finished
    close(final(stopped), final(finished))
    written = [[json.loads(line)["token_ids"] for text in rollouts(run) for line in text.splitlines()]
               for run in (stopped, finished)]  # fmt: skip
    assert written[0] == written[1]
    assert load(stopped / "config.toml").learner.microbatch_tokens == 60


def test_every_setting_may_change_as_it_is_marked(tiny, tmp_path):
    config = load(None, words(tiny))
    folder = made(tmp_path / "run", config)
    other = {"task.options": {"n": 1}, "sampler.options": {"n": 1}, "run.trackers": ("n",), "train.steps": 5}
    for key, _ in fields():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: other.get(key, "another")})
        changed = config.model_copy(update={section: changed})
        if may_change(key) or key == "train.steps":
            assert runs.same_run(folder, changed) == changed, key
        else:
            with pytest.raises(UserError, match=rf"^{re.escape(key)}=.* cannot change from .*same run"):
                runs.same_run(folder, changed)
    free = {key for key, _ in fields() if may_change(key)}
    assert free >= {"learner.compile", "optimizer.offload", "sync.proof", "memory.plan", "task.reward_timeout_s"}
    assert not free & {"optimizer.lr", "learner.loss", "train.seed", "train.group_size", "sampler.top_p", "task.name",
                       "model.lora_rank", "learner.drop_zero_variance", "task.reward_weights"}  # fmt: skip


def test_the_back_end_says_which_of_its_options_are_free(tiny, tmp_path):
    folder = made(tmp_path / "run", spec(tiny, "sampler.options.batch_size=8"))
    assert runs.config_of(folder, ["sampler.options.batch_size=2"]).sampler.options == {"batch_size": 2}
    with pytest.raises(UserError, match=r"sampler\.options=\{'odd': 1\} cannot change from \{\}"):
        runs.config_of(folder, ["sampler.options.odd=1"])


@pytest.mark.vllm
def test_vllms_free_options_are_arguments_of_its_engine():
    from sampler.engine.arguments import environment
    from sampler.engine.vllm import VllmSampler

    environment()
    from vllm.engine.arg_utils import EngineArgs

    assert VllmSampler.free_options <= {field.name for field in dataclasses.fields(EngineArgs)}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_more_steps_would_change_is_refused(tiny, tmp_path, schedule):
    folder = made(tmp_path / "run", spec(tiny, f"optimizer.schedule={schedule}"))
    for steps in (3, 6):
        with pytest.raises(UserError, match=rf"train\.steps={steps} cannot change from 4 .*'{schedule}'.*whose rates"):
            runs.config_of(folder, [f"train.steps={steps}"])
    assert runs.config_of(folder, ["train.steps=4"]).train.steps == 4
    constant = made(tmp_path / "other", spec(tiny, "optimizer.warmup_steps=3"))
    assert runs.config_of(constant, ["train.steps=6"]).train.steps == 6


# -- compared with what --


def test_the_folders_own_file_can_be_edited_only_where_a_word_could(tiny, tmp_path):
    folder = made(tmp_path / "run", spec(tiny))
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("lr = 0.001", "lr = 0.002"))
    with pytest.raises(UserError, match=r"optimizer\.lr=0\.002 cannot change from 0\.001"):
        runs.config_of(folder, [])
    (folder / "config.toml").write_text(text.replace("head_tokens = 512", "head_tokens = 64"))
    assert runs.config_of(folder, []).learner.head_tokens == 64
    (folder / "config.toml").write_text("[train")
    with pytest.raises(UserError, match="not valid TOML"):
        runs.config_of(folder, [])


def test_auto_resume_compares_the_run_file_it_was_given(tiny, tmp_path):
    folder = made(tmp_path / "run", spec(tiny))
    run_file = tmp_path / "run.toml"
    run_file.write_text("")
    given = [str(run_file), "--auto-resume", *words(tiny, f"run.folder={folder}")]
    result = CliRunner().invoke(app, ["train", *given, "optimizer.lr=0.5"])
    assert result.exit_code == 2, result.output
    assert "optimizer.lr=0.5 cannot change from 0.001" in " ".join(result.output.split())
    other = load(run_file, words(tiny, "eval.questions=0", "model.dtype=auto"))
    assert runs.same_run(folder, other).eval.questions == 0
    assert runs.same_run(folder, other).model.dtype == "float32"  # it keeps what it began with


def test_a_damaged_copy_gives_way_to_the_one_before(tiny, tmp_path):
    folder = made(made(tmp_path / "run", spec(tiny), 2), spec(tiny), 4)
    (folder / "checkpoints" / "step-000004" / "config.toml").write_text("torn")
    with pytest.raises(UserError, match=r"train\.seed=7 cannot change from 0"):
        runs.config_of(folder, ["train.seed=7"])


def test_a_setting_that_is_no_more_does_not_stop_a_resume(tiny, tmp_path):
    config = spec(tiny)
    folder = made(tmp_path / "run", config)
    place = folder / "checkpoints" / "step-000002"
    (place / "config.toml").write_text(resolved_toml(config) + "\n[gone]\nx = 1\n")
    rewrite_manifest(place)
    assert runs.config_of(folder, []) == config


def rewrite_manifest(place):
    names = [path for path in place.iterdir() if path.name != "manifest.json"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
    (place / "manifest.json").write_text(json.dumps(sums))


def test_a_checkpoint_of_before_goes_on_to_the_same_end(finished, stopped):
    """As they were written before configuration, code and prompts were kept in them."""
    place = stopped / "checkpoints" / "step-000002"
    for name in ("config.toml", "contents.json"):
        (place / name).unlink()
    state = json.loads((place / "state.json").read_text())
    del state["stream"]["sha256"]
    (place / "state.json").write_text(json.dumps(state))
    rewrite_manifest(place)
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        runs.config_of(stopped, ["optimizer.lr=1"])
    assert run(runs.config_of(stopped, []), stopped, resume=True).finished
    assert metrics(stopped) == metrics(finished)
    assert all(torch.equal(value, final(finished)[name]) for name, value in final(stopped).items())


# -- data and code --


def prompts(answer="1", text="a", count=3):
    return [Prompt(str(n), ({"role": "user", "content": text},), {"answer": answer}) for n in range(count)]


@pytest.mark.parametrize("other", [prompts("2"), prompts(text="b"), prompts(count=4), prompts()[::-1]])
def test_other_training_data_are_refused(tiny, tmp_path, other):
    config = spec(tiny)
    folder = made(tmp_path / "run", config, prompts=prompts())
    check_task(folder, config, PromptStream(prompts(), 0))
    with pytest.raises(UserError, match="prompts"):
        check_task(folder, config, PromptStream(other, 0))


def test_odd_data_have_a_hash_of_their_own_that_is_the_same_in_every_process():
    odd = [Prompt("0", ({"role": "user", "content": "\ud800"},), {"set": {1}, ("a", 1): 2, "number": float("nan")})]
    assert PromptStream(odd, 0).state()["sha256"] == PromptStream(odd, 0).state()["sha256"]


def test_a_run_is_resumed_from_any_folder_with_its_own_files(tiny, tmp_path, monkeypatch, caplog):
    """Begun where its task is named by a relative path. The file may move, and it may change, which is said."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    shutil.copy(ROOT / "tests" / "toy.py", home / "mine.py")
    (home / "data").mkdir()
    monkeypatch.chdir(home)
    begun = anchored(load(None, words(tiny, "task.name=mine.py:Toy", "task.options.questions=5",
                                      "task.options.broken=./data", "run.trackers=['t.py:T']")))  # fmt: skip
    assert begun.task.name == f"{home / 'mine.py'}:Toy"
    assert begun.task.options == {"questions": 5, "broken": str(home / "data")}
    assert begun.run.trackers == (f"{home / 't.py'}:T",)
    folder = made(tmp_path / "run", begun, prompts=prompts())
    monkeypatch.chdir(elsewhere)
    assert runs.config_of(folder, []) == begun
    assert "changed" not in caplog.text

    (home / "mine.py").rename(elsewhere / "moved.py")
    moved = runs.config_of(folder, ["task.name=moved.py:Toy"])
    assert moved.task.name == f"{elsewhere / 'moved.py'}:Toy"
    (elsewhere / "moved.py").write_text("# another\n" + (elsewhere / "moved.py").read_text())
    with pytest.raises(UserError, match=r"task\.name=.*moved.*cannot change"):
        runs.config_of(folder, ["task.name=moved.py:Toy"])

    (elsewhere / "moved.py").rename(home / "mine.py")
    with caplog.at_level(logging.WARNING, "nanogrpo"):
        check_task(folder, runs.config_of(folder, []), PromptStream(prompts(), 0))
    assert re.search(r"task\.name=.*mine.py:Toy' has changed since the last checkpoint", caplog.text)
    assert "model.name" not in caplog.text


def test_a_model_may_move_and_another_is_refused(tiny, tmp_path, caplog):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    folder = made(tmp_path / "run", spec(model), prompts=prompts())
    model.rename(tmp_path / "moved")
    config = runs.config_of(folder, [f"model.name={tmp_path / 'moved'}"])
    check_task(folder, config, PromptStream(prompts(), 0))
    assert "changed" not in caplog.text
    other = make_tiny(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"model\.name=.*other' cannot change"):
        runs.config_of(folder, [f"model.name={other}"])
    other.rename(model)  # in the place where the run's own was
    with caplog.at_level(logging.WARNING, "nanogrpo"):
        check_task(folder, runs.config_of(folder, []), PromptStream(prompts(), 0))
    assert re.search(r"model\.name=.* has changed since the last checkpoint", caplog.text)


def test_a_submitted_jobs_names_stay_relative(tiny, tmp_path, monkeypatch):
    copy = tmp_path / "_ray_pkg_0"
    copy.mkdir()
    monkeypatch.chdir(copy)
    config = load(None, words(tiny, "task.name=mine.py:Toy"))
    assert anchored(config) == config


# -- checkpoints that are gone --


def test_a_run_whose_checkpoints_are_gone_says_so(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match=r"has done 4 steps, but none of its checkpoints is left .*its model is in"):
        runs.config_of(folder, [])
    shutil.rmtree(folder / "final")
    with pytest.raises(UserError, match=r"none of its checkpoints is left .*put them back"):
        runs.config_of(folder, [])
    atomic_files.truncate_after(folder / "metrics.jsonl", "step", 2)  # killed while it wrote the first
    assert runs.config_of(folder, []).train.steps == 4


# -- signals --


class Presses(Console):
    """Sends this process a signal when a line that matches is printed."""

    def __init__(self, number, at):
        super().__init__(file=open(os.devnull, "w"))  # noqa: SIM115
        self.number, self.at, self.lines = number, at, []

    def print(self, *args, **kwargs):
        self.lines.append(str(args[0]) if args else "")
        if re.match(self.at, self.lines[-1]):
            os.kill(os.getpid(), self.number)


@pytest.fixture
def hangup():
    """As from a terminal, though the tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_before_the_first_step_it_ends_at_once(tiny, tmp_path, number):
    """Here once sampler and learner are loaded, and long before the challenge, the rehearsal and an evaluation."""
    console = Presses(number, "sampler hf")
    with pytest.raises(KeyboardInterrupt, match="before its first step"):
        runs.run(spec(tiny, "memory.rehearsal=true"), tmp_path / "run", console)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not any("rehearsed" in line for line in console.lines)


@pytest.mark.usefixtures("hangup")
def test_a_hangup_saves_and_stops(tiny, tmp_path):
    console = Presses(signal.SIGHUP, "step 1/")
    outcome = runs.run(spec(tiny, "eval.questions=0", "run.save_every=0"), tmp_path / "run", console)
    assert not outcome.finished
    assert Checkpoints(tmp_path / "run" / "checkpoints", 1).steps() == [outcome.step]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


@pytest.mark.usefixtures("hangup")
def test_under_nohup_a_hangup_is_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked: list[int] = []
    with on_stop_signals(lambda number, frame: asked.append(number)):
        os.kill(os.getpid(), signal.SIGHUP)
    assert not asked


def test_after_a_hangup_the_terminal_can_be_written_to():
    """It is gone: every write would fail, the display's as well."""
    master, terminal = pty.openpty()
    stopping = Stopping(Console(quiet=True))
    stopping._terminals = [terminal]
    assert not stopping()
    os.close(master)
    with pytest.raises(OSError, match=r"\[Errno 5\]"):
        os.write(terminal, b"x")
    stopping.ask(signal.SIGHUP, None)
    assert os.write(terminal, b"x") == 1
    assert stopping()
    os.close(terminal)


def test_what_chooses_prompts_may_change_until_it_has_chosen(tiny, tmp_path):
    """A run that a long prompt has ended may go on without such; one that has left some out keeps their length."""
    folder = made(tmp_path / "refused", spec(tiny))
    assert runs.config_of(folder, ["sampler.max_prompt_tokens=90"]).sampler.max_prompt_tokens == 90
    going_on = runs.config_of(folder, ["task.long_prompts=drop", "sampler.max_prompt_tokens=90"])
    assert (going_on.task.long_prompts, going_on.sampler.max_prompt_tokens) == ("drop", 90)
    folder = made(tmp_path / "dropped", spec(tiny, "task.long_prompts=drop", "sampler.max_prompt_tokens=90"))
    for word in ("task.long_prompts=refuse", "sampler.max_prompt_tokens=91"):
        with pytest.raises(UserError, match=rf"{re.escape(word.split('=')[0])}=.* cannot change"):
            runs.config_of(folder, [word])


@pytest.mark.slow
def test_a_start_that_was_refused_leaves_its_folder_to_the_settings_it_was_advised(tiny, tmp_path):
    """Also one that was ended after its first evaluation, whose numbers are the other settings'."""
    folder = tmp_path / "run"
    begun = spec(tiny, "train.steps=1", "memory.plan=refuse", "memory.device_gib=0.001")
    with pytest.raises(UserError, match="does not fit"):
        run(begun, folder)
    assert (folder / "config.toml").exists()
    atomic_files.append_line(folder / "eval.jsonl", '{"step": 0, "accuracy": 2.0}')
    with pytest.raises(UserError, match=r"train\.group_size=2 cannot change"):
        runs.config_of(folder, ["train.group_size=2"])
    runs.check_folder(folder, resume=False)
    assert run(spec(tiny, "train.steps=1", "train.group_size=2"), folder).finished
    assert load(folder / "config.toml").train.group_size == 2
    assert [row["accuracy"] <= 1 for row in atomic_files.read_json_lines(folder / "eval.jsonl")] == [True, True]
    with pytest.raises(UserError, match="in use by an earlier run"):
        run(begun, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").write_text("")
    with pytest.raises(UserError, match="in use by an earlier run"):
        runs.check_folder(tmp_path / "mine", resume=False)
