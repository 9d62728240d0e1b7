"""Check answers at once in this process, for rules that are cheap whatever the answer is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from bae.text.verdict import Verdict
from bae.text.workers import Pair, Pending


class Faultfinder(Protocol):
    """Know what cannot be a reference. Every verifier does."""

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""


def check_reference(verifier: Faultfinder, reference: str) -> None:
    """Refuse a bad reference. Raises ValueError with the reason."""
    if why := verifier.fault(reference):
        raise ValueError(f"the reference {reference!r} cannot be read: {why}")


class DirectVerifier(ABC):
    """Be a Verifier (bae.text.verifier) by three rules: which references are bad, what is right, and what is the same.

    White space around texts never matters. Blank answers, and longer ones than `max_chars`, are UNPARSEABLE.

    Args:
        max_chars: the most characters that an answer may have.

    Raises:
        ValueError: for a limit that is not above 0; from the methods, for a bad reference.
    """

    def __init__(self, max_chars: int = 1000) -> None:
        if max_chars <= 0:
            raise ValueError(f"verifier.max_chars={max_chars}: must be above 0")
        self.max_chars = max_chars

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Check the pairs at once, and return the verdicts as pending ones. Raises ValueError for a bad reference."""
        verdicts = [self._verdict(answer.strip(), reference.strip()) for answer, reference in pairs]
        return lambda: verdicts

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Check (answer, reference) pairs. Raises ValueError for a bad reference."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers whether they are the same text, or mean the same by the rule of `same`."""
        return [one == other or self.same(one, other) for one, other in ((a.strip(), b.strip()) for a, b in pairs)]

    def close(self) -> None:  # noqa: B027
        """Do nothing: no check is ever pending."""

    @abstractmethod
    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""

    @abstractmethod
    def compare(self, answer: str, reference: str) -> Verdict:
        """Check one answer, which is not blank, against one reference, which has no fault."""

    @abstractmethod
    def same(self, one: str, other: str) -> bool:
        """Tell whether two answers that differ as texts mean the same."""

    def _verdict(self, answer: str, reference: str) -> Verdict:
        """Check one pair. Raises ValueError for a bad reference."""
        check_reference(self, reference)
        if not answer or len(answer) > self.max_chars:
            return Verdict.UNPARSEABLE
        return self.compare(answer, reference)
