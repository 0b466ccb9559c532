"""GSM8K: grade-school word problems (arXiv 2110.14168), reasoning in ``<thinking>``, the number in ``<answer>``.

The answer is compared as a number (``common/tasks/numbers.py``), so ``70,000``, ``$70000.00`` and
``\\frac{140000}{2}`` are the same; two smaller rewards lead a model that has never seen the tags to them. Rows come
from the hub or from local files, through ``datasets``; nothing is read before the first prompt is asked for, since
reward workers need none of it.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.prompts import LOOKED_AT
from common.protocols import RewardFunction, Split
from common.tasks import Prompts, answer_in
from common.tasks.numbers import same_number, value_of
from common.types import Completion, Message, Prompt

SYSTEM_PROMPT = (
    "Solve the problem. Respond in the following format: "
    "<thinking>step by step reasoning</thinking><answer>number</answer>"
)
_TAGS = ("<thinking>", "</thinking>", "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<thinking>(.*?)</thinking>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_HUB_TIMEOUT_S = 10.0
_BEGINNING = 40


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
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"task.options.{key}={value!r} must be a whole number of at least 0")
        if not isinstance(source, str) or not source:
            raise UserError(f"task.options.source={source!r} must be a hub id, a folder or a file")
        for key, column in (("question", question), ("answer", answer)):
            if not isinstance(column, str) or not column or question == answer:
                raise UserError(f"task.options.{key}={column!r} must be the name of a column, and no other's")
        self._source, self._shots, self._columns = source, shots, (question, answer)
        self._most: dict[Split, int] = {"train": max_train, "test": max_test}
        self._rows: dict[Split, Sequence[_Row]] = {}
        self._examples: Sequence[_Row] = ()
        self.reward_weights: Mapping[str, float] = {"correct": 1.0, "tags": 0.2, "format": 0.2}
        self.rewards: Mapping[str, RewardFunction] = {
            "correct": self._correct,
            "tags": _tags_reward,
            "format": _format_reward,
        }

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The rows in the order of the source, without the training rows that ask a test question."""
        if not self._rows:
            self._load()
        rows = self._rows[split]
        return Prompts(len(rows), lambda index: self._prompt(split, index))

    def is_correct(self, prompt: Prompt, completion: Completion) -> bool:
        """The one number in the ``<answer>`` tags equals the reference. See ``common.tasks.answer_in``."""
        answer = answer_in(completion.text)
        return answer is not None and same_number(prompt.data["answer"], answer)

    def _correct(self, prompt: Prompt, completion: Completion) -> float:
        return float(self.is_correct(prompt, completion))

    def _prompt(self, split: Split, index: int) -> Prompt:
        row = self._rows[split][index]
        messages: list[Message] = [{"role": "system", "content": SYSTEM_PROMPT}]
        for example in self._examples:
            worked = f"<thinking>{example.solution}</thinking><answer>{example.answer}</answer>"
            messages.append({"role": "user", "content": example.question})
            messages.append({"role": "assistant", "content": worked})
        messages.append({"role": "user", "content": row.question})
        data = {"question": row.question, "answer": row.answer}
        return Prompt(id=f"{split}-{index}", messages=tuple(messages), data=data)

    def _load(self) -> None:
        tables = _read(self._source, *self._columns)
        question = self._columns[0]
        asked_in_test = {_key(text) for text in _texts(tables["test"], question)}
        beginnings = {key[:_BEGINNING] for key in asked_in_test}  # to look at little of a long question
        kept = [
            index
            for index, text in enumerate(_texts(tables["train"], question))
            if _beginning(text) not in beginnings or _key(text) not in asked_in_test
        ]
        if self._shots >= len(kept):
            raise UserError(
                f"task.options.shots={self._shots} leaves none of the {len(kept)} training rows of "
                f"task.options.source={self._source!r} to ask; use fewer"
            )
        train, most = _Rows(self._source, "train", tables["train"], self._columns, kept), self._most
        self._examples = [train[index] for index in range(self._shots)]
        test = _Rows(self._source, "test", tables["test"], self._columns, range(len(tables["test"])))
        parts: dict[Split, _Rows] = {
            "train": train.part(self._shots, most["train"]),
            "test": test.part(0, most["test"]),
        }
        for split, rows in parts.items():
            # A row that is wrong is found before the run, unless there are very many.
            self._rows[split] = list(rows) if len(rows) <= LOOKED_AT else rows


def _tags_reward(prompt: Prompt, completion: Completion) -> float:
    """A quarter for each of the four tags that is there exactly once and after the one before it."""
    found, end = 0, 0
    for tag in _TAGS:
        place = completion.text.find(tag)
        if completion.text.count(tag) == 1 and place >= end:
            found, end = found + 1, place + len(tag)
    return found / len(_TAGS)


def _format_reward(prompt: Prompt, completion: Completion) -> float:
    """1 where the completion is the two blocks, filled, each tag once, and nothing around them."""
    if any(completion.text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    match = _WHOLE.fullmatch(completion.text)
    return float(match is not None and match[1].strip() != "" and match[2].strip() != "")


def _key(question: str) -> str:
    return " ".join(question.split()).lower()


def _beginning(question: str) -> str:
    """Of ``_key(question)``."""
    key = _key(question[: 4 * _BEGINNING])
    return (key if len(key) > _BEGINNING else _key(question))[:_BEGINNING]


def _texts(table: Any, column: str) -> Iterator[str]:
    """A column's values, some thousands at a time."""
    for batch in table.select_columns([column]).iter(batch_size=4096):
        yield from map(str, batch[column])


class _Rows(Sequence[_Row]):
    """Rows of a table, read from it when they are looked at: a million stay on the disk."""

    def __init__(self, source: str, split: Split, table: Any, columns: tuple[str, str], places: Sequence[int]) -> None:
        self._source, self._split, self._columns, self._places = source, split, columns, places
        self._table = table.select_columns(list(columns))
        # What is held in few bits is read as its shortest decimal: 0.1, not 0.10000000149.
        kinds = [getattr(table.features[column], "dtype", "") for column in columns]
        self._short = [kind if kind in ("float16", "float32") else "" for kind in kinds]

    def part(self, start: int, most: int) -> _Rows:
        places = self._places[start:][: most or None]
        return _Rows(self._source, self._split, self._table, self._columns, places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = self._places[index]
        row = self._table[place]
        values = [row[column] for column in self._columns]
        for position, kind in enumerate(self._short):
            if kind and values[position] is not None:
                import numpy as np

                values[position] = str(getattr(np, kind)(values[position]))
        return _row(self._source, self._split, place, *values)


def _row(source: str, split: Split, index: int, question: Any, text: Any) -> _Row:
    where = f"row {index + 1} of the {split} split of task.options.source={source!r}"
    if not isinstance(question, str) or not question.strip() or not isinstance(text, str | int | float | Decimal):
        raise UserError(f"{where} has no question or no answer; both must be text")
    solution, mark, answer = str(text).rpartition("####")
    answer = answer.strip()
    value = value_of(answer)
    if value is None:  # it would not equal itself
        raise UserError(f"{where} has an answer that does not end in a number: {answer[-60:]!r}; write '#### NUMBER'")
    if value.denominator == 1:
        answer = str(value)  # 70,000 as 70000
    # The calculator notes (<<48/2=24>>) are no part of the reasoning.
    solution = re.sub(r"<<.*?>>", "", solution).strip() if mark else f"The answer is {answer}."
    return _Row(question.strip(), solution, answer)


def _read(source: str, question: str, answer: str) -> dict[Split, Any]:
    """The source's two splits as tables with these two columns."""
    path = Path(source).expanduser()
    if path.is_dir():
        tables = _read_folder(source, path)
    elif path.is_file():
        tables = _read_file(source, path, question)
    elif path.suffix in _READERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"task.options.source={source!r}: there is no such file or folder; paths start at {os.getcwd()!r}"
        )
    else:
        tables = _read_hub(source)
    for split, table in tables.items():
        for key, column in (("question", question), ("answer", answer)):
            if column not in table.column_names:
                raise UserError(
                    f"the {split} split of task.options.source={source!r} has no column {column!r}, only "
                    f"{', '.join(table.column_names)}; name the right one as task.options.{key}"
                )
        if not len(table):
            raise UserError(f"the {split} split of task.options.source={source!r} is empty; give it rows")
    return tables


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _read_folder(source: str, folder: Path) -> dict[Split, Any]:
    tables: dict[Split, Any] = {}
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        # Shards (train-00000-of-00002.parquet) too; the hub's copy keeps them in main/.
        files = [
            file
            for place in (folder, folder / "data", folder / "main")
            for file in sorted(place.glob(f"{split}*"))
            if file.suffix in _READERS and re.fullmatch(rf"{split}(-\d+-of-\d+)?", file.stem)
        ]
        if not files:
            raise UserError(
                f"task.options.source={source!r} has no {split}.jsonl, {split}.json, {split}.csv or {split}.parquet; "
                "add it, or give one file, of which a tenth is held out for the test"
            )
        if len({(file.parent, file.suffix) for file in files}) > 1:
            listed = ", ".join(str(file.relative_to(folder)) for file in files)
            raise UserError(f"task.options.source={source!r} has more than one {split} split: {listed}; keep one")
        tables[split] = _load_files(source, files)
    return tables


def _read_file(source: str, file: Path, question: str) -> dict[Split, Any]:
    if file.suffix not in _READERS:
        raise UserError(f"task.options.source={source!r} is no JSONL, JSON, CSV or Parquet file; give one that is")
    rows = _load_files(source, [file])
    if question not in rows.column_names:
        return {"train": rows}  # what is wrong with it is said in one place, by the caller
    # By the question, not by chance or place: it stays on its side when rows are added, and its copies go along.
    digests = (hashlib.sha256(_key(asked).encode()).hexdigest() for asked in _texts(rows, question))
    held_out = [int(digest, 16) % 10 == 0 for digest in digests]
    if len(set(held_out)) < 2:
        raise UserError(
            f"task.options.source={source!r} has too few rows ({len(rows)}) to hold a tenth out for the test; "
            "give a folder with train.jsonl and test.jsonl"
        )
    return {
        "train": rows.select([i for i, out in enumerate(held_out) if not out]),
        "test": rows.select([i for i, out in enumerate(held_out) if out]),
    }


def _load_files(source: str, files: list[Path]) -> Any:
    import datasets

    kind = _READERS[files[0].suffix]
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # local files take a moment
    try:
        if kind == "csv":
            return datasets.concatenate_datasets([_csv_table(file) for file in files])
        return datasets.load_dataset(kind, data_files={"train": [str(file) for file in files]}, split="train")
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        listed = ", ".join(str(file) for file in files)
        raise UserError(f"task.options.source={source!r}: {listed} cannot be read ({cause}); fix the file") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _csv_table(file: Path) -> Any:
    """A CSV file's columns, all as text: pandas would make 18.0 of whole numbers beside a gap, and nan of "None". They
    go to the disk some thousands of rows at a time, as the other kinds' do, and stay there while the table is used."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with (
        file.open(newline="", encoding="utf-8-sig") as lines,
        tempfile.TemporaryDirectory(prefix="csv-", dir=cache) as folder,  # gone at once; what is mapped stays
    ):
        rows = (row for row in csv.reader(lines, strict=True) if row)
        names = next(rows, None)
        if names is None:
            raise ValueError("it has no line that names the columns")
        features = datasets.Features({name: datasets.Value("string") for name in names})
        with ArrowWriter(path=f"{folder}/table.arrow", features=features) as writer:
            done = 0
            while batch := list(itertools.islice(rows, 4096)):
                for number, row in enumerate(batch, done + 1):
                    if len(row) != len(names):
                        raise ValueError(
                            f"row {number} has {len(row)} values, and the first line names {len(names)} columns"
                        )
                writer.write_batch({name: [row[i] for row in batch] for i, name in enumerate(names)})
                done += len(batch)
            writer.finalize()
        return datasets.Dataset.from_file(f"{folder}/table.arrow")


def _read_hub(source: str) -> dict[Split, Any]:
    import datasets
    import huggingface_hub

    cure = 'give a local folder or file: task.options.source="path"'
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not offline:  # one question with a time limit first: ``load_dataset`` would try again for half a minute
            huggingface_hub.HfApi().dataset_info(source, timeout=_HUB_TIMEOUT_S)
        name = "main" if source == "openai/gsm8k" else None
        return {"train": datasets.load_dataset(source, name, split="train"),
                "test": datasets.load_dataset(source, name, split="test")}  # fmt: skip
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not offline:
            cure += ", or set HF_HUB_OFFLINE=1 where it was downloaded before"
        raise UserError(f"task.options.source={source!r} cannot be loaded from the hub ({why}); {cure}") from error
