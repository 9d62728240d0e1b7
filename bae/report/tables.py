"""Make tables from finished runs: those of the paper, with the published numbers beside ours, and our own."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
from mlflow.entities import Run

from bae.evaluation.bootstrap import paired_bootstrap
from bae.evaluation.completion_table import pairs
from bae.report.finished_runs import FinishedRuns, measured_on, not_evaluated

METRICS = {"accuracy": "acc", "auroc": "AUROC", "ece": "ECE", "brier": "Brier"}
"""{metric: its label in a table} of the paper. A table may name others."""
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
    """Hold a table of the paper, or one of ours.

    Args:
        title: of the table.
        values: one row for each set, method and source; a source is the paper or a model of ours.
        sources: {source: its description}.
        metrics: {metric: its label}.
        aims: {aim: its label}, for each the completions that it takes.
        reference: the method against which the others are tested.
        missing: one line for each cell that no run fills.
    """

    title: str
    values: pandas.DataFrame
    sources: dict[str, str]
    metrics: Mapping[str, str]
    aims: Mapping[str, str]
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
    published = "published" in spec
    for name, method in itertools.product(spec["sets"], spec["methods"]):
        if published:
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
    sources = {PAPER: f"{spec['paper_model']} (paper)"} if published else {}
    for model in models:
        seeds = max((row["runs"] for row in rows if row["source"] == model), default=0)
        sources[model] = f"{_size(model, runs)}, {seeds} seed{'s' * (seeds != 1)}"
    aims = {key: aim["label"] for key, aim in spec.get("aims", {}).items()}
    values = pandas.DataFrame(rows, columns=None if rows else ["set", "method", "source"])
    return Table(spec["title"], values, sources, spec.get("metrics", METRICS), aims, spec["reference"], missing)


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
    row |= _values(seeds, split, spec.get("metrics", METRICS))
    for key, aim in spec.get("aims", {}).items():
        row |= _aim(key, [_completions_to(aim, run, evidence) for run in seeds])
    return row | _tested(evidence, seeds, reference, split, method == spec["reference"])


def _size(model: str, runs: RunsOfMethods) -> str:
    """Return the model with its number of parameters, so that nobody takes it for the paper's model."""
    some = next(found[model][0] for found in runs.values() if model in found)
    parameters = some.data.tags.get("parameters")
    return model if parameters is None else f"{model} ({int(parameters) / 1e6:,.2f} M parameters)"


def _values(runs: Sequence[Run], split: str, metrics: Iterable[str]) -> dict[str, float]:
    """Return the mean over seeds of each metric, and its standard error as `<metric>_sem`."""
    values: dict[str, float] = {}
    for metric in metrics:
        each = [run.data.metrics[f"eval/{split}/{metric}"] for run in runs]
        values[metric] = statistics.fmean(each)
        values[f"{metric}_sem"] = (
            _standard_error(each) if len(each) > 1 else runs[0].data.metrics[f"eval/{split}/sem_by_prompt/{metric}"]
        )
    return values


def _standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean over seeds: NaN for one seed, or if a value is NaN."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _completions_to(aim: Mapping[str, Any], run: Run, evidence: FinishedRuns) -> float | None:
    """Return the completions of training until a held-out metric is at most the aim's, or None if it never is."""
    steps = [step for step, value in evidence.history(run, aim["metric"]).items() if value <= aim["at_most"]]
    size = int(run.data.params["group_size"]) * int(run.data.params["prompts_per_step"])
    return min(steps) * size if steps else None


def _aim(key: str, each: Sequence[float | None]) -> dict[str, float]:
    """Return the mean over the seeds that reach an aim, its standard error, and the number of these seeds."""
    reached = [value for value in each if value is not None]
    mean = statistics.fmean(reached) if reached else math.nan
    return {key: mean, f"{key}_sem": _standard_error(reached), f"{key}_runs": len(reached)}


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
    head = [_first_head(table), "method", *(f"{label}<br>{table.sources[source]}" for source, _, label in columns)]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *_cells(table, columns, " ± ")]]
    title = f"**{table.title}**" + (" (arXiv 2602.10231)" if PAPER in table.sources else "")
    notes = [title, "", *lines, "", *(f"- {note}" for note in _notes(table))]
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
    labels = [_first_head(table), "method", *(label for _, _, label in columns)]
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
    if set(table.sources) <= {PAPER}:
        return []
    published = "; published errors are the paper's" if PAPER in table.sources else ""
    aims = [f"{label}: completions of training until held-out problems reach it" for label in table.aims.values()]
    return [
        f"p: paired bootstrap over prompts, seeds pooled, against {table.reference}",
        f"±: standard error over seeds, or by prompt if there is one seed{published}",
        *aims,
    ]


def _first_head(table: Table) -> str:
    """Return the head of the column of sets."""
    return "paper's set" if PAPER in table.sources else "set"


def _columns(table: Table) -> list[tuple[str, str, str]]:
    """Return (source, key in `values`, label) of each column. Sources of ours name their data, and have p values."""
    columns = []
    for source in table.sources:
        columns += [(source, DATA, DATA)] if source != PAPER else []
        columns += [(source, metric, label) for metric, label in table.metrics.items()]
        if source != PAPER:
            columns += [(source, aim, label) for aim, label in table.aims.items()]
            columns += [(source, f"{metric}_p", f"p {table.metrics[metric]}") for metric in TESTED]
    return columns


def _cells(table: Table, columns: Sequence[tuple[str, str, str]], plus_minus: str) -> list[list[str]]:
    """Return the texts of the cells, one row for each set and method."""
    body = []
    for (name, method), group in table.values.groupby(["set", "method"], sort=False):
        values = {row["source"]: row for row in group.to_dict("records")}
        cells = [_cell(values.get(source, {}), key, plus_minus, key in table.aims) for source, key, _ in columns]
        body.append([str(name), str(method), *cells])
    return body


def _cell(values: Mapping[Any, Any], key: str, plus_minus: str, is_aim: bool) -> str:
    """Format a value with its standard error; accuracy is in percent.

    A cell that nothing fills is empty. A metric of ours without a value, such as AUROC where all is right, is n/a. An
    aim that some seeds do not reach says how many do.
    """
    if key == DATA:
        return str(values.get(DATA, ""))
    value, sem = values.get(key, math.nan), values.get(f"{key}_sem", math.nan)
    if is_aim and values and values[f"{key}_runs"] < values["runs"]:
        return f"{values[f'{key}_runs']:.0f} of {values['runs']:.0f} seeds"
    if math.isnan(value):
        return "n/a" if not key.endswith("_p") and values.get("source", PAPER) != PAPER else ""
    if key.endswith("_p"):
        return f"{value:.3f}"
    digits, scale = (0, 1) if is_aim else (2, 100) if key == "accuracy" else (4, 1)
    text = f"{scale * value:.{digits}f}"
    return text if math.isnan(sem) else f"{text}{plus_minus}{scale * sem:.{digits}f}"
