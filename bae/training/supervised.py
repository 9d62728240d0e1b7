"""The update of a warm start: imitate demonstrations. Plain PyTorch."""

import torch

from bae.batch import RolloutBatch
from bae.training.causal_lm import CausalLM
from bae.training.forward import completion_pass
from bae.training.options import StepOptions
from bae.training.stepper import Loop, MakeOptimizer, Stepper


class SupervisedUpdate:
    """Train a policy on the demonstrations of a batch, one optimiser step for each.

    The loss is the mean of −log p over the tokens that are learnt, of all ranks. The pass is that of `Update`.

    Args:
        model: the policy.
        options: how gradients become a step.
        loop: what the loop around the update provides.

    Attributes:
        stepper: has the optimiser.
    """

    def __init__(self, model: CausalLM, options: StepOptions, loop: Loop | None = None) -> None:
        self.stepper = Stepper(model, options, loop)

    def configure(self, make_optimizer: MakeOptimizer, steps: int) -> None:
        """Make the optimiser and its learning-rate schedule; steps: of the whole run."""
        self.stepper.configure(make_optimizer, steps)

    def step(self, batch: RolloutBatch) -> None:
        """Train on a batch. Writes into `batch.metrics` the loss (nats a token), and what `Stepper.step` returns."""
        shown = batch.require_demonstrations()
        with batch.timed("update"):
            # DDP takes the mean over ranks, so each divides by the tokens that a rank has on average.
            tokens = max(1.0, float(self.stepper.loop.over_ranks(shown.learnt.sum())))
            parts = self.stepper.micro_batches(shown.samples, torch.arange(len(shown.learnt)))
            total = torch.zeros(())
            for part in parts:
                log_p = completion_pass(self.stepper.model, shown.samples, part, temperature=1.0).log_p
                learnt = shown.learnt[part, : log_p.shape[1]].to(log_p.device)
                loss = -(log_p * learnt).sum() / tokens
                with self.stepper.loop.gradients_travel(part is parts[-1]):
                    self.stepper.loop.backward(loss)
                total += loss.detach().cpu()
            batch.metrics["loss"] = float(self.stepper.loop.over_ranks(total))
            batch.metrics |= self.stepper.step(float(total))
