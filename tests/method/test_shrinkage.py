"""The empirical-Bayes baseline: hand-worked pooling, what it learns, and that it is better where it should be."""

from dataclasses import replace

import pytest
import torch

from bae.method.baselines import (
    RewardView,
    leave_one_out,
    mean_of_others,
    outcome_strata,
    with_fallback,
    without_self,
)
from bae.method.shrinkage import EmpiricalBayes


def simulated(prompts=64, size=8, seed=0, spread=0.15):
    """Reports of a policy that knows something of each prompt, and a little of each completion; Brier. And the expected
    reward of each completion, given its prefix."""
    g = torch.Generator().manual_seed(seed)
    n = prompts * size
    group = torch.arange(n) // size
    p = torch.rand(prompts, generator=g)[group]
    correct = (torch.rand(n, generator=g) < p).long()
    mean = (0.5 + 0.6 * (p - 0.5) + 0.05 * torch.randn(n, generator=g)).clamp(0.1, 0.9)
    q = mean + spread * (torch.rand(n, generator=g) - 0.5) * 12**0.5
    value = -((mean - correct) ** 2) - spread**2
    score = lambda q, c: -((q - c) ** 2)  # noqa: E731
    rewards = RewardView(score(q, correct), group, correct.float(), torch.ones(n).bool(), correct,
                           torch.stack([score(q, 0), score(q, 1)], 1))  # fmt: skip
    return rewards, value


def test_the_first_step_is_leave_one_out():
    rewards, _ = simulated()
    torch.testing.assert_close(EmpiricalBayes()(rewards), leave_one_out(rewards), equal_nan=True)


def test_pooling_by_hand():
    baseline = EmpiricalBayes()
    moments = {"mean": -0.2, "within": 0.04, "between": 0.02, "shift": 0.05, "mismatch": 0.01}
    baseline.moments = {1.0: dict(moments), 0.0: {"mean": -0.3, "within": 0.04, "between": 0.04}}
    q, correct = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([1, 1, 0])
    rewards = RewardView(-((q - correct) ** 2), torch.zeros(3).long(), correct.float(), torch.ones(3).bool(), correct,
                           torch.stack([-(q**2), -((q - 1) ** 2)], 1))  # fmt: skip
    # Completion 0: the other right one has -.25 (variance .04); the wrong one's .7 would earn -.09, + .05 (variance
    # .05); the prior is -.2 (variance .02). Completion 2 is alone: the prior and, with no mismatch known, nothing else.
    weights = torch.tensor([1 / 0.02, 1 / 0.04, 1 / 0.05])
    first = (weights * torch.tensor([-0.2, -0.25, -0.04])).sum() / weights.sum()
    got = baseline(rewards)
    torch.testing.assert_close(got[[0, 2]], torch.stack([first, torch.tensor(-0.3)]), atol=1e-5, rtol=1e-5)


def test_what_it_learns_of_the_strata():
    g = torch.Generator().manual_seed(1)
    group = torch.arange(4000) // 8
    reward = -0.5 + 0.3 * torch.randn(500, generator=g)[group] + 0.2 * torch.randn(4000, generator=g)
    baseline = EmpiricalBayes()
    baseline(RewardView(reward, group, torch.zeros(4000), torch.ones(4000).bool()))
    learnt = baseline.moments[0.0]
    assert learnt["mean"] == pytest.approx(-0.5, abs=0.05)
    assert learnt["within"] == pytest.approx(0.04, rel=0.1)
    assert learnt["between"] == pytest.approx(0.09, rel=0.2)
    assert "mismatch" not in learnt  # nothing to score again


@pytest.mark.parametrize("size", [4, 8, 16])
def test_it_is_nearer_to_the_truth_than_leaving_out_alone(size):
    baseline = EmpiricalBayes()
    errors = {"shrunk": [], "left out": []}
    for step in range(8):
        rewards, value = simulated(size=size, seed=step)
        shrunk, _ = with_fallback(baseline, without_self, rewards)
        left_out, _ = with_fallback(leave_one_out, without_self, rewards)
        if step:
            errors["shrunk"].append(shrunk - value)
            errors["left out"].append(left_out - value)
    rmse = {name: float(torch.cat(parts).square().mean().sqrt()) for name, parts in errors.items()}
    assert rmse["shrunk"] < 0.95 * rmse["left out"], rmse


def test_it_does_not_depend_on_ones_own_report():
    learnt = EmpiricalBayes()
    learnt(simulated()[0])
    state = learnt.state_dict()
    rewards, _ = simulated(prompts=4, seed=3)
    for i in range(6):
        changed = replace(rewards, reward=rewards.reward.clone(), rescored=rewards.rescored.clone())
        changed.reward[i], changed.rescored[i] = -0.9, torch.tensor([-0.9, -0.9])
        values = []
        for each in (rewards, changed):
            baseline = EmpiricalBayes()
            baseline.load_state_dict(state)
            values.append(baseline(each)[i])
        torch.testing.assert_close(*values, atol=1e-6, rtol=1e-5)


def test_its_state_is_plain_and_comes_back():
    first, second = EmpiricalBayes(), EmpiricalBayes()
    first(simulated()[0])
    second.load_state_dict(first.state_dict())
    rewards, _ = simulated(seed=5)
    torch.testing.assert_close(first(rewards), second(rewards))
    assert first.state_dict() == second.state_dict()
    with pytest.raises(ValueError, match="decay"):
        EmpiricalBayes(decay=1.0)


def test_strata_of_one_or_none_teach_nothing():
    baseline = EmpiricalBayes()
    few = RewardView(torch.tensor([-0.1, -0.2]), torch.arange(2), torch.zeros(2), torch.ones(2).bool())
    assert baseline(few).isnan().all() and baseline.moments == {}
    assert mean_of_others(few.reward, outcome_strata(few), few.present).isnan().all()
