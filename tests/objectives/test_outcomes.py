"""Outcomes that baselines condition on: discrete functions of the prefix, the same in every step."""

import pytest
import torch

from bae.batch import Completion, Problem
from bae.method.baselines import RewardView, outcome_over_batch
from bae.objectives.outcomes import answer_length, given_reward, group_accuracy, verdict
from bae.text.blocks import Section
from bae.text.verdict import Verdict


def completion(answer, word=Verdict.CORRECT):
    sections = () if answer is None else (Section("answer", answer),)
    verdicts = () if answer is None else (word,)
    return Completion(Problem("p", "1+1=", "2"), "", sections, (True,), (0.5,), 9, False, verdicts=verdicts)


COMPLETIONS = [completion("2"), completion("12", Verdict.WRONG), completion("x", Verdict.UNPARSEABLE), completion(None)]
GIVEN, GROUP = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])


def test_each_by_hand():
    assert given_reward(COMPLETIONS, GIVEN, GROUP) is GIVEN
    assert len(set(verdict(COMPLETIONS, GIVEN, GROUP).tolist())) == 4
    assert answer_length(COMPLETIONS, GIVEN, GROUP, edges=[1, 2]).tolist() == [1001.0, 2000.0, 1000.0, 0.0]
    assert group_accuracy(COMPLETIONS, GIVEN, GROUP, bins=4).tolist() == [2001.0, 2000.0, 0.0, 0.0]
    assert group_accuracy(COMPLETIONS[:1], GIVEN[:1], GROUP[:1], bins=4).tolist() == [3001.0]  # all right: the last bin


@pytest.mark.parametrize("outcome", [given_reward, verdict])
def test_they_mean_the_same_in_every_step(outcome):
    alone = outcome(COMPLETIONS[1:2], GIVEN[1:2], GROUP[1:2])
    assert torch.equal(alone, outcome(COMPLETIONS, GIVEN, GROUP)[1:2])


def test_many_bins_across_prompts():
    """Two hard prompts and an easy one: hard ones are compared with each other."""
    group = torch.arange(12) // 4
    given = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0]).float()
    reward = torch.tensor([-0.8, -0.1, -0.1, -0.1, -0.2, -0.6, -0.2, -0.2, -0.1, -0.1, -0.1, -0.9])
    outcome = group_accuracy([completion("2")] * 12, given, group, bins=2)
    found = outcome_over_batch(RewardView(reward, group, outcome, torch.ones(12).bool()))
    torch.testing.assert_close(found[[0, 5]], torch.full((2,), -0.7))
    torch.testing.assert_close(found[[1, 4]], torch.full((2,), -0.15))
    torch.testing.assert_close(found[[8, 11]], torch.tensor([-0.1, -0.9]))
