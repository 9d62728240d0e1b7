"""Groups whose later blocks were sampled again and again from each completion's own prefix, and how near every baseline
comes to what that says (paper, Fig. 1). One row for each completion and each objective that conditions on an outcome:

| column | meaning |
|---|---|
| objective, prompt | names |
| group, sample | number of the prompt, and of the completion in its group |
| reward | of the completion, in this objective |
| outcome, correct | of its prefix |
| rescored_wrong, rescored_right | what its number would have earned under either outcome, NaN without a scoring rule |
| expected | what the policy's distribution over the number promised; NaN if it says nothing |
| rollouts | rewards of fresh samples of the block from the same prefix: the Monte-Carlo reference |
| nested | more of them, for the baseline that samples itself |
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bae.batch import Problem, group_index
from bae.evaluation import figures
from bae.fidelity.compare_to_monte_carlo import Interval, agreement, sets
from bae.fidelity.continuations import resample
from bae.fidelity.gradients import ALL_ACTION, compare_gradients, sketch_completions, sketch_reference
from bae.method.baselines import Baseline, RaoBlackwell, RewardView, outcome_strata, stratum_size, with_fallback
from bae.method.stated_numbers import Candidates
from bae.objectives import Objective
from bae.objectives.outcomes import Outcome
from bae.objectives.reward_view import number_decisions, reward_view, score_table
from bae.rollout.pipeline import Pipeline
from bae.training.forward import expected_reward

FLAGS = {0.0: "incorrect", 1.0: "correct"}


def measure(
    pipeline: Pipeline,
    outcome: Outcome,
    candidates: Candidates,
    problems: Sequence[Problem],
    keys: Sequence[tuple[int, ...]],
    group_size: int,
    rollouts: int,
    nested: int,
    micro_batch_tokens: int,
    sketch: int = 0,
) -> tuple[pandas.DataFrame, dict[str, Tensor]]:
    """Sample a group of each problem, and `rollouts` + `nested` more of every later block from each prefix.

    keys: one seed for each problem; its `group` is the last number of it. micro_batch_tokens: in a forward pass.
    Returns the table and, with `sketch` numbers each, gradients by "<objective>/<name>": those of
    bae.fidelity.gradients, of the
    objective's rows and of the problems.
    """
    samples, scored, _ = pipeline(problems, keys, group_size)
    scorer, count = pipeline.scorer, len(scored.completions)
    group = group_index(count, group_size)
    table = score_table(scored, scorer.objectives, outcome, group)
    owners = [problem for problem in problems for _ in range(group_size)]
    # From 1 on: a seed that ends in 0 is that of its group, to which numpy appends zeros.
    again_keys = [(*keys[n // group_size], 1 + n % group_size) for n in range(count)]
    parts: list[pandas.DataFrame] = []
    sketches: dict[str, Tensor] = {}
    for block in sorted({scorer.block_of_objective[j] for j, o in enumerate(scorer.objectives) if o.givens}):
        again = resample(pipeline, owners, samples, scored.block_of, block, rollouts + nested, again_keys)
        for j, objective in enumerate(scorer.objectives):
            if not objective.givens or scorer.block_of_objective[j] != block:
                continue
            keep = scored.present[again.rows, j]
            rows = again.rows[keep]
            decisions = None if objective.score is None else number_decisions(scored, scorer, j, candidates)
            expected = torch.full((count,), torch.nan)
            if decisions is not None:
                model = pipeline.policy.model
                expected = expected_reward(model, samples, decisions, pipeline.temperature, micro_batch_tokens)
            rewards = reward_view(objective, j, table, group, expected=expected)
            names = {
                "objective": objective.name,
                "prompt": [owners[n].id for n in rows.tolist()],
                "group": [keys[n // group_size][-1] for n in rows.tolist()],
                "sample": (rows % group_size).numpy(),
            }
            parts.append(_table(names, rewards, rows, _whole(again.rewards(j)[keep]), rollouts))
            if sketch:
                in_block = scored.block_of == block
                found = sketch_completions(pipeline, samples, in_block, rows, rewards.reward, decisions, sketch)
                found["half_a"], found["half_b"] = sketch_reference(
                    pipeline, again, block, j, group[again.rows], len(problems), sketch, micro_batch_tokens
                )
                sketches |= {f"{objective.name}/{name}": values for name, values in found.items()}
    return pandas.concat(parts, ignore_index=True), sketches


def _table(
    names: Mapping[str, object], rewards: RewardView, rows: Tensor, drawn: Tensor, rollouts: int
) -> pandas.DataFrame:
    """The rows of one objective. drawn: (R, rollouts + nested) rewards of fresh samples."""
    assert rewards.correct is not None and rewards.expected is not None
    rescored = torch.full((len(rewards.reward), 2), torch.nan) if rewards.rescored is None else rewards.rescored
    return pandas.DataFrame(
        {
            **names,
            "reward": rewards.reward[rows].numpy(),
            "outcome": rewards.outcome[rows].numpy(),
            "correct": rewards.correct[rows].numpy(),
            "rescored_wrong": rescored[rows, 0].numpy(),
            "rescored_right": rescored[rows, 1].numpy(),
            "expected": rewards.expected[rows].numpy(),
            "rollouts": list(drawn[:, :rollouts].numpy()),
            "nested": list(drawn[:, rollouts:].numpy()),
        }
    )


def _whole(rewards: Tensor) -> Tensor:
    """Samples that do not count (malformed ones under `malformed: mask`) take the mean of their prefix's others."""
    return torch.where(rewards.isnan(), rewards.nanmean(1, keepdim=True).nan_to_num(), rewards)


def rewards_of(table: pandas.DataFrame, group_size: int) -> RewardView:
    """What a baseline sees of one objective's rows, in groups of `group_size`: larger groups are cut into such."""
    column = lambda name: torch.from_numpy(table[name].to_numpy(dtype="float32", copy=True))  # noqa: E731
    sample = torch.from_numpy(table["sample"].to_numpy(dtype="int64", copy=True))
    group = _prompts(table)
    rescored = torch.stack([column("rescored_wrong"), column("rescored_right")], 1)
    nested = _matrix(table["nested"])

    def drawn(count: int) -> Tensor:
        if count > nested.shape[1]:
            raise ValueError(f"baseline monte_carlo: rollouts={count}, but nested={nested.shape[1]}; raise nested")
        return nested[:, :count]

    return RewardView(
        reward=column("reward"),
        group=group * (1 + int(sample.max())) + sample // group_size,
        outcome=torch.from_numpy(table["outcome"].to_numpy(dtype="float64", copy=True)),
        present=torch.ones(len(table), dtype=torch.bool),
        correct=column("correct").long(),
        rescored=None if rescored.isnan().any() else rescored,
        resample=drawn,
        expected=column("expected"),
    )


def check_conditioned(objectives: Sequence[Objective]) -> None:
    """Raises ValueError if no objective is conditioned on what came before its block."""
    if not any(objective.givens for objective in objectives):
        raise ValueError(
            "fidelity: none of the objectives is conditioned on an outcome (`given`), so there is no later block to "
            "sample again"
        )


def check_nested(baselines: Mapping[str, Baseline], nested: int) -> None:
    """Raises ValueError if one that samples, such as monte_carlo, will ask for more than there will be."""
    for name, baseline in baselines.items():
        rollouts = baseline.keywords.get("rollouts", 0) if isinstance(baseline, partial) else 0
        if rollouts > nested:
            raise ValueError(
                f"nested={nested}: baseline {name} needs {rollouts} of its own; raise nested or leave it out"
            )


def _prompts(table: pandas.DataFrame) -> Tensor:
    return torch.from_numpy(table["group"].to_numpy(dtype="int64", copy=True))


def _matrix(values: pandas.Series) -> Tensor:
    return torch.from_numpy(np.stack(values.to_list()).astype("float32"))


def baseline_values(
    rewards: RewardView, baselines: Mapping[str, Baseline], fallback: Baseline, prompt: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(N,) of each baseline, and the share of completions where the fallback stepped in. prompt: (N,) long.

    One that carries something from step to step learns it from one half of the prompts and is asked about the other.
    """
    values, shares = {}, {}
    halves = prompt.unique(return_inverse=True)[1] % 2
    for name, baseline in baselines.items():
        value, lacking = torch.empty_like(rewards.reward), torch.empty_like(rewards.present)
        if hasattr(baseline, "load_state_dict"):
            for half in (0, 1):
                fresh = copy.deepcopy(baseline)
                with_fallback(fresh, fallback, _rows(rewards, halves != half))
                value[halves == half], lacking[halves == half] = with_fallback(
                    fresh, fallback, _rows(rewards, halves == half)
                )
        else:
            value, lacking = with_fallback(baseline, fallback, rewards)
        values[name], shares[name] = value, lacking.float().mean().item()
    return values, shares


def _rows(rewards: RewardView, where: Tensor) -> RewardView:
    pick = lambda x: None if x is None else x[where]  # noqa: E731
    draw = rewards.resample
    return RewardView(
        rewards.reward[where], rewards.group[where], rewards.outcome[where], rewards.present[where],
        pick(rewards.correct), pick(rewards.rescored), None if draw is None else lambda n: draw(n)[where],
        pick(rewards.expected),
    )  # fmt: skip


def compare(
    table: pandas.DataFrame,
    baselines: Mapping[str, Baseline],
    fallback: Baseline,
    group_sizes: Sequence[int],
    reference: str | None,
    resamples: int,
) -> tuple[pandas.DataFrame, dict[tuple[str, int], dict[str, Tensor]]]:
    """A row for each objective, group size, set of completions (all; by outcome; by size of the stratum) and baseline,
    with what bae.fidelity.compare_to_monte_carlo says and 95 % intervals; and the values of the baselines, by
    objective and group size."""
    found, values = [], {}
    for objective, part in table.groupby("objective", sort=False):
        prompt, reference_rollouts = _prompts(part), _matrix(part["rollouts"])
        for size in group_sizes:
            rewards = rewards_of(part, size)
            values[str(objective), size], shares = baseline_values(rewards, baselines, fallback, prompt)
            strata = stratum_size(outcome_strata(rewards), rewards.present)
            for name, where in sets(rewards.outcome, strata, names_of(rewards.outcome)).items():
                measured = agreement(rewards.reward, values[str(objective), size], reference_rollouts, prompt,
                                     reference, resamples, where=where)  # fmt: skip
                for baseline, result in measured.items():
                    found.append({"objective": objective, "group_size": size, "set": name, "baseline": baseline,
                                  "fallback": shares[baseline]} | _flat(asdict(result)))  # fmt: skip
    return pandas.DataFrame(found), values


def compare_gradient(
    table: pandas.DataFrame,
    sketches: Mapping[str, Tensor],
    values: Mapping[tuple[str, int], Mapping[str, Tensor]],
    baselines: Mapping[str, Baseline],
    fallback: Baseline,
    resamples: int,
) -> pandas.DataFrame:
    """A row for each objective, group size and baseline: cosine and mean squared error of the gradient that it gives
    the block, with 95 % intervals. sketches: of `measure`, for all problems, whose numbers count from 0. values: of
    `compare`."""
    found = []
    texts = {name: baseline.text for name, baseline in baselines.items() if isinstance(baseline, RaoBlackwell)}
    for (objective, size), each in values.items():
        part, prefix = table[table["objective"] == objective], f"{objective}/"
        own = {name.removeprefix(prefix): x for name, x in sketches.items() if name.startswith(prefix)}
        prompt, rewards = _prompts(part), rewards_of(part, size)
        text_values, _ = baseline_values(rewards, texts, fallback, prompt)
        assert rewards.expected is not None
        agreed = compare_gradients(own, rewards.reward, rewards.expected, each, text_values, prompt, resamples)
        for name, baseline in baselines.items():
            if isinstance(baseline, RaoBlackwell) and baseline.all_action:
                agreed[name] = agreed[ALL_ACTION]
        found += [{"objective": objective, "group_size": size, "baseline": name} | _flat(result._asdict())
                  for name, result in agreed.items()]  # fmt: skip
    return pandas.DataFrame(found)


def _flat(result: Mapping[str, object]) -> dict[str, object]:
    """{rmse: (value, low, high)} -> {rmse, rmse_low, rmse_high}."""
    flat: dict[str, object] = {}
    for name, value in result.items():
        parts = zip(("", "_low", "_high"), value, strict=True) if isinstance(value, Interval) else [("", value)]
        flat |= {f"{name}{end}": number for end, number in parts}
    return flat


def errors_of(
    table: pandas.DataFrame, values: Mapping[tuple[str, int], Mapping[str, Tensor]], results: pandas.DataFrame
) -> pandas.DataFrame:
    """What the paper's Fig. 1 shows: a row for each objective, group size, outcome (`set`) and baseline, with `errors`,
    a list of those of its advantages against Monte Carlo, and `rmse`, theirs without Monte Carlo's noise.

    values, results: of `compare`.
    """
    found = []
    for (objective, size), each in values.items():
        part = table[table["objective"] == objective]
        reference = _matrix(part["rollouts"]).mean(1)
        outcome = torch.from_numpy(part["outcome"].to_numpy(dtype="float64", copy=True))
        of_size = results[(results["objective"] == objective) & (results["group_size"] == size)]
        rmse = of_size.set_index(["set", "baseline"])["rmse"]
        by_outcome = sets(outcome, torch.zeros_like(outcome), names_of(outcome))
        for name in [name for name in by_outcome if name != "all"]:
            for baseline, value in each.items():
                errors = (reference - value)[by_outcome[name]].numpy()
                found.append({"objective": objective, "group_size": size, "set": name, "baseline": baseline,
                              "rmse": rmse[name, baseline], "errors": errors})  # fmt: skip
    return pandas.DataFrame(found)


def draw_errors(errors: pandas.DataFrame) -> Figure:
    """Of one objective and group size, by outcome."""
    panels = {str(name): part.set_index("baseline") for name, part in errors.groupby("set", sort=False)}
    return figures.error_distributions(
        {name: part["errors"].to_dict() for name, part in panels.items()},
        {name: part["rmse"].to_dict() for name, part in panels.items()},
    )


def names_of(outcome: Tensor) -> dict[float, str] | None:
    """What outcomes are called where they are no more than right and wrong."""
    return FLAGS if set(outcome.tolist()) <= FLAGS.keys() else None
