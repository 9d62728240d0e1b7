"""Define the completion table: a pandas table with one row for each sampled completion.

Evaluation measures this table, writes it and reads it again.

| column | meaning |
|---|---|
| prompt | id of the problem; the rows of one prompt are samples of one question |
| question, reference | the problem, and its reference answer |
| text | the completion |
| answer | the text of the answer section, None without one |
| verdict | `correct`, `wrong`, `unparseable`, `timeout`; `none` without an answer |
| correct | whether the verdict is `correct` |
| confidence | the stated number in [0, 1], NaN if there is none that can be read |
| length, truncated | number of tokens, and whether the token limit came before the end of sequence |

Completions that others generated have no `length` and no `truncated`. If the format has a second answer, the columns
`answer_2`, `verdict_2`, `correct_2` and `confidence_2` are about it, and so on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas
import torch
from torch import Tensor
from tqdm import tqdm

from bae.batch import Completion
from bae.evaluation.bootstrap import Pairs
from bae.tasks.dataset import Unreadable, readable_rows
from bae.tasks.tables import read_table
from bae.text.blocks import read_section
from bae.text.number import parse_confidence
from bae.text.verdict import Verdict
from bae.text.verifier import Verifier

NO_ANSWER = "none"
"""The verdict of a completion without an answer."""


def columns(completions: Sequence[Completion], attempts: Sequence[int] = (0,)) -> dict[str, list]:
    """Make the columns of the completion table; `frame` makes a table of them.

    Args:
        completions: N completions.
        attempts: `bae.objectives.scoring.Scorer.attempts`: for each answer, the index of the confidence about it, or
            -1.

    Returns:
        {column: N values}.
    """
    table: dict[str, list] = {
        "prompt": [c.problem.id for c in completions],
        "question": [c.problem.question for c in completions],
        "text": [c.text for c in completions],
        "reference": [c.problem.answer for c in completions],
    }
    for attempt, number in enumerate(attempts):
        table |= {
            _name(attempt, "answer"): [c.answer(attempt) for c in completions],
            _name(attempt, "verdict"): [
                c.verdicts[attempt].value if attempt < len(c.verdicts) else NO_ANSWER for c in completions
            ],
            _name(attempt, "correct"): [c.is_correct(attempt) for c in completions],
            _name(attempt, "confidence"): [None if number < 0 else c.stated(number) for c in completions],
        }
    return table | {"length": [c.length for c in completions], "truncated": [c.truncated for c in completions]}


def _name(attempt: int, column: str) -> str:
    """Return the name of a column for an attempt, counted from 0: "answer", "answer_2", …"""
    return column if attempt == 0 else f"{column}_{attempt + 1}"


def by_attempt(table: pandas.DataFrame) -> dict[str, pandas.DataFrame]:
    """Return one view of the table for each answer of the format.

    Each view has the columns `answer`, `verdict`, `correct` and `confidence` of its answer.

    Returns:
        {"": the table, "attempt_2": the view of the second answer, …}.
    """
    views, attempt = {"": table}, 1
    while _name(attempt, "answer") in table:
        view = table.copy()
        for column in ("answer", "verdict", "correct", "confidence"):
            view[column] = table[_name(attempt, column)]
        views[f"attempt_{attempt + 1}"], attempt = view, attempt + 1
    return views


def read_completions(
    file: str,
    names: Mapping[str, str | None],
    tags: Mapping[str, str],
    verifier: Verifier,
    unreadable: Unreadable = "fail",
) -> dict[str, pandas.DataFrame]:
    """Read completions that someone else generated, and verify their answers.

    Args:
        file: a file or hub dataset, as `bae.tasks.tables.read_table` takes it.
        names: {our column: the file's column} for `text`, `reference` and, if the file has them, `question` and
            `model`. Rows with the same question are samples of one prompt.
        tags: the words of the tags of the `answer` and the `confidence` section. A section counts if its tags appear
            exactly once.
        verifier: compares the answers with the references.
        unreadable: what happens to rows whose reference the verifier cannot read.

    Returns:
        {model: completion table}; without a column for the model, {"completions": table}.

    Raises:
        ValueError: one sentence, if the file lacks one of these columns; or as `readable_rows` does.
        FileNotFoundError: if there is no such file.
    """
    rows = read_table(file)
    wanted = {ours: theirs for ours, theirs in names.items() if theirs}
    _check_columns(file, rows, wanted)
    given = [None if row[wanted["reference"]] is None else str(row[wanted["reference"]]) for row in rows]
    kept = readable_rows(f"completions={file}", given, verifier, unreadable, "unreadable")
    rows, references = [rows[n] for n, _ in kept], [reference for _, reference in kept]
    texts = [str(row[wanted["text"]]) for row in rows]
    questions = [str(row[wanted["question"]]) if "question" in wanted else str(i) for i, row in enumerate(rows)]
    answers = [read_section(text, tags["answer"]) for text in texts]
    stated = [read_section(text, tags["confidence"]) for text in texts]
    verdicts = iter(_verified([(a, r) for a, r in zip(answers, references, strict=True) if a is not None], verifier))
    found = [None if answer is None else next(verdicts) for answer in answers]
    prompts = {question: str(i) for i, question in enumerate(dict.fromkeys(questions))}
    table = pandas.DataFrame(
        {
            "model": [str(row[wanted["model"]]) if "model" in wanted else "completions" for row in rows],
            "prompt": [prompts[question] for question in questions],
            "question": questions,
            "text": texts,
            "answer": answers,
            "reference": references,
            "verdict": [verdict.value if verdict else NO_ANSWER for verdict in found],
            "correct": [verdict is Verdict.CORRECT for verdict in found],
            "confidence": _floats(None if text is None else parse_confidence(text) for text in stated),
        }
    )
    return {str(model): part.drop(columns="model") for model, part in table.groupby("model", sort=False)}


def _check_columns(file: str, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
    """Raise ValueError if the rows of a file lack one of the columns {ours: theirs}."""
    for ours, theirs in names.items():
        if not rows or theirs not in rows[0]:
            has = ", ".join(rows[0]) if rows else "no rows"
            raise ValueError(f"columns.{ours}={theirs}: {file} has no such column; it has {has}")


def _verified(pairs: Sequence[tuple[str, str]], verifier: Verifier, at_a_time: int = 256) -> list[Verdict]:
    """Verify (answer, reference) pairs in portions, so that a progress bar can show how far it is."""
    verdicts: list[Verdict] = []
    with tqdm(total=len(pairs), desc="verifying", unit="answer") as bar:
        for start in range(0, len(pairs), at_a_time):
            verdicts += verifier.verify(pairs[start : start + at_a_time])
            bar.update(len(verdicts) - bar.n)
    return verdicts


def frame(parts: Iterable[Mapping[str, list]]) -> pandas.DataFrame:
    """Join parts that `columns` made into one completion table."""
    table = pandas.concat([pandas.DataFrame(part) for part in parts], ignore_index=True)
    stated = [column for column in table if str(column).partition("_")[0] == "confidence"]
    return table.assign(**{column: _floats(table[column]) for column in stated})


def merge(tables: Sequence[pandas.DataFrame]) -> pandas.DataFrame:
    """Join completion tables into one, for instance those that the ranks sampled."""
    return tables[0] if len(tables) == 1 else pandas.concat(tables, ignore_index=True)


def pairs(table: pandas.DataFrame) -> Pairs:
    """Return the confidence, correctness and prompt of each row, as bae.evaluation.bootstrap takes them."""
    return Pairs(_tensor(table["confidence"]), _tensor(table["correct"]), list(table["prompt"]))


def by_prompt(table: pandas.DataFrame, column: str) -> list[list[Any]]:
    """Return the values of a column as one list for each prompt, in the order in which prompts appear."""
    return [list(values) for _, values in table.groupby("prompt", sort=False)[column]]


def _tensor(values: pandas.Series) -> Tensor:
    """Copy a column into a float64 tensor."""
    return torch.from_numpy(values.to_numpy(dtype="float64", copy=True))


def _floats(values: Iterable[float | None]) -> pandas.Series:
    """Make a float64 column with NaN for None."""
    return pandas.Series([torch.nan if value is None else value for value in values], dtype="float64")
