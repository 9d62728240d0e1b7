"""Read questions with reference answers from a file or from the hub: GSM8K, MATH, or a user's own."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bae.batch import Problem
from bae.tasks.tables import READERS, Row, read_table
from bae.text.verifier import Verifier
from bae.text.visible import quoted

SHOWN = 100
"""The characters of a bad reference that a message shows."""

Unreadable = Literal["fail", "drop"]
"""What happens to a row whose reference the verifier cannot read: an error, or the row is left out."""


class DatasetTask:
    """Hold the problems of a table, one in each row.

    Args:
        splits: {split: source}. A source is a file (.jsonl; .json with a list; .parquet; .csv) or
            `hub_name[:config]:split`. For a split with columns of its own, it is a mapping {source, question, answer,
            answer_after}. A source is read when its split is first asked for.
        question, answer: the columns of the question and of the answer.
        verifier: checks the answers.
        answer_after: the reference is the part of the answer column after the last place of this text. None takes the
            whole column.
        unreadable: what happens to rows whose reference the verifier cannot read. All references of a split are looked
            at when it is read.
    """

    def __init__(
        self,
        splits: Mapping[str, str | Mapping[str, str | None]],
        question: str,
        answer: str,
        verifier: Verifier,
        answer_after: str | None = None,
        unreadable: Unreadable = "fail",
    ) -> None:
        common = {"question": question, "answer": answer, "answer_after": answer_after}
        self.sources = {
            split: Source(**(common | ({"source": given} if isinstance(given, str) else dict(given))))  # type: ignore[arg-type]
            for split, given in splits.items()
        }
        self.verifier = verifier
        self.unreadable = unreadable
        self._problems: dict[str, list[Problem]] = {}

    def size(self, split: str) -> int:
        """Return the number of problems in a split. Raises as Source.problems does, or ValueError for no such split."""
        return len(self._split(split))

    def problem(self, split: str, index: int) -> Problem:
        """Return problem number `index` of a split. Raises as `size` does."""
        return self._split(split)[index]

    def _split(self, split: str) -> list[Problem]:
        """Return the problems of a split, and read them the first time."""
        if split not in self.sources:
            raise ValueError(f"the task has no split {split!r}; it has {', '.join(self.sources)}")
        if split not in self._problems:
            self._problems[split] = self.sources[split].problems(split, self.verifier, self.unreadable)
        return self._problems[split]


@dataclass(frozen=True)
class Source:
    """Hold where a split comes from. The fields are those of DatasetTask."""

    source: str
    question: str
    answer: str
    answer_after: str | None = None

    def problems(self, split: str, verifier: Verifier, unreadable: Unreadable) -> list[Problem]:
        """Read the problems; `split` is named in their ids and in messages. The others are as in DatasetTask.

        Raises:
            FileNotFoundError: one sentence, if there is no such file.
            ValueError: one sentence, if the file cannot be read, lacks a column or has a row without a question; or as
                readable_rows does.
        """
        if Path(self.source).suffix in READERS and not Path(self.source).is_file():
            raise FileNotFoundError(
                f"task.splits.{split}={self.source}: no such file; name a .jsonl or .csv file, set BAE_DATA to the "
                "folder that has it, or name a hub dataset as in openai/gsm8k:main:train"
            )
        where = f"task.splits.{split}={self.source}"
        try:
            rows = read_table(self.source)
        except ValueError as error:
            raise ValueError(f"task.splits.{split}: {error}") from error
        for column in (self.question, self.answer):
            if not any(column in row for row in rows):
                has = ", ".join(rows[0]) if rows else "no rows"
                raise ValueError(f"{where}: no column {column!r}; it has {has}")
        self._check_questions(where, rows)
        references = [self._reference(row) for row in rows]
        return [
            Problem(f"{split}/{index}", str(rows[index][self.question]), reference, rows[index])
            for index, reference in readable_rows(where, references, verifier, unreadable, "task.unreadable")
        ]

    def _check_questions(self, where: str, rows: Sequence[Row]) -> None:
        """Refuse rows without a question. Raises ValueError, one sentence with the first one."""
        for number, row in enumerate(rows, 1):
            value = row.get(self.question)
            if not isinstance(value, str) or not value.strip():
                blank = not value or (isinstance(value, str) and not value.strip())
                shown = " is missing or empty" if blank else f" is {quoted(str(value), SHOWN)}, not a text"
                raise ValueError(f"{where}: in row {number}, {self.question!r}{shown}; correct or remove the row")

    def _reference(self, row: Row) -> str | None:
        """Cut the reference out of the answer column; None if there is none."""
        value = row.get(self.answer)
        if not isinstance(value, (str, int, float)) or value != value:  # NaN stands for an empty cell
            return None
        text = str(value)
        if self.answer_after is not None:
            _, mark, text = text.rpartition(self.answer_after)
            if not mark:
                return None
        return text.strip()


def readable_rows(
    where: str, references: Sequence[str | None], verifier: Verifier, unreadable: Unreadable, key: str
) -> list[tuple[int, str]]:
    """Return the rows whose references can be read, with these.

    Args:
        where: what the references are of, for messages.
        references: of each row; None if it has none.
        verifier: tells which of them it can read.
        unreadable: what happens to the other rows. If they are left out, a warning says how many.
        key: the configuration key of `unreadable`, for messages.

    Raises:
        ValueError: one sentence with the first bad row, if there is one and `unreadable` is "fail" or no row is left.
    """
    faults = {text: "there is none" if text is None else verifier.fault(text) for text in dict.fromkeys(references)}
    good = [(row, text) for row, text in enumerate(references) if text is not None and faults[text] is None]
    if len(good) == len(references):
        return good
    bad = next(row for row, text in enumerate(references) if faults[text] is not None)
    text = references[bad]
    shown = "" if text is None else f", {quoted(text, SHOWN)}"
    first = f"the first in row {bad + 1}{shown}: {faults[text]}"
    count = f"{len(references) - len(good)} of {len(references)}"
    if unreadable == "fail" or not good:
        advice = "correct it" + (f", or leave such rows out with {key}=drop" if good else "")
        raise ValueError(f"{where}: {count} references cannot be read, {first}; {advice}")
    warnings.warn(f"{where}: {count} rows are left out, because their references cannot be read, {first}", stacklevel=2)
    return good
