"""Estimate standard errors of metrics, and differences between two methods, by bootstrap.

The metrics are those of bae.evaluation.metrics. A resample is a weight for each pair: how often its cluster was drawn.
The metrics take such weights, so all metrics of a chunk of resamples are a few sums, and 1,000 resamples of 8,000
pairs take a fraction of a second.

The same seed gives the same draws. In some resamples a metric has no value: AUROC has none if only right, or only
wrong, completions were drawn. Such a resample is left out of that metric's standard error and interval. On average,
ECE is larger in a resample than in the sample, so use its standard error and not the values of its resamples.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bae.evaluation.metrics import all_metrics

RESAMPLES = 1000
"""The number of resamples of the paper (section Evaluation)."""

_CHUNK = 2**19  # weights at a time, 4 MiB: they stay in the cache, and more resamples do not take more memory


class Pairs(NamedTuple):
    """Hold the N completions of a method.

    Args:
        confidence: (N,) float in [0, 1], NaN where it cannot be read.
        correct: (N,), true or 1 where the answer is right.
        prompt: N ids, in a list or a tensor. Completions with the same id are samples of one prompt.
    """

    confidence: Tensor
    correct: Tensor
    prompt: Sequence[Hashable] | Tensor


class Estimate(NamedTuple):
    """Hold a metric and its standard error (sem). Either is NaN where it has no value."""

    value: float
    sem: float


class Difference(NamedTuple):
    """Hold the difference between two methods in one metric.

    Args:
        value: the metric of the second method minus that of the first.
        sem: the standard error of the difference.
        p: a two-sided p value. If k of R resamples lie at 0 or on the rarer side of it, p = 2 (1 + k) / (1 + R), at
            most 1. It is below 0.05 about where the interval does not contain 0.
        low, high: the 95 % percentile interval.
    """

    value: float
    sem: float
    p: float
    low: float
    high: float


def iid_bootstrap(
    confidence: Tensor, correct: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Estimate the paper's standard errors from resampled (confidence, correct) pairs; for accuracy, σ/√n.

    Completions of one prompt are taken as independent, which they are not: see `clustered_bootstrap`.

    Args:
        confidence, correct: (N,) each, as in Pairs.
        resamples: R, 2 or more.
        seed: of the draws.

    Returns:
        {metric: estimate} for the metrics of `all_metrics`.

    Raises:
        ValueError: as bae.evaluation.metrics does, or if there are fewer than 2 resamples.
    """
    estimates = _estimates(Pairs(confidence, correct, range(len(correct))), resamples, seed)
    mean, n = estimates["accuracy"].value, len(correct)
    return estimates | {"accuracy": Estimate(mean, (mean * (1 - mean) / n) ** 0.5 if n else torch.nan)}


def clustered_bootstrap(pairs: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Estimate standard errors from resampled prompts. A prompt is drawn with all its completions.

    Args:
        pairs: N completions; prompts may have different numbers of them.
        resamples: R, 2 or more.
        seed: of the draws.

    Returns:
        {metric: estimate} for the metrics of `all_metrics`.

    Raises:
        ValueError: if there are not as many prompt ids as completions or fewer than 2 resamples, and as
            bae.evaluation.metrics does.
    """
    return _estimates(pairs, resamples, seed)


def paired_bootstrap(first: Pairs, second: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Difference]:
    """Compare two methods in resamples that draw the same prompts for both.

    Args:
        first, second: the completions of each method, on the same prompts.
        resamples: R, 2 or more.
        seed: of the draws.

    Returns:
        {metric: second method minus first method}.

    Raises:
        ValueError: if the methods were not evaluated on the same prompts, and as `clustered_bootstrap` does.
    """
    prompts = _common_prompts(first, second)
    before, after = (all_metrics(pairs.confidence, pairs.correct) for pairs in (first, second))
    draws = _resampled([first, second], prompts, resamples, seed)
    return {name: difference(after[name] - before[name], draws[1][name] - draws[0][name]) for name in before}


def _common_prompts(first: Pairs, second: Pairs) -> list[Hashable]:
    """Return the prompts of both methods, in the order of the first. Raises ValueError if they differ."""
    ours, theirs = (dict.fromkeys(_ids(pairs)) for pairs in (first, second))
    if ours.keys() != theirs.keys():
        a, b = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        raise ValueError(
            f"the methods were evaluated on different prompts: {len(a)} in the first alone, {len(b)} in the second "
            f"alone, such as {min(map(str, a or b))}"
        )
    return list(ours)


def _estimates(pairs: Pairs, resamples: int, seed: int) -> dict[str, Estimate]:
    """Estimate each metric, and its standard error from resampled prompts."""
    values = all_metrics(pairs.confidence, pairs.correct)
    (draws,) = _resampled([pairs], list(dict.fromkeys(_ids(pairs))), resamples, seed)
    return {name: Estimate(value.item(), _sem(value, draws[name])) for name, value in values.items()}


def _resampled(methods: list[Pairs], prompts: list[Hashable], resamples: int, seed: int) -> list[dict[str, Tensor]]:
    """Return for each method {metric: (R,)}, the metric in each of R resamples; all methods have the same resamples."""
    if resamples < 2:
        raise ValueError(f"expected 2 resamples or more, got {resamples}")
    generator = torch.Generator().manual_seed(seed)
    place = {prompt: i for i, prompt in enumerate(prompts)}
    clusters = [torch.tensor([place[prompt] for prompt in _ids(pairs)], dtype=torch.long) for pairs in methods]
    rows = max(1, _CHUNK // max(1, *map(len, clusters)))
    chunks: list[list[dict[str, Tensor]]] = [[] for _ in methods]
    with one_thread():
        for start in range(0, resamples, rows):
            counts = draw_counts(min(rows, resamples - start), len(prompts), generator)
            for pairs, cluster, chunk in zip(methods, clusters, chunks, strict=True):
                weights = counts[:, cluster].to(pairs.confidence.device)
                chunk.append(all_metrics(pairs.confidence, pairs.correct, weights))
    return [{name: torch.cat([part[name] for part in chunk]).cpu() for name in chunk[0]} for chunk in chunks]


def draw_counts(rows: int, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw resamples of clusters, each with replacement and with as many draws as there are clusters.

    Args:
        rows: the number of resamples.
        clusters: the number of clusters.
        generator: of the draws.

    Returns:
        (rows, clusters) float64: how often each cluster was drawn.
    """
    counts = torch.zeros(rows, clusters, dtype=torch.double)
    if not clusters:
        return counts
    drawn = torch.randint(clusters, (rows, clusters), generator=generator)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _sem(value: Tensor, draws: Tensor) -> float:
    """Return the standard deviation of the resamples that have a value, or NaN if there are fewer than two."""
    defined = draws[~draws.isnan()]
    return torch.nan if value.isnan() or len(defined) < 2 else defined.std().item()


def difference(value: Tensor, draws: Tensor) -> Difference:
    """Describe a difference by its value and its resamples.

    Args:
        value: a scalar.
        draws: (R,), the difference in each resample, NaN where it has no value.
    """
    defined = draws[~draws.isnan()]
    if value.isnan() or len(defined) < 2:
        return Difference(value.item(), *[torch.nan] * 4)
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    low, high = defined.quantile(torch.tensor([0.025, 0.975], dtype=defined.dtype)).tolist()
    return Difference(value.item(), _sem(value, draws), min(1.0, 2 * (1 + tail) / (1 + len(defined))), low, high)


def _ids(pairs: Pairs) -> Sequence[Hashable]:
    """Return the prompt ids as a sequence. Raises ValueError if there are not as many as completions."""
    ids = pairs.prompt.tolist() if isinstance(pairs.prompt, Tensor) else pairs.prompt
    if len(ids) != len(pairs.correct):
        raise ValueError(f"expected a prompt id for each of {len(pairs.correct)} completions, got {len(ids)}")
    return ids


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in the `with` body.

    The sums are small: on busy cores, threads that wait for one another took ten times as long as one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
