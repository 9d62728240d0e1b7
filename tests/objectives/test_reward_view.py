"""What a baseline is shown of scored completions."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.batch import group_index
from bae.fidelity.compare_to_monte_carlo import sets
from bae.method.baselines import outcome_conditioned
from bae.method.stated_numbers import Candidates
from bae.objectives import Objective
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.objectives.outcomes import answer_length, given_reward, group_accuracy, verdict
from bae.objectives.refining import Ranks
from bae.objectives.reward_view import number_decisions, reward_view, score_table
from bae.objectives.scoring import Scorer
from bae.text.blocks import make_blocks
from bae.text.tokens import token_bytes
from bae.text.verifier import IntegerVerifier
from tests.objectives.test_scoring import BLOCKS, OBJECTIVES, RIGHT, SURE, TOKENIZER, WRONG, score

BAD = RIGHT + SURE.replace("0.9", "1.7")


def test_rescored_by_hand():
    scored = score([RIGHT + SURE, WRONG + SURE, BAD, RIGHT])
    table = score_table(scored, OBJECTIVES, given_reward, group_index(4, 2))
    assert table.outcome.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    first, second = (reward_view(o, j, table, group_index(4, 2)) for j, o in enumerate(OBJECTIVES))
    assert first.rescored is None  # correctness is no score of a number
    # .9 of a wrong and of a right answer; malformed output earns the worst under either.
    expected = torch.tensor([[-0.81, -0.01], [-0.81, -0.01], [-1.0, -1.0], [-1.0, -1.0]])
    torch.testing.assert_close(second.rescored, expected)
    picked = second.rescored.gather(1, second.correct.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(picked, second.reward)


# Outcomes of several objectives, and of which answer.

FOUR = make_blocks({"a": ["answer"], "b": ["confidence"], "c": ["answer"], "d": ["confidence"]})
VALUES = [0.0, 1.0, -1.0, 0.1, 0.5, -0.25]


def scored_with(rewards):
    """Completions of which the rewards alone matter."""
    found = score([RIGHT + SURE] * len(rewards))
    table = torch.tensor(rewards)
    return replace(found, rewards=table, present=table == table, malformed=table != table)


def objective(name, given=None):
    return Objective(name, "block", 0.0, reward=correctness, given=given)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(*[st.sampled_from(VALUES)] * 4), min_size=1, max_size=12))
def test_outcomes_of_several_objectives_are_tuples(rows):
    """Equal where all are equal, and nowhere else; whatever else is in the batch."""
    objectives = [objective("a"), objective("b", "a"), objective("c", ["a", "b"]), objective("d", ("a", "b", "c"))]
    group = torch.zeros(len(rows), dtype=torch.long)
    outcome = score_table(scored_with(rows), objectives, given_reward, group).outcome
    assert outcome.dtype == torch.double and outcome[:, 0].eq(0).all()
    for n, row in enumerate(rows):
        for m, other in enumerate(rows):
            for j in range(4):
                assert (outcome[n, j] == outcome[m, j]) == (row[:j] == other[:j])
        alone = score_table(scored_with([row]), objectives, given_reward, group[:1]).outcome
        assert alone.equal(outcome[n : n + 1])  # means the same in every step


@pytest.mark.parametrize("outcome", [given_reward, verdict, partial(answer_length, edges=[1, 2]),
                                     partial(group_accuracy, bins=4)])  # fmt: skip
def test_one_outcome_is_as_before(outcome):
    """An objective that names one other, plainly or in a list, has that one's outcome itself."""
    scored, group = score([RIGHT + SURE, WRONG + SURE, BAD, RIGHT]), group_index(4, 2)
    plainly = score_table(scored, OBJECTIVES, outcome, group).outcome[:, 1]
    listed = [OBJECTIVES[0], replace(OBJECTIVES[1], given=["correctness"])]
    assert score_table(scored, listed, outcome, group).outcome[:, 1].equal(plainly)
    assert plainly.equal(outcome(scored.completions, scored.rewards[:, 0], group).double())


def test_strata_of_pairs_by_hand():
    """Two groups of four: a completion is compared with those of its group that agree in both outcomes."""
    rows = [(1, 1, 0.0), (1, 1, 1.0), (1, 0, 0.2), (0, 1, 0.4), (1, 1, 0.3), (1, 0, 0.6), (1, 0, 0.8), (0, 1, 0.5)]
    objectives, group = [objective("a"), objective("b"), objective("c", ["a", "b"])], group_index(8, 4)
    table = score_table(scored_with([tuple(map(float, row)) for row in rows]), objectives, given_reward, group)
    rewards = reward_view(objectives[2], 2, table, group)
    hand = [0.5, 0.5, 0.2, 0.4, 0.3, 0.7, 0.7, 0.5]
    torch.testing.assert_close(outcome_conditioned(rewards), torch.tensor(hand))
    one = [objectives[0], objectives[1], objective("c", "a")]
    rewards = reward_view(one[2], 2, score_table(scored_with(rows), one, given_reward, group), group)
    hand = [0.4, 0.4, 0.4, 0.4, 1.7 / 3, 1.7 / 3, 1.7 / 3, 0.5]
    torch.testing.assert_close(outcome_conditioned(rewards), torch.tensor(hand))


def test_each_objective_sees_the_number_and_answer_it_names():
    attempt = "<answer>{}</answer><confidence>{}</confidence>".format
    texts = [attempt(5, 0.9) + attempt(6, 0.4), attempt(6, 0.2) + attempt(5, 1.7)]
    first = Objective("right", "a", 0.0, reward=correctness)
    objectives = [first, *(Objective(f"{number}{answer}", "d", -1.0, score=brier, given="right", number=number,
                                     answer=answer) for number in (0, 1) for answer in (0, 1))]  # fmt: skip
    scored = score(texts, blocks=FOUR, objectives=objectives)
    table = score_table(scored, objectives, given_reward, group_index(2, 2))
    nan = torch.nan
    confidence = [[0.9, 0.9, 0.9, 0.4, 0.4], [0.2, 0.2, 0.2, nan, nan]]
    torch.testing.assert_close(table.confidence, torch.tensor(confidence), equal_nan=True)
    assert table.correct.tolist() == [[1, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
    # The rewards of both outcomes, of which the one that came about is the reward itself.
    hand = {1: [[-0.81, -0.01], [-0.04, -0.64]], 2: [[-0.81, -0.01], [-0.04, -0.64]],
            3: [[-0.16, -0.36], [-1, -1]], 4: [[-0.16, -0.36], [-1, -1]]}  # fmt: skip
    for j, wanted in hand.items():
        rewards = reward_view(objectives[j], j, table, group_index(2, 2))
        torch.testing.assert_close(rewards.rescored, torch.tensor(wanted))
        picked = rewards.rescored.gather(1, rewards.correct.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(picked, rewards.reward)


def test_reports_are_gathered_over_ranks():
    """Two ranks of two completions each: the decisions of a rank's own are those of the whole batch."""
    texts = [RIGHT + SURE, WRONG + SURE.replace("0.9", "0.5"), BAD, RIGHT + SURE.replace("0.9", "0.92")]
    scorer = Scorer(BLOCKS, OBJECTIVES, IntegerVerifier(), token_bytes(TOKENIZER))
    candidates = Candidates(scorer.vocabulary)
    whole = score(texts)
    everyone = number_decisions(whole, scorer, 1, candidates)
    parts = [replace(whole, completions=whole.completions[rows], rewards=whole.rewards[rows],
                     present=whole.present[rows], malformed=whole.malformed[rows], numbers=whole.numbers[rows],
                     block_of=whole.block_of[rows]) for rows in (slice(0, 2), slice(2, 4))]  # fmt: skip
    sent = []
    for part in parts:  # what each rank gathers
        number_decisions(part, scorer, 1, candidates, Ranks(gather=lambda mine: sent.append(mine) or [mine]))
    for rank, part in enumerate(parts):
        mine = number_decisions(part, scorer, 1, candidates, Ranks(rank, lambda mine: list(sent)))
        rows = slice(2 * rank, 2 * rank + 2)
        width = mine.position.shape[1]
        assert mine.position.equal(everyone.position[rows, :width]) and mine.final.equal(everyone.final[rows])
        assert mine.value.equal(everyone.value[rows, :width])
    assert [len(part) for part in sent] == [2, 2]


def test_outcomes_that_are_large_numbers_stay_apart():
    rows = [(0.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    objectives = [objective("a"), objective("b"), objective("c", ["a", "b"])]
    scored = scored_with([(*row, 0.0) for row in rows])
    outcome, group = partial(group_accuracy, bins=2), group_index(8, 4)
    both = score_table(scored, objectives, outcome, group).outcome[:, 2]
    each = [outcome(scored.completions, scored.rewards[:, j], group).tolist() for j in (0, 1)]
    pairs = list(zip(*each, strict=True))
    for n in range(8):
        for m in range(8):
            assert (both[n] == both[m]) == (pairs[n] == pairs[m]), (n, m)


def test_outcomes_that_are_large_numbers_have_names_of_their_own():
    outcome = torch.tensor([1001000.0, 1001001.0], dtype=torch.double)
    assert len([name for name in sets(outcome, torch.ones(2)) if name.startswith("outcome")]) == 2


def test_an_outcome_of_another_length_is_refused():
    found = score([RIGHT + SURE, WRONG + SURE])
    with pytest.raises(ValueError, match=r"outcome: it gave \(1,\) for 2 completions"):
        score_table(found, OBJECTIVES, lambda completions, given, group: given[:1], torch.zeros(2).long())
