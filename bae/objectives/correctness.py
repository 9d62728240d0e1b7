"""The reward for being right: r = c, the verifier's verdict on the first answer (paper, task 1)."""

from bae.batch import Completion


def correctness(completion: Completion) -> float | None:
    """Return 1 if the first answer is correct, 0 if not, None without an answer."""
    return float(completion.correct) if completion.verdicts else None
