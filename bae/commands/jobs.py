"""Keep what came of each job of a sweep: a file beside the jobs' folders, and the closing table."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bae.commands.objective_value import value_of
from bae.signals import Stopped

FILE = "jobs.jsonl"
"""The file of a sweep's folder that has a line whenever the state of a job changes."""
SWEPT = "BAE_SWEPT"
"""The environment variable by which a sweep tells its jobs which keys it sweeps."""
SHOWN = 200
"""The characters of an unforeseen error that the closing table shows."""


class State(StrEnum):
    """Name what may have become of a job. A job that is still STARTED when the sweep has ended was stopped."""

    WAITING = "not begun"
    STARTED = "stopped"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


class JobLog:
    """Read and append the states of the jobs of a sweep, in any process. A job is known by its overrides.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE

    def append(self, overrides: Iterable[str], state: State, note: str = "") -> None:
        """Append the state of a job. note: its folder, or why it failed or was skipped."""
        line = json.dumps({"job": own(overrides), "state": state.name, "note": note})
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def jobs(self) -> list[tuple[list[str], State, str]]:
        """Return (overrides, last state, note) of each job, in the order in which the jobs were first named."""
        last: dict[tuple[str, ...], tuple[list[str], State, str]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            row = json.loads(line)
            last[tuple(row["job"])] = (row["job"], State[row["state"]], row["note"])
        return list(last.values())

    def count(self, state: State) -> int:
        """Return the number of jobs in a state."""
        return sum(each is state for _, each, _ in self.jobs())

    def table(self, swept: Sequence[str]) -> list[str]:
        """Return the closing table: a line for each job, and one that counts. swept: the keys by which jobs differ."""
        jobs = self.jobs()
        labels = [label(job, swept) for job, _, _ in jobs]
        width = max(map(len, labels), default=0)
        rows = [f"{name:<{width}}  {state:<9}  {note}" for name, (_, state, note) in zip(labels, jobs, strict=True)]
        counts = [(self.count(state), state) for state in State]
        return [*rows, f"{len(jobs)} jobs: " + ", ".join(f"{count} {state}" for count, state in counts if count)]


def label(overrides: Iterable[str], swept: Sequence[str]) -> str:
    """Return what sets a job apart from the others: its values of the keys that differ."""
    return " ".join(o for o in overrides if o.partition("=")[0].lstrip("+") in swept)


def own(overrides: Iterable[str]) -> list[str]:
    """Return the overrides by which a job is known, begun or resumed, by whichever launcher."""
    return [o for o in overrides if not o.startswith(("resume=", "hydra.", "hydra/"))]


def run_job(
    log: JobLog,
    overrides: Sequence[str],
    task: Callable[[DictConfig], Any],
    cfg: DictConfig,
    explain: Callable[[Exception], str | None],
) -> float | None:
    """Run one job of a sweep, and write down what came of it. The jobs after it run, too.

    Returns what a sweeper optimises, None for a job that failed (see bae.commands.objective_value.value_of).

    Args:
        log: of the sweep.
        overrides: of the job.
        task: what a job does. It returns the folder of the run, or None if it was done before.
        cfg: of the job.
        explain: gives a sentence for an error that the user can mend, and None for any other; that is shown in full.

    Raises:
        Stopped: if a signal stops the job, and so the sweep.
    """
    log.append(overrides, State.STARTED)
    try:
        folder = task(cfg)
        value = value_of(cfg, folder)
    except Stopped:
        raise
    except SystemExit as error:  # of a user's part
        log.append(overrides, State.FAILED, f"a part ended the process, with {error.code!r}")
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            traceback.print_exc()
            sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"
        print(f"job {label(overrides, os.environ.get(SWEPT, '').split())} failed: {sentence}", file=sys.stderr)
        log.append(overrides, State.FAILED, sentence)
    else:
        log.append(overrides, *((State.SKIPPED, "done before") if folder is None else (State.DONE, str(folder))))
        return value
    return None
