"""A score of the confidence against one's own answer and the whole group's (DCPO, arXiv 2603.09117)."""

from collections.abc import Sequence

from bae.batch import Completion


def hybrid_brier(completions: Sequence[Completion], own: float) -> list[float | None]:
    """Return -(q - h)^2 with h = own * c + (1 - own) * m, where m is the share of right answers of the problem.

    It is best to state the expectation of h given what was written, which is not the chance of being right: with
    own = 1/2 it lies halfway between that chance and the problem's accuracy. A completion without an answer counts as
    wrong in m. None without a readable confidence.

    Args:
        completions: all completions of one problem.
        own: the weight of the completion's own answer, in [0, 1]; 1/2 in DCPO.

    Raises:
        ValueError: if own is outside [0, 1].
    """
    if not 0 <= own <= 1:
        raise ValueError(f"own={own}: must be between 0 and 1")
    mean = sum(c.correct for c in completions) / len(completions)
    targets = (own * c.correct + (1 - own) * mean for c in completions)
    return [
        None if c.confidence is None else -((c.confidence - h) ** 2) for c, h in zip(completions, targets, strict=True)
    ]
