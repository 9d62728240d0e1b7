"""Make hostile text fit for a person's eyes: nothing in it is hidden, and nothing moves what stands beside it."""

import unicodedata

KEPT = "\n\t"
"""The control characters that mean what they show."""
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""The categories of Unicode that are replaced: controls, formats (bidirectional ones too), halves of pairs, breaks."""


class _StandIns(dict[int, str]):
    """Map each character that a reader cannot see to its stand-in, and any other one to itself."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if char not in KEPT and unicodedata.category(char) in HIDDEN:
            self[code] = f"⟨U+{code:04X}⟩"
        else:
            self[code] = char
        return self[code]


_stand_ins = _StandIns()


def visible(text: str) -> str:
    """Replace the characters that a terminal or a browser would not show, but obey.

    Such a character becomes its number: ⟨U+001B⟩ for escape. What is returned can be encoded as UTF-8, even if the text
    could not.
    """
    return text.translate(_stand_ins)


def shortened(text: str, limit: int) -> str:
    """Return a text of about `limit` characters at most: its middle is left out, with a note of how much."""
    left_out = len(text) - limit
    if left_out <= 0:
        return text
    head = limit * 2 // 3
    return f"{text[:head]} … {left_out} characters left out … {text[head + left_out :]}"


def quoted(text: str, limit: int = 300) -> str:
    """Return the beginning of a text in quotes, on one line. What is no printable sign is escaped."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}…"
