"""Questions with reference answers from a file or from the hub: GSM8K, MATH, or a user's own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bae.batch import Problem
from bae.text.verifier import Verifier

FILES = (".jsonl", ".json", ".parquet")


class DatasetTask:
    """Rows of a table, one problem each.

    splits: {split: source}; a source is a file (.jsonl; .json, a list; .parquet) or `hub_name[:config]:split`, or a
        mapping {source, question, answer, answer_after} for a split with columns of its own. It is read when its
        split is first asked for.
    question, answer: columns. answer_after: the reference is what follows this text in the column; None for all.
    """

    def __init__(
        self,
        splits: Mapping[str, str | Mapping[str, str | None]],
        question: str,
        answer: str,
        verifier: Verifier,
        answer_after: str | None = None,
    ):
        common = {"question": question, "answer": answer, "answer_after": answer_after}
        self.sources = {
            split: Source(**(common | ({"source": given} if isinstance(given, str) else dict(given))))  # type: ignore[arg-type]
            for split, given in splits.items()
        }
        self.verifier = verifier
        self._problems: dict[str, list[Problem]] = {}

    def size(self, split: str) -> int:
        return len(self._split(split))

    def problem(self, split: str, index: int) -> Problem:
        return self._split(split)[index]

    def _split(self, split: str) -> list[Problem]:
        if split not in self.sources:
            raise ValueError(f"the task has no split {split!r}; it has {', '.join(self.sources)}")
        if split not in self._problems:
            self._problems[split] = self.sources[split].problems(split)
        return self._problems[split]


@dataclass(frozen=True)
class Source:
    """Where a split comes from; the fields are DatasetTask's."""

    source: str
    question: str
    answer: str
    answer_after: str | None = None

    def problems(self, split: str) -> list[Problem]:
        """Raises FileNotFoundError or ValueError, one sentence, for a file that is not there or lacks a column."""
        if Path(self.source).suffix in FILES and not Path(self.source).is_file():
            raise FileNotFoundError(
                f"task.splits.{split}={self.source}: no such file; name a .jsonl file, set BAE_DATA to the folder that "
                "has it, or name a hub dataset as in openai/gsm8k:main:train"
            )
        rows = read_table(self.source)
        for column in (self.question, self.answer):
            if not rows or column not in rows[0]:
                has = ", ".join(rows[0]) if rows else "no rows"
                raise ValueError(f"task.splits.{split}={self.source}: no column {column!r}; it has {has}")
        return [
            Problem(f"{split}/{index}", str(row[self.question]), self._reference(str(row[self.answer])))
            for index, row in enumerate(rows)
        ]

    def _reference(self, answer: str) -> str:
        return (answer if self.answer_after is None else answer.rpartition(self.answer_after)[2]).strip()


def read_table(source: str) -> list[dict[str, Any]]:
    """Rows of a file or of a hub dataset. Raises ValueError, one sentence, for what cannot be read."""
    suffix = Path(source).suffix
    if suffix == ".parquet":
        import pandas

        return pandas.read_parquet(source).to_dict("records")
    if suffix == ".json":
        return json.loads(Path(source).read_text(encoding="utf-8"))
    if suffix == ".jsonl":
        lines = Path(source).read_text(encoding="utf-8").split("\n")  # splitlines cuts inside strings, at U+2028
        return [_parsed(line, source, number) for number, line in enumerate(lines, 1) if line.strip()]
    return _from_hub(source)


def _parsed(line: str, source: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {number}: not JSON ({error.msg}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{source}, line {number}: not a JSON object; each line must be one")
    return row


def _from_hub(source: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source} is no file, and hub datasets need: pip install 'blockwise-advantage[hub]'"
        ) from error
    name, *config, split = source.split(":")
    return load_dataset(name, *config, split=split).to_list()
