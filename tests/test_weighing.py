"""What a baseline is shown of scored completions."""

import torch

from bae.batch import group_index
from bae.outcomes import given_reward
from bae.weighing import block_rewards, score_table
from tests.test_scoring import OBJECTIVES, RIGHT, SURE, WRONG, score

BAD = RIGHT + SURE.replace("0.9", "1.7")


def test_rescored_by_hand():
    scored = score([RIGHT + SURE, WRONG + SURE, BAD, RIGHT])
    table = score_table(scored, OBJECTIVES, given_reward, group_index(4, 2))
    assert table.outcome.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    first, second = (block_rewards(o, j, table, group_index(4, 2)) for j, o in enumerate(OBJECTIVES))
    assert first.rescored is None  # correctness is no score of a number
    # .9 of a wrong and of a right answer; malformed output earns the worst under either.
    expected = torch.tensor([[-0.81, -0.01], [-0.81, -0.01], [-1.0, -1.0], [-1.0, -1.0]])
    torch.testing.assert_close(second.rescored, expected)
    picked = second.rescored.gather(1, second.correct.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(picked, second.reward)
