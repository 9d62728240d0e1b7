r"""Decide which answers a reference allows, by rules on the texts; single expressions are left to a comparison.

An answer is the text between the answer tags. One \boxed{} in it is unwrapped. All of it must be the answer, in final
form: nothing is looked for inside a text.

- If the reference is a number (bae.text.literals has the kinds), the answer must be a literal, too. It must not be
  something to work out (`2+3`, `2^3`, `10/2`, `\sqrt{25}`). Numbers are compared exactly. If a fraction has no finite
  decimal, a decimal of six or more places may stand for it, rounded or cut off; also for a constant such as 12\pi.
- A constant (with a radical, \pi or i) may be rearranged. It must not have more sums, powers or products of numbers
  than the reference, and no root if the reference has none. An expression with variables may have any form:
  expanded, factored, or as in the question.
- The only commands, functions, signs and words allowed are those of `_COMMON` and those of the reference: no \int,
  \sum, \binom or `!`. Only a literal \infty equals \infty.
- `x=5` answers 5, and no other equation does. `5` also answers the reference `x=5`, but `y=5` and `x+3=8` do not: a
  solved reference needs a solved answer. Only a curve or plane may be written as any multiple of its equation.
- Several variables are compared by name, or in the order of the reference: for x=1, y=2 neither `2,1` nor `\{1,2\}`.
- Tuples and intervals keep brackets and order. Lists and sets do not: they may have braces or none, and any order.
  Commas, `and` and `or` separate their items, and a \pm b is a list of two. `100,200` is one number, `100, 200` is
  two. An interval may be written as an inequality of one variable, and a union as several with `or` between them.
- Matrices are compared entry by entry; a factor before one is multiplied into it. Nothing else may be done to it.
- A ratio `a:b` is compared by value, but what may be a clock time (`3:45`) by its hours and minutes.
- The unit of the reference may be given or left out. If the reference has no unit, the answer may add one of the
  closed list in bae.text.units.
- A percentage equals the number without the sign, either as printed or divided by 100.
- A number in another base must have the digits and the base of the reference. The base cannot be left out.
- Text (`\text{east}`, `(C)`, a bare word) is compared as text, with or without \text and brackets. Only letters that
  stand alone, and names such as `ABCD`, keep their case.

The texts are hostile. No regular expression here takes more than linear time, and no function more than quadratic.
"""

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from bae.text.literals import close, is_scientific, is_small_power_of_ten, number
from bae.text.spelling import FUNCTIONS, GREEK, TOKEN, depths, split
from bae.text.units import measure, same_unit

Equal = Callable[[str, str], bool]
"""Compare an answer with a reference, where both are single expressions or relations: no numbers, lists or text."""

_words = str.split
_COMMON = {*_words(r"\frac \sqrt \cdot \pi \infty \pm \cup \le \ge \in \circ \vee \{ \}"), *" +-/^_=<>()[]{},;:.%$"}
_VARIABLE = rf"(?:[A-Za-df-hj-z]|\\(?:{'|'.join(GREEK)}) ?)(?:_[0-9A-Za-z]|_\{{[0-9A-Za-z]+\}})?"
_NAME = re.compile(rf"{_VARIABLE}(?:\([a-z]\))?=|\({_VARIABLE}(?:,{_VARIABLE})+\)=|{_VARIABLE}\\in ?(?=[(\[]|\\\{{)")
_INEQUALITY = re.compile(rf"(?:([^<>=]+?)(<|>|\\le ?|\\ge ?))?({_VARIABLE})(?:(<|>|\\le ?|\\ge ?)([^<>=]+))?")
_TEXT = re.compile(
    r"\(?\\text\{[^{}]*\}\)?|\(?(?:[A-Z]|[IVX]+)\)?|(?:[A-Za-z]{4,}|[A-Z][a-z]+)(?:[ -][A-Za-z]+)*|(?:yes|no|odd|all)"
)
_RATIO = re.compile(r"([^:]+)((?::[^:]+)+)")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?(?:\\text\{)? ?([AaPp]\.?[Mm]\.?)?\}?")
_MATRIX = re.compile(r"(.*?)(?:\\cdot ?)?\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def matches(answer: str, reference: str, equal: Equal) -> bool:
    """Tell whether an answer equals the reference and is in a form that may answer it.

    Args:
        answer, reference: as `bae.text.spelling.canonical` returns them.
        equal: compares two single expressions or relations. It is called only where the rules of this module leave
            open whether they are equal. Whatever it raises passes through.
    """
    if answer == reference:
        return True
    if ":" in reference:
        return _same_ratio(answer, reference, equal)
    if _TEXT.fullmatch(reference):
        return _same_text(answer, reference)
    solved, wanted_solved = _solved(answer), _solved(reference)
    if solved or wanted_solved:
        return _same_set(answer, reference, solved, wanted_solved, equal)
    assigned, wanted_assigned = _assigned(answer), _assigned(reference)
    if assigned or wanted_assigned:
        return _same_assignments(answer, reference, assigned, wanted_assigned, equal)
    (kind, items), (wanted_kind, wanted) = _structure(answer), _structure(reference)
    if not kind and not wanted_kind and "=" in reference + answer:
        return _same_equation(answer, reference, equal)
    name, wanted_name = _name(answer), _name(reference)
    if name or wanted_name:  # before a tuple, an interval or a list
        bare, wanted_bare = answer[len(name) :], reference[len(wanted_name) :]
        agree = not name or not wanted_name or _variable(name) == _variable(wanted_name)
        if agree and "=" not in bare + wanted_bare:
            return matches(bare, wanted_bare, equal)
    if kind != wanted_kind or len(items) != len(wanted):
        return False
    if not kind:
        return _same_value(items[0], wanted[0], equal)
    if kind not in ("{}", "union"):
        return all(matches(item, other, equal) for item, other in zip(items, wanted, strict=True))
    if len({name for item in items if (name := _name(item))}) > 1:
        return False
    for item in items:
        other = next((other for other in wanted if matches(item, other, equal)), None)
        if other is None:
            return False
        wanted.remove(other)
    return True


def readable(answer: str, reference: str) -> bool:
    """Tell whether a canonical answer has nothing foreign in it, such as prose or an integral sign.

    Args:
        answer, reference: as `bae.text.spelling.canonical` returns them.
    """
    value, _ = measure(answer)
    return bool(_TEXT.fullmatch(reference)) or (value != "" and _known(value, reference))


def _name(text: str) -> str:
    r"""Return the name before a value, as in `x=5`, `x\in[-2,7]`, `(x,y)=(1,2)`; "" if there is none."""
    match = _NAME.match(text)
    return match[0] if match else ""


def _variable(name: str) -> str:
    return name.removesuffix("=").strip().removesuffix(r"\in").strip()


# Text


def _same_text(answer: str, reference: str) -> bool:
    """Compare plain text. Case counts only in single letters, and in words that may be products of variables."""
    given, wanted = _plain(answer), _plain(reference)
    if given == wanted:
        return True
    word = r"\text" in reference or re.fullmatch("(?:[A-Za-z][a-z]+(?:[ -]|$))+", wanted)
    return bool(word) and len(wanted) > 1 and given.casefold() == wanted.casefold()


def _plain(text: str) -> str:
    r"""Strip \text, brackets and full stops from plain text."""
    text = re.sub(r"(?<!\.)\.$", "", text.replace(r"\text", "").strip("(){} "))
    return re.sub(" +", " ", text)


# Ratios and times


def _same_ratio(answer: str, reference: str, equal: Equal) -> bool:
    """Compare clock times, which need the same hours and minutes, or ratios, which need the same value."""
    answer = re.sub(r"(?<=[0-9]) ?(?:\\text\{)? ?to ?\}? ?(?=[0-9])", ":", answer)
    times = _CLOCK.fullmatch(answer), _CLOCK.fullmatch(reference)
    if times[1]:
        return bool(times[0]) and _same_time(*times)  # type: ignore[arg-type]
    parts, wanted = answer.split(":"), reference.split(":")
    if (
        len(parts) == 1
        and len(wanted) == 2
        and (match := re.fullmatch(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|([^/]+)/([^/]+)", answer))
    ):
        parts = [group for group in match.groups() if group]
    if len(parts) != len(wanted) or not all(_known(part, reference) and part for part in parts):
        return False
    if not all(_in_form(part, other) for part, other in zip(parts, wanted, strict=True)):
        return False
    return all(
        equal(f"({part})({wanted[0]})", f"({other})({parts[0]})") for part, other in zip(parts, wanted, strict=True)
    )


def _same_time(time: re.Match[str], wanted: re.Match[str]) -> bool:
    """Compare two clock times by value; am and pm may be left out, and seconds if there are none."""
    halves = [match[4] and match[4][0].lower() for match in (time, wanted)]
    values = [[int(part or 0) for part in match.groups()[:3]] for match in (time, wanted)]
    by_day = [
        [value[0] % 12 + 12 * (half == "p") if half else value[0], *value[1:]]
        for value, half in zip(values, halves, strict=True)
    ]
    return by_day[0] == by_day[1] or (None in halves and values[0] == values[1])


# Relations


def _solved(text: str) -> tuple[str, str] | None:
    r"""Return the variable of a solved inequality and the set it describes: ("x", "(2,\infty)") for `x>2`.

    Several with `or` between them describe a union. None is returned if the variable is not alone on its side.
    """
    found = [_INEQUALITY.fullmatch(part) for part in split(text, r"\vee")]
    if not all(match and (match[2] or match[4]) for match in found):
        return None
    names = {match[3] for match in found if match}
    sets = [_interval(match) for match in found if match]
    if len(names) != 1 or None in sets:
        return None
    return names.pop(), r"\cup".join(filter(None, sets))


def _interval(match: re.Match[str]) -> str | None:
    """Return the interval of an inequality, or None if its two signs point in different directions."""
    before, sign, _, other_sign, after = match.groups()
    bounds: dict[str, tuple[str, str]] = {}
    for bound, relation, upper in ((before, sign, ">"), (after, other_sign, "<")):
        if relation is None:
            continue
        if _letters(bound):
            return None
        relation = relation.strip()
        is_upper = relation in (upper, r"\le" if upper == "<" else r"\ge")
        side = "upper" if is_upper else "lower"
        if side in bounds:
            return None
        closed = relation.startswith("\\")
        bounds[side] = (bound, "]" if closed and is_upper else "[" if closed else ")" if is_upper else "(")
    lower, left = bounds.get("lower", (r"-\infty", "("))
    upper_bound, right = bounds.get("upper", (r"\infty", ")"))
    return f"{left}{lower},{upper_bound}{right}"


def _same_set(
    answer: str, reference: str, solved: tuple[str, str] | None, wanted: tuple[str, str] | None, equal: Equal
) -> bool:
    """Compare where at least one text is a solved inequality."""
    if solved and wanted:
        return solved[0] == wanted[0] and matches(solved[1], wanted[1], equal)
    if solved:
        name = _name(reference)
        same_name = not name or name == f"{solved[0]}\\in" or name == f"{solved[0]}\\in "
        return same_name and "=" not in reference[len(name) :] and matches(solved[1], reference[len(name) :], equal)
    assert wanted
    name = _name(answer)
    same_name = not name or name.strip() == f"{wanted[0]}\\in"
    return (
        same_name
        and _structure(answer[len(name) :])[0] not in ("", "{}")
        and matches(answer[len(name) :], wanted[1], equal)
    )


def _assigned(text: str) -> list[tuple[str, str]] | None:
    """Return the names and values of two or more variables, in order; None if the text is nothing of the kind."""
    if r"\vee" in text:
        return None
    name = _name(text)
    if name.startswith("("):
        kind, values = _structure(text[len(name) :])
        names = name[1:-2].split(",")
        pairs = list(zip(names, values, strict=False)) if kind == "()" and len(names) == len(values) else []
    else:
        _, items = _structure(text)
        found = [(item, _name(item)) for item in items]
        pairs = [(name[:-1], item[len(name) :]) for item, name in found if name.endswith("=")]
        if len(pairs) < len(items):
            return None
    return pairs if len(pairs) > 1 and len({name for name, _ in pairs}) == len(pairs) else None


def _same_assignments(
    answer: str,
    reference: str,
    assigned: list[tuple[str, str]] | None,
    wanted: list[tuple[str, str]] | None,
    equal: Equal,
) -> bool:
    """Compare where at least one text gives values to several variables."""
    if assigned and wanted:
        given, named = dict(assigned), dict(wanted)
        return given.keys() == named.keys() and all(matches(given[name], named[name], equal) for name in named)
    if assigned:
        kind, items = _structure(reference)
        values = [value for _, value in _in_order(assigned)]
    else:
        assert wanted
        kind, values = _structure(answer)
        items = [value for _, value in wanted]
    if any("=" in item for item in (values if wanted else items)):
        return False
    if kind not in ("()", "{}") or answer.startswith(r"\{") or reference.startswith(r"\{") or len(values) != len(items):
        return False
    return all(matches(value, item, equal) for value, item in zip(values, items, strict=True))


def _in_order(assigned: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sort assignments by name if the names are letters, since (x,y) is the order of a point; else leave them."""
    return sorted(assigned) if all(name[0].isalpha() for name, _ in assigned) else assigned


def _same_equation(answer: str, reference: str, equal: Equal) -> bool:
    """Compare where at least one of two single texts has an equals sign."""
    name, wanted_name = _name(answer), _name(reference)
    bare, wanted = answer[len(name) :], reference[len(wanted_name) :]
    if "=" in wanted or (not wanted_name and "=" in reference):  # an equation that is not solved
        return (
            answer.count("=") == reference.count("=") == 1 and _in_form(answer, reference) and equal(answer, reference)
        )
    if wanted_name:
        if name == wanted_name or "=" not in answer:
            return "=" not in bare and matches(bare, wanted, equal)
        curve = wanted_name == "y=" and bool(re.search("x", wanted))
        return curve and answer.count("=") == 1 and _in_form(answer, reference) and equal(answer, reference)
    letters = set(re.findall(r"\\[a-z]+|[A-Za-z]", bare))
    return bool(name) and "=" not in bare and name[:-1].strip() not in letters and matches(bare, reference, equal)


# Values


def _structure(text: str) -> tuple[str, list[str]]:
    """Return the kind of a text and its parts.

    The kind is "" for a single value, "{}" for a list or set, "union", or the brackets of a tuple or interval: "(]".
    """
    if len(sets := split(text, r"\cup")) > 1:
        return "union", sets
    kind, inner = "", text
    brackets = [depth for _, depth in depths(text)]
    if len(brackets) > 1 and brackets.index(0) == len(brackets) - 1 and text[-1] in ")]}":  # brackets around all of it
        width = 1 + text.startswith("\\")
        kind, inner = text[width - 1] + text[-1], text[width:-width]
    items = split(inner, ",", ";", r"\vee")
    if len(items) == 1 and kind in ("()", "{}") and not text.startswith("\\"):  # brackets that only group
        return _structure(inner)
    if kind in ("", "{}"):
        items = [item.replace(r"\pm", sign) for item in items for sign in ("+-" if r"\pm" in item else "+")]
        kind = "{}" if kind or len(items) > 1 else ""
    return kind, items


def _same_value(answer: str, reference: str, equal: Equal) -> bool:
    """Tell whether two single values agree in number base and unit, and then as numbers or as expressions."""
    if re.search("[0-9]_", answer + reference):
        return answer == reference
    (value, unit), (wanted, wanted_unit) = measure(answer), measure(reference)
    if not same_unit(unit, wanted_unit):
        return False
    if r"\begin" in wanted:
        return _same_matrix(value, wanted, equal)
    if r"\infty" in value + wanted:
        return answer.removeprefix("+") == reference.removeprefix("+")
    found, wanted_number = number(value), number(wanted)
    if wanted_number is None:
        return _in_form(value, wanted) and equal(value, wanted)
    if found is None or (is_small_power_of_ten(value) and not is_scientific(wanted)):
        return False
    parts = _hundredth(*found, unit), _hundredth(*wanted_number, wanted_unit)
    return close(*found, *wanted_number) or (unit != wanted_unit and close(*parts[0], *parts[1]))


def _same_matrix(answer: str, reference: str, equal: Equal) -> bool:
    """Compare matrices entry by entry, with the factors before them multiplied in."""
    found, wanted = _MATRIX.fullmatch(answer), _MATRIX.fullmatch(reference)
    if not found or not wanted or r"\begin" in found[2] + wanted[2] or (found[1] and not wanted[1]):
        return False
    rows, wanted_rows = (
        [row.split("&") for row in match[2].removesuffix("\\\\").split("\\\\")] for match in (found, wanted)
    )
    if [len(row) for row in rows] != [len(row) for row in wanted_rows]:
        return False
    pairs = [
        (a, b) for row, wanted_row in zip(rows, wanted_rows, strict=True) for a, b in zip(row, wanted_row, strict=True)
    ]
    if not found[1] and not wanted[1]:
        return all(_same_value(a, b, equal) for a, b in pairs)
    factor, wanted_factor = ({"": "1", "-": "-1"}.get(match[1], match[1]) for match in (found, wanted))
    return all(equal(f"({factor})({a})", f"({wanted_factor})({b})") for a, b in pairs)


def _hundredth(value: Fraction, places: int, unit: str) -> tuple[Fraction, int]:
    """Divide a percentage by 100, and count its decimal places anew; leave other numbers as they are."""
    return (value / 100, places and places + 2) if unit == "%" else (value, places)


def _in_form(answer: str, reference: str) -> bool:
    """Tell whether an expression has nothing foreign in it, and no more operations than the reference."""
    return _known(answer, reference) and (bool(_letters(reference)) or _operations(answer) <= _operations(reference))


def _letters(text: str) -> str:
    """Return the letters of a text that are variables: not those of commands, nor i and e."""
    text = re.sub(rf"\\({'|'.join(GREEK)})(?![a-z])", "x", text)
    return re.sub(r"\\(?:begin|end|text)\{[^{}]*\}|\\[A-Za-z]+|[^A-Za-z]|[ie]", "", text)


def _known(text: str, reference: str) -> bool:
    """Tell whether each token is common to answers, or appears in the reference, or is a digit or a letter."""
    tokens = set(TOKEN.findall(reference))
    known = _COMMON | tokens | (set(FUNCTIONS) if tokens & set(FUNCTIONS) else set())
    letters = {letter for token in tokens if token.isalpha() for letter in token}

    def ordinary(token: str) -> bool:
        return token.isascii() and token.isalnum() and (len(token) == 1 or token.isdigit() or letters.issuperset(token))

    return all(token in known or ordinary(token) for token in TOKEN.findall(text))


def _operations(text: str) -> Counter[str]:
    """Count the operations on numbers by kind; roots count at most once."""
    powers = re.findall(r"\^(?:\{([^{}]*/|\\frac))?", text)
    return Counter(
        sums=len(re.findall(r"(?<=[A-Za-z0-9.)}])(?<!pmatrix\})[+-]|\\pm", text)),
        roots=r"\sqrt" in text or any(powers),
        powers=powers.count(""),
        products=len(re.findall(r"[0-9]\)?(?:\\cdot-?[0-9]|(?:\\cdot)?\(-?[0-9.]+\))", text)),
    )
