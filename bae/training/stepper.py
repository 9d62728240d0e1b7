"""What every update does alike: cut a batch into micro-batches, clip the gradients, step optimiser and schedule.

What differs between one process, DDP and sharded strategies is a `Loop`: bae.training.module has Lightning's.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.training.causal_lm import CausalLM
from bae.training.options import StepOptions
from bae.training.packing import micro_batches
from bae.training.sharding import whole

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


class Loop(Protocol):
    """Provide what differs between one process, DDP and sharded strategies."""

    def backward(self, loss: Tensor) -> None:
        """Take the backward pass."""
        ...

    def gradients_travel(self, now: bool) -> AbstractContextManager[Any]:
        """Return a context in which a backward pass exchanges gradients between ranks, or does not."""
        ...

    def over_ranks(self, value: Tensor, operation: str = "mean") -> Tensor:
        """Reduce a value over all ranks; of the same shape, in double precision, on the CPU."""
        ...


class OneProcess:
    """Provide the loop of one process without a framework."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients_travel(self, now: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def over_ranks(self, value: Tensor, operation: str = "mean") -> Tensor:
        return value.double().cpu()


def lr_share(step: int, total: int, warmup: int, final: float) -> float:
    """Return the share of the learning rate at optimiser step `step` (from 0) of `total`.

    It rises to 1 over `warmup` steps, then falls linearly to `final` at the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - final) * min(1.0, (step + 1 - warmup) / max(1, total - warmup))


class Stepper:
    """Hold the optimiser and its schedule, and step them.

    Args:
        model: the policy.
        options: how gradients become a step.
        loop: what the loop around the update provides; None for one process.

    Attributes:
        model: what is trained: the policy, or its shards (bae.training.sharding).
        optimizer, scheduler: set by `configure`, or by whoever wraps them.
    """

    def __init__(self, model: CausalLM, options: StepOptions, loop: Loop | None = None) -> None:
        self.model = model
        self.options = options
        self.loop: Loop = loop or OneProcess()
        self.optimizer: Any = None
        self.scheduler: Any = None

    def configure(self, make_optimizer: MakeOptimizer, steps: int) -> None:
        """Make the optimiser and its learning-rate schedule; steps: optimiser steps of the whole run."""

        def schedule(step: int) -> float:
            return lr_share(step, steps, self.options.warmup_steps, self.options.final_lr)

        self.optimizer = make_optimizer(weight for weight in self.model.parameters() if weight.requires_grad)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def micro_batches(self, samples: SampledTokens, rows: Tensor) -> list[Tensor]:
        """Cut completions into equally many micro-batches on every rank: passes over sharded weights are collective.

        rows: (R,) long.
        """
        budget = self.options.micro_batch_tokens
        parts = micro_batches(samples, rows, budget)
        most = self.loop.over_ranks(torch.tensor(len(parts)), "max")
        return parts if len(parts) == most else micro_batches(samples, rows, budget, int(most))

    def step(self, loss: float) -> dict[str, float]:
        """Clip the gradients by their global norm, and step the optimiser and the schedule.

        If the loss or the norm is not finite on some rank, all ranks skip the step: weights, optimiser and schedule
        stay as they are, as if this batch had not been, and the gradients are dropped.

        Args:
            loss: that the gradients are of, on this rank.

        Returns:
            grad_norm, before clipping; lr; and skipped, 1 if the step was skipped and else 0.
        """
        norm = self.clip_gradients()
        bad = not (math.isfinite(norm) and math.isfinite(loss))
        skipped = bool(self.loop.over_ranks(torch.tensor(float(bad)), "max") > 0)
        lr = float(self.scheduler.get_last_lr()[0])
        if not skipped:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return {"grad_norm": norm, "lr": lr, "skipped": float(skipped)}

    def clip_gradients(self) -> float:
        """Clip the gradients by their global norm, and return the norm before."""
        weights = list(self.model.parameters())
        norm = whole(torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(weights, self.options.max_grad_norm, norm)
        return float(norm)
