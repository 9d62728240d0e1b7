"""MLflow: the store, made once; the run, opened or reopened; what is logged besides metrics."""

import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from filelock import FileLock
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from bae.evaluation.voting import metric_name

PARENT_RUN = "BAE_PARENT_RUN"
"""Environment variable by which a sweep tells its jobs, in whatever process they run, whose children they are."""

PARAM_LIMIT = 500
SQLITE = "sqlite:///"
PACKAGES = ("torch", "transformers", "lightning", "mlflow", "hydra-core", "math-verify", "numpy")


@contextmanager
def store(tracking_uri: str) -> Iterator[MlflowClient]:
    """A client, alone with the store for the `with` body where that is SQLite; its schema is there.

    Jobs that start together wait for each other here: MLflow's own set-up of a fresh SQLite file is not safe
    against a second one.
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
    """Make database, schema and experiment if they are not there; the experiment's id. artifacts: with SQLite, the
    folder for them."""
    with store(tracking_uri) as client:
        found = client.get_experiment_by_name(experiment)
        if found:
            return found.experiment_id
        local = Path(artifacts).absolute().as_uri() if artifacts and tracking_uri.startswith(SQLITE) else None
        return client.create_experiment(experiment, local)


def absolute(tracking_uri: str) -> str:
    """The same store, from whatever working directory."""
    if not tracking_uri.startswith(SQLITE):
        return tracking_uri
    return SQLITE + str(Path(tracking_uri.removeprefix(SQLITE)).absolute())


def open_parent(tracking_uri: str, experiment: str, artifacts: str | None, name: str) -> str:
    """Start the run under which those of a sweep are listed; its id."""
    experiment_id = prepare_store(tracking_uri, experiment, artifacts)
    return MlflowClient(tracking_uri).create_run(experiment_id, run_name=name).info.run_id


class MLflowRun(MLFlowLogger):
    """Lightning's logger on a run of ours.

    tracking_uri: SQLite (`sqlite:///outputs/mlflow.db`) or a server. artifacts: folder for SQLite's artifacts.
    run_id: a run to go on with; what it already holds is not logged twice.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        artifacts: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
    ):
        self.logged_until = -1
        if is_rank_zero():
            run_id = self._open(tracking_uri, experiment, artifacts, run_name, run_id)
        super().__init__(experiment_name=experiment, tracking_uri=tracking_uri, run_id=run_id)

    def _open(
        self, tracking_uri: str, experiment: str, artifacts: str | None, name: str | None, run_id: str | None
    ) -> str:
        experiment_id = prepare_store(tracking_uri, experiment, artifacts)
        client = MlflowClient(tracking_uri)
        if run_id is None:
            parent = {"mlflow.parentRunId": os.environ[PARENT_RUN]} if os.environ.get(PARENT_RUN) else {}
            own = {f"version.{package}": version(package) for package in PACKAGES} | {"git_revision": git_revision()}
            return client.create_run(experiment_id, run_name=name, tags=own | parent).info.run_id
        client.update_run(run_id, status="RUNNING")  # it may say FINISHED, FAILED or, killed, still RUNNING
        self.logged_until = _last_step(client, run_id)
        return run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None or step > self.logged_until:
            super().log_metrics(metrics, step)

    def log_config(self, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        """Log the resolved configuration as config.yaml, and flat as parameters; choices: {group: option}."""
        flat = {**_flatten(config), **choices}
        params = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in flat.items() if value is not None]
        for i in range(0, len(params), 100):  # MLflow's limit for one call
            self.experiment.log_batch(self.run_id, params=params[i : i + 100])
        self.experiment.log_dict(self.run_id, dict(config), "config.yaml")

    def log_completions(self, table: dict[str, list], step: int) -> None:
        """Log a table of completions as completions/step_000050.json."""
        if step > self.logged_until:
            self.experiment.log_table(self.run_id, table, f"completions/step_{step:06d}.json")

    def log_evaluation(self, summaries: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Log what `log_evaluation` below does, to this run."""
        assert self.run_id is not None  # ranks other than the first do not log
        log_evaluation(self.experiment, self.run_id, summaries, files)

    def log_folder(self, folder: Path) -> None:
        """Log a folder under its own name."""
        self.experiment.log_artifacts(self.run_id, str(folder), folder.name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.experiment.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def log_evaluation(client: MlflowClient, run_id: str, summaries: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Log the metrics of each `bae.evaluation.measure.Summary` as `eval/<name>/…`, test-time scaling with the number
    of samples
    in the place of the step, and files as artifacts in `evaluation/`."""
    values = []
    for name, summary in summaries.items():
        values += [(f"eval/{name}/{key}", value, 0) for key, value in summary.metrics.items()]
        for strategy, curve in summary.scaling.items():
            values += [(f"eval/{name}/{metric_name(strategy)}", y, n) for n, y in enumerate(curve, 1)]
    _log(client, run_id, values, files, "evaluation")


def log_fidelity(client: MlflowClient, run_id: str, split: str, results: Any, files: Iterable[Path]) -> None:
    """Log the table of `bae.fidelity.measure.compare` as `fidelity/<split>/<objective>/<G>/<set>/<baseline>/…`, and
    files as
    artifacts in `fidelity/<split>`."""
    keys = ("rmse", "observed_rmse", "bias", "slope", "correlation", "fallback")
    values = []
    for row in results.to_dict("records"):
        place = row["set"].replace("=", "_").replace("+", "")  # MLflow takes neither sign in a name
        prefix = f"fidelity/{split}/{row['objective']}/{row['group_size']}/{place}/{row['baseline']}"
        values += [(f"{prefix}/{key}", row[key], 0) for key in keys]
    _log(client, run_id, values, files, f"fidelity/{split}")


def _log(
    client: MlflowClient, run_id: str, values: Sequence[tuple[str, float, int]], files: Iterable[Path], place: str
) -> None:
    """Metrics as (name, value, step), and files as artifacts in the folder `place`."""
    now = int(time.time() * 1000)
    for i in range(0, len(values), 1000):  # MLflow's limit for one call
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value, step in values[i : i + 1000]])
    for file in files:
        client.log_artifact(run_id, str(file), place)


def is_rank_zero() -> bool:
    """Whether this process is the one that logs; known from the environment before any process group is."""
    return getattr(rank_zero_only, "rank", 0) == 0


def find_run_folder(key: str, run_id: str, tracking_uri: str) -> Path:
    """The output folder that a run was tagged with. Raises FileNotFoundError if there is no such run."""
    from mlflow.exceptions import MlflowException

    try:
        with store(tracking_uri) as client:
            return Path(client.get_run(run_id).data.tags["output_folder"])
    except (MlflowException, KeyError) as error:
        raise FileNotFoundError(
            f"{key}={run_id}: neither an output folder nor a run in {tracking_uri}; give the folder that the run "
            "printed, or its MLflow run id"
        ) from error


def search(tracking_uri: str, experiments: Sequence[str], filter_string: str) -> list[Run]:
    """Runs of the experiments that are there, newest first."""
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
    """{step: value} of one metric."""
    return {m.step: m.value for m in MlflowClient(tracking_uri).get_metric_history(run_id, metric)}


def _last_step(client: MlflowClient, run_id: str) -> int:
    return max((m.step for m in client.get_metric_history(run_id, "train/accuracy")), default=-1)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def git_revision() -> str:
    """The commit that the package is at, with `-dirty` if files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
