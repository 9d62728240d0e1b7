"""The reward whose gradient is that of a logarithm: right answers count more where they are rare (MaxRL)."""

from collections.abc import Sequence

from bae.batch import Completion


def inverse_success(completions: Sequence[Completion]) -> list[float | None]:
    """Return c / m for each completion of a problem, where m is the share of right answers; 0 if none is right.

    With the group mean as baseline, the advantage is (c - m) / m, that of MaxRL (arXiv 2602.02710): in expectation it
    climbs the log-probability of a right answer, as far as a group of this size can tell. None without an answer; such
    a completion counts as wrong in m.

    Args:
        completions: all completions of one problem.
    """
    mean = sum(c.correct for c in completions) / len(completions)
    return [(c.correct / mean if mean else 0.0) if c.verdicts else None for c in completions]
