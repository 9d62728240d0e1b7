"""Train with weights that are cut up over the ranks, and save them so that a killed run keeps its last checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from bae.callbacks.checkpoints import clear_place, not_finite
from bae.files import PARTIAL, checksums, folder_atomically, write_sums
from bae.training import sharded_state

REST = "rest.pt"
"""The file of a checkpoint that has all but weights and optimiser: loops, callbacks, the next step."""


class FullySharded(ModelParallelStrategy):
    """Shard weights, gradients and optimiser state over all ranks, by FSDP2 (bae.training.sharding).

    A checkpoint is a folder to which all ranks write. It is whole or absent and has checksums, like the file of one
    process, and any number of ranks can go on from it.

    Args:
        process_group_backend: of torch.distributed; None for nccl on GPUs and gloo on CPUs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` takes it from the module, and copies nothing

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}  # the same

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        target = Path(self.broadcast(filepath))
        state = sharded_state.state_of(self._shards, self.optimizers[0])
        for refusal in self._of_all_ranks(not_finite(state, target)):
            if refusal is not None:
                raise refusal
        with self._folder(target) as folder:
            sharded_state.save(state, folder)
            if self.is_global_zero:
                torch.save(checkpoint, folder / REST)
            mine = checksums(folder, f"__{self.global_rank}_*")  # each rank reads its own files
            if self.is_global_zero:
                mine |= checksums(folder, REST) | checksums(folder, sharded_state.DESCRIPTION)
            written = self._of_all_ranks(mine)
            if self.is_global_zero:
                write_sums(folder, {name: value for sums in written for name, value in sums.items()})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        folder = Path(self.broadcast(checkpoint_path))
        sharded_state.load(self._shards, self.optimizers[0], folder)
        rest: dict[str, Any] = torch.load(folder / REST, weights_only=True)
        return rest

    @property
    def _shards(self) -> torch.nn.Module:
        assert self.lightning_module is not None
        model = self.lightning_module.model
        assert isinstance(model, torch.nn.Module)
        return model

    def _of_all_ranks(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank."""
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def _folder(self, target: Path) -> Iterator[Path]:
        """Give all ranks a folder to fill. It is at `target` when the body has ended on all of them."""
        if self.is_global_zero:
            clear_place(target)
            with folder_atomically(target) as folder:
                self.barrier()
                yield folder
        else:
            self.barrier()
            yield target.with_name(target.name + PARTIAL)
        self.barrier()
