"""How many completions each baseline needs, from runs in MLflow: python benchmarks/sample_efficiency.py <experiment> …

For each experiment, in --folder: <experiment>.csv with every evaluation of every run, and <experiment>_curves.png with
ECE and AUROC.
Printed: for each seed, the first evaluation at which AUROC >= .75 holds, here and at the next one; the same for
ECE <= .05 as well; and the last evaluation, median and range over seeds. "-" where a run does not get there.
"""

import argparse
import statistics
from itertools import pairwise
from pathlib import Path

import pandas

from bae.evaluation.figures import save, training_curves
from bae.report.tracking import history, search

METRICS = ("accuracy", "confidence", "bias", "ece", "auroc", "brier")
GOALS = {
    "AUROC >= .75": lambda row: row["auroc"] >= 0.75,
    "and ECE <= .05": lambda row: row["auroc"] >= 0.75 and row["ece"] <= 0.05,
}


def read(store, experiment):
    """A row for each run and evaluation."""
    rows = []
    for run in search(store, [experiment], "attributes.status = 'FINISHED'"):
        params = run.data.params
        if "baseline" not in params:  # a parent
            continue
        each = {name: history(store, run.info.run_id, f"val/{name}") for name in METRICS}
        completions = int(params["group_size"]) * int(params["prompts_per_step"])
        rows += [{"baseline": params["baseline"], "seed": int(params["seed"]), "step": step,
                  "completions": step * completions} | {name: each[name][step] for name in METRICS}
                 for step in sorted(each["ece"])]  # fmt: skip
    return pandas.DataFrame(rows).sort_values(["baseline", "seed", "step"])


def reached(run, goal):
    """Completions until the goal holds twice running, as text."""
    rows = run.to_dict("records")
    for row, following in pairwise(rows):
        if goal(row) and goal(following):
            return str(row["completions"])
    return "-"


def spread(values):
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def report(experiment, table, folder):
    table.to_csv(folder / f"{experiment}.csv", index=False, float_format="%.4f")
    heads = "".join(f"{head:>26}" for head in (*GOALS, "last ECE", "last AUROC", "last bias"))
    print(f"\n{experiment:<24}{heads}")
    for baseline, runs in table.groupby("baseline", sort=False):
        seeds = [run for _, run in runs.groupby("seed")]
        cells = [", ".join(reached(run, goal) for run in seeds) for goal in GOALS.values()]
        cells += [spread([run.iloc[-1][name] for run in seeds]) for name in ("ece", "auroc", "bias")]
        print(f"{baseline:<24}" + "".join(f"{cell:>26}" for cell in cells))
    draw(table, folder / f"{experiment}_curves")


def draw(table, stem):
    """ECE and AUROC over training; one curve for each baseline."""
    histories = {}
    for name, title in (("ece", "ECE"), ("auroc", "AUROC")):
        histories[title] = {
            baseline: [dict(zip(run["step"], run[name], strict=True)) for _, run in runs.groupby("seed")]
            for baseline, runs in table.groupby("baseline", sort=False)
        }
    save(training_curves(histories, "Value on held-out problems"), stem)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--store", default="sqlite:///outputs/mlflow.db")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    for experiment in given.experiments:
        report(experiment, read(given.store, experiment), given.folder)


if __name__ == "__main__":
    main()
