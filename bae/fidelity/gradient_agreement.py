"""Compare a baseline's gradient with the true one, of which two independent estimates are known. Pure torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from bae.evaluation.bootstrap import RESAMPLES, one_thread
from bae.fidelity.intervals import Interval, interval, positive, prompt_weights


class GradientAgreement(NamedTuple):
    """Hold how well a baseline's gradient agrees with the true one; see `gradient_agreement`."""

    cosine: Interval
    mse: Interval
    noise_share: Interval


def gradient_agreement(
    proxy: Tensor, half_a: Tensor, half_b: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> GradientAgreement:
    """Compare a baseline's gradient g with the true one, of which a and b are independent unbiased estimates.

    The noise of a and b is taken out: a·b estimates |true|².

    Args:
        proxy: (P, S), g of each prompt, of S parameters or a sketch of them.
        half_a, half_b: (P, S), a and b of each prompt.
        resamples: R, 2 or more.
        seed: of the draws.

    Returns:
        cosine: of the batch gradient, which is the sum over prompts: g·(a + b)/2 / (|g| √(a·b)). Noise may take it
            above 1.
        mse: of a prompt's gradient, relative: Σ (g - a)·(g - b) / Σ a·b.
        noise_share: of the variance of a batch's gradient, the share that the sampled block adds, and that a baseline
            can take away. The rest is that of prompts and prefixes, whose true gradients differ. So no baseline saves
            more than this share of the completions.

        The intervals of cosine and share are ± 1.96 jackknife errors. For the cosine they were 1.5 to 1.8 times too
        large in simulations. Resamples would not do, because a prompt that is drawn twice adds its noise twice in one
        direction.

    Raises:
        ValueError: if shapes differ, or if R < 2.
    """
    if not (proxy.ndim == 2 and proxy.shape == half_a.shape == half_b.shape):
        raise ValueError(f"want three of (P, S): proxy {proxy.shape}, half_a {half_a.shape}, half_b {half_b.shape}")
    g, a, b = (x.double() for x in (proxy, half_a, half_b))
    prompts = len(g)
    kept = torch.cat([g.new_ones(1, prompts), 1 - torch.eye(prompts).to(g)])  # all prompts; all but one
    with one_thread():
        weights = prompt_weights(prompts, resamples, seed).to(g)
        true, error = (a * b).sum(1), ((g - a) * (g - b)).sum(1)  # of each prompt, squared
        mse = weights @ error / positive(weights @ true)
        both = _product(kept, a, b)
        cosine = _product(kept, g, (a + b) / 2) / (positive(_product(kept, g, g)) * positive(both)).sqrt()
        share = _noise_share(kept.sum(1), kept @ true, kept @ error, both)
    return GradientAgreement(_jackknife(cosine), interval(mse.cpu(), prompts), _jackknife(share))


def _product(kept: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return (1 + P,): the products of the sums of x and y, (P, S) each, over the kept rows; kept: (1 + P, P)."""
    return ((kept @ (x @ y.T)) * kept).sum(1)  # by pairs of rows, because S may be large


def _noise_share(n: Tensor, true: Tensor, error: Tensor, both: Tensor) -> Tensor:
    """Return the noise share for each choice of kept prompts, (1 + P,) each.

    n: how many prompts are kept. true, error: sums of their squared true gradients, and of their squared errors. both:
    the squared sum of their true gradients.
    """
    prefixes = true / n - (both - true) / positive(n * (n - 1))  # mean square less the squared mean
    return error / n / positive(error / n + prefixes)


def _jackknife(values: Tensor) -> Interval:
    """Return the interval of a jackknife; values: (1 + P,), of all prompts and without each."""
    value, without = values[0].item(), values[1:]
    prompts = len(without)
    wide = 1.96 * ((prompts - 1) * without.var(correction=0)).sqrt().item() if prompts > 1 else torch.nan
    return Interval(value, value - wide, value + wide)
