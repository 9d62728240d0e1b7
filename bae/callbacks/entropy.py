"""The adaptive entropy coefficient (paper, Table 4)."""

from typing import Any

import lightning as L

from bae.batch import RolloutBatch


class AdaptiveEntropy(L.Callback):
    """Raise the coefficient of the entropy bonus after a step whose entropy was below `target`, and else lower it.

    It never goes below 0. The paper gives the two numbers and not the rule; this rule is that of Skywork-OR1 (arXiv
    2505.22312).

    Args:
        target: nats a token.
        step_size: by how much the coefficient changes.
        initial: the coefficient of the first step.
    """

    def __init__(self, target: float, step_size: float, initial: float = 0.0) -> None:
        self.target = target
        self.step_size = step_size
        self.coefficient = initial

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        batch.entropy_coef = self.coefficient

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        change = self.step_size if batch.metrics["entropy"] < self.target else -self.step_size
        self.coefficient = max(0.0, self.coefficient + change)

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]
