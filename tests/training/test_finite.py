"""Optimiser steps that are skipped, because a number is not finite: they leave nothing behind, on any rank."""

import math
from functools import partial

import pytest
import torch

from bae.training.finite import all_finite, non_finite
from bae.training.options import StepOptions
from bae.training.stepper import OneProcess, Stepper
from tests.support.updates import batch, make_update

GOOD = torch.tensor([0.3, -0.4])


class OtherRank(OneProcess):
    """A rank beside one that has a bad number; it notes what it is asked for."""

    def over_ranks(self, value, operation="mean"):
        assert operation == "max" and value == 0  # its own numbers are good
        return torch.ones((), dtype=torch.double)


def stepper(loop=None):
    """Two weights, Adam, and a rate that rises over four steps."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    made = Stepper(model, StepOptions(max_grad_norm=1.0, warmup_steps=4, micro_batch_tokens=1), loop)
    made.configure(partial(torch.optim.AdamW, lr=0.1), steps=9)
    return made


def step(made, gradient, loss=1.0):
    made.model.weight.grad = gradient.clone().view(1, 2)
    return made.step(loss)


BAD = {
    "infinite gradient": (torch.tensor([math.inf, 0.0]), 1.0),
    "NaN in the gradient": (torch.tensor([math.nan, 0.5]), 1.0),
    "infinite loss": (GOOD, -math.inf),
    "NaN as loss": (GOOD, math.nan),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_is_as_if_it_had_not_been(fault, first):
    made, other = stepper(), stepper()
    if not first:
        assert step(made, GOOD) == step(other, GOOD)
    before = made.model.weight.detach().clone()
    metrics = step(made, *BAD[fault])
    assert metrics["skipped"] == 1 and torch.equal(made.model.weight, before) and made.model.weight.grad is None
    assert metrics["lr"] == made.scheduler.get_last_lr()[0] == pytest.approx(0.025 if first else 0.05)
    for gradient in (GOOD, -GOOD):
        metrics = step(made, gradient)
        assert metrics == step(other, gradient) and metrics["skipped"] == 0
    assert torch.equal(made.model.weight, other.model.weight)
    assert str(made.optimizer.state_dict()) == str(other.optimizer.state_dict())


def test_all_ranks_skip_what_one_of_them_must():
    made = stepper(OtherRank())
    assert step(made, GOOD)["skipped"] == 1 and torch.equal(made.model.weight, torch.ones(1, 2))


@pytest.mark.fault("finite")
@pytest.mark.parametrize("optimizer_steps", [1, 2])
def test_an_infinite_advantage_changes_no_weight(tiny, optimizer_steps):
    """With two optimiser steps, the one whose half of the completions is good is taken."""
    work = batch()
    work.require_advantages().per_block[0, 0] = torch.inf
    before = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
    made = make_update(tiny, optimizer_steps=optimizer_steps)
    made.step(work)
    assert work.metrics["skipped"] == 1 / optimizer_steps and math.isfinite(work.metrics["entropy"])
    changed = any(not torch.equal(p, before[name]) for name, p in tiny.model.named_parameters())
    assert changed == (optimizer_steps == 2) and all_finite(tiny.model.parameters())


def test_numbers_that_are_not_finite_are_found():
    good = {"a": torch.ones(3), "b": [torch.tensor(7), {"c": torch.ones(2, dtype=torch.bfloat16)}], "d": "text"}
    assert non_finite(good) is None and non_finite({}) is None
    assert all_finite([torch.full((4,), 3e38), torch.ones(2)])  # their norm overflows
    for value in (math.inf, -math.inf, math.nan):
        spoiled = good | {"b": [torch.tensor(7), {"c": torch.tensor([1.0, value], dtype=torch.bfloat16)}]}
        assert non_finite(spoiled) == "b.1.c"
        assert not all_finite([torch.ones(2), torch.tensor([value])])
