"""One store in MLflow for all tests of reports, because making its schema takes seconds."""

import pandas
import pytest
from mlflow import MlflowClient

from bae.report.tracking import prepare_store


class Store:
    """Hold a store in a folder, and make runs as training, evaluation and bae-fidelity leave them.

    Each run is newer than those before it.
    """

    def __init__(self, folder):
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        self.time = 0

    def run(self, experiment, params, metrics=None, status="FINISHED", tags=None):
        """Make a run; metrics: {name: value, or {step: value}}. Returns its id."""
        self.time += 1000
        experiment_id = prepare_store(self.uri, experiment, str(self.folder / "artifacts"))
        run_id = self.client.create_run(experiment_id, start_time=self.time, tags=tags or {}).info.run_id
        for key, value in params.items():
            self.client.log_param(run_id, key, value)
        for key, value in (metrics or {}).items():
            for step, y in (value if isinstance(value, dict) else {0: value}).items():
                self.client.log_metric(run_id, key, y, step=step)
        self.client.set_terminated(run_id, status)
        return run_id

    def table(self, run_id, rows, place):
        """Log rows, a list of dictionaries, as the Parquet artifact `place`."""
        folder, _, name = place.rpartition("/")
        file = self.folder / name
        pandas.DataFrame(rows).to_parquet(file)
        self.client.log_artifact(run_id, str(file), folder)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))
