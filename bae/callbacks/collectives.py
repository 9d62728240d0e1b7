"""The collective operations that callbacks need."""

from typing import TypeVar

import lightning as L
import torch
from torch import Tensor

T = TypeVar("T")


def gather(trainer: L.Trainer, tensor: Tensor) -> Tensor:
    """Return the rows of all ranks, rank by rank, on every rank and on the CPU; (N, …) -> (world * N, …)."""
    if trainer.world_size == 1:
        return tensor
    gathered = trainer.strategy.all_gather(tensor.to(trainer.strategy.root_device))
    return gathered.flatten(0, 1).cpu()


def gather_objects(trainer: L.Trainer, value: T) -> list[T]:
    """Return the values of all ranks, rank by rank, on every rank.

    They are pickled, so this is only for what the project itself made.
    """
    values: list[T | None] = [value]
    if trainer.world_size > 1:
        values = [None] * trainer.world_size
        torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]
