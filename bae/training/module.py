"""The Lightning module around the policy. Each training step is one step of an update."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from bae.batch import RolloutBatch
from bae.training.policy import Policy
from bae.training.sharding import Shards
from bae.training.stepper import MakeOptimizer, Stepper


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

    Under a strategy that shards weights, the policy has whole weights at all times but during an update. So whatever
    callbacks do with it is the same as in one process, and ranks need not do the same.

    Args:
        policy: the policy.
        update: what one training step does.
        optimizer: parameters -> optimiser (a partial).
        steps: rollout batches of the whole run.

    Attributes:
        model: what is trained: the policy's model, or its shards.
    """

    def __init__(self, policy: Policy, update: Trains, optimizer: MakeOptimizer, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.model = policy.model
        self.shards: Shards | None = None
        self.update = update
        self.update.stepper.loop = LightningLoop(self)
        self.make_optimizer = optimizer
        self.steps = steps

    def configure_model(self) -> None:
        if self.shards is None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.shards = Shards(self.policy.model, self.trainer.strategy.device_mesh["data_parallel"])
            self.model = self.update.stepper.model = self.shards.model

    def on_fit_start(self) -> None:
        self._gather()

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
        self._gather()  # the strategy has put weights into the shards before

    def _trained(self) -> set[str]:
        """Return the names of the weights that are trained."""
        return {name for name, weight in self.named_parameters() if weight.requires_grad}

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        # Lightning's wrappers count the optimiser steps and apply the precision plugin.
        stepper = self.update.stepper
        stepper.optimizer, stepper.scheduler = self.optimizers(), self.lr_schedulers()
        with nullcontext() if self.shards is None else self.shards.alone():
            self.update.step(batch)

    def _gather(self) -> None:
        if self.shards is not None:
            self.shards.gather()


class LightningLoop:
    """Provide what the update needs of Lightning's trainer and strategy (see bae.training.stepper.Loop)."""

    def __init__(self, module: PolicyModule) -> None:
        self._module = module

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
