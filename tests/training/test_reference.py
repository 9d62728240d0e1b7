"""The divergence from the policy of the start: in the loss, in what is logged, and against plain log-probabilities."""

import pytest
import torch
from torch.testing import assert_close

from bae.method import losses
from bae.training.forward import completion_logits
from tests.support import needs_peft
from tests.support.updates import batch, make_update
from tests.training.test_lora import with_lora, without

ROWS, COEF = torch.arange(8), 0.3


def moved(model, by=0.05):
    """Move all weights a little, as training would."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn(weight.shape, generator=draw)


def change(policy, update, work):
    """What one plain SGD step of rate 0.1 takes away: the gradient."""
    before = [weight.detach().clone() for weight in policy.model.parameters()]
    update.step(work)
    return [(old - new.detach()) / 0.1 for old, new in zip(before, policy.model.parameters(), strict=True)]


def plain(model, samples):
    """Log-probabilities from padded rows."""
    logits, ids = completion_logits(model, samples, ROWS)
    return (logits / 0.8).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def by_hand(policy, base, work, estimator):
    """The gradient of COEF · sum_t w_t k_t, and the mean of k over tokens, by autograd on plain rows."""
    block_of, mask = work.scored.block_of, work.samples.completion_mask
    weights = losses.block_mean(block_of, torch.tensor([1.0, 2.0]), torch.ones(2))
    with torch.no_grad():
        reference = plain(base.model, work.samples)
    policy.model.zero_grad()
    k = estimator(plain(policy.model, work.samples), reference)
    (COEF * (weights * k).sum()).backward()
    found = [weight.grad.clone() for weight in policy.model.parameters()]
    policy.model.zero_grad()
    return found, float((k.detach() * mask).sum() / mask.sum())


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("tokens", [1000, 25])
def test_the_loss_has_the_divergence_from_the_start(tiny, name, tokens):
    base, rest = without(tiny), without(tiny)
    options = {"micro_batch_tokens": tokens}
    update = make_update(tiny, kl_coef=COEF, kl_estimator=name, **options)  # its reference is the policy as it is now
    for policy in (tiny, rest):
        moved(policy.model)
    wanted, mean = by_hand(tiny, base, batch(), getattr(losses, name))
    work = batch()
    found = change(tiny, update, work)
    without_it = change(rest, make_update(rest, **options), batch())
    assert max(float(g.abs().max()) for g in wanted) > 1e-2 and abs(mean) > 1e-3
    assert_close([a - b for a, b in zip(found, without_it, strict=True)], wanted, rtol=1e-3, atol=2e-5)
    assert work.metrics["kl"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_at_the_start_it_is_zero_and_so_is_its_gradient(tiny, name):
    other = without(tiny)
    work = batch()
    found = change(tiny, make_update(tiny, kl_coef=COEF, kl_estimator=name), work)
    assert work.metrics["kl"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(found, change(other, make_update(other), batch()), strict=True))


def test_without_a_coefficient_nothing_is_held_or_logged(tiny):
    update, work = make_update(tiny), batch()
    update.step(work)
    assert update.reference is None and "kl" not in work.metrics


def test_several_optimiser_steps_log_their_mean(tiny):
    update, work = make_update(tiny, kl_coef=COEF, optimizer_steps=2), batch()
    update.step(work)
    assert work.metrics["kl"] > 0  # of the second step, because the first had moved the policy


@needs_peft
def test_with_adapters_the_reference_is_the_policy_without_them(tiny):
    base = without(tiny)
    policy = with_lora(tiny)
    update, work = make_update(policy, kl_coef=COEF), batch()
    with update.reference.model() as reference:
        assert reference is policy.model
    with torch.no_grad():
        mask = work.samples.completion_mask
        k = losses.k3(plain(policy.model, work.samples), plain(base.model, work.samples))
    update.step(work)
    assert (
        work.metrics["kl"] == pytest.approx(float((k * mask).sum() / mask.sum()), rel=1e-3) and work.metrics["kl"] > 0
    )
    assert work.metrics["grad_norm"] > 0
