"""How the gradients of the blocks help or hinder each other in the parameters that they share."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bae.batch import RolloutBatch
from bae.callbacks.collectives import gather
from bae.callbacks.schedule import at_least_one, due
from bae.rollout.pipeline import Pipeline


class Interference(L.Callback):
    """Write into `metrics` what `interference` says of the gradients of the blocks, before the update.

    It stands after BlockwiseAdvantages, and does nothing where there is one block.

    Args:
        pipeline: has the blocks.
        every: steps between two times, counted from the first step.
        completions: the first so many of each rank's batch, rounded down to whole groups, at least one group.
        size: numbers that a gradient is sketched to.

    Raises:
        ValueError: if one of these is below 1.
    """

    def __init__(self, pipeline: Pipeline, every: int, completions: int, size: int) -> None:
        at_least_one("interference", every=every, completions=completions, size=size)
        self.blocks = [block.name for block in pipeline.scorer.blocks]
        self.every = every
        self.completions = completions
        self.size = size

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        if len(self.blocks) < 2 or not due(batch.step, self.every):
            return
        with batch.timed("interference"):
            groups = max(1, self.completions // batch.group_size)
            rows = torch.arange(len(batch.require_advantages().per_block))[: groups * batch.group_size]
            mine = pl_module.update.block_gradients(batch, rows, self.size)
            mean = gather(trainer, mine.unsqueeze(0)).mean(0)  # a sketch is linear, so this is the mean gradient's
            batch.metrics |= interference(mean, self.blocks)


def interference(gradients: Tensor, blocks: Sequence[str]) -> dict[str, float]:
    """Compare the gradients of the blocks.

    Args:
        gradients: (K, S), of S parameters or a sketch of them.
        blocks: K names.

    Returns:
        gradient_share/<block>: a norm over the sum of the norms, NaN if all are 0.
        gradient_cosine/<block>/<block>: of each pair, negative where they pull against each other, NaN if a norm is 0.
    """
    gradients = gradients.double()
    norms = gradients.norm(dim=1)
    shares, cosines = norms / norms.sum(), gradients @ gradients.T / norms.outer(norms)
    found = {f"gradient_share/{name}": share for name, share in zip(blocks, shares.tolist(), strict=True)}
    for a, b in combinations(range(len(blocks)), 2):
        found[f"gradient_cosine/{blocks[a]}/{blocks[b]}"] = cosines[a, b].item()
    return found
