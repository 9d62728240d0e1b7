r"""Read a mathematical expression, all of it, and tell whether two expressions are equal.

The reader knows one small grammar: numbers, one-letter variables with indices, Greek letters, `+ - \cdot /`, products
without a sign, powers, roots, fractions, functions, absolute values, floors, binomials and factorials. A text that is
not in the grammar from its first to its last character is `Unreadable`, and so is one that is read in two ways, such
as `\sin x/2`. Case matters: n is not N. `e` and `i` are the constants.

Two expressions are equal if they have the same variables and the same values at points drawn at random: exactly where
the values are fractions, else to 80 of 120 digits. An expression that is a fixed rational number beyond 6000 digits is
`Unreadable`. So no text takes long: nothing is expanded, simplified or solved.
"""

import random
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from bae.text.spelling import FUNCTIONS, GREEK, TOKEN
from bae.text.values import (
    Unreadable,
    Value,
    absolute,
    add,
    arithmetic,
    binomial,
    bounded,
    call,
    ceiling,
    complex_number,
    divide,
    factorial,
    floor,
    multiply,
    power,
    root,
    same,
    subtract,
)

Point = dict[str, Fraction]
Node = Callable[[Point], Value]

_DEPTH = 40
_RELATION = re.compile(r"(=|<|>|\\le|\\ge)(?![A-Za-z])")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
_LETTERS = {f"\\{name}" for name in GREEK} | {r"\ell"}
_STARTS = {"(", "[", r"\frac", r"\sqrt", r"\binom", r"\pi", r"\lfloor", r"\lceil", *FUNCTIONS, *_LETTERS}


class Expression:
    """Hold an expression that was read whole.

    Args:
        text: as `bae.text.spelling.canonical` returns it.

    Raises:
        Unreadable: if any part of the text is not in the grammar.
    """

    def __init__(self, text: str) -> None:
        self._tokens = [part for token in TOKEN.findall(text) for part in _parts(token) if part != " "]
        self._next = 0
        self._depth = 0
        self.names: set[str] = set()
        self._node = self._sum()
        if self._peek():
            raise Unreadable(f"{self._peek()!r} is left over in {text!r}")

    def at(self, point: Point) -> Value:
        """Return the value at a point. Raises Unreadable if it has none, or is too big."""
        try:
            return self._node(point)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise Unreadable(str(error)) from error

    # The grammar, one method a rule

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if not token or (wanted and token not in wanted):
            raise Unreadable(f"{token or 'the end'!r} where {' or '.join(wanted) or 'more'} should be")
        self._next += 1
        return token

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > _DEPTH:
            raise Unreadable("too deep")
        node = self._signed(self._product)
        while self._peek() in ("+", "-"):
            node = _apply(add if self._take() == "+" else subtract, node, self._product())
        self._depth -= 1
        return node

    def _signed(self, rule: Callable[[], Node]) -> Node:
        if self._peek() in ("+", "-") and self._take() == "-":
            return _apply(subtract, _constant(Fraction(0)), rule())
        return rule()

    def _product(self) -> Node:
        node = self._power()
        while True:
            token = self._peek()
            if token in (r"\cdot", "/"):
                node = _apply(multiply if self._take() == r"\cdot" else divide, node, self._signed(self._power))
            elif token in _STARTS or token == "{" or (token.isascii() and token.isalpha()):
                node = _apply(multiply, node, self._power())
            else:
                return node

    def _power(self) -> Node:
        base = self._primary()
        while self._peek() == "!":
            self._take()
            base = _apply(factorial, base)
        if self._peek() != "^":
            return base
        node = _apply(power, base, self._script())
        if self._peek() in ("^", "!"):
            raise Unreadable("two powers, one above the other")
        return node

    def _script(self) -> Node:
        self._take("^", "_")
        return self._bracketed("{") if self._peek() == "{" else self._signed(self._primary)

    def _argument(self) -> Node:
        """Read the argument of a command: a group, or without braces one sign as in TeX."""
        if _is_digits(token := self._peek()) and len(token) > 1:
            self._tokens[self._next : self._next + 1] = [token[0], token[1:]]
            return self._literal(self._take())
        return self._bracketed("{") if token == "{" else self._primary()

    def _bracketed(self, *opening: str) -> Node:
        closing = _CLOSING[self._take(*opening)]
        node = self._sum()
        self._take(closing)
        return node

    def _primary(self) -> Node:
        token = self._peek()
        if token in _CLOSING:
            return self._enclosed(token)
        if token in FUNCTIONS:
            return self._function()
        self._take()
        if _is_digits(token) or token == ".":
            return self._literal(token)
        if token == r"\pi":
            return lambda _: +arithmetic().pi
        if token == "e" and self._peek() != "_":
            return lambda _: +arithmetic().e
        if token == "i" and self._peek() != "_":
            return _constant(arithmetic().mpc(0, 1))
        if token == r"\frac":
            return _apply(divide, self._argument(), self._argument())
        if token == r"\binom":
            return _apply(binomial, self._argument(), self._argument())
        if token == r"\sqrt":
            index = self._bracketed("[") if self._peek() == "[" else _constant(Fraction(2))
            return _apply(root, self._argument(), index)
        if token in _LETTERS or (token.isascii() and token.isalpha() and len(token) == 1):
            return self._variable(token)
        raise Unreadable(f"{token!r} in an expression")

    def _enclosed(self, token: str) -> Node:
        node = self._bracketed(token)
        rounding = {"|": absolute, r"\lfloor": floor, r"\lceil": ceiling}.get(token)
        return _apply(rounding, node) if rounding else node

    def _literal(self, token: str) -> Node:
        text = token
        if token != "." and self._peek() == ".":
            text += self._take()
        if text.endswith(".") and _is_digits(self._peek()):
            text += self._take()
        if text == ".":
            raise Unreadable("a point without digits")
        value = Fraction(text)
        ahead = self._tokens[self._next : self._next + 7]
        is_fraction = ahead[::3] == [r"\frac", "}", "}"] and ahead[1::3] == ["{", "{"]
        if is_fraction and "." not in text and all(map(_is_digits, ahead[2::3])):  # a mixed number
            self._next += 7
            value += Fraction(int(ahead[2]), int(ahead[5]))
        return _constant(value)

    def _variable(self, token: str) -> Node:
        if self._peek() == "_":
            self._take()
            index = [self._take()]
            while index[0] == "{" and index[-1] != "}":
                index.append(self._take())
            name = "".join(index).strip("{}")
            if not name.isascii() or not name.isalnum():
                raise Unreadable(f"{name!r} as an index")
            token += f"_{name}"
        self.names.add(token)
        return lambda point: point[token]

    def _function(self) -> Node:
        name = self._take().removeprefix("\\")
        base = self._script() if name == "log" and self._peek() == "_" else None
        exponent = self._script() if self._peek() == "^" else None
        bracketed = self._peek() in ("(", "{", "[")
        argument = self._bracketed(self._peek()) if bracketed else self._plain_argument()
        inverse = exponent is not None and _is_minus_one(exponent)
        if inverse and not name.startswith("arc"):
            name, exponent = f"arc{name}", None
        node = _apply(lambda x: call("ln" if name == "log" else name, x), argument)
        if name == "log":
            node = _apply(divide, node, _apply(lambda x: call("ln", x), base or _constant(Fraction(10))))
        return node if exponent is None else _apply(power, node, exponent)

    def _plain_argument(self) -> Node:
        """Read an argument without brackets: a product up to the next sign or function."""
        node = self._signed(self._power)
        while (token := self._peek()) in _LETTERS | {r"\pi", r"\frac", r"\sqrt"} or (
            token.isascii() and token.isalpha()
        ):
            node = _apply(multiply, node, self._power())
        if token in ("/", "(", "[", "{"):
            raise Unreadable(f"the argument of a function before {token!r} is not clear")
        return node


def _is_digits(token: str) -> bool:
    return token.isascii() and token.isdigit()


def _parts(token: str) -> list[str]:
    return list(token) if token.isalpha() else [token]


_read = lru_cache(maxsize=1024)(Expression)  # an answer is compared with several others


def equal(answer: str, reference: str) -> bool:
    """Tell whether two expressions, or two relations of one sign, are equal.

    Args:
        answer, reference: as `bae.text.spelling.canonical` returns them.

    Raises:
        Unreadable: if the answer is not in the grammar. A reference that is not in it equals nothing.
    """
    found, wanted = (_RELATION.split(text) for text in (answer, reference))
    if len(wanted) == len(found) == 3:
        (left, sign, right), (wanted_left, wanted_sign, wanted_right) = found, wanted
        if _FLIPPED.get(sign, sign) == wanted_sign:
            left, right, sign = right, left, wanted_sign
        return sign == wanted_sign and _equal_relations(
            (left, right), (wanted_left, wanted_right), positive=sign != "="
        )
    return len(wanted) == len(found) == 1 and _equal_values(answer, reference)


def _equal_values(answer: str, reference: str) -> bool:
    """Tell whether two expressions are equal. Raises Unreadable for the answer only."""
    found, wanted = _read(answer), _reference(reference)
    if wanted is None or found.names != wanted.names:
        return False
    values = _values([wanted, found], "i" in reference)
    if not found.names and (decimal := re.fullmatch(r"[+-]?[0-9]*\.([0-9]{6,})", answer)):
        return any(_rounded(wanted, Fraction(answer), len(decimal[1])) for wanted, _ in values)
    return bool(values) and all(same(one, other) for one, other in values)


def _rounded(value: Value, decimal: Fraction, places: int) -> bool:
    """Tell whether a decimal is the value, rounded or cut off."""
    difference = complex_number(value) - complex_number(decimal)
    off = abs(difference) * 10**places
    towards_zero = arithmetic().re(difference) * (1 if decimal > 0 else -1) >= 0
    return bool(off <= 0.5 or (off < 1 and towards_zero))


def _equal_relations(answer: tuple[str, str], reference: tuple[str, str], positive: bool) -> bool:
    """Tell whether two relations `left = right` say the same: their differences have a constant ratio.

    Args:
        answer, reference: the left and right sides.
        positive: the ratio must be positive, as for inequalities.

    Raises:
        Unreadable: if a side of the answer is no expression.
    """
    sides = [_read(side) for side in answer]
    wanted = [_reference(side) for side in reference]
    known = [side for side in wanted if side is not None]
    if len(known) < 2 or set.union(*(side.names for side in sides)) != set.union(*(side.names for side in known)):
        return False
    differences = [
        (subtract(a, b), subtract(c, d)) for a, b, c, d in _values([*known, *sides], "i" in "".join(reference))
    ]
    if len(differences) < 3 or any(same(one, Fraction(0)) or same(other, Fraction(0)) for one, other in differences):
        return False
    ratios = [divide(one, other) for one, other in differences]
    return all(same(ratio, ratios[0]) for ratio in ratios) and (
        not positive or arithmetic().re(complex_number(ratios[0])) > 0
    )


def _reference(text: str) -> Expression | None:
    try:
        return _read(text)
    except ValueError:
        return None


def _values(expressions: list[Expression], is_complex: bool) -> list[list[Value]]:
    """Return the values at random points where the first expression has one, and a real one if some are real.

    Raises Unreadable if another expression has no value there.
    """
    names = sorted(set.union(*(expression.names for expression in expressions)))
    draw = random.Random(0)
    rows, real = [], []
    for number in range(12 if names else 1):
        sign = (1,) if number < 6 else (1, -1)
        point = {
            name: Fraction(draw.choice(sign) * draw.randint(10, 180), draw.choice((53, 59, 61, 67))) for name in names
        }
        try:
            first = expressions[0].at(point)
        except Unreadable:
            continue
        rows.append((point, first))
        if isinstance(first, Fraction) or abs(first.imag) <= arithmetic().mpf(10) ** -80 * abs(first):
            real.append((point, first))
    chosen = real if len(real) >= 3 and not is_complex else rows
    return [[first, *(expression.at(point) for expression in expressions[1:])] for point, first in chosen]


def _constant(value: Value) -> Node:
    return lambda _: value


def _is_minus_one(node: Node) -> bool:
    try:
        return bool(node({}) == -1)
    except KeyError:  # it has variables
        return False


def _apply(function: Callable[..., Value], *nodes: Node) -> Node:
    return lambda point: bounded(function(*(node(point) for node in nodes)))
