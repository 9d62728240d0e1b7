"""Send weights over gloo to a vLLM server on a CPU, because vLLM's own transports need GPUs.

vLLM drives both ends as it drives NCCL's; only what carries the tensors differs. The classes build on internals of the
pinned vLLM version. A server takes part if it is started with
`--weight-transfer-config '{"backend": "gloo"}' --worker-extension-cls tests.support.vllm_gloo.Extension` and can import
this module.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine, NCCLWeightTransferEngine

from bae.rollout.vllm.process import pack_heads
from bae.rollout.vllm.server_engine import VllmServerEngine
from bae.rollout.vllm.transfer import Transport

BACKEND = "gloo"
WAIT = timedelta(minutes=1)  # for the other end


class Extension:
    """Add nothing to a worker. Because the server names this class, its workers load this module."""


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Hold where the trainer and the server's workers meet. world_size counts all of them, the trainer too."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int


class Group:
    """Join the trainer, which has rank 0, and the server's workers, apart from the groups that each side has."""

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        self.group: Any = stateless_init_torch_distributed_process_group(
            address, port, rank, world_size, "gloo", timeout=WAIT
        )

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast from rank 0, as bytes, because gloo does not know every type."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()


class GlooReceiver(NCCLWeightTransferEngine):
    """Receive weights in a worker of the server."""

    group: Any = None

    def init_transfer_engine(self, init_info: Any) -> None:
        self.shutdown()
        before = self.parallel_config.data_parallel_index * self.parallel_config.world_size
        rank = before + self.parallel_config.rank + init_info.rank_offset
        self.group = Group(init_info.master_address, init_info.master_port, rank, init_info.world_size)

    def receive_weights(self, update_info: Any) -> None:
        """Receive all weights before the first is loaded: if loading fails, the sender must not be left waiting."""
        weights = []
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight: Tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight)
            weights.append((name, weight))
        model: Any = self.model
        model.load_weights(weights)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        pack_heads(self.model)

    def shutdown(self) -> None:
        self.group = None


class GlooSender(NCCLTrainerWeightTransferEngine):
    """Send weights from the trainer."""

    group: Any = None

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Any:
        sender = cls(client=client, source=source, packed=False)
        place = (init_info.master_address, init_info.master_port)
        theirs = NCCLWeightTransferInitInfo(
            master_address=place[0], master_port=place[1], rank_offset=1, world_size=init_info.world_size
        )
        with ThreadPoolExecutor(1) as threads:  # both ends wait for each other
            joined = threads.submit(client.init_weight_transfer_engine, worker_init_payload(theirs))
            sender.group = Group(*place, 0, init_info.world_size)
            joined.result()
        return sender

    def _broadcast(self, source: Any, meta: Any) -> None:
        for _, weight in self._checked_iter(source, meta):
            self.group.broadcast(weight.contiguous())

    def shutdown(self) -> None:
        self.group = None


WeightTransferEngineFactory.register_engine(BACKEND, GlooReceiver)
WeightTransferTrainerFactory.register_engine(BACKEND, GlooSender)


def _init_info(address: str, port: int, world_size: int) -> GlooTrainerInitInfo:
    return GlooTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=0)


def server_engine(**options: Any) -> VllmServerEngine:
    """Return an engine whose weights travel over gloo."""
    return VllmServerEngine(**options, transport=Transport(BACKEND, _init_info))
