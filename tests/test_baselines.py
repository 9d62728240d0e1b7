"""Baselines against hand-worked numbers, and the identities between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bae.baselines import BlockRewards, batch_mean, group_mean, none, outcome_conditioned, stratified_mean

# Two groups of four; outcomes 1 1 0 0 | 1 0 0 0; one completion of the second group does not count.
REWARDS = BlockRewards(
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
    ],
)
def test_hand_worked(baseline, expected):
    torch.testing.assert_close(baseline(REWARDS)[:7], torch.tensor(expected))


def random_rewards(groups=4, size=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = groups * size
    return BlockRewards(
        -torch.rand(n, generator=g),
        torch.arange(n) // size,
        torch.randint(0, 3, (n,), generator=g),
        torch.rand(n, generator=g) < 0.9,
    )


@given(st.integers(0, 50))
def test_with_one_outcome_ocb_is_the_group_mean(seed):
    r = random_rewards(seed=seed)
    same = BlockRewards(r.reward, r.group, torch.full_like(r.outcome, 2), r.present)
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
    permuted = BlockRewards(r.reward[index], r.group, r.outcome[index], r.present[index])
    torch.testing.assert_close(outcome_conditioned(permuted), outcome_conditioned(r)[index])


def test_a_constant_stratum_has_exactly_no_signal():
    reward = torch.full((7,), -0.1)
    mean = stratified_mean(reward, torch.zeros(7).long(), torch.ones(7).bool())
    assert torch.equal(mean, reward)


def test_a_singleton_is_its_own_baseline():
    r = BlockRewards(torch.tensor([0.3, 0.9]), torch.zeros(2).long(), torch.tensor([0, 1]), torch.ones(2).bool())
    assert torch.equal(outcome_conditioned(r), r.reward)


def test_empty_and_absent_strata():
    assert len(stratified_mean(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).bool())) == 0
    nobody = stratified_mean(torch.ones(3), torch.zeros(3).long(), torch.zeros(3).bool())
    assert torch.equal(nobody, torch.zeros(3))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="shapes differ"):
        stratified_mean(torch.zeros(3), torch.zeros(2).long(), torch.ones(3).bool())
