"""Compute with values that are exact where they are fractions, and have 120 digits elsewhere; nothing takes long."""

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

Value = Any
"""A Fraction, or a complex number of mpmath."""

_BITS = 20_000


class Unreadable(ValueError):
    """Say that a text is no expression of the grammar, or has no value."""


@cache
def arithmetic() -> Any:
    """Return mpmath's arithmetic with 120 digits; imported here, so that only the workers load it."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = 120
    return context


def complex_number(value: Value) -> Any:
    """Return a value as a complex number of 120 digits."""
    mp = arithmetic()
    return mp.mpc(mp.mpf(value.numerator) / value.denominator) if isinstance(value, Fraction) else mp.mpc(value)


def same(one: Value, other: Value) -> bool:
    """Tell whether two values are equal: exactly for fractions, else to 80 digits."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    a, b = complex_number(one), complex_number(other)
    return bool(abs(a - b) <= arithmetic().mpf(10) ** -80 * max(abs(a), abs(b), arithmetic().mpf(10) ** -20))


def bounded(value: Value) -> Value:
    """Return a value, or raise Unreadable if it is too big or not finite."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > _BITS:
            raise Unreadable("too big a number")
    elif not arithmetic().isfinite(value):
        raise Unreadable("no finite value")
    return value


def _exactly(function: Callable[[Any, Any], Any], one: Value, other: Value) -> Value:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return function(one, other)
    return function(complex_number(one), complex_number(other))


def add(one: Value, other: Value) -> Value:
    """Add two values."""
    return _exactly(operator.add, one, other)


def subtract(one: Value, other: Value) -> Value:
    """Subtract the second value from the first."""
    return _exactly(operator.sub, one, other)


def multiply(one: Value, other: Value) -> Value:
    """Multiply two values."""
    return _exactly(operator.mul, one, other)


def divide(one: Value, other: Value) -> Value:
    """Divide the first value by the second. Raises ZeroDivisionError."""
    return _exactly(operator.truediv, one, other)


def power(base: Value, exponent: Value) -> Value:
    """Raise a value to a power. Raises Unreadable if the result is too big, and for 0 to a power of 0 or below."""
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        bits = base.numerator.bit_length() + base.denominator.bit_length()
        if abs(exponent) * (bits - 1) > _BITS:
            raise Unreadable("too big a power")
        if base == 0 and exponent <= 0:
            raise Unreadable("a power of 0")
        return base ** int(exponent)
    mp = arithmetic()
    if base == 0:
        if mp.re(complex_number(exponent)) > 0:
            return Fraction(0)
        raise Unreadable("a power of 0")
    return _exponential(complex_number(exponent) * mp.log(complex_number(base)))


def _exponential(value: Any) -> Any:
    if abs(value) > 10**5:
        raise Unreadable("too big a power")
    return arithmetic().exp(value)


def root(value: Value, index: Value) -> Value:
    """Take the root with a whole index of a value; the real one for an odd index. Else it raises Unreadable."""
    if not isinstance(index, Fraction) or index.denominator != 1 or index < 1:
        raise Unreadable("a root that is no whole number")
    if isinstance(value, Fraction) and value < 0 and index % 2 == 1:
        return -complex_number(power(-value, 1 / index))
    return power(value, 1 / index)


def _real(value: Value) -> Any:
    """Return a real value, or raise Unreadable."""
    if isinstance(value, Fraction):
        return value
    if abs(value.imag) > arithmetic().mpf(10) ** -80 * (1 + abs(value)):
        raise Unreadable("not real")
    return value.real


def absolute(value: Value) -> Value:
    """Return the absolute value."""
    return abs(value) if isinstance(value, Fraction) else arithmetic().mpc(abs(value))


def floor(value: Value) -> Value:
    """Round a real value down. Raises Unreadable for one that is not real."""
    return Fraction(
        int(arithmetic().floor(real)) if not isinstance(real := _real(value), Fraction) else real.__floor__()
    )


def ceiling(value: Value) -> Value:
    """Round a real value up. Raises Unreadable for one that is not real."""
    return -floor(-value)


def factorial(value: Value) -> Value:
    """Return the factorial of a real value, by the gamma function if it is not whole. Raises Unreadable above 2000."""
    real = _real(value)
    if abs(real) > 2000:
        raise Unreadable("too big a factorial")
    whole = isinstance(real, Fraction) and real.denominator == 1
    if whole and real < 0:
        raise Unreadable("a factorial of a negative number")
    return (
        Fraction(math.factorial(int(real))) if whole else arithmetic().mpc(arithmetic().gamma(complex_number(real) + 1))
    )


def binomial(upper: Value, lower: Value) -> Value:
    """Return a binomial coefficient. Raises Unreadable for arguments above 2000."""
    if isinstance(upper, Fraction) and isinstance(lower, Fraction) and lower.denominator == 1 and 0 <= lower <= 200:
        result = Fraction(1)
        for number in range(int(lower)):
            result = bounded(result * (upper - number) / (number + 1))
        return result
    if max(abs(complex_number(upper)), abs(complex_number(lower))) > 2000:
        raise Unreadable("too big a binomial")
    return arithmetic().mpc(arithmetic().binomial(complex_number(upper), complex_number(lower)))


def call(name: str, value: Value) -> Value:
    """Return the value of a named function, such as `ln` or `sin`. Raises Unreadable for an unknown name."""
    mp = arithmetic()
    number = complex_number(value)
    if name == "exp":
        return _exponential(number)
    if abs(number) > 10**5:
        raise Unreadable("too big an argument")
    functions = {
        "ln": mp.log, "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "arccot": mp.acot,
        "arcsec": mp.asec, "arccsc": mp.acsc, "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "sec": mp.sec, "csc": mp.csc,
        "cot": mp.cot,
    }  # fmt: skip
    if name not in functions or (name == "ln" and number == 0):
        raise Unreadable(f"{name} has no value")
    return mp.mpc(functions[name](number))
