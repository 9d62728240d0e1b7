"""What settings of callbacks are refused."""


def at_least_one(callback: str, **values: int) -> None:
    """Raises ValueError if one of these is below 1. callback: its key in the configuration."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"callbacks.{callback}.{name}={value}: must be 1 or more")
