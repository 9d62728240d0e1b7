"""Send the log of a run to MLflow, in order, in the background or at once.

MLflow has a queue of its own (`synchronous=False`). It does not suffice here. It is kept in memory without a bound and
is lost with the process. What a store refuses or does not answer is dropped with a message. Artifacts and status do not
go through it. And the end of the process waits for it without a limit. Libraries for queues on disk
(persist-queue, litequeue) keep entries, and leave open what matters here: which of them a store has already, after a
kill of either side. mlflow-export-import copies whole runs into new ones. So the log of the run is the queue, and this
module reads on in it.

An entry is sent until the store has confirmed it, so the store may get it twice: when the answer was lost, or when the
process was killed before it wrote down how far it was. That changes nothing. Every entry carries its time, and MLflow's
databases keep a metric with the same key, step, time and value once. Files, tags, parameters and status are simply
written again. A run is found by the tag LOG_TAG instead of being made twice.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from bae.files import write_atomically
from bae.report.run_log import LOCK, RUN_FILE, Entry, RunLog, Sent
from bae.report.store import connect, is_for_good, prepare_store, reason

LOG_TAG = "log_id"
"""The tag by which a run is found whose id was lost in a kill."""
MOST_METRICS, MOST_OTHERS = 1000, 100
"""MLflow's limits for one call."""
TAG_LIMIT = 8000
"""The most characters of a tag."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, at most."""


class Shipper:
    """Send the entries of a log that a store does not have yet.

    Args:
        log: of a run.
        tracking_uri: of the store.
    """

    def __init__(self, log: RunLog, tracking_uri: str) -> None:
        self.log = log
        self.uri = tracking_uri
        self.sent = Sent()
        self._handlers: dict[str, Callable[[Entry], None]] = {
            "run": self._run,
            "params": self._params,
            "tags": self._tags,
            "dict": self._dict,
            "artifact": self._artifact,
            "table": self._table,
            "status": self._status,
        }

    @contextmanager
    def alone(self, timeout: float) -> Iterator[None]:
        """Keep other processes from sending this log in the `with` body. Raises filelock.Timeout."""
        lock = self.log.folder / LOCK
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=timeout):
            self.sent = self.log.sent()
            yield

    def send(self) -> bool:
        """Send the next entries, at most as many as MLflow takes in one call; False if there are none.

        Call it in `alone`. Raises what MLflow and the network raise, if the store does not take them now. What it will
        never take is left out with a message; it stays in the log.
        """
        entries, end = self._next()
        if not entries:
            return False
        self.log.sync()  # what the store has, the disk has: else it would be logged again, with another time
        self._deliver(entries)
        self.sent = replace(self.sent, offset=end)
        self.log.mark_sent(self.sent)
        return True

    def _next(self) -> tuple[list[Entry], int]:
        """Return the next entry, or as many with metrics as fit in one call, and the offset behind them."""
        entries: list[Entry] = []
        end, metrics = self.sent.offset, 0
        for entry, offset in self.log.entries(end):
            metrics += len(entry.get("metrics", []))
            if entries and ("metrics" not in entry or metrics > MOST_METRICS):
                break
            entries, end = [*entries, entry], offset
            if "metrics" not in entry:
                break
        return entries, end

    def _deliver(self, entries: Sequence[Entry]) -> None:
        """Give entries to the store, one by one if it refuses all together."""
        try:
            self._give(entries)
        except MlflowException as error:
            if not is_for_good(error) or entries[0]["kind"] == "run":  # without a run there is nothing to log to
                raise
            if len(entries) == 1:
                tell(f"MLflow refused an entry, which stays in {self.log.path}: {reason(error)}")
                return
            for entry in entries:
                self._deliver([entry])

    def _give(self, entries: Sequence[Entry]) -> None:
        if "metrics" not in entries[0]:
            handler = self._handlers.get(entries[0]["kind"])
            if handler is not None:  # else it is of a later version
                handler(entries[0])
            return
        metrics = [
            Metric(key, value, entry["time"], step) for entry in entries for key, value, step in entry["metrics"]
        ]
        for i in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + MOST_METRICS])

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self.uri)

    @property
    def _run_id(self) -> str:
        assert self.sent.run_id is not None, f"{self.log.path} does not begin with a run"
        return self.sent.run_id

    def _run(self, entry: Entry) -> None:
        """Make the run, or find it, if it was made and the answer was lost."""
        experiment_id = prepare_store(self.uri, entry["experiment"], entry["artifacts"])
        found = self._client.search_runs([experiment_id], f"tags.{LOG_TAG} = '{entry['id']}'")
        if found:
            run_id = str(found[0].info.run_id)
        else:
            tags = {**entry["tags"], LOG_TAG: entry["id"]}
            made = self._client.create_run(experiment_id, entry["time"], tags, entry["name"])
            run_id = str(made.info.run_id)
        write_atomically(self.log.folder / RUN_FILE, run_id)
        self.sent = Sent(self.sent.offset, run_id, experiment_id)

    def _params(self, entry: Entry) -> None:
        params = [Param(key, value) for key, value in entry["values"].items()]
        for i in range(0, len(params), MOST_OTHERS):
            self._client.log_batch(self._run_id, params=params[i : i + MOST_OTHERS])

    def _tags(self, entry: Entry) -> None:
        self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in entry["values"].items()])

    def _dict(self, entry: Entry) -> None:
        self._client.log_dict(self._run_id, entry["value"], entry["to"])

    def _artifact(self, entry: Entry) -> None:
        path = self.log.folder / entry["file"]
        if not path.resolve().is_relative_to(self.log.folder.resolve()):  # the log may be a stranger's
            tell(f"{path} is outside the run's folder, so it is not sent to MLflow")
        elif path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), entry["to"])
        elif path.is_file():
            self._client.log_artifact(self._run_id, str(path), entry["to"])
        else:
            tell(f"{path} is gone, so it is not sent to MLflow")

    def _table(self, entry: Entry) -> None:
        """Send a table, and list it in the tag by which MLflow finds tables, as MLflow's own log_table does.

        That would append to a table that is there. A tag has a limit; the newest tables are listed.
        """
        self._artifact(entry)
        listed = json.loads(self._client.get_run(self._run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        table = {"path": f"{entry['to']}/{os.path.basename(entry['file'])}", "type": "table"}
        if table in listed:
            return
        listed.append(table)
        while len(json.dumps(listed)) > TAG_LIMIT:
            listed.pop(0)
        self._client.set_tag(self._run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps(listed))

    def _status(self, entry: Entry) -> None:
        if entry["value"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._run_id, entry["value"], entry["time"])


class Worker(threading.Thread):
    """Send a log in the background, as it grows, again and again until the store takes it.

    The run never waits for this thread, but for `finish`. The process can end while the thread waits for a store.
    """

    def __init__(self, shipper: Shipper) -> None:
        super().__init__(name="bae-shipping", daemon=True)
        self._shipper = shipper
        self._news = threading.Event()
        self._finishing = threading.Event()
        self._given_up = threading.Event()
        self._failures = 0

    def wake(self) -> None:
        """Tell that there are new entries."""
        self._news.set()

    def finish(self, seconds: float) -> None:
        """Wait until everything is sent, so many seconds at most. Then no more is sent."""
        self._finishing.set()
        self._news.set()
        self.join(seconds)
        self._given_up.set()

    def run(self) -> None:
        while not self._given_up.is_set():
            try:
                with self._shipper.alone(timeout=1):
                    self._send_all()
                return
            except Timeout:
                continue  # another process sends

    def _send_all(self) -> None:
        while not self._given_up.is_set():
            self._news.clear()
            try:
                while not self._given_up.is_set() and self._shipper.send():
                    self._succeeded()
                if self._finishing.is_set():
                    return
            except Exception as error:  # whatever a store, a network or a driver raises must not end this thread
                self._failed(error)
            else:
                self._news.wait()

    def _succeeded(self) -> None:
        if self._failures:
            tell(f"{self._shipper.uri} answers again")
        self._failures = 0

    def _failed(self, error: Exception) -> None:
        """Say so the first time, and wait longer each time; at the end of a run, a second."""
        self._failures += 1
        if self._failures == 1:
            tell(
                f"{self._shipper.uri} does not take what this run logs ({reason(error)}); it waits in "
                f"{self._shipper.log.path}, and the run goes on"
            )
        if not self._finishing.wait(min(2.0**self._failures, LONGEST_PAUSE)):
            return
        self._given_up.wait(1)


def tell(sentence: str) -> None:
    """Say something to the person at the terminal, apart from what the command prints."""
    print(sentence, file=sys.stderr, flush=True)
