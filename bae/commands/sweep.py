"""Make a multirun one parent run in MLflow, with its jobs as children."""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bae.commands.resuming import PLACES

SWEPT = "BAE_SWEPT"
"""The environment variable by which a sweep tells its jobs which keys it sweeps."""


_open: list[tuple[str, str]] = []
"""The store and the id of the parent run, while this process runs a sweep."""


def swept(hydra: DictConfig) -> dict[str, str]:
    """Return {key: values} of what a multirun varies, on the command line or in the sweeper's `params`."""
    given = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    lines = [str(override.input_line) for override in given if override.is_sweep_override()]
    named = {str(key): str(values) for key, values in (hydra.sweeper.get("params") or {}).items()}
    return named | {line.partition("=")[0].strip(): line.partition("=")[2].strip() for line in lines}


def sweep_name(varied: Mapping[str, str]) -> str:
    """Return the name of a parent run. It says what varied, such as `method=ocb,rlcr · seed=0,1,2`."""
    return " · ".join(f"{key}={values}" for key, values in varied.items())[:200] or "sweep"


def digest(hydra: DictConfig, varied: Mapping[str, str]) -> str:
    """Return a digest of what a multirun runs. With the same one it goes on under the same parent."""
    decisive = sorted(
        o for o in hydra.overrides.task if o.lstrip("+~").partition("=")[0].partition(".")[0] not in PLACES
    )
    text = json.dumps([hydra.job.config_name, decisive, sorted(varied.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_name(name: str) -> str:
    """Return the name of a run. In a sweep it is what sets the job apart from the others."""
    keys = os.environ.get(SWEPT, "").split()
    return " ".join(o for o in HydraConfig.get().overrides.task if o.partition("=")[0] in keys) or name


class SweepParent(Callback):
    """Make the store and the parent run before any job starts.

    Jobs learn of the parent by the environment, which launchers hand on to their processes.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from bae.report import sweep_page, tracking

        logger, hydra = config.logger, config.hydra
        varied = swept(hydra)
        os.environ[SWEPT] = " ".join(varied)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        tags = tracking.source(command) | {sweep_page.VARIED: " ".join(varied)}
        try:
            parent = tracking.open_parent(
                logger.tracking_uri,
                logger.experiment,
                logger.artifacts,
                sweep_name(varied),
                digest(hydra, varied),
                tags,
            )
        except ValueError as error:  # before any job; Hydra would make a warning of it
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
        sweep_page.write(logger.tracking_uri, parent)
        os.environ[tracking.PARENT_RUN] = parent
        _open.append((logger.tracking_uri, parent))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """List the job on the parent's page. Mark the parent as failed if a job failed: the sweep may end at once."""
        from bae.report import store, sweep_page, tracking

        parent = os.environ.get(tracking.PARENT_RUN)
        if parent:
            sweep_page.write(config.logger.tracking_uri, parent)
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
    from bae.report import store, sweep_page

    client = store.connect(uri)
    run = client.get_run(parent)
    wanted = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
    for job in client.search_runs([run.info.experiment_id], wanted):
        client.set_terminated(job.info.run_id, "KILLED")
    if run.info.status == "RUNNING":
        client.set_terminated(parent, status)
    sweep_page.write(uri, parent)
