"""Compare the advantages and the gradients of baselines with the rollouts of a study (paper, Fig. 1)."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bae.evaluation import figures
from bae.fidelity.compare_to_monte_carlo import compare_to_monte_carlo, sets
from bae.fidelity.gradient_agreement import gradient_agreement
from bae.fidelity.gradients import prompt_gradients
from bae.fidelity.intervals import Interval
from bae.method.baselines import Baseline, RewardView, outcome_strata, stratum_size, with_fallback
from bae.objectives.refining import RefiningBaseline

FLAGS = {0.0: "incorrect", 1.0: "correct"}

Values = Mapping[tuple[str, int], Mapping[str, Tensor]]
"""The values of baselines: {(objective, group size): {baseline: (N,)}}."""


def rewards_of(table: pandas.DataFrame, group_size: int) -> RewardView:
    """Return what a baseline sees of one objective's rows.

    Args:
        table: the rows of one objective, of bae.fidelity.measure.
        group_size: G. Larger groups are cut into groups of this size.
    """
    sample, nested = _column(table, "sample", "int64"), _matrix(table["nested"])
    rescored = torch.stack([_column(table, "rescored_wrong"), _column(table, "rescored_right")], 1)

    def drawn(count: int) -> Tensor:
        if count > nested.shape[1]:
            raise ValueError(f"baseline monte_carlo: rollouts={count}, but nested={nested.shape[1]}; raise nested")
        return nested[:, :count]

    return RewardView(
        reward=_column(table, "reward"),
        group=_prompts(table) * (1 + int(sample.max())) + sample // group_size,
        outcome=_column(table, "outcome", "float64"),
        present=torch.ones(len(table), dtype=torch.bool),
        correct=_column(table, "correct").long(),
        rescored=None if rescored.isnan().any() else rescored,
        resample=drawn,
        expected=_column(table, "expected"),
    )


def baseline_values(
    rewards: RewardView, baselines: Mapping[str, Baseline], fallback: Baseline, prompt: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the value of each baseline for each completion, and where the fallback baseline stepped in.

    A baseline that carries something from step to step learns it from one half of the prompts and is asked about the
    other half.

    Args:
        rewards: what baselines see of N completions.
        baselines: by name.
        fallback: the baseline where one has none.
        prompt: (N,) long.

    Returns:
        {baseline: (N,)}, and {baseline: share of completions where the fallback stepped in}.
    """
    values, shares = {}, {}
    half = prompt.unique(return_inverse=True)[1] % 2
    for name, baseline in baselines.items():
        if hasattr(baseline, "load_state_dict"):
            values[name], lacking = _learnt_from_the_other_half(rewards, baseline, fallback, half)
        else:
            values[name], lacking = with_fallback(baseline, fallback, rewards)
        shares[name] = lacking.float().mean().item()
    return values, shares


def _learnt_from_the_other_half(
    rewards: RewardView, baseline: Baseline, fallback: Baseline, half: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as `with_fallback`, by copies of the baseline; half: (N,), 0 or 1."""
    value, lacking = torch.empty_like(rewards.reward), torch.empty_like(rewards.present)
    for number in (0, 1):
        fresh = copy.deepcopy(baseline)
        with_fallback(fresh, fallback, _rows(rewards, half != number))
        value[half == number], lacking[half == number] = with_fallback(fresh, fallback, _rows(rewards, half == number))
    return value, lacking


def _rows(rewards: RewardView, where: Tensor) -> RewardView:
    """Return the view of the completions `where`, (N,) bool."""
    draw = rewards.resample

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[where]

    return RewardView(
        reward=rewards.reward[where],
        group=rewards.group[where],
        outcome=rewards.outcome[where],
        present=rewards.present[where],
        correct=pick(rewards.correct),
        rescored=pick(rewards.rescored),
        resample=None if draw is None else lambda n: draw(n)[where],
        expected=pick(rewards.expected),
    )


def compare_advantages(
    table: pandas.DataFrame,
    baselines: Mapping[str, Baseline],
    fallback: Baseline,
    group_sizes: Sequence[int],
    reference: str | None,
    resamples: int,
) -> tuple[pandas.DataFrame, dict[tuple[str, int], dict[str, Tensor]]]:
    """Compare the advantages of every baseline with Monte Carlo's.

    Args:
        table: of bae.fidelity.measure.
        baselines: by name.
        fallback: the baseline where one has none.
        group_sizes: larger groups are cut into groups of each of these sizes.
        reference: the baseline that the others are compared with, None for none.
        resamples: of the prompts, for intervals.

    Returns:
        A row for each objective, group size, set of completions (all; by outcome; by size of the stratum) and baseline,
        with what bae.fidelity.compare_to_monte_carlo says and 95 % intervals; and the values of the baselines.
    """
    found: list[dict[str, object]] = []
    values: dict[tuple[str, int], dict[str, Tensor]] = {}
    for objective, part in table.groupby("objective", sort=False):
        prompt, rollouts = _prompts(part), _matrix(part["rollouts"])
        for size in group_sizes:
            view = rewards_of(part, size)
            value, shares = baseline_values(view, baselines, fallback, prompt)
            values[str(objective), size] = value
            strata = stratum_size(outcome_strata(view), view.present)
            for name, where in sets(view.outcome, strata, names_of(view.outcome)).items():
                results = compare_to_monte_carlo(
                    view.reward, value, rollouts, prompt, reference, resamples, where=where
                )
                first = {"objective": objective, "group_size": size, "set": name}
                for baseline, result in results.items():
                    found.append(first | {"baseline": baseline, "fallback": shares[baseline]} | _flat(asdict(result)))
    return pandas.DataFrame(found), values


def compare_gradients(
    table: pandas.DataFrame,
    sketches: Mapping[str, Tensor],
    values: Values,
    baselines: Mapping[str, Baseline],
    fallback: Baseline,
    resamples: int,
) -> pandas.DataFrame:
    """Compare the gradient that every baseline gives the block with the one from all fresh samples.

    Args:
        table: of bae.fidelity.measure.
        sketches: of the same, for all problems, whose numbers count from 0.
        values: of `compare_advantages`.
        baselines: by name. For refining ones the sketches must be there.
        fallback: the baseline where one has none.
        resamples: of the prompts, for intervals.

    Returns:
        A row for each objective, group size and baseline: cosine, mean squared error and share of the noise, as in
        bae.fidelity.gradient_agreement, with 95 % intervals.
    """
    found = []
    refining = {name: baseline for name, baseline in baselines.items() if isinstance(baseline, RefiningBaseline)}
    for (objective, size), value in values.items():
        part, prefix = table[table["objective"] == objective], f"{objective}/"
        own = {name.removeprefix(prefix): x for name, x in sketches.items() if name.startswith(prefix)}
        prompt, view = _prompts(part), rewards_of(part, size)
        unrefined, _ = baseline_values(replace(view, expected=None), refining, fallback, prompt)
        for name in baselines:
            b = unrefined[name] if name in refining else value[name]
            proxy = prompt_gradients(own, view.reward - b, prompt, name if name in refining else None)
            result = gradient_agreement(proxy, own["half_a"], own["half_b"], resamples)
            found.append({"objective": objective, "group_size": size, "baseline": name} | _flat(result._asdict()))
    return pandas.DataFrame(found)


def _flat(result: Mapping[str, object]) -> dict[str, object]:
    """Flatten intervals: {rmse: (value, low, high)} -> {rmse, rmse_low, rmse_high}."""
    flat: dict[str, object] = {}
    for name, value in result.items():
        parts = zip(("", "_low", "_high"), value, strict=True) if isinstance(value, Interval) else [("", value)]
        flat |= {f"{name}{end}": number for end, number in parts}
    return flat


def errors_of(table: pandas.DataFrame, values: Values, results: pandas.DataFrame) -> pandas.DataFrame:
    """Return what the paper's Fig. 1 shows: the errors of the advantages.

    Args:
        table: of bae.fidelity.measure.
        values, results: of `compare_advantages`.

    Returns:
        A row for each objective, group size, outcome (`set`) and baseline, with `errors`, the list of the errors of its
        advantages against Monte Carlo, and `rmse`, without Monte Carlo's noise.
    """
    found = []
    for (objective, size), value in values.items():
        part = table[table["objective"] == objective]
        reference, outcome = _matrix(part["rollouts"]).mean(1), _column(part, "outcome", "float64")
        of_size = results[(results["objective"] == objective) & (results["group_size"] == size)]
        rmse = of_size.set_index(["set", "baseline"])["rmse"]
        by_outcome = sets(outcome, torch.zeros_like(outcome), names_of(outcome))
        for name in [name for name in by_outcome if name != "all"]:
            for baseline, b in value.items():
                first = {"objective": objective, "group_size": size, "set": name, "baseline": baseline}
                errors = (reference - b)[by_outcome[name]].numpy()
                found.append(first | {"rmse": rmse[name, baseline], "errors": errors})
    return pandas.DataFrame(found)


def draw_errors(errors: pandas.DataFrame) -> Figure:
    """Draw the errors of one objective and group size, by outcome; errors: rows of `errors_of`."""
    panels = {str(name): part.set_index("baseline") for name, part in errors.groupby("set", sort=False)}
    return figures.error_distributions(
        {name: part["errors"].to_dict() for name, part in panels.items()},
        {name: part["rmse"].to_dict() for name, part in panels.items()},
    )


def names_of(outcome: Tensor) -> dict[float, str] | None:
    """Return names of outcomes if they are no more than right and wrong, else None; outcome: (N,)."""
    return FLAGS if set(outcome.tolist()) <= FLAGS.keys() else None


def _prompts(table: pandas.DataFrame) -> Tensor:
    """Return (N,) long: the prompt of each row."""
    return _column(table, "group", "int64")


def _column(table: pandas.DataFrame, name: str, dtype: str = "float32") -> Tensor:
    """Return (N,): a column of numbers."""
    return torch.from_numpy(table[name].to_numpy(dtype=dtype, copy=True))


def _matrix(values: pandas.Series) -> Tensor:
    """Return (N, M) from N lists of M numbers."""
    return torch.from_numpy(np.stack(values.to_list()).astype("float32"))
