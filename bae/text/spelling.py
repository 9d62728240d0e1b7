r"""Give texts that mean the same one spelling: Unicode, LaTeX dialects, white space, delimiters and boxes.

The texts are hostile. No regular expression here takes more than linear time, and no function more than quadratic.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

_words = str.split
GREEK = _words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
)
FUNCTIONS = _words(r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \log \ln \exp")
_SPELLINGS = {
    token: spelling
    for spelling, tokens in {
        "": r"\left \right \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \! \, \; \: \( \) \[ \]",
        " ": r"\quad \qquad", "-": "− – ‐", r"\cdot ": r"\times * × · ⋅", "/": r"\div ÷ ⁄ ∕", r"\pm ": "±",  # noqa: RUF001
        r"\frac": r"\dfrac \tfrac \cfrac", r"\sqrt ": "sqrt √", r"\pi ": "pi π",
        ":": r"\colon ∶", "|": r"\lvert \rvert \vert",  # noqa: RUF001
        r"\infty ": "infinity inf ∞",
        r"\in ": "∈", r"\cup ": "∪", "<": r"\lt", ">": r"\gt",  # noqa: RUF001
        r"\le ": r"\leq \leqslant ≤", r"\ge ": r"\geq \geqslant ≥", r"\emptyset ": r"\varnothing ∅", r"\ne ": r"\neq ≠",
        r"\{": r"\lbrace", r"\}": r"\rbrace", "pmatrix": "bmatrix", ";": "and", r"\vee ": r"or \lor ∨",  # noqa: RUF001
        r"^\circ ": r"° \degree", "%": r"\% percent", "$": r"\$", r"\overline": r"\bar",
        r"\text": r"\mbox \mathrm \mathbf \textbf \textrm \textit \operatorname",
        **{rf"\{name} ": sign for name, sign in zip(GREEK, "αβγδεζηθικλμνξρστυφχψω", strict=True)},
        **{f"{function} ": function[1:] for function in FUNCTIONS},
    }.items()
    for token in tokens.split()
} | {"\\ ": " "}  # fmt: skip
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]+|[0-9]+|.", re.DOTALL)


@lru_cache(maxsize=1024)  # votes compare each answer of a prompt with several others
def canonical(text: str) -> str | None:
    r"""Return one spelling for texts that differ only in Unicode, LaTeX dialect, white space, delimiters or a box.

    Args:
        text: an answer or a reference, as written.

    Returns:
        The canonical spelling, or None if the text cannot be an answer: it is blank, its brackets do not match or
        are over 50 deep, or it has more than one box.
    """
    text = _ascii(re.sub(r"\A\s*\*\*([^*]+)\*\*\s*\Z", r"\1", text))  # bold in Markdown
    before, *boxed = re.split(r"\\(?:boxed|fbox) ?(?={)", text)
    if len(boxed) > 1 or not _balanced(text):
        return None
    if boxed:
        end = 0
        for token, depth in depths(boxed[0]):
            end += len(token)
            if depth == 0:
                break
        text = f"{before} {boxed[0][1 : end - 1]} {boxed[0][end:]}"
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # math delimiters come in pairs; an odd one is a dollar sign
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"(?:\{,\}|,\\! ?)(?=[0-9]{3})", "", text)
    text = "".join(_SPELLINGS.get(token, token) for token in TOKEN.findall(text))
    if not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"\\text ?\{ ?(\\vee|[;%]|[0-9.]*) ?\}", r"\1 ", re.sub(" +", " ", text)).strip()
    text = re.sub(r"\\text ?\{([^{}]*(?:[=<>,;:]|\\(?:le|ge|vee) )[^{}]*)\}", r"\1", text)  # a relation or a list
    text = re.sub(r"^\\text ?\{ ?([-+$0-9.][^{}]*)\}$|^\\text ?\{ ?([A-Za-z]) ?\}(?= ?[-+=<>\\])", r"\1\2", text)
    # Keep a space only between two letters and between two digits: `\cot x`, `1 1/2`.
    text = re.sub(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) |(?<=[A-Za-z]) (?=[0-9])|(?<=[0-9]) (?=[A-Za-z])", "", text)
    text = re.sub(r"\\frac ?(\\pi ?|[0-9A-Za-z])", r"\\frac{\1}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})(\\pi ?|[0-9A-Za-z])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\sqrt\(([^()]*)\)|\\sqrt ?([0-9a-z])", r"\\sqrt{\1\2}", text)
    text = re.sub(r"([_^])\{([0-9a-z]|\\circ)\}", r"\1\2", text)
    text = re.sub(r"\\mathbb ?([A-Z])", r"\\mathbb{\1}", text.replace(r"\{\}", r"\emptyset"))
    text = re.sub(r"([0-9])\.(?=[-+/^)\]},;])", r"\1", text)
    text = re.sub(r",?(;|\\vee ?)", r"\1", text).strip(" ")
    text = re.sub(r"(?<!\.) ?\.$", "", text)  # one full stop; more of them mean that something is left out
    return text if text and _balanced(text) else None


def _ascii(text: str) -> str:
    """Apply Unicode's NFKC, but keep the meaning of ½, ², ₈ and √13, and unify ASCII spellings and white space."""

    def plain(match: re.Match[str]) -> str:
        return unicodedata.normalize("NFKC", match[0])

    text = re.sub("[⁺⁻⁰¹²³⁴-⁹]+", lambda match: f"^{{{plain(match)}}}", text)
    text = re.sub("[₀-₉]+", lambda match: f"_{{{plain(match)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: r"\frac{{{}}}{{{}}}".format(*re.split(r"\D", plain(match))), text)
    text = re.sub(r"(?:√|(?<![\\A-Za-z])sqrt) ?([0-9]+)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=[A-Za-z0-9.,;:)}$])~", " ", text)  # a tie of TeX; elsewhere it means `about`
    text = unicodedata.normalize("NFKC", text).replace("<=", r"\le ").replace(">=", r"\ge ").replace("**", "^")
    return re.sub(r"\s+", " ", text)


def depths(text: str) -> Iterator[tuple[str, int]]:
    """Yield each token with the number of brackets that are open after it."""
    depth = 0
    for token in TOKEN.findall(text):
        depth += (token[-1] in "([{") - (token[-1] in ")]}")
        yield token, depth


def _balanced(text: str) -> bool:
    """Tell whether brackets match, and at most 50 are open. A round one may close a square one, as in an interval."""
    opened: list[bool] = []  # for each open bracket, whether it is a brace
    for token in TOKEN.findall(text):
        if token[-1] in "([{":
            opened.append(token[-1] == "{")
        elif token[-1] in ")]}" and (not opened or opened.pop() != (token[-1] == "}")):
            return False
        if len(opened) > 50:
            return False
    return not opened


def split(text: str, *separators: str) -> list[str]:
    """Return the parts between those separators that stand outside all brackets, without spaces around them."""
    parts = [""]
    for token, depth in depths(text):
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip(" ") for part in parts]
