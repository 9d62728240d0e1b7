"""Baselines against hand-worked numbers, and the identities between them."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bae.method.baselines import (
    MonteCarlo,
    RewardView,
    batch_mean,
    group_mean,
    has_signal_alone,
    leave_one_out,
    mean_of_others,
    none,
    outcome_conditioned,
    outcome_over_batch,
    stratified_mean,
    stratum_size,
    with_fallback,
    without_self,
)
from bae.method.shrinkage import EmpiricalBayes
from bae.objectives.rao_blackwell import RaoBlackwell

# Two groups of four; outcomes 1 1 0 0 | 1 0 0 0; one completion of the second group does not count.
REWARDS = RewardView(
    reward=torch.tensor([-0.1, -0.3, -0.8, -0.4, -0.2, -0.5, -0.7, 0.0]),
    group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
    outcome=torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]),
    present=torch.tensor([True] * 7 + [False]),
)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (none, [0.0] * 7),
        (batch_mean, [-3.0 / 7] * 7),
        (group_mean, [-0.4] * 4 + [-1.4 / 3] * 3),
        (outcome_conditioned, [-0.2, -0.2, -0.6, -0.6, -0.2, -0.6, -0.6]),
        (outcome_over_batch, [-0.2, -0.2, -0.6, -0.6, -0.2, -0.6, -0.6]),
        (leave_one_out, [-0.3, -0.1, -0.4, -0.8, torch.nan, -0.7, -0.5]),
    ],
)
def test_hand_worked(baseline, expected):
    torch.testing.assert_close(baseline(REWARDS)[:7], torch.tensor(expected), equal_nan=True)


def random_rewards(groups=4, size=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = groups * size
    return RewardView(
        -torch.rand(n, generator=g),
        torch.arange(n) // size,
        torch.randint(0, 3, (n,), generator=g),
        torch.rand(n, generator=g) < 0.9,
    )


@given(st.integers(0, 50))
def test_with_one_outcome_ocb_is_the_group_mean(seed):
    r = random_rewards(seed=seed)
    same = RewardView(r.reward, r.group, torch.full_like(r.outcome, 2), r.present)
    assert torch.equal(outcome_conditioned(same), group_mean(same))


@given(st.integers(0, 50))
def test_advantages_of_a_stratum_sum_to_zero(seed):
    r = random_rewards(seed=seed)
    advantage = (r.reward - outcome_conditioned(r)) * r.present
    sums = torch.zeros(12).index_add(0, r.group * 3 + r.outcome, advantage)
    torch.testing.assert_close(sums, torch.zeros(12), atol=1e-6, rtol=0)


@given(st.permutations(range(6)))
def test_permuting_a_group_permutes_its_baseline(order):
    r = random_rewards(groups=2)
    index = torch.tensor([*order, *range(6, 12)])
    permuted = RewardView(r.reward[index], r.group, r.outcome[index], r.present[index])
    torch.testing.assert_close(outcome_conditioned(permuted), outcome_conditioned(r)[index])


def test_a_constant_stratum_has_exactly_no_signal():
    reward = torch.full((7,), -0.1)
    mean = stratified_mean(reward, torch.zeros(7).long(), torch.ones(7).bool())
    assert torch.equal(mean, reward)


def test_a_singleton_is_its_own_baseline():
    r = RewardView(torch.tensor([0.3, 0.9]), torch.zeros(2).long(), torch.tensor([0, 1]), torch.ones(2).bool())
    assert torch.equal(outcome_conditioned(r), r.reward)


def test_empty_and_absent_strata():
    assert len(stratified_mean(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).bool())) == 0
    nobody = stratified_mean(torch.ones(3), torch.zeros(3).long(), torch.zeros(3).bool())
    assert torch.equal(nobody, torch.zeros(3))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="shapes differ"):
        stratified_mean(torch.zeros(3), torch.zeros(2).long(), torch.ones(3).bool())


# A group of three, scored by Brier: q = .9 and .6 of right answers, .2 of a wrong one; and a completion alone.
Q, CORRECT = torch.tensor([0.9, 0.6, 0.2, 0.5]), torch.tensor([1, 1, 0, 0])
SCORED = RewardView(
    reward=-((Q - CORRECT) ** 2),
    group=torch.tensor([0, 0, 0, 1]),
    outcome=CORRECT.float(),
    present=torch.ones(4).bool(),
    correct=CORRECT,
    rescored=torch.stack([-(Q**2), -((Q - 1) ** 2)], 1),
)


def test_the_fallback_scores_the_others_under_ones_own_outcome():
    # Completion 2 is the only wrong one of its group: were the others' .9 and .6 wrong, they would earn -.81 and -.36.
    # Completion 3 has no group: the other wrong one of the batch has -.04.
    expected = [-(0.16 + 0.64) / 2, -(0.01 + 0.64) / 2, -(0.81 + 0.36) / 2, -0.04]
    torch.testing.assert_close(without_self(SCORED), torch.tensor(expected))
    value, lacking = with_fallback(leave_one_out, without_self, SCORED)
    torch.testing.assert_close(value, torch.tensor([-0.16, -0.01, expected[2], -0.04]))
    assert lacking.tolist() == [False, False, True, True]


def test_where_nothing_can_be_said_the_advantage_is_zero():
    alone = RewardView(torch.tensor([-0.3, -0.4]), torch.arange(2), torch.tensor([0.0, 1.0]), torch.ones(2).bool())
    value, lacking = with_fallback(leave_one_out, without_self, alone)
    assert torch.equal(value, alone.reward) and lacking.all()


@pytest.mark.parametrize("baseline", [leave_one_out, without_self, partial(with_fallback, leave_one_out, without_self)])
@given(st.integers(0, 50), st.floats(0, 1))
def test_leaving_out_does_not_depend_on_ones_own_report(baseline, seed, other):
    g = torch.Generator().manual_seed(seed)
    q, correct = torch.rand(8, generator=g), torch.randint(0, 2, (8,), generator=g)

    def rewards(q):
        return RewardView(-((q - correct) ** 2), torch.arange(8) // 4, correct.float(), torch.ones(8).bool(), correct,
                            torch.stack([-(q**2), -((q - 1) ** 2)], 1))  # fmt: skip

    for i in range(8):
        changed = q.clone()
        changed[i] = other
        before, after = (baseline(rewards(values)) for values in (q, changed))
        if isinstance(before, tuple):
            if before[1][i] and before[0][i] == rewards(q).reward[i]:
                continue  # nobody to compare with: its own baseline
            before, after = before[0], after[0]
        torch.testing.assert_close(after[i], before[i], equal_nan=True)


def test_self_inclusion_keeps_all_but_one_nth_of_the_signal():
    r = random_rewards(groups=1, size=6)
    r = RewardView(r.reward, r.group, torch.zeros(6), torch.ones(6).bool())
    with_self, without = r.reward - outcome_conditioned(r), r.reward - leave_one_out(r)
    torch.testing.assert_close(with_self, without * 5 / 6)


def test_sizes_count_present_members_alone():
    assert stratum_size(REWARDS.group, REWARDS.present).tolist() == [4, 4, 4, 4, 3, 3, 3, 3]
    assert mean_of_others(torch.ones(2), torch.zeros(2).long(), torch.tensor([True, False]))[0].isnan()


def test_monte_carlo_is_the_mean_of_what_is_drawn():
    drawn = torch.tensor([[0.0, -1.0, torch.nan], [-0.5, -0.5, -0.2]])
    r = RewardView(torch.zeros(2), torch.zeros(2).long(), torch.zeros(2), torch.ones(2).bool(),
                     resample=lambda n: drawn[:, :n])  # fmt: skip
    torch.testing.assert_close(MonteCarlo(3)(r), torch.tensor([-0.5, -0.4]))
    with pytest.raises(ValueError, match="needs a policy"):
        MonteCarlo(2)(REWARDS)


def test_rao_blackwell_is_the_expectation_where_it_is_known():
    from dataclasses import replace

    baseline = RaoBlackwell(leave_one_out)
    torch.testing.assert_close(baseline(SCORED), leave_one_out(SCORED), equal_nan=True)
    known = replace(SCORED, expected=torch.tensor([-0.1, torch.nan, -0.2, torch.nan]))
    torch.testing.assert_close(baseline(known), torch.tensor([-0.1, -0.01, -0.2, torch.nan]), equal_nan=True)
    assert baseline.state_dict() == {}


@pytest.mark.parametrize("wrong", [lambda view: view.reward.mean(), lambda view: view.reward[:1], lambda view: 0.5])
def test_a_baseline_of_another_shape_is_refused(wrong):
    with pytest.raises(ValueError, match=r"for \d+ completions; it must give \(N,\) numbers"):
        with_fallback(wrong, without_self, REWARDS)


def test_which_baselines_have_a_signal_without_a_group():
    assert not has_signal_alone(group_mean, without_self) and not has_signal_alone(outcome_conditioned, without_self)
    for baseline in (none, batch_mean, leave_one_out, MonteCarlo(2)):
        assert has_signal_alone(baseline, without_self)


def test_asking_about_a_baseline_teaches_it_nothing():
    shrunk = EmpiricalBayes()
    assert has_signal_alone(shrunk, without_self) and shrunk.state_dict() == {"moments": {}}
