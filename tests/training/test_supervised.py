"""Imitating demonstrations: the loss and its gradient, by hand and whatever the micro-batches."""

from functools import partial

import pytest
import torch

from bae.batch import Demonstrations, RolloutBatch
from bae.demonstrations.pieces import Piece, encode
from bae.training.forward import completion_logits
from bae.training.options import StepOptions
from bae.training.supervised import SupervisedUpdate
from tests.support.updates import TwoRanks

TEXTS = ["<answer>12</answer>", "<answer>3</answer><confidence>0.5</confidence>", "<answer>-7", "<reasoning>1 2 3"]
QUESTIONS = ["5+7=", "1+2=", "1+2=", "30-37="]


def shown(policy, read=()):
    """Demonstrations; read: the rows of which nothing but the end is learnt."""
    rows = [[Piece(text, learn=n not in read)] for n, text in enumerate(TEXTS)]
    return encode(policy.tokenizer, [policy.encode("", question) for question in QUESTIONS], rows)


def stepped(policy, demonstrations, budget=1000, reduce=None):
    """The metrics of one step by plain SGD at rate 1, and how each weight moved: minus the gradient."""
    options = StepOptions(max_grad_norm=1e9, warmup_steps=0, micro_batch_tokens=budget)
    update = SupervisedUpdate(policy.model, options, TwoRanks(reduce) if reduce else None)
    update.configure(partial(torch.optim.SGD, lr=1.0), steps=1)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    batch = RolloutBatch(0, [], 1, demonstrations=demonstrations)
    update.step(batch)
    moved = {name: p.detach() - before[name] for name, p in policy.model.named_parameters()}
    policy.model.load_state_dict(before, strict=False)
    return batch.metrics, moved


def plain_loss(policy, demonstrations):
    """The mean cross-entropy of the learnt tokens, from padded logits."""
    samples = demonstrations.samples
    logits, ids = completion_logits(policy.model, samples, torch.arange(len(TEXTS)))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return losses[demonstrations.learnt].mean()


@pytest.mark.parametrize("read", [(), (0, 3)])
def test_loss_and_gradient_are_those_of_cross_entropy(tiny, read):
    demonstrations = shown(tiny, read)
    metrics, moved = stepped(tiny, demonstrations)
    loss = plain_loss(tiny, demonstrations)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, p in tiny.model.named_parameters():
        torch.testing.assert_close(moved[name], -p.grad, atol=1e-6, rtol=1e-4)
    norm = torch.stack([p.grad.norm() for p in tiny.model.parameters()]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    tiny.model.zero_grad()


@pytest.mark.parametrize("budget", [1, 20, 45])
def test_micro_batches_change_nothing(tiny, budget):
    demonstrations = shown(tiny)
    (whole, moved), (cut, same) = stepped(tiny, demonstrations), stepped(tiny, demonstrations, budget)
    assert cut == pytest.approx(whole, rel=1e-5)
    for name, change in moved.items():
        torch.testing.assert_close(same[name], change, atol=1e-6, rtol=1e-4)


def test_a_rank_with_half_of_the_tokens_of_the_mean_weighs_half(tiny):
    """Its loss is divided by the tokens that a rank has on average, and DDP takes the mean."""
    demonstrations = shown(tiny)
    _, moved = stepped(tiny, demonstrations)
    _, halved = stepped(tiny, demonstrations, reduce=lambda value: value * 2 if value > 10 else value)
    for name, change in moved.items():
        torch.testing.assert_close(halved[name], change / 2, atol=1e-6, rtol=1e-4)


def test_nothing_is_learnt_where_nothing_is_to_be(tiny):
    demonstrations = shown(tiny)
    metrics, moved = stepped(tiny, Demonstrations(demonstrations.samples, torch.zeros_like(demonstrations.learnt)))
    assert metrics["loss"] == 0 and not any(change.any() for change in moved.values())
