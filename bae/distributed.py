"""The one collective that callbacks need."""

import lightning as L
from torch import Tensor


def gather(trainer: L.Trainer, tensor: Tensor) -> Tensor:
    """The rows of all ranks, rank by rank, on every rank and on the CPU; (N, …) -> (world * N, …)."""
    if trainer.world_size == 1:
        return tensor
    device = trainer.strategy.root_device
    return trainer.strategy.all_gather(tensor.to(device)).flatten(0, 1).cpu()
