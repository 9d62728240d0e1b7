"""Read the rows of a table: a file, or a dataset of the hub. What cannot be read is named, with its line."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_table(source: str) -> list[Row]:
    """Read the rows of a file or of a hub dataset.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, or `hub_name[:config]:split`. Every cell of a .csv is a text.

    Returns:
        One dictionary for each row.

    Raises:
        ValueError: one sentence, if the file is not what its suffix says, is not UTF-8 or has a row that is no object;
            if the source is a folder; if the hub does not give the dataset, or its package is not installed.
        FileNotFoundError: if there is no such file.
    """
    if Path(source).is_dir():
        raise ValueError(f"{source} is a folder; name a file in it: {', '.join(READERS)}")
    return READERS.get(Path(source).suffix, _from_hub)(source)


def _from_parquet(source: str) -> list[Row]:
    import pandas

    try:
        rows: list[Row] = pandas.read_parquet(source).to_dict("records")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: not a Parquet file that can be read ({_line(error)})") from error
    return rows


def _from_csv(source: str) -> list[Row]:
    text = _text(source, "utf-8-sig")  # spreadsheets put a mark of the encoding first
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{source}: not a CSV file that can be read ({error})") from error


def _from_json(source: str) -> list[Row]:
    try:
        rows = json.loads(_text(source))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {error.lineno}: not JSON ({error.msg}); correct the file") from error
    if not isinstance(rows, list):
        raise ValueError(f"{source}: not a list of objects; write [{{…}}, {{…}}], or a .jsonl file, an object a line")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{source}, row {number}: not a JSON object; each row must be one")
    return rows


def _from_jsonl(source: str) -> list[Row]:
    lines = _text(source).split("\n")  # splitlines would cut inside strings, at U+2028
    return [_parsed(line, source, number) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(line: str, source: str, number: int) -> Row:
    """Parse line `number` of a .jsonl file. Raises ValueError if it is no JSON object."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {number}: not JSON ({error.msg}); correct or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{source}, line {number}: not a JSON object; each line must be one")
    return row


READERS: dict[str, Callable[[str], list[Row]]] = {
    ".jsonl": _from_jsonl,
    ".json": _from_json,
    ".parquet": _from_parquet,
    ".csv": _from_csv,
}
"""How a file is read, by its suffix; any other source is the name of a hub dataset."""


def _from_hub(source: str) -> list[Row]:
    """Read a dataset of the hub. Raises ValueError if that cannot be done."""
    name, *config = source.split(":")
    if not config:
        known = ", ".join(READERS)
        raise ValueError(
            f"{source}: neither a file ({known}) nor a hub dataset with a split, as in openai/gsm8k:main:train"
        )
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source} is no file, and hub datasets need a package: pip install 'blockwise-advantage[hub]'"
        ) from error
    *config, split = config
    try:
        rows: list[Row] = load_dataset(name, *config, split=split).to_list()
    except Exception as error:  # of the network, of the hub, of its library: there are many, and no common type
        raise ValueError(
            f"{source}: the hub does not give it ({_line(error)}); check the spelling and the network, or name a file"
        ) from error
    return rows


def _text(source: str, encoding: str = "utf-8") -> str:
    """Return the text of a file. Raises ValueError, with the line, if it is not UTF-8."""
    data = Path(source).read_bytes()
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{source}, line {line}: not UTF-8; save the file in that encoding") from error


def _line(error: Exception) -> str:
    """Return the first line of what an error says, shortened."""
    words = str(error).strip() or type(error).__name__
    return words.splitlines()[0][:200].rstrip(".")
