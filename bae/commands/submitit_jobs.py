"""Let the launchers of submitit, for Slurm and for this machine, wait for each job by itself.

They ask for one result after the other, and the first job that ended without one would end the sweep: the others would
still run, and nobody would write down what came of them.
"""

import shutil
import sys
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from bae.commands.jobs import JobLog, State, own
from bae.commands.process_setup import program


def is_launcher(hydra: DictConfig) -> bool:
    """Tell whether a multirun's launcher is one of submitit's."""
    return "submitit" in hydra.launcher._target_


def check_cluster(hydra: DictConfig) -> None:
    """Exit with one sentence if a multirun's jobs are for Slurm, and there is none here."""
    if is_launcher(hydra) and "Slurm" in hydra.launcher._target_ and shutil.which("sbatch") is None:
        sys.exit(
            f"{program()}: hydra/launcher=submitit_slurm: there is no Slurm here, because sbatch is not found; "
            "hydra/launcher=submitit_local starts the same jobs on this machine"
        )


def wait_for_each(log: JobLog) -> None:
    """Let a job without a result be written down as failed, and the sweep go on to the next one. log: of its jobs."""
    from submitit.core.core import Job
    from submitit.core.utils import UncompletedJobError

    job_class: Any = Job
    ask = getattr(Job.results, "of_submitit", Job.results)  # an earlier sweep of this process may have replaced it

    def results(job: Any) -> list[Any]:
        try:
            return list(ask(job))
        except UncompletedJobError:
            overrides = job.submission().args[0]
            state = str(job.state).split()[0]
            reason = f"its process ended without a result ({state}); {job.paths.stderr} may say why"
            if last_state(log, overrides) not in (State.DONE, State.SKIPPED, State.FAILED):
                log.append(overrides, State.FAILED, reason)
            return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED)]

    results.of_submitit = ask  # type: ignore[attr-defined]
    job_class.results = results


def last_state(log: JobLog, overrides: list[str]) -> State | None:
    """Return the last state of a job that the log has, or None."""
    return next((state for job, state, _ in log.jobs() if job == own(overrides)), None)
