"""Keep runs in MLflow: make the store, open or reopen a run, and log configurations, evaluations and files."""

import os
import re
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from mlflow.entities import Run, RunTag

from bae.evaluation.voting import metric_name
from bae.files import write_atomically
from bae.report.credentials import refuse_credentials
from bae.report.run_log import RunLog, Sent
from bae.report.shipping import Shipper, Worker, tell
from bae.report.store import NotInStore, StoreError, absolute, answering, connect, page, prepare_store, store

PARENT_RUN = "BAE_PARENT_RUN"
"""The environment variable by which a sweep tells the id of its own run to its jobs, in any process."""

SWEEP = "sweep"
"""The tag of a parent run by which the same sweep finds it again."""
MEMBER = "member"
"""The value of the tag `sweep.<parent>` of a run that a sweep skipped, because it was done before."""
NOTE = "mlflow.note.content"
"""The tag that MLflow shows as the description of a run, in Markdown."""
PARAM_LIMIT = 500
"""The most characters of a parameter that are logged."""
FAILURE_WAIT = 10.0
"""Seconds that a run that failed or was stopped waits for the store: whoever stopped it may not wait longer."""
NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_/. -]")
"""The signs that MLflow does not allow in the name of a metric."""
PACKAGES = ("blockwise-advantage", "torch", "transformers", "lightning", "mlflow", "hydra-core", "mpmath", "numpy")
"""The packages whose versions are logged."""


def open_parent(
    tracking_uri: str, experiment: str, artifacts: str | None, name: str, sweep: str, tags: Mapping[str, str]
) -> str:
    """Start the run under which the runs of a sweep are listed, or go on with that of the same sweep; return its id.

    Args:
        tracking_uri, experiment, artifacts: see prepare_store.
        name: of the run.
        sweep: a digest of what the sweep runs.
        tags: of the run.
    """
    with answering(tracking_uri):
        experiment_id = prepare_store(tracking_uri, experiment, artifacts)
        client = connect(tracking_uri)
        found = client.search_runs([experiment_id], f"tags.{SWEEP} = '{sweep}'", max_results=1)
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING", name=name)
        else:
            run_id = str(client.create_run(experiment_id, run_name=name).info.run_id)
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in {**tags, SWEEP: sweep}.items()])
        return run_id


def source(command: str) -> dict[str, str]:
    """Return the tags by which MLflow shows where a run comes from; command: that started it.

    Of the source of a `LOCAL` run MLflow shows only what follows the last slash; that of a `JOB` is shown whole.
    """
    commit = {"mlflow.source.git.commit": git_revision().removesuffix("-dirty")} if git_revision() != "unknown" else {}
    return {"mlflow.source.name": command, "mlflow.source.type": "JOB", **commit}


def join_sweep(tracking_uri: str, run_id: str) -> None:
    """List a run that was done before in the sweep of this process, if it runs one."""
    if parent := os.environ.get(PARENT_RUN):
        with answering(tracking_uri):
            connect(tracking_uri).set_tag(run_id, f"{SWEEP}.{parent}", MEMBER)


class MLflowRun(Logger):
    """Log to a run in MLflow, as a logger of Lightning. Only the first rank logs.

    Everything goes to the log in the output folder (bae.report.run_log), and from there to the store in the background
    (bae.report.shipping). So a store that is away or slow neither stops nor delays a run.

    Args:
        tracking_uri: an SQLite file (`sqlite:///outputs/mlflow.db`) or a server.
        experiment: its name.
        folder: the output folder of the run. If it has a log, that is gone on with.
        artifacts: the folder for artifacts, with SQLite.
        run_name: of a new run; None lets MLflow choose one.
        run_id: a run of this folder that has no log, because an earlier version made it.
        wait: seconds that the end of a run waits for the store, at most.

    Raises:
        ValueError: for credentials in the address, and for a run without a log if the store does not have it.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        folder: str,
        artifacts: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
        wait: float = 60.0,
    ) -> None:
        super().__init__()
        refuse_credentials("logger.tracking_uri", tracking_uri)
        self.uri = absolute(tracking_uri)
        self.experiment_name = experiment
        self.artifacts = str(Path(artifacts).absolute()) if artifacts else None
        self.run_name = run_name
        self.wait = wait
        self.log = RunLog(Path(folder))
        self._worker: Worker | None = None
        if run_id and self.log.is_empty and is_rank_zero():
            self._adopt(run_id)

    @property
    def name(self) -> str:
        """Return the name of the experiment."""
        return self.experiment_name

    @property
    def version(self) -> str | None:
        """Return the id of the run."""
        return self.run_id

    @property
    def run_id(self) -> str | None:
        """Return the id of the run, or None if the store has not made it yet."""
        return self.log.sent().run_id

    @property
    def place(self) -> str:
        """Return in words where the run is."""
        return f"{self.run_id} in {self.uri}" if self.run_id else f"not in {self.uri} yet"

    @property
    def page(self) -> str:
        """Return the address of the run's page, or of the list of experiments if the store has not made it yet."""
        sent = self.log.sent()
        return page(self.uri, sent.experiment_id, sent.run_id)

    def begin(self) -> None:
        """Begin a run. It is made in the store as soon as that answers."""
        parent = {"mlflow.parentRunId": os.environ[PARENT_RUN]} if os.environ.get(PARENT_RUN) else {}
        own = {f"version.{package}": version(package) for package in PACKAGES} | {"git_revision": git_revision()}
        self.log.append(
            "run",
            id=uuid.uuid4().hex,
            name=self.run_name,
            experiment=self.experiment_name,
            artifacts=self.artifacts,
            tracking_uri=self.uri,
            tags=own | parent,
        )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step that are not logged yet. Signs that MLflow allows in no name are left out."""
        with self._logging():
            self.log.append_metrics({NOT_IN_NAMES.sub("", key): value for key, value in metrics.items()}, step or 0)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: log_config logs the whole configuration."""

    @rank_zero_only
    def log_config(self, config: Mapping[str, Any], params: Mapping[str, str]) -> None:
        """Log the configuration as config.yaml, and what of it people compare runs by as parameters.

        Args:
            config: resolved, without interpolations.
            params: {parameter: value}. Values are cut to 500 characters.
        """
        with self._logging():
            self.log.append("params", values={key: value[:PARAM_LIMIT] for key, value in params.items()})
            self.log.append("dict", value=dict(config), to="config.yaml")

    @rank_zero_only
    def log_completions(self, table: dict[str, list], step: int) -> None:
        """Log the columns of a completion table as an artifact, such as completions/step_000050.json."""
        file = f"completions/step_{step:06d}.json"
        write_atomically(self.log.folder / file, pandas.DataFrame(table).to_json(orient="split", index=False))
        with self._logging():
            self.log.append("table", file=file, to="completions")

    @rank_zero_only
    def log_text(self, text: str, file: str) -> None:
        """Log a text as an artifact; file: its path, in the output folder and among the artifacts alike."""
        write_atomically(self.log.folder / file, text)
        self._log_files([self.log.folder / file], str(Path(file).parent))

    @rank_zero_only
    def log_evaluation(self, summaries: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Log summaries as metrics `eval/<name>/…`, and files as artifacts in `evaluation/`.

        Args:
            summaries: {name: bae.evaluation.measure.Summary}. The curves of test-time scaling are logged with the
                number of samples as the step.
            files: their paths.
        """
        values = []
        for name, summary in summaries.items():
            values += [(f"eval/{name}/{key}", value, 0) for key, value in summary.metrics.items()]
            for strategy, curve in summary.scaling.items():
                values += [(f"eval/{name}/{metric_name(strategy)}", y, n) for n, y in enumerate(curve, 1)]
        self._log_results(values, files, "evaluation")

    @rank_zero_only
    def log_fidelity(self, split: str, results: Any, files: Iterable[Path]) -> None:
        """Log results as metrics `fidelity/<split>/<objective>/<G>/<set>/<baseline>/…`, and files as artifacts.

        Args:
            split: of the task.
            results: the table of `bae.fidelity.compare.compare_advantages`.
            files: their paths; they go to `fidelity/<split>`.
        """
        keys = ("rmse", "observed_rmse", "bias", "slope", "correlation", "fallback")
        values = []
        for row in results.to_dict("records"):
            place = row["set"].replace("=", "_").replace("+", "")  # MLflow allows neither sign in a name
            prefix = f"fidelity/{split}/{row['objective']}/{row['group_size']}/{place}/{row['baseline']}"
            values += [(f"{prefix}/{key}", row[key], 0) for key in keys]
        self._log_results(values, files, f"fidelity/{split}")

    @rank_zero_only
    def log_folder(self, folder: Path) -> None:
        """Log a folder as artifacts under its own name."""
        self._log_files([folder], folder.name)

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        with self._logging():
            self.log.append("tags", values=dict(tags))

    @rank_zero_only
    def set_status(self, status: str) -> None:
        """Set the status of the run: RUNNING, FINISHED, FAILED or KILLED."""
        with self._logging():
            self.log.append("status", value=status)

    @rank_zero_only
    def sync(self) -> None:
        """Wait until the disk has what was logged, not until the store has it."""
        self.log.sync()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Set the status, and wait for the store: `wait` seconds at most, after a failure FAILURE_WAIT."""
        if self.log.is_empty:
            return
        word = {"success": "FINISHED", "finished": "FINISHED"}.get(status, status.upper())
        try:
            self.set_status(word)
        except OSError as error:  # the failure itself may be that the disk is full; its own message is to be seen
            tell(str(error))
        self.close(self.wait if word == "FINISHED" else min(self.wait, FAILURE_WAIT))

    @rank_zero_only
    def close(self, seconds: float | None = None) -> None:
        """Wait for the store, `wait` seconds at most, and say what is to be sent later."""
        if self._worker is not None:
            self._worker.finish(self.wait if seconds is None else seconds)
            self._worker = None
        self.log.close()
        if unsent := self.log.unsent():
            later = f"bae-sync run={self.log.folder}"
            tell(f"{unsent} entries of this run are not in {self.uri} yet; send them later with: {later}")

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Begin the run before the first entry is appended in the `with` body, and wake the worker after it."""
        if self.log.is_empty:
            self.begin()
        yield
        if self._worker is None:
            self._worker = Worker(Shipper(self.log, self.uri))
            self._worker.start()
        self._worker.wake()

    def _log_results(self, values: Sequence[tuple[str, float, int]], files: Iterable[Path], place: str) -> None:
        """Log metrics, given as (name, value, step), and files as artifacts in the folder `place`."""
        with self._logging():
            self.log.append_results(values)
        self._log_files(files, place)

    def _log_files(self, files: Iterable[Path], place: str) -> None:
        """Log files, or folders, as artifacts in the folder `place`."""
        home = self.log.folder.absolute()
        with self._logging():
            for path in map(Path.absolute, files):
                file = path.relative_to(home) if path.is_relative_to(home) else path
                self.log.append("artifact", file=str(file), to=place)

    def _adopt(self, run_id: str) -> None:
        """Make the log of a run that has none, of what the store has, so that nothing of it is logged again."""
        with answering(self.uri):
            client = connect(self.uri)
            keys = client.get_run(run_id).data.metrics
            histories = {key: client.get_metric_history(run_id, key) for key in keys}
        self.begin()
        for key, values in histories.items():
            kind = "results" if key.startswith("eval/") else "metrics"
            self.log.append(kind, metrics=[(key, m.value, m.step) for m in values])
        self.log.mark_sent(Sent(self.log.path.stat().st_size, run_id))


def is_rank_zero() -> bool:
    """Tell whether this process is the one that logs. The environment tells it before there is a process group."""
    return getattr(rank_zero_only, "rank", 0) == 0


def find_run_folder(key: str, run_id: str, tracking_uri: str) -> Path:
    """Return the output folder that a run was tagged with.

    Args:
        key: of the configuration, for the message.
        run_id: of the run.
        tracking_uri: of the store.

    Raises:
        FileNotFoundError: one sentence, if there is no such run or it has no such tag.
        StoreError: one sentence, if the store does not answer.
    """
    try:
        with answering(tracking_uri), store(tracking_uri) as client:
            return Path(client.get_run(run_id).data.tags["output_folder"])
    except (NotInStore, KeyError) as error:
        raise FileNotFoundError(
            f"{key}={run_id}: neither an output folder nor a run in {tracking_uri}; give the folder that the run "
            "printed, or its MLflow run id"
        ) from error


def made_by(run_id: str | None, tracking_uri: str) -> str:
    """Return in words which version of this package made a run. run_id: None if the store does not have it."""
    try:
        with answering(tracking_uri), store(tracking_uri) as client:
            tags = client.get_run(run_id).data.tags if run_id else {}
    except StoreError:
        tags = {}
    release, revision = tags.get("version.blockwise-advantage"), tags.get("git_revision", "unknown")
    named = f"version {release}" if release else "an earlier version"
    return named if revision == "unknown" else f"{named} (git {revision})"


def search(tracking_uri: str, experiments: Sequence[str], filter_string: str) -> list[Run]:
    """Find runs, newest first.

    Args:
        tracking_uri: of the store.
        experiments: names; those that do not exist are left out.
        filter_string: in MLflow's search language.

    Raises:
        StoreError: one sentence, if the store does not answer.
    """
    newest = ["attributes.start_time DESC"]
    runs: list[Run] = []
    token: str | None = ""
    with answering(tracking_uri):
        with store(tracking_uri) as client:
            found = [client.get_experiment_by_name(name) for name in experiments]
        ids = [experiment.experiment_id for experiment in found if experiment]
        while ids and token is not None:
            page = client.search_runs(ids, filter_string, order_by=newest, page_token=token or None)
            runs, token = runs + list(page), page.token or None
    return runs


def history(tracking_uri: str, run_id: str, metric: str) -> dict[int, float]:
    """Return {step: value} of one metric of a run."""
    return {m.step: m.value for m in connect(tracking_uri).get_metric_history(run_id, metric)}


def git_revision() -> str:
    """Return the commit of the package, with `-dirty` if files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
