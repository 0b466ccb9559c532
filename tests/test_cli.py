"""The command as a new user meets it: what it prints, and every mistake in one sentence with the right exit code."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common import atomic_files
from common.config import load
from common.errors import RunFailure, UserError
from common.plugins import version
from common.types import SamplerSetup, SamplingParams
from deploy.cli import app
from deploy.components import load_sampler
from deploy.export import open_model
from sampler.engine.vllm import VllmSampler
from sampler.hf import HfSampler
from tests.making import EVERYTHING
from tests.test_run import TOY, words
from tests.tiny import make_tiny

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "deploy.cli", "train"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("")
    return path


def call(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=True)
    output = result.output  # both streams as a terminal shows them
    assert "Traceback" not in output, output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, output


def asked(*args):
    """The object that ``--json`` prints: alone on standard output, whatever the libraries say on the other."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(code, said, *args):
    got, output = call(*args)
    assert got == code, output
    errors = [line for line in output.splitlines() if line.startswith(("error:", "failed:"))]
    assert len(errors) == 1, output
    assert re.search(said, errors[0]), errors[0]
    return errors[0]


# -- it works --


@pytest.mark.slow
def test_train_then_eval_then_sample(tiny, run_file, tmp_path):
    folder = tmp_path / "run"
    code, output = call("train", run_file, *words(tiny, f"run.folder={folder}", "train.steps=2", *EVERYTHING))
    assert code == 0, output
    assert "before" in output
    assert f"report in {folder / 'report.html'}" in " ".join(output.split())
    assert "step 2/2" in output
    result = asked("eval", folder, "--json", "eval.samples=4", "eval.k=[1, 4]")
    assert result["questions"] == 4
    assert set(result["pass_at_k"]) == {"1", "4"}
    recorded = atomic_files.read_json_lines(folder / "eval.jsonl")[-1]
    assert result["accuracy"] == recorded["accuracy"]  # the exported model answers as the learner's did
    assert result["transcripts"] == recorded["transcripts"]
    code, output = call("sample", folder, "hello there", "-n", "2")
    assert code == 0, output
    assert "hello there" in output
    code, output = call("sample", folder, "--questions", "2")
    assert code == 0, output
    assert output.count("reward") >= 2


def test_a_run_can_be_asked_in_another_number_format(tiny, run_file, tmp_path):
    """Its file holds settings of the learner that have no effect in that format."""
    folder = tmp_path / "run"
    more = (f"run.folder={folder}", "train.steps=1", "model.dtype=bfloat16")
    code, output = call("train", run_file, *words(tiny, *more))
    assert code == 0, output
    assert "master" in tomllib.loads((folder / "config.toml").read_text())["optimizer"]
    result = asked("eval", folder, "--json", "model.dtype=float32")
    assert result["questions"] == 4


@pytest.mark.parametrize("sampler", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_lora_run_is_served_with_its_adapter(tiny, run_file, tmp_path, sampler):
    folder = tmp_path / "run"
    chosen = f"sampler.name={sampler}"
    code, output = call(
        "train",
        run_file,
        *words(tiny, f"run.folder={folder}", "train.steps=2", "model.lora_rank=4", "optimizer.lr=0.05", chosen),
    )
    assert code == 0, output
    result = asked("eval", folder, "--json")
    assert result["transcripts"] == atomic_files.read_json_lines(folder / "eval.jsonl")[-1]["transcripts"]
    base = asked("eval", tiny, "--json", *settings_of_asking(tiny), chosen)
    assert base["transcripts"] != result["transcripts"]


def settings_of_asking(tiny):
    return [word for word in words(tiny) if word.split(".")[0] not in ("optimizer", "run") and "model.name" not in word]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tiny, run_file, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*TRAIN, str(run_file), *words(tiny, f"run.folder={folder}", "train.steps=500")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step") and len(lines) < 1000:
            process.send_signal(signal.SIGINT)
            break
    lines.append(process.communicate(timeout=120)[0])
    output = "".join(lines)
    assert process.returncode == 130, output
    assert f"go on with: nanogrpo train --resume {folder}" in output
    assert list((folder / "checkpoints").glob("step-*/manifest.json"))


def test_dry_run_writes_nothing(tiny, run_file, tmp_path):
    code, output = call("train", run_file, "--dry-run", *words(tiny, f"run.folder={tmp_path / 'run'}"))
    assert code == 0, output
    assert "12 training and 4 test questions" in output
    assert not (tmp_path / "run").exists()


def test_lists():
    for command, names in (("tasks", ("warmup", "gsm8k", "reasoning_gym")), ("samplers", ("vllm", "hf", "scripted"))):
        code, output = call(command)
        assert code == 0
        assert all(re.search(rf"^{name}\s+\S", output, re.M) for name in names), output
        assert "cannot be used" not in output


def test_config_prints_every_key_and_writes_a_file_that_loads(tmp_path):
    code, output = call("config")
    assert code == 0
    assert "learner.clip_high" in output
    code, output = call("config", "--toml", tmp_path / "all.toml")
    assert code == 0
    assert load(tmp_path / "all.toml") == load(None)
    refused(2, "exists already", "config", "--toml", tmp_path / "all.toml")


# -- the user's mistakes: exit code 2 --


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.name=/no/such/folder"], r"model.name='/no/such/folder': there is no such folder.*hub id"),
        (["model.name=nosuchowner/nosuchmodel"], r"nosuchowner/nosuchmodel.*(cannot be reached|neither)"),
        (["model.name=package:nothing_there/x.gguf"], "is not installed"),
        (["model.name=/no/such.gguf"], "no such file"),
        (["train.stepz=3"], "did you mean 'train.steps'"),
        (["train.group_size=1"], "no spread"),
        (["task.name=nothing"], "task.name='nothing'"),
        (["task.name=/no/such/file.py:Task"], "file.py"),
        (["task.options.colour=red"], "task.options.colour"),
        (["sampler.name=vlm"], "vllm"),
        (["sampler.options.gpu_memory_utilization=0.5"], "is not an option of sampler 'hf'"),
        (["sampler.max_tokens=600"], "max_tokens=600 is more than the model's context of 512"),
        (["sampler.max_prompt_tokens=5"], "max_prompt_tokens=5"),
        (["train.device=gpu"], "no GPU"),
        (["train.max_staleness=1"], "max_staleness=1"),
        (["optimizer.offload=true"], "offload=true has no effect"),
        (["task.reward_weights={rght=1.0}"], "rght"),
        (["run.folder='runs/{day}'"], "knows {task}, {model} and {date}"),
        (["run.folder=/proc/nothing/here"], "/proc/nothing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_before_anything_expensive(tiny, run_file, tmp_path, more, said):
    refused(2, said, "train", run_file, *words(tiny, f"run.folder={tmp_path / 'run'}", *more))


def test_task_file_that_does_not_import(tiny, run_file, tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_module_here\n")
    error = refused(
        2, "no_such_module_here", "train", run_file,
        *words(tiny, f"run.folder={tmp_path / 'run'}", f"task.name={tmp_path / 'mine.py'}:Task"),
    )  # fmt: skip
    assert "mine.py" in error


def test_model_without_chat_template(tiny, run_file, tmp_path):
    plain = make_tiny(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    args = ["train", run_file, "--dry-run", *words(plain, f"run.folder={tmp_path / 'run'}")]
    refused(2, "no chat template.*plain", *args)
    code, output = call(*args, "task.prompt_format=plain")
    assert code == 0, output


def test_model_with_code_of_its_own(tiny, run_file, tmp_path):
    own = make_tiny(tmp_path / "own")
    values = json.loads((own / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "x.Y"}}
    (own / "config.json").write_text(json.dumps(values))
    refused(2, "trust_remote_code", "train", run_file, *words(own, f"run.folder={tmp_path / 'run'}"))


def test_run_file_missing_or_broken(tmp_path):
    refused(2, "does not exist", "train", tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[train")
    refused(2, "not valid TOML", "train", tmp_path / "bad.toml")
    refused(2, "which run", "train")


def test_folder_in_use(tiny, run_file, tmp_path):
    folder = tmp_path / "run"
    with atomic_files.lock_folder(folder):
        (folder / "config.toml").write_text("")
        refused(2, f"in use by the running process {os.getpid()}", "train", "--resume", folder)
    refused(2, "earlier run.*--resume", "train", run_file, *words(tiny, f"run.folder={folder}"))


def test_resume_of_nothing_or_with_another_algorithm(tiny, run_file, tmp_path):
    refused(2, "no run", "train", "--resume", tmp_path / "nothing")
    folder = tmp_path / "run"
    assert call("train", run_file, *words(tiny, f"run.folder={folder}", "train.steps=1", "eval.questions=0"))[0] == 0
    refused(2, "optimizer", "train", "--resume", folder, "optimizer.lr=1")
    code, output = call("train", "--resume", folder, "train.steps=2")
    assert code == 0, output
    assert "step 2/2" in output


def test_resume_after_every_checkpoint_was_damaged(tiny, run_file, tmp_path):
    folder = tmp_path / "run"
    assert call("train", run_file, *words(tiny, f"run.folder={folder}", "train.steps=1", "eval.questions=0"))[0] == 0
    (folder / "checkpoints" / "step-000001" / "state.safetensors").write_bytes(b"torn")
    refused(2, "damaged", "train", "--resume", folder)


def test_fewer_steps_than_done_and_a_folder_of_somebody_elses(tiny, run_file, tmp_path):
    folder = tmp_path / "run"
    assert call("train", run_file, *words(tiny, f"run.folder={folder}", "train.steps=3", "eval.questions=0"))[0] == 0
    refused(2, "train.steps=2 is less than the 3", "train", "--resume", folder, "train.steps=2")
    assert load(folder / "config.toml").train.steps == 3
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("precious")
    refused(2, "holds no run", "train", run_file, *words(tiny, f"run.folder={tmp_path / 'data'}"))


def test_a_tracker_that_is_none(tiny, run_file, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, folder): pass\n    def log(self): pass\n")
    more = [f"run.trackers=['{tmp_path / 'mine.py'}:Mine']", f"run.folder={tmp_path / 'run'}"]
    refused(2, "has no rollouts, evaluation, close", "train", run_file, *words(tiny, *more))


def test_a_failed_start_leaves_the_folder_free(tiny, run_file, tmp_path):
    folder = tmp_path / "run"
    refused(2, "no such folder", "train", run_file, *words(tiny, f"run.folder={folder}", "model.name=/nothing"))
    code, output = call("train", run_file, *words(tiny, f"run.folder={folder}", "train.steps=1", "eval.questions=0"))
    assert code == 0, output


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("return [{'role': 'user'}]", "common.types.Prompt"),
        ("return [Prompt('same', ({'role': 'user', 'content': 'same'},))]", "same question"),
    ],
)
def test_a_task_that_gives_wrong_prompts(tiny, run_file, tmp_path, body, said):
    (tmp_path / "mine.py").write_text(
        "from common.types import Prompt\n"
        "class Mine:\n"
        "    reward_weights = {'one': 1.0}\n"
        "    rewards = {'one': lambda prompt, completion: 1.0}\n"
        f"    def prompts(self, split):\n        {body}\n"
        "    def is_correct(self, prompt, completion): return True\n"
    )
    more = [f"task.name={tmp_path / 'mine.py'}:Mine", f"run.folder={tmp_path / 'run'}"]
    refused(2, said, "train", run_file, *words(tiny, *more))


def test_eval_of_nothing(tmp_path):
    refused(2, "there is no such folder", "eval", tmp_path / "nothing")
    refused(2, "give a prompt", "sample", tmp_path)


# -- failures: exit code 1 --


@pytest.mark.parametrize(
    ("broken", "said"),
    [("raise", "no such thing"), ("hang", "1 s|time"), ("notfinite", "nan"), ("exit", "died|exit")],
)
def test_bad_reward_stops_with_a_sentence_and_its_completion_in_the_log(tiny, run_file, tmp_path, broken, said):
    folder = tmp_path / "run"
    refused(
        1, said, "train", run_file,
        *words(tiny, f"run.folder={folder}", f"task.options.broken={broken}", "task.reward_timeout_s=1",
               "task.on_reward_timeout=stop", "eval.questions=0"),
    )  # fmt: skip
    assert re.search(said, (folder / "run.log").read_text())


@pytest.mark.slow
def test_disk_full(tiny, run_file, tmp_path):
    """A real limit on file size stands in for the full disk: the checkpoint is the first file above it."""
    path = tmp_path / "run.toml"
    values = words(tiny, f"run.folder={tmp_path / 'run'}", "eval.questions=0", "run.save_every=1")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = subprocess.run(
        [*TRAIN, str(path), *values],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^failed: the checkpoint of step 1 cannot be written", done.stderr, re.M), done.stderr
    assert "Traceback" not in done.stderr
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert [row["step"] for row in atomic_files.read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_task_that_only_a_user_has(tiny, run_file, tmp_path):
    (tmp_path / "mine.py").write_text(Path(TOY.split(":")[0]).read_text().replace("class Toy", "class Mine"))
    folder = tmp_path / "run"
    code, output = call(
        "train", run_file,
        *words(tiny, f"run.folder={folder}", f"task.name={tmp_path / 'mine.py'}:Mine", "train.steps=1",
               "eval.questions=0"),
    )  # fmt: skip
    assert code == 0, output


def test_the_readmes_own_task_works(tiny, run_file, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "my_task.py").write_text(code)
    more = [f"task.name={tmp_path / 'my_task.py'}:MyTask", f"run.folder={tmp_path / 'run'}", "train.steps=1"]
    status, output = call("train", run_file, *words(tiny, *more))
    assert status == 0, output


# -- text is shown as it is, and no finished run is lost --

CONSTANT = """
from common.types import Prompt

class Constant:
    reward_weights = {"[b]one": 1.0}

    def __init__(self):
        self.rewards = {"[b]one": lambda prompt, completion: 1.0}

    def prompts(self, split):
        texts = [f"{split} {number}" for number in range(4)]
        return [Prompt(text, ({"role": "user", "content": text},), {"kind": "[/x] :bug: \u2192"}) for text in texts]

    def is_correct(self, prompt, completion):
        return True

class Failing:
    def __init__(self, folder): pass
    def log(self, step, metrics): raise ValueError("[/x] no room")
    def rollouts(self, step, groups): assert step == 1, "was to be left out"
    def evaluation(self, step, result): pass
    def close(self): raise OSError("gone")
"""


@pytest.fixture(scope="module")
def constant(tiny, tmp_path_factory):
    """A run whose rewards teach nothing and whose tracker fails, in a folder with markup in its name, and its words."""
    place = tmp_path_factory.mktemp("constant")
    (place / "mine.py").write_text(CONSTANT)
    (place / "run.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 2\n")
    more = [f"run.folder={place}/a[lora] :bug: [/x]", f"task.name={place}/mine.py:Constant",
            f"run.trackers=['{place}/mine.py:Failing']", "run.report=true"]  # fmt: skip
    values = [word for word in words(tiny, *more) if not word.startswith("train.steps")]
    code, output = call("train", place / "run.toml", *values)
    assert code == 0, output
    return place / "a[lora] :bug: [/x]", output


def test_a_run_that_taught_nothing_says_so(constant):
    folder, output = constant
    assert "step 2: the completions of each prompt all earned the same (mean reward 1)" in output
    said = "done, but nothing was learned, because no group of its 2 steps carried a gradient: model in"
    assert f"{said} {folder / 'final'}, report in {folder / 'report.html'}" in output
    assert "all earned the same" in (folder / "run.log").read_text()
    assert "What to look at" in (folder / "report.html").read_text()
    assert (folder / "final" / "model.safetensors").is_file()


def test_paths_and_names_are_shown_as_they_are(constant, run_file):
    folder, output = constant
    assert f"run     {folder}\n" in output
    assert "[b]one 1" in output  # the reward's name in a step's line
    code, output = call("eval", folder)
    assert code == 0, output
    assert "  [/x] :bug: \u2192: 100.0% of 4" in output
    in_use = re.escape(f"{str(folder)!r} is in use by an earlier run")
    refused(2, in_use, "train", run_file, f"run.folder={folder}")
    refused(2, re.escape("'/no/[/x] :bug:' does not exist"), "train", "/no/[/x] :bug:")


def test_a_tracker_that_fails_is_left_out(constant):
    folder, output = constant
    assert "left out from here on, because its log raised ValueError: [/x] no room" in " ".join(output.split())
    log = (folder / "run.log").read_text()
    assert re.search(r'File ".*mine.py", line \d+, in log', log)  # where, for the log alone
    assert "its close raised OSError" in log
    assert "was to be left out" not in log


def test_a_terminal_that_is_not_utf_8(constant):
    folder, _ = constant
    for charset in ("ascii", "latin-1"):
        result = CliRunner(charset=charset).invoke(app, ["eval", str(folder)])
        assert result.exit_code == 0, result.output
        assert "[/x] :bug: \\u2192: 100.0% of 4" in result.output
        result = CliRunner(charset=charset).invoke(app, ["eval", str(folder), "--json"])
        assert list(json.loads(result.stdout)["by_kind"]) == ["[/x] :bug: \u2192"]


def test_a_damaged_configuration_is_one_sentence(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[train\n")
    for command in (["train", "--resume"], ["eval"], ["sample", "--questions", "1"]):
        refused(2, "config.toml' is not valid TOML", *command, tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["sampler.name=os:getcwd"], "sampler.name='os:getcwd' is called with a common.types.SamplerSetup"),
        (["sampler.name=collections:OrderedDict"], "is a class that is no sampler"),
        (["sampler.name=remote", "sampler.options.url='http://127.0.0.1:1'", "sampler.temperature=5"],
         "sampler.temperature=5 is none that vLLM draws by; use 0.01 to 2"),
        (["run.trackers=['common.rewards.scorer:Scorer']"], "is a class that is no tracker"),
        (["run.trackers=['wandbb']"], "^error: run.trackers='wandbb'"),
        (["optimizer.learning_rate=1"], "did you mean 'optimizer.lr'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_more_mistakes_before_anything_expensive(tiny, run_file, tmp_path, more, said):
    refused(2, said, "train", run_file, "--dry-run", *words(tiny, f"run.folder={tmp_path / 'run'}", *more))


@pytest.mark.parametrize("temperature", [0.001, 2.5, 1e-9])
def test_temperatures_that_vllm_would_not_draw_by(temperature):
    with pytest.raises(UserError, match="is none that vLLM draws by"):
        VllmSampler.check_sampling(SamplingParams(temperature=temperature))
    for fine in (0.0, 0.01, 1.0, 2.0):
        VllmSampler.check_sampling(SamplingParams(temperature=fine))


class Broken(HfSampler):
    check_options = staticmethod(lambda options: None)

    def __init__(self, setup, error="RuntimeError"):
        raise {"RuntimeError": RuntimeError("no\nluck"), "memory": RuntimeError("CUDA out of memory"),
               "user": UserError("yours")}[error]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        ("RuntimeError", RunFailure, "sampler.name='.*:Broken' could not start: RuntimeError: no luck"),
        ("memory", RuntimeError, "CUDA out of memory"),
        ("user", UserError, "yours"),
    ],
)
def test_a_sampler_that_breaks_at_its_start_is_no_mistake_of_the_users(tiny, error, kind, said):
    more = [f"sampler.name={Path(__file__)}:Broken", f"sampler.options.error={error}"]
    config = load(None, words(tiny, *more))
    with pytest.raises(kind, match=said) as caught:
        load_sampler(config, SamplerSetup(str(tiny), "float32", 64, 16, threads=1))
    assert isinstance(caught.value, RunFailure | UserError) == (kind is not RuntimeError)


def test_version_and_a_section_of_the_settings():
    assert call("--version") == (0, f"nanogrpo {version()}\n")
    code, output = call("config", "eval")
    assert code == 0
    keys = re.findall(r"\b(\w+\.\w+)\b +\S", output)
    assert "eval.questions" in keys and not any(key.startswith(("model.", "train.")) for key in keys)
    code, output = call("config", "optimizer.lr")
    assert "optimizer.lr" in output and "optimizer.eps" not in output
    refused(2, "config 'learning_rate': no such section or key; did you mean 'optimizer.lr'", "config", "learning_rate")
    refused(2, "has no effect with --toml", "config", "eval", "--toml", "x.toml")


def test_a_model_that_is_only_asked_may_have_any_path(tmp_path):
    """And what is wrong with it is one sentence."""
    for name in ('a"b', "a\\b", "[x] :bug:", "日本"):
        with open_model(str(tmp_path / name), []) as (config, adapter, _):
            assert (config.model.name, adapter) == (str(tmp_path / name), None)
    for text, said in (("{", "cannot be read"), ("[]", "names no base model"), ('{"r": 4}', "names no base model")):
        (tmp_path / "adapter_config.json").write_text(text)
        refused(2, said, "sample", tmp_path, "hello")
