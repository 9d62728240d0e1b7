"""Describe a sweep on the page of its parent run in MLflow: a table of its runs, a figure and files."""

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from bae.evaluation import figures
from bae.report.run_page import GAP, RMSE
from bae.report.store import connect, reason
from bae.report.tracking import MEMBER, NOTE, SWEEP

VARIED = "sweep.varied"
"""The tag of a parent run that names the keys that its runs differ in, with spaces between them."""
PREFIXES = ("eval/val", "val")
"""Of the metrics of held-out problems: the first prefix that all finished runs have is taken for all."""
METRICS = {"accuracy": "accuracy", "ece": "ECE", "brier": "Brier", "auroc": "AUROC", "rmse": "RMSE"}
"""{metric: its label}. RMSE is that of the run's own baseline against Monte Carlo."""
SEED = "seed"
PAGE_DPI = 100
"""Pixels an inch of a figure that MLflow shows: it shows it as large as it is."""
TAG_LIMIT = 8000
"""The most characters of a description."""


def write(tracking_uri: str, parent: str) -> None:
    """Write the page of a sweep anew, from what the store has of its runs now. A store that fails is only reported.

    Args:
        tracking_uri: of the store.
        parent: the id of the parent run.
    """
    try:
        client = connect(tracking_uri)
        run = client.get_run(parent)
        varied = run.data.tags.get(VARIED, "").split()
        table = runs_table(members(client, run), varied)
        summary = summarise(table)
        client.set_tag(parent, NOTE, description(run, table, summary))
        if not table.empty:
            _log_files(client, parent, table, summary)
    except (MlflowException, OSError) as error:  # the runs matter more than their table
        print(f"the page of the sweep {parent} in {tracking_uri} is not up to date: {reason(error)}", file=sys.stderr)


def members(client: MlflowClient, parent: Run) -> list[Run]:
    """Return the runs of a sweep, oldest first: those under the parent, and those that it skipped as done before."""
    run_id, place = parent.info.run_id, [parent.info.experiment_id]
    found: dict[str, Run] = {}
    for wanted in (f"tags.`mlflow.parentRunId` = '{run_id}'", f"tags.`{SWEEP}.{run_id}` = '{MEMBER}'"):
        token: str | None = ""
        while token is not None:
            page = client.search_runs(place, wanted, page_token=token or None)
            found |= {run.info.run_id: run for run in page}
            token = page.token or None
    return sorted(found.values(), key=lambda run: run.info.start_time)


def runs_table(runs: Sequence[Run], varied: Sequence[str]) -> pandas.DataFrame:
    """Return a row for each run: its setting in one label, the seed, the metrics, the state and the ids.

    Args:
        runs: oldest first. Of those with the same setting and seed the newest is taken, a finished one before others.
        varied: keys that the runs differ in.
    """
    keys = [key for key in varied if key != SEED]
    chosen: dict[tuple[str, str], Run] = {}
    for run in runs:
        params = run.data.params
        which = " ".join(f"{key}={params.get(key, '?')}" for key in keys) or "all", params.get(SEED, "?")
        if which not in chosen or _is_finished(run) or not _is_finished(chosen[which]):
            chosen[which] = run
    finished = [run for run in chosen.values() if _is_finished(run)]
    place = next((p for p in PREFIXES if all(f"{p}/accuracy" in run.data.metrics for run in finished)), PREFIXES[-1])
    names = {metric: RMSE if metric == "rmse" else f"{place}/{metric}" for metric in METRICS}
    rows = []
    for (setting, seed), run in chosen.items():
        values = {metric: run.data.metrics.get(name, math.nan) for metric, name in names.items()}
        ids = {"run": run.info.run_id, "experiment": run.info.experiment_id}
        rows.append({"setting": setting, SEED: seed, **values, "state": run.info.status.lower(), **ids})
    return pandas.DataFrame(rows, columns=["setting", SEED, *METRICS, "state", "run", "experiment"])


def _is_finished(run: Run) -> bool:
    return str(run.info.status) == "FINISHED"


def summarise(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return a row for each setting: mean and standard error over the seeds of its finished runs.

    Args:
        table: of `runs_table`.

    Returns:
        Columns: `setting`, `runs` (how many are finished), and each metric with its `<metric>_sem`, which is NaN with
        fewer than two runs.
    """
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        finished = part[part["state"] == "finished"]
        row: dict[str, object] = {"setting": setting, "runs": len(finished)}
        for metric in METRICS:
            row |= {metric: finished[metric].mean(), f"{metric}_sem": finished[metric].sem()}
        rows.append(row)
    return pandas.DataFrame(rows)


def description(parent: Run, table: pandas.DataFrame, summary: pandas.DataFrame) -> str:
    """Return the Markdown of a sweep. If it is too long for MLflow, runs are not linked, then the table is cut."""
    command = parent.data.tags.get("mlflow.source.name", "")
    if table.empty:
        return f"`{command}`"
    run_id = parent.info.run_id
    tail = (
        f"![the runs of the sweep](get-artifact?path=sweep.png&run_uuid={run_id})\n\n`{command}`\n\n"
        "Mean ± standard error over the seeds of finished runs, of held-out problems after the last step. RMSE is the "
        "error of a run's own baseline against Monte Carlo (`fidelity/own/rmse`). Artifacts: `sweep.csv` is this "
        "table, `sweep_runs.csv` has a row for each run, `sweep.png` is the figure."
    )
    for is_linked in (True, False):
        text = "\n\n".join(["\n".join(_rows(table, summary, is_linked)), tail])
        if len(text) <= TAG_LIMIT:
            return text
    room = TAG_LIMIT - len(tail) - 2
    return "\n\n".join(["\n".join(_rows(table, summary, False))[:room].rpartition("\n")[0], tail])


def _rows(table: pandas.DataFrame, summary: pandas.DataFrame, is_linked: bool) -> list[str]:
    """Return the lines of the Markdown table, one for each setting."""
    shown = [metric for metric in METRICS if summary[metric].notna().any()]
    lines = ["| | " + " | ".join(f"{METRICS[metric]}{GAP}" for metric in shown) + " | seeds | state |"]
    lines.append("|---" * (len(shown) + 3) + "|")
    for _, row in summary.iterrows():
        part = table[table["setting"] == row["setting"]]
        cells = [_estimate(row[metric], row[f"{metric}_sem"]) for metric in shown]
        seeds = [_link(run, is_linked) for _, run in part.iterrows()]
        states = ", ".join(f"{count} {state}" for state, count in part["state"].value_counts().sort_index().items())
        lines.append(
            "| "
            + " | ".join([str(row["setting"]).replace("|", "\\|") + GAP, *cells, ", ".join(seeds) + GAP, states])
            + " |"
        )
    return lines


def _link(run: pandas.Series, is_linked: bool) -> str:
    """Return the seed of a run, as a link to its page."""
    if not is_linked:
        return str(run[SEED])
    return f"[{run[SEED]}](#/experiments/{run['experiment']}/runs/{run['run']}?workflowType=machine_learning)"


def _estimate(value: float, error: float) -> str:
    """Return a mean with its standard error, as far as there are any."""
    if pandas.isna(value):
        return "-"
    return (f"{value:.3f}" if pandas.isna(error) else f"{value:.3f} ± {error:.3f}") + GAP


def _log_files(client: MlflowClient, parent: str, table: pandas.DataFrame, summary: pandas.DataFrame) -> None:
    """Log the tables and the figure as artifacts of the parent run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        summary.to_csv(folder / "sweep.csv", index=False)
        table.to_csv(folder / "sweep_runs.csv", index=False)
        finished = table[table["state"] == "finished"]
        shown = [metric for metric in METRICS if finished[metric].notna().any()]
        if shown:
            by_setting = {str(name): part for name, part in finished.groupby("setting", sort=False)}
            values = {METRICS[m]: {name: part[m].tolist() for name, part in by_setting.items()} for m in shown}
            figures.save(figures.comparison(values), folder / "sweep", PAGE_DPI)
        for path in sorted(folder.iterdir()):
            client.log_artifact(parent, str(path))
