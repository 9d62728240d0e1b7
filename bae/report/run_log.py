"""Keep all that a run logs in a file of its output folder, before anything goes to a store.

The file is a write-ahead log: lines of JSON that are only ever appended. It is also the queue of what the store does
not have yet. Beside it stands how far the store has it, so a queue of any length takes no memory.

    <folder>/tracking/log.jsonl    an entry a line: {"kind": …, "time": ms, …}
    <folder>/tracking/sent.json    {"offset": bytes that the store has, "run_id": …, "experiment_id": …}
    <folder>/tracking/lock         held by the one process that sends

Kinds: `run` begins a run, `metrics` are of steps, `results` of an evaluation; `params`, `tags`, `dict` (a small file),
`artifact` and `table` (files of the folder, by their names), and `status`.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bae.files import write_atomically

RUN_FILE = "run_id"
"""In the output folder: the id of the run in the store. It is written when the store has made the run."""
LOG = Path("tracking") / "log.jsonl"
SENT = Path("tracking") / "sent.json"
LOCK = Path("tracking") / "lock"

Entry = dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """Tell how far a store has a log: the bytes that it has, and its ids of the run and of the experiment."""

    offset: int = 0
    run_id: str | None = None
    experiment_id: str | None = None


class RunLog:
    """Append to the log of a run, and read it.

    A step that is made again after a kill is not logged again. For this the log knows the last step of each metric. One
    step for all of them would leave holes: a run may be killed between two metrics of one step.

    Args:
        folder: the output folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOG
        self._file: int | None = None
        self._last: dict[str, int] = {}
        self._results: dict[tuple[str, int], str] = {}
        for entry, _ in self.entries():
            self._note(entry)

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing was logged yet."""
        return not self.path.is_file() or self.path.stat().st_size == 0

    def append(self, kind: str, **content: Any) -> None:
        """Append an entry. It survives a kill of the process; a loss of power, after `sync`.

        Raises OSError if the disk does not take it.
        """
        entry = {"kind": kind, "time": int(time.time() * 1000), **content}
        self._write((json.dumps(entry) + "\n").encode())
        self._note(entry)

    def append_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append metrics of a step, without those that the log has of this step or of a later one."""
        new = [(key, float(value), step) for key, value in metrics.items() if step > self._last.get(key, -1)]
        if new:
            self.append("metrics", metrics=new)

    def append_results(self, values: Sequence[tuple[str, float, int]]) -> None:
        """Append metrics of an evaluation, (name, value, step), without those that have this value already.

        An evaluation may be made again with other settings. So a new value replaces what was logged of the same step.
        """
        numbers = [(key, float(value), step) for key, value, step in values]
        new = [(key, value, step) for key, value, step in numbers if self._results.get((key, step)) != repr(value)]
        if new:
            self.append("results", metrics=new)

    def sync(self) -> None:
        """Wait until the disk has everything."""
        if self.is_empty:
            return
        for path in (self.path, self.path.parent):  # the folder: that there is such a file
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def entries(self, offset: int = 0) -> Iterator[tuple[Entry, int]]:
        """Yield each entry from byte `offset` on, and the offset behind it. A line that a kill tore is left out."""
        if self.is_empty:
            return
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if not line.endswith(b"\n"):
                    return  # it is being written
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict) and "kind" in entry:
                    yield entry, offset

    def history(self, prefix: str) -> dict[str, dict[int, float]]:
        """Return {metric: {step: value}} of the newest run in the log, of metrics whose names begin with `prefix`."""
        found: dict[str, dict[int, float]] = {}
        for entry, _ in self.entries():
            if entry["kind"] == "run":
                found.clear()
            for key, value, step in entry.get("metrics", []):
                if key.startswith(prefix):
                    found.setdefault(key, {})[step] = value
        return found

    def begun(self) -> Entry | None:
        """Return the entry that began the newest run of the log, or None."""
        begun = None
        for entry, _ in self.entries():
            begun = entry if entry["kind"] == "run" else begun
        return begun

    def sent(self) -> Sent:
        """Return how far the store has the log. If that cannot be read, nothing counts as sent: it goes there again."""
        try:
            return Sent(**json.loads((self.folder / SENT).read_text()))
        except (OSError, ValueError, TypeError):
            return Sent()

    def mark_sent(self, sent: Sent) -> None:
        """Write down how far the store has the log."""
        write_atomically(self.folder / SENT, json.dumps(asdict(sent)))

    def unsent(self) -> int:
        """Return the number of entries that the store does not have."""
        return sum(1 for _ in self.entries(self.sent().offset))

    def close(self) -> None:
        """Close the file. The next entry opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                line = b"\n" + line  # a kill tore the last line
        written = os.write(self._file, line)
        if written < len(line):
            self.close()  # the next entry begins a line of its own
            raise OSError(f"{self.path}: the disk took only a part of an entry; is it full?")

    def _note(self, entry: Entry) -> None:
        """Remember what decides whether later entries are new."""
        if entry["kind"] == "run":
            self._last, self._results = {}, {}
        elif entry["kind"] == "metrics":
            self._last |= {key: max(step, self._last.get(key, -1)) for key, _, step in entry["metrics"]}
        elif entry["kind"] == "results":
            self._results |= {(key, step): repr(value) for key, value, step in entry["metrics"]}


def logs_below(folder: Path) -> list[RunLog]:
    """Return the logs of all runs in a folder: its own, if it is that of a run, and those below it."""
    return [RunLog(path.parent.parent) for path in sorted(folder.rglob(str(LOG)))]
