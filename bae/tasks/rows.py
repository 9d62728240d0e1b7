"""Make prompts of rows that have options or paragraphs beside their question.

Each function takes a row and returns columns that are added to it. A configuration names one as `task.add_columns`,
with the names of the columns that it reads and the text of the prompt.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from bae.tasks.tables import Row, Rows, cell
from bae.text.templates import filled

AddColumns = Callable[[Row], Row]
"""Return the columns to add to a row. Raises ValueError for a row of which they cannot be made."""


class WithColumns(Sequence[Row]):
    """Add columns to rows, each when it is asked for.

    Args:
        rows: to add to.
        add: makes the columns.
        where: what the rows are of, for messages.

    Raises:
        ValueError: one sentence with the row, when it is asked for, if the columns cannot be made.
    """

    def __init__(self, rows: Rows, add: AddColumns, where: str) -> None:
        self.rows = rows
        self.add = add
        self.where = where

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return (self._with_columns(number, row) for number, row in enumerate(self.rows))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self._with_columns(index, self.rows[index])

    def _with_columns(self, number: int, row: Row) -> Row:
        """Return a row with its columns added."""
        try:
            return {**row, **self.add(row)}
        except ValueError as error:
            raise ValueError(f"{self.where}, row {number + 1}: {error}") from error


def with_options(row: Row, question: str, options: str, prompt: str) -> Row:
    """Put the options of a question into its prompt.

    Args:
        row: to read.
        question: the column of the question.
        options: the column of the options, a list of texts.
        prompt: a text in which {question} and {options} stand for them. Options are listed as `A. …`, each on a line.

    Returns:
        The column `prompt`.
    """
    return {"prompt": _filled(prompt, question=_text(row, question), options=_listed(_texts(row, options)))}


def with_shuffled_options(row: Row, question: str, right: str, wrong: Sequence[str], prompt: str) -> Row:
    """Mix the right answer with wrong ones, and put them into the prompt.

    The order is a draw that depends on the question alone, so it is the same in every run.

    Args:
        row: to read.
        question, right: the columns of the question and of the right answer.
        wrong: the columns of wrong answers.
        prompt: as in `with_options`.

    Returns:
        The columns `prompt`, `letter` (of the right option) and `options` (their texts, in order).
    """
    asked = _text(row, question)
    texts = [_text(row, column) for column in (right, *wrong)]
    order = list(range(len(texts)))
    random.Random(asked).shuffle(order)
    options = [" ".join(texts[number].split()) for number in order]
    letter = string.ascii_uppercase[order.index(0)]
    return {"prompt": _filled(prompt, question=asked, options=_listed(options)), "letter": letter, "options": options}


def with_paragraphs(row: Row, question: str, titles: str, sentences: str, prompt: str) -> Row:
    """Put paragraphs into the prompt of a question.

    Args:
        row: to read.
        question: the column of the question.
        titles: the column of the titles of the paragraphs, a list of texts.
        sentences: the column of their sentences, a list of texts for each paragraph.
        prompt: a text in which {question} and {paragraphs} stand for them.

    Returns:
        The column `prompt`.
    """
    names, texts = _texts(row, titles), cell(row, sentences)
    if not isinstance(texts, list) or len(texts) != len(names) or not all(isinstance(part, list) for part in texts):
        raise ValueError(f"{sentences!r} has not a list of sentences for each of {titles!r}")
    paragraphs = [f"{name}: {''.join(map(str, part)).strip()}" for name, part in zip(names, texts, strict=True)]
    return {"prompt": _filled(prompt, question=_text(row, question), paragraphs="\n\n".join(paragraphs))}


def _filled(prompt: str, **values: str) -> str:
    """Put the values in the places of their names; braces in the values stay as they are. Raises ValueError."""
    for name in values:
        if f"{{{name}}}" not in prompt:
            raise ValueError(
                f"task.add_columns.prompt has no {{{name}}}, so the policy would never see it; write it there"
            )
    return filled(prompt, values)


def _listed(options: Sequence[str]) -> str:
    """Return options with their letters, each on a line. Raises ValueError if there are more than letters."""
    if not 1 < len(options) <= len(string.ascii_uppercase):
        raise ValueError(f"there are {len(options)} options; there must be 2 to {len(string.ascii_uppercase)}")
    return "\n".join(
        f"{letter}. {' '.join(text.split())}" for letter, text in zip(string.ascii_uppercase, options, strict=False)
    )


def _text(row: Row, column: str) -> str:
    """Return a cell that is a text. Raises ValueError for another one."""
    value: Any = cell(row, column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column!r} is missing, empty or not a text; correct or remove the row")
    return value.strip()


def _texts(row: Row, column: str) -> list[str]:
    """Return a cell that is a list of texts. Raises ValueError for another one."""
    value: Any = cell(row, column)
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(f"{column!r} is missing, or not a list of texts; correct or remove the row")
    return value
