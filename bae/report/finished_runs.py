"""What lies in MLflow for a table or a figure: the finished runs of a method, their metrics and their samples."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pandas
from mlflow import MlflowClient
from mlflow.entities import Run

from bae.evaluation.completion_table import merge
from bae.report import tracking


class FinishedRuns:
    """Finished runs in MLflow.

    experiments: names; None means those that a table or a figure names. runs: ids, to take no others. models: config
        options of the group `model`, to take no others.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiments: Sequence[str] | None,
        runs: Sequence[str] | None,
        models: Sequence[str] | None,
        resamples: int,
    ):
        self.tracking_uri = tracking_uri
        self.experiments = experiments
        self.only_runs = runs
        self.only_models = models
        self.resamples = resamples

    @cached_property
    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking_uri)

    def by_model(self, spec: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, list[Run]]:
        """{model: runs} of a method, one for each seed: the newest if it was run more than once. A method is what its
        runs have as parameters; of a list, one."""
        found: dict[str, dict[str, Run]] = {}
        for run in self._finished(tuple(self.experiments or spec["experiments"])):
            params = run.data.params
            model = params.get("model", "unknown")
            wanted = self.only_runs is None or run.info.run_id in self.only_runs
            wanted &= self.only_models is None or model in self.only_models
            if wanted and all(params.get(key) in _options(value) for key, value in method.items()):
                found.setdefault(model, {}).setdefault(params.get("seed", ""), run)
        return {model: [seeds[seed] for seed in sorted(seeds)] for model, seeds in sorted(found.items())}

    @lru_cache  # noqa: B019 - one object for the life of the process
    def _finished(self, experiments: tuple[str, ...]) -> list[Run]:
        return tracking.search(self.tracking_uri, experiments, "attributes.status = 'FINISHED'")

    def evaluated(self, runs: Sequence[Run], splits: Sequence[str]) -> tuple[str, list[Run]] | None:
        """The first of `splits` on which runs were evaluated, and those runs; None if there is none."""
        for split in splits:
            those = [run for run in runs if f"eval/{split}/accuracy" in run.data.metrics]
            if those:
                return split, those
        return None

    @lru_cache  # noqa: B019
    def samples(self, run_id: str, split: str) -> pandas.DataFrame:
        """The table of samples that a run's evaluation logged."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.client.download_artifacts(run_id, f"evaluation/{split}.parquet", folder)
            return pandas.read_parquet(Path(path))

    def errors(self, run: Run, split: str) -> pandas.DataFrame | None:
        """The errors of baselines that bae-fidelity logged for a split, None if it did not."""
        place = f"fidelity/{split}"
        if not any(
            file.path == f"{place}/errors.parquet" for file in self.client.list_artifacts(run.info.run_id, place)
        ):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return pandas.read_parquet(
                self.client.download_artifacts(run.info.run_id, f"{place}/errors.parquet", folder)
            )

    def pooled(self, runs: Sequence[Run], split: str) -> pandas.DataFrame:
        """The samples of several seeds in one table; those of one problem are samples of one prompt."""
        return merge([self.samples(run.info.run_id, split) for run in runs])

    def history(self, run: Run, metric: str) -> dict[int, float]:
        return tracking.history(self.tracking_uri, run.info.run_id, metric)


def _options(value: Any) -> set[str]:
    return {str(v) for v in value} if isinstance(value, list) else {str(value)}
