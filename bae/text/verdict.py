"""Define the verdicts of a verifier."""

import enum


class Verdict(enum.Enum):
    """Name the result of one check.

    TIMEOUT: the check ran out of time or memory, or its worker process died. ABSTAINED: the answer declines to answer;
    bae.text.abstention alone gives it.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    ABSTAINED = "abstained"
