"""Read completions that someone else generated: texts that are verified here, or verdicts and confidences as they are.

What cannot be used is refused with the file, the row and the column. What may be meant, but leaves a metric without a
value, is warned of.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pandas
from tqdm import tqdm

from bae.evaluation.completion_table import NO_ANSWER, floats
from bae.tasks.dataset import SHOWN, Unreadable, readable_rows
from bae.tasks.tables import read_table
from bae.text.blocks import read_section
from bae.text.number import parse_confidence
from bae.text.verdict import Verdict
from bae.text.verifier import Verifier

Value = TypeVar("Value")

VERDICTS = (
    {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "incorrect": False}
    | {verdict.value: verdict is Verdict.CORRECT for verdict in Verdict}
    | {NO_ANSWER: False}
)
"""{a given verdict as text: whether the completion is correct}."""


@dataclass(frozen=True)
class Rows:
    """Hold rows of a file, and say in errors which row and column they are about.

    Args:
        file: its name.
        names: {our column: the file's column}.
        rows: as read.
        numbers: of the rows in the file, from 1.
    """

    file: str
    names: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]

    def column(self, ours: str, read: Callable[[Any], Value], must: str) -> list[Value]:
        """Return the values of a column.

        Args:
            ours: our name of the column.
            read: makes a value of what the file has, and raises ValueError if it cannot.
            must: says what the value must be.

        Raises:
            ValueError: one sentence, for the first row that cannot be read.
        """
        values, theirs = [], self.names[ours]
        for number, row in zip(self.numbers, self.rows, strict=True):
            try:
                values.append(read(row.get(theirs)))
            except (ValueError, TypeError) as error:
                shown = "missing" if theirs not in row else shortened(row[theirs])
                raise ValueError(
                    f"{self.where(number)}: columns.{ours}={theirs} is {shown}; it must be {must}"
                ) from error
        return values

    def texts(self, ours: str) -> list[str]:
        """Return a column of texts. Raises ValueError for the first row that has none."""
        return self.column(ours, _text, "a text")

    def where(self, number: int) -> str:
        """Return in words where a row is."""
        return f"completions={self.file}, row {number}"

    def taken(self, positions: Sequence[int]) -> "Rows":
        """Return some of the rows, by position."""
        rows, numbers = [self.rows[p] for p in positions], [self.numbers[p] for p in positions]
        return replace(self, rows=rows, numbers=numbers)


def read_completions(
    file: str,
    names: Mapping[str, str | None],
    tags: Mapping[str, str],
    verifier: Verifier,
    unreadable: Unreadable = "fail",
) -> dict[str, pandas.DataFrame]:
    """Read completions that someone else generated, and verify their answers unless the file has verdicts.

    Args:
        file: a file or hub dataset, as `bae.tasks.tables.read_table` takes it.
        names: {our column: the file's column, or None}. `text` and `reference` are needed to verify answers. `correct`
            has verdicts, which are then taken as they are, and `confidence` has numbers from 0 to 1; a cell without a
            number says that none was stated. Rows with the same `question` are samples of one prompt. Each `model` gets
            a table of its own.
        tags: the words of the tags of the `answer` and the `confidence` section in `text`. A section counts if its tags
            appear exactly once.
        verifier: compares the answers with the references.
        unreadable: what happens to rows whose reference the verifier cannot read.

    Returns:
        {model: completion table}; without a column for the model, {"completions": table}.

    Raises:
        ValueError: one sentence, if the file lacks a column, a cell cannot be read, or no text has an answer; or as
            `readable_rows` does.
        FileNotFoundError: if there is no such file.
    """
    rows = _rows(file, read_table(file), {ours: theirs for ours, theirs in names.items() if theirs})
    references: list[str] = []
    if "correct" not in rows.names:
        rows, references = _with_references(rows, verifier, unreadable)
    confidence = _confidences(rows, tags["confidence"])
    if "correct" in rows.names:
        right = rows.column("correct", _correct, "true or false")
        judged = {"verdict": [(Verdict.CORRECT if c else Verdict.WRONG).value for c in right]}
    else:
        judged = _judged(rows, references, tags["answer"], verifier)
    return _by_model(rows, judged, confidence)


def shortened(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _by_model(
    rows: Rows, judged: Mapping[str, list], confidence: Sequence[float | None]
) -> dict[str, pandas.DataFrame]:
    """Make the completion table of each model. judged: columns of the table, `verdict` among them."""
    count = len(rows.rows)
    questions = rows.column("question", str, "a text") if "question" in rows.names else list(map(str, range(count)))
    prompts = {question: str(i) for i, question in enumerate(dict.fromkeys(questions))}
    table = pandas.DataFrame(
        {
            "model": rows.column("model", str, "a text") if "model" in rows.names else ["completions"] * count,
            "prompt": [prompts[question] for question in questions],
            "question": questions,
            **judged,
            "correct": [verdict == Verdict.CORRECT.value for verdict in judged["verdict"]],
            "confidence": floats(confidence),
        }
    )
    return {str(model): part.drop(columns="model") for model, part in table.groupby("model", sort=False)}


def _rows(file: str, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Rows:
    """Check that the file has the columns that are read. Raises ValueError for the first that it lacks."""
    unread = {"reference"} if "correct" in names else set()
    if {"correct", "confidence"} <= names.keys():
        unread.add("text")
    names = {ours: theirs for ours, theirs in names.items() if ours not in unread}
    for ours, theirs in names.items():
        if not rows or theirs not in rows[0]:
            has = ", ".join(rows[0]) if rows else "no rows"
            raise ValueError(f"columns.{ours}={theirs}: {file} has no such column; it has {has}")
    return Rows(file, names, rows, range(1, len(rows) + 1))


def _with_references(rows: Rows, verifier: Verifier, unreadable: Unreadable) -> tuple[Rows, list[str]]:
    """Return the rows whose references the verifier can read, with these. Raises as `readable_rows` does."""
    given = rows.column("reference", lambda value: None if _is_empty(value) else str(value), "a text")
    kept = readable_rows(f"completions={rows.file}", enumerate(given), verifier, unreadable, "unreadable")
    return rows.taken(kept), [str(given[position]) for position in kept]


def _confidences(rows: Rows, tag: str) -> list[float | None]:
    """Return the stated confidences, from their column or from the texts; warn of those that cannot be read."""
    if "confidence" in rows.names:
        stated = rows.column("confidence", _number, "a number from 0 to 1, or empty where none was stated")
    elif "text" in rows.names:
        sections = [read_section(text, tag) for text in rows.texts("text")]
        stated = [None if section is None else parse_confidence(section) for section in sections]
    else:
        stated = [None] * len(rows.rows)
    without = [number for number, q in zip(rows.numbers, stated, strict=True) if q is None]
    if without:
        warnings.warn(
            f"{rows.where(without[0])}: it states no confidence that can be read; {len(without)} of {len(stated)} rows "
            "are so, and count in accuracy and coverage alone",
            stacklevel=2,
        )
    return stated


def _judged(rows: Rows, references: Sequence[str], tag: str, verifier: Verifier) -> dict[str, list]:
    """Verify the answers in the texts, and return the columns `text`, `answer`, `reference` and `verdict`.

    Raises ValueError if no text has an answer. Warns if no answer is correct, because the verifier may not suit.
    """
    texts = rows.texts("text")
    answers = [read_section(text, tag) for text in texts]
    answered = [n for n, answer in enumerate(answers) if answer is not None]
    if not answered:
        raise ValueError(
            f"tags.answer={tag}: no row of {rows.file} has exactly one <{tag}>…</{tag}>; name the tag of the answers"
        )
    found = _verified([(str(answers[n]), references[n]) for n in answered], verifier)
    verdicts = dict(zip(answered, found, strict=True))
    if Verdict.CORRECT not in verdicts.values():
        first = answered[0]
        warnings.warn(
            f"{rows.where(rows.numbers[first])}: the verifier finds {shortened(answers[first])} "
            f"{found[0].value} with the reference {shortened(references[first])}, and none of {len(answered)} answers "
            "correct; look at columns.reference and verifier",
            stacklevel=2,
        )
    named = [verdicts[n].value if n in verdicts else NO_ANSWER for n in range(len(texts))]
    return {"text": texts, "answer": answers, "reference": list(references), "verdict": named}


def _verified(pairs: Sequence[tuple[str, str]], verifier: Verifier, at_a_time: int = 256) -> list[Verdict]:
    """Verify (answer, reference) pairs in portions, so that a progress bar can show how far it is."""
    verdicts: list[Verdict] = []
    with tqdm(total=len(pairs), desc="verifying", unit="answer") as bar:
        for start in range(0, len(pairs), at_a_time):
            verdicts += verifier.verify(pairs[start : start + at_a_time])
            bar.update(len(verdicts) - bar.n)
    return verdicts


def _is_empty(value: Any) -> bool:
    """Tell whether a cell is empty: None, a blank text, or NaN, which tables have for it."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _number(value: Any) -> float | None:
    if _is_empty(value):
        return None
    if isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError
    return float(value)


def _correct(value: Any) -> bool:
    word = str(value).strip().lower()
    if value is None or word not in VERDICTS:
        raise ValueError
    return VERDICTS[word]
