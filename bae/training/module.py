"""The Lightning module around the policy. Each training step is one step of an update."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from bae.batch import RolloutBatch
from bae.training.policy import Policy
from bae.training.stepper import MakeOptimizer, Stepper

SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


class Trains(Protocol):
    """Train on a batch: `Update` by blockwise advantages, `SupervisedUpdate` on demonstrations."""

    stepper: Stepper

    def configure(self, make_optimizer: MakeOptimizer, steps: int) -> None:
        """Make the optimiser and its schedule; steps: batches of the whole run."""
        ...

    def step(self, batch: RolloutBatch) -> None:
        """Train on a batch, and write into its metrics what was measured."""
        ...


class PolicyModule(L.LightningModule):
    """Train `policy` on batches to which callbacks have written what the update reads.

    Optimisation is manual, because a rollout batch may take several optimiser steps.

    Args:
        policy: the policy.
        update: what one training step does.
        optimizer: parameters -> optimiser (a partial).
        steps: rollout batches of the whole run.
    """

    def __init__(self, policy: Policy, update: Trains, optimizer: MakeOptimizer, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.model = policy.model
        self.update = update
        self.update.stepper.loop = LightningLoop(self)
        self.make_optimizer = optimizer
        self.steps = steps

    def configure_optimizers(self) -> Any:
        self.update.configure(self.make_optimizer, self.steps)
        stepper = self.update.stepper
        return {"optimizer": stepper.optimizer, "lr_scheduler": stepper.scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Frozen weights are where they came from.
        if self.policy.adapter is not None:
            trained = self._trained()
            checkpoint["state_dict"] = {n: x for n, x in checkpoint["state_dict"].items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy.adapter is not None:
            trained = self._trained()
            frozen = {n: weight for n, weight in self.state_dict().items() if n not in trained}
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def _trained(self) -> set[str]:
        """Return the names of the weights that are trained."""
        return {name for name, weight in self.named_parameters() if weight.requires_grad}

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        # Lightning's wrappers count the optimiser steps and apply the precision plugin.
        stepper = self.update.stepper
        stepper.optimizer, stepper.scheduler = self.optimizers(), self.lr_schedulers()
        self.update.step(batch)


class LightningLoop:
    """Provide what the update needs of Lightning's trainer and strategy (see bae.training.stepper.Loop)."""

    def __init__(self, module: PolicyModule) -> None:
        self._module = module

    @property
    def is_sharded(self) -> bool:
        return isinstance(self._module.trainer.strategy, SHARDED)

    def backward(self, loss: Tensor) -> None:
        self._module.manual_backward(loss)

    def gradients_travel(self, now: bool) -> AbstractContextManager[Any]:
        """Under DDP, let ranks exchange gradients with the last micro-batch only."""
        wrapped: Any = self._module.trainer.strategy.model
        return nullcontext() if now or not hasattr(wrapped, "no_sync") else wrapped.no_sync()

    def over_ranks(self, value: Tensor, operation: str = "mean") -> Tensor:
        trainer = self._module.trainer
        if trainer.world_size > 1:
            reduced = trainer.strategy.reduce(value.double().to(self._module.device), reduce_op=operation)
            assert isinstance(reduced, Tensor)
            value = reduced
        return value.double().cpu()
