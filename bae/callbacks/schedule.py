"""When a callback acts, and which settings of that are refused."""


def due(done: int, every: int, last: float | None = None) -> bool:
    """Tell whether something that happens every `every` steps happens now.

    Args:
        done: steps that are done.
        every: steps between two times; 0 for never in between.
        last: the number of the last step, after which it always happens; None if it does not.
    """
    return done == last or (every > 0 and done % every == 0)


def at_least_one(callback: str, **values: int) -> None:
    """Refuse values below 1. Raises ValueError. callback: its key in the configuration."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"callbacks.{callback}.{name}={value}: must be 1 or more")


def not_negative(callback: str, **values: int) -> None:
    """Refuse values below 0. Raises ValueError. callback: its key in the configuration."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"callbacks.{callback}.{name}={value}: must not be negative")
