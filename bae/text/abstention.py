"""Tell an answer that declines to answer from a wrong one, with any verifier."""

from collections.abc import Sequence

from bae.text.direct import check_reference
from bae.text.short_answers import normalised
from bae.text.verdict import Verdict
from bae.text.verifier import Verifier
from bae.text.workers import Pair, Pending


class AbstentionVerifier:
    """Give answers such as "I don't know" the verdict ABSTAINED, and ask another verifier about all others.

    An answer abstains if it equals one of the phrases after normalisation (bae.text.short_answers.normalised). A phrase
    inside a longer answer is no abstention, so none can be hidden beside an answer.

    Args:
        verifier: checks the other answers.
        phrases: that abstain.

    Raises:
        ValueError: without a phrase, or for a blank one; from the methods, for a bad reference.
    """

    def __init__(self, verifier: Verifier, phrases: Sequence[str]) -> None:
        if not phrases or not all(phrase.strip() for phrase in phrases):
            raise ValueError(f"verifier.phrases={list(phrases)}: must have a phrase, and no blank one")
        self.verifier = verifier
        self._phrases = frozenset(map(normalised, phrases))

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to check (answer, reference) pairs, without waiting. Raises ValueError for a bad reference."""
        for _, reference in pairs:
            check_reference(self, reference)
        abstains = [self._abstains(answer) for answer, _ in pairs]
        pending = self.verifier.submit([pair for pair, is_none in zip(pairs, abstains, strict=True) if not is_none])

        def verdicts() -> list[Verdict]:
            others = iter(pending())
            return [Verdict.ABSTAINED if is_none else next(others) for is_none in abstains]

        return verdicts

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Check (answer, reference) pairs, and wait for the verdicts. Raises ValueError for a bad reference."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers whether both abstain, or neither does and the verifier finds them equal."""
        abstains = [(self._abstains(one), self._abstains(other)) for one, other in pairs]
        asked = [pair for pair, either in zip(pairs, abstains, strict=True) if not any(either)]
        equal = iter(self.verifier.equivalent(asked))
        return [all(either) if any(either) else next(equal) for either in abstains]

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""
        if any(self._abstains(line) for line in reference.split("\n")):
            return "it is a phrase that abstains"
        return self.verifier.fault(reference)

    def close(self) -> None:
        """Drop the checks that are still running."""
        self.verifier.close()

    def _abstains(self, answer: str) -> bool:
        """Tell whether an answer is one of the phrases. Longer texts are not normalised."""
        return len(answer) <= 200 and normalised(answer) in self._phrases
