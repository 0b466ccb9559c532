# ruff: noqa: RUF001
"""The built-in tasks: right answers are right, wrong ones wrong, and nothing of the test split is in training."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.plugins import make_task
from common.prompts import LOOKED_AT
from common.protocols import Split
from common.tasks import answer_in, gsm8k
from common.tasks.gsm8k import Gsm8k
from common.tasks.numbers import same_number, value_of
from common.tasks.reasoning_gym import ReasoningGym
from common.tasks.warmup import Warmup
from common.types import Completion, Prompt

ROOT = Path(__file__).parent.parent
SPLITS: tuple[Split, ...] = get_args(Split)
KINDS = ("first_letter", "next_number", "larger", "sum")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """What ``datasets`` keeps of the files of these tests goes away with them."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def says(text: str) -> Completion:
    return Completion((), text, (), "stop", 0)


def rewards(task, prompt: Prompt, text: str) -> dict[str, float]:
    return {name: function(prompt, says(text)) for name, function in task.rewards.items()}


def asked(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


def shown(prompt: Prompt) -> list[tuple[str, str]]:
    """The worked examples: question and answer."""
    turns = [message for message in prompt.messages if message["role"] != "system"][:-1]
    return [(q["content"], a["content"]) for q, a in zip(turns[::2], turns[1::2], strict=True)]


# Reading the answer.


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>t</answer>", "t"),
        ("<answer> t \n</answer>\n ", "t"),
        ("It begins so: <answer>t</answer>", "t"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer>t</answer>.", None),
        ("<answer>t</answer> or <answer>u</answer>", None),
        ("<answer><answer>t</answer>", None),
        ("<answer>t</answer></answer>", None),
        ("<answer></answer>", None),
        ("<answer> </answer>", None),
        ("<answer>t", None),
        ("t</answer>", None),
        ("</answer>t<answer>", None),
        ("<Answer>t</Answer>", None),
        ("t", None),
        ("", None),
    ],
)
def test_answer_in(text, answer):
    assert answer_in(text) == answer


# Every task.

PLAIN = {
    "warmup": lambda: Warmup(train_questions=40, test_questions=20),
    "reasoning_gym": lambda: ReasoningGym("basic_arithmetic", size=40, test_size=20),
    "gsm8k": None,
}


@pytest.fixture(params=PLAIN)
def task(request, tmp_path):
    if request.param == "gsm8k":
        return Gsm8k(str(gsm8k_folder(tmp_path)), shots=1)
    return PLAIN[request.param]()


def test_prompts_are_plain_stable_and_named(task):
    for split in SPLITS:
        prompts = task.prompts(split)
        again = task.prompts(split)
        assert len(prompts) == len(again) > 0
        assert [prompts[i] for i in range(len(prompts))] == list(again)
        assert prompts[1:3] == [prompts[1], prompts[2]]
        assert prompts[-1] == prompts[len(prompts) - 1]
        with pytest.raises(IndexError):
            prompts[len(prompts)]
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            assert prompt.id.startswith(f"{split}-")
            assert json.loads(json.dumps(prompt.data)) == prompt.data
            assert prompt.messages[-1]["role"] == "user"
            assert prompt.token_ids == ()


def test_splits_share_nothing(task):
    train = {asked(prompt) for prompt in task.prompts("train")}
    train |= {question for prompt in task.prompts("train") for question, _ in shown(prompt)}
    test = {asked(prompt) for prompt in task.prompts("test")}
    assert not train & test
    for prompt in task.prompts("test"):
        assert not {question for question, _ in shown(prompt)} & test


def test_reference_answers_are_right_and_others_are_not(task):
    for split in SPLITS:
        for prompt in task.prompts(split):
            good = says(f"<answer>{prompt.data['answer']}</answer>")
            assert task.is_correct(prompt, good)
            assert task.rewards["correct"](prompt, good) == 1.0
            for bad in ("", prompt.data["answer"], "<answer>xyzzy</answer>", f"{good.text} {good.text}"):
                assert not task.is_correct(prompt, says(bad))
                assert task.rewards["correct"](prompt, says(bad)) < 0.5


def test_the_best_completion_earns_the_most(task):
    prompt = task.prompts("train")[0]
    block = "<thinking>I see.</thinking>" if isinstance(task, Gsm8k) else ""
    best = rewards(task, prompt, f"{block}<answer>{prompt.data['answer']}</answer>")
    assert best == dict.fromkeys(task.rewards, 1.0)
    assert rewards(task, prompt, "no idea") == dict.fromkeys(task.rewards, 0.0)
    assert task.reward_weights["correct"] > sum(w for name, w in task.reward_weights.items() if name != "correct")


# Warm-up.


def solve(question: str) -> tuple[str, str]:
    """The kind and answer of a warm-up question, from its words alone."""
    if match := re.fullmatch(r"What is the first letter of the word ([a-z]+)\?", question):
        return "first_letter", match[1][:1]
    if match := re.fullmatch(r"What number comes after (\d+)\?", question):
        return "next_number", str(int(match[1]) + 1)
    if match := re.fullmatch(r"Which number is larger, (\d+) or (\d+)\?", question):
        return "larger", match[1] if int(match[1]) > int(match[2]) else match[2]
    match = re.fullmatch(r"What is (\d+) \+ (\d+)\?", question)
    assert match, question
    return "sum", str(int(match[1]) + int(match[2]))


def test_warmup_questions_examples_and_balance():
    task = Warmup(train_questions=2000, shots=2)
    for split in SPLITS:
        for index, prompt in enumerate(task.prompts(split)):
            kind, answer = solve(asked(prompt))
            assert (kind, answer) == (prompt.data["kind"], prompt.data["answer"])
            assert kind == KINDS[index % 4]
            examples = shown(prompt)
            assert len({question for question, _ in examples} | {asked(prompt)}) == 3
            for question, worked in examples:
                assert worked == f"<answer>{solve(question)[1]}</answer>"
                assert solve(question)[0] == kind
    test = [asked(prompt) for prompt in task.prompts("test")]
    assert len(set(test)) == len(test) == 200


def unit(question: str) -> tuple[str, ...]:
    """A question up to the order of its numbers."""
    return (solve(question)[0], *sorted(re.findall(r"\d+", question) or [question]))


HELD_OUT = {unit(asked(prompt)) for seed in range(8) for prompt in Warmup(seed, test_questions=220).prompts("test")}


@given(
    seed=st.integers(0, 2**40), shots=st.integers(0, 4), kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True)
)
def test_warmup_never_trains_on_a_held_out_question(seed, shots, kinds):
    task = Warmup(seed=seed, shots=shots, kinds=kinds, train_questions=400, test_questions=40)
    plain = [asked(prompt).removesuffix(" Reply as <answer>…</answer>.") for prompt in task.prompts("train")]
    seen = {unit(q) for q in plain} | {unit(q) for p in task.prompts("train") for q, _ in shown(p)}
    assert not seen & HELD_OUT
    test = {unit(asked(prompt).removesuffix(" Reply as <answer>…</answer>.")) for prompt in task.prompts("test")}
    assert not seen & test
    assert {solve(question)[0] for question in plain} == set(kinds)


def test_warmup_seeds_differ_and_no_shots_says_the_format():
    assert [asked(p) for p in Warmup(seed=1).prompts("train")[:20]] != [
        asked(p) for p in Warmup().prompts("train")[:20]
    ]
    [message] = Warmup(shots=0).prompts("train")[0].messages
    assert "<answer>" in message["content"]


def test_warmup_asks_every_training_question_before_any_again():
    questions = [
        asked(prompt) for prompt in Warmup(kinds=["sum"], train_questions=500, test_questions=10).prompts("train")
    ]
    count = len(set(questions))
    assert len(set(questions[:count])) == count
    assert sorted(questions[count : 2 * count]) == sorted(questions[:count])
    assert questions[count : 2 * count] != questions[:count]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>v</answer>", (1.0, 1.0)),
        ("<answer>V</answer>", (1.0, 1.0)),
        ("Well, <answer> v </answer>\n", (1.0, 1.0)),
        ("<answer>w</answer>", (0.0, 1.0)),
        ("<answer>violet</answer>", (0.0, 1.0)),
        ("v", (0.0, 0.0)),
        ("<answer>v</answer> is it", (0.0, 0.0)),
        ("<answer>v</answer><answer>v</answer>", (0.0, 0.0)),
    ],
)
def test_warmup_rewards(text, expected):
    task = Warmup()
    prompt = Prompt("p", (), {"kind": "first_letter", "answer": "v"})
    assert tuple(rewards(task, prompt, text).values()) == expected
    assert task.is_correct(prompt, says(text)) == bool(expected[0])


def test_warmup_is_the_same_in_every_process():
    code = (
        "from common.tasks.warmup import Warmup; t = Warmup(seed=3);"
        "print(hash('a') and [p for s in ('train', 'test') for p in t.prompts(s)[:60]])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != b""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"train_questions": 0}, "train_questions=0"),
        ({"test_questions": "many"}, "test_questions='many'"),
        ({"shots": True}, "shots=True"),
        ({"shots": 50}, "shots=50"),
        ({"test_questions": 10_000}, "use at most"),
        ({"kinds": ["sums"]}, "did you mean 'sum'"),
        ({"kinds": "sum"}, "must be a list"),
        ({"kinds": ["sum", "sum"]}, "must be a list of different"),
        ({"kinds": []}, "must be a list"),
    ],
)
def test_warmup_options(options, words):
    with pytest.raises(UserError, match=r"task\.options\.") as caught:
        Warmup(**options)
    assert words in str(caught.value)


# GSM8K.


def row(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


def rows(start: int, count: int) -> list[dict[str, str]]:
    return [
        {
            "question": f"Ann has {i} pens and buys 2.  How many now?",
            "answer": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}",
        }
        for i in range(start, start + count)
    ]


def jsonl(path: Path, table: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def gsm8k_folder(folder: Path) -> Path:
    jsonl(folder / "train.jsonl", rows(0, 6))
    jsonl(folder / "test.jsonl", rows(100, 4))
    return folder


def test_gsm8k_prompts(tmp_path):
    task = Gsm8k(str(gsm8k_folder(tmp_path)))
    prompt = task.prompts("train")[3]
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert "<thinking>" in prompt.messages[0]["content"]
    assert asked(prompt) == "Ann has 3 pens and buys 2.  How many now?"
    assert prompt.data["answer"] == "5"
    assert len(task.prompts("train")) == 6
    assert len(task.prompts("test")) == 4


def test_gsm8k_shots_and_sizes(tmp_path):
    task = Gsm8k(str(gsm8k_folder(tmp_path)), shots=2, max_train=3, max_test=2)
    train, test = task.prompts("train"), task.prompts("test")
    assert (len(train), len(test)) == (3, 2)
    for prompt in (*train, *test):
        assert shown(prompt) == [
            ("Ann has 0 pens and buys 2.  How many now?", "<thinking>0+2=2</thinking><answer>2</answer>"),
            ("Ann has 1 pens and buys 2.  How many now?", "<thinking>1+2=3</thinking><answer>3</answer>"),
        ]
        assert rewards(task, Prompt("p", (), {"answer": "2"}), shown(prompt)[0][1]) == dict.fromkeys(task.rewards, 1.0)
    assert asked(train[0]) == "Ann has 2 pens and buys 2.  How many now?"
    with pytest.raises(UserError, match="shots=6"):
        Gsm8k(str(tmp_path), shots=6).prompts("test")


def test_gsm8k_drops_training_rows_that_ask_a_test_question(tmp_path):
    jsonl(
        tmp_path / "train.jsonl",
        [*rows(0, 3), {"question": "ann has 100 pens and buys 2. How many now?", "answer": "102"}],
    )
    jsonl(tmp_path / "test.jsonl", rows(100, 4))
    assert len(Gsm8k(str(tmp_path)).prompts("train")) == 3


def test_gsm8k_parquet_and_shards(tmp_path):
    import datasets

    (tmp_path / "main").mkdir()
    for part in (0, 1):
        table = datasets.Dataset.from_list(rows(10 * part, 5))
        table.to_parquet(str(tmp_path / "main" / f"train-0000{part}-of-00002.parquet"))
    datasets.Dataset.from_list(rows(50, 2)).to_parquet(str(tmp_path / "main" / "test-00000-of-00001.parquet"))
    task = Gsm8k(str(tmp_path))
    assert [prompt.data["answer"] for prompt in task.prompts("train")] == [
        str(i + 2) for i in (*range(5), *range(10, 15))
    ]
    assert len(task.prompts("test")) == 2


def test_gsm8k_one_file_holds_a_tenth_out_and_keeps_it_out(tmp_path):
    small = Gsm8k(str(jsonl(tmp_path / "a.jsonl", rows(0, 200))))
    large = Gsm8k(str(jsonl(tmp_path / "b.jsonl", rows(0, 400))))
    held_out, still = ({asked(p) for p in task.prompts("test")} for task in (small, large))
    assert 5 <= len(held_out) <= 40
    assert len(small.prompts("train")) + len(held_out) == 200
    assert held_out <= still
    assert not {asked(p) for p in large.prompts("train")} & held_out


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({}, "", ("no train.jsonl",)),
        ({"train.jsonl": rows(0, 3)}, "", ("no test.jsonl", "give one file")),
        ({"train.jsonl": rows(0, 3), "train.json": rows(0, 3), "test.jsonl": rows(9, 1)}, "", ("more than one train",)),
        ({"a.jsonl": [{"prompt": "x", "answer": "1"}]}, "a.jsonl", ("no column 'question'", "prompt, answer")),
        ({"a.jsonl": [{"question": f"{i}"} for i in range(60)]}, "a.jsonl", ("no column 'answer'", "question")),
        ({"a.jsonl": rows(0, 1)}, "a.jsonl", ("too few rows",)),
        ({"train.jsonl": [row("x", "#### many")], "test.jsonl": rows(9, 1)}, "", ("row 1 of the train", "'many'")),
        ({"train.jsonl": [row(" ", "#### 1")], "test.jsonl": rows(9, 1)}, "", ("row 1", "no question")),
        ({}, "none.jsonl", ("no such file",)),
        ({}, "no/such/folder", ("no such file",)),
    ],
)  # fmt: skip
def test_gsm8k_sources_that_are_wrong(tmp_path, files, source, words):
    for name, table in files.items():
        jsonl(tmp_path / name, table)
    with pytest.raises(UserError, match=r"task\.options\.source=") as caught:
        Gsm8k(str(tmp_path / source)).prompts("train")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_gsm8k_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "x", "answer": "1"}\n{"question": \n')
    (tmp_path / "b.parquet").write_text("no parquet")
    (tmp_path / "c.txt").write_text("x")
    for name, words in (("a.jsonl", "cannot be read"), ("b.parquet", "cannot be read"), ("c.txt", "no JSONL")):
        with pytest.raises(UserError, match=words):
            Gsm8k(str(tmp_path / name)).prompts("train")


@pytest.mark.parametrize("options", [{"shots": -1}, {"max_train": 1.5}, {"max_test": "all"}, {"source": ""}])
def test_gsm8k_options(options):
    [key] = options
    with pytest.raises(UserError, match=rf"task\.options\.{key}="):
        Gsm8k(**options)


@pytest.mark.slow
def test_gsm8k_hub_out_of_reach(tmp_path):
    code = (
        "from common.errors import UserError\nfrom common.tasks.gsm8k import Gsm8k\n"
        "try: Gsm8k().prompts('train')\nexcept UserError as error: print(error)"
    )
    started = time.monotonic()
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    for setting in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | setting, capture_output=True, text=True, check=True
        )
        [line] = run.stdout.splitlines()
        assert "task.options.source='openai/gsm8k' cannot be loaded from the hub" in line
        assert 'task.options.source="path"' in line
    assert time.monotonic() - started < 20, "the hub must not be asked again and again"


@pytest.mark.parametrize(
    "answer",
    ["18", "18.0", "$18", "$18.00", "18 dollars", "$18 per day", "x = 18", "9 + 9 = 18", "36/2", r"\frac{36}{2}", "+18",
     r"\boxed{18}", r"\$18", "18.", "**18**", "The answer is 18", "$18$", "1.8e1", r"\text{18}", "18 m²", "18 m^2",
     "१८", "１８", "18元", "18°C", "18\u200b", "18 $", "USD 18", "18 km/h", r"18\text{ dollars}",
     r"\boxed{\text{18 dollars}}", "1.8 × 10^1", r"1.8 \times 10^{1}", "|18|", "(18)", "Answer: $18", "3 x 6 = 18",
     "3 apples + 15 apples = 18 apples", "18 sq. ft.", "18 miles", "18 more apples", "18元钱", "18 min", "18,0",
     "$$18$$", "180e-1"],
)  # fmt: skip
def test_same_number(answer):
    assert same_number("18", answer)


@pytest.mark.parametrize(
    "answer",
    ["-18", "81", "1.8", "180", "18 or 19", "17 18", "18, 19", "18 19", "9 + 9", "", "eighteen", "18 = 19", "18!",
     "99999!", "9**9**9**9", "9^{9^{9^9}}", r"\sqrt{324}", r"\int_0^{18}", "18" * 60, "1 " * 40 + "18", "(",
     r"\frac{18}{0}", "18k", "18 thousand", "18 million", "18 hundred", "18 dozen", "18 halves", "18 and a half",
     "< 18", ">18", "≤ 18", "~18", "about 18", "less than 18", "at least 18", "not 18", "x != 18", "x ≠ 18",
     "x <= 18", "2x = 18", "not x = 18", "=> 18", "18x", "18i", r"18\pi", "18π", "18^2", "18²", "18 squared", "√18",
     r"\sqrt{18}", "2(18)", "18-", "18-20", "18 to 20", "18;20", "--18", "+-18", "±18", "0x12", "18:00", "18?", "18①",
     "18 3/4", "17 1/1", "1,8", "18,000", "18 is wrong", "18 - x", "1e18", "18/x", "18‰", "1e999999999", "half of 18",
     "18 / 0", "18 mln", "18 Mio", "18 Mrd.", "18 mil", "18 mille", "18 tausend", "18 Millionen", "18 millones", "18万",
     "18 万", "18千元", "18億円", "18만", "18 тысяч", "18 млн", "18 grand", "18 gross", "18 tens", "18 double", "18ish",
     "18 maybe", "18 negative", "18 under"],
)  # fmt: skip
def test_not_the_same_number(answer):
    assert not same_number("18", answer)


@pytest.mark.parametrize(
    ("number", "answers"),
    [
        ("-5", ["-5", "- 5", "minus 5", "negative 5", "−5", "–5", "－5", "-$5", "$-5", "-10/2", r"-\frac{10}{2}"]),
        ("2.5", ["2 1/2", "2½", "5/2", "2,5", r"2\frac12", r"2\frac{1}{2}", "2.50"]),
        ("0.5", ["½", "1/2", r"\frac12", "0,5", ".5", "50%", "0,500"]),
        ("50", ["50%", r"50\%", "50 percent"]),
        ("70000", ["70,000", "70 000", "70'000", "70\u202f000", "70{,}000", "70k", "70 thousand", "7e4", "7 × 10^4"]),
        ("1234567.5", ["1,234,567.5", "1.234.567,5", "1 234 567,5"]),
        ("18000000", ["18 million", "$18M", "18 million dollars"]),
        ("1000", ["10^3", "10³", "1k"]),
        ("3.5", ["3,5"]),
        ("1e+22", ["10^22"]),
        ("0", ["-0", "0.0"]),
    ],
)
def test_the_same_number_in_other_forms(number, answers):
    assert [answer for answer in answers if not same_number(number, answer)] == []
    other = str(value_of(number) + 1)
    assert [answer for answer in answers if same_number(other, answer)] == []


@pytest.mark.parametrize(
    ("reference", "answer"),
    [("5", "minus 5"), ("5", "-$5"), ("5", "–5"), ("35", "3,5"), ("1820", "18,20"), ("1234", "12,34"), ("0.333",
     "1/3"), ("3", "3.0000000001"), ("1000000", "1000000.4"), ("21", "2½"), ("2", "2 1/2"), ("7000", "70,00"),
     ("123456789", "123456788")],
)  # fmt: skip
def test_near_is_not_the_same(reference, answer):
    assert not same_number(reference, answer)


@given(st.text(st.sampled_from("0189 .,'-+$%/^=x×eE()|\\{}½²kmM~<>!ab\u0661\u202e\n"), max_size=60))
def test_any_text_is_a_number_or_none_at_once(text):
    """In milliseconds: no text makes a regular expression go back and forth for ever (pytest's limit would end it)."""
    value_of(text)
    value_of((text * 200)[:200])


@given(a=st.integers(-(10**7), 10**7), b=st.integers(-(10**7), 10**7), unit=st.sampled_from(["", " dollars", " km"]))
def test_same_number_for_any(a, b, unit):
    assert same_number(str(a), f"{a}{unit}")
    assert same_number(str(a), f"{a:,}")
    assert same_number(str(a), f"{a:.2f}")
    assert same_number(f"{a:,}", f"{a}")
    assert same_number(str(a), f"{a:_}".replace("_", " "))
    assert same_number(f"{a / 4:.2f}", f"{a / 4:.2f}".replace(".", ","))
    assert same_number(str(a), f"{b}{unit}") == (a == b)


def test_gsm8k_references_are_read_as_numbers(tmp_path):
    answers = ["#### 70,000", "#### $1,234.50", "18.0", "0,5", "#### -3", "#### 2 1/2"]
    jsonl(tmp_path / "train.jsonl", [row(f"q{i}", answer) for i, answer in enumerate(answers)])
    jsonl(tmp_path / "test.jsonl", rows(100, 1))
    task = Gsm8k(str(tmp_path))
    read = [prompt.data["answer"] for prompt in task.prompts("train")]
    assert read == ["70000", "$1,234.50", "18", "0,5", "-3", "2 1/2"]
    for prompt in task.prompts("train"):
        assert task.is_correct(prompt, says(f"<answer>{prompt.data['answer']}</answer>"))


@pytest.mark.parametrize("answer", ["18, 20", "18 or 20", "1/0", "nan", "x", "", "12,34,5"])
def test_gsm8k_refuses_a_reference_that_does_not_equal_itself(tmp_path, answer):
    jsonl(tmp_path / "train.jsonl", [row("a", "#### 1"), row("b", answer)])
    jsonl(tmp_path / "test.jsonl", rows(100, 1))
    with pytest.raises(UserError, match=r"row 2 of the train split .* does not end in a number|row 2 .* no answer"):
        Gsm8k(str(tmp_path)).prompts("train")


def test_gsm8k_csv_columns_by_name_and_numbers_of_few_bits(tmp_path):
    import datasets

    (tmp_path / "train.csv").write_text(
        '\ufeffid,Solution,Problem\n1,"70,000","a, b"\n2,0.1,c\n3,007,d\n', encoding="utf-8"
    )
    (tmp_path / "test.csv").write_text('id,Problem,Solution\n1,e,"so #### 3"\n')
    task = Gsm8k(str(tmp_path), question="Problem", answer="Solution")
    assert [(asked(p), p.data["answer"]) for p in task.prompts("train")] == [
        ("a, b", "70000"),
        ("c", "0.1"),
        ("d", "7"),
    ]
    with pytest.raises(UserError, match=r"no column 'question', only id, Solution, Problem; .*task\.options\.question"):
        Gsm8k(str(tmp_path)).prompts("train")
    with pytest.raises(UserError, match=r"task\.options\.question='x'"):
        Gsm8k(question="x", answer="x")

    (tmp_path / "gap.csv").write_text(
        "question,answer\n" + "".join(f"q{i},{i if i != 7 else ''}\n" for i in range(200))
    )
    with pytest.raises(UserError, match=r"row \d+ of the \w+ split .*''"):
        Gsm8k(str(tmp_path / "gap.csv")).prompts("train")

    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("float32")})
    for split in SPLITS:
        table = {"question": [f"{split} {i}" for i in range(3)], "answer": [0.1, 2.5, 3.0]}
        (tmp_path / "floats").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "floats" / f"{split}.parquet"))
    assert [p.data["answer"] for p in Gsm8k(str(tmp_path / "floats")).prompts("train")] == ["0.1", "2.5", "3"]


def test_reasoning_gym_refuses_a_generator_that_asks_something_else_each_time(monkeypatch):
    with pytest.raises(UserError, match=r"list_functions.*another question at each look"):
        ReasoningGym("list_functions")


def test_a_reference_that_is_no_number_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="'many' is not a number"):
        same_number("many", "3")


@pytest.mark.parametrize(
    ("text", "tags", "whole"),
    [
        ("<thinking>a</thinking><answer>5</answer>", 1.0, 1.0),
        ("\n<thinking>a\nb</thinking>\n <answer>5</answer>\n", 1.0, 1.0),
        ("so <thinking>a</thinking><answer>5</answer>", 1.0, 0.0),
        ("<thinking>a</thinking> so <answer>5</answer>", 1.0, 0.0),
        ("<thinking>a</thinking><answer>5</answer> so", 1.0, 0.0),
        ("<thinking></thinking><answer>5</answer>", 1.0, 0.0),
        ("<answer>5</answer>", 0.5, 0.0),
        ("<thinking>a</thinking>", 0.5, 0.0),
        ("<thinking>a", 0.25, 0.0),
        ("<answer>5</answer><thinking>a</thinking>", 0.5, 0.0),
        ("<thinking>a</thinking><answer>5</answer><answer>5</answer>", 0.5, 0.0),
        ("<thinking><thinking>a</thinking><answer>5</answer>", 0.75, 0.0),
        ("5", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_gsm8k_format_rewards(text, tags, whole):
    task = Gsm8k()
    got = rewards(task, Prompt("p", (), {"answer": "6"}), text)
    assert got == {"correct": 0.0, "tags": tags, "format": whole}


def test_gsm8k_itself():
    folder = Path(os.environ.get("NANOGRPO_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))
    if not folder.is_dir():
        pytest.skip("GSM8K is not here; NANOGRPO_GSM8K names its folder")
    task = Gsm8k(str(folder), shots=2)
    assert len(task.prompts("test")) == 1319
    assert len(task.prompts("train")) == 7473 - 2
    sample = [*task.prompts("test")[::7], *task.prompts("train")[::25]]
    for prompt, other in itertools.pairwise(sample):
        answer = prompt.data["answer"]
        assert task.is_correct(prompt, says(f"<thinking>Hm.</thinking><answer>{float(answer):,.2f}</answer>"))
        same = float(answer) == float(other.data["answer"])
        assert task.is_correct(prompt, says(f"<answer>{other.data['answer']}</answer>")) == same
        assert "<<" not in "".join(message["content"] for message in prompt.messages)


# Reasoning gym.


@pytest.mark.parametrize(
    "name", ["basic_arithmetic", "chain_sum", "countdown", "spell_backward", "sudoku", "word_ladder"]
)
def test_reasoning_gym_scores_in_another_process_what_was_made_here(name):
    made, other = (ReasoningGym(name, size=6, test_size=3, seed=5) for _ in range(2))
    for split in SPLITS:
        for prompt in made.prompts(split):
            kept = Prompt(prompt.id, (), json.loads(json.dumps(prompt.data)))
            assert other.is_correct(kept, says(f"<answer>{prompt.data['answer']}</answer>"))
            assert not other.is_correct(kept, says("<answer>no</answer>"))
            assert rewards(other, kept, prompt.data["answer"]) == {"correct": 0.0, "format": 0.0}


NARROW = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@given(seed=st.integers(0, 10**6))
def test_reasoning_gym_splits_share_nothing_even_where_questions_are_few(seed):
    task = ReasoningGym("chain_sum", size=60, test_size=60, seed=seed, settings=NARROW)
    test = [asked(prompt) for prompt in task.prompts("test")]
    assert len(set(test)) == 60
    assert not {asked(prompt) for prompt in task.prompts("train")} & set(test)
    again = ReasoningGym("chain_sum", size=10, test_size=60, seed=seed, settings=NARROW)
    assert [asked(prompt) for prompt in again.prompts("test")] == test, "the test must not depend on the training size"


def test_reasoning_gym_with_too_few_questions():
    with pytest.raises(UserError, match=r"test_size=300 is more than the \d+ different questions"):
        ReasoningGym("chain_sum", test_size=300, settings=NARROW).prompts("test")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "basic_aritmetic"}, "did you mean 'basic_arithmetic'?"),
        ({"dataset": "zzzzzz"}, "there are "),
        ({"dataset": "chain_sum", "settings": {"min_term": 2}}, "did you mean 'min_terms'"),
        ({"dataset": "chain_sum", "settings": {"seed": 2}}, "one level up: task.options.seed"),
        ({"dataset": "chain_sum", "settings": {"min_terms": 5, "max_terms": 2}}, "is refused by 'chain_sum'"),
        ({"dataset": "chain_sum", "size": 0}, "size=0"),
        ({"dataset": "chain_sum", "test_size": 2.5}, "test_size=2.5"),
        ({"dataset": "chain_sum", "seed": -4}, "seed=-4"),
    ],
)
def test_reasoning_gym_options(options, words):
    with pytest.raises(UserError, match=r"task\.options\.") as caught:
        ReasoningGym(**options)
    assert words in str(caught.value)


def test_reasoning_gym_generators_that_change_with_the_process(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match="set PYTHONHASHSEED=0"):
        ReasoningGym("ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    task = ReasoningGym("ransom_note", size=3, test_size=2)
    prompt = task.prompts("train")[0]
    changed = Prompt(prompt.id, prompt.messages, {**prompt.data, "question": "another one"})
    with pytest.raises(RuntimeError, match="set PYTHONHASHSEED=0"):
        task.is_correct(changed, says("<answer>True</answer>"))


def test_a_built_in_task_by_module_with_a_wrong_option():
    with pytest.raises(UserError, match=r"task\.options\.train_question=5 .* did you mean 'train_questions'"):
        make_task("common.tasks.warmup:Warmup", {"train_question": 5})


def test_gsm8k_reads_very_many_rows_when_they_are_looked_at(tmp_path):
    import datasets

    answers = [{"question": f"How many are {n}?", "answer": n + 0.1} for n in range(LOOKED_AT + 2)]
    table = datasets.Dataset.from_list(answers).cast_column("answer", datasets.Value("float32"))
    table.to_parquet(str(tmp_path / "train.parquet"))
    asked = [{"question": "  how many ARE 3? ", "answer": "1"}, {"question": "How many are 5? Or 6?", "answer": "1"}]
    jsonl(tmp_path / "test.jsonl", asked)
    (tmp_path / "test.jsonl").rename(tmp_path / "test.json")
    many, few = (Gsm8k(str(tmp_path), max_train=most).prompts("train") for most in (0, 30))
    assert len(many) == LOOKED_AT + 1, "without the one that is in the test"
    assert [many[place] for place in range(30)] == list(few)
    assert (many[3].id, many[3].data) == ("train-3", {"question": "How many are 4?", "answer": "4.1"})
    assert many[-1].data["question"] == f"How many are {LOOKED_AT + 1}?"


def test_gsm8k_csv_goes_to_the_disk_and_is_read_again_when_it_changes(tmp_path):
    """A row that is wrong is named by its number in the file."""
    rows = [f'"How many are {n},\nin all?",{n}' for n in range(9000)]
    file = tmp_path / "all.csv"
    file.write_text("question,answer\n" + "\n".join(rows) + "\n")
    prompts = [prompt for split in SPLITS for prompt in Gsm8k(str(file)).prompts(split)]
    written = {(f"How many are {n},\nin all?", str(n)) for n in range(9000)}
    assert {(asked(prompt), prompt.data["answer"]) for prompt in prompts} == written
    assert gsm8k._load_files("source", [file]).cache_files, "it is mapped from a file"
    file.write_text("question,answer\n" + "\n".join([*rows[:5000], "a,1,2"]) + "\n")
    with pytest.raises(UserError, match="row 5001 has not the 2 values that the first line names"):
        Gsm8k(str(file)).prompts("train")
    file.write_text("question,answer\n")
    with pytest.raises(UserError, match="it has no rows"):
        Gsm8k(str(file)).prompts("train")
    file.write_text("\n")
    with pytest.raises(UserError, match="no line that names the columns"):
        Gsm8k(str(file)).prompts("train")
