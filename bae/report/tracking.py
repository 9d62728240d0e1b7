"""Keep runs in MLflow: make the store, open or reopen a run, and log configurations, evaluations and files."""

import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from bae.evaluation.voting import metric_name

PARENT_RUN = "BAE_PARENT_RUN"
"""The environment variable by which a sweep tells the id of its own run to its jobs, in any process."""

PARAM_LIMIT = 500
"""The most characters of a parameter that are logged."""
SQLITE = "sqlite:///"
"""The beginning of the URI of a store in an SQLite file."""
PACKAGES = ("blockwise-advantage", "torch", "transformers", "lightning", "mlflow", "hydra-core", "math-verify", "numpy")
"""The packages whose versions are logged."""


@contextmanager
def store(tracking_uri: str) -> Iterator[MlflowClient]:
    """Give a client of a store whose schema exists. For SQLite, no other process is in a `with` body at the same time.

    Jobs that start together wait for each other here, because MLflow's own set-up of a new SQLite file is not safe if
    two processes do it at once.
    """
    if not tracking_uri.startswith(SQLITE):
        yield MlflowClient(tracking_uri)
        return
    database = Path(tracking_uri.removeprefix(SQLITE)).absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        client = MlflowClient(tracking_uri)
        client.search_experiments(max_results=1)  # makes the schema
        yield client


def prepare_store(tracking_uri: str, experiment: str, artifacts: str | None) -> str:
    """Make the database, the schema and the experiment if they do not exist.

    Args:
        tracking_uri: of the store.
        experiment: its name.
        artifacts: the folder for artifacts; it is used only with SQLite, and only for a new experiment.

    Returns:
        The id of the experiment.
    """
    with store(tracking_uri) as client:
        found = client.get_experiment_by_name(experiment)
        if found:
            return str(found.experiment_id)
        local = Path(artifacts).absolute().as_uri() if artifacts and tracking_uri.startswith(SQLITE) else None
        return str(client.create_experiment(experiment, local))


def absolute(tracking_uri: str) -> str:
    """Return a URI of the same store that does not depend on the working directory."""
    if not tracking_uri.startswith(SQLITE):
        return tracking_uri
    return SQLITE + str(Path(tracking_uri.removeprefix(SQLITE)).absolute())


def open_parent(tracking_uri: str, experiment: str, artifacts: str | None, name: str) -> str:
    """Start the run under which the runs of a sweep are listed, and return its id.

    Args:
        tracking_uri, experiment, artifacts: see prepare_store.
        name: of the run.
    """
    experiment_id = prepare_store(tracking_uri, experiment, artifacts)
    return str(MlflowClient(tracking_uri).create_run(experiment_id, run_name=name).info.run_id)


class MLflowRun(MLFlowLogger):
    """Log to a run in MLflow, as a logger of Lightning. Only the first rank logs.

    Args:
        tracking_uri: an SQLite file (`sqlite:///outputs/mlflow.db`) or a server.
        experiment: its name.
        artifacts: the folder for artifacts, with SQLite.
        run_name: of a new run; None lets MLflow choose one.
        run_id: a run to continue. Steps that it already holds are not logged again. None starts a new run.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        artifacts: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self.logged_until = -1
        if is_rank_zero():
            run_id = self._open(tracking_uri, experiment, artifacts, run_name, run_id)
        super().__init__(experiment_name=experiment, tracking_uri=tracking_uri, run_id=run_id)

    def _open(
        self, tracking_uri: str, experiment: str, artifacts: str | None, name: str | None, run_id: str | None
    ) -> str:
        """Start a run, or reopen the run `run_id`, and return its id."""
        experiment_id = prepare_store(tracking_uri, experiment, artifacts)
        client = MlflowClient(tracking_uri)
        if run_id is None:
            parent = {"mlflow.parentRunId": os.environ[PARENT_RUN]} if os.environ.get(PARENT_RUN) else {}
            own = {f"version.{package}": version(package) for package in PACKAGES} | {"git_revision": git_revision()}
            return str(client.create_run(experiment_id, run_name=name, tags=own | parent).info.run_id)
        client.update_run(run_id, status="RUNNING")  # it may be FINISHED or FAILED; a killed run is still RUNNING
        self.logged_until = _last_step(client, run_id)
        return run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step, unless a continued run already holds the step."""
        if step is None or step > self.logged_until:
            super().log_metrics(metrics, step)

    def log_config(self, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        """Log the configuration as config.yaml, and flattened as parameters.

        Args:
            config: resolved, without interpolations. Parameters are cut to 500 characters, and None is left out.
            choices: {config group: option}, logged as parameters too.
        """
        flat = {**_flatten(config), **choices}
        params = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in flat.items() if value is not None]
        for i in range(0, len(params), 100):  # MLflow's limit for one call
            self.experiment.log_batch(self.run_id, params=params[i : i + 100])
        self.experiment.log_dict(self.run_id, dict(config), "config.yaml")

    def log_completions(self, table: dict[str, list], step: int) -> None:
        """Log the columns of a completion table as an artifact, such as completions/step_000050.json."""
        if step > self.logged_until:
            self.experiment.log_table(self.run_id, table, f"completions/step_{step:06d}.json")

    def log_evaluation(self, summaries: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Log an evaluation to this run, as the function `log_evaluation` does."""
        assert self.run_id is not None  # only the first rank logs
        log_evaluation(self.experiment, self.run_id, summaries, files)

    def log_folder(self, folder: Path) -> None:
        """Log a folder as artifacts under its own name."""
        self.experiment.log_artifacts(self.run_id, str(folder), folder.name)

    def set_status(self, status: str) -> None:
        """End the run with a status of MLflow's: FINISHED, FAILED or KILLED."""
        self.experiment.set_terminated(self.run_id, status)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self.experiment.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def log_evaluation(client: MlflowClient, run_id: str, summaries: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Log summaries as metrics `eval/<name>/…`, and files as artifacts in `evaluation/`.

    Args:
        client: of the store.
        run_id: of the run.
        summaries: {name: bae.evaluation.measure.Summary}. The curves of test-time scaling are logged with the number of
            samples as the step.
        files: their paths.
    """
    values = []
    for name, summary in summaries.items():
        values += [(f"eval/{name}/{key}", value, 0) for key, value in summary.metrics.items()]
        for strategy, curve in summary.scaling.items():
            values += [(f"eval/{name}/{metric_name(strategy)}", y, n) for n, y in enumerate(curve, 1)]
    _log(client, run_id, values, files, "evaluation")


def log_fidelity(client: MlflowClient, run_id: str, split: str, results: Any, files: Iterable[Path]) -> None:
    """Log results as metrics `fidelity/<split>/<objective>/<G>/<set>/<baseline>/…`, and files as artifacts.

    Args:
        client: of the store.
        run_id: of the run.
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
    _log(client, run_id, values, files, f"fidelity/{split}")


def _log(
    client: MlflowClient, run_id: str, values: Sequence[tuple[str, float, int]], files: Iterable[Path], place: str
) -> None:
    """Log metrics, given as (name, value, step), and files as artifacts in the folder `place`."""
    now = int(time.time() * 1000)
    for i in range(0, len(values), 1000):  # MLflow's limit for one call
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value, step in values[i : i + 1000]])
    for file in files:
        client.log_artifact(run_id, str(file), place)


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
    """
    from mlflow.exceptions import MlflowException

    try:
        with store(tracking_uri) as client:
            return Path(client.get_run(run_id).data.tags["output_folder"])
    except (MlflowException, KeyError) as error:
        raise FileNotFoundError(
            f"{key}={run_id}: neither an output folder nor a run in {tracking_uri}; give the folder that the run "
            "printed, or its MLflow run id"
        ) from error


def made_by(run_id: str, tracking_uri: str) -> str:
    """Return in words which version of this package made a run."""
    from mlflow.exceptions import MlflowException

    try:
        with store(tracking_uri) as client:
            tags = client.get_run(run_id).data.tags
    except MlflowException:
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
    """
    with store(tracking_uri) as client:
        found = [client.get_experiment_by_name(name) for name in experiments]
    ids = [experiment.experiment_id for experiment in found if experiment]
    runs: list[Run] = []
    token: str | None = ""
    while ids and token is not None:
        page = client.search_runs(ids, filter_string, order_by=["attributes.start_time DESC"], page_token=token or None)
        runs, token = runs + list(page), page.token or None
    return runs


def history(tracking_uri: str, run_id: str, metric: str) -> dict[int, float]:
    """Return {step: value} of one metric of a run."""
    return {m.step: m.value for m in MlflowClient(tracking_uri).get_metric_history(run_id, metric)}


def _last_step(client: MlflowClient, run_id: str) -> int:
    """Return the last step that a run has logged, or -1."""
    return max((m.step for m in client.get_metric_history(run_id, "train/accuracy")), default=-1)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {a: {b: 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def git_revision() -> str:
    """Return the commit of the package, with `-dirty` if files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
