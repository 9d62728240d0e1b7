"""Resample prompts, and give statistics their 95 % intervals."""

from typing import NamedTuple

import torch
from torch import Tensor

from bae.evaluation.bootstrap import Difference, difference, draw_counts


class Interval(NamedTuple):
    """Hold a value and its 95 % interval.

    The interval is that of the percentiles over resampled prompts, where nothing else is said. It is NaN if fewer than
    two prompts have a completion.
    """

    value: float
    low: float
    high: float


def prompt_weights(prompts: int, resamples: int, seed: int) -> Tensor:
    """Return (1 + R, P): how often each prompt counts. The first row is the sample itself, where it is once."""
    if resamples < 2:
        raise ValueError(f"want 2 resamples or more, got {resamples}")
    drawn = draw_counts(resamples, prompts, torch.Generator().manual_seed(seed))
    return torch.cat([torch.ones(1, prompts, dtype=drawn.dtype), drawn])


def spread_of(draws: Tensor, prompts: int) -> Difference:
    """Describe (1 + R,) draws: the sample and its resamples.

    The resamples of a single prompt are all alike and say nothing of other prompts, so they are left out.
    """
    return difference(draws[0], draws[1:] if prompts > 1 else draws[:0])


def interval(draws: Tensor, prompts: int) -> Interval:
    """Return the value and the interval of (1 + R,) draws."""
    spread = spread_of(draws, prompts)
    return Interval(spread.value, spread.low, spread.high)


def positive(square: Tensor, least: float = 0.0) -> Tensor:
    """Put NaN where a square is not above `least`."""
    return torch.where(square > least, square, torch.nan)
