"""Cut the weights of a policy up over ranks, by torch's FSDP2, and gather them again between updates. Plain PyTorch.

FSDP2 gathers a layer's weights in hooks around its forward and backward passes, so each pass is one of all ranks.
Sampling cannot be: ranks draw completions of other lengths, and take other numbers of passes. So there are two models,
one of shards that is trained, and the policy, which has whole weights except during an update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bae.training.causal_lm import CausalLM

T = TypeVar("T")


class Shards:
    """Hold the weights of a policy in parts, one on each rank.

    While it is trained, a rank has its shards, the whole weights of one or two layers, and those of the embedding and
    the head. Between updates it has its shards, and the policy whole.

    Args:
        policy: the policy; it is without weights until `gather`.
        mesh: the ranks, in one dimension.

    Attributes:
        model: the model to train, with the modules of the policy.
    """

    def __init__(self, policy: CausalLM, mesh: DeviceMesh) -> None:
        self.policy = policy
        # The copy takes the policy's weights themselves, and cuts them up layer by layer: no second model is in memory.
        self.model: CausalLM = deepcopy(policy, {id(weight): weight for weight in policy.parameters()})
        root = cast(torch.nn.Module, self.model)
        for layer in self.model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(root, mesh=mesh)
        if mesh.device_type == "cpu":
            for module in _units(root):
                module.set_force_sum_reduction_for_comms(True)  # gloo takes no means
        self.drop()

    @torch.no_grad()
    def gather(self) -> None:
        """Give the policy whole weights, those of the shards as they are now. All ranks must call it."""
        for unit in _units(cast(torch.nn.Module, self.model)):
            unit.reshard()
        for (name, part), (_, whole) in zip(self.model.named_parameters(), self.policy.named_parameters(), strict=True):
            assert isinstance(part, DTensor), f"{name} is not sharded"
            whole.data = part.full_tensor()
        for trained, own in zip(self.model.buffers(), self.policy.buffers(), strict=True):
            own.data = trained.data

    def drop(self) -> None:
        """Free the policy's whole weights."""
        for weight in self.policy.parameters():
            weight.data = weight.data.new_empty(0)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be without the policy's whole weights for an update, and gather them afterwards."""
        self.drop()
        yield
        self.gather()


def is_sharded(model: CausalLM) -> bool:
    """Tell whether a model is one of shards, so that each of its passes is one of all ranks."""
    return isinstance(model, FSDPModule)


def as_forward(model: CausalLM, function: Callable[[], T]) -> T:
    """Call a function that uses modules of a model, as if it were the model's forward pass.

    The hooks of a model of shards then gather what belongs to no layer. The function must return tensors, or tuples of
    them: their backward pass is followed, too.
    """
    if not is_sharded(model):
        return function()
    module = cast(torch.nn.Module, model)
    vars(module)["forward"] = function  # found before the method of the class
    try:
        result: T = module()
    finally:
        del vars(module)["forward"]
    return result


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is over all ranks; all ranks must call it for one that is spread over them."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def here(value: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that is on this rank."""
    return value.to_local() if isinstance(value, DTensor) else value


def _units(model: torch.nn.Module) -> list[FSDPModule]:
    """Return the modules whose weights are gathered together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
