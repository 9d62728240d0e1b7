"""Decide whether a short text is right: by SQuAD's exact match, as one of several options, or by a regular expression.

Normalised text is compared for equality, and never searched for inside an answer. So a policy gains nothing by writing
all that could be right.
"""

import string
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import regex

from bae.text.direct import DirectVerifier
from bae.text.verdict import Verdict

ALIKE = str.maketrans("\u2018\u2019\u00b4\u201c\u201d\u2212\u2013\u2014", "'''\"\"---")
"""Signs that are written in several ways: quotes and dashes."""
_SIGN = f"[{regex.escape(string.punctuation)}]"
PUNCTUATION = regex.compile(
    rf"(?<=[0-9])(?!,[0-9]{{3}}(?![0-9])){_SIGN}(?=[0-9])"  # 1.5 is not 15, and 9/11 not 911; but 1,000 is 1000
    r"|(?<!\w)(?:-?\.|-)(?=[0-9])"  # -5 is not 5, and .5 not 5
    rf"|(?P<dropped>{_SIGN})"
)
ARTICLES = regex.compile(r"\b(?:a|an|the)\b")
OPTION = regex.compile(
    r"(?:(?P<letter>[A-Za-z])|\((?P<letter>[A-Za-z])\))(?P<mark>[.:)]?)(?:\s+(?P<text>.+))?", regex.S
)
"""A letter as B, b, (B), B. or B), and perhaps a text behind it."""
MOST_OPTIONS = 26


def normalised(text: str) -> str:
    """Return a text by the rules of SQuAD's exact match (Rajpurkar et al., 2016): case, punctuation, articles, space.

    It differs from SQuAD in what would make a wrong answer right or a right one wrong: signs that belong to a number
    stay; typographic quotes, dashes and composed characters are as plain ones; and a text that would lose all its
    characters, such as "The" or "?", keeps them.
    """
    plain = unicodedata.normalize("NFC", text).translate(ALIKE).lower()
    words = PUNCTUATION.sub(lambda sign: "" if sign["dropped"] else sign[0], plain)
    return " ".join(ARTICLES.sub(" ", words).split()) or folded(plain)


def folded(text: str) -> str:
    """Return a text without differences of case and white space, and without a full stop at its end."""
    return " ".join(text.lower().split()).rstrip(". ") or text.strip()


class ExactVerifier(DirectVerifier):
    """Accept an answer that equals a reference after normalisation; see `normalised`.

    A reference has a line for each right answer: the answer and its aliases.

    Args:
        max_chars: the most characters that an answer may have.
    """

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it has a line that is not blank."""
        return None if reference.strip() else "it is blank"

    def compare(self, answer: str, reference: str) -> Verdict:
        """Check one answer against the lines of a reference."""
        return Verdict.CORRECT if normalised(answer) in _normalised_lines(reference) else Verdict.WRONG

    def same(self, one: str, other: str) -> bool:
        """Tell whether two answers are equal after normalisation."""
        return normalised(one) == normalised(other)


class ChoiceVerifier(DirectVerifier):
    """Accept the letter of the right option, its text, or both, as in B, (B), refrigerator or B. refrigerator.

    A reference is the letter of the right option. If the texts of the options are accepted, too, they follow, all of
    them in order, each on a line of its own. Case and white space do not matter.

    An answer is UNPARSEABLE if it is none of the options, has a letter with the text of another option, or is a text
    that several options have. A letter alone is always taken as a letter, also where an option has this text.

    Args:
        max_chars: the most characters that an answer may have.
    """

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""
        letter, *options = reference.strip().split("\n")
        if len(letter.strip()) != 1 or letter.strip() not in string.ascii_uppercase:
            return "its first line must be the letter of an option, A to Z"
        if not options:
            return None
        if not all(option.strip() for option in options):
            return "an option is blank"
        if len(options) > MOST_OPTIONS or _index(letter.strip()) >= len(options):
            return f"it has {len(options)} options, and the letter {letter.strip()}"
        return None

    def compare(self, answer: str, reference: str) -> Verdict:
        """Check which option an answer names."""
        letter, *options = reference.split("\n")
        named = _named_option(answer, [folded(option) for option in options])
        if named is None:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if named == _index(letter.strip()) else Verdict.WRONG

    def same(self, one: str, other: str) -> bool:
        """Tell whether two answers are the same letter, or the same text but for case and white space.

        A letter and a text are never the same, because nothing here says which options there were.
        """
        first, second = (_named_option(text, []) for text in (one, other))
        return first == second if first is not None else second is None and folded(one) == folded(other)


class RegexVerifier(DirectVerifier):
    """Accept an answer that a regular expression matches as a whole. The reference is the expression.

    An answer is WRONG if it does not match. If the match takes longer than `timeout`, as some expressions do with a
    text that is made for it, the verdict is TIMEOUT.

    Args:
        ignore_case: whether case does not matter.
        timeout: the most seconds for one answer, of processor time of this process, which waits for it.
        max_chars: the most characters that an answer may have.

    Raises:
        ValueError: for limits that are not above 0.
    """

    def __init__(self, ignore_case: bool = True, timeout: float = 0.5, max_chars: int = 1000) -> None:
        super().__init__(max_chars)
        if not 0 < timeout < float("inf"):
            raise ValueError(f"verifier.timeout={timeout}: must be above 0, and finite")
        self.timeout = timeout
        self.ignore_case = ignore_case

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it is an expression that does not accept an empty answer."""
        if not reference.strip():
            return "it is blank"
        try:
            accepts_nothing = self._expression(reference).fullmatch("", timeout=self.timeout)
        except (regex.error, TimeoutError) as error:
            return f"it is no regular expression ({error})"
        return "it accepts an empty answer" if accepts_nothing else None

    def compare(self, answer: str, reference: str) -> Verdict:
        """Match one answer as a whole."""
        try:
            found = self._expression(reference).fullmatch(answer, timeout=self.timeout)
        except (TimeoutError, MemoryError):
            return Verdict.TIMEOUT
        return Verdict.CORRECT if found else Verdict.WRONG

    def same(self, one: str, other: str) -> bool:
        """Tell whether two answers differ in case alone, if case does not matter."""
        return self.ignore_case and one.lower() == other.lower()

    def _expression(self, reference: str) -> regex.Pattern[str]:
        """Return the compiled expression. Raises regex.error. The library keeps those that were used last."""
        return regex.compile(reference.strip(), regex.IGNORECASE if self.ignore_case else 0)


@lru_cache(maxsize=4096)
def _normalised_lines(reference: str) -> frozenset[str]:
    """Return the lines of a reference that are not blank, normalised."""
    return frozenset(normalised(line) for line in reference.split("\n") if line.strip())


def _index(letter: str) -> int:
    """Return the position of a letter, 0 for A."""
    return string.ascii_uppercase.index(letter.upper())


def _named_option(answer: str, options: Sequence[str]) -> int | None:
    """Return the position of the option that an answer names; None if it names none, or several.

    options: folded; none if they are not known, and then an answer is a letter alone.
    """
    match = OPTION.fullmatch(answer)
    if match and not match["text"]:
        index = _index(match["letter"])
        return index if not options or index < len(options) else None
    having = [index for index, option in enumerate(options) if option == folded(answer)]
    if having:
        return having[0] if len(having) == 1 else None
    is_marked = match and (match["mark"] or answer.startswith("("))  # "a refrigerator" has no letter
    if match and is_marked and _index(match["letter"]) < len(options):
        index = _index(match["letter"])
        return index if options[index] == folded(match["text"]) else None
    return None
