"""Measure how well stated confidences match what happened, by pure functions and a torchmetrics class over them.

Every function takes N pairs:

    confidence  (N,) in [0, 1], of any float type, NaN where it could not be read
    correct     (N,), true or 1 where the answer is right
    weights     how often each pair counts: (N,), or (R, N) for R resamples at once (bae.evaluation.bootstrap);
                None counts each pair once

Confidences that could not be read count only in `coverage` and `accuracy`. Results are float64, and have the shape of
`weights` without its last dimension. A metric without a value is NaN, and there is no warning: any metric of an empty
set, and AUROC if all completions are right or all are wrong. Every function raises ValueError if shapes differ or a
confidence is outside [0, 1].
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

ECE_BINS = 11
"""The bins [0, .1) … [.9, 1), [1, 1.1): a stated 1.0 has a bin of its own (paper, section Evaluation)."""

CONFIDENT_HALF = 0.5
"""The coverage at which `accuracy_at_half` looks: the more confident half of the completions."""

WAVES = 200
"""The cosines of `smooth_ece`."""

NARROWEST = 0.005
"""The smallest width of `smooth_ece`. There the last of its cosines has a weight below .01."""

HALVINGS = 16
"""The steps in which `smooth_ece` finds its width, to 1e-5."""

NLL_CLIP = 1e-3
"""The log score clips confidences to this distance from 0 and 1. A wrong certainty costs 6.9 nats, not infinity."""


def as_double(confidence: Tensor) -> Tensor:
    """Return the float64 that is nearest to the decimal that was written. Order and ties stay as they are.

    float32 tells all decimals of six places apart. So a float32 that is the nearest one to such a decimal stands for
    the decimal, and any other float32 stands for itself. For float16 and bfloat16 it is 3 and 2 places. float64 and
    integer types are only converted.
    """
    wide = confidence.double()
    if not confidence.is_floating_point() or confidence.dtype == torch.double:
        return wide
    places = round(-math.log10(torch.finfo(confidence.dtype).resolution))
    decimal = wide.round(decimals=places)
    return torch.where(decimal.to(confidence.dtype) == confidence, decimal, wide)


def tenth(confidence: Tensor) -> Tensor:
    """Return the bin of each confidence; (N,) long, k for [k/10, (k+1)/10), and 10 for 1.0 alone.

    It is exact without a tolerance. Rounding to the nearest float keeps order, so a decimal is at or above k/10 if and
    only if its float is at or above the float of k/10. Only a decimal within 1e-17 below k/10 could break this.
    """
    # arange(…) / 10 would be wrong: on CUDA it multiplies by the float of 1/10, which makes 3/10 too large.
    edges = torch.tensor([k / 10 for k in range(1, ECE_BINS)], dtype=torch.double, device=confidence.device)
    return torch.bucketize(as_double(confidence), edges, right=True)


def accuracy(correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return pass@1, the share of correct completions, whether or not their confidence could be read."""
    return _mean(correct.double(), _ones_unless(weights, correct))


def ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None, bins: int = ECE_BINS) -> Tensor:
    """Return the expected calibration error: the sum over bins B of |B|/n · |accuracy(B) − mean confidence(B)|.

    Args:
        confidence, correct, weights: see the module.
        bins: 11 are the paper's bins. 10 puts 1.0 into [.9, 1], as is usual elsewhere.
    """
    q, c, w = _readable(confidence, correct, weights)
    gap = _sums(w * (q - c), tenth(q).clamp(max=bins - 1), bins)
    return gap.abs().sum(-1) / w.sum(-1)


def ece_over(confidence: Tensor, correct: Tensor, weights: Tensor | None = None, bins: int = ECE_BINS) -> Tensor:
    """Return the part of `ece` that is overconfidence: the sum over bins of |B|/n · max(0, mean confidence − accuracy).

    The rest of `ece` is underconfidence. Two times this minus `ece` is the mean confidence minus the accuracy.
    """
    q, c, w = _readable(confidence, correct, weights)
    gap = _sums(w * (q - c), tenth(q).clamp(max=bins - 1), bins)
    return gap.clamp(min=0).sum(-1) / w.sum(-1)


def ece_adaptive(confidence: Tensor, correct: Tensor, weights: Tensor | None = None, bins: int = 10) -> Tensor:
    """Return the ECE in bins of equal mass (Nguyen and O'Connor, 2015).

    Pairs with the same confidence always share a bin. It is bin ⌊bins · m⌋, where m is their mid-rank as a share of all
    pairs. Without ties, each bin has n/bins pairs. With ties, bins may be uneven or empty.

    Args:
        confidence, correct, weights: see the module.
        bins: the number of bins.
    """
    q, misses, hits = _by_confidence(confidence, correct, weights)
    count = misses + hits
    total = count.sum(-1, keepdim=True)
    middle = count.cumsum(-1) - count / 2
    bin_of = (bins * middle / total).nan_to_num().long().clamp(max=bins - 1)  # NaN: all weights of a resample are 0
    gap = torch.zeros(*count.shape[:-1], bins, dtype=torch.double, device=q.device)
    gap.scatter_add_(-1, bin_of, q * count - hits)
    return gap.abs().sum(-1) / total.squeeze(-1)


def smooth_ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the smooth calibration error (smECE; Błasiok and Nakkiran, 2023), which has no bins.

    It is the integral over t in [0, 1] of |Σ (c − q) K(q, t)| / n, where K is a Gaussian that is reflected at 0 and 1.
    Its width is the one that equals the integral: a small error is looked at closely, a large one from afar.

    In a series of cosines such a kernel is a factor exp(−(π k σ)² / 2) of the k-th coefficient. `WAVES` of them serve
    widths from `NARROWEST` on, so no width is below that, and errors below it look a little smaller than they are.
    """
    q, c, w = _readable(confidence, correct, weights)
    waves = torch.pi * torch.arange(WAVES, dtype=torch.double, device=q.device)
    middles = (torch.arange(2 * WAVES, dtype=torch.double, device=q.device) + 0.5) / (2 * WAVES)
    coefficients = (w * (c - q)) @ (q.unsqueeze(1) * waves).cos() / w.sum(-1, keepdim=True)
    cosines = 2 * (waves.unsqueeze(1) * middles).cos()
    cosines[0] = 1.0

    def error(width: Tensor) -> Tensor:
        damped = coefficients * (-((waves * width.clamp(min=NARROWEST).unsqueeze(-1)) ** 2) / 2).exp()
        return (damped @ cosines).abs().mean(-1)

    low, high = torch.zeros_like(coefficients[..., 0]), torch.ones_like(coefficients[..., 0])
    for _ in range(HALVINGS):  # the error falls as the width grows
        middle = (low + high) / 2
        is_wider = error(middle) > middle
        low, high = torch.where(is_wider, middle, low), torch.where(is_wider, high, middle)
    return error((low + high) / 2)


def brier_score(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the Brier score, the mean of (q − c)² (Brier, 1950)."""
    q, c, w = _readable(confidence, correct, weights)
    return _mean((q - c) ** 2, w)


def brier_parts(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Split the Brier score: Brier = reliability − resolution + uncertainty (Murphy, 1973).

    Pairs are grouped by exactly the same confidence, not by bins, so the identity is exact. Let n_d pairs have the
    confidence q_d, a share p_d of them correct, and let p be the share of all pairs. Small groups make reliability and
    resolution too large, both alike.

    Returns:
        reliability: Σ n_d (q_d − p_d)² / n; low is good.
        resolution: Σ n_d (p_d − p)² / n; high is good.
        uncertainty: p (1 − p).
    """
    q, misses, hits = _by_confidence(confidence, correct, weights)
    count = misses + hits
    base = hits.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    rate = torch.where(count > 0, hits / count, base)  # a resample may have no pair of a group
    parts = _mean((q - rate) ** 2, count), _mean((rate - base) ** 2, count)
    return *parts, (base * (1 - base)).squeeze(-1)


def nll(confidence: Tensor, correct: Tensor, weights: Tensor | None = None, clip: float = NLL_CLIP) -> Tensor:
    """Return the log score: the mean −log of the probability given to what happened, in nats.

    Args:
        confidence, correct, weights: see the module.
        clip: confidences are clipped to [clip, 1 − clip].
    """
    q, c, w = _readable(confidence, correct, weights)
    q = q.clamp(clip, 1 - clip)
    return _mean(-torch.where(c > 0, q, 1 - q).log(), w)


def auroc(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the probability that a correct completion is more confident than a wrong one; a tie counts as one half.

    This is the statistic of Mann and Whitney.
    """
    _, misses, hits = _by_confidence(confidence, correct, weights)
    below = misses.cumsum(-1) - misses
    return (hits * (below + misses / 2)).sum(-1) / (hits.sum(-1) * misses.sum(-1))


def aurc(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the area under the risk–coverage curve (Geifman and El-Yaniv, 2017): low is good.

    It is the mean over k = 1 … n of the share of wrong completions among the k most confident ones. Completions with
    the same confidence are in random order, and the expectation over these orders is exact: after K more confident
    completions with E wrong ones, the j-th of m equal ones, of which a share r is wrong, has the risk
    (E + j r) / (K + j). The sum over j is m r + (E − K r) (H(K + m) − H(K)) with harmonic numbers H.
    """
    _, misses, hits = _by_confidence(confidence, correct, weights)
    misses, hits = misses.flip(-1), hits.flip(-1)  # the most confident first
    count = misses + hits
    before, wrong = count.cumsum(-1) - count, misses.cumsum(-1) - misses
    rate = torch.where(count > 0, misses / count, 0)  # a resample may have no pair of a group
    harmonic = torch.digamma(before + count + 1) - torch.digamma(before + 1)
    return (misses + (wrong - before * rate) * harmonic).sum(-1) / count.sum(-1)


def accuracy_at(
    confidence: Tensor, correct: Tensor, weights: Tensor | None = None, coverage: float = CONFIDENT_HALF
) -> Tensor:
    """Return the accuracy of the most confident completions, a share `coverage` of those with a readable confidence.

    Where the limit falls among completions with the same confidence, each of these counts in part, so it is the
    expectation over random orders of them.

    Args:
        confidence, correct, weights: see the module.
        coverage: above 0, at most 1.
    """
    _, misses, hits = _by_confidence(confidence, correct, weights)
    misses, hits = misses.flip(-1), hits.flip(-1)
    count = misses + hits
    taken = coverage * count.sum(-1, keepdim=True)
    part = ((taken - (count.cumsum(-1) - count)) / count).nan_to_num(0).clamp(0, 1)
    return (part * hits).sum(-1) / taken.squeeze(-1)


def calibration(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Compute all metrics of confidences by name.

    Returns:
        The metrics above except accuracy, and `confidence` (the mean confidence), `bias` (the mean confidence minus
        the accuracy of the same completions, positive for overconfidence) and `coverage` (the share of completions
        with a confidence that could be read).
    """
    every = _ones_unless(weights, confidence)
    q, c, w = _distinct_pairs(*_readable(confidence, correct, weights))
    reliability, resolution, uncertainty = brier_parts(q, c, w)
    return {
        "ece": ece(q, c, w),
        "ece_over": ece_over(q, c, w),
        "ece_10": ece(q, c, w, bins=10),
        "ece_adaptive": ece_adaptive(q, c, w),
        "smooth_ece": smooth_ece(q, c, w),
        "brier": brier_score(q, c, w),
        "reliability": reliability,
        "resolution": resolution,
        "uncertainty": uncertainty,
        "nll": nll(q, c, w),
        "auroc": auroc(q, c, w),
        "aurc": aurc(q, c, w),
        "accuracy_at_half": accuracy_at(q, c, w),
        "confidence": _mean(q, w),
        "bias": _mean(q - c, w),
        "coverage": w.sum(-1) / every.sum(-1),
    }


def all_metrics(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Compute `accuracy` and the metrics of `calibration` by name."""
    return {"accuracy": accuracy(correct, weights), **calibration(confidence, correct, weights)}


def reliability_table(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the data of a reliability diagram (paper, Fig. 4) in the paper's 11 bins.

    Returns:
        `count`, `confidence` (the mean) and `accuracy` of each bin, (…, 11) each. The means of an empty bin are NaN.
    """
    q, c, w = _readable(confidence, correct, weights)
    count, stated, hits = (_sums(x, tenth(q), ECE_BINS) for x in (w, w * q, w * c))
    return {"count": count, "confidence": stated / count, "accuracy": hits / count}


class Calibration(Metric):
    """Hold pairs over batches and ranks, and compute `all_metrics` of them, as a metric of torchmetrics.

    Args:
        options: of torchmetrics.Metric, such as `sync_on_compute`.
    """

    full_state_update = False
    is_differentiable = False
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the states. torchmetrics makes the empty states of a rank without updates with it."""
        return torch.double

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add N pairs; they are moved to the device of the metric. confidence, correct: (N,) each, see the module."""
        q, c = _checked(confidence, correct)
        self.confidence.append(q.to(self.device))
        self.correct.append(c.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Return {name: scalar} on the CPU, where sums have a fixed order, so that no device changes a value."""
        nothing = torch.zeros(0, dtype=self.dtype)
        q, c = (dim_zero_cat(state).cpu() if len(state) else nothing for state in (self.confidence, self.correct))
        return all_metrics(q, c)


def _checked(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Check shapes and ranges, and return both as float64."""
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(f"confidence and correct must have one shape (N,), got {confidence.shape} and {correct.shape}")
    if bool(((confidence < 0) | (confidence > 1)).any()):
        raise ValueError("a confidence is outside [0, 1]; give NaN for one that could not be read")
    return as_double(confidence), correct.double()


def _readable(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs whose confidence could be read, and their weights; float64, (N,), (N,) and (…, N)."""
    q, c = _checked(confidence, correct)
    w = _ones_unless(weights, confidence)
    if w.shape[-1:] != q.shape:
        raise ValueError(f"expected weights (…, N) for {len(q)} pairs, got {w.shape}")
    readable = ~q.isnan()
    return (q, c, w) if bool(readable.all()) else (q[readable], c[readable], w[..., readable])


def _ones_unless(weights: Tensor | None, like: Tensor) -> Tensor:
    """Return the weights as float64, or ones of the shape of `like` if they are None."""
    return torch.ones_like(like, dtype=torch.double) if weights is None else weights.double()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over the last dimension."""
    return (weights * values).sum(-1) / weights.sum(-1)


def _sums(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum the values with the same index; (…, N), (N,) -> (…, size)."""
    total = torch.zeros(*values.shape[:-1], size, dtype=values.dtype, device=values.device)
    return total.index_add(-1, index, values)


def _by_confidence(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Group the pairs by confidence.

    Returns:
        (D,), the distinct confidences that could be read, ascending; and for each of them the weight of its wrong and
        of its correct pairs, (…, D) each.
    """
    q, c, w = _readable(confidence, correct, weights)
    values, index = q.unique(return_inverse=True)
    return values, *(_sums(w * kind, index, len(values)) for kind in (1 - c, c))


def _distinct_pairs(q: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge equal pairs into one that has their weight. Confidences are short decimals, so few pairs remain."""
    values, misses, hits = _by_confidence(q, c, w)
    return (
        values.repeat(2),
        torch.cat([torch.zeros_like(values), torch.ones_like(values)]),
        torch.cat([misses, hits], -1),
    )
