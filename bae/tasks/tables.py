"""Read the rows of a table: a file, or a dataset of the hub. What cannot be read is named, with its line."""

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]
Rows = Sequence[Row]
ABSENT = object()
"""What stands for a cell whose row does not have the column."""
Reader = Callable[[str, BinaryIO, int], Iterator[Row]]
"""Yield the rows of an open file from a place on, in bytes from its beginning. The name of the file is for messages."""


def read_table(source: str, revision: str | None = None, streaming: bool = False) -> Rows:
    """Read the rows of a file or of a hub dataset.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, or `hub_name[:config]:split`. Every cell of a .csv is a text.
        revision: a branch, a tag or a commit of the hub dataset; None takes the newest.
        streaming: whether rows stay on the disk, and each is read when it is asked for: for tables that memory cannot
            hold. A .jsonl or .csv file is read at its own place; Parquet and the hub by the package `datasets`, which
            maps them into memory.

    Returns:
        One dictionary for each row.

    Raises:
        ValueError: one sentence, if the file is not what its suffix says, is not UTF-8 or has a row that is no object;
            if the source is a folder; if the hub does not give the dataset, or its package is not installed; if a .json
            file is to be streamed, or a file has a revision.
        FileNotFoundError: if there is no such file.
    """
    if Path(source).is_dir():
        raise ValueError(f"{source} is a folder; name a file in it: {', '.join(SUFFIXES)}")
    suffix = Path(source).suffix
    if suffix in SUFFIXES and revision is not None:
        raise ValueError(f"{source}: a file has no revision ({revision}); only hub datasets have; leave it out")
    if suffix in READERS:
        reader = READERS[suffix]
        if streaming:
            return RowsOnDisk(source, reader)
        with open(source, "rb") as file:
            return list(reader(source, file, 0))
    if suffix == ".json":
        if streaming:
            raise ValueError(f"{source}: a .json file is one value, and cannot be streamed; make it a .jsonl file")
        return _from_json(source)
    if suffix == ".parquet":
        return _from_hub("parquet", [], "train", source, data_files=source) if streaming else _from_parquet(source)
    return _named_on_hub(source, revision, streaming)


def cell(row: Row, column: str) -> Any:
    """Return a cell of a row; a.b is b inside the cell a, and a.0 its first item. ABSENT if there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return ABSENT
    return value


class RowsOnDisk(Sequence[Row]):
    """Leave the rows of a file on the disk, and read each at its place. The memory holds 8 bytes a row.

    Args:
        source: the file. It is read once, so what is wrong with it is found here.
        reader: of its kind.

    Raises:
        ValueError: as `reader` does; when a row is asked for, if the file has changed since.
    """

    def __init__(self, source: str, reader: Reader) -> None:
        self.source = source
        self.reader = reader
        self.places = array("Q")
        with open(source, "rb") as file:
            self.state = _state(file)
            rows = reader(source, file, 0)
            place = file.tell()
            while next(rows, None) is not None:
                self.places.append(place)
                place = file.tell()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:  # of one row; nobody slices
        with self._open() as file:
            return next(self.reader(self.source, file, self.places[index]))

    def __iter__(self) -> Iterator[Row]:
        with self._open() as file:
            yield from self.reader(self.source, file, 0)

    def _open(self) -> BinaryIO:
        """Open the file. Raises ValueError if it has changed."""
        file = open(self.source, "rb")  # noqa: SIM115 - the caller closes it
        if _state(file) == self.state:
            return file
        file.close()
        raise ValueError(f"{self.source} was changed while it is in use; a run reads one state of its data")


def _state(file: BinaryIO) -> tuple[int, int]:
    """Return what tells that a file was changed: its size in bytes, and when it was written, in ns."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _from_parquet(source: str) -> list[Row]:
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(source).to_pylist()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: not a Parquet file that can be read ({_line(error)})") from error
    return rows


def _csv_rows(source: str, file: BinaryIO, place: int) -> Iterator[Row]:
    """Yield the rows of a .csv file from a place on. Raises ValueError. See Reader."""
    file.seek(0)
    reader = csv.DictReader(_lines(source, file, "utf-8-sig"))  # spreadsheets put a mark of the encoding first
    try:
        if place and reader.fieldnames:
            file.seek(place)
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{source}: not a CSV file that can be read ({error})") from error


def _jsonl_rows(source: str, file: BinaryIO, place: int) -> Iterator[Row]:
    """Yield the rows of a .jsonl file from a place on. Raises ValueError. See Reader."""
    file.seek(place)
    for number, line in enumerate(_lines(source, file), 1):
        if line.strip():
            yield _parsed(line, source, number)


def _lines(source: str, file: BinaryIO, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the lines of a file. Raises ValueError for one that is not UTF-8."""
    # Bytes are split at line feeds alone: str.splitlines would cut inside strings, at U+2028.
    for number, line in enumerate(iter(file.readline, b""), 1):
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}, line {number}: not UTF-8; save the file in that encoding") from error
        encoding = "utf-8"


def _from_json(source: str) -> list[Row]:
    try:
        with open(source, "rb") as file:
            rows = json.loads("".join(_lines(source, file)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {error.lineno}: not JSON ({error.msg}); correct the file") from error
    if not isinstance(rows, list):
        raise ValueError(f"{source}: not a list of objects; write [{{…}}, {{…}}], or a .jsonl file, an object a line")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{source}, row {number}: not a JSON object; each row must be one")
    return rows


def _parsed(line: str, source: str, number: int) -> Row:
    """Parse line `number` of a .jsonl file. Raises ValueError if it is no JSON object."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {number}: not JSON ({error.msg}); correct or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{source}, line {number}: not a JSON object; each line must be one")
    return row


READERS: dict[str, Reader] = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
"""What reads the files that have a row in a line or in a few, by their suffix."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""The suffixes of files that can be read; any other source is the name of a hub dataset."""


def _named_on_hub(source: str, revision: str | None, streaming: bool) -> Rows:
    """Read the dataset of the hub that a source names. Raises ValueError if that cannot be done."""
    name, *config = source.split(":")
    if not config:
        known = ", ".join(SUFFIXES)
        raise ValueError(
            f"{source}: neither a file ({known}) nor a hub dataset with a split, as in openai/gsm8k:main:train"
        )
    *config, split = config
    rows = _from_hub(name, config, split, source, revision=revision)
    return rows if streaming else list(rows)


def _from_hub(name: str, config: list[str], split: str, source: str, **more: Any) -> Rows:
    """Return the rows that the package `datasets` gives, mapped into memory. Raises ValueError if it gives none.

    Args:
        name, config, split: what it is asked for, and further arguments of its `load_dataset`.
        source: for messages.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source}: hub datasets, and Parquet files that are streamed, need a package: "
            "pip install 'blockwise-advantage[hub]'"
        ) from error
    try:
        rows: Rows = load_dataset(name, *config, split=split, **more)
    except Exception as error:  # of the network, of the hub, of its library: there are many, and no common type
        where = "the package datasets cannot read it" if "data_files" in more else "the hub does not give it"
        raise ValueError(
            f"{source}: {where} ({_line(error)}); check the spelling and the network, or name a file"
        ) from error
    return rows


def _line(error: Exception) -> str:
    """Return the first line of what an error says, shortened."""
    words = str(error).strip() or type(error).__name__
    return words.splitlines()[0][:200].rstrip(".")
