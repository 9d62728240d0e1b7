"""Draw figures for one column of a paper. Each function returns a Figure; `save` writes it.

All figures have the look of paper.mplstyle, a style sheet of matplotlib beside this module.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rcParams, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

STYLE = Path(__file__).with_name("paper.mplstyle")
"""The style sheet of all figures."""
WIDTH = 3.3
"""The width of a column, in inches; figures of several panels are wider."""
CYCLE = matplotlib.rc_params_from_file(STYLE, use_default_template=False)["axes.prop_cycle"].by_key()
COLOURS, MARKERS = CYCLE["color"], CYCLE["marker"]
ABOVE: dict[str, Any] = {"fontsize": 6, "textcoords": "offset points"}  # texts above a panel, offset in points
STRATEGIES = {"pass@1": "Pass@1", "pass@k": "Pass@k", "maj": "Maj", "maxconf": "MaxConf", "weighted_maj": "WeightedMaj"}


@style.context(STYLE)
def save(figure: Figure, stem: Path, dpi: int | None = None) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`, and return the two paths; dpi: pixels an inch of the PNG, by default 300."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(
            path, dpi=dpi or rcParams["savefig.dpi"], metadata={"Date": None} if path.suffix == ".svg" else None
        )
        figure.set_layout_engine("none")  # the second file keeps the layout of the first, which takes half of the time
    return paths


@style.context(STYLE)
def reliability(tables: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Draw reliability diagrams (paper, Fig. 4): accuracy against stated confidence by bin, above the counts by bin.

    Each panel says its ECE and the number of completions.

    Args:
        tables: {title: bae.evaluation.metrics.reliability_table}, one panel for each.
    """
    figure, panels = make_panels(len(tables), rows=2, height=2.6, ratios=[3, 1])
    for (title, table), top, bottom in zip(tables.items(), panels[0], panels[1], strict=True):
        count, stated, accuracy = (table[key].numpy() for key in ("count", "confidence", "accuracy"))
        top.plot([0, 1], [0, 1], "--", color="0.6", linewidth=0.8, marker="")
        top.vlines(stated, accuracy, stated, color=COLOURS[1])
        total = count.sum()
        top.scatter(stated, accuracy, s=3 + 60 * count / max(total, 1), color=COLOURS[0], zorder=3)  # area: share
        top.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="auto", title=title)
        ece = f"ECE {np.nansum(count * np.abs(accuracy - stated)) / total:.3f}" if total else "no confidence"
        top.text(0, 0.97, f"{ece}\nn = {total:,.0f}", va="top", fontsize=6)
        bottom.bar(_bar_centres(), count, width=_bar_widths(), color=COLOURS[0])
        bottom.set(xlim=(-0.03, 1.03), yscale="symlog", ylim=(0, None), xlabel="Stated confidence")
    panels[0][0].set_ylabel("Share of correct answers")
    panels[1][0].set_ylabel("Completions")
    return figure


@style.context(STYLE)
def scaling(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw test-time scaling (paper, Fig. 2): the accuracy of each way to choose among n samples.

    Args:
        curves: {title: {strategy of bae.evaluation.voting.scaling: accuracy with n = 1, 2, … samples}}, one panel for
            each title.
    """
    figure, panels = make_panels(len(curves), rows=1, height=2.2)
    for (title, strategies), panel in zip(curves.items(), panels[0], strict=True):
        for i, (name, label) in enumerate(STRATEGIES.items()):
            if name not in strategies:  # without confidences there are no strategies that need them
                continue
            accuracy = strategies[name]
            n = np.arange(1, len(accuracy) + 1)
            every = [j for j in range(len(n)) if (n[j] & (n[j] - 1)) == 0 or n[j] == len(n)]
            panel.plot(n, accuracy, markevery=every, label=label, color=COLOURS[i], marker=MARKERS[i])
        panel.set_xscale("log", base=2)
        panel.set_xticks([2**j for j in range(int(np.log2(len(n))) + 1)])
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set(xlabel="Samples of a problem", title=title)
    panels[0][0].set_ylabel("Accuracy")
    add_legend(figure, panels[0])
    return figure


@style.context(STYLE)
def training_curves(
    histories: Mapping[str, Mapping[str, Sequence[Mapping[int, float]]]], label: str, share_y: bool = False
) -> Figure:
    """Draw metrics over training: the mean over seeds, and bars from the lowest seed to the highest.

    Curves take turns with their bars, so that these do not cover each other.

    Args:
        histories: {title: {name: [{step: value}, one for each seed]}}, one panel for each title.
        label: of the vertical axis.
        share_y: whether all panels have the same vertical scale.
    """
    figure, panels = make_panels(len(histories), rows=1, height=2.2, share_y=share_y)
    for (title, curves), panel in zip(histories.items(), panels[0], strict=True):
        for i, (name, seeds) in enumerate(curves.items()):
            steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
            add_curve(panel, steps, [[seed[step] for seed in seeds] for step in steps], name, i, len(curves))
        panel.set(xlabel="Training step", title=title)
    panels[0][0].set_ylabel(label)
    add_legend(figure, panels[0])
    return figure


def add_curve(
    panel: Axes,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    label: str,
    i: int,
    curves: int,
    centre: Any = np.mean,
) -> None:
    """Add curve number i of several to a panel: the centre of the values at each x, and bars over their range.

    Args:
        panel: to draw on.
        x: positions.
        values: for each x, the repeats; a range is drawn where there are several.
        label: in the legend.
        i: the number of the curve; it chooses colour and marker.
        curves: how many there are on this panel; each has its bars at places of its own.
        centre: of repeats, a function such as numpy.mean.
    """
    middle = np.array([centre(some) for some in values])
    ends = np.array([[m - min(some), max(some) - m] for m, some in zip(middle, values, strict=True)])
    reach = np.maximum(ends, 0)  # the mean of equal values may be rounded to something above or below them
    turn = max(1, min(curves, len(x) // 2))
    look: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "label": label}
    panel.errorbar(x, middle, reach.T if reach.any() else None, errorevery=(i % turn, turn), elinewidth=0.7, **look)


@style.context(STYLE)
def error_distributions(
    errors: Mapping[str, Mapping[str, Sequence[float]]], rmse: Mapping[str, Mapping[str, float]] | None = None
) -> Figure:
    """Draw the errors of advantages against Monte Carlo (paper, Fig. 1): a violin for each baseline, its RMSE above it.

    A violin reaches from the lowest error to the highest, and all of it is shown.

    Args:
        errors: {stratum: {baseline: errors}}, one panel for each stratum, one below the other.
        rmse: {stratum: {baseline: RMSE to print}}. The errors contain the noise of Monte Carlo;
            bae.fidelity.compare_to_monte_carlo gives an RMSE without it. None prints the RMSE of the errors.
    """
    names = list(dict.fromkeys(name for baselines in errors.values() for name in baselines))
    samples = {
        (s, b): np.asarray(list(e), dtype=float) for s, baselines in errors.items() for b, e in baselines.items()
    }
    limit = 1.05 * np.abs(np.concatenate([np.zeros(1), *samples.values()])).max() or 1.0
    figure, panels = make_panels(1, rows=len(errors), height=0.6 + 1.15 * len(errors), share_y=True)
    for stratum, panel in zip(errors, panels[:, 0], strict=True):
        panel.axhline(0, color="0.6", linewidth=0.8, linestyle="--")
        for x, name in enumerate(names):
            sample = samples.get((stratum, name), np.zeros(0))
            _draw_violin(panel, x, sample, limit)
            own = np.sqrt((sample**2).mean()) if len(sample) else np.nan
            shown = own if rmse is None else rmse.get(stratum, {}).get(name, np.nan)
            text = "n/a" if np.isnan(shown) else f"{shown:.3f}"
            panel.annotate(text, (x, 1), (0, 4), ha="center", xycoords=panel.get_xaxis_transform(), **ABOVE)
        panel.annotate("RMSE", (0, 1), (-3, 4), ha="right", xycoords="axes fraction", **ABOVE)
        panel.set(ylim=(-limit, limit), xlim=(-0.6, len(names) - 0.4))
        panel.set_title(stratum, pad=13)
        panel.grid(visible=False, axis="x")
    panels[-1][0].set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    figure.supylabel("Error of the advantage", fontsize=7)
    return figure


@style.context(STYLE)
def comparison(values: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw metrics of several settings side by side: a dot for each run, the mean, and its standard error over runs.

    Args:
        values: {label of a metric: {setting: values, one for each run}}, one panel for each metric; NaN is left out.
    """
    names = list(dict.fromkeys(name for settings in values.values() for name in settings))
    figure, panels = make_panels(len(values), rows=1, height=0.7 + 0.28 * len(names))
    figure.set_figwidth(max(WIDTH, 0.8 + 1.3 * len(values)))
    for (title, settings), panel in zip(values.items(), panels[0], strict=True):
        for y, name in enumerate(names):
            runs = np.asarray(settings.get(name, ()), dtype=float)
            runs = runs[~np.isnan(runs)]
            colour = COLOURS[y % len(COLOURS)]
            panel.scatter(runs, np.full(len(runs), y), s=6, color=colour, alpha=0.4, linewidth=0)
            if len(runs):
                error = runs.std(ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else 0.0
                panel.errorbar(runs.mean(), y, xerr=error, fmt=MARKERS[y % len(MARKERS)], color=colour, markersize=4)
        panel.set_title(title)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_yticks([])
        panel.locator_params(axis="x", nbins=3)
    panels[0][0].set_yticks(range(len(names)), names)
    return figure


def _draw_violin(panel: Axes, x: int, sample: np.ndarray, limit: float) -> None:
    """Draw the density of a sample at x. `limit` is the end of the vertical axis."""
    colour = COLOURS[x % len(COLOURS)]
    if len(sample) and np.ptp(sample) > 1e-9 * limit:
        violin: dict[str, Any] = panel.violinplot(sample, [x], showextrema=False, widths=0.85, points=200)
        (body,) = violin["bodies"]
        body.set(facecolor=colour, edgecolor=colour, linewidth=0.6, alpha=0.6)
    elif len(sample):  # the density of a single value has no width
        panel.hlines(sample[0], x - 0.4, x + 0.4, color=colour, linewidth=1.5)


def _bar_centres() -> np.ndarray:
    """Return the centre of the bar of each of the 11 bins."""
    return np.arange(11) / 10 + np.where(np.arange(11) < 10, 0.05, 0.01)


def _bar_widths() -> np.ndarray:
    """Return the width of the bar of each of the 11 bins; the last bin holds 1.0 alone."""
    return np.where(np.arange(11) < 10, 0.09, 0.02)


def make_panels(
    columns: int, rows: int, height: float, ratios: Sequence[float] | None = None, share_y: bool = False
) -> tuple[Figure, np.ndarray]:
    """Make a figure with (rows, columns) panels; height in inches, ratios of the heights of the rows."""
    figure = Figure(figsize=(max(WIDTH, 2.1 * columns), height))
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios, sharex="col", sharey=share_y)
    return figure, panels


def add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend of all that some panels show below the figure."""
    named = {text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=3)
