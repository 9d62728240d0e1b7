"""The loss and the advantages that go into it: hand-worked values, identities, gradients."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.method.advantages import advantages, spread_over_tokens, sum_by_block
from bae.method.losses import (
    block_mean,
    blockwise_clipped_loss,
    constant_length,
    is_clipped,
    k1,
    k2,
    k3,
    log_probs_and_entropy,
    token_mean,
)

# Two completions, two blocks, the second completion shorter and without a second block.
BLOCK_OF = torch.tensor([[0, 0, 1, 1], [0, 0, 0, -1]])


TOKENS = torch.tensor([5.0, 2.0])
WEIGHTS = torch.tensor([1.0, 3.0])
AGGREGATIONS = [block_mean, token_mean, partial(constant_length, length=8)]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (AGGREGATIONS[0], [[1 / 4, 1 / 4, 3 / 4, 3 / 4], [1 / 6, 1 / 6, 1 / 6, 0]]),
        (AGGREGATIONS[1], [[1 / 5, 1 / 5, 3 / 2, 3 / 2], [1 / 5, 1 / 5, 1 / 5, 0]]),
        (AGGREGATIONS[2], [[1 / 16, 1 / 16, 3 / 16, 3 / 16], [1 / 16, 1 / 16, 1 / 16, 0]]),
    ],
)
def test_weights_by_hand(aggregation, expected):
    torch.testing.assert_close(aggregation(BLOCK_OF, WEIGHTS, TOKENS), torch.tensor(expected))
    # Blocks in another order, and one that nobody reached.
    order = torch.tensor([2, 0, -1])  # the last is for -1
    weights, tokens = torch.tensor([3.0, 9.0, 1.0]), torch.tensor([2.0, 0.0, 5.0])
    torch.testing.assert_close(aggregation(order[BLOCK_OF], weights, tokens), torch.tensor(expected))


def test_the_mean_over_tokens_is_of_all_ranks():
    """Of two ranks, one without any token of the second block: the mean over ranks gives each block its weight."""
    ranks = [BLOCK_OF, BLOCK_OF.clamp(max=0)]
    tokens = torch.tensor([(5 + 7) / 2, (2 + 0) / 2])
    per_rank = [token_mean(block_of, WEIGHTS, tokens) for block_of in ranks]
    for k in range(2):
        total = sum(float(w[block_of == k].sum()) for w, block_of in zip(per_rank, ranks, strict=True))
        assert total / 2 == pytest.approx(float(WEIGHTS[k]))


@given(st.lists(st.lists(st.integers(-1, 2), min_size=6, max_size=6), min_size=1, max_size=5))
@settings(deadline=None)
def test_what_the_weights_of_a_block_add_up_to(rows):
    block_of, weights = torch.tensor(rows), torch.tensor([1.0, 2.0, 0.5])
    counts = torch.stack([(block_of == k).sum(1) for k in range(3)], 1).float()
    mean, token, constant = (a(block_of, weights, counts.sum(0)) for a in AGGREGATIONS)
    for k in range(3):
        mine = block_of == k
        each = (mean * mine).sum(1)
        torch.testing.assert_close(each, (counts[:, k] > 0) * weights[k] / len(rows))
        torch.testing.assert_close((token * mine).sum(), weights[k] * (counts[:, k].sum() > 0))
        torch.testing.assert_close((constant * mine).sum(1), counts[:, k] * weights[k] / 8 / len(rows))
    assert not any(w[block_of < 0].any() for w in (mean, token, constant))


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
    loss = blockwise_clipped_loss(ratio.log(), torch.zeros(1, 4), advantage, weights, clip=0.2, clip_high=0.2)
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert is_clipped(ratio.log(), torch.zeros(1, 4), advantage, 0.2, 0.2).tolist() == [[True, False, False, True]]


def test_the_upper_clip_has_a_bound_of_its_own():
    ratio = torch.tensor([[1.5, 1.25, 0.5, 0.75, 0.5]])
    advantage = torch.tensor([[2.0, 2.0, -2.0, -2.0, 2.0]])
    # min(3, 2.6), min(2.5, 2.5), min(-1, -1.6), min(-1.5, -1.6), min(1, 1.6)
    expected = -(2.6 + 2.5 - 1.6 - 1.6 + 1.0)
    old, weights = torch.zeros(1, 5), torch.ones(1, 5)
    loss = blockwise_clipped_loss(ratio.log(), old, advantage, weights, clip=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, torch.tensor(expected))
    clipped = is_clipped(ratio.log(), old, advantage, 0.2, 0.3)
    assert clipped.tolist() == [[True, False, True, True, False]]
    log_p = ratio.log().requires_grad_()  # where the clip took the gradient away, there is none
    blockwise_clipped_loss(log_p, old, advantage, weights, clip=0.2, clip_high=0.3).backward()
    assert (log_p.grad == 0).equal(clipped)


@pytest.mark.parametrize(
    ("aggregation", "denominator"),
    [
        (block_mean, lambda length: 3 * length),  # GRPO (arXiv 2402.03300, eq. 3)
        (token_mean, lambda length: 9),  # DAPO (arXiv 2503.14476, eq. 8): all tokens
        (partial(constant_length, length=20), lambda length: 3 * 20),  # Dr. GRPO (arXiv 2503.20783)
    ],
)
def test_with_one_block_the_loss_is_a_published_one(aggregation, denominator):
    torch.manual_seed(1)
    lengths, width = [5, 3, 1], 5
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    log_p, old = -torch.rand(3, width), -torch.rand(3, width)
    advantage = torch.tensor([0.4, -0.6, 0.2])
    block_of = torch.where(mask, 0, -1)
    weights = aggregation(block_of, torch.ones(1), mask.sum().view(1))
    ours = blockwise_clipped_loss(log_p, old, spread_over_tokens(advantage.unsqueeze(1), block_of), weights, 0.2, 0.28)
    published = 0.0
    for i, length in enumerate(lengths):  # in plain loops, as the papers write it
        for t in range(length):
            ratio = float((log_p[i, t] - old[i, t]).exp())
            term = min(ratio * float(advantage[i]), min(max(ratio, 0.8), 1.28) * float(advantage[i]))
            published -= term / denominator(length)
    assert float(ours) == pytest.approx(published, abs=1e-6)


def test_gradient_agrees_with_finite_differences():
    torch.manual_seed(2)
    logits = torch.randn(2, 4, 7, dtype=torch.double, requires_grad=True)
    ids = torch.randint(0, 7, (2, 4))
    old = torch.log_softmax(logits.detach() + 0.05 * torch.randn_like(logits), -1).gather(-1, ids[..., None])[..., 0]
    weights = block_mean(BLOCK_OF, torch.tensor([1.0, 2.0]), TOKENS).double()
    advantage = torch.randn(2, 4, dtype=torch.double)

    def loss(x):
        log_p = torch.log_softmax(x / 0.7, -1)
        picked = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return blockwise_clipped_loss(picked, old, advantage, weights, 0.2, 0.2) - 0.1 * entropy.sum()

    assert torch.autograd.gradcheck(loss, logits, eps=1e-6, atol=1e-7)


def test_log_probs_and_entropy():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    log_p, entropy = log_probs_and_entropy(logits, torch.tensor([[1]]), 1.0)
    torch.testing.assert_close(log_p, torch.log(torch.tensor([[0.25]])))
    torch.testing.assert_close(entropy, torch.tensor([[1.5 * 0.6931472]]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_tokens_outside_every_block_weigh_nothing(aggregation):
    assert torch.equal(aggregation(torch.full((2, 3), -1), torch.ones(2), torch.zeros(2)), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"), [(k1, 0.693147, 1.0), (k2, 0.240227, 0.693147), (k3, 0.193147, 0.5)]
)
def test_divergence_of_a_token_by_hand(estimator, value, gradient):
    """A token with probability 1/2 in the policy and 1/4 in the reference: r = 2."""
    log_p = torch.tensor([0.5]).log().requires_grad_()
    found = estimator(log_p, torch.tensor([0.25]).log())
    found.sum().backward()
    assert found.item() == pytest.approx(value, abs=1e-5) and log_p.grad.item() == pytest.approx(gradient, abs=1e-5)


def test_what_estimators_of_divergence_are_in_the_mean():
    """Over all tokens of a distribution, each with its probability: the values, and the means of their gradients."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.double, requires_grad=True)
    reference = torch.tensor([-0.5, 0.2, 1.0, 0.4], dtype=torch.double).log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.exp().detach()  # draws are not differentiated
    forward, backward = (log_p.exp() * (log_p - reference)).sum(), (reference.exp() * (reference - log_p)).sum()
    (to_forward,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (to_backward,) = torch.autograd.grad(backward, logits, retain_graph=True)
    means = {k: (p * k(log_p, reference)).sum() for k in (k1, k2, k3)}
    gradients = {k: torch.autograd.grad(mean, logits, retain_graph=True)[0] for k, mean in means.items()}
    torch.testing.assert_close(means[k1], forward)
    torch.testing.assert_close(means[k3], forward)
    close = (0.9 * reference + 0.1 * log_p.detach()).log_softmax(0)  # k2 is right where r is near 1
    value = (close.exp() * (close - reference)).sum()
    assert abs((close.exp() * k2(close, reference)).sum() - value) < 0.05 * value
    torch.testing.assert_close(gradients[k1], torch.zeros(4, dtype=torch.double))
    torch.testing.assert_close(gradients[k2], to_forward)
    torch.testing.assert_close(gradients[k3], to_backward)
