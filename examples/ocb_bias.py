"""Why OCB is biased: a worked example with a plot. docs/tutorials/ocb_bias.md explains it.

    python examples/ocb_bias.py [ocb_bias.svg]

A policy that knows nothing of the problem but how often its answers are right (p) states confidences at random. For
each number that it may state, we ask: which advantage does it earn on average? The number that earns the most is where
training leads. Under the Brier score it should be p.
"""

import sys
from pathlib import Path

import torch
from matplotlib import style
from torch import Tensor

from bae.evaluation.figures import COLOURS, STYLE, add_legend, make_panels, save
from bae.method.baselines import (
    Baseline,
    RewardView,
    leave_one_out,
    outcome_conditioned,
    with_fallback,
    without_self,
)
from bae.objectives.brier import brier

STATED = torch.arange(0, 101) / 100


def resting_point(p: float, group_size: int) -> float:
    """Return the confidence to which OCB leads: W1 / (W1 + W0), where W is the signal that a stratum keeps.

    A stratum of n keeps the signal of n - 1 members, and an empty one that of none. So the expectation of max(n - 1, 0)
    is G p - 1 + (1 - p)^G for the right answers, and the same with 1 - p for p for the wrong ones.
    """
    right = group_size * p - 1 + (1 - p) ** group_size
    wrong = group_size * (1 - p) - 1 + p**group_size
    return right / (right + wrong)


def mean_advantage(baseline: Baseline, p: float, group_size: int, groups: int, seed: int = 0) -> Tensor:
    """Return the mean advantage that each of the numbers of STATED earns, by sampling; (101,)."""
    generator = torch.Generator().manual_seed(seed)
    n = groups * group_size
    correct = (torch.rand(n, generator=generator) < p).float()
    number = torch.randint(len(STATED), (n,), generator=generator)
    group = torch.arange(n) // group_size
    stated = STATED[number]
    reward = brier(stated, correct)
    rescored = torch.stack([brier(stated, torch.zeros(())), brier(stated, torch.ones(()))], 1)
    view = RewardView(reward, group, correct, torch.ones(n, dtype=torch.bool), correct.long(), rescored)
    value, _ = with_fallback(baseline, without_self, view)  # leave-one-out has none for a completion that is alone
    total = torch.zeros(len(STATED), dtype=torch.double).index_add(0, number, (reward - value).double())
    return total / torch.bincount(number, minlength=len(STATED))


def main(file: Path, groups: int = 100_000) -> dict[str, float]:
    """Draw the advantages by stated confidence, and OCB's resting point by group size; return the best confidences."""
    p, group_size = 0.85, 8
    best = {}
    with style.context(STYLE):
        figure, ((left, right),) = make_panels(2, rows=1, height=2.2)
        for i, (name, baseline) in enumerate({"OCB": outcome_conditioned, "leave-one-out": leave_one_out}.items()):
            earned = mean_advantage(baseline, p, group_size, groups)
            smooth = parabola(earned)
            best[name] = float(STATED[smooth.argmax()])
            left.plot(STATED, earned, ".", color=COLOURS[i], markersize=1.5)
            left.plot(STATED, smooth, color=COLOURS[i], marker="", label=f"{name}: best is {best[name]:.2f}")
            left.axvline(best[name], color=COLOURS[i], linestyle=":", linewidth=0.8)
        left.set(xlim=(0.6, 1), ylim=(0.1, 0.24))  # the best numbers lie here
        left.set(xlabel="Stated confidence", ylabel="Mean advantage", title=f"p = {p}, groups of {group_size}")
        sizes = [2, 4, 8, 16, 32, 64]
        for i, share in enumerate((0.6, 0.75, 0.9), 2):
            points = [resting_point(share, size) for size in sizes]
            right.plot(sizes, points, color=COLOURS[i], label=f"p = {share}")
            right.axhline(share, color=COLOURS[i], linestyle="--", linewidth=0.8)
        right.set(xscale="log", xlabel="Group size", ylabel="Confidence at rest", title="OCB; dashed: p")
        right.set_xticks(sizes, map(str, sizes))
        right.minorticks_off()
        add_legend(figure, [left, right])
        save(figure, file.with_suffix(""))
    return best


def parabola(earned: Tensor) -> Tensor:
    """Fit c0 + c1 q + c2 q² to the means: under the Brier score the expectation is such a parabola."""
    powers = torch.stack([STATED**k for k in range(3)], 1).double()
    fitted: Tensor = torch.linalg.lstsq(powers, earned[:, None]).solution[:, 0]
    return powers @ fitted


if __name__ == "__main__":
    found = main(Path(sys.argv[1] if len(sys.argv) > 1 else "ocb_bias.svg"))
    print(", ".join(f"{name}: {q:.2f}" for name, q in found.items()), f"formula: {resting_point(0.85, 8):.3f}")
