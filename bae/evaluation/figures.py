"""Draw figures, sized for one column of a paper (3.3 inches). Each function returns a Figure; `save` writes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

WIDTH = 3.3  # inches
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # Okabe and Ito, colour-blind safe
MARKERS = "osD^vPX"
STYLE: dict[str, Any] = {"fontsize": 7}
ABOVE: dict[str, Any] = {"fontsize": 6, "textcoords": "offset points"}  # texts above a panel, offset in points
STRATEGIES = {"pass@1": "Pass@1", "pass@k": "Pass@k", "maj": "Maj", "maxconf": "MaxConf", "weighted_maj": "WeightedMaj"}


def save(figure: Figure, stem: Path, dpi: int = 200) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`, and return the two paths; dpi: pixels an inch of the PNG."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def reliability(tables: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Draw reliability diagrams (paper, Fig. 4): accuracy against stated confidence by bin, above the counts by bin.

    Each panel says its ECE and the number of completions.

    Args:
        tables: {title: bae.evaluation.metrics.reliability_table}, one panel for each.
    """
    figure, panels = _panels(len(tables), rows=2, height=2.6, ratios=[3, 1])
    for (title, table), top, bottom in zip(tables.items(), panels[0], panels[1], strict=True):
        count, stated, accuracy = (table[key].numpy() for key in ("count", "confidence", "accuracy"))
        top.plot([0, 1], [0, 1], "--", color="0.6", linewidth=0.8)
        top.vlines(stated, accuracy, stated, color=COLOURS[1], linewidth=1)
        top.scatter(stated, accuracy, s=3 + 60 * count / count.sum(), color=COLOURS[0], zorder=3)  # area: share
        top.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="auto")
        top.set_title(title, **STYLE)
        ece = np.nansum(count * np.abs(accuracy - stated)) / count.sum()
        top.text(0, 0.97, f"ECE {ece:.3f}\nn {count.sum():,.0f}", va="top", fontsize=6)
        bottom.bar(_bar_centres(), count, width=_bar_widths(), color=COLOURS[0])
        bottom.set(xlim=(-0.03, 1.03), yscale="symlog", ylim=(0, None))
        bottom.set_xlabel("stated confidence", **STYLE)
    panels[0][0].set_ylabel("accuracy", **STYLE)
    panels[1][0].set_ylabel("count", **STYLE)
    return figure


def scaling(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw test-time scaling (paper, Fig. 2): the accuracy of each way to choose among n samples.

    Args:
        curves: {title: {strategy of bae.evaluation.voting.scaling: accuracy with n = 1, 2, … samples}}, one panel for
            each title.
    """
    figure, panels = _panels(len(curves), rows=1, height=2.2)
    for (title, strategies), panel in zip(curves.items(), panels[0], strict=True):
        for i, (name, label) in enumerate(STRATEGIES.items()):
            if name not in strategies:  # without confidences there are no strategies that need them
                continue
            accuracy = strategies[name]
            n = np.arange(1, len(accuracy) + 1)
            every = [j for j in range(len(n)) if (n[j] & (n[j] - 1)) == 0 or n[j] == len(n)]
            style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 3, "linewidth": 1}
            panel.plot(n, accuracy, markevery=every, label=label, **style)
        panel.set_xscale("log", base=2)
        panel.set_xticks([2**j for j in range(int(np.log2(len(n))) + 1)])
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_xlabel("samples", **STYLE)
        panel.set_title(title, **STYLE)
    panels[0][0].set_ylabel("accuracy", **STYLE)
    _legend(figure, panels[0][0])
    return figure


def training_curves(
    histories: Mapping[str, Mapping[str, Sequence[Mapping[int, float]]]], label: str, share_y: bool = False
) -> Figure:
    """Draw metrics over training: the mean over seeds, and a band from the lowest seed to the highest.

    Args:
        histories: {title: {name: [{step: value}, one for each seed]}}, one panel for each title.
        label: of the vertical axis.
        share_y: whether all panels have the same vertical scale.
    """
    figure, panels = _panels(len(histories), rows=1, height=2.2, share_y=share_y)
    for (title, curves), panel in zip(histories.items(), panels[0], strict=True):
        for i, (name, seeds) in enumerate(curves.items()):
            steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
            values = np.array([[seed[step] for step in steps] for seed in seeds])
            style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 2.5, "linewidth": 1}
            panel.plot(steps, values.mean(0), label=name, **style)
            panel.fill_between(steps, values.min(0), values.max(0), color=COLOURS[i], alpha=0.2, linewidth=0)
        panel.set_xlabel("step", **STYLE)
        panel.set_title(title, **STYLE)
    panels[0][0].set_ylabel(label, **STYLE)
    _legend(figure, panels[0][0])
    return figure


def error_distributions(
    errors: Mapping[str, Mapping[str, Sequence[float]]], rmse: Mapping[str, Mapping[str, float]] | None = None
) -> Figure:
    """Draw the errors of advantages against Monte Carlo (paper, Fig. 1): a violin for each baseline, its RMSE above it.

    One error in 200 lies beyond the vertical axis.

    Args:
        errors: {stratum: {baseline: errors}}, one panel for each stratum, one below the other.
        rmse: {stratum: {baseline: RMSE to print}}. The errors contain the noise of Monte Carlo;
            bae.fidelity.compare_to_monte_carlo gives an RMSE without it. None prints the RMSE of the errors.
    """
    names = list(dict.fromkeys(name for baselines in errors.values() for name in baselines))
    samples = {
        (s, b): np.asarray(list(e), dtype=float) for s, baselines in errors.items() for b, e in baselines.items()
    }
    everything = np.abs(np.concatenate([np.zeros(1), *samples.values()]))
    limit = np.quantile(everything, 0.995) or 1.0
    figure, panels = _panels(1, rows=len(errors), height=0.6 + 1.15 * len(errors), share_y=True)
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
        panel.set_title(stratum, **STYLE, pad=13)
        panel.grid(visible=False, axis="x")
    panels[-1][0].set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=6)
    figure.supylabel("error of the advantage", **STYLE)
    return figure


def comparison(values: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw metrics of several settings side by side: a dot for each run, the mean, and its standard error over runs.

    Args:
        values: {label of a metric: {setting: values, one for each run}}, one panel for each metric; NaN is left out.
    """
    names = list(dict.fromkeys(name for settings in values.values() for name in settings))
    figure, panels = _panels(len(values), rows=1, height=0.7 + 0.28 * len(names))
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
        panel.set_title(title, **STYLE)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_yticks([])
        panel.locator_params(axis="x", nbins=3)
    panels[0][0].set_yticks(range(len(names)), names, fontsize=6)
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


def _panels(
    columns: int, rows: int, height: float, ratios: Sequence[float] | None = None, share_y: bool = False
) -> tuple[Figure, np.ndarray]:
    """Make a figure with (rows, columns) panels; height in inches, ratios of the heights of the rows."""
    figure = Figure(figsize=(max(WIDTH, 2.1 * columns), height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios, sharex="col", sharey=share_y)
    for panel in panels.flat:
        panel.tick_params(labelsize=6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.5)
    return figure, panels


def _legend(figure: Figure, panel: Axes) -> None:
    """Put the legend of a panel below the figure."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=6, frameon=False)
