"""What advantages are divided by: worked by hand, and what must not change them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.method import normalisation
from bae.method.advantages import advantages
from bae.method.baselines import RewardView, group_mean, outcome_conditioned

EPSILON = 1e-4


def none(advantage, group, present):
    return normalisation.none(advantage, group, present, group)


def group_std(advantage, group, present, epsilon):
    return normalisation.group_std(advantage, group, present, group, epsilon)


def batch_std(advantage, group, present, epsilon):
    return normalisation.batch_std(advantage, group, present, group, epsilon)


FUNCTIONS = [none, lambda *a: group_std(*a, EPSILON), lambda *a: batch_std(*a, EPSILON)]


def test_by_hand():
    advantage = torch.tensor([1.0, -1.0, 7.0, 0.0, 2.0, -4.0, 5.0, 9.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    present = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0]).bool()
    assert none(advantage, group, present).tolist() == [1, -1, 0, 0, 2, -4, 5, 0]
    # Around 0: group 0 has 1 + 1 + 0, over 2; group 1 has 4 + 16, over 1, though it is not centred. Group 2: one alone.
    by_group = group_std(advantage, group, present, 0.5)
    s = 20**0.5 + 0.5
    torch.testing.assert_close(by_group, torch.tensor([1 / 1.5, -1 / 1.5, 0, 0, 2 / s, -4 / s, 0, 0]))
    # 1, -1, 0, 2, -4, 5: mean 1/2, squares 0.25 + 2.25 + 0.25 + 2.25 + 20.25 + 20.25 = 45.5, over 5.
    by_batch = batch_std(advantage, group, present, 0.5)
    s = 9.1**0.5 + 0.5
    torch.testing.assert_close(by_batch, torch.tensor([0.5, -1.5, 0, -0.5, 1.5, -4.5, 4.5, 0]) / s)


def test_with_the_group_mean_it_is_grpo():
    """As TRL computes it: a view by groups, torch's own mean and std."""
    torch.manual_seed(0)
    reward, group = torch.rand(24), torch.arange(24) // 6
    present = torch.ones(24).bool()
    baseline = group_mean(RewardView(reward, group, torch.zeros(24), present))
    ours = group_std(advantages(reward, baseline, present), group, present, EPSILON)
    rows = reward.view(4, 6)
    grpo = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + EPSILON)
    torch.testing.assert_close(ours, grpo.flatten(), atol=1e-5, rtol=1e-5)


def test_with_ocb_it_is_the_spread_around_the_means_of_the_outcomes():
    reward = torch.tensor([0.2, 0.4, 5.0, 5.0, 5.6])
    outcome = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    group, present = torch.zeros(5).long(), torch.ones(5).bool()
    advantage = advantages(reward, outcome_conditioned(RewardView(reward, group, outcome, present)), present)
    # -.1, .1, -.2, -.2, .4: squares .26, over 4
    expected = torch.tensor([-0.1, 0.1, -0.2, -0.2, 0.4]) / (0.065**0.5 + EPSILON)
    torch.testing.assert_close(group_std(advantage, group, present, EPSILON), expected)


def test_strata_are_standardised_and_blended_with_the_group():
    """Stratified GRPO by hand: two wrong answers, three right ones, one prompt; and one alone."""
    reward = torch.tensor([0.2, 0.4, 5.0, 5.0, 5.6, 7.0])
    group, stratum = torch.tensor([0, 0, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 1, 2])
    present = torch.ones(6).bool()
    within = torch.tensor([-(0.5**0.5), 0.5**0.5, -(1 / 3**0.5), -(1 / 3**0.5), 2 / 3**0.5, 0])
    over = torch.zeros(6)
    over[:5] = (reward[:5] - reward[:5].mean()) / reward[:5].std()
    centred = advantages(reward, group_mean(RewardView(reward, group, torch.zeros(6), present)), present)
    for blend in (0.0, 0.3, 1.0):
        found = normalisation.stratum_std(centred, group, present, stratum, blend, 1e-9)
        torch.testing.assert_close(found, blend * within + (1 - blend) * over, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"blend=1\.5: must be between 0 and 1"):
        normalisation.stratum_std(centred, group, present, stratum, 1.5, EPSILON)


@pytest.mark.parametrize("value", [0.1, 1 / 3])
def test_advantages_that_are_all_alike(value):
    alike, group, present = torch.full((7,), value), torch.zeros(7).long(), torch.ones(7).bool()
    assert batch_std(alike, group, present, EPSILON).tolist() == [0] * 7  # exactly: no signal
    assert group_std(0 * alike, group, present, EPSILON).tolist() == [0] * 7
    # Not centred, as with baseline none: never divided by epsilon alone.
    expected = torch.full((7,), value / (value * (7 / 6) ** 0.5 + EPSILON))
    torch.testing.assert_close(group_std(alike, group, present, EPSILON), expected)


def test_one_alone_and_nobody():
    one = torch.tensor([False, True, False])
    for function in FUNCTIONS[1:]:
        assert function(torch.tensor([1.0, 2.0, 3.0]), torch.arange(3), one).tolist() == [0, 0, 0]
    for function in FUNCTIONS:
        assert function(torch.ones(3), torch.zeros(3).long(), torch.zeros(3).bool()).tolist() == [0, 0, 0]
        assert function(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).bool()).shape == (0,)


@st.composite
def batches(draw):
    """Advantages on a grid, so that a spread is 0 or no rounding error."""
    n = draw(st.integers(1, 12))
    of = lambda each: draw(st.lists(each, min_size=n, max_size=n))  # noqa: E731
    advantage = torch.tensor(of(st.integers(-8, 8)), dtype=torch.double) / 8
    return advantage, torch.tensor(of(st.integers(0, 3))), torch.tensor(of(st.booleans()))


def same(first, second):
    torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(batch=batches(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_what_must_not_matter(function, batch, seed):
    advantage, group, present = batch
    found = function(advantage, group, present)
    assert not found[~present].any()
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    same(function(advantage[order], group[order], present[order]), found[order])
    same(function(advantage, 7 - 3 * group, present), found)  # labels are names
    spoilt = torch.where(present, advantage, torch.nan)  # nothing of who is not present
    same(function(spoilt, group, present), found)
    same(function(-advantage, group, present), -found)


@given(batch=batches(), scale=st.sampled_from([0.01, 3.0, 1000.0]))
@settings(deadline=None)
def test_the_scale_of_rewards_does_not_matter(batch, scale):
    advantage, group, present = batch
    for function in (group_std, batch_std):
        same(function(scale * advantage, group, present, scale * 0.1), function(advantage, group, present, 0.1))


@given(batch=batches())
@settings(deadline=None)
def test_groups_do_not_know_of_each_other(batch):
    advantage, group, present = batch
    found = group_std(advantage, group, present, EPSILON)
    for g in group.unique():
        mine = group == g
        same(group_std(advantage[mine], group[mine], present[mine], EPSILON), found[mine])
    assert not found[advantage == 0].any()


@given(batch=batches())
@settings(deadline=None)
def test_what_comes_out_is_of_unit_spread(batch):
    advantage, group, present = batch
    mine = batch_std(advantage, group, present, EPSILON)[present]
    if len(advantage[present].unique()) > 1:
        assert mine.std().item() == pytest.approx(1, abs=0.01) and mine.mean().item() == pytest.approx(0, abs=1e-9)
