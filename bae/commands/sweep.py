"""Make a multirun one parent run in MLflow, with its jobs as children, and close it with a table of what came of them.

No job ends the others: bae.commands.jobs keeps what came of each. Where a pool of processes breaks, because one of them
was killed, bae.commands.sweep_rest runs what is left. bae.commands.submitit_jobs waits for jobs on Slurm.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bae.commands import submitit_jobs
from bae.commands.jobs import SWEPT, JobLog, State, label
from bae.commands.objective_value import set_direction
from bae.commands.process_setup import program
from bae.commands.schema import WITHOUT_EFFECT


@dataclass(frozen=True)
class Sweep:
    """Hold what a sweep is, while this process runs it.

    Attributes:
        uri: of the store.
        parent: the id of the parent run.
        log: of its jobs.
        command: the name of the configuration, as in bae-<command>.
        processes: how many jobs the launcher runs at a time, as joblib counts.
    """

    uri: str
    parent: str
    log: JobLog
    command: str
    processes: int


_open: list[Sweep] = []
"""The sweep that this process runs, or nothing."""


def running() -> Sweep | None:
    """Return the sweep that this process runs, or None."""
    return _open[-1] if _open else None


def log_of_jobs() -> JobLog | None:
    """Return the log of the sweep of which the present job is one, in whatever process it runs; None for other runs."""
    composed = HydraConfig.get()
    recorded = composed.mode == RunMode.MULTIRUN and SWEPT in os.environ
    return JobLog(Path(composed.sweep.dir)) if recorded else None


def planned(hydra: DictConfig) -> list[list[str]]:
    """Return the overrides of each job of a multirun, as Hydra's own sweeper makes them; none for other sweepers."""
    if BasicSweeper.__name__ not in hydra.sweeper._target_:
        return []
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    params = [f"{key}={values}" for key, values in (hydra.sweeper.params or {}).items()]
    given = OmegaConf.to_container(hydra.overrides.task)  # references stay as they are, as in the overrides of the jobs
    assert isinstance(given, list)
    try:
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([*params, *given]), None)
    except HydraException:  # Hydra says it better in a moment
        return []
    return jobs


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
        o for o in hydra.overrides.task if o.lstrip("+~").partition("=")[0].partition(".")[0] not in WITHOUT_EFFECT
    )
    text = json.dumps([hydra.job.config_name, decisive, sorted(varied.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_name(name: str) -> str:
    """Return the name of a run. In a sweep it is what sets the job apart from the others."""
    return label(HydraConfig.get().overrides.task, os.environ.get(SWEPT, "").split()) or name


class SweepParent(Callback):
    """Make the store and the parent run before any job starts.

    Jobs learn of the parent by the environment, which launchers hand on to their processes.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from bae.report import sweep_page, tracking

        set_direction(config)
        logger, hydra = config.logger, config.hydra
        submitit_jobs.check_cluster(hydra)
        varied = swept(hydra)
        os.environ[SWEPT] = " ".join(varied)
        command = shlex.join([program(), *sys.argv[1:]])
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
            sys.exit(f"{program()}: {error}")
        sweep_page.write(logger.tracking_uri, parent)
        os.environ[tracking.PARENT_RUN] = parent
        log, hydra = JobLog(Path(config.hydra.sweep.dir)), config.hydra
        for job in planned(hydra):
            log.append(job, State.WAITING)
        if submitit_jobs.is_launcher(hydra):
            submitit_jobs.wait_for_each(log)
        processes = int(hydra.launcher.get("n_jobs") or 1)
        _open.append(Sweep(logger.tracking_uri, parent, log, hydra.job.config_name, processes))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """List the job on the parent's page."""
        from bae.report import sweep_page, tracking

        parent = os.environ.get(tracking.PARENT_RUN)
        if parent:
            sweep_page.write(config.logger.tracking_uri, parent)


def finish() -> None:
    """Close the sweep of this process, whose jobs have all ended, and exit with 1 if one of them failed."""
    sweep = running()
    if sweep is None:
        return
    failed = sweep.log.count(State.FAILED)
    close_parent("FAILED" if failed else "FINISHED")
    if failed:
        advice = "mend that, and give the same command with skip_finished=true, which skips what is done"
        sys.exit(f"{program()}: {failed} of the jobs failed; {advice}")


def close_parent(status: str) -> None:
    """Give the parent run of this process's sweep a status in MLflow, and print what came of its jobs.

    The sweep has ended. So jobs that are still marked as running were killed with it.
    """
    from mlflow.exceptions import MlflowException

    from bae.report import tracking

    while _open:
        sweep = _open.pop()
        swept = os.environ.pop(SWEPT, "").split()
        os.environ.pop(tracking.PARENT_RUN, None)
        print("\n".join(["", *sweep.log.table(swept)]), flush=True)
        try:
            _close(sweep.uri, sweep.parent, status)
        except MlflowException as error:  # how the sweep ended matters more
            print(f"{sweep.uri} was not told that the sweep {sweep.parent} is {status}: {error}", file=sys.stderr)


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
