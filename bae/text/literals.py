r"""Read numbers that are written out: integers, decimals, fractions, mixed numbers, scientific notation.

What is to be worked out is no literal: `2+3`, `2^3`, `10/2`, `\sqrt{25}`.
"""

import re
from fractions import Fraction

_DECIMAL = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:(?:\\cdot10\^|[eE])\{?([+-]?[0-9]{1,3})\}?)?")
_POWER_OF_TEN = re.compile(r"([+-]?)10\^\{?([+-]?[0-9]{1,3})\}?")
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\overline\{?([0-9]+)\}?")
_FRACTION = re.compile(r"([+-]?)(?:([0-9]+) ?)?\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}")
_SCALED = re.compile(r"(.*[0-9}]) ?(?:\\text\{ ?)?(hundred|thousand|million|billion|trillion|dozen)s?(?: ?\})?")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}


def number(text: str) -> tuple[Fraction, int] | None:
    r"""Return the value of a literal, or None if the text is none.

    Args:
        text: as `bae.text.spelling.canonical` returns it, without a unit. A word such as `million` may follow.

    Returns:
        The value, and the places after its decimal point: 0 for a fraction.
    """
    if match := re.fullmatch(r"([+-])\(([0-9./]+)\)", text):
        text = match[1] + match[2]
    if match := _SCALED.fullmatch(text):
        scaled = number(match[1])
        return (scaled[0] * _SCALES[match[2]], 0) if scaled and scaled[0] else None
    if match := _DECIMAL.fullmatch(text):
        exponent = int(match[2] or 0)
        return Fraction(match[1]) * Fraction(10) ** exponent, max(len(match[1].partition(".")[2]) - exponent, 0)
    if match := _POWER_OF_TEN.fullmatch(text):
        return Fraction(f"{match[1]}1") * Fraction(10) ** int(match[2]), 0
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, period = match.groups()
        value = int((whole + fixed) or "0") + Fraction(int(period), 10 ** len(period) - 1)
        return value / 10 ** len(fixed) * (-1 if sign == "-" else 1), 0
    fraction = re.sub(r"([0-9]+)(?:\.0*)?/([0-9]+)(?:\.0*)?(?![0-9.])", r"\\frac{\1}{\2}", text)
    match = _FRACTION.fullmatch(fraction)
    if not match or not int(match[4]) or int(match[3]) % int(match[4]) == 0:
        return None
    value = int(match[2] or 0) + Fraction(int(match[3]), int(match[4]))
    return -value if match[1] == "-" else value, 0


def is_small_power_of_ten(text: str) -> bool:
    """Tell whether a text is a power of ten that may be a question (`10^2`); `10^6` and `10^{-4}` are notation."""
    return (match := _POWER_OF_TEN.fullmatch(text)) is not None and abs(int(match[2])) < 4


def is_scientific(text: str) -> bool:
    """Tell whether a number has a power of ten in it."""
    decimal = _DECIMAL.fullmatch(text)
    return _POWER_OF_TEN.fullmatch(text) is not None or (decimal is not None and decimal[2] is not None)


def close(value: Fraction, places: int, other: Fraction, other_places: int) -> bool:
    """Tell whether two numbers are equal, or one stands for the other.

    A decimal of six places or more, rounded or cut off, stands for a fraction that has no finite decimal.
    """
    if value == other or all(pow(10, x.denominator.bit_length(), x.denominator) == 0 for x in (value, other)):
        return value == other
    places = max(places, other_places)
    shifted = value * 10**places, other * 10**places
    return places >= 6 and any(whole(shifted[0]) == whole(shifted[1]) for whole in (int, round))
