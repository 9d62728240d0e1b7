"""Save shards and the state of their optimiser as one folder, and load them on any number of ranks. Plain PyTorch.

torch.distributed.checkpoint writes a file for each rank, and a description of where each piece of a tensor is. It reads
both with pickle, which would run what a file says. So a reader and a planner here read as data, and nothing else.
"""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from bae.errors import UserError

DESCRIPTION = ".metadata"
"""The file of a folder that says where each piece of a tensor is; torch's name."""
NAMES = {
    "builtins": {"set"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {*metadata.__all__, "_MEM_FORMAT_ENCODING"},
}
"""What a description may name: records, and the types of numbers."""


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of a model of shards and of its optimiser, by the names of the weights. Nothing is copied."""
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save(state: Mapping[str, Any], folder: Path) -> None:
    """Write what `state_of` returned to a folder that is there. All ranks must call it."""
    with _own_errors():
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder))


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what `save` wrote, on any number of ranks, into a model of shards and its optimiser. All ranks must call it.

    Raises:
        UserError: for a file that is more than data.
    """
    state, reader = state_of(model, optimizer), _Reader(folder)
    reader.read_metadata()  # raises here what would else come wrapped
    with _own_errors():
        dcp.load(state, storage_reader=reader, planner=_Planner())
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the error of a rank itself, on all ranks, instead of one that holds it and that nobody catches."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


class _Reader(dcp.FileSystemReader):
    """Read a folder without calling what its description names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with open(Path(self.path) / DESCRIPTION, "rb") as file:
            found: metadata.Metadata = _Unpickler(file).load()
        return found


class _Planner(dcp.DefaultLoadPlanner):
    """Read what is no tensor, such as a learning rate, as data."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"the checkpoint is not read: its {read_item.dest_index.fqn} is no data") from error
        value.seek(0)
        super().load_bytes(read_item, value)


class _Unpickler(pickle.Unpickler):
    """Read the records of torch.distributed.checkpoint, and refuse all else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in NAMES.get(module, ()):
            raise UserError(f"the checkpoint is not read: its {DESCRIPTION} names {module}.{name}, which is no data")
        return super().find_class(module, name)
