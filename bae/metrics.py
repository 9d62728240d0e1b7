"""How well stated confidences match what happened. Pure functions, and a torchmetrics class over them."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

ECE_BINS = 11
"""[0, .1) … [.9, 1), [1, 1.1): a certain 1.0 has a bin of its own (paper, evaluation)."""


def ece(confidence: Tensor, correct: Tensor) -> Tensor:
    """Expected calibration error in the paper's 11 fixed-width bins; NaN for an empty set.

    confidence: (N,) in [0, 1]. correct: (N,) in {0, 1}.
    """
    if len(confidence) == 0:
        return torch.tensor(torch.nan)
    # The small shift puts decimal confidences where the definition says: 0.3 * 10 is below 3 in binary floats.
    bins = (confidence.double() * 10 + 1e-6).floor().long()
    gap = torch.zeros(ECE_BINS, dtype=torch.double, device=bins.device)
    gap.index_add_(0, bins, confidence.double() - correct.double())
    return (gap.abs().sum() / len(confidence)).float()


def brier_score(confidence: Tensor, correct: Tensor) -> Tensor:
    """Mean (q - c)^2; NaN for an empty set."""
    return ((confidence - correct.float()) ** 2).mean()


def auroc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Probability that a correct completion is more confident than a wrong one, ties counting half; NaN if there is
    only one kind."""
    if len(correct) == 0 or bool((correct == correct[0]).all()):
        return torch.tensor(torch.nan)
    return binary_auroc(confidence, correct.long())


def calibration(confidence: Tensor, correct: Tensor) -> dict[str, Tensor]:
    """ece, brier, auroc, confidence (mean) and coverage over completions; a confidence of NaN is one that could not
    be read: it counts in coverage alone.

    confidence: (N,). correct: (N,).
    """
    readable = ~confidence.isnan()
    q, c = confidence[readable], correct[readable]
    return {
        "ece": ece(q, c),
        "brier": brier_score(q, c),
        "auroc": auroc(q, c),
        "confidence": q.mean(),
        "coverage": readable.float().mean(),
    }


class Calibration(Metric):
    """`calibration` and accuracy over batches and ranks, as torchmetrics has it."""

    full_state_update = False
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """confidence: (N,), NaN where there is none. correct: (N,)."""
        self.confidence.append(confidence.float())
        self.correct.append(correct.float())

    def compute(self) -> dict[str, Tensor]:
        confidence, correct = dim_zero_cat(self.confidence), dim_zero_cat(self.correct)
        return {"accuracy": correct.mean(), **calibration(confidence, correct)}
