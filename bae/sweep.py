"""A multirun is one parent run in MLflow, with its jobs as children."""

import os
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepParent(Callback):
    """Makes the store and the parent before any job starts; jobs learn of the parent by the environment, which
    launchers hand on to their processes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from bae import tracking

        logger = config.logger
        overrides = " ".join(config.hydra.overrides.task) or "sweep"
        os.environ[tracking.PARENT_RUN] = tracking.open_parent(
            logger.tracking_uri, logger.experiment, logger.artifacts, name=overrides[:200]
        )

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A job that failed fails the sweep, which may end there and then."""
        from mlflow import MlflowClient

        from bae import tracking

        parent = os.environ.get(tracking.PARENT_RUN)
        if parent and job_return.status == JobStatus.FAILED:
            MlflowClient(config.logger.tracking_uri).set_terminated(parent, "FAILED")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from mlflow import MlflowClient

        from bae import tracking

        client, parent = MlflowClient(config.logger.tracking_uri), os.environ.pop(tracking.PARENT_RUN)
        if client.get_run(parent).info.status == "RUNNING":
            client.set_terminated(parent)
