"""A process reward: the calculations that a text works out are right, whatever its answer."""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from bae.batch import Completion

_OPERATORS = {"+": "+", "-": "-", "−": "-", "*": "*", "×": "*", "·": "*", "/": "/", "÷": "/"}  # noqa: RUF001
_TOKEN = re.compile(r"\$?([0-9]{1,3}(?:,[0-9]{3}){1,5}|[0-9]{1,15})(\.[0-9]{1,15})?|[-+−*×·/÷=]|\n|\S")  # noqa: RUF001
_BULLET = re.compile(r"^[ \t]{0,20}[-+*•][ \t]", re.MULTILINE)
_BEFORE, _AFTER = "^_%)]}\\|", "^_%([{\\|"
"""Signs that make the number after them, or before them, a part of something else."""
_MOST = 10
"""The most numbers on one side of an equals sign; longer sides are left out."""


def right_calculations(completion: Completion, section: str = "reasoning", empty: float = 0.0) -> float | None:
    """Return the share of calculations in a section that are right, such as 7 + 5 * 2 = 17; `empty` if it has none.

    Read are numbers with + - * / and their usual signs, on both sides of an equals sign; * and / go first. A result may
    be rounded to two or more decimal places. What has brackets, letters or percent signs beside the numbers is not
    read. Calculations that have nothing to do with the problem count, too: a policy that is paid for this alone will
    write 1 + 1 = 2. So give it a small weight beside the reward of the answer.

    Args:
        completion: the completion.
        section: the name of the section. If it recurs, all of them are read; None if there is none.
        empty: the reward of a section without calculations.
    """
    texts = [s.content for s in completion.sections if s.tag == section]
    if not texts:
        return None
    checked = [right for text in texts for right in calculations(text)]
    return sum(checked) / len(checked) if checked else empty


def calculations(text: str) -> list[bool]:
    """Return for each calculation in a text, in order, whether it is right."""
    found = []
    for sides in _equations(text):
        for left, right in pairwise(sides):
            made, given = _value(left), _value(right)
            if made is not None and given is not None and len(left) + len(right) > 2:  # something is worked out
                found.append(_agree(made, given, _places(right)))
    return found


def _equations(text: str) -> Iterator[list[list[str]]]:
    """Yield the sides, as tokens, of everything that has an equals sign and nothing foreign in it."""
    sides: list[list[str]] = [[]]
    end, before, is_part = -1, "", False  # of the last token; the last foreign one; of something that is not read
    for match in _TOKEN.finditer(_BULLET.sub("", text) + "\n;"):
        token, is_glued = match[0], match.start() == end
        end = match.end()
        if match[1] or token in _OPERATORS or token == "=":
            if sides == [[]]:
                is_part = is_glued and (before.isalpha() or before in _BEFORE)
            if token == "=":
                sides.append([])
            elif match[1] and is_glued and sides[-1] in (["-"], ["−"]):  # noqa: RUF001
                sides[-1] = ["-" + token]  # a sign
            else:
                sides[-1].append(token)
        else:
            if len(sides) > 1 and not is_part and not (is_glued and (token.isalpha() or token in _AFTER)):
                yield sides
            sides, before = [[]], token


def _value(side: list[str]) -> Fraction | None:
    """Return the value of numbers and operators in turns; None if they are not, or it divides by 0."""
    numbers, operators = side[::2], [_OPERATORS.get(token) for token in side[1::2]]
    if len(side) % 2 == 0 or len(numbers) > _MOST or None in operators or any(n in _OPERATORS for n in numbers):
        return None
    sums = [Fraction(1)]
    for number, operator in zip(numbers, ["*", *operators], strict=True):
        value = Fraction(number.replace(",", "").replace("$", ""))
        if operator == "/" and value == 0:
            return None
        if operator in ("*", "/"):
            sums[-1] = sums[-1] * value if operator == "*" else sums[-1] / value
        else:
            sums.append(value if operator == "+" else -value)
    return sum(sums, Fraction(0))


def _places(side: list[str]) -> int:
    """Return the decimal places of a single number."""
    return len(side[0].partition(".")[2]) if len(side) == 1 else 0


def _agree(left: Fraction, right: Fraction, places: int) -> bool:
    """Tell whether two values are equal, or the right one is the left one rounded to its places, two or more."""
    return left == right or (places >= 2 and abs(left - right) <= Fraction(1, 2 * 10**places))
