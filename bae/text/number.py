"""Define a stated number: where it lies in a completion, and the value of its text."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """Hold where a stated number lies in a completion.

    Args:
        content: the bytes after the opening tag, as sampled, up to the next tag of the format or the end.
        value: the number, or None if it cannot be read or its section is not closed.
        first: the position, in the completion, of the first token whose first byte lies at or after the start of the
            content.
        offsets: for that token and each following one, the offset of its first byte from the start of the content.
            The last one is the token after the content, with which the closing tag should begin.
    """

    content: bytes
    value: float | None
    first: int
    offsets: tuple[int, ...]


def parse_confidence(text: str) -> float | None:
    """Return the number in [0, 1] that the text states, or None if it states none.

    None is returned for "1.7", "NaN", "85%", "1e-1" and long strings of digits.
    """
    stripped = text.strip()
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{0,12})?|\.[0-9]{1,12}", stripped):
        return None
    value = float(stripped)
    return value if value <= 1.0 else None
