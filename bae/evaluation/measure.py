"""From a policy to a table of samples, and from the table to metrics, curves and figures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

from bae.evaluation import figures
from bae.evaluation.bootstrap import clustered_bootstrap, iid_bootstrap
from bae.evaluation.completion_table import NO_ANSWER, by_attempt, by_prompt, columns, frame, pairs
from bae.evaluation.metrics import reliability_table
from bae.evaluation.voting import CONFIDENT, answer_classes_of_prompts, scaling
from bae.rollout.pipeline import Pipeline
from bae.text.verdict import Verdict
from bae.text.verifier import Verifier

DRAWS = 2**32 - 2
"""In the place of a step in the seeds of evaluation: no training step has this number."""


@dataclass(frozen=True)
class Summary:
    """What a table of samples says.

    metrics: by name, those of bae.evaluation.metrics and the share of each outcome of the verifier; `sem/<metric>` is
    the paper's
        standard error (pairs taken as independent), `sem_by_prompt/<metric>` that of a bootstrap of prompts.
    scaling: test-time scaling, {strategy: accuracy with 1, 2, … samples}; empty if prompts have different numbers of
        samples.
    """

    metrics: dict[str, float]
    scaling: dict[str, list[float]]


def sample(
    pipeline: Pipeline, split: str, prompts: int | None, samples: int, seed: int, rank: int = 0, world: int = 1
) -> pandas.DataFrame:
    """A table of `samples` completions of each of the first `prompts` problems of a split (None: all of them); of
    those, every `world`-th from `rank` on. The draws depend on the seed and the problem's number alone."""
    size = pipeline.task.size(split)
    mine = range(rank, min(prompts or size, size), world)
    at_a_time = max(1, 512 // samples)
    parts = []
    with tqdm(total=len(mine) * samples, desc=f"sampling {split}", unit="completion", disable=rank > 0) as bar:
        for start in range(0, len(mine), at_a_time):
            chosen = mine[start : start + at_a_time]
            problems = [pipeline.task.problem(split, i) for i in chosen]
            _, scored, _ = pipeline(problems, [(seed, DRAWS, i) for i in chosen], samples)
            parts.append(columns(scored.completions, pipeline.scorer.attempts))
            bar.update(len(scored.completions))
    return frame(parts)


def summarise(table: pandas.DataFrame, verifier: Verifier, resamples: int = 1000, seed: int = 0) -> Summary:
    """Metrics with both standard errors, outcomes, and test-time scaling by answers that the verifier finds equal."""
    every = pairs(table)
    by_pair = iid_bootstrap(every.confidence, every.correct, resamples, seed)
    by_cluster = clustered_bootstrap(every, resamples, seed)
    metrics = {name: estimate.value for name, estimate in by_pair.items()}
    metrics |= {f"sem/{name}": estimate.sem for name, estimate in by_pair.items()}
    metrics |= {f"sem_by_prompt/{name}": estimate.sem for name, estimate in by_cluster.items()}
    outcomes = [verdict.value for verdict in Verdict] + [NO_ANSWER]
    metrics |= {f"outcome/{outcome}": float((table["verdict"] == outcome).mean()) for outcome in outcomes}
    metrics |= {"prompts": float(len(set(every.prompt))), "samples": float(len(table))}
    return Summary(metrics, test_time_scaling(table, verifier))


def test_time_scaling(table: pandas.DataFrame, verifier: Verifier) -> dict[str, list[float]]:
    """`Summary.scaling`; without strategies that need confidences where there are none."""
    answers = [[a if isinstance(a, str) else None for a in samples] for samples in by_prompt(table, "answer")]
    if len({len(samples) for samples in answers}) != 1:
        return {}
    classes = torch.tensor(answer_classes_of_prompts(answers, verifier.equivalent))
    correct = torch.tensor(by_prompt(table, "correct"))
    confidence = torch.tensor(by_prompt(table, "confidence"), dtype=torch.double)
    curves = scaling(classes, correct, confidence)
    if confidence.isnan().all():
        curves = {name: curve for name, curve in curves.items() if name not in CONFIDENT}
    return {name: curve.mean(0).tolist() for name, curve in curves.items()}


def measure(
    table: pandas.DataFrame, verifier: Verifier, folder: Path, name: str, resamples: int = 1000
) -> tuple[dict[str, Summary], list[Path]]:
    """Write `<name>.parquet` (the samples, before anything can go wrong with them), `<name>.json` (the summaries) and
    the figures; the summaries, as `<name>` and, where there are further attempts, `<name>/attempt_2` and so on, and
    what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, numbers = folder / f"{name}.parquet", folder / f"{name}.json"
    table.to_parquet(samples, index=False)
    views = {f"{name}/{attempt}".rstrip("/"): view for attempt, view in by_attempt(table).items()}
    summaries = {title: summarise(view, verifier, resamples) for title, view in views.items()}
    numbers.write_text(json.dumps({title: asdict(summary) for title, summary in summaries.items()}, indent=1))
    stated = {title: pairs(view) for title, view in views.items() if view["confidence"].notna().any()}
    drawn = []
    if stated:
        bins = {title: reliability_table(q, c) for title, (q, c, _) in stated.items()}
        drawn += figures.save(figures.reliability(bins), folder / f"{name}_reliability")
    curves = {title: s.scaling for title, s in summaries.items() if len(next(iter(s.scaling.values()), [])) > 1}
    if curves:
        drawn += figures.save(figures.scaling(curves), folder / f"{name}_scaling")
    return summaries, [samples, numbers, *drawn]


def lines(summaries: dict[str, Summary], shown: Sequence[str] = ("accuracy", "auroc", "ece", "brier")) -> list[str]:
    """A table for the terminal: a row for each set, each value with its standard error by prompt."""
    width = max(map(len, summaries), default=0) + 2
    table = [" " * width + "".join(f"{name:>18}" for name in (*shown, "coverage", "samples"))]
    for name, summary in summaries.items():
        m = summary.metrics
        cells = [f"{m[key]:.4f} ± {m[f'sem_by_prompt/{key}']:.4f}" for key in shown]
        cells += [f"{m['coverage']:.3f}", f"{m['samples']:.0f}"]
        table.append(f"{name:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    return table
