"""Standard errors of the metrics of bae.evaluation.metrics by bootstrap, and the difference between two methods.

A resample is a weight for each pair: how often its cluster was drawn. All metrics of a chunk of resamples are then a
few sums (bae.evaluation.metrics takes such weights), so 1,000 resamples of 8,000 pairs take a fraction of a second.

The same seed gives the same draws. A resample in which a metric has no value (AUROC, if it drew outcomes of one kind)
is left out of that metric's standard error and interval. ECE is larger in a resample than in the sample, on average,
so read its standard error rather than where its resamples lie.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bae.evaluation.metrics import all_metrics

RESAMPLES = 1000
"""As in the paper, Evaluation."""

_CHUNK = 2**19  # weights at once, 4 MiB: in the cache, and memory does not grow with the number of resamples


class Pairs(NamedTuple):
    """A method's N completions: confidence (N,), NaN unreadable; correct (N,); prompt, N ids (a list or a tensor)."""

    confidence: Tensor
    correct: Tensor
    prompt: Sequence[Hashable] | Tensor


class Estimate(NamedTuple):
    value: float
    sem: float


class Difference(NamedTuple):
    """value: the second method's metric minus the first's. low, high: 95 % percentile interval.

    p: two-sided; twice the share of resamples on the rarer side of 0, which counts itself: p = 2 (1 + k) / (1 + R),
    at most 1. It is below 0.05 about where the interval leaves 0 out.
    """

    value: float
    sem: float
    p: float
    low: float
    high: float


def iid_bootstrap(
    confidence: Tensor, correct: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """The paper's standard errors, by metric: of resampled (q, c) pairs; of accuracy, σ/√n.

    Takes completions of one prompt as independent, which they are not: see `clustered_bootstrap`. Raises ValueError
    as bae.evaluation.metrics does.
    """
    estimates = _estimates(Pairs(confidence, correct, range(len(correct))), resamples, seed)
    mean, n = estimates["accuracy"].value, len(correct)
    return estimates | {"accuracy": Estimate(mean, (mean * (1 - mean) / n) ** 0.5 if n else torch.nan)}


def clustered_bootstrap(pairs: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Standard errors by metric, of resampled prompts, each with all its completions, however many it has.

    Raises ValueError if there are not as many prompt ids as completions, and as bae.evaluation.metrics does.
    """
    return _estimates(pairs, resamples, seed)


def paired_bootstrap(first: Pairs, second: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Difference]:
    """Second minus first, by metric, over resamples that draw the same prompts for both.

    Raises ValueError if the methods were not evaluated on the same prompts, and as `clustered_bootstrap` does.
    """
    ours, theirs = (dict.fromkeys(_ids(pairs)) for pairs in (first, second))
    if ours.keys() != theirs.keys():
        a, b = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        raise ValueError(
            f"the methods were evaluated on different prompts: {len(a)} in the first alone, {len(b)} in the second "
            f"alone, such as {min(map(str, a or b))}"
        )
    before, after = (all_metrics(pairs.confidence, pairs.correct) for pairs in (first, second))
    draws = _resampled([first, second], list(ours), resamples, seed)
    return {name: difference(after[name] - before[name], draws[1][name] - draws[0][name]) for name in before}


def _estimates(pairs: Pairs, resamples: int, seed: int) -> dict[str, Estimate]:
    values = all_metrics(pairs.confidence, pairs.correct)
    (draws,) = _resampled([pairs], list(dict.fromkeys(_ids(pairs))), resamples, seed)
    return {name: Estimate(value.item(), _sem(value, draws[name])) for name, value in values.items()}


def _resampled(methods: list[Pairs], prompts: list[Hashable], resamples: int, seed: int) -> list[dict[str, Tensor]]:
    """For each method, every metric in each of R resamples of the prompts, (R,); the resamples are the same."""
    if resamples < 2:
        raise ValueError(f"want 2 resamples or more, got {resamples}")
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
    """How often each cluster is drawn in as many draws as there are clusters, with replacement; (rows, clusters)."""
    counts = torch.zeros(rows, clusters, dtype=torch.double)
    if not clusters:
        return counts
    drawn = torch.randint(clusters, (rows, clusters), generator=generator)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _sem(value: Tensor, draws: Tensor) -> float:
    defined = draws[~draws.isnan()]
    return torch.nan if value.isnan() or len(defined) < 2 else defined.std().item()


def difference(value: Tensor, draws: Tensor) -> Difference:
    defined = draws[~draws.isnan()]
    if value.isnan() or len(defined) < 2:
        return Difference(value.item(), *[torch.nan] * 4)
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    low, high = defined.quantile(torch.tensor([0.025, 0.975], dtype=defined.dtype)).tolist()
    return Difference(value.item(), _sem(value, draws), min(1.0, 2 * (1 + tail) / (1 + len(defined))), low, high)


def _ids(pairs: Pairs) -> Sequence[Hashable]:
    ids = pairs.prompt.tolist() if isinstance(pairs.prompt, Tensor) else pairs.prompt
    if len(ids) != len(pairs.correct):
        raise ValueError(f"want a prompt id for each of {len(pairs.correct)} completions, got {len(ids)}")
    return ids


@contextmanager
def one_thread() -> Iterator[None]:
    """The sums are small: on busy cores, threads that wait for one another took ten times as long as one alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
