"""Draw the figures of the paper from finished runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from mlflow.entities import Run

from bae.evaluation import figures
from bae.evaluation.completion_table import pairs
from bae.evaluation.metrics import reliability_table
from bae.fidelity.compare import draw_errors
from bae.report.finished_runs import FinishedRuns, measured_on, not_evaluated

Curves = dict[str, list[dict[int, float]]]
"""{name: [{step: value}, one for each seed]}."""
Drawn = tuple[dict[str, Figure], list[str]]
"""{model: figure}, and one line for each thing that is missing."""


def scaling_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """Draw test-time scaling (paper, Fig. 2): the curves that the evaluations logged, averaged over seeds."""

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
    """Draw reliability diagrams (paper, Fig. 4) of the samples of all seeds."""

    def bins(runs: Sequence[Run], split: str) -> dict[str, Any]:
        q, c, _ = pairs(evidence.pooled(runs, split))
        return reliability_table(q, c)

    return _one_panel_a_set(spec, evidence, bins, figures.reliability)


def training_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """Draw a held-out metric over training, one curve for each method."""
    histories: dict[str, Curves] = {}
    missing = []
    for method, params in spec["methods"].items():
        found = evidence.by_model(spec, params)
        if not found:
            missing.append(f"{method}: no finished run; {spec['command']}")
        for model, runs in found.items():
            histories.setdefault(model, {})[method] = [evidence.history(run, spec["metric"]) for run in runs]
    return {model: figures.training_curves({"": some}, spec["label"]) for model, some in histories.items()}, missing


def attempts_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """Draw the held-out accuracy of each attempt over training (paper, Fig. 3), by each way to choose an answer."""
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
            drawn[model] = figures.training_curves(shown, "Accuracy on held-out problems", share_y=True)
    if not drawn and not missing:
        missing.append(f"no finished runs; {spec['command']}")
    return drawn, missing


def fidelity_figure(spec: Mapping[str, Any], evidence: FinishedRuns) -> Drawn:
    """Draw the errors of each baseline's advantages (paper, Fig. 1), of the first seed that bae-fidelity measured."""
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
    """Draw a figure for each model with one panel for each set; measure(runs, split) gives the data of a panel."""
    drawn, missing = {}, []
    by_model = evidence.by_model(spec, spec["method"])
    for model, runs in by_model.items():
        panels = {}
        for name, splits in spec["sets"].items():
            found = evidence.evaluated(runs, splits)
            if found is None:
                missing.append(f"{name}, {model}: {not_evaluated(runs, splits)}")
            else:
                panels[f"{model}, {measured_on(found[1], found[0])}"] = measure(found[1], found[0])
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
"""{kind of a figure in conf/report/: the function that draws it}."""
