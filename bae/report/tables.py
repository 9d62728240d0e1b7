"""Make the tables of the paper from finished runs, with the published numbers beside ours."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
from mlflow.entities import Run

from bae.evaluation.bootstrap import paired_bootstrap
from bae.evaluation.completion_table import pairs
from bae.report.finished_runs import FinishedRuns, measured_on, not_evaluated

METRICS = {"accuracy": "acc", "auroc": "AUROC", "ece": "ECE", "brier": "Brier"}
"""{metric: its label in a table}."""
PAPER = "paper"
"""The source of published numbers."""
DATA = "data"
"""The column that names what a model of ours was measured on; it is not the paper's set."""
TESTED = ("accuracy", "ece", "brier")
"""The metrics whose p values are printed. The CSV file has the p values of all metrics."""


RunsOfMethods = Mapping[str, Mapping[str, Sequence[Run]]]
"""{method: {model: runs, one for each seed}}."""


@dataclass(frozen=True)
class Table:
    """Hold a table of the paper.

    Args:
        title: of the published table.
        values: one row for each set, method and source; a source is the paper or a model of ours.
        sources: {source: its description}.
        reference: the method against which the others are tested.
        missing: one line for each cell that no run fills.
    """

    title: str
    values: pandas.DataFrame
    sources: dict[str, str]
    reference: str
    missing: list[str]


def make_table(spec: Mapping[str, Any], evidence: FinishedRuns) -> Table:
    """Make a table.

    Each value is the mean over seeds with its standard error; with one seed, it is the standard error by prompt. p is
    two-sided, from a paired bootstrap over prompts against the reference method, with all seeds pooled.

    Args:
        spec: a table of conf/report/.
        evidence: the runs that may be taken.
    """
    runs: RunsOfMethods = {method: evidence.by_model(spec, params) for method, params in spec["methods"].items()}
    models = sorted({model for found in runs.values() for model in found})
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for name, method in itertools.product(spec["sets"], spec["methods"]):
        rows.append(_published_row(spec, name, method))
        for model in models:
            row = _row(spec, evidence, runs, name, method, model)
            if row is not None:
                rows.append(row)
                continue
            theirs = runs[method].get(model)
            lack = not_evaluated(theirs, spec["sets"][name]) if theirs else f"no finished run; {spec['command']}"
            missing.append(f"{method} on {name}, {model}: {lack}")
    if not models:
        experiments = ", ".join(evidence.experiments or spec["experiments"])
        missing.append(f"no finished runs in {experiments}; {spec['command']}")
    sources = {PAPER: f"{spec['paper_model']} (paper)"}
    for model in models:
        seeds = max((row["runs"] for row in rows if row["source"] == model), default=0)
        sources[model] = f"{_size(model, runs)}, {seeds} seed{'s' * (seeds != 1)}"
    return Table(spec["title"], pandas.DataFrame(rows), sources, spec["reference"], missing)


def _published_row(spec: Mapping[str, Any], name: str, method: str) -> dict[str, Any]:
    """Return the row of a set and a method that has the published values."""
    published = spec["published"].get(name, {}).get(method, {})
    return (
        {"set": name, "method": method, "source": PAPER, "split": name, DATA: name, "runs": None}
        | {key: value[0] for key, value in published.items()}
        | {f"{key}_sem": value[1] for key, value in published.items() if len(value) > 1}
    )


def _row(
    spec: Mapping[str, Any], evidence: FinishedRuns, runs: RunsOfMethods, name: str, method: str, model: str
) -> dict[str, Any] | None:
    """Return the row of a set and a method that has the values of a model of ours, or None if no run fills it."""
    splits = spec["sets"][name]
    found = evidence.evaluated(runs[method].get(model, []), splits)
    if found is None:
        return None
    split, seeds = found
    data = measured_on(seeds, split)
    row = {"set": name, "method": method, "source": model, "split": split, DATA: data, "runs": len(seeds)}
    reference = evidence.evaluated(runs[spec["reference"]].get(model, []), splits)
    return row | _values(seeds, split) | _tested(evidence, seeds, reference, split, method == spec["reference"])


def _size(model: str, runs: RunsOfMethods) -> str:
    """Return the model with its number of parameters, so that nobody takes it for the paper's model."""
    some = next(found[model][0] for found in runs.values() if model in found)
    parameters = some.data.tags.get("parameters")
    return model if parameters is None else f"{model} ({int(parameters) / 1e6:,.2f} M parameters)"


def _values(runs: Sequence[Run], split: str) -> dict[str, float]:
    """Return the mean over seeds of each metric, and its standard error as `<metric>_sem`."""
    values: dict[str, float] = {}
    for metric in METRICS:
        each = [run.data.metrics[f"eval/{split}/{metric}"] for run in runs]
        values[metric] = statistics.fmean(each)
        values[f"{metric}_sem"] = (
            float(np.std(each, ddof=1)) / math.sqrt(len(each))  # NaN if one of them is
            if len(each) > 1
            else runs[0].data.metrics[f"eval/{split}/sem_by_prompt/{metric}"]
        )
    return values


def _tested(
    evidence: FinishedRuns, runs: Sequence[Run], reference: tuple[str, list[Run]] | None, split: str, itself: bool
) -> dict[str, float]:
    """Return the p value of each metric as `<metric>_p`, or nothing if there is no reference on the same split."""
    if reference is None or itself or reference[0] != split:
        return {}
    theirs, ours = (pairs(evidence.pooled(some, split)) for some in (reference[1], runs))
    found = paired_bootstrap(theirs, ours, evidence.resamples)
    return {f"{metric}_p": found[metric].p for metric in METRICS}


def to_markdown(table: Table) -> str:
    """Write the table in Markdown, with notes about its columns and a list of what is missing."""
    columns = _columns(table)
    head = ["paper's set", "method", *(f"{label}<br>{table.sources[source]}" for source, _, label in columns)]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *_cells(table, columns, " ± ")]]
    notes = [f"**{table.title}** (arXiv 2602.10231)", "", *lines, "", *(f"- {note}" for note in _notes(table))]
    return "\n".join(notes + [f"- missing: {line}" for line in table.missing])


def to_latex(table: Table) -> str:
    """Write the table in LaTeX with the rules of booktabs. The sources stand above their columns."""
    columns = _columns(table)
    over, rules, first = [], [], 3
    for source, group in itertools.groupby(columns, key=lambda column: column[0]):
        width = len(list(group))
        over.append(rf"\multicolumn{{{width}}}{{c}}{{{_escape(table.sources[source])}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    labels = ["paper's set", "method", *(label for _, _, label in columns)]
    rows = [" & ".join(map(_escape, row)) + r" \\" for row in [labels, *_cells(table, columns, r" $\pm$ ")]]
    notes = [f"% {line}" for line in (*_notes(table), *(f"missing: {line}" for line in table.missing))]
    begin = rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}"
    above = [r"\toprule", " & & " + " & ".join(over) + r" \\", "".join(rules), rows[0], r"\midrule"]
    return "\n".join([*notes, begin, *above, *rows[1:], r"\bottomrule", r"\end{tabular}"])


def _escape(text: str) -> str:
    """Escape the characters that LaTeX reserves."""
    return text.replace("%", r"\%").replace("_", r"\_").replace("&", r"\&")


def _notes(table: Table) -> list[str]:
    """Explain p and ±, if the table has numbers of ours."""
    if set(table.sources) == {PAPER}:
        return []
    return [
        f"p: paired bootstrap over prompts, seeds pooled, against {table.reference}",
        "±: standard error over seeds, or by prompt if there is one seed; published errors are the paper's",
    ]


def _columns(table: Table) -> list[tuple[str, str, str]]:
    """Return (source, key in `values`, label) of each column. Sources of ours name their data, and have p values."""
    columns = []
    for source in table.sources:
        columns += [(source, DATA, DATA)] if source != PAPER else []
        columns += [(source, metric, label) for metric, label in METRICS.items()]
        if source != PAPER:
            columns += [(source, f"{metric}_p", f"p {METRICS[metric]}") for metric in TESTED]
    return columns


def _cells(table: Table, columns: Sequence[tuple[str, str, str]], plus_minus: str) -> list[list[str]]:
    """Return the texts of the cells, one row for each set and method."""
    body = []
    for (name, method), group in table.values.groupby(["set", "method"], sort=False):
        values = {row["source"]: row for row in group.to_dict("records")}
        cells = [_cell(values.get(source, {}), key, plus_minus) for source, key, _ in columns]
        body.append([str(name), str(method), *cells])
    return body


def _cell(values: Mapping[Any, Any], key: str, plus_minus: str) -> str:
    """Format a value with its standard error; accuracy is in percent.

    A cell that nothing fills is empty. A metric of ours without a value, such as AUROC where all is right, is n/a.
    """
    if key == DATA:
        return str(values.get(DATA, ""))
    value, sem = values.get(key, math.nan), values.get(f"{key}_sem", math.nan)
    if math.isnan(value):
        return "n/a" if key in METRICS and values.get("source", PAPER) != PAPER else ""
    if key.endswith("_p"):
        return f"{value:.3f}"
    digits, scale = (2, 100) if key == "accuracy" else (4, 1)
    text = f"{scale * value:.{digits}f}"
    return text if math.isnan(sem) else f"{text}{plus_minus}{scale * sem:.{digits}f}"
