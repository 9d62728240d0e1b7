"""What a verifier says of an answer."""

import enum


class Verdict(enum.Enum):
    """Outcome of one check. TIMEOUT: out of its limits, that is time or memory, or its worker died."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
