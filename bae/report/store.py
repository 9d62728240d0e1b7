"""Connect to a store of MLflow and make it ready; say in one sentence what is wrong with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bae.report.credentials import refuse_credentials

SQLITE = "sqlite:///"
"""The beginning of the URI of a store in an SQLite file."""
LOCAL = "http://127.0.0.1:5000"
"""Where `mlflow ui` answers, unless it is told otherwise."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""The tag by which MLflow knows that an experiment trains models."""


class StoreError(ValueError):
    """Say in one sentence that a store does not answer as it should."""


class NotInStore(StoreError):
    """Say in one sentence that a store does not have what was asked for."""


def connect(tracking_uri: str) -> MlflowClient:
    """Return a client of a store. Raises ValueError if there are credentials in the address."""
    refuse_credentials("logger.tracking_uri", tracking_uri)
    return MlflowClient(tracking_uri)


@contextmanager
def store(tracking_uri: str) -> Iterator[MlflowClient]:
    """Give a client of a store whose schema exists. For SQLite, no other process is in a `with` body at the same time.

    Jobs that start together wait for each other here, because MLflow's own set-up of a new SQLite file is not safe if
    two processes do it at once.
    """
    if not tracking_uri.startswith(SQLITE):
        yield connect(tracking_uri)
        return
    database = Path(tracking_uri.removeprefix(SQLITE)).absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        client = connect(tracking_uri)
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
        return str(client.create_experiment(experiment, local, tags=KIND))


def page(tracking_uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """Return the address of a run's page, of its experiment's runs, or of the list of experiments.

    MLflow opens its pages for language-model applications unless the address says otherwise. For SQLite it is the
    address at which `mlflow ui` answers by default.
    """
    server = tracking_uri.rstrip("/") if tracking_uri.startswith("http") else LOCAL
    place = f"/{experiment_id}/runs" if experiment_id else ""
    place += f"/{run_id}" if experiment_id and run_id else ""
    return f"{server}/#/experiments{place}?workflowType=machine_learning"


def pages(tracking_uri: str) -> list[str]:
    """Return a line for each experiment of a store: its name and the address of its runs; the newest comes first."""
    with store(tracking_uri) as client:
        found = client.search_experiments(order_by=["last_update_time DESC"])
    return [f"{each.name:<24} {page(tracking_uri, each.experiment_id)}" for each in found]


def absolute(tracking_uri: str) -> str:
    """Return a URI of the same store that does not depend on the working directory."""
    if not tracking_uri.startswith(SQLITE):
        return tracking_uri
    return SQLITE + str(Path(tracking_uri.removeprefix(SQLITE)).absolute())


@contextmanager
def answering(tracking_uri: str) -> Iterator[None]:
    """Raise a StoreError, one sentence, if the store fails in the `with` body."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise NotInStore(f"not in the MLflow store {tracking_uri}: {reason(error)}") from error
        raise StoreError(f"the MLflow store {tracking_uri} does not answer as it should: {reason(error)}") from error


def exists(tracking_uri: str) -> bool:
    """Tell whether a store may be there: a server, or an SQLite file that exists. MLflow would make a new file."""
    return not tracking_uri.startswith(SQLITE) or Path(tracking_uri.removeprefix(SQLITE)).is_file()


def is_for_good(error: MlflowException) -> bool:
    """Tell whether a store refused what it was given, and would refuse it again."""
    return bool(error.error_code == "INVALID_PARAMETER_VALUE")


def reason(error: Exception) -> str:
    """Return what an error says, in one short line."""
    line = " ".join(str(error).split())
    return line if len(line) <= 200 else f"{line[:200]} …"
