"""Compare a baseline's advantages with those of Monte-Carlo rollouts (paper, Fig. 1). Pure torch.

Each completion's reward r has a true value V = E[r | its prefix]. M fresh rollouts from that prefix give an unbiased
estimate V̂ of it. The variance of V̂, s²/M, is known, and V̂ is independent of r and of the baseline. (A baseline that
averages rollouts itself needs other rollouts than these.) So the noise of V̂ can be taken out: on average, M matters to
`observed_rmse` alone.

All results are functions of sums over the completions of a prompt. A resample of the prompts is a weight for each
prompt, and all resamples are one matrix product. The same seed gives the same draws, whatever the baseline and the set
of completions. A result that has no value is NaN, without a warning. A resample without a value is left out of the
interval, as in bae.evaluation.bootstrap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bae.evaluation.bootstrap import RESAMPLES, one_thread
from bae.fidelity.intervals import Interval, interval, positive, prompt_weights, spread_of

SIZES = ((1, 1), (2, 3), (4, 7), (8, 15), (16, None))
"""The bins of stratum size, first and last: self-inclusion takes 1/n of the signal."""

_LEAST = 1e-12  # a mean square; rewards are of order 1, so anything below is rounding


@dataclass(frozen=True)
class Agreement:
    """Hold how well one baseline b agrees with Monte Carlo on one set of completions.

    The proxy advantage is r - b. The Monte-Carlo advantage is r - V̂.

    Attributes:
        completions, prompts: how many there are.
        rmse: √E(V - b)², without the noise of V̂. It is 0 if the noise explains more than all of it.
        observed_rmse: √mean(V̂ - b)², with the noise, as in the paper.
        bias: mean(b - V̂).
        slope, correlation: of the proxy advantage on the true one, r - V. A baseline that is independent of the
            completion has slope 1. One that includes it among n has slope 1 - 1/n.
        rmse_ratio: rmse divided by that of the reference. It is NaN without a reference, or if the reference's is 0.
        p: two-sided, of rmse differing from the reference's. It compares the mean squares, whose noise is the same and
            cancels.
    """

    completions: int
    prompts: int
    rmse: Interval
    observed_rmse: Interval
    bias: Interval
    slope: Interval
    correlation: Interval
    rmse_ratio: Interval
    p: float


class _Terms(NamedTuple):
    """Hold one number of each completion, (N,) each, or their sums, one for each resample, (1 + R,) each.

    The advantages have mean 0.
    """

    completions: Tensor  # 1
    error: Tensor  # V̂ - b
    squared_error: Tensor
    noise: Tensor  # the variance of V̂
    proxy: Tensor  # r - b
    true: Tensor  # r - V̂
    squared_proxy: Tensor
    squared_true: Tensor
    product: Tensor  # of proxy and true


class _Statistics(NamedTuple):
    """Hold the statistics of the sample and its R resamples, (1 + R,) each. See Agreement; mse: the square of rmse."""

    mse: Tensor
    rmse: Tensor
    observed_rmse: Tensor
    bias: Tensor
    slope: Tensor
    correlation: Tensor


def compare_to_monte_carlo(
    reward: Tensor,
    baselines: Mapping[str, Tensor],
    rollouts: Tensor,
    prompt: Tensor,
    reference: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    where: Tensor | None = None,
) -> dict[str, Agreement]:
    """Measure each baseline's agreement with Monte Carlo, over resamples that draw the same prompts for all baselines.

    Args:
        reward: (N,).
        baselines: (N,) each, by name.
        rollouts: (N, M), rewards of the block sampled again from each prefix.
        prompt: (N,) long.
        reference: the baseline whose rmse the others' is compared with.
        resamples: R, 2 or more.
        seed: of the draws.
        where: (N,) bool, the set. Prompts are drawn from all those given, so the number of completions in the set
            varies, too. None for all completions.

    Returns:
        {baseline: agreement}.

    Raises:
        ValueError: if shapes differ, if M < 2 or R < 2, for an unknown reference, and for a number in the set that is
            not finite.
    """
    where = torch.ones_like(reward, dtype=torch.bool) if where is None else where.bool()
    vectors = {"reward": reward, "prompt": prompt, "where": where}
    _check(rollouts, vectors | {f"baseline {name}": b for name, b in baselines.items()}, where)
    if reference is not None and reference not in baselines:
        raise ValueError(f"reference {reference}: not among the baselines {', '.join(baselines)}")
    prompts, cluster = prompt.unique(return_inverse=True)
    r, cluster = reward[where].double(), cluster[where]
    value, noise = _estimate(rollouts[where].double())
    weights = prompt_weights(len(prompts), resamples, seed).to(r.device)
    draws = {}
    with one_thread():
        for name, b in baselines.items():
            terms = _terms(r, b[where].double(), value, noise)
            draws[name] = _statistics(_sums(terms, cluster, weights))
    members = len(cluster.unique())
    other = None if reference is None else draws[reference]
    return {name: _agreement(mine, other, len(r), members) for name, mine in draws.items()}


def sets(outcome: Tensor, stratum_size: Tensor, names: Mapping[float, str] | None = None) -> dict[str, Tensor]:
    """Return the sets of completions to report: all, those of each outcome, and those of each size of stratum.

    Args:
        outcome: (N,), of the prefix.
        stratum_size: (N,), completions of the same prompt and outcome.
        names: what outcomes are called, instead of their number.

    Returns:
        {set: (N,) bool}. The sets are called "all", "outcome=1" (or the outcome's name) and "size=2-3". Sets that
        contain nothing are left out.
    """
    chosen = {"all": torch.ones_like(outcome, dtype=torch.bool)}
    for value in outcome.unique().tolist():
        chosen[(names or {}).get(value, f"outcome={value:.15g}")] = outcome == value
    for low, high in SIZES:
        label = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        inside = (stratum_size >= low) & (stratum_size <= (high or torch.inf))
        if inside.any():
            chosen[f"size={label}"] = inside
    return chosen


def _estimate(rollouts: Tensor) -> tuple[Tensor, Tensor]:
    """Return V̂ and its variance s²/M, (N,) each, from (N, M) rollouts."""
    value, m = rollouts.mean(1), rollouts.shape[1]
    return value, (rollouts - value[:, None]).square().sum(1) / (m * (m - 1))  # var would warn of an empty set


def _terms(reward: Tensor, baseline: Tensor, value: Tensor, noise: Tensor) -> _Terms:
    """Return the terms of completions; (N,) each."""
    error, proxy, true = value - baseline, reward - baseline, reward - value
    proxy, true = proxy - proxy.mean(), true - true.mean()  # as good, and no digits cancel in a variance
    return _Terms(
        completions=torch.ones_like(reward),
        error=error,
        squared_error=error**2,
        noise=noise,
        proxy=proxy,
        true=true,
        squared_proxy=proxy**2,
        squared_true=true**2,
        product=proxy * true,
    )


def _sums(terms: _Terms, cluster: Tensor, weights: Tensor) -> _Terms:
    """Sum the terms in each resample; cluster: (N,) long, the prompt. weights: (1 + R, P)."""
    of_prompt = weights.new_zeros(weights.shape[1], len(terms)).index_add_(0, cluster, torch.stack(terms, 1))
    return _Terms(*(weights @ of_prompt).unbind(-1))


def _statistics(sums: _Terms) -> _Statistics:
    """Return the statistics, on the CPU, of (1 + R,) sums."""
    n = sums.completions
    mse, noise = (sums.squared_error - sums.noise) / n, sums.noise / n
    var_proxy = _covariance(sums.squared_proxy, sums.proxy, sums.proxy, n)
    var_true = _covariance(sums.squared_true, sums.true, sums.true, n)
    cov = _covariance(sums.product, sums.proxy, sums.true, n)
    var_proxy, var_true = positive(var_proxy, _LEAST), positive(var_true - noise, _LEAST)
    found = _Statistics(
        mse=mse,
        rmse=mse.clamp(min=0).sqrt(),
        observed_rmse=(sums.squared_error / n).sqrt(),
        bias=-sums.error / n,
        slope=cov / var_true,
        correlation=cov / (var_proxy * var_true).sqrt(),
    )
    return _Statistics(*(draws.cpu() for draws in found))


def _covariance(product: Tensor, x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    """Return the covariance from sums over n completions: of x y, of x and of y."""
    return (product - x * y / n) / (n - 1)


def _agreement(draws: _Statistics, reference: _Statistics | None, completions: int, prompts: int) -> Agreement:
    """Describe the draws by their values and intervals."""
    apart = ratio = torch.full_like(draws.mse, torch.nan)
    if reference is not None:
        apart, ratio = draws.mse - reference.mse, draws.rmse / positive(reference.mse, _LEAST).sqrt()
    return Agreement(
        completions=completions,
        prompts=prompts,
        rmse=interval(draws.rmse, prompts),
        observed_rmse=interval(draws.observed_rmse, prompts),
        bias=interval(draws.bias, prompts),
        slope=interval(draws.slope, prompts),
        correlation=interval(draws.correlation, prompts),
        rmse_ratio=interval(ratio, prompts),
        p=spread_of(apart, prompts).p,
    )


def _check(rollouts: Tensor, vectors: Mapping[str, Tensor], where: Tensor) -> None:
    """Refuse shapes that differ, too few rollouts, and numbers in the set that are not finite. Raises ValueError."""
    for name, vector in vectors.items():
        if vector.shape != rollouts.shape[:1]:
            raise ValueError(f"{name}: want one for each of {len(rollouts)} completions, got {tuple(vector.shape)}")
    if rollouts.ndim != 2 or rollouts.shape[1] < 2:
        raise ValueError(f"rollouts: want (N, M) with 2 or more of each completion, got {tuple(rollouts.shape)}")
    for name, numbers in {**vectors, "rollouts": rollouts}.items():
        if not numbers[where].isfinite().all():
            raise ValueError(f"{name}: not finite somewhere in the set")
