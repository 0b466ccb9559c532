"""GSM8K: grade-school word problems (arXiv 2110.14168), reasoning in ``<thinking>``, the number in ``<answer>``.

The answer is compared as a number (``common/tasks/numbers.py``); two smaller rewards lead a model that has never seen
the tags to them. Rows come from the hub or from local files, through ``datasets``; nothing is read before the first
prompt is asked for, since reward workers need none of it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

from common.errors import UserError, brief
from common.prompts import LOOKED_AT
from common.protocols import RewardFunction, Split
from common.tasks import Prompts, answer_in, check_whole
from common.tasks.numbers import same_number, value_of
from common.types import Completion, Message, Prompt

SYSTEM_PROMPT = (
    "Solve the problem. Respond in the following format: "
    "<thinking>step by step reasoning</thinking><answer>number</answer>"
)
_TAGS = ("<thinking>", "</thinking>", "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<thinking>(.*?)</thinking>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_HUB_TIMEOUT_S = 10.0
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class _Row:
    question: str
    solution: str
    answer: str


class Gsm8k:
    """GSM8K word problems (or your own, in its columns), answered in <thinking> and <answer> tags.

    Options: ``source`` is a hub id, a folder with ``train`` and ``test`` files (JSONL, JSON, CSV or Parquet), or one
    such file, of which a tenth is held out for the test; ``question`` and ``answer`` name its columns, the answer a
    number or a text that ends in ``#### NUMBER``; ``shots`` puts that many worked examples before each question (the
    first training rows, which are then not asked); ``max_train`` and ``max_test`` keep that many questions (0: all).
    """

    def __init__(
        self,
        source: str = "openai/gsm8k",
        shots: int = 0,
        max_train: int = 0,
        max_test: int = 0,
        question: str = "question",
        answer: str = "answer",
    ) -> None:
        for key, value in (("shots", shots), ("max_train", max_train), ("max_test", max_test)):
            check_whole(key, value, 0)
        if not isinstance(source, str) or not source:
            raise UserError(f"task.options.source={source!r} must be a hub id, a folder or a file")
        for key, column in (("question", question), ("answer", answer)):
            if not isinstance(column, str) or not column or question == answer:
                raise UserError(f"task.options.{key}={column!r} must be the name of a column, and no other's")
        self._source, self._shots, self._columns = source, shots, (question, answer)
        self._most: dict[Split, int] = {"train": max_train, "test": max_test}
        self._places: dict[Split, Sequence[int]] = {}
        # What is looked at again is not read again; of very many rows the rest stays on the disk.
        self._row = functools.lru_cache(maxsize=2 * LOOKED_AT)(self._read_row)
        self.reward_weights: Mapping[str, float] = {"correct": 1.0, "tags": 0.2, "format": 0.2}
        self.rewards: Mapping[str, RewardFunction] = {
            "correct": lambda prompt, completion: float(self.is_correct(prompt, completion)),
            "tags": _tags_reward,
            "format": _format_reward,
        }

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The rows in the order of the source, without the training rows that ask a test question."""
        if not self._places:
            self._load()
        return Prompts(len(self._places[split]), lambda index: self._prompt(split, index))

    def is_correct(self, prompt: Prompt, completion: Completion) -> bool:
        """The one number in the ``<answer>`` tags equals the reference. See ``common.tasks.answer_in``."""
        answer = answer_in(completion.text)
        return answer is not None and same_number(prompt.data["answer"], answer)

    def _prompt(self, split: Split, index: int) -> Prompt:
        row = self._row(split, self._places[split][index])
        messages: list[Message] = [{"role": "system", "content": SYSTEM_PROMPT}]
        for example in self._examples:
            worked = f"<thinking>{example.solution}</thinking><answer>{example.answer}</answer>"
            messages.append({"role": "user", "content": example.question})
            messages.append({"role": "assistant", "content": worked})
        messages.append({"role": "user", "content": row.question})
        data = {"question": row.question, "answer": row.answer}
        return Prompt(id=f"{split}-{index}", messages=tuple(messages), data=data)

    def _load(self) -> None:
        self._tables = _read(self._source, *self._columns)
        train, test = (self._tables[split] for split in get_args(Split))
        asked_in_test = set(_questions(test))
        kept = [place for place, key in enumerate(_questions(train)) if key not in asked_in_test]
        if self._shots >= len(kept):
            raise UserError(
                f"task.options.shots={self._shots} leaves none of the {len(kept)} training rows of "
                f"task.options.source={self._source!r} to ask; use fewer"
            )
        self._examples = [self._row("train", place) for place in kept[: self._shots]]
        places: dict[Split, Sequence[int]] = {"train": kept[self._shots :], "test": range(len(test))}
        places = {split: places[split][: most or None] for split, most in self._most.items()}
        for split in places:
            if len(places[split]) <= LOOKED_AT:  # a row that is wrong is found before the run, unless there are many
                for place in places[split]:
                    self._row(split, place)
        self._places = places

    def _read_row(self, split: Split, place: int) -> _Row:
        question, text = self._tables[split][place].values()
        where = f"row {place + 1} of the {split} split of task.options.source={self._source!r}"
        if not isinstance(question, str) or not question.strip() or not isinstance(text, str | int | float | Decimal):
            raise UserError(f"{where} has no question or no answer; both must be text")
        solution, mark, answer = str(text).rpartition("####")
        answer = answer.strip()
        value = value_of(answer)
        if value is None:  # it would not equal itself
            raise UserError(
                f"{where} has an answer that does not end in a number: {answer[-60:]!r}; write '#### NUMBER'"
            )
        if value.denominator == 1:
            answer = str(value)  # 70,000 as 70000
        # The calculator notes (<<48/2=24>>) are no part of the reasoning.
        solution = re.sub(r"<<.*?>>", "", solution).strip() if mark else f"The answer is {answer}."
        return _Row(question.strip(), solution, answer)


def _tags_reward(prompt: Prompt, completion: Completion) -> float:
    """A quarter for each of the four tags that is there exactly once and after the one before it."""
    count, end = 0, 0
    for tag in _TAGS:
        place = completion.text.find(tag)
        if completion.text.count(tag) == 1 and place >= end:
            count, end = count + 1, place + len(tag)
    return count / len(_TAGS)


def _format_reward(prompt: Prompt, completion: Completion) -> float:
    """1 where the completion is the two blocks, filled, each tag once, and nothing around them."""
    if any(completion.text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    match = _WHOLE.fullmatch(completion.text)
    return float(match is not None and match[1].strip() != "" and match[2].strip() != "")


def _questions(table: Any) -> Iterator[str]:
    """The first column, some thousands of rows at a time, up to case and space."""
    column = table.column_names[0]
    for batch in table.select_columns([column]).iter(batch_size=4096):
        yield from (" ".join(str(question).split()).lower() for question in batch[column])


def _read(source: str, question: str, answer: str) -> dict[Split, Any]:
    """The source's two splits as tables of these two columns, which stay on the disk."""
    setting = f"task.options.source={source!r}"
    splits: tuple[Split, ...] = get_args(Split)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _KINDS:
            raise UserError(f"{setting} is no JSONL, JSON, CSV or Parquet file; give one that is")
        return _held_out(setting, _columns(setting, _load_files(setting, [path]), question, answer))
    if path.is_dir():
        tables = {split: _load_files(setting, _split_files(setting, path, split)) for split in splits}
    elif path.suffix in _KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{setting}: there is no such file or folder; paths start at {os.getcwd()!r}")
    else:
        tables = _load_from_hub(source)
    return {split: _columns(f"the {split} split of {setting}", tables[split], question, answer) for split in splits}


def _columns(where: str, table: Any, question: str, answer: str) -> Any:
    for key, column in (("question", question), ("answer", answer)):
        if column not in table.column_names:
            names = ", ".join(table.column_names)
            raise UserError(f"{where} has no column {column!r}, only {names}; name the right one as task.options.{key}")
    if not len(table):
        raise UserError(f"{where} is empty; give it rows")
    table = table.select_columns([question, answer])
    if getattr(table.features[answer], "dtype", "") in ("float16", "float32"):
        import datasets

        # What is held in few bits is read as its shortest decimal: 0.1, not 0.10000000149.
        table = table.cast_column(answer, datasets.Value("string"))
    return table


def _held_out(setting: str, table: Any) -> dict[Split, Any]:
    """By the question, not by chance or place: it stays on its side when rows are added, and its copies go along."""
    digests = (hashlib.sha256(question.encode()).hexdigest() for question in _questions(table))
    sides: dict[Split, list[int]] = {"train": [], "test": []}
    for place, digest in enumerate(digests):
        sides["train" if int(digest, 16) % 10 else "test"].append(place)
    if not all(sides.values()):
        raise UserError(
            f"{setting} has too few rows ({len(table)}) to hold a tenth out for the test; give a folder with "
            "train.jsonl and test.jsonl"
        )
    return {split: table.select(places) for split, places in sides.items()}


def _split_files(setting: str, folder: Path, split: Split) -> list[Path]:
    """Shards (train-00000-of-00002.parquet) too; the hub's copy keeps them in main/."""
    files = [
        file
        for place in (folder, folder / "data", folder / "main")
        for file in sorted(place.glob(f"{split}*"))
        if file.suffix in _KINDS and re.fullmatch(rf"{split}(-\d+-of-\d+)?", file.stem)
    ]
    if not files:
        names = " or ".join(split + suffix for suffix in _KINDS)
        raise UserError(
            f"{setting} has no {names}; add it, or give one file, of which a tenth is held out for the test"
        )
    if len({(file.parent, file.suffix) for file in files}) > 1:
        listed = ", ".join(str(file.relative_to(folder)) for file in files)
        raise UserError(f"{setting} has more than one {split} split: {listed}; keep one")
    return files


def _load_files(setting: str, files: list[Path]) -> Any:
    """One table of files of one kind. What ``datasets`` makes of them lies in its cache on the disk."""
    import datasets

    kind, names = _KINDS[files[0].suffix], [str(file.resolve()) for file in files]
    datasets.disable_progress_bars()  # local files take a moment
    try:
        if kind == "csv":
            changed = [os.stat(name).st_mtime_ns for name in names]  # or the cache would not know
            return datasets.Dataset.from_generator(_csv_rows, gen_kwargs={"files": names, "changed": changed})
        return datasets.load_dataset(kind, data_files={"train": names}, split="train")
    except Exception as error:
        why = brief(error.__cause__ or error)
        raise UserError(f"{setting}: {', '.join(names)} cannot be read ({why}); fix the file") from error


def _csv_rows(files: list[str], changed: list[int]) -> Iterator[dict[str, str]]:
    """Every value as text: pandas would make 18.0 of whole numbers beside a gap, and nan of "None"."""
    for file in files:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines, strict=True)
            names = rows.fieldnames
            if not names:
                raise ValueError("it has no line that names the columns")
            number = 0
            for number, row in enumerate(rows, 1):
                if None in row or None in row.values():
                    raise ValueError(f"row {number} has not the {len(names)} values that the first line names")
                yield row
            if not number:
                raise ValueError("it has no rows")


def _load_from_hub(source: str) -> dict[Split, Any]:
    import datasets
    import huggingface_hub

    cure = 'give a local folder or file: task.options.source="path"'
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not offline:  # one question with a time limit first: ``load_dataset`` would try again for half a minute
            huggingface_hub.HfApi().dataset_info(source, timeout=_HUB_TIMEOUT_S)
        name = "main" if source == "openai/gsm8k" else None
        return {split: datasets.load_dataset(source, name, split=split) for split in get_args(Split)}
    except Exception as error:
        if not offline:
            cure += ", or set HF_HUB_OFFLINE=1 where it was downloaded before"
        why = f"{type(error).__name__}: {brief(error)}"
        raise UserError(f"task.options.source={source!r} cannot be loaded from the hub ({why}); {cure}") from error
