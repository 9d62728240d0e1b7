r"""Read answers as text, and decide which forms may equal a reference, before any computer algebra.

An answer is the text between the answer tags. One \boxed{} in it is unwrapped. It must be in final form:

- If the reference is a number (integer, decimal, fraction, mixed number, percentage, money), the answer must be a
  literal of one of these kinds or in scientific notation. It must not be something to work out (`2+3`, `2^3`,
  `10/2`, `\sqrt{25}`). Numbers are compared exactly. If a fraction has no finite decimal, a decimal of six or more
  places may stand for it, rounded or cut off.
- A constant (with a radical, \pi or i) may be rearranged. It must not have more sums, powers or products of numbers
  than the reference, and no root if the reference has none. An expression with variables may have any form:
  expanded, factored, or as in the question.
- The only commands, functions, signs and words allowed are those of `_COMMON` and those of the reference: no \int,
  \sum, \binom or `!`.
- `x=5` answers 5, and no other equation does. `5` also answers the reference `x=5`, but `y=5` does not.
- Tuples and intervals keep brackets and order. Lists and sets do not: they may have braces or none, and any order.
  Commas, `and` and `or` separate their items, and a \pm b is a list of two. `100,200` is one number, `100, 200` is
  two.
- The unit of the reference may be given or left out. If the reference has no unit, the answer may add one that
  `_is_unit` knows.
- A percentage equals the number without the sign, either as printed or divided by 100.
- A number in another base must have the digits and the base of the reference. The base cannot be left out.
- Text (`\text{east}`, `(C)`, a bare word) is compared as text, including case, with or without \text and brackets.

The texts are hostile. No regular expression here takes more than linear time, and no function more than quadratic.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

Equal = Callable[[str, str], bool]
"""Compare an answer with a reference, where both are single expressions: not numbers, lists or plain text."""

_words = str.split
_FUNCTIONS = _words(r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \log \ln \exp")
_SPELLINGS = {
    token: spelling
    for spelling, tokens in {
        "": r"\left \right \displaystyle \! \, \; \: \( \) \[ \]", " ": r"\quad ~",
        "-": "− – ‐", r"\cdot ": r"\times * × · ⋅", "/": r"\div ÷ ⁄ ∕", r"\pm ": "±",  # noqa: RUF001
        r"\frac": r"\dfrac \tfrac \cfrac", r"\sqrt ": "sqrt √", r"\pi ": "pi π", r"\theta ": "θ",
        r"\infty ": "infinity inf ∞", r"\le ": r"\leq ≤", r"\ge ": r"\geq ≥", r"\in ": "∈", r"\cup ": "∪",  # noqa: RUF001
        r"\{": r"\lbrace", r"\}": r"\rbrace", "pmatrix": "bmatrix", ";": "and or",
        r"^\circ ": r"° \degree", "%": r"\% percent", "$": r"\$",
        r"\text": r"\mbox \mathrm \mathbf \textbf \textrm \textit \operatorname",
        **{f"{function} ": function[1:] for function in _FUNCTIONS},
    }.items()
    for token in tokens.split()
} | {"\\ ": " "}  # fmt: skip
_COMMON = {*_words(r"\frac \sqrt \cdot \pi \infty \pm \cup \le \ge \in \circ \{ \}"), *" +-/^_=<>()[]{},;.%$"}
_SHORT_UNITS = _words("mm cm m km in ft yd mi mg g kg lb lbs oz l ml s hr hrs h mph")
_NO_UNITS = _words(  # words that change the value of the number before them
    "not none base plus minus times over choose squared cubed factorial root half halves third thirds quarter quarters "
    "fourth fourths fifth fifths tenth tenths dozen dozens score hundred hundreds thousand thousands million millions "
    "billion billions trillion double twice triple more less about false wrong abc per mod"
)

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]+|[0-9]+|.", re.DOTALL)
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_[0-9a-z])?(?:\([a-z]\))?=|\([a-z](?:,[a-z])+\)=|[A-Za-z]\\in ?")
_DECIMAL = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:(?:\\cdot10\^|e)\{?([+-]?[0-9]{1,3})\}?)?")
_FRACTION = re.compile(r"([+-]?)(?:([0-9]+) ?)?\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}")
_TEXT = re.compile(r"\(?\\text\{[^{}]*\}\)?|\(?[A-Z]\)?|[A-Za-z]{4,}(?: [A-Za-z]+)*")
_UNIT = re.compile(
    r"(?:\\text\{([^{}]*)\}|(?<![\\A-Za-z])((?:(?:square|cubic) )?[A-Za-z]{2,}(?:(?: per |/)[A-Za-z]+)?))(\^[23])?$"
)


def canonical(text: str) -> str | None:
    r"""Return one spelling for texts that differ only in Unicode, LaTeX dialect, white space, delimiters or a box.

    Args:
        text: an answer or a reference, as written.

    Returns:
        The canonical spelling, or None if the text cannot be an answer: it is blank, its brackets do not match, or
        it has more than one box.
    """
    text = _ascii(text)
    before, *boxed = re.split(r"\\(?:boxed|fbox) ?(?={)", text)
    if len(boxed) > 1 or not _balanced(text):
        return None
    if boxed:
        end = 0
        for token, depth in _depths(boxed[0]):
            end += len(token)
            if depth == 0:
                break
        text = f"{before} {boxed[0][1 : end - 1]} {boxed[0][end:]}"
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # math delimiters come in pairs; an odd one is a dollar sign
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"(?:\{,\}|,\\! ?)(?=[0-9]{3})", "", text)
    text = "".join(_SPELLINGS.get(token, token) for token in _TOKEN.findall(text))
    if not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"\\text ?\{ ?([;%]|[0-9.]*) ?\}", r"\1", re.sub(" +", " ", text))
    # Keep a space only between two letters and between two digits: `\cot x`, `1 1/2`.
    text = re.sub(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) |(?<=[A-Za-z]) (?=[0-9])|(?<=[0-9]) (?=[A-Za-z])", "", text)
    text = re.sub(r"\\frac([0-9])", r"\\frac{\1}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})([0-9])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\sqrt\(([^()]*)\)|\\sqrt ?([0-9a-z])", r"\\sqrt{\1\2}", text)
    text = re.sub(r"([_^])\{([0-9a-z]|\\circ)\}", r"\1\2", text)
    text = re.sub(",?;", ";", text).strip(" ").rstrip(" .")
    return text if text and _balanced(text) else None


def _ascii(text: str) -> str:
    """Apply Unicode's NFKC, but keep the meaning of ½, ², ₈ and √13, and unify ASCII spellings and white space."""

    def plain(match: re.Match[str]) -> str:
        return unicodedata.normalize("NFKC", match[0])

    text = re.sub("[⁺⁻⁰¹²³⁴-⁹]+", lambda match: f"^{{{plain(match)}}}", text)
    text = re.sub("[₀-₉]+", lambda match: f"_{{{plain(match)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: r"\frac{{{}}}{{{}}}".format(*re.split(r"\D", plain(match))), text)
    text = re.sub(r"(?:√|(?<![\\A-Za-z])sqrt) ?([0-9]+)", r"\\sqrt{\1}", text)
    text = unicodedata.normalize("NFKC", text).replace("<=", r"\le ").replace(">=", r"\ge ").replace("**", "^")
    return re.sub(r"\s+", " ", text)


def _depths(text: str) -> Iterator[tuple[str, int]]:
    """Yield each token with the number of brackets that are open after it."""
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token[-1] in "([{") - (token[-1] in ")]}")
        yield token, depth


def _balanced(text: str) -> bool:
    """Tell whether brackets match. A round one may close a square one, as in an interval."""
    opened: list[bool] = []  # for each open bracket, whether it is a brace
    for token in _TOKEN.findall(text):
        if token[-1] in "([{":
            opened.append(token[-1] == "{")
        elif token[-1] in ")]}" and (not opened or opened.pop() != (token[-1] == "}")):
            return False
    return not opened


def _split(text: str, *separators: str) -> list[str]:
    """Return the parts between those separators that stand outside all brackets."""
    parts = [""]
    for token, depth in _depths(text):
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def matches(answer: str, reference: str, equal: Equal) -> bool:
    """Tell whether an answer equals the reference and is in a form that may answer it.

    Args:
        answer, reference: as `canonical` returns them.
        equal: compares two single expressions, for instance with computer algebra. It is called only for expressions
            that the rules of this module leave open. Whatever it raises passes through.
    """
    if _TEXT.fullmatch(reference):
        return _text(answer) == _text(reference)
    (kind, items), (wanted_kind, wanted) = _structure(answer), _structure(reference)
    name, wanted_name = _name(answer) if not kind else "", _name(reference) if not wanted_kind else ""
    bare, wanted_bare = answer[len(name) :], reference[len(wanted_name) :]
    if name + wanted_name and "=" not in bare + wanted_bare:
        return (name == wanted_name or not name or not wanted_name) and matches(bare, wanted_bare, equal)
    if kind != wanted_kind:  # the only exception: an interval may be written as an inequality
        inequality = any(sign in answer + reference for sign in ("<", ">", r"\le", r"\ge"))
        return inequality and _in_form(answer, reference) and equal(answer, reference)
    if len(items) != len(wanted):
        return False
    if not kind:
        return _same_value(items[0], wanted[0], equal)
    if kind not in ("{}", "union"):
        return all(matches(item, other, equal) for item, other in zip(items, wanted, strict=True))
    for item in items:
        other = next((other for other in wanted if matches(item, other, equal)), None)
        if other is None:
            return False
        wanted.remove(other)
    return True


def readable(answer: str, reference: str) -> bool:
    """Tell whether a canonical answer has nothing foreign in it, such as prose or an integral sign.

    Args:
        answer, reference: as `canonical` returns them.
    """
    value, _ = _measure(answer)
    return bool(_TEXT.fullmatch(reference)) or (value != "" and _known(value, reference))


def _name(text: str) -> str:
    r"""Return the name before a value, as in `x=5`, `x\in[-2,7]`, `(x,y)=(1,2)`; "" if there is none."""
    match = _NAME.match(text)
    return match[0] if match else ""


def _text(text: str) -> str:
    r"""Strip \text, brackets and full stops from plain text."""
    return text.replace(r"\text", "").strip("(){} .")


def _structure(text: str) -> tuple[str, list[str]]:
    """Return the kind of a text and its parts.

    The kind is "" for a single value, "{}" for a list or set, "union", or the brackets of a tuple or interval: "(]".
    """
    if len(sets := _split(text, r"\cup")) > 1:
        return "union", sets
    kind, inner = "", text
    depths = [depth for _, depth in _depths(text)]
    if len(depths) > 1 and depths.index(0) == len(depths) - 1:  # brackets around all of it
        width = 1 + text.startswith("\\")
        kind, inner = text[width - 1] + text[-1], text[width:-width]
    items = _split(inner, ",", ";")
    if len(items) == 1 and kind in ("()", "{}") and not text.startswith("\\"):  # brackets that only group
        return _structure(inner)
    if kind in ("", "{}"):
        items = [item.replace(r"\pm", sign) for item in items for sign in ("+-" if r"\pm" in item else "+")]
        kind = "{}" if kind or len(items) > 1 else ""
    return kind, items


def _same_value(answer: str, reference: str, equal: Equal) -> bool:
    """Tell whether two single values agree in number base and unit, and then as numbers or as expressions."""
    if answer.count("=") != reference.count("="):
        return False
    if re.search("[0-9]_", answer + reference):
        return answer == reference
    (value, unit), (wanted, wanted_unit) = _measure(answer), _measure(reference)
    if not _same_unit(unit, wanted_unit):
        return False
    number, wanted_number = _number(value), _number(wanted)
    if wanted_number is None:
        return _in_form(value, wanted) and equal(value, wanted)
    if number is None:
        return False
    parts = _hundredth(*number, unit), _hundredth(*wanted_number, wanted_unit)
    return _close(*number, *wanted_number) or (unit != wanted_unit and _close(*parts[0], *parts[1]))


def _number(text: str) -> tuple[Fraction, int] | None:
    """Return the value of a literal and the places after its decimal point (0 for a fraction); None for `10/2` etc."""
    if match := _DECIMAL.fullmatch(text):
        exponent = int(match[2] or 0)
        return Fraction(match[1]) * Fraction(10) ** exponent, max(len(match[1].partition(".")[2]) - exponent, 0)
    match = _FRACTION.fullmatch(re.sub("([0-9]+)/([0-9]+)", r"\\frac{\1}{\2}", text))
    if not match or not int(match[4]) or int(match[3]) % int(match[4]) == 0:
        return None
    value = int(match[2] or 0) + Fraction(int(match[3]), int(match[4]))
    return -value if match[1] == "-" else value, 0


def _hundredth(value: Fraction, places: int, unit: str) -> tuple[Fraction, int]:
    """Divide a percentage by 100, and count its decimal places anew; leave other numbers as they are."""
    return (value / 100, places and places + 2) if unit == "%" else (value, places)


def _close(value: Fraction, places: int, other: Fraction, other_places: int) -> bool:
    """Tell whether two numbers are equal, or one stands for the other.

    A decimal of six places or more, rounded or cut off, stands for a fraction that has no finite decimal.
    """
    if value == other or all(pow(10, x.denominator.bit_length(), x.denominator) == 0 for x in (value, other)):
        return value == other
    places = max(places, other_places)
    shifted = value * 10**places, other * 10**places
    return places >= 6 and any(whole(shifted[0]) == whole(shifted[1]) for whole in (int, round))


def _measure(text: str) -> tuple[str, str]:
    """Split a text into a value and its unit, which is "" if there is none."""
    for sign, unit in (("%", "%"), (r"^\circ", "degree"), ("$", "dollar")):
        if text.endswith(sign):
            return text.removesuffix(sign), unit
    if money := re.fullmatch(r"([+-]?)\$(.*)", text):
        return money[1] + money[2], "dollar"
    if not (match := _UNIT.search(text)):
        return text, ""
    word, power = (match[1] or match[2] or "").strip().lower(), match[3] or ""
    for prefix, value in (("square ", "^2"), ("cubic ", "^3")):
        if word.startswith(prefix):
            word, power = word.removeprefix(prefix), value
    return (text, "") if match[2] and not _is_unit(word) else (text[: match.start()].strip(), word + power)


def _is_unit(unit: str) -> bool:
    """Tell whether a word may follow a number without changing its value: `12 cm`, `60 miles per hour`.

    A unit is a common abbreviation, or any word of three letters or more with a vowel (`xyz` is no unit).
    """
    word = re.fullmatch(r"([a-z]+)(?:(?: per |/)[a-z]+)?(?:\^[23])?", unit)
    if word is None or word[1] in _NO_UNITS:
        return unit == "%"
    return word[1] in _SHORT_UNITS or (len(word[1]) >= 3 and not set("aeiou").isdisjoint(word[1]))


def _same_unit(unit: str, wanted: str) -> bool:
    """Tell whether a unit may stand where `wanted` is the reference's; plurals are equal, and "" is no unit."""
    if not wanted:
        return not unit or _is_unit(unit)
    return not unit or unit == wanted or unit in (f"{wanted}s", f"{wanted}es") or wanted in (f"{unit}s", f"{unit}es")


def _in_form(answer: str, reference: str) -> bool:
    """Tell whether an expression has nothing foreign in it, and no more operations than the reference."""
    if not _known(answer, reference):
        return False
    letters = re.sub(r"\\(?:begin|end|text)\{[^{}]*\}|\\[A-Za-z]+|[^A-Za-z]", "", reference)
    return bool(letters.strip("ie")) or _operations(answer) <= _operations(reference)


def _known(text: str, reference: str) -> bool:
    """Tell whether each token is common to answers, or appears in the reference, or is a digit or a letter."""
    tokens = set(_TOKEN.findall(reference))
    known = _COMMON | tokens | (set(_FUNCTIONS) if tokens & set(_FUNCTIONS) else set())
    letters = {letter for token in tokens if token.isalpha() for letter in token}

    def ordinary(token: str) -> bool:
        return token.isascii() and token.isalnum() and (len(token) == 1 or token.isdigit() or letters.issuperset(token))

    return all(token in known or ordinary(token) for token in _TOKEN.findall(text))


def _operations(text: str) -> Counter[str]:
    """Count the operations on numbers by kind; roots count at most once."""
    return Counter(
        sums=len(re.findall(r"(?<=[A-Za-z0-9.)}])(?<!pmatrix\})[+-]|\\pm", text)),
        roots=r"\sqrt" in text,
        powers=text.count("^"),
        products=len(re.findall(r"[0-9]\)?(?:\\cdot-?[0-9]|(?:\\cdot)?\(-?[0-9.]+\))", text)),
    )
