"""The one way in which callbacks log: what a logger of runs can do, and all loggers of a trainer as one."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L


@runtime_checkable
class RunLogger(Protocol):
    """Log what a training run makes. bae.report.tracking.MLflowRun does."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of a step."""
        ...

    def log_completions(self, table: dict[str, list[Any]], step: int) -> None:
        """Log a completion table of a step, column by column."""
        ...

    def log_text(self, text: str, file: str) -> None:
        """Log a text as a file of the run, such as completions/step_000050.html."""
        ...

    def log_evaluation(self, summaries: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Log the summaries of an evaluation, by name, and its files."""
        ...

    def log_folder(self, folder: Path) -> None:
        """Log a folder under its own name."""
        ...

    def sync(self) -> None:
        """Wait until the disk has what was logged: before a checkpoint after which it is not logged again."""
        ...


class _Everyone:
    """Hand everything on to the loggers of a trainer. A logger that is no RunLogger gets the metrics alone."""

    def __init__(self, loggers: Sequence[Any]) -> None:
        self._loggers = loggers

    def _run_loggers(self) -> list[RunLogger]:
        return [logger for logger in self._loggers if isinstance(logger, RunLogger)]

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(metrics, step=step)

    def log_completions(self, table: dict[str, list[Any]], step: int) -> None:
        for logger in self._run_loggers():
            logger.log_completions(table, step=step)

    def log_text(self, text: str, file: str) -> None:
        for logger in self._run_loggers():
            logger.log_text(text, file)

    def log_evaluation(self, summaries: Mapping[str, Any], files: Iterable[Path]) -> None:
        paths = list(files)
        for logger in self._run_loggers():
            logger.log_evaluation(summaries, paths)

    def log_folder(self, folder: Path) -> None:
        for logger in self._run_loggers():
            logger.log_folder(folder)

    def sync(self) -> None:
        for logger in self._run_loggers():
            logger.sync()


def run_logger(trainer: L.Trainer) -> RunLogger:
    """Return all loggers of a trainer as one."""
    return _Everyone(trainer.loggers)
