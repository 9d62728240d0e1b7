"""A stated number: where it lies in a completion, and the value that its text is."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """Where a stated number lies in a completion.

    content: the bytes after the opening tag, as sampled, up to the next tag of the format or the end.
    value: the number, None if it cannot be read or is not closed.
    first: position in the completion of the first token whose first byte lies at or after the content's start.
    offsets: in bytes from the content's start, of that token and of each following one, up to and including the one
        after the content, with which the closing tag should begin.
    """

    content: bytes
    value: float | None
    first: int
    offsets: tuple[int, ...]


def parse_confidence(text: str) -> float | None:
    """The number in [0, 1] that `text` is, else None ("1.7", "NaN", "85%", "1e-1" and long digit strings are not)."""
    stripped = text.strip()
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{0,12})?|\.[0-9]{1,12}", stripped):
        return None
    value = float(stripped)
    return value if value <= 1.0 else None
