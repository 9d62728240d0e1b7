"""Define the completion table: a pandas table with one row for each sampled completion.

Evaluation measures this table, writes it and reads it again.

| column | meaning |
|---|---|
| prompt | id of the problem; the rows of one prompt are samples of one question |
| question, reference | the problem, and its reference answer |
| text | the completion |
| answer | the text of the answer section, None without one |
| verdict | `correct`, `wrong`, `unparseable`, `timeout`, `abstained`; `none` without an answer |
| correct | whether the verdict is `correct` |
| confidence | the stated number in [0, 1], NaN if there is none that can be read |
| length, truncated | number of tokens, and whether the token limit came before the end of sequence |
| row | the row of the data set that the problem came from, as JSON; no such column if it came from none |

Completions that others generated have no `length` and no `truncated`, and if their verdicts were given, nothing but
`prompt`, `question`, `verdict`, `correct` and `confidence`. If the format has a second answer, the columns
`answer_2`, `verdict_2`, `correct_2` and `confidence_2` are about it, and so on.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas
import torch
from torch import Tensor

from bae.batch import Completion
from bae.evaluation.bootstrap import Pairs

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
    table |= {"length": [c.length for c in completions], "truncated": [c.truncated for c in completions]}
    if any(c.problem.columns for c in completions):
        table["row"] = [json.dumps(c.problem.columns, ensure_ascii=False, default=str) for c in completions]
    return table


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


def frame(parts: Iterable[Mapping[str, list]]) -> pandas.DataFrame:
    """Join parts that `columns` made into one completion table."""
    table = pandas.concat([pandas.DataFrame(part) for part in parts], ignore_index=True)
    stated = [column for column in table if str(column).partition("_")[0] == "confidence"]
    return table.assign(**{column: floats(table[column]) for column in stated})


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


def floats(values: Iterable[float | None]) -> pandas.Series:
    """Make a float64 column with NaN for None."""
    return pandas.Series([torch.nan if value is None else value for value in values], dtype="float64")
