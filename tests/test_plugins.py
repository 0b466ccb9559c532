"""Finding tasks, samplers and trackers; every way it goes wrong is one clear sentence."""

import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
from pathlib import Path

import pytest

from common.config import TaskConfig
from common.errors import UserError
from common.plugins import check, find, find_task, installed, make, make_task, version

KEYS = {"task": "task.name", "sampler": "sampler.name", "tracker": "run.trackers"}


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch):
    """What a test puts on the path and imports is gone after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("nanogrpo_file_", "my_", "offered")):
            del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text).lstrip())
    return path


GOOD = """
    '''My module.'''
    from dataclasses import dataclass

    @dataclass
    class Note:
        text: str

    class Right:
        '''Says yes.

        To everything.
        '''
        def __init__(self, times=1, *, words="a"):
            self.times = times
            self.rewards = {"yes": lambda prompt, completion: 1.0}
            self.reward_weights = {"yes": 1.0}
        def prompts(self, split):
            return []
        def is_correct(self, prompt, completion):
            return True

    class Picky(Right):
        def __init__(self, needed, **anything):
            super().__init__()
            self.got = (needed, anything)

    class Broken(Right):
        def __init__(self):
            raise ValueError("the\\nmoon is full")

    class Quits(Right):
        def __init__(self):
            raise SystemExit(3)

    number = 3
"""


@pytest.fixture
def good(tmp_path) -> str:
    return str(write(tmp_path / "my_file.py", GOOD))


def message(kind: str, name: str) -> str:
    with pytest.raises(UserError) as caught:
        find(kind, name)
    text = str(caught.value)
    assert text.startswith(f"{KEYS[kind]}={name!r}"), text
    assert "\n" not in text
    return text


def test_a_file(good):
    right = find("task", f"{good}:Right")
    assert right.__name__ == "Right"
    assert find("task", f"{good}:Right") is right
    note = find("task", f"{good}:Note")("hello")
    assert pickle.loads(pickle.dumps(note)) == note


def test_a_file_named_from_the_current_folder(good, monkeypatch):
    monkeypatch.chdir(Path(good).parent)
    assert find("sampler", "my_file.py:Right") is find("sampler", f"{good}:Right")


def test_a_file_imports_its_neighbours_but_shadows_nothing(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    write(tmp_path / "my_neighbour.py", "value = 5")
    write(tmp_path / "colorsys.py", "raise RuntimeError('not this one')")
    write(tmp_path / "my_user.py", "import colorsys, my_neighbour\nclass Task:\n    value = my_neighbour.value")
    assert find("task", f"{tmp_path}/my_user.py:Task").value == 5


def test_a_module_in_the_current_folder(good, monkeypatch):
    monkeypatch.chdir(Path(good).parent)
    assert find("tracker", "my_file:Right").__name__ == "Right"
    assert find("tracker", "my_file:Right.prompts").__name__ == "prompts"


def test_a_built_in_by_module():
    from common.tasks.warmup import Warmup

    assert find("task", "common.tasks.warmup:Warmup") is Warmup


WHOLE = "your own as path/file.py:NAME or module:NAME"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_file.py:Rihgt", "did you mean 'Right'?"),
        ("my_file.py:Zzz", "its classes are Note, Right"),
        ("my_file.py:number", "is a int"),
        ("none.py:Task", "none.py'; give its path from"),
        ("my_file.py", WHOLE),
        (":Task", WHOLE),
        ("module:", WHOLE),
    ],
)
def test_a_wrong_name_is_one_sentence_with_its_cure(good, monkeypatch, name, words):
    monkeypatch.chdir(Path(good).parent)
    assert words in message("task", name)


@pytest.mark.parametrize(
    ("source", "line", "error"),
    [
        ("x = 1\ny = = 2\n", 2, "SyntaxError: invalid syntax"),
        ("import os\n\nimport not_there_at_all\n", 3, "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("def f():\n    return 1 / 0\n\nf()\n", 2, "ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
        ("raise SystemExit('bye')\n", 1, "SystemExit: bye"),
    ],
)
def test_file_that_does_not_import(tmp_path, source, line, error):
    path = tmp_path / "my_broken.py"
    path.write_text(source)
    for _ in range(2):  # a failed import must not leave half a module behind
        text = message("task", f"{path}:Task")
        assert f"{path}, line {line}" in text
        assert error in text


def test_an_error_in_a_neighbour_is_found_there(tmp_path):
    write(tmp_path / "my_neighbour.py", "a = 1\nb = a.nothing")
    write(tmp_path / "my_user.py", "import my_neighbour")
    assert f"{tmp_path}/my_neighbour.py, line 2" in message("task", f"{tmp_path}/my_user.py:Task")


def test_module_missing(tmp_path, monkeypatch):
    assert "there is no module 'my_absent.part'" in message("sampler", "my_absent.part:Sampler")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my_needy.py", "import my_other_absent")
    text = message("sampler", "my_needy:Sampler")
    assert text.endswith(
        "my_needy.py, line 1): ModuleNotFoundError: No module named 'my_other_absent'; install 'my_other_absent'"
    )


def test_unknown_name_lists_what_there_is(tmp_path):
    offer(tmp_path / "a", "one", {"goodbye": "offered_one:Thing", "hello": "offered_one:Thing"})
    text = message("tracker", "helo")
    assert "did you mean 'hello'?" in text
    assert "goodbye, hello" in text


def offer(folder: Path, distribution: str, names: dict[str, str]) -> None:
    """An installed distribution with tracker entry points, as a package manager would leave it."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in names.items())
    (info / "entry_points.txt").write_text(f"[nanogrpo.trackers]\n{lines}")
    sys.path.insert(0, str(folder))


def test_entry_points_found_and_described(tmp_path):
    offer(tmp_path / "a", "one", {"good": "offered_one:Thing", "plain": "offered_one:bare", "bad": "offered_two:Thing"})
    write(
        tmp_path / "a" / "offered_one.py",
        """
        '''All of it.'''
        class Thing:
            '''
            A thing.

            More.
            '''
        def bare():
            pass
        """,
    )
    write(tmp_path / "a" / "offered_two.py", "import nothing_of_the_kind")
    assert find("tracker", "good").__name__ == "Thing"
    lines = dict(installed("tracker"))
    assert lines["good"] == "A thing."
    assert lines["plain"] == "All of it."
    assert lines["bad"].startswith("cannot be used: ")
    assert "nothing_of_the_kind" in lines["bad"]


def test_one_name_of_two_distributions(tmp_path):
    offer(tmp_path / "a", "one", {"same": "offered_one:Thing"})
    write(tmp_path / "a" / "offered_one.py", "class Thing: pass")
    offer(tmp_path / "b", "two", {"same": "offered_one:Thing"})
    assert find("tracker", "same").__name__ == "Thing"
    offer(tmp_path / "c", "three", {"same": "offered_three:Thing"})
    text = message("tracker", "same")
    assert "offered_one:Thing and offered_three:Thing" in text


def test_the_built_in_tasks_are_installed():
    try:
        distribution = importlib.metadata.distribution("nanogrpo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nanogrpo is not installed")
    declared = {entry.name for entry in distribution.entry_points if entry.group == "nanogrpo.tasks"}
    assert {"warmup", "gsm8k", "reasoning_gym"} <= declared
    lines = dict(installed("task"))
    assert declared <= lines.keys()
    for name in declared:
        assert lines[name], name
        assert "cannot be used" not in lines[name], lines[name]
    assert find_task(TaskConfig(name="warmup", options={"train_questions": 4})).prompts("train")[3].id == "train-3"


ROOT = Path(__file__).parent.parent


def without_nanogrpo(tmp_path: Path, *files: str) -> subprocess.CompletedProcess:
    """What a program sees where the requirements are installed, nanogrpo is not, and these files lie in a folder.

    Python runs with ``-S``: it knows only the folder and a copy (by links) of site-packages without this project.
    """
    packages, sources = tmp_path / "packages", tmp_path / "sources"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "nanogrpo" not in path.name:
            (packages / path.name).symlink_to(path)
    for name in files:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources / name)
    code = """if True:
        import json
        from common import plugins
        names = {kind: [name for name, _ in plugins.installed(kind)] for kind in ("task", "sampler", "tracker")}
        print(json.dumps([names, plugins.__file__, plugins.find("task", "warmup").__name__]))
    """
    environment = {**os.environ, "PYTHONPATH": f"{sources}{os.pathsep}{packages}"}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_built_ins_are_known_where_only_the_requirements_are_installed(tmp_path):
    done = without_nanogrpo(tmp_path, "common", "sampler", "learner", "deploy", "pyproject.toml")
    assert done.returncode == 0, done.stderr
    names, file, warmup = json.loads(done.stdout)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert names == {kind: sorted(groups.get(f"nanogrpo.{kind}s", {})) for kind in ("task", "sampler", "tracker")}
    assert file.startswith(str(tmp_path))
    assert warmup == "Warmup"


def test_neither_installed_nor_declared(tmp_path):
    done = without_nanogrpo(tmp_path, "common")
    assert "task.name='warmup': no task is installed" in done.stderr


def test_options_are_checked_by_name(good):
    assert make("task", f"{good}:Right", {"times": 4}).times == 4
    with pytest.raises(UserError) as caught:
        make("task", f"{good}:Right", {"tims": 4})
    text = str(caught.value)
    assert text.startswith("task.options.tims=4 is not an option")
    assert "did you mean 'times'?" in text
    assert "times, words" in text


def test_options_that_take_anything_and_options_that_are_needed(good):
    assert make("task", f"{good}:Picky", {"needed": 1, "else": 2}).got == (1, {"else": 2})
    with pytest.raises(UserError, match=r"task\.options\.needed is missing"):
        make("task", f"{good}:Picky", {"else": 2})
    assert make("task", f"{good}:Picky", {"else": 2}, "the setup").got == ("the setup", {"else": 2})
    with pytest.raises(UserError, match=r"sampler\.options\.times=2"):  # what we give is not the user's to set
        make("sampler", f"{good}:Right", {"times": 2}, "the setup")


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("sampler", "os:getcwd", "called with a common.types.SamplerSetup first, which it does not take"),
        ("sampler", "collections:OrderedDict", "a class that is no sampler: it has no generate, logprobs"),
        ("tracker", "common.tracking.metrics:check_metrics", ""),
        ("tracker", "common.rewards.scorer:Scorer", "a class that is no tracker: it has no log, rollouts, evaluation"),
    ],
)
def test_what_makes_something_else_is_refused_before_it_is_called(kind, name, words):
    if not words:  # a function may make anything
        assert check(kind, name, {}, 1)
        return
    with pytest.raises(UserError, match=f"^{KEYS[kind]}='{name}' is .*{re.escape(words)}"):
        check(kind, name, {}, 1)


def test_a_function_that_makes_something_else_is_refused_after_it():
    with pytest.raises(UserError, match="makes a str that is no sampler: it has no generate"):
        make("sampler", "os.path:basename", {}, "/a/b")


def test_the_version_is_that_of_the_project():
    assert version() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(("name", "error"), [("Broken", "ValueError: the moon is full"), ("Quits", "SystemExit: 3")])
def test_a_task_that_cannot_be_made(good, name, error):
    with pytest.raises(UserError) as caught:
        make_task(f"{good}:{name}", {})
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("del Right.is_correct", "has no method 'is_correct'"),
        ("Right.prompts = 3", "has no method 'prompts'"),
        (
            "Right.__init__ = lambda self: vars(self).update(rewards=[], reward_weights={})",
            "has no dictionary 'rewards'",
        ),
        ("Right.__init__ = lambda self: vars(self).update(rewards={}, reward_weights={})", "has no rewards"),
        (
            "Right.__init__ = lambda self: vars(self).update(rewards={'a': 1}, reward_weights={'a': 1})",
            "has a reward 'a' that is not a function",
        ),
        (
            "Right.__init__ = lambda self: vars(self).update(rewards={'a': len}, reward_weights={'b': 1})",
            "a, b in only one of",
        ),
    ],
)
def test_what_is_no_task_is_refused_with_what_it_lacks(tmp_path, body, expected):
    path = tmp_path / "my_odd.py"
    path.write_text(textwrap.dedent(GOOD) + "\n" + body)
    with pytest.raises(UserError) as caught:
        make_task(f"{path}:Right", {})
    assert expected in str(caught.value)
