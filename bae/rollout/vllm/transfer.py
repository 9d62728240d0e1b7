"""Connect the trainer with the workers of a vLLM server, to send weights there.

vLLM has senders and receivers of weights, one pair for each backend; `--weight-transfer-config` names the backend of a
server. NCCL, between GPUs, is the one that this project uses.
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from bae.rollout.vllm.http import Server
from bae.rollout.vllm.process import configure_environment
from bae.rollout.vllm.weights import checkpoint
from bae.training.causal_lm import CausalLM


@dataclass(frozen=True)
class Transport:
    """Describe how the trainer meets a server.

    Attributes:
        backend: vLLM's name of the backend.
        init_info: takes the address and the port where all meet, and the number of processes (the server's workers and
            the trainer), and returns what vLLM's sender of this backend starts from.
    """

    backend: str
    init_info: Callable[[str, int, int], Any]


def _nccl_init_info(address: str, port: int, world_size: int) -> Any:
    """Return what vLLM's NCCL sender starts from."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=0)


NCCL = Transport("nccl", _nccl_init_info)


def connect(server: Server, model: CausalLM, transport: Transport, address: str | None) -> Any:
    """Connect with every worker of the server.

    Args:
        server: the server.
        model: the policy, whose weights will be sent.
        transport: how they travel.
        address: of this machine, as the server reaches it; None for its address on the network that leads there.

    Returns:
        vLLM's sender; its `send_weights()` sends the weights as they are then.
    """
    configure_environment()
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    server.post("shutdown_weight_transfer_engine")  # that of a trainer that was here before
    address = address or _own_address(server.url)
    world_size = server.get("get_world_size")["world_size"] + 1
    info = transport.init_info(address, _free_port(address), world_size)
    return WeightTransferTrainerFactory.trainer_init(info, client=server, source=_source(model))


def _source(model: CausalLM) -> Any:
    """Return the policy's weights in the form that vLLM's senders read."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Weights(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in checkpoint(model)]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return checkpoint(model)

    return Weights()


def _free_port(address: str) -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _own_address(url: str) -> str:
    """Return the address of this machine on the network that leads to `url`."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return str(probe.getsockname()[0])
