"""Sample a completion table from a policy, and compute metrics, curves and figures from the table."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas
import torch
from torch import Tensor
from tqdm import tqdm

from bae import seeds
from bae.evaluation import figures
from bae.evaluation.bootstrap import RESAMPLES, clustered_bootstrap, iid_bootstrap
from bae.evaluation.completion_table import NO_ANSWER, by_attempt, by_prompt, columns, frame, pairs
from bae.evaluation.metrics import reliability_table
from bae.evaluation.voting import CONFIDENT, answer_classes, scaling, without_votes
from bae.rollout.pipeline import Pipeline
from bae.text.verdict import Verdict
from bae.text.verifier import Verifier
from bae.text.visible import quoted


@dataclass(frozen=True)
class Summary:
    """Hold the metrics and curves of a completion table.

    Args:
        metrics: {name: value}. It has the metrics of bae.evaluation.metrics, their standard errors, the share of each
            verdict as `outcome/<verdict>`, `accuracy_attempted` if some answers abstain, and the numbers of `prompts`
            and `samples`. `sem/<metric>` is the paper's standard error, which takes pairs as independent;
            `sem_by_prompt/<metric>` is from a bootstrap of prompts.
        scaling: test-time scaling, {strategy: accuracy with 1, 2, … samples}. It is empty if prompts have different
            numbers of samples.
    """

    metrics: dict[str, float]
    scaling: dict[str, list[float]]


def sample(
    pipeline: Pipeline, split: str, prompts: int | None, samples: int, seed: int, rank: int = 0, world: int = 1
) -> pandas.DataFrame:
    """Sample completions of the first problems of a split. The draws depend only on the seed and the problem's number.

    Args:
        pipeline: samples and scores.
        split: of the pipeline's task.
        prompts: how many problems of the split to take; None takes all.
        samples: how many completions to sample for each problem.
        seed: of the draws.
        rank, world: take every `world`-th of these problems, from problem `rank` on.

    Returns:
        The completion table.
    """
    size = pipeline.task.size(split)
    mine = range(rank, min(prompts or size, size), world)
    at_a_time = max(1, 512 // samples)
    parts = []
    with tqdm(total=len(mine) * samples, desc=f"sampling {split}", unit="completion", disable=rank > 0) as bar:
        for start in range(0, len(mine), at_a_time):
            chosen = mine[start : start + at_a_time]
            problems = [pipeline.task.problem(split, i) for i in chosen]
            _, scored, _ = pipeline(problems, [seeds.key(seed, seeds.Namespace.EVALUATION, i) for i in chosen], samples)
            parts.append(columns(scored.completions, pipeline.scorer.attempts))
            bar.update(len(scored.completions))
    return frame(parts)


def summarise(table: pandas.DataFrame, verifier: Verifier, resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Compute metrics with both standard errors, shares of verdicts, and test-time scaling.

    Args:
        table: a completion table.
        verifier: tells which answers of a prompt are equal, for votes.
        resamples, seed: of the bootstraps.
    """
    every = pairs(table)
    by_pair = iid_bootstrap(every.confidence, every.correct, resamples, seed)
    by_cluster = clustered_bootstrap(every, resamples, seed)
    metrics = {name: estimate.value for name, estimate in by_pair.items()}
    metrics |= {f"sem/{name}": estimate.sem for name, estimate in by_pair.items()}
    metrics |= {f"sem_by_prompt/{name}": estimate.sem for name, estimate in by_cluster.items()}
    outcomes = [verdict.value for verdict in Verdict] + [NO_ANSWER]
    metrics |= {f"outcome/{outcome}": float((table["verdict"] == outcome).mean()) for outcome in outcomes}
    attempted = table[table["verdict"] != Verdict.ABSTAINED.value]
    if len(attempted) < len(table):
        metrics["accuracy_attempted"] = float(attempted["correct"].mean())  # NaN if all abstain
    metrics |= {"prompts": float(len(set(every.prompt))), "samples": float(len(table))}
    return Summary(metrics, test_time_scaling(table, verifier))


def test_time_scaling(table: pandas.DataFrame, verifier: Verifier) -> dict[str, list[float]]:
    """Compute the curves of test-time scaling.

    Args:
        table: a completion table.
        verifier: tells which answers of a prompt are equal.

    Returns:
        {strategy: accuracy with 1, 2, … samples}. It is empty if prompts have different numbers of samples. If no
        confidence can be read, the strategies that need one are left out. A table without answers has those alone that
        compare none, Pass@1 and Pass@k.
    """
    correct = by_prompt(table, "correct")
    if len({len(samples) for samples in correct}) != 1:
        return {}
    if "answer" not in table:
        return _means(without_votes(torch.tensor(correct)))
    answers = [[a if isinstance(a, str) else None for a in samples] for samples in by_prompt(table, "answer")]
    classes = torch.tensor(answer_classes(answers, verifier.equivalent))
    confidence = torch.tensor(by_prompt(table, "confidence"), dtype=torch.double)
    curves = scaling(classes, torch.tensor(correct), confidence)
    if confidence.isnan().all():
        curves = {name: curve for name, curve in curves.items() if name not in CONFIDENT}
    return _means(curves)


def _means(curves: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return the means over prompts; curves: {strategy: (P, N)}."""
    return {name: curve.mean(0).tolist() for name, curve in curves.items()}


def measure(
    table: pandas.DataFrame, verifier: Verifier, folder: Path, name: str, resamples: int = RESAMPLES
) -> tuple[dict[str, Summary], list[Path]]:
    """Measure a completion table, and write the table, the numbers and the figures.

    Args:
        table: a completion table.
        verifier: tells which answers of a prompt are equal.
        folder: is made if it is not there.
        name: of the set of problems, such as a split.
        resamples: of the bootstraps.

    Returns:
        The summaries and the paths of the files. The summaries are {`<name>`: summary}; if the format has further
        answers, also `<name>/attempt_2` and so on. The files are `<name>.parquet` (the table, written first, so that
        no later error loses it), `<name>.json` (the summaries) and the figures that have something to show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples, numbers = folder / f"{name}.parquet", folder / f"{name}.json"
    table.to_parquet(samples, index=False)
    warn_if_none_is_right(name, table)
    views = {f"{name}/{attempt}".rstrip("/"): view for attempt, view in by_attempt(table).items()}
    summaries = {title: summarise(view, verifier, resamples) for title, view in views.items()}
    numbers.write_text(json.dumps({title: asdict(summary) for title, summary in summaries.items()}, indent=1))
    return summaries, [samples, numbers, *_draw(views, summaries, folder / name)]


def warn_if_none_is_right(name: str, table: pandas.DataFrame) -> None:
    """Warn, with one answer, if no answer of a completion table is right: often format and references do not fit."""
    if not len(table) or table["correct"].any() or "answer" not in table:  # without answers there are verdicts alone
        return
    answered = table[table["answer"].notna()]
    if len(answered):
        row = answered.iloc[0]
        one = f"one of them is {quoted(str(row['answer']), 80)} where {quoted(str(row['reference']), 80)} is right"
    else:
        one = f"no completion has an answer section; one of them is {quoted(str(table.iloc[0]['text']))}"
    warnings.warn(f"{name}: none of {len(table)} answers is right; {one}; see whether they can match", stacklevel=3)


def _draw(views: Mapping[str, pandas.DataFrame], summaries: Mapping[str, Summary], stem: Path) -> list[Path]:
    """Write the reliability diagrams and the scaling curves, where there are any, and return their paths."""
    stated = {title: pairs(view) for title, view in views.items() if view["confidence"].notna().any()}
    drawn = []
    if stated:
        bins = {title: reliability_table(q, c) for title, (q, c, _) in stated.items()}
        drawn += figures.save(figures.reliability(bins), stem.with_name(f"{stem.name}_reliability"))
    curves = {title: s.scaling for title, s in summaries.items() if len(next(iter(s.scaling.values()), [])) > 1}
    if curves:
        drawn += figures.save(figures.scaling(curves), stem.with_name(f"{stem.name}_scaling"))
    return drawn


def lines(summaries: Mapping[str, Summary], shown: Sequence[str] = ("accuracy", "auroc", "ece", "brier")) -> list[str]:
    """Format summaries as a table for the terminal.

    Args:
        summaries: {name: summary}, one row each.
        shown: the metrics to show, each with its standard error by prompt.

    Returns:
        The lines of the table, the heading first.
    """
    width = max(map(len, summaries), default=0) + 2
    table = [" " * width + "".join(f"{name:>18}" for name in (*shown, "coverage", "samples"))]
    for name, summary in summaries.items():
        m = summary.metrics
        cells = [f"{m[key]:.4f} ± {m[f'sem_by_prompt/{key}']:.4f}" for key in shown]
        cells += [f"{m['coverage']:.3f}", f"{m['samples']:.0f}"]
        table.append(f"{name:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    return table
