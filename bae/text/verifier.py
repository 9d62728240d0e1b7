r"""Decide whether the policy's answer equals the reference.

The answer is hostile text: if some text makes a check slow, big or wrong, the policy will find it and write it.
IntegerVerifier serves generated arithmetic, and bae.text.short_answers has verifiers of texts. MathVerifier decides by
the text what may be compared (bae.text.answers has the rules), and compares what is left, single expressions, by their
values (bae.text.expressions), in worker processes that can be killed. Math-Verify, which arXiv 2602.10231 uses, is not
asked: it looks for an answer inside a text, folds the case of variables, solves equations and rounds, and a policy is
paid for each of them.

The following answers are CORRECT, although a stricter verifier could reject them:
- an expression with variables in any form, even the form of the question (`(x+1)^2` for x^2+2x+1);
- a constant that could be simplified but is no longer than the reference (`\sqrt{12}` for 2\sqrt3), a fraction that
  is not reduced, a value multiplied or divided by 1;
- a decimal of six or more places for a constant that is no fraction, if it is the constant rounded or cut off;
- a unit of the list where the reference has none (`12 cm` or `12 apples` for 12), a number where the reference has a
  percent sign or vice versa, a clock time without am or pm;
- an inequality where the reference is a pair of numbers, because (1,2) may be the interval.

The following answers are right, but are not accepted: prose around a right answer, the letter of a choice with its
text (`(E) hyperbola`), one-letter units (`540m`) outside \text, things counted that are not in the list (`40 daps` for
40), another unit with its value converted, a second name for an equation's variable.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from bae.text import answers, expressions
from bae.text.direct import DirectVerifier
from bae.text.spelling import canonical
from bae.text.verdict import Verdict
from bae.text.workers import Pair, Pending, Workers, within_limits

_TOGETHER = 16  # pairs that a worker is given at once; a check takes about a millisecond


class Verifier(Protocol):
    """Compare answers with references, and with each other. Each method returns one result per pair, in order."""

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to check (answer, reference) pairs, without waiting.

        Raises:
            ValueError: for a bad reference, either at once or when the verdicts are asked for.
        """

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Check (answer, reference) pairs, and wait for the verdicts. Raises ValueError for a bad reference."""

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers of the policy whether they mean the same. Votes among answers need it.

        The relation is symmetric, and True for equal texts, but not transitive: 12 may agree with both `12 cm` and
        `12 km`. It is False if either answer cannot be read or is out of the limits. No content of an answer makes it
        raise.
        """

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference, such as "it is blank"; None if it can be one."""

    def close(self) -> None:
        """Drop the checks that are still running, and free what checks need. A later call starts anew."""


class IntegerVerifier(DirectVerifier):
    """Compare integers exactly.

    An integer is an optional sign and ASCII digits. Surrounding white space, leading zeros and the sign of zero do not
    matter: "007" equals 7, "-0" equals 0. Any other answer is UNPARSEABLE. Any other reference raises ValueError.

    Args:
        max_digits: the most digits that an integer may have, up to 4300.
    """

    def __init__(self, max_digits: int = 100) -> None:
        super().__init__(max_digits + 1)
        self._integer = re.compile(rf"[+-]?[0-9]{{1,{max_digits}}}")

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it is an integer."""
        return None if self._integer.fullmatch(reference.strip()) else "it is not an integer, or too long"

    def compare(self, answer: str, reference: str) -> Verdict:
        """Check one answer against one integer."""
        if not self._integer.fullmatch(answer):
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if int(answer) == int(reference) else Verdict.WRONG

    def same(self, one: str, other: str) -> bool:
        """Tell whether two texts are the same integer."""
        return all(map(self._integer.fullmatch, (one, other))) and int(one) == int(other)


class MathVerifier:
    r"""Compare mathematical answers, in spawned processes that have limits of time and memory.

    Answers must be in final form (bae.text.answers has the rules). An answer that equals the reference as text is
    CORRECT. Otherwise an answer is UNPARSEABLE if it is blank, is longer than `max_chars`, has anything foreign in it
    (prose, several boxes, operations that the reference lacks), or is no expression. An answer is WRONG if it has
    another value, or is a sum or power where a number is asked for. `equivalent` takes each answer as the
    reference of the other, and both must be CORRECT, so it is symmetric.

    Each distinct pair is checked once per call; a worker is given up to 16 of them at once. An answer out of its limits
    costs `timeout` seconds and its worker, which takes 1-3 s to replace, and as much again where others were with it: n
    such answers take up to 2 n * (timeout + 3) / workers seconds. A reference that is too slow to parse gives TIMEOUT
    as well. Workers start at the first call that needs them, and end with close(),
    with the object or with the interpreter. A call after close() starts new ones, and so does waiting for checks that
    close() dropped. Calls from several threads share the workers.

    Args:
        timeout: the most seconds for one answer.
        memory_mb: the most memory for one answer, in MiB; Linux only.
        workers: the number of processes.
        max_chars: the most characters that an answer may have.

    Raises:
        ValueError: for limits that are not above 0; from the methods, for a reference that is blank or whose brackets
            do not match. That is a fault of the data, not of the policy.
        RuntimeError: from the methods, if the workers break down three times in one call.
    """

    def __init__(self, timeout: float = 2.0, memory_mb: int = 2048, workers: int = 2, max_chars: int = 1000) -> None:
        self._workers = Workers(_warm_up, timeout, memory_mb, workers, max_chars)

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to check (answer, reference) pairs in the workers, without waiting."""
        for _, reference in pairs:
            if not reference.strip():
                raise ValueError(f"the reference is blank: {reference!r}")
        return self._workers.submit(_check, pairs, equal_is_right=True, together=_TOGETHER)

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Check (answer, reference) pairs, and wait for the verdicts."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers whether each is CORRECT when the other is the reference."""
        ordered = [(min(texts), max(texts)) for texts in ((one.strip(), other.strip()) for one, other in pairs)]
        unequal = [pair for pair in ordered if pair[0] != pair[1] and max(map(len, pair)) <= self._workers.max_chars]
        found = self._workers.submit(_check_both_ways, unequal, together=_TOGETHER)()
        verdicts = dict(zip(unequal, found, strict=True))
        return [pair[0] == pair[1] or verdicts.get(pair) is Verdict.CORRECT for pair in ordered]

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""
        if not reference.strip():
            return "it is blank"
        return None if canonical(reference) else "its brackets do not match, or it has several boxes"

    def close(self) -> None:
        """Stop the workers and drop their checks. A later call starts new ones."""
        self._workers.close()


def _check(answer: str, reference: str) -> Verdict:
    """Check one pair, in a worker."""
    return within_limits(_compare(answer, reference))


def _check_both_ways(one: str, other: str) -> Verdict:
    """Compare two answers, in a worker. The verdict is CORRECT if each is correct with the other as the reference."""
    if canonical(one) == canonical(other) is not None:
        return Verdict.CORRECT
    try:
        verdict = _compare(one, other)
        return within_limits(_compare(other, one) if verdict is Verdict.CORRECT else verdict)
    except ValueError:  # one of the answers cannot be a reference
        return Verdict.UNPARSEABLE


def _warm_up() -> None:
    """Import what checks need, in a worker, outside the time limit."""
    _compare("1+x", "x+2")


def _compare(answer: str, reference: str) -> Verdict:
    """Compare one answer with one reference. Raises ValueError for a bad reference."""
    wanted = canonical(reference)
    if wanted is None:
        raise ValueError(f"the reference is blank or its brackets do not match: {reference!r}")
    found = canonical(answer)
    if found is None:
        return Verdict.UNPARSEABLE
    try:
        equal = answers.matches(found, wanted, expressions.equal)
    except MemoryError:
        return Verdict.TIMEOUT
    except Exception:
        # The answer is no expression (Unreadable), is too deep (RecursionError), has integers of over 4300 digits
        # (ValueError), or hit a gap of mpmath. Hostile text must not end a run, whatever it raises.
        return Verdict.UNPARSEABLE
    if equal:
        return Verdict.CORRECT
    return Verdict.WRONG if answers.readable(found, wanted) else Verdict.UNPARSEABLE
