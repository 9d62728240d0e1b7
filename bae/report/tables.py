"""A table or figure of the paper, ours beside the published one, from `bae.report.finished_runs`."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas
from matplotlib.figure import Figure
from mlflow.entities import Run

from bae.evaluation import figures
from bae.evaluation.bootstrap import paired_bootstrap
from bae.evaluation.completion_table import pairs
from bae.evaluation.metrics import reliability_table
from bae.fidelity.measure import draw_errors
from bae.report.finished_runs import FinishedRuns

METRICS = {"accuracy": "acc", "auroc": "AUROC", "ece": "ECE", "brier": "Brier"}
PAPER = "paper"
TESTED = ("accuracy", "ece", "brier")  # metrics that get a p value in print; the CSV has all


@dataclass(frozen=True)
class Table:
    """title: with what is published. values: a row for each set, method and source (the paper, or a model of ours).
    sources: {source: what it is, in words}. reference: the method that the others are tested against.
    missing: a line for each cell that no run fills."""

    title: str
    values: pandas.DataFrame
    sources: dict[str, str]
    reference: str
    missing: list[str]


def make_table(spec: Mapping[str, Any], evidence: FinishedRuns) -> Table:
    """spec: a table of conf/report/.

    Each value is the mean over seeds and its standard error; with one seed, the standard error by prompt. p:
    two-sided, of a paired bootstrap over prompts against the reference method, seeds pooled.
    """
    runs = {method: evidence.by_model(spec, params) for method, params in spec["methods"].items()}
    models = sorted({model for found in runs.values() for model in found})
    rows, missing, seeds = [], [], dict.fromkeys(models, 0)
    for name, splits in spec["sets"].items():
        for method in spec["methods"]:
            published = spec["published"].get(name, {}).get(method, {})
            rows.append({"set": name, "method": method, "source": PAPER, "split": name, "runs": None}
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
    sources = {PAPER: f"{spec['paper_model']} (paper)"}
    for model, count in seeds.items():
        sources[model] = f"{_size(model, runs)}, {count} seed{'s' * (count != 1)}"
    return Table(spec["title"], pandas.DataFrame(rows), sources, spec["reference"], missing)


def _size(model: str, runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    """The model and its number of parameters, so that nobody takes it for the paper's."""
    some = next(found[model][0] for found in runs.values() if model in found)
    parameters = some.data.tags.get("parameters")
    return model if parameters is None else f"{model} ({int(parameters) / 1e6:,.2f} M parameters)"


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
    evidence: FinishedRuns, runs: Sequence[Run], reference: tuple[str, list[Run]] | None, split: str, itself: bool
) -> dict[str, float]:
    if reference is None or itself or reference[0] != split:
        return {}
    theirs, ours = (pairs(evidence.pooled(some, split)) for some in (reference[1], runs))
    found = paired_bootstrap(theirs, ours, evidence.resamples)
    return {f"{metric}_p": found[metric].p for metric in METRICS}


def to_markdown(table: Table) -> str:
    """The table, what its columns are, and what is missing."""
    columns = _columns(table)
    head = ["set", "method", *(f"{label}<br>{table.sources[source]}" for source, _, label in columns)]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *_cells(table, columns, " ± ")]]
    notes = [f"**{table.title}** (arXiv 2602.10231)", "", *lines, "", *(f"- {note}" for note in _notes(table))]
    return "\n".join(notes + [f"- missing: {line}" for line in table.missing])


def to_latex(table: Table) -> str:
    """The table in LaTeX with booktabs rules; the sources stand over their columns."""
    columns = _columns(table)
    over, rules, first = [], [], 3
    for source, group in itertools.groupby(columns, key=lambda column: column[0]):
        width = len(list(group))
        over.append(rf"\multicolumn{{{width}}}{{c}}{{{_escape(table.sources[source])}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    labels = ["set", "method", *(label for _, _, label in columns)]
    rows = [" & ".join(map(_escape, row)) + r" \\" for row in [labels, *_cells(table, columns, r" $\pm$ ")]]
    notes = [f"% {line}" for line in (*_notes(table), *(f"missing: {line}" for line in table.missing))]
    begin = rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}"
    above = [r"\toprule", " & & " + " & ".join(over) + r" \\", "".join(rules), rows[0], r"\midrule"]
    return "\n".join([*notes, begin, *above, *rows[1:], r"\bottomrule", r"\end{tabular}"])


def _escape(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_").replace("&", r"\&")


def _notes(table: Table) -> list[str]:
    if set(table.sources) == {PAPER}:
        return []
    return [
        f"p: paired bootstrap over prompts, seeds pooled, against {table.reference}",
        "±: standard error over seeds, by prompt if there is one seed; the published are the paper's",
    ]


def _columns(table: Table) -> list[tuple[str, str, str]]:
    """(source, key in `values`, label) of each; ours have p values too."""
    columns = []
    for source in table.sources:
        columns += [(source, metric, label) for metric, label in METRICS.items()]
        if source != PAPER:
            columns += [(source, f"{metric}_p", f"p {METRICS[metric]}") for metric in TESTED]
    return columns


def _cells(table: Table, columns: Sequence[tuple[str, str, str]], plus_minus: str) -> list[list[str]]:
    """A row for each set and method."""
    body = []
    for (name, method), group in table.values.groupby(["set", "method"], sort=False):
        values = {row["source"]: row for row in group.to_dict("records")}
        ours = dict.fromkeys(row["split"] for source, row in values.items() if source != PAPER)
        cells = [_cell(values.get(source, {}), key, plus_minus) for source, key, _ in columns]
        body.append([f"{name} ({', '.join(ours)})" if ours else str(name), str(method), *cells])
    return body


def _cell(values: Mapping[Any, Any], key: str, plus_minus: str) -> str:
    value, sem = values.get(key, math.nan), values.get(f"{key}_sem", math.nan)
    if math.isnan(value):
        return ""
    if key.endswith("_p"):
        return f"{value:.3f}"
    digits, scale = (2, 100) if key == "accuracy" else (4, 1)
    text = f"{scale * value:.{digits}f}"
    return text if math.isnan(sem) else f"{text}{plus_minus}{scale * sem:.{digits}f}"


Curves = dict[str, list[dict[int, float]]]  # {name: [{step: value}, one for each seed]}
Drawn = tuple[dict[str, Figure], list[str]]  # {model: figure}, and what is missing


def scaling_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
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


def reliability_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """Paper, Fig. 4: of the samples of all seeds."""

    def bins(runs: Sequence[Run], split: str) -> dict[str, Any]:
        q, c, _ = pairs(evidence.pooled(runs, split))
        return reliability_table(q, c)

    return _one_panel_a_set(spec, evidence, bins, figures.reliability)


def training_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """A held-out metric over training, by method."""
    histories: dict[str, Curves] = {}
    missing = []
    for method, params in spec["methods"].items():
        found = evidence.by_model(spec, params)
        if not found:
            missing.append(f"{method}: no finished run; {spec['command']}")
        for model, runs in found.items():
            histories.setdefault(model, {})[method] = [evidence.history(run, spec["metric"]) for run in runs]
    label = f"{spec['metric'].partition('/')[2]}, held-out"
    return {model: figures.training_curves({"": some}, label) for model, some in histories.items()}, missing


def attempts_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """Paper, Fig. 3: accuracy of each attempt on held-out problems over training, by each way to choose an answer."""
    drawn, missing = {}, []
    for model, runs in evidence.by_model(spec, spec["method"]).items():
        panels: dict[str, Curves] = {
            title: {name: [evidence.history(run, metric) for run in runs] for name, metric in curves.items()}
            for title, curves in spec["panels"].items()
        }
        lacking = [title for title, curves in panels.items() if not all(all(seeds) for seeds in curves.values())]
        missing += [f"{title}, {model}: not logged; {spec['command']}" for title in lacking]
        if len(lacking) < len(panels):
            shown = {title: curves for title, curves in panels.items() if title not in lacking}
            drawn[model] = figures.training_curves(shown, "accuracy, held-out", share_y=True)
    if not drawn and not missing:
        missing.append(f"no finished runs; {spec['command']}")
    return drawn, missing


def fidelity_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """Paper, Fig. 1: errors of each baseline's advantages, of the newest seed that bae-fidelity has measured."""
    drawn, missing = {}, []
    by_model = evidence.by_model(spec, spec["method"])
    for model, runs in by_model.items():
        found = [e for split in spec["splits"] for run in runs if (e := evidence.errors(run, split)) is not None]
        if not found:
            missing.append(f"{model}: no run that was measured; {spec['command']}")
            continue
        errors = found[0]
        sizes = sorted(errors["group_size"].unique())
        size = spec["group_size"] if spec["group_size"] in sizes else sizes[-1]
        for objective, part in errors[errors["group_size"] == size].groupby("objective", sort=False):
            drawn[f"{model}_{objective}_{size}"] = draw_errors(part)
    if not by_model:
        missing.append(f"no finished runs; {spec['command']}")
    return drawn, missing


def _one_panel_a_set(
    spec: Mapping[str, Any],
    evidence: FinishedRuns,
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
                missing.append(f"{name}, {model}: no evaluated run; {spec['command']}")
            else:
                panels[f"{model}, {found[0]}"] = measure(found[1], found[0])
        if panels:
            drawn[model] = draw(panels)
    if not by_model:
        missing.append(f"no finished runs; {spec['command']}")
    return drawn, missing


PLOTS: dict[str, Callable[[Mapping[str, Any], FinishedRuns], Drawn]] = {
    "fidelity": fidelity_figure,
    "scaling": scaling_figure,
    "reliability": reliability_figure,
    "training": training_figure,
    "attempts": attempts_figure,
}
