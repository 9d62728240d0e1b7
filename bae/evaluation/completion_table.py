"""The table of sampled completions, one row each: what evaluation measures, writes and reads again.

| column | meaning |
|---|---|
| prompt | id of the problem; rows of one prompt are samples of one question |
| question, reference | the problem, and its reference answer |
| text | the completion |
| answer | what stands in the answer section, None without one |
| verdict | `correct`, `wrong`, `unparseable`, `timeout`; `none` without an answer |
| correct | whether the verdict is `correct` |
| confidence | the stated number in [0, 1], NaN if there is none that can be read |
| length, truncated | tokens, and whether the limit came before the end of sequence; absent for others' completions |

Where the format has a second answer, `answer_2`, `verdict_2`, `correct_2` and `confidence_2` are about it, and so on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas
import torch
from torch import Tensor
from tqdm import tqdm

from bae.batch import Completion
from bae.evaluation.bootstrap import Pairs
from bae.tasks.dataset import read_table
from bae.text.blocks import read_section
from bae.text.number import parse_confidence
from bae.text.verdict import Verdict
from bae.text.verifier import Verifier

NO_ANSWER = "none"


def columns(completions: Sequence[Completion], attempts: Sequence[int] = (0,)) -> dict[str, list]:
    """The table of this module's docstring, column by column. attempts: `bae.objectives.scoring.Scorer.attempts`."""
    table: dict[str, list] = {
        "prompt": [c.problem.id for c in completions],
        "question": [c.problem.question for c in completions],
        "text": [c.text for c in completions],
        "reference": [c.problem.answer for c in completions],
    }
    for attempt, number in enumerate(attempts):
        table |= {
            _of(attempt, "answer"): [c.answer(attempt) for c in completions],
            _of(attempt, "verdict"): [
                c.verdicts[attempt].value if attempt < len(c.verdicts) else NO_ANSWER for c in completions
            ],
            _of(attempt, "correct"): [c.is_correct(attempt) for c in completions],
            _of(attempt, "confidence"): [None if number < 0 else c.stated(number) for c in completions],
        }
    return table | {"length": [c.length for c in completions], "truncated": [c.truncated for c in completions]}


def _of(attempt: int, column: str) -> str:
    return column if attempt == 0 else f"{column}_{attempt + 1}"


def by_attempt(table: pandas.DataFrame) -> dict[str, pandas.DataFrame]:
    """{"": the first answer's table, "attempt_2": that of the second in the same columns, …}."""
    views, attempt = {"": table}, 1
    while _of(attempt, "answer") in table:
        view = table.copy()
        for column in ("answer", "verdict", "correct", "confidence"):
            view[column] = table[_of(attempt, column)]
        views[f"attempt_{attempt + 1}"], attempt = view, attempt + 1
    return views


def read_completions(
    file: str, names: Mapping[str, str | None], tags: Mapping[str, str], verifier: Verifier
) -> dict[str, pandas.DataFrame]:
    """Tables of completions that someone else generated, by model.

    names: the file's columns for `text`, `reference`, and, if it has them, `question` and `model`; the samples of one
        question are the rows that have it in common. tags: of the `answer` and the `confidence` section; a section
        counts if its tags come exactly once.
    Raises ValueError, one sentence, for a file without these columns; FileNotFoundError if there is none.
    """
    rows = read_table(file)
    wanted = {ours: theirs for ours, theirs in names.items() if theirs}
    for ours, theirs in wanted.items():
        if not rows or theirs not in rows[0]:
            has = ", ".join(rows[0]) if rows else "no rows"
            raise ValueError(f"columns.{ours}={theirs}: {file} has no such column; it has {has}")
    texts = [str(row[wanted["text"]]) for row in rows]
    references = [str(row[wanted["reference"]]) for row in rows]
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


def _verified(pairs: Sequence[tuple[str, str]], verifier: Verifier, at_a_time: int = 256) -> list[Verdict]:
    """The verdicts, in portions, so that a progress bar can tell how far it is."""
    verdicts: list[Verdict] = []
    with tqdm(total=len(pairs), desc="verifying", unit="answer") as bar:
        for start in range(0, len(pairs), at_a_time):
            verdicts += verifier.verify(pairs[start : start + at_a_time])
            bar.update(len(verdicts) - bar.n)
    return verdicts


def frame(parts: Iterable[Mapping[str, list]]) -> pandas.DataFrame:
    """One table of parts that `columns` made."""
    table = pandas.concat([pandas.DataFrame(part) for part in parts], ignore_index=True)
    stated = [column for column in table if str(column).partition("_")[0] == "confidence"]
    return table.assign(**{column: _floats(table[column]) for column in stated})


def merge(tables: Sequence[pandas.DataFrame]) -> pandas.DataFrame:
    """One table of those that ranks sampled."""
    return tables[0] if len(tables) == 1 else pandas.concat(tables, ignore_index=True)


def pairs(table: pandas.DataFrame) -> Pairs:
    """Confidence, correctness and prompt of each row, as bae.evaluation.bootstrap takes them."""
    return Pairs(_tensor(table["confidence"]), _tensor(table["correct"]), list(table["prompt"]))


def by_prompt(table: pandas.DataFrame, column: str) -> list[list[Any]]:
    """The values of a column, prompt by prompt, in the order in which prompts appear."""
    return [list(values) for _, values in table.groupby("prompt", sort=False)[column]]


def _tensor(values: pandas.Series) -> Tensor:
    return torch.from_numpy(values.to_numpy(dtype="float64", copy=True))


def _floats(values: Iterable[float | None]) -> pandas.Series:
    return pandas.Series([torch.nan if value is None else value for value in values], dtype="float64")
