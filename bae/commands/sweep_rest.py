"""Run what is left of a sweep after its pool of processes broke, because one of them was killed.

Such a pool gives up all its jobs. Here each job has a process of its own, so whichever is killed is alone.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bae.commands import cli
from bae.commands.jobs import JobLog, State
from bae.commands.process_setup import program
from bae.commands.sweep import Sweep
from bae.signals import STOPPING, Stopped, exit_code

JOB_OF = "BAE_JOB_OF"
"""The environment variable that tells a process of which sweep, by its folder, it runs one job."""
STOPPED = {exit_code(signum): signum for signum in STOPPING}


class Rest:
    """Run the jobs of a sweep that have not ended, as many at a time as its launcher did.

    Those that were under way go on from their newest checkpoint, if MLflow has the run already.

    Args:
        sweep: that this process runs.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.processes: list[subprocess.Popen] = []

    def run(self) -> None:
        """Run the jobs. Raises Stopped if a signal stops this process or one of theirs: then all of them stop."""
        from joblib import effective_n_jobs

        ended = (State.DONE, State.SKIPPED, State.FAILED)
        left = [(n, job) for n, (job, state, _) in enumerate(self.sweep.log.jobs()) if state not in ended]
        with ThreadPoolExecutor(effective_n_jobs(self.sweep.processes)) as pool:
            try:
                list(pool.map(self._job, *zip(*left, strict=True)))
            except Stopped as stop:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    process.send_signal(stop.signum)
                raise

    def _job(self, number: int, overrides: Sequence[str]) -> None:
        """Run one job, and write down if its process was killed."""
        log = self.sweep.log
        process = subprocess.Popen(
            self._command(number, overrides), env={**os.environ, JOB_OF: str(log.folder.absolute())}
        )
        self.processes.append(process)
        code = process.wait()
        if code in STOPPED:
            raise Stopped(STOPPED[code])
        if code:
            log.append(overrides, State.FAILED, _words(code))

    def _command(self, number: int, overrides: Sequence[str]) -> list[str]:
        """Return the command line of one job, in a new folder."""
        folders = [f"--config-dir={folder}" for folder in cli.user_folders()]
        resume = [] if any(o.startswith("resume=") for o in overrides) else ["resume=auto"]
        place = cli.quoted(str(self.sweep.log.folder.absolute() / f"{number}_again"))
        module = f"bae.commands.{self.sweep.command}"
        return [sys.executable, "-m", module, *folders, *overrides, *resume, f"hydra.run.dir={place}"]


def run_rest(sweep: Sweep) -> None:
    """Run what is left of a sweep whose pool of processes broke. Raises Stopped as Rest.run does."""
    print(
        f"{program()}: a process of this sweep was killed, and its launcher gave up the others; what is left runs "
        "in processes of its own, and what was under way goes on from its last checkpoint if MLflow has it",
        file=sys.stderr,
    )
    Rest(sweep).run()


def job_of() -> JobLog | None:
    """Return the log of the sweep of which this process was started to run one job, or None. Can be asked once."""
    folder = os.environ.pop(JOB_OF, None)  # processes that the job starts are none of the sweep
    return JobLog(Path(folder)) if folder else None


def _words(code: int) -> str:
    """Return in words how a process ended. code: of subprocess."""
    if code > 0:
        return f"its process ended with exit code {code}"
    return f"its process was killed by {signal.Signals(-code).name}; memory may have run out"
