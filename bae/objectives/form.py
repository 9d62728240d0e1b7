"""Rewards of form: keeping to the format, and being brief."""

from bae.batch import Completion


def in_format(completion: Completion) -> float:
    """Return 1 if every block is in form and every stated confidence can be read, else 0.

    If the objective's own block is not in form, `malformed` decides before this is asked.
    """
    return float(all(completion.well_formed) and None not in completion.confidences)


def brevity(completion: Completion, free: int, limit: int, block: str | None = None) -> float:
    """Return 0 up to `free` tokens, -1 from `limit` on, and linearly between.

    This is DAPO's soft overlong punishment (arXiv 2503.14476).

    Args:
        completion: the completion.
        free, limit: numbers of tokens.
        block: the block whose tokens count; None for the whole completion.

    Raises:
        ValueError: unless 0 <= free < limit, and for a block that does not exist.
    """
    if block is not None and block not in completion.tokens:
        raise ValueError(f"brevity: block={block}: no such block; there are {', '.join(completion.tokens)}")
    if not 0 <= free < limit:
        raise ValueError(f"brevity: free={free} must be below limit={limit}, and not negative")
    tokens = completion.length if block is None else completion.tokens[block]
    return -min(1.0, max(0.0, (tokens - free) / (limit - free)))
