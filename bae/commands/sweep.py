"""Make a multirun one parent run in MLflow, with its jobs as children."""

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

SWEPT = "BAE_SWEPT"
"""The environment variable by which a sweep tells its jobs which keys it sweeps."""


_open: list[tuple[str, str]] = []
"""The store and the id of the parent run, while this process runs a sweep."""


def swept_keys(hydra: DictConfig) -> list[str]:
    """Return the keys of a multirun that have several values, on the command line or in the sweeper's `params`."""
    given = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    keys = [override.key_or_group for override in given if override.is_sweep_override()]
    return list(dict.fromkeys([*(hydra.sweeper.get("params") or {}), *keys]))


def job_name(name: str) -> str:
    """Return the name of a run. In a sweep it says what sets the job apart from the others."""
    swept = os.environ.get(SWEPT, "").split()
    own = [o for o in HydraConfig.get().overrides.task if o.partition("=")[0] in swept]
    return " ".join([name, *own])


class SweepParent(Callback):
    """Make the store and the parent run before any job starts.

    Jobs learn of the parent by the environment, which launchers hand on to their processes.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from bae.report import tracking

        logger = config.logger
        os.environ[SWEPT] = " ".join(swept_keys(config.hydra))
        overrides = " ".join(config.hydra.overrides.task) or "sweep"
        try:
            parent = tracking.open_parent(
                logger.tracking_uri, logger.experiment, logger.artifacts, name=overrides[:200]
            )
        except ValueError as error:  # before any job; Hydra would make a warning of it
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
        os.environ[tracking.PARENT_RUN] = parent
        _open.append((logger.tracking_uri, parent))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Mark the parent as failed if a job failed. The sweep may end at once."""
        from bae.report import store, tracking

        parent = os.environ.get(tracking.PARENT_RUN)
        if parent and job_return.status == JobStatus.FAILED:
            store.connect(config.logger.tracking_uri).set_terminated(parent, "FAILED")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from bae.report import tracking

        close_parent("FINISHED")
        for name in (SWEPT, tracking.PARENT_RUN):
            os.environ.pop(name)


def close_parent(status: str) -> None:
    """Give the parent run of this process's sweep, if it is still running, a status in MLflow.

    The sweep has ended. So jobs that are still marked as running were killed with it.
    """
    from mlflow.exceptions import MlflowException

    while _open:
        uri, parent = _open.pop()
        try:
            _close(uri, parent, status)
        except MlflowException as error:  # how the sweep ended matters more
            print(f"{uri} was not told that the sweep {parent} is {status}: {error}", file=sys.stderr)


def _close(uri: str, parent: str, status: str) -> None:
    """Give a parent run, and its jobs that are still marked as running, a status."""
    from bae.report import store

    client = store.connect(uri)
    run = client.get_run(parent)
    wanted = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
    for job in client.search_runs([run.info.experiment_id], wanted):
        client.set_terminated(job.info.run_id, "KILLED")
    if run.info.status == "RUNNING":
        client.set_terminated(parent, status)
