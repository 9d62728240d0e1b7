"""Keys of random draws. Every draw is a function of its key, so runs repeat and any rank can repeat any draw.

A key is a tuple of whole numbers, `(seed, step, …)` in training. Other uses have a `Namespace` where training has the
step, so no two uses share a draw.
"""

import enum

Key = tuple[int, ...]


class Namespace(enum.IntEnum):
    """Name the uses of draws outside training steps. Each number is larger than any step or epoch."""

    HELD_OUT = 2**32 - 1  # held-out problems during training
    EVALUATION = 2**32 - 2  # bae-evaluate, and the evaluation after training
    REROLLOUTS = 2**32 - 3  # fresh samples from a prefix, for a baseline that samples
    FIDELITY = 2**32 - 4  # bae-fidelity
    FIDELITY_IN_TRAINING = 2**32 - 5  # the callback that does the same
    FURTHER_PROBLEMS = 2**32 - 6  # problems outside the order of the steps
    DEMONSTRATIONS = 2**32 - 7  # what demonstrations of a warm start draw
    ROUNDING = 2**32 - 8  # optimisers that round weights at random
    OWN_FIDELITY = 2**32 - 9  # fresh samples that measure the run's own baseline
    ADAPTER = 2**32 - 10  # the random start of adapters


def key(seed: int, namespace: Namespace, *numbers: int) -> Key:
    """Return the key of one draw of a namespace."""
    return (seed, int(namespace), *numbers)


def keys(seed: int, step: int, first: int, count: int) -> list[Key]:
    """Return the keys of `count` prompts of a training step, numbered from `first` over all ranks."""
    return [(seed, step, first + p) for p in range(count)]
