"""A table or figure of the paper, ours beside the published one, from `bae.evidence`."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas
from matplotlib.figure import Figure
from mlflow.entities import Run

from bae import figures
from bae.bootstrap import paired_bootstrap
from bae.evidence import Evidence
from bae.metrics import reliability_table
from bae.samples import pairs

METRICS = {"accuracy": "acc", "auroc": "AUROC", "ece": "ECE", "brier": "Brier"}
TESTED = ("accuracy", "ece", "brier")  # metrics that get a p value in print; the CSV has all


@dataclass(frozen=True)
class Table:
    """title: with what is published. values: a row for each set, method and source (the paper, or a model of ours).
    sources: {source: how many runs it rests on}. reference: the method that the others are tested against.
    missing: a line for each cell that no run fills."""

    title: str
    values: pandas.DataFrame
    sources: dict[str, str]
    reference: str
    missing: list[str]


def make_table(spec: Mapping[str, Any], evidence: Evidence) -> Table:
    """spec: one of conf/table/. Each value is the mean over seeds and its standard error; with one seed, the standard
    error by prompt. p: two-sided, of a paired bootstrap over prompts against the reference method, seeds pooled."""
    paper = f"paper: {spec['paper_model']}"
    runs = {method: evidence.by_model(spec, params) for method, params in spec["methods"].items()}
    models = sorted({model for found in runs.values() for model in found})
    rows, missing, seeds = [], [], dict.fromkeys(models, 0)
    for name, splits in spec["sets"].items():
        for method in spec["methods"]:
            published = spec["published"].get(name, {}).get(method, {})
            rows.append({"set": name, "method": method, "source": paper, "split": name, "runs": None}
                        | {key: value[0] for key, value in published.items()}
                        | {f"{key}_sem": value[1] for key, value in published.items() if len(value) > 1})  # fmt: skip
            for model in models:
                found = evidence.evaluated(runs[method].get(model, []), splits)
                if found is None:
                    missing.append(f"{method} on {name}, {model}: no finished run; {spec['command']}")
                    continue
                split, those = found
                seeds[model] = max(seeds[model], len(those))
                reference = evidence.evaluated(runs[spec["reference"]].get(model, []), splits)
                rows.append({"set": name, "method": method, "source": model, "split": split, "runs": len(those)}
                            | _values(those, split)
                            | _tested(evidence, those, reference, split, method == spec["reference"]))  # fmt: skip
    if not models:
        missing.append(f"no finished runs in {', '.join(evidence.experiments or spec['experiments'])}; "
                       f"{spec['command']}")  # fmt: skip
    sources = {paper: "as published"} | {model: f"{count} seed{'s' * (count != 1)}" for model, count in seeds.items()}
    return Table(spec["title"], pandas.DataFrame(rows), sources, spec["reference"], missing)


def _values(runs: Sequence[Run], split: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for metric in METRICS:
        each = [run.data.metrics[f"eval/{split}/{metric}"] for run in runs]
        values[metric] = statistics.fmean(each)
        values[f"{metric}_sem"] = (
            statistics.stdev(each) / math.sqrt(len(each))
            if len(each) > 1
            else runs[0].data.metrics[f"eval/{split}/sem_by_prompt/{metric}"]
        )
    return values


def _tested(
    evidence: Evidence, runs: Sequence[Run], reference: tuple[str, list[Run]] | None, split: str, itself: bool
) -> dict[str, float]:
    if reference is None or itself or reference[0] != split:
        return {}
    theirs, ours = (pairs(evidence.pooled(some, split)) for some in (reference[1], runs))
    found = paired_bootstrap(theirs, ours, evidence.resamples)
    return {f"{metric}_p": found[metric].p for metric in METRICS}


def to_markdown(table: Table) -> str:
    """The table, what its columns are, and what is missing."""
    head, body = _cells(table, " ± ")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    notes = [f"**{table.title}** (arXiv 2602.10231)", "", *lines, "", *(f"- {note}" for note in _notes(table))]
    return "\n".join(notes + [f"- missing: {line}" for line in table.missing])


def to_latex(table: Table) -> str:
    """The table in LaTeX with booktabs rules."""
    head, body = _cells(table, " $\\pm$ ")
    rules = "l" * 2 + "r" * (len(head) - 2)
    rows = [" & ".join(map(_escape, row)) + r" \\" for row in body]
    notes = [f"% {line}" for line in (*_notes(table), *(f"missing: {line}" for line in table.missing))]
    return "\n".join([*notes, rf"\begin{{tabular}}{{{rules}}}", r"\toprule",
                      " & ".join(map(_escape, head)) + r" \\", r"\midrule", *rows, r"\bottomrule",
                      r"\end{tabular}"])  # fmt: skip


def _escape(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_").replace("&", r"\&")


def _notes(table: Table) -> list[str]:
    ours = [source for source in table.sources if not source.startswith("paper: ")]
    splits = table.values[table.values["source"].isin(ours)].groupby("set", sort=False)["split"].first()
    notes = [f"{source}: {said}" for source, said in table.sources.items()]
    notes += [f"{name}: for {', '.join(ours)}, the split {split}" for name, split in splits.items()]
    if ours:
        notes.append(f"p: paired bootstrap over prompts, seeds pooled, against {table.reference}")
        notes.append("± is the standard error over seeds, or by prompt with one seed; published ones are the paper's")
    return notes


def _cells(table: Table, plus_minus: str) -> tuple[list[str], list[list[str]]]:
    """A row for each set and method; for each source, a column for each metric, and ours with p values."""
    head = ["set", "method"]
    for source in table.sources:
        head += [f"{label} ({source})" for label in METRICS.values()]
        if not source.startswith("paper: "):
            head += [f"p {METRICS[metric]} ({source})" for metric in TESTED]
    body = []
    for (name, method), group in table.values.groupby(["set", "method"], sort=False):
        row = [str(name), str(method)]
        for source in table.sources:
            values: dict[Any, Any] = next(iter(group[group["source"] == source].to_dict("records")), {})
            row += [_number(values, metric, plus_minus) for metric in METRICS]
            if not source.startswith("paper: "):
                row += [_p(values.get(f"{metric}_p")) for metric in TESTED]
        body.append(row)
    return head, body


def _number(values: Mapping[str, Any], metric: str, plus_minus: str) -> str:
    value, sem = values.get(metric), values.get(f"{metric}_sem")
    if value is None or math.isnan(value):
        return ""
    digits, scale = (2, 100) if metric == "accuracy" else (4, 1)
    text = f"{scale * value:.{digits}f}"
    return text if sem is None or math.isnan(sem) else f"{text}{plus_minus}{scale * sem:.{digits}f}"


def _p(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


Drawn = tuple[dict[str, Figure], list[str]]  # {model: figure}, and what is missing


def scaling_figure(spec: Mapping[str, Any], evidence: Evidence) -> Drawn:
    """Paper, Fig. 2: curves that the evaluations logged, mean over seeds."""

    def curves(runs: Sequence[Run], split: str) -> dict[str, list[float]]:
        prefix = f"eval/{split}/scaling/"
        names = sorted(key.removeprefix(prefix) for key in runs[0].data.metrics if key.startswith(prefix))
        each = {name: [evidence.history(run, prefix + name) for run in runs] for name in names}
        return {
            name.replace("_at_", "@"): [statistics.fmean(h[n] for h in histories) for n in sorted(histories[0])]
            for name, histories in each.items()
        }

    return _one_panel_a_set(spec, evidence, curves, figures.scaling)


def reliability_figure(spec: Mapping[str, Any], evidence: Evidence) -> Drawn:
    """Paper, Fig. 4: of the samples of all seeds."""

    def bins(runs: Sequence[Run], split: str) -> dict[str, Any]:
        q, c, _ = pairs(evidence.pooled(runs, split))
        return reliability_table(q, c)

    return _one_panel_a_set(spec, evidence, bins, figures.reliability)


def training_figure(spec: Mapping[str, Any], evidence: Evidence) -> Drawn:
    """A held-out metric over training, by method."""
    histories: dict[str, dict[str, list[dict[int, float]]]] = {}
    missing = []
    for method, params in spec["methods"].items():
        found = evidence.by_model(spec, params)
        if not found:
            missing.append(f"missing: {method}: no finished run; {spec['command']}")
        for model, runs in found.items():
            histories.setdefault(model, {})[method] = [evidence.history(run, spec["metric"]) for run in runs]
    label = f"{spec['metric'].partition('/')[2]}, held-out"
    return {model: figures.training_curves(some, label) for model, some in histories.items()}, missing


def _one_panel_a_set(
    spec: Mapping[str, Any],
    evidence: Evidence,
    measure: Callable[[Sequence[Run], str], Any],
    draw: Callable[[Mapping[str, Any]], Figure],
) -> Drawn:
    drawn, missing = {}, []
    by_model = evidence.by_model(spec, spec["method"])
    for model, runs in by_model.items():
        panels = {}
        for name, splits in spec["sets"].items():
            found = evidence.evaluated(runs, splits)
            if found is None:
                missing.append(f"missing: {name}, {model}: no evaluated run; {spec['command']}")
            else:
                panels[f"{model}, {found[0]}"] = measure(found[1], found[0])
        if panels:
            drawn[model] = draw(panels)
    if not by_model:
        missing.append(f"missing: no finished runs; {spec['command']}")
    return drawn, missing


PLOTS: dict[str, Callable[[Mapping[str, Any], Evidence], Drawn]] = {
    "scaling": scaling_figure,
    "reliability": reliability_figure,
    "training": training_figure,
}
