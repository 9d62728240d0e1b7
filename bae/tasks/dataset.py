"""Read questions with reference answers from files or from the hub, also with options, aliases or paragraphs."""

import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bae.batch import Problem
from bae.tasks.rows import AddColumns, WithColumns
from bae.tasks.tables import ABSENT, SUFFIXES, Row, Rows, cell, read_table
from bae.text.verifier import Verifier
from bae.text.visible import quoted

SHOWN = 100
"""The characters of a bad reference that a message shows."""

Unreadable = Literal["fail", "drop"]
"""What happens to a row whose reference the verifier cannot read: an error, or the row is left out."""


class DatasetTask:
    """Hold the problems of tables, one in each row.

    A problem is a function of its split and index alone, so the order of a run is one of its seed (bae.tasks.loader),
    whether rows are held or streamed. Where a split has several sources, their problems alternate evenly.

    Args:
        splits: {split: source, or a list of sources}. A source is a file (.jsonl; .json with a list; .parquet; .csv) or
            `hub_name[:config]:split`; or a mapping with the fields of Source, for a source with columns of its own, a
            weight, a revision, or of which not all rows are wanted. A source is read when its split is first asked for.
        question, answer: the columns of the question and of the answer, for sources that do not name theirs.
        verifier: checks the answers.
        answer_after: the reference is the part of the answer column after the last place of this text. None takes the
            whole column.
        unreadable: what happens to rows whose reference the verifier cannot read. All references of a split are looked
            at when it is read.
        streaming: whether rows stay on the disk, as in `bae.tasks.tables.read_table`.
        reference_lines: the column of what the verifier is given below the answer, each on a line of its own: other
            right answers for ExactVerifier, or the options for ChoiceVerifier (bae.text.short_answers). A cell is a
            text, or a list of texts. None: the verifier is given the answer alone.
        add_columns: makes columns of those that a row has, such as a prompt of a question and its options
            (bae.tasks.rows). The other options may name them.

    Raises:
        ValueError: one sentence, for a source that is not described so.
    """

    def __init__(
        self,
        splits: Mapping[str, Any],
        question: str,
        answer: str,
        verifier: Verifier,
        answer_after: str | None = None,
        unreadable: Unreadable = "fail",
        streaming: bool = False,
        reference_lines: str | None = None,
        add_columns: AddColumns | None = None,
    ) -> None:
        common: dict[str, str | None] = {"question": question, "answer": answer}
        common |= {"answer_after": answer_after, "reference_lines": reference_lines}
        self.sources = {split: make_sources(f"task.splits.{split}", given, common) for split, given in splits.items()}
        self.verifier = verifier
        self.unreadable = unreadable
        self.streaming = streaming
        self.add_columns = add_columns
        self._splits: dict[str, Split] = {}

    def size(self, split: str) -> int:
        """Return the number of problems in a split. Raises as Source.read does, or ValueError for no such split."""
        return len(self._split(split).part)

    def problem(self, split: str, index: int) -> Problem:
        """Return problem number `index` of a split. Raises as `size` does."""
        return self._split(split).problem(index)

    def _split(self, split: str) -> "Split":
        """Return a split, and read its sources the first time."""
        if split not in self.sources:
            raise ValueError(f"the task has no split {split!r}; it has {', '.join(self.sources)}")
        if split not in self._splits:
            sources = self.sources[split]
            how = self.verifier, self.unreadable, self.streaming, self.add_columns
            tables = [source.read(split, *how) for source in sources]
            weights = [source.weight for source in sources if source.weight is not None]
            self._splits[split] = Split(split, tables, *alternate([len(t.good) for t in tables], weights or None))
        return self._splits[split]


@dataclass(frozen=True)
class Source:
    """Hold where problems of a split come from.

    Attributes:
        source: a file, or a dataset of the hub; see DatasetTask.
        question, answer, answer_after, reference_lines: see DatasetTask. A column inside another one is named with
            dots, as in reward_model.ground_truth or prompt.0.content.
        revision: a branch, a tag or a commit of a hub dataset; None takes the newest.
        weight: the share of this source among the problems of the split, in relation to the other weights. None: each
            problem comes once.
        only: {column: values}: rows with other values are left out.
    """

    source: str
    question: str
    answer: str
    answer_after: str | None = None
    reference_lines: str | None = None
    revision: str | None = None
    weight: float | None = None
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def read(
        self, split: str, verifier: Verifier, unreadable: Unreadable, streaming: bool, add: AddColumns | None
    ) -> "Table":
        """Read the rows, and find those that are problems. `split` is for messages; the others as in DatasetTask.

        Raises:
            FileNotFoundError: one sentence, if there is no such file.
            ValueError: one sentence, if the file cannot be read, lacks a column or has a row without a question; or as
                readable_rows does.
        """
        where = f"task.splits.{split}={self.source}"
        if Path(self.source).suffix in SUFFIXES and not Path(self.source).is_file():
            raise FileNotFoundError(
                f"{where}: no such file; name a .jsonl or .csv file, set BAE_DATA to the folder that has it, or name a "
                "hub dataset as in openai/gsm8k:main:train"
            )
        try:
            rows = read_table(self.source, self.revision, streaming)
        except ValueError as error:
            raise ValueError(f"task.splits.{split}: {error}") from error
        if add is not None:
            rows = WithColumns(rows, add, where)
        lines = [] if self.reference_lines is None else [self.reference_lines]
        check_columns(where, rows, [self.question, self.answer, *lines, *self.only])
        good = readable_rows(where, self._references(where, rows), verifier, unreadable, "task.unreadable")
        return Table(self, rows, good)

    def problem(self, id: str, row: Row) -> Problem:
        """Make a problem of a row that has an answer."""
        answer, reference = self.right_answer(row), self.reference(row)
        assert answer is not None and reference is not None  # rows without one are not good
        return Problem(id, cell(row, self.question), answer, row, None if reference == answer else reference)

    def reference(self, row: Row) -> str | None:
        """Return what the verifier is given: the answer, and the lines below it; None if there is none."""
        answer = self.right_answer(row)
        if answer is None or self.reference_lines is None:
            return answer
        lines = cell(row, self.reference_lines)
        lines = [lines] if isinstance(lines, str) else lines
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            return None
        return "\n".join([answer, *(" ".join(line.split()) for line in lines)])

    def right_answer(self, row: Row) -> str | None:
        """Cut the answer out of its column; None if there is none."""
        value = cell(row, self.answer)
        if not isinstance(value, (str, int, float)) or value != value:  # NaN stands for an empty cell
            return None
        text = str(value)
        if self.answer_after is not None:
            _, mark, text = text.rpartition(self.answer_after)
            if not mark:
                return None
        return text.strip()

    def _references(self, where: str, rows: Rows) -> Iterator[tuple[int, str | None]]:
        """Yield (number, reference) of the rows that are wanted. Raises ValueError for the first without a question."""
        found = False
        for number, row in enumerate(rows):
            if all(cell(row, column) in values for column, values in self.only.items()):
                found = True
                self._check_question(where, number, row)
                yield number, self.reference(row)
        if not found:
            raise ValueError(f"{where}: no row is left by only={dict(self.only)}; correct the values")

    def _check_question(self, where: str, number: int, row: Row) -> None:
        """Refuse a row without a question. Raises ValueError, one sentence."""
        value = cell(row, self.question)
        if not isinstance(value, str) or not value.strip():
            blank = value is ABSENT or not value or (isinstance(value, str) and not value.strip())
            shown = " is missing or empty" if blank else f" is {quoted(str(value), SHOWN)}, not a text"
            raise ValueError(f"{where}: in row {number + 1}, {self.question!r}{shown}; correct or remove the row")


@dataclass(frozen=True)
class Table:
    """Hold the rows of a source, and the numbers of those that are problems."""

    source: Source
    rows: Rows
    good: Sequence[int]


@dataclass(frozen=True)
class Split:
    """Hold the tables of a split, and for each of its problems the table and the position in that table's `good`."""

    name: str
    tables: Sequence[Table]
    part: np.ndarray
    position: np.ndarray

    def problem(self, index: int) -> Problem:
        """Return a problem. Its id has the split, the number of the source if there are several, and the row."""
        part = int(self.part[index])
        table = self.tables[part]
        number = table.good[int(self.position[index])]
        row = table.rows[number]
        place = f"{part}/{number}" if len(self.tables) > 1 else str(number)
        return table.source.problem(f"{self.name}/{place}", row)


def make_sources(where: str, given: Any, common: Mapping[str, str | None]) -> list[Source]:
    """Make the sources of a split of what the configuration has for it.

    Args:
        where: its key, for messages.
        given: a text, a mapping, or a list of these.
        common: the columns of sources that do not name theirs.

    Raises:
        ValueError: one sentence.
    """
    parts = given if isinstance(given, list) else [given]
    if not parts:
        raise ValueError(f"{where}=[]: it has no source; name a file, or leave the split out")
    sources = [_source(f"{where}.{i}" if isinstance(given, list) else where, p, common) for i, p in enumerate(parts)]
    if 0 < sum(source.weight is None for source in sources) < len(sources):
        raise ValueError(f"{where}: some of its sources have a weight and others none; give all one, or none")
    return sources


def _source(where: str, given: Any, common: Mapping[str, str | None]) -> Source:
    """Make one source; the arguments are as in make_sources. Raises ValueError."""
    if isinstance(given, str):
        given = {"source": given}
    if not isinstance(given, Mapping) or "source" not in given:
        raise ValueError(f"{where}={given}: must be a file, a hub dataset, or a mapping with the key source")
    known = [f.name for f in fields(Source)]
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"there is no key {where}.{key}; a source has {', '.join(known)}")
        if key == "weight":
            fits = value is None or (type(value) in (int, float) and 0 < value < float("inf"))
            must = "a number above 0"
        elif key == "only":
            fits = isinstance(value, Mapping) and all(isinstance(values, list) for values in value.values())
            must = "a mapping of columns to lists of values"
        else:
            fits = isinstance(value, str) or (value is None and key in ("answer_after", "reference_lines", "revision"))
            must = "a text"
        if not fits:
            raise ValueError(f"{where}.{key}={value}: must be {must}")
    return Source(**{**common, **given})


def alternate(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Mix sources evenly: return the source of each problem of a split, and its position in that source.

    Each source comes as often as its weight says, and every problem of it at least once. So the source that is largest
    for its weight is gone through once, and the others begin anew when they are at their end. Without weights each
    problem comes once. The first problems of a split are a mixture, as all of them are.

    Args:
        sizes: problems of each source, above 0.
        weights: their shares, in any unit; None takes the sizes.

    Returns:
        (source, position), each an array with an entry for each problem of the split.
    """
    rounds = max(size / weight for size, weight in zip(sizes, weights or sizes, strict=True))
    counts = [round(rounds * weight) for weight in weights or sizes]
    # Problem k of n stands at (k + 1/2) / n of the way through the split.
    way = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order = np.argsort(way, kind="stable")
    part = np.repeat(np.arange(len(sizes), dtype=np.uint16), counts)[order]
    position = np.concatenate([np.arange(count) % size for count, size in zip(counts, sizes, strict=True)])[order]
    return part, position


def check_columns(where: str, rows: Rows, columns: Iterable[str]) -> None:
    """Refuse a table in which no row has one of these columns. Raises ValueError, one sentence."""
    missing = list(dict.fromkeys(columns))
    for row in rows:  # usually the first row has them all
        missing = [column for column in missing if cell(row, column) is ABSENT]
        if not missing:
            return
    has = ", ".join(next(iter(rows), {})) or "no rows"
    raise ValueError(f"{where}: no column {missing[0]!r}; it has {has}")


def readable_rows(
    where: str, references: Iterable[tuple[int, str | None]], verifier: Verifier, unreadable: Unreadable, key: str
) -> Sequence[int]:
    """Return the numbers of the rows whose references can be read.

    Args:
        where: what the references are of, for messages.
        references: (number from 0, reference) of each row; None if it has none.
        verifier: tells which of them it can read.
        unreadable: what happens to the other rows. If they are left out, a warning says how many.
        key: the configuration key of `unreadable`, for messages.

    Raises:
        ValueError: one sentence with the first bad row, if there is one and `unreadable` is "fail" or no row is left.
    """
    fault = lru_cache(2**16)(verifier.fault)  # many rows have the same reference
    good, bad, first = array("Q"), 0, ""
    for number, text in references:
        why = "there is none" if text is None else fault(text)
        if why is None:
            good.append(number)
            continue
        bad += 1
        shown = "" if text is None else f", {quoted(text, SHOWN)}"
        first = first or f"the first in row {number + 1}{shown}: {why}"
    if not bad:
        return good
    count = f"{bad} of {bad + len(good)}"
    if unreadable == "fail" or not good:
        advice = "correct it" + (f", or leave such rows out with {key}=drop" if good else "")
        raise ValueError(f"{where}: {count} references cannot be read, {first}; {advice}")
    warnings.warn(f"{where}: {count} rows are left out, because their references cannot be read, {first}", stacklevel=2)
    return good
