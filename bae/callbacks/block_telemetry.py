"""How much signal each block's advantages carry."""

from typing import Any

import lightning as L
from torch import Tensor

from bae.batch import RolloutBatch
from bae.callbacks.collectives import gather
from bae.rollout.pipeline import Pipeline


class BlockTelemetry(L.Callback):
    """Write `block_advantage_std/<block>`, `block_zero_signal/<block>` and `group_zero_signal/<block>` into `metrics`.

    They are over all ranks, and of the advantages that the update applied. It stands before Telemetry, which logs them.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.blocks = [block.name for block in pipeline.scorer.blocks]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        _, scored = batch.require_rollouts()
        advantage = gather(trainer, batch.require_advantages().per_block)
        for k, name in enumerate(self.blocks):
            reached = gather(trainer, (scored.block_of == k).any(1))
            signal = block_signal(advantage[:, k], reached, batch.group_size)
            batch.metrics |= {f"{metric}/{name}": value for metric, value in signal.items()}


def block_signal(advantage: Tensor, reached: Tensor, group_size: int) -> dict[str, float]:
    """Measure the signal of one block.

    Args:
        advantage: (N,), group by group, 0 where not reached.
        reached: (N,) bool, whether a completion has tokens in the block.
        group_size: G.

    Returns:
        block_advantage_std and block_zero_signal, over the completions that reached the block, NaN if none did; and
        group_zero_signal, the share of groups in which every advantage is exactly 0. A group that never reached the
        block is one of these.
    """
    mine = advantage[reached].double()
    deviation = mine - mine.mean()  # std of nothing would warn
    return {
        "block_advantage_std": deviation.square().mean().sqrt().item(),
        "block_zero_signal": (mine == 0).double().mean().item(),
        "group_zero_signal": (advantage.view(-1, group_size) == 0).all(1).double().mean().item(),
    }
