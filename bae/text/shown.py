"""Show a text that a model or a user wrote in a message: on one line, without control characters, not too long."""

SHOWN = 300
"""The characters that a message shows."""


def shorten(text: str, shown: int = SHOWN) -> str:
    """Return the beginning of a text in quotes. What is no printable sign is escaped, so no terminal acts on it."""
    return repr(text) if len(text) <= shown else f"{text[:shown]!r}…"
