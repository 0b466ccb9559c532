"""The walls around reward workers: what runs in them changes nothing outside and learns no secret."""

import contextlib
import faulthandler
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS

from common.config import TaskConfig, build
from common.errors import UserError
from common.plugins import make_task
from common.rewards import sandbox
from common.rewards.scorer import Scorer
from common.tasks.literals import readable
from common.types import Completion, Group, Prompt

ROOT = Path(__file__).parent.parent
FULL = os.environ.get("NANOGRPO_TESTS") == "hostile"

# The worst that a task can be: its reward runs the completion.
TASK = """
    class Runs:
        reward_weights = {"value": 1.0}

        def __init__(self):
            self.rewards = {"value": self.value}

        def prompts(self, split):
            return []

        def value(self, prompt, completion):
            scope = dict(prompt.data)
            exec(completion.text, scope)
            return scope.get("value", 0)

        def is_correct(self, prompt, completion):
            return bool(self.value(prompt, completion))
"""


def group(*texts: str, data: dict | None = None) -> Group:
    completions = tuple(Completion((), textwrap.dedent(text), (), "stop", 0) for text in texts)
    return Group(Prompt("p", (), data or {}), completions)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walls")
    (folder / "runs.py").write_text(textwrap.dedent(TASK))
    (folder / "kept").write_text("as it was")
    (folder / ".env").write_text("PASSWORD=swordfish")
    home = folder / "home"
    for name in (".ssh/id_ed25519", ".netrc", ".cache/huggingface/token", ".cache/huggingface/hub/model", ".elan/lean",
                 "data/rows", "key.json"):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("swordfish")
    return folder


@pytest.fixture(scope="module")
def walled(place):
    """A worker of a user with secrets, whose home is ``place/home``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(place / "home"))
        patch.setenv("HF_TOKEN", "swordfish")
        patch.setenv("MY_DATA", "rows")
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(place / "home" / "key.json"))
        patch.chdir(place)
        config = TaskConfig(
            name=f"{place}/runs.py:Runs", reward_timeout_s=20, reward_memory_gib=0.5, sandbox_environment=("MY_DATA",),
            sandbox_paths=("~/.elan",),
        )  # fmt: skip
        with Scorer(config) as scorer:
            yield scorer


def values(scorer: Scorer, *texts: str, **data) -> list[float]:
    [scored], errors = scorer.score([group(*texts, data=data)])
    assert not errors
    return [completion.rewards["value"] for completion in scored.completions]


FAILS = """
    try:
        {}
    except OSError as error:
        value = 1
"""


def test_nothing_outside_changes(walled, place):
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        contextlib.closing(socket.socket(socket.AF_UNIX)) as agent,
    ):
        address = str(place.parent.parent / f"agent-{os.getpid()}")  # as ssh's and Ray's, somewhere in /tmp
        agent.bind(address)
        agent.listen()
        tried = [
            "open(f'{place}/new', 'w')",
            "open(f'{place}/kept', 'a')",
            "import os; os.remove(f'{place}/kept')",
            "import os; os.rename(place, place + '2')",
            "import os; os.chmod(f'{place}/kept', 0)",
            "open('/proc/sys/kernel/core_pattern', 'r+')",  # root's, capabilities or not
            "open('/proc/sys/vm/drop_caches', 'r+')",
            "open('/sys/kernel/mm/transparent_hugepage/enabled', 'r+')",
            "open('/dev/new', 'w')",
            "import os; os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
            "import os; os.kill(parent, 9)",
            "import socket; socket.create_connection(('127.0.0.1', port), 2)",
            "import socket; socket.create_connection(('192.0.2.1', 80), 2)",
            "import socket; socket.socket(socket.AF_UNIX).connect(agent)",
            "open(f'/proc/{parent}/environ').read(); raise ValueError",
        ]
        [*failed] = values(
            walled, *(FAILS.format(line) for line in tried), place=str(place), parent=os.getpid(),
            port=listening.getsockname()[1], agent=address,
        )  # fmt: skip
    os.remove(address)
    assert dict(zip(tried, failed, strict=True)) == dict.fromkeys(tried, 1.0)
    values(walled, f"import os; os.system('touch {place}/new; echo x > {place}/kept; rm -rf {place}')")
    assert (place / "kept").read_text() == "as it was"
    assert not (place / "new").exists()


def test_what_a_worker_has(walled, place):
    status = "value = int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('{}')), 16)"
    assert values(walled, *(status.format(word) for word in ("NoNewPrivs", "CapEff", "CapBnd"))) == [1, 0, 0]
    scratch = """
        import os, tempfile
        with tempfile.NamedTemporaryFile("w+") as file:
            file.write("hello")
            file.flush()
            value = os.path.getsize(file.name)
    """
    large = FAILS.format("open('/tmp/large', 'wb').write(bytes(300 << 20))")
    assert values(walled, scratch, large) == [5, 1]
    assert values(walled, "import os; value = os.getcwd() == place", "value = open('runs.py').read(1) == '\\n'",
                  place=str(place)) == [1, 1]  # fmt: skip


def test_secrets_are_out_of_sight_and_data_are_not(walled, place):
    seen = """
        import os
        value = 0
        for folder, _, files in os.walk(place):
            for file in files:
                path = os.path.join(folder, file)
                try:
                    value += "swordfish" in open(path).read() and not path.endswith(("rows", "model", "lean"))
                except OSError:
                    pass
        value += any("swordfish" in text for text in os.environ.values())
    """
    read = "value = open(f'{place}/home/' + %r).read() == 'swordfish'"
    assert values(walled, seen, place=str(place)) == [0]
    shown = ("data/rows", ".cache/huggingface/hub/model", ".elan/lean")
    assert values(walled, *(read % name for name in shown), place=str(place)) == [1, 1, 1]
    assert values(walled, "import os; value = os.environ['MY_DATA'] == 'rows'") == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("value = len(bytearray(10**11))", "MemoryError"),
        ("import mmap\nshared = mmap.mmap(-1, 700 << 20)\nfor at in range(0, 700 << 20, 4096): shared[at] = 1\n"
         "import time; time.sleep(20)", "took more memory than task.reward_memory_gib=0.5"),
        ("import os, time\ntry:\n  for _ in range(600):\n    if os.fork() == 0: time.sleep(60); os._exit(0)\n"
         "except OSError: raise MemoryError('processes')\ntime.sleep(20)", "processes"),
        ("import os, sys; os.write(int(sys.argv[1]), b'garbage' * 9)", "its worker process died"),
        ("import os, sys, time; os.write(int(sys.argv[1]), b'\\0'); time.sleep(600)", "its worker process died"),
        ("import os, sys, pickle\nclass Code:\n  def __reduce__(self): return os.system, (f'touch {place}/new',)\n"
         "data = pickle.dumps(Code()); os.write(int(sys.argv[1]), len(data).to_bytes(4, 'big') + data)",
         "its worker process died"),
        ("import os, sys, json\ndata = json.dumps(('answer', 5, {'value': 9})).encode()\n"
         "os.write(int(sys.argv[1]), len(data).to_bytes(4, 'big') + data)", "answered for completion 5"),
        *((f"import os, sys\ndata = {message!r}\nos.write(int(sys.argv[1]), len(data).to_bytes(4, 'big') + data)",
           "its worker process died") for message in (b"5", b'["answer", 0, [1]]', b'["answer", 0, {"value": NaN}]',
                                                      b'["failed", 0, 7]', b"[" * 50_000,
                                                      b'["answer", 0, {"value": 1e7}]',
                                                      b'["answer", 0, {"value": true}]',
                                                      b'["began", 0, "value"]', b'["began", 0, "other"]',
                                                      b'["answer", 0, {"other": 1.0}]')),
    ],
)  # fmt: skip
def test_too_much_costs_a_group_and_not_the_run(walled, place, text, words):
    scored, [error] = walled.score([group(text, data={"place": str(place)}), group("value = 3")])
    assert [c.reward for g in scored for c in g.completions] == [3.0]
    assert error.ran_over
    assert words in error.error
    assert not (place / "new").exists()


def test_is_correct_is_walled_too(walled, place):
    assert walled.correct([group(FAILS.format(f"open({str(place / 'new')!r}, 'w')"), "value = 0")]) == [[True, False]]


def test_endless_printing_fills_no_log(place, caplog):
    caplog.set_level("INFO", "nanogrpo.rewards")
    with Scorer(TaskConfig(name=f"{place}/runs.py:Runs")) as scorer:
        values(scorer, "for _ in range(30_000): print('x')", "print('y' * 5_000_000)")
    logged = [record.getMessage() for record in caplog.records]
    assert 10_000 <= len(logged) < 10_100
    assert max(map(len, logged)) < 3000


def test_without_walls_by_consent(place, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "swordfish")
    with Scorer(TaskConfig(name=f"{place}/runs.py:Runs", sandbox="none")) as scorer:
        text = "import os; open(f'{place}/by-consent', 'w'); value = os.environ['HF_TOKEN'] == 'swordfish'"
        assert values(scorer, text, place=str(place)) == [1]
    assert (place / "by-consent").exists()
    with pytest.raises(UserError, match=r"task\.sandbox_paths=.* has no effect: task\.sandbox is none"):
        build({"task": {"sandbox": "none", "sandbox_paths": ["~/.elan"]}})


def test_a_machine_without_user_namespaces_is_one_sentence():
    """Inside bubblewrap with user namespaces switched off, as in many containers."""
    [*_, own] = sandbox._bubblewraps()
    code = (
        "from types import SimpleNamespace as S\nfrom common.rewards import sandbox\n"
        "from common.errors import UserError\n"
        "try: sandbox.command(S(sandbox='bubblewrap', name='warmup', sandbox_paths=()))\n"
        "except UserError as e: print(e)"
    )
    run = subprocess.run(
        [own, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-user", "--disable-userns", "--",
         sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    [line] = run.stdout.splitlines()
    assert line.startswith("task.sandbox='bubblewrap': this machine cannot wall reward workers in (")
    assert "task.sandbox='none'" in line


# Every shipped task against hostile text. One worker scores a text by all of them: each asks its first question.
SHIPPED = """
    import os
    from common.tasks.gsm8k import Gsm8k
    from common.tasks.reasoning_gym import ReasoningGym
    from common.tasks.warmup import Warmup
    from common.types import Prompt

    class Shipped:
        def __init__(self, datasets):
            asked = {"warmup": (Warmup(), None), "gsm8k": (Gsm8k(), Prompt("p", (), {"answer": "18"}))}
            asked |= {name: (ReasoningGym(name, size=1, test_size=1), None) for name in datasets}
            self.rewards = {}
            for name, (task, prompt) in asked.items():
                prompt = prompt or task.prompts("train")[0]
                for reward, function in (*task.rewards.items(), ("is_correct", task.is_correct)):
                    self.rewards[f"{name}/{reward}"] = lambda _, c, function=function, own=prompt: function(own, c)
            self.reward_weights = dict.fromkeys(self.rewards, 1.0)

        def prompts(self, split):
            return []

        def is_correct(self, prompt, completion):
            return False
"""
EVALUATING = ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24",
              "polynomial_multiplication", "simple_integration", "intermediate_integration")  # fmt: skip
USABLE = sorted(set(DATASETS) - {"composite", "list_functions"})  # the last is refused
PUZZLES = USABLE if FULL else [*EVALUATING, "complex_arithmetic", "number_sorting", "arc_1d",
    "prime_factorization", "game_of_life", "bitwise_arithmetic", "coin_flip"]  # fmt: skip


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "shipped.py").write_text(textwrap.dedent(SHIPPED))
    (folder / "kept").write_text("as it was")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "0")
        config = TaskConfig(
            name=f"{folder}/shipped.py:Shipped", options={"datasets": PUZZLES}, reward_workers=2, reward_timeout_s=3
        )
        with Scorer(config) as scorer:
            yield scorer, folder


CODE = st.sampled_from([
    "__import__('os').system('touch {0}/new; echo x > {0}/kept')", "open('{0}/new', 'w').write('x')", "exit()", "1/0",
    "[c for c in ().__class__.__base__.__subclasses__()][0]", "9**9**9**9", "9**9**9", "[0]*10**12", "'a'*10**12",
    "(lambda f: f(f))(lambda f: f(f))", "factorial(10**9)", "Integral(x**x, x)", "1e999999999", "oracle_answer",
    "[[__import__('os').remove('{0}/kept')]]", "S('open(\"{0}/new\",\"w\")')", "x**10**10", "sin(9**9**9*x)", "nan",
    "exec(\"import os; os.fork()\")", "{{'a': NaN}}", "`rm -rf {0}`", "$(touch {0}/new)", "\\input{{{0}/kept}}",
    "eval(input())", "[i for i in iter(int, 1)]", "0x10 + 0b1", "(x+1)**400", "1" * 5000, "-" * 5000 + "1",
])  # fmt: skip
PIECES = st.sampled_from(["[", "]", "(", ")", "{{", "}}", "'", '"', ",", "1", "9" * 50, "-", "**", "/", "x", "\n",
                          "\\", "\0", "\u202e", "\u0661", "½", "٣", "🦜", "\ud83d", "e", "nan", "<answer>",
                          "</answer>", "Q _", "="])  # fmt: skip
INSIDE = st.one_of(
    CODE, st.lists(PIECES, max_size=30).map("".join), st.text(max_size=40).map(lambda text: text.replace("{", "{{")
    .replace("}", "}}")), st.tuples(PIECES, st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]),
    st.tuples(CODE, CODE, PIECES).map(lambda parts: parts[2].join(parts[:2])),
)  # fmt: skip
HOSTILE = st.one_of(INSIDE.map(lambda text: f"<answer>{text}</answer>"), INSIDE)
BATCH = 50


@pytest.mark.slow
@pytest.mark.timeout(7200 if FULL else 120)
@settings(max_examples=200 if FULL else 4, deadline=None, derandomize=not FULL)
@given(texts=st.lists(HOSTILE, min_size=BATCH, max_size=BATCH))
def test_hostile_text_changes_nothing_outside_and_ends_no_run(shipped, texts):
    """200 texts every day; 10,000 with NANOGRPO_TESTS=hostile, over every generator of reasoning-gym then."""
    if FULL:
        faulthandler.cancel_dump_traceback_later()  # pytest's limit for a hang; these take eight minutes
    scorer, folder = shipped
    texts = [text.replace("{{", "{").replace("}}", "}").replace("{0}", str(folder)) for text in texts]
    groups = [group(text) for text in texts]
    began = time.monotonic()
    scored, errors = scorer.score(groups)  # by default an exception would end the run here
    assert all(error.ran_over for error in errors)
    assert len(scored) + len(errors) == len(groups)
    assert time.monotonic() - began < len(groups) * (scorer._config.reward_timeout_s + 30)
    for walled_group in scored:
        assert all(-1 <= value <= 1 for value in walled_group.completions[0].rewards.values())
    assert {path.name for path in folder.iterdir()} == {"shipped.py", "kept"}
    assert (folder / "kept").read_text() == "as it was"


def test_what_scorers_evaluate_is_held_against_a_grammar(monkeypatch):
    """Their own answers pass, and in the forms that they give part marks to; code and huge numbers do not."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    forms = {
        "string_insertion": ["['A', 'B']"], "spiral_matrix": ["[1, 2, -3]", "(1, 2)"],
        "binary_matrix": ["[[0, 1], [1, 0]]"],
        "n_queens": ["[['Q', '_'], ['_', 'Q']]"], "countdown": ["(1 + 2)*3/4 - 5"], "puzzle24": ["2*(5 + 1 + 6)"],
        "polynomial_multiplication": ["-3*x**4 + y*z - 1"],
        "simple_integration": ["X**5/7 - 2.5*X**(1/2) + C", "sqrt(x)*exp(-x)"],
        "intermediate_integration": ["-x*asin(2*x) - sqrt(1 - 4*x**2)/2 + C", "(8 - 8*x)**(3/2)", "log(Abs(x))**2"],
    }  # fmt: skip
    code = ["__import__('os').system('x')", "9**9**9**9", "[0]*10**9", "oracle_answer", "valid_solutions", "f'{1}'",
            "x.y", "lambda: 0", "(1).real", "[i for i in (1,)]", "print(1)", "sin(9**9**9)", "((9**99)**99)**99", "",
            "'"]  # fmt: skip
    assert set(forms) == set(EVALUATING)
    for name, own in forms.items():
        task = make_task("reasoning_gym", {"dataset": name, "size": 8, "test_size": 2})
        for prompt in task.prompts("train"):
            answer = Completion((), f"<answer>{prompt.data['answer']}</answer>", (), "stop", 0)
            assert task.is_correct(prompt, answer), (name, prompt.data["answer"])
        entry = task._source(8, 0)[0]
        assert all(readable(text, entry) for text in own), name
        taken = [text for text in code if readable(text, entry)]
        assert taken == [], name
    for name, text in (("countdown", "0x32 + 1"), ("countdown", "2**3"), ("countdown", "7//2"), ("complex_arithmetic",
                       "nan"), ("game_of_life_halting", "anything"), ("coin_flip", "1e999999999")):  # fmt: skip
        task = make_task("reasoning_gym", {"dataset": name, "size": 1, "test_size": 1})
        assert not readable(text, task._source(1, 0)[0])


def test_every_generators_own_answer_reaches_its_scorer(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    for name in USABLE if FULL else USABLE[::8]:
        entry = make_task("reasoning_gym", {"dataset": name, "size": 1, "test_size": 1})._source(1, 0)[0]
        assert not isinstance(entry["answer"], str) or readable(entry["answer"], entry), name


def test_the_file_that_started_this():
    """n_queens evaluates its answer; the file is not there afterwards, in this process without walls."""
    task = make_task("reasoning_gym", {"dataset": "n_queens"})
    prompt = task.prompts("train")[0]
    marker = ROOT / "written-by-the-model"
    text = f"<answer>__import__('os').system('touch {marker}')</answer>"
    assert task.rewards["correct"](prompt, Completion((), text, (), "stop", 0)) == 0.0
    assert not marker.exists()
    assert json.loads(json.dumps(prompt.data)) == prompt.data
