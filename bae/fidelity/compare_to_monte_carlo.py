"""How near a baseline's advantages are to those of Monte-Carlo rollouts (paper, Fig. 1). Pure torch.

Each completion's reward r has a true value V = E[r | its prefix], of which M fresh rollouts from that prefix give an
unbiased estimate V̂, of known variance s²/M and independent of r and of the baseline: one that averages rollouts itself
needs others than these. So the noise of V̂ can be taken out: on average, M matters to `observed_rmse` alone.

All are functions of sums over a prompt's completions. A resample of the prompts is a weight for each, and all resamples
are one matrix product. The same seed gives the same draws, whatever the baseline and the set of completions. What has
no value is NaN, silently; a resample without a value is left out of the interval, as in bae.evaluation.bootstrap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bae.evaluation.bootstrap import RESAMPLES, Difference, difference, draw_counts, one_thread

SIZES = ((1, 1), (2, 3), (4, 7), (8, 15), (16, None))
"""Bins of stratum size, first and last: self-inclusion takes 1/n of the signal."""

_LEAST = 1e-12  # a mean square; rewards are of order 1, so anything below is rounding


class Interval(NamedTuple):
    """low, high: 95 %, percentiles over resampled prompts; NaN if fewer than two prompts have a completion."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """One baseline b on one set of completions. Proxy advantage: r - b. Monte-Carlo advantage: r - V̂.

    completions, prompts: how many.
    rmse: √E(V - b)², without the noise of V̂; 0 where the noise explains more than all of it.
    observed_rmse: √mean(V̂ - b)², with it, as the paper has it.
    bias: mean(b - V̂).
    slope, correlation: of the proxy advantage on the true one, r - V. A baseline that is independent of the completion
        has slope 1; one that includes it among n, 1 - 1/n.
    rmse_ratio: rmse over that of the reference; NaN without a reference, or where its rmse is 0.
    p: two-sided, of rmse differing from the reference's; of the mean squares, whose noise is the same and cancels.
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


class GradientAgreement(NamedTuple):
    """See `gradient_agreement`."""

    cosine: Interval
    mse: Interval
    noise_share: Interval


def agreement(
    reward: Tensor,
    baselines: Mapping[str, Tensor],
    rollouts: Tensor,
    prompt: Tensor,
    reference: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    where: Tensor | None = None,
) -> dict[str, Agreement]:
    """Each baseline's agreement with Monte Carlo, by name, over resamples that draw the same prompts for all.

    reward: (N,). baselines: (N,) each. rollouts: (N, M), rewards of the block sampled again from each prefix.
    prompt: (N,) long. reference: the baseline whose rmse the others' is compared with. where: (N,) bool, the set;
    prompts are drawn from all those given, so that how many completions the set has varies, too.
    Raises ValueError if shapes differ, if M < 2, for an unknown reference, and for a number in the set not finite.
    """
    where = torch.ones_like(reward, dtype=torch.bool) if where is None else where.bool()
    vectors = {"reward": reward, "prompt": prompt, "where": where}
    _check(rollouts, vectors | {f"baseline {name}": b for name, b in baselines.items()}, where)
    if reference is not None and reference not in baselines:
        raise ValueError(f"reference {reference}: not among the baselines {', '.join(baselines)}")
    prompts, cluster = prompt.unique(return_inverse=True)
    r, mc, cluster = reward[where].double(), rollouts[where].double(), cluster[where]
    value, m = mc.mean(1), mc.shape[1]
    noise = (mc - value[:, None]).square().sum(1) / (m * (m - 1))  # s²/M; var would warn of an empty set
    weights = _weights(len(prompts), resamples, seed).to(r.device)
    draws = {}
    with one_thread():
        for name, values in baselines.items():
            b = values[where].double()
            error, proxy, true = value - b, r - b, r - value
            proxy, true = proxy - proxy.mean(), true - true.mean()  # as good, and no digits cancel in a variance
            terms = [torch.ones_like(r), error, error**2, noise, proxy, true, proxy**2, true**2, proxy * true]
            sums = r.new_zeros(len(prompts), len(terms)).index_add_(0, cluster, torch.stack(terms, 1))
            draws[name] = {key: draw.cpu() for key, draw in _statistics(weights @ sums).items()}
    members = len(cluster.unique())
    other = None if reference is None else draws[reference]
    return {name: _agreement(mine, other, len(r), members) for name, mine in draws.items()}


def sets(outcome: Tensor, stratum_size: Tensor, names: Mapping[float, str] | None = None) -> dict[str, Tensor]:
    """The sets to report, (N,) bool by name: "all", each outcome ("outcome=1", or its name), each size ("size=2-3").

    outcome: (N,). stratum_size: (N,), completions of the same prompt and outcome. What nothing is in is left out.
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


def gradient_agreement(
    proxy: Tensor, half_a: Tensor, half_b: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> GradientAgreement:
    """A baseline's gradient g against the true one, of which a and b are independent unbiased estimates; (P, S) each.

    A row is a prompt's, of S parameters or a sketch of them. The noise of a and b is taken out: a·b estimates |true|².
    cosine: of the batch gradient, the sum over prompts: g·(a + b)/2 / (|g| √(a·b)). May exceed 1 by noise.
    mse: of a prompt's gradient, relative: Σ (g - a)·(g - b) / Σ a·b.
    noise_share: of the variance of a batch's gradient, what the sampled block adds, and a baseline can take away; the
        rest is that of prompts and prefixes, whose true gradients differ. So no baseline saves more than this share of
        the completions.
    The intervals of cosine and share are ± 1.96 jackknife errors, for the cosine 1.5 to 1.8 times too large in
    simulations. Resamples would not do: a prompt drawn twice adds its noise twice in one direction.
    Raises ValueError if shapes differ.
    """
    if not (proxy.ndim == 2 and proxy.shape == half_a.shape == half_b.shape):
        raise ValueError(f"want three of (P, S): proxy {proxy.shape}, half_a {half_a.shape}, half_b {half_b.shape}")
    g, a, b = (x.double() for x in (proxy, half_a, half_b))
    prompts = len(g)
    kept = torch.cat([g.new_ones(1, prompts), 1 - torch.eye(prompts).to(g)])  # all prompts; all but one

    def product(x: Tensor, y: Tensor) -> Tensor:  # of the sums over the kept rows; by pairs of rows, as S may be large
        return ((kept @ (x @ y.T)) * kept).sum(1)

    with one_thread():
        weights = _weights(prompts, resamples, seed).to(g)
        true, error = (a * b).sum(1), ((g - a) * (g - b)).sum(1)  # of each prompt, squared
        mse = weights @ error / _positive(weights @ true)
        both = product(a, b)
        cosine = product(g, (a + b) / 2) / (_positive(product(g, g)) * _positive(both)).sqrt()
        n, true, error = kept.sum(1), kept @ true, kept @ error
        prefixes = true / n - (both - true) / _positive(n * (n - 1))  # mean square less the squared mean
        share = error / n / _positive(error / n + prefixes)
    return GradientAgreement(_jackknife(cosine), _interval(mse.cpu(), prompts), _jackknife(share))


def _jackknife(values: Tensor) -> Interval:
    """values: (1 + P,), of all prompts and without each."""
    value, without = values[0].item(), values[1:]
    prompts = len(without)
    wide = 1.96 * ((prompts - 1) * without.var(correction=0)).sqrt().item() if prompts > 1 else torch.nan
    return Interval(value, value - wide, value + wide)


def _weights(prompts: int, resamples: int, seed: int) -> Tensor:
    """(1 + R, P): how often each prompt counts, once in the sample itself, which is the first row."""
    if resamples < 2:
        raise ValueError(f"want 2 resamples or more, got {resamples}")
    drawn = draw_counts(resamples, prompts, torch.Generator().manual_seed(seed))
    return torch.cat([torch.ones(1, prompts, dtype=drawn.dtype), drawn])


def _statistics(sums: Tensor) -> dict[str, Tensor]:
    """(R, 9) sums of the terms in `agreement` -> (R,) each."""
    n, error, square, noise, x, y, xx, yy, xy = sums.unbind(-1)
    mse, noise = (square - noise) / n, noise / n
    var_x, var_y, cov = ((p - q / n) / (n - 1) for p, q in ((xx, x * x), (yy, y * y), (xy, x * y)))
    var_x, var_y = _positive(var_x, _LEAST), _positive(var_y - noise, _LEAST)
    return {
        "mse": mse,
        "rmse": mse.clamp(min=0).sqrt(),
        "observed_rmse": (square / n).sqrt(),
        "bias": -error / n,
        "slope": cov / var_y,
        "correlation": cov / (var_x * var_y).sqrt(),
    }


def _agreement(
    draws: dict[str, Tensor], reference: dict[str, Tensor] | None, completions: int, prompts: int
) -> Agreement:
    apart = ratio = torch.full_like(draws["mse"], torch.nan)
    if reference is not None:
        apart, ratio = draws["mse"] - reference["mse"], draws["rmse"] / _positive(reference["mse"], _LEAST).sqrt()
    fields = {"rmse_ratio": ratio} | {name: draw for name, draw in draws.items() if name != "mse"}
    intervals = {name: _interval(draw, prompts) for name, draw in fields.items()}
    return Agreement(completions, prompts, **intervals, p=_spread(apart, prompts).p)


def _spread(draws: Tensor, prompts: int) -> Difference:
    """Of (1 + R,), the sample and its resamples. Those of one prompt are all alike, and say nothing of others."""
    return difference(draws[0], draws[1:] if prompts > 1 else draws[:0])


def _interval(draws: Tensor, prompts: int) -> Interval:
    spread = _spread(draws, prompts)
    return Interval(spread.value, spread.low, spread.high)


def _positive(square: Tensor, least: float = 0.0) -> Tensor:
    return torch.where(square > least, square, torch.nan)


def _check(rollouts: Tensor, vectors: Mapping[str, Tensor], where: Tensor) -> None:
    for name, vector in vectors.items():
        if vector.shape != rollouts.shape[:1]:
            raise ValueError(f"{name}: want one for each of {len(rollouts)} completions, got {tuple(vector.shape)}")
    if rollouts.ndim != 2 or rollouts.shape[1] < 2:
        raise ValueError(f"rollouts: want (N, M) with 2 or more of each completion, got {tuple(rollouts.shape)}")
    for name, numbers in {**vectors, "rollouts": rollouts}.items():
        if not numbers[where].isfinite().all():
            raise ValueError(f"{name}: not finite somewhere in the set")
