"""The loss and the advantages that go into it: hand-worked values, identities, gradients."""

import pytest
import torch

from bae.advantages import advantages, spread_over_tokens, sum_by_block
from bae.losses import blockwise_clipped_loss, is_clipped, log_probs_and_entropy, token_weights

# Two completions, two blocks, the second completion shorter and without a second block.
BLOCK_OF = torch.tensor([[0, 0, 1, 1], [0, 0, 0, -1]])


def test_token_weights_by_hand():
    weights = token_weights(BLOCK_OF, torch.tensor([1.0, 3.0]))
    expected = torch.tensor([[1 / 4, 1 / 4, 3 / 4, 3 / 4], [1 / 6, 1 / 6, 1 / 6, 0.0]])
    torch.testing.assert_close(weights, expected)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, -0.04], [0.0, -0.5]])
    present = torch.tensor([[True, True], [True, False]])
    per_objective = advantages(rewards, torch.tensor([[0.5, -0.3], [0.5, 0.0]]), present)
    torch.testing.assert_close(per_objective, torch.tensor([[0.5, 0.26], [-0.5, 0.0]]))
    torch.testing.assert_close(spread_over_tokens(per_objective, BLOCK_OF),
                               torch.tensor([[0.5, 0.5, 0.26, 0.26], [-0.5, -0.5, -0.5, 0.0]]))  # fmt: skip


def test_objectives_that_share_a_block_are_summed_there():
    per_objective = torch.tensor([[1.0, 2.0, 3.0]])
    assert sum_by_block(per_objective, [0, 1, 1], [1.0, 0.5, 2.0], 2).tolist() == [[1.0, 7.0]]


def test_the_second_reward_leaves_the_first_block_bit_equal():
    torch.manual_seed(0)
    rewards, baselines, present = torch.rand(8, 2), torch.rand(8, 2), torch.ones(8, 2).bool()
    changed = rewards.clone()
    changed[:, 1] = -torch.rand(8)
    block_of = torch.randint(-1, 2, (8, 5))
    before, after = (spread_over_tokens(advantages(r, baselines, present), block_of) for r in (rewards, changed))
    assert torch.equal(before[block_of == 0], after[block_of == 0])
    assert not torch.equal(before[block_of == 1], after[block_of == 1])


def test_loss_by_hand():
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    advantage = torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    weights = torch.full((1, 4), 0.25)
    # min(3, 2.4), min(1, 1.6), min(-3, -2.4), min(-1, -1.6)
    expected = -0.25 * (2.4 + 1.0 - 3.0 - 1.6)
    loss = blockwise_clipped_loss(ratio.log(), torch.zeros(1, 4), advantage, weights, clip=0.2)
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert is_clipped(ratio.log(), torch.zeros(1, 4), advantage, 0.2).tolist() == [[True, False, False, True]]


def test_one_block_is_grpo_with_a_mean_over_each_sequence():
    torch.manual_seed(1)
    lengths, width = [5, 3, 1], 5
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    log_p, old = -torch.rand(3, width), -torch.rand(3, width)
    advantage = torch.tensor([0.4, -0.6, 0.2])
    block_of = torch.where(mask, 0, -1)
    ours = blockwise_clipped_loss(
        log_p, old, spread_over_tokens(advantage.unsqueeze(1), block_of), token_weights(block_of, torch.ones(1)), 0.2
    )
    grpo = 0.0
    for i, length in enumerate(lengths):  # GRPO as its paper writes it, in plain loops (arXiv 2402.03300, eq. 3)
        terms = []
        for t in range(length):
            ratio = float((log_p[i, t] - old[i, t]).exp())
            terms.append(min(ratio * float(advantage[i]), min(max(ratio, 0.8), 1.2) * float(advantage[i])))
        grpo -= sum(terms) / length / len(lengths)
    assert float(ours) == pytest.approx(grpo, abs=1e-6)


def test_gradient_agrees_with_finite_differences():
    torch.manual_seed(2)
    logits = torch.randn(2, 4, 7, dtype=torch.double, requires_grad=True)
    ids = torch.randint(0, 7, (2, 4))
    old = torch.log_softmax(logits.detach() + 0.05 * torch.randn_like(logits), -1).gather(-1, ids[..., None])[..., 0]
    weights = token_weights(BLOCK_OF, torch.tensor([1.0, 2.0])).double()
    advantage = torch.randn(2, 4, dtype=torch.double)

    def loss(x):
        log_p = torch.log_softmax(x / 0.7, -1)
        picked = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return blockwise_clipped_loss(picked, old, advantage, weights, 0.2) - 0.1 * entropy.sum()

    assert torch.autograd.gradcheck(loss, logits, eps=1e-6, atol=1e-7)


def test_log_probs_and_entropy():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    log_p, entropy = log_probs_and_entropy(logits, torch.tensor([[1]]), 1.0)
    torch.testing.assert_close(log_p, torch.log(torch.tensor([[0.25]])))
    torch.testing.assert_close(entropy, torch.tensor([[1.5 * 0.6931472]]))


def test_tokens_outside_every_block_weigh_nothing():
    weights = token_weights(torch.full((2, 3), -1), torch.ones(2))
    assert torch.equal(weights, torch.zeros(2, 3))
