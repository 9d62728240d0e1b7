"""How well stated confidences match what happened. Pure functions, and a torchmetrics class over them.

Every function takes N pairs: confidence (N,) in [0, 1], of any float type, NaN where it could not be read; correct
(N,), true or 1 where the answer is right. Unreadable confidences count in `coverage` and `accuracy` alone. `weights`
says how often each pair counts: (N,), or (R, N) for R resamples at once (bae.evaluation.bootstrap); None counts each
once.
Results are float64 and have the shape of `weights` without its last dimension.

What has no value is NaN, silently: any metric of an empty set, AUROC of outcomes of one kind. `Calibration` warns.
Raises ValueError if shapes differ or a confidence is outside [0, 1].
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

ECE_BINS = 11
"""[0, .1) … [.9, 1), [1, 1.1): a certain 1.0 has a bin of its own (paper, Evaluation)."""

NLL_CLIP = 1e-3
"""The log score takes no confidence as nearer to 0 or 1: a certainty that fails costs 6.9 nats, not infinitely many."""


def as_double(confidence: Tensor) -> Tensor:
    """The float64 nearest to the decimal that was written; float64 and integer types are only converted.

    float32 keeps any decimal of six places apart from the others; so a float32 that is the nearest to such a decimal
    stands for it, and any other stands for itself. Order and ties stay as they are. Half types: 3 and 2 places.
    """
    wide = confidence.double()
    if not confidence.is_floating_point() or confidence.dtype == torch.double:
        return wide
    places = round(-math.log10(torch.finfo(confidence.dtype).resolution))
    decimal = wide.round(decimals=places)
    return torch.where(decimal.to(confidence.dtype) == confidence, decimal, wide)


def tenth(confidence: Tensor) -> Tensor:
    """(N,) long: the bin of each confidence, k for [k/10, (k+1)/10), 10 for 1.0 alone.

    Exact without a tolerance: to round to the nearest float keeps order, so a decimal is at or above k/10 if and only
    if its float is at or above the float of k/10. A decimal below k/10 could only fail that by being within 1e-17.
    """
    # Not arange(…) / 10: on CUDA that multiplies by the float of 1/10, which makes 3/10 too large.
    edges = torch.tensor([k / 10 for k in range(1, ECE_BINS)], dtype=torch.double, device=confidence.device)
    return torch.bucketize(as_double(confidence), edges, right=True)


def accuracy(correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """pass@1: share of correct completions, whether or not their confidence is readable."""
    return _mean(correct.double(), _ones_unless(weights, correct))


def ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None, bins: int = ECE_BINS) -> Tensor:
    """Expected calibration error, sum over bins of |B|/n · |accuracy(B) − mean confidence(B)|, in the paper's bins.

    bins: 10 puts 1.0 into [.9, 1], as usual elsewhere.
    """
    q, c, w = _readable(confidence, correct, weights)
    gap = _sums(w * (q - c), tenth(q).clamp(max=bins - 1), bins)
    return gap.abs().sum(-1) / w.sum(-1)


def ece_adaptive(confidence: Tensor, correct: Tensor, weights: Tensor | None = None, bins: int = 10) -> Tensor:
    """ECE in bins of equal mass (Nguyen and O'Connor, 2015); those who said the same are never split.

    A confidence goes, with all pairs that state it, into bin ⌊bins · m⌋, m being the mid-rank of these pairs as a
    share of all: without ties, each bin has n/bins pairs; with ties, bins may be uneven or empty.
    """
    q, misses, hits = _by_confidence(confidence, correct, weights)
    count = misses + hits
    total = count.sum(-1, keepdim=True)
    middle = count.cumsum(-1) - count / 2
    bin_of = (bins * middle / total).nan_to_num().long().clamp(max=bins - 1)  # NaN: a resample that weighs nothing
    gap = torch.zeros(*count.shape[:-1], bins, dtype=torch.double, device=q.device)
    gap.scatter_add_(-1, bin_of, q * count - hits)
    return gap.abs().sum(-1) / total.squeeze(-1)


def brier_score(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean (q − c)² (Brier, 1950)."""
    q, c, w = _readable(confidence, correct, weights)
    return _mean((q - c) ** 2, w)


def brier_parts(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(reliability, resolution, uncertainty); Brier = reliability − resolution + uncertainty (Murphy, 1973).

    A group is all pairs that state exactly the same confidence, not a bin, so the identity is exact. With n_d pairs
    of confidence q_d, share correct p_d, and p over all: reliability = Σ n_d (q_d − p_d)² / n, low is good;
    resolution = Σ n_d (p_d − p)² / n, high is good; uncertainty = p (1 − p). Small groups inflate the first two alike.
    """
    q, misses, hits = _by_confidence(confidence, correct, weights)
    count = misses + hits
    base = hits.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    rate = torch.where(count > 0, hits / count, base)  # a resample may leave a group out
    parts = _mean((q - rate) ** 2, count), _mean((rate - base) ** 2, count)
    return *parts, (base * (1 - base)).squeeze(-1)


def nll(confidence: Tensor, correct: Tensor, weights: Tensor | None = None, clip: float = NLL_CLIP) -> Tensor:
    """Log score: mean −log of the probability given to what happened, in nats; q clipped to [clip, 1 − clip]."""
    q, c, w = _readable(confidence, correct, weights)
    q = q.clamp(clip, 1 - clip)
    return _mean(-torch.where(c > 0, q, 1 - q).log(), w)


def auroc(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Probability that a correct completion is more confident than a wrong one, ties counting half (Mann–Whitney)."""
    _, misses, hits = _by_confidence(confidence, correct, weights)
    below = misses.cumsum(-1) - misses
    return (hits * (below + misses / 2)).sum(-1) / (hits.sum(-1) * misses.sum(-1))


def calibration(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Everything above but accuracy, by name, and: confidence, its mean; bias, that minus the accuracy of the same
    completions, positive for overconfidence; coverage, the share of completions with a readable confidence."""
    every = _ones_unless(weights, confidence)
    q, c, w = _distinct_pairs(*_readable(confidence, correct, weights))
    reliability, resolution, uncertainty = brier_parts(q, c, w)
    return {
        "ece": ece(q, c, w),
        "ece_10": ece(q, c, w, bins=10),
        "ece_adaptive": ece_adaptive(q, c, w),
        "brier": brier_score(q, c, w),
        "reliability": reliability,
        "resolution": resolution,
        "uncertainty": uncertainty,
        "nll": nll(q, c, w),
        "auroc": auroc(q, c, w),
        "confidence": _mean(q, w),
        "bias": _mean(q - c, w),
        "coverage": w.sum(-1) / every.sum(-1),
    }


def all_metrics(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """`accuracy` and `calibration`."""
    return {"accuracy": accuracy(correct, weights), **calibration(confidence, correct, weights)}


def reliability_table(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """What a reliability diagram shows (paper, Fig. 4): count, confidence (mean) and accuracy in each of the paper's
    11 bins, (…, 11); the means of an empty bin are NaN."""
    q, c, w = _readable(confidence, correct, weights)
    count, stated, hits = (_sums(x, tenth(q), ECE_BINS) for x in (w, w * q, w * c))
    return {"count": count, "confidence": stated / count, "accuracy": hits / count}


class Calibration(Metric):
    """`all_metrics` over batches and ranks, as torchmetrics has it. `compute` warns, once, of those that are NaN."""

    full_state_update = False
    is_differentiable = False
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """Of the states, wherever the module is moved: torchmetrics fills in for a rank without updates with it."""
        return torch.double

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """confidence: (N,), NaN where there is none. correct: (N,)."""
        q, c = _checked(confidence, correct)
        self.confidence.append(q)
        self.correct.append(c)

    def compute(self) -> dict[str, Tensor]:
        nothing = torch.zeros(0, dtype=self.dtype, device=self.device)
        q, c = (dim_zero_cat(state) if len(state) else nothing for state in (self.confidence, self.correct))
        metrics = all_metrics(q, c)
        undefined = [name for name, value in metrics.items() if value.isnan()]
        if undefined and self.update_called:  # torchmetrics itself warns where there was no update
            rank_zero_warn(
                f"NaN, for want of readable confidences or of right and wrong answers: {', '.join(undefined)}"
            )
        return metrics


def _checked(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(f"want confidence and correct of one shape (N,), got {confidence.shape} and {correct.shape}")
    if bool(((confidence < 0) | (confidence > 1)).any()):
        raise ValueError("a confidence is outside [0, 1]; give NaN for one that could not be read")
    return as_double(confidence), correct.double()


def _readable(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The readable pairs and their weights, float64: (N,), (N,), (…, N)."""
    q, c = _checked(confidence, correct)
    w = _ones_unless(weights, confidence)
    if w.shape[-1:] != q.shape:
        raise ValueError(f"want weights (…, N) for {len(q)} pairs, got {w.shape}")
    readable = ~q.isnan()
    return (q, c, w) if bool(readable.all()) else (q[readable], c[readable], w[..., readable])


def _ones_unless(weights: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.double) if weights is None else weights.double()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (weights * values).sum(-1) / weights.sum(-1)


def _sums(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of the values with the same index; (…, N), (N,) -> (…, size)."""
    total = torch.zeros(*values.shape[:-1], size, dtype=values.dtype, device=values.device)
    return total.index_add(-1, index, values)


def _by_confidence(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(D,) distinct readable confidences, ascending; (…, D) weight of wrong and of correct pairs that state each."""
    q, c, w = _readable(confidence, correct, weights)
    values, index = q.unique(return_inverse=True)
    return values, *(_sums(w * kind, index, len(values)) for kind in (1 - c, c))


def _distinct_pairs(q: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same pairs, equal ones merged into one that has their weight: few, where confidences are short decimals."""
    values, misses, hits = _by_confidence(q, c, w)
    return (
        values.repeat(2),
        torch.cat([torch.zeros_like(values), torch.ones_like(values)]),
        torch.cat([misses, hits], -1),
    )
