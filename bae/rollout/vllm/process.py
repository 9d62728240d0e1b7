"""Give vLLM what it needs in the trainer's process, and keep the rest of the process as it was."""

import gc
import importlib.util
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bae.training.causal_lm import CausalLM


def release(core: Any) -> None:
    """Free the memory of an engine core, and leave process groups to those who made them."""
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_lost_groups() -> None:
    """Forget vLLM's groups that an earlier job of this process left behind.

    vLLM keeps them in variables of a module. They are of no use once the process group that they were made from has
    been destroyed.
    """
    from vllm.distributed import parallel_state

    groups = {name: x for name, x in vars(parallel_state).items() if isinstance(x, parallel_state.GroupCoordinator)}
    for name, group in groups.items():
        try:
            torch.distributed.get_process_group_ranks(group.cpu_group)
        except KeyError:
            setattr(parallel_state, name, None)


def require_vllm() -> None:
    """Raise ImportError with one sentence if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed; on a GPU: pip install 'blockwise-advantage[vllm]', on a CPU: docs/rollout.md"
        )


def configure_environment() -> None:
    """Set what vLLM reads from the environment. What the user has set is kept, where there is a choice."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process, where the weights are
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM reports its use to its makers unless told not to
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def check_architecture(model: CausalLM) -> None:
    """Raise ValueError if vLLM cannot run a model of this class on this device."""
    import transformers
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    device, build = model.device.type, current_platform.device_type
    if device != build:
        raise ValueError(
            f"rollout: the policy is on the device {device} and this vLLM is built for {build}; choose a strategy that "
            "has the policy there, or the other build (docs/rollout.md), or rollout=local"
        )
    name = type(model).__name__
    if name not in ModelRegistry.get_supported_archs() and not hasattr(transformers, name):
        raise ValueError(f"model: vLLM does not know {name}; use rollout=local")
    if device == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        _check_head_size(model.config, CPUAttentionBackend.get_supported_head_sizes())


def _check_head_size(config: Any, sizes: list[int]) -> None:
    """Raise ValueError if vLLM's CPU build has no attention for heads of this model's size."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in sizes:
        raise ValueError(
            f"model: its attention heads have {size} dimensions, and on a CPU vLLM is made for "
            f"{', '.join(map(str, sizes))}; use rollout=local"
        )


def pack_heads(model: torch.nn.Module) -> None:
    """Pack the head's weights again, because on a CPU vLLM packs weights for its kernels as it loads them.

    A head that is tied to the embeddings is not loaded itself, and would keep its first packing.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Restore what vLLM changes for the whole process.

    These are random states, what the garbage collector looks at, and on a CPU torch.set_num_threads.
    """
    python, numpy, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # within vLLM
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads
        gc.unfreeze()  # otherwise nothing made before would ever be freed, such as the trainer of an earlier job


@contextmanager
def launched(device: torch.device) -> Iterator[None]:
    """Provide the process group and the environment in which vLLM starts one worker a process, on `device`.

    In DDP the group is the trainer's, and all ranks must come here together. Otherwise the group has one process.
    """
    if not torch.distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    before = dict(os.environ)
    os.environ["RANK"] = str(torch.distributed.get_rank())
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        for name in ("RANK", "LOCAL_RANK"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
