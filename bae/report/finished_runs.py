"""Find the finished runs of a method in MLflow, with their metrics and their samples, for a table or a figure."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import pandas
from mlflow import MlflowClient
from mlflow.entities import Run

from bae.evaluation.completion_table import merge
from bae.report import tracking
from bae.report.store import NotInStore, answering, connect, exists, store

FINISHED = "FINISHED"
"""The status of a run in MLflow that is done."""


class FinishedRuns:
    """Hold a selection of the finished runs in MLflow.

    Args:
        tracking_uri: of the store.
        experiments: their names. None takes the experiments that a table or a figure names.
        runs: ids of the only runs to take. None takes any.
        models: config options of the group `model`, the only ones to take. None takes any.
        resamples: of the bootstraps that compare methods.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiments: Sequence[str] | None,
        runs: Sequence[str] | None,
        models: Sequence[str] | None,
        resamples: int,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiments = experiments
        self.only_runs = runs
        self.only_models = models
        self.resamples = resamples

    @cached_property
    def client(self) -> MlflowClient:
        """Return a client of the store."""
        return connect(self.tracking_uri)

    def check(self) -> None:
        """Refuse a store without finished runs, and ids of runs that it lacks or that are not finished.

        Raises:
            NotInStore: one sentence.
            StoreError: one sentence, if the store does not answer.
        """
        elsewhere = "name another with outputs=<folder> or logger.tracking_uri=<address>"
        if not exists(self.tracking_uri):
            raise NotInStore(f"there is no MLflow store at {self.tracking_uri}; {elsewhere}")
        for run in self._named():
            if run.info.status != FINISHED:
                raise NotInStore(f"runs: {run.info.run_id} is {run.info.status}; only finished runs are reported")
        with answering(self.tracking_uri), store(self.tracking_uri) as client:
            ids = [experiment.experiment_id for experiment in client.search_experiments()]
            found = client.search_runs(ids, f"attributes.status = '{FINISHED}'", max_results=1)
        if not found:
            raise NotInStore(f"the MLflow store {self.tracking_uri} has no finished run; {elsewhere}")

    def by_model(self, spec: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, list[Run]]:
        """Find the runs of a method, one for each seed. If a seed was run more than once, the newest run is taken.

        Args:
            spec: a table or a figure of conf/report/; its `experiments` are searched unless others
                were chosen.
            method: {parameter: value} that the runs have. If a value is a list, the runs have one of its items.

        Returns:
            {model: runs}, ordered by model and by seed.
        """
        found: dict[str, dict[str, Run]] = {}
        candidates = self._finished(tuple(self.experiments or spec["experiments"]))
        if self.only_runs is not None:
            candidates = [run for run in self._named() if run.info.status == FINISHED]
        for run in candidates:
            params = run.data.params
            model = params.get("model", "unknown")
            wanted = self.only_models is None or model in self.only_models
            if wanted and all(params.get(key) in _options(value) for key, value in method.items()):
                found.setdefault(model, {}).setdefault(params.get("seed", ""), run)
        return {model: [seeds[seed] for seed in sorted(seeds)] for model, seeds in sorted(found.items())}

    @lru_cache  # noqa: B019 - one object for the life of the process
    def _finished(self, experiments: tuple[str, ...]) -> list[Run]:
        """Return the finished runs of the experiments, newest first."""
        return tracking.search(self.tracking_uri, experiments, f"attributes.status = '{FINISHED}'")

    @lru_cache  # noqa: B019
    def _named(self) -> list[Run]:
        """Return the runs that were named by their ids, newest first. Raises NotInStore for one that is not there."""
        with answering(self.tracking_uri):
            runs = [self.client.get_run(run_id) for run_id in self.only_runs or ()]
        return sorted(runs, key=lambda run: run.info.start_time, reverse=True)

    def evaluated(self, runs: Sequence[Run], splits: Sequence[str]) -> tuple[str, list[Run]] | None:
        """Return the first of `splits` on which some of the runs were evaluated, and these runs; None without any."""
        for split in splits:
            evaluated = [run for run in runs if f"eval/{split}/accuracy" in run.data.metrics]
            if evaluated:
                return split, evaluated
        return None

    @lru_cache  # noqa: B019
    def samples(self, run_id: str, split: str) -> pandas.DataFrame:
        """Return the completion table that the evaluation of a run logged."""
        return self._read(run_id, f"evaluation/{split}.parquet")

    def errors(self, run: Run, split: str) -> pandas.DataFrame | None:
        """Return the errors of baselines that bae-fidelity logged for a split, or None if there are none."""
        folder = f"fidelity/{split}"
        file = f"{folder}/errors.parquet"
        found = any(artifact.path == file for artifact in self.client.list_artifacts(run.info.run_id, folder))
        return self._read(run.info.run_id, file) if found else None

    def _read(self, run_id: str, file: str) -> pandas.DataFrame:
        """Read an artifact that is a Parquet file."""
        with tempfile.TemporaryDirectory() as folder:
            return pandas.read_parquet(self.client.download_artifacts(run_id, file, folder))

    def pooled(self, runs: Sequence[Run], split: str) -> pandas.DataFrame:
        """Join the completions of several seeds in one table. Those of one problem are samples of one prompt."""
        return merge([self.samples(run.info.run_id, split) for run in runs])

    def history(self, run: Run, metric: str) -> dict[int, float]:
        """Return {step: value} of one metric of a run."""
        return tracking.history(self.tracking_uri, run.info.run_id, metric)


def measured_on(runs: Sequence[Run], split: str) -> str:
    """Return the name of the data that runs were evaluated on, such as "arithmetic val"."""
    tasks = sorted({run.data.params.get("task", "") for run in runs})
    return f"{'+'.join(tasks)} {split}".strip()


def not_evaluated(runs: Sequence[Run], splits: Sequence[str]) -> str:
    """Say that finished runs lack an evaluation on all of `splits`, which runs, and how to mend it."""
    ids = ", ".join(run.info.run_id for run in runs)
    command = f"bae-evaluate run={runs[0].info.run_id} split={splits[0]}"
    return f"finished, but not evaluated on {' or '.join(splits)}: {ids}; for each: {command}"


def _options(value: Any) -> set[str]:
    """Return the values that a parameter may have, as MLflow writes them."""
    return {str(v) for v in value} if isinstance(value, list) else {str(value)}
