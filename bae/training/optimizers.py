"""Make the optimiser that needs more than a library's class: torchao's, which rounds bf16 weights at random.

Its draws come from torch's global generators, which no checkpoint holds. So these are seeded before each optimiser
step, by a function of the seed and the number of the step. A resumed run then draws what the run would have drawn, and
all ranks of DDP draw the same, so their weights stay equal. Nothing else in a run draws from the global generators:
every other draw has a generator of its own (bae.seeds).
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bae.seeds import Namespace, key
from bae.training.stepper import MakeOptimizer

SOME = 2**14
"""Parameters of the step that tells how many bytes an optimiser's state has."""
BLOCK = 256
"""Of torchao: the numbers of 8 bits that share a scale."""


def stochastic_adamw(
    lr: float, betas: Sequence[float], weight_decay: float, seed: int, eps: float = 1e-8, eight_bit: bool = False
) -> MakeOptimizer:
    """Return a maker of AdamW that computes in fp32 and rounds bf16 weights at random, right in the mean.

    Args:
        lr, betas, weight_decay, eps: those of AdamW.
        seed: of the rounding.
        eight_bit: whether the two moments have 8 bits, with a scale for each 256 numbers. If not, they have the
            weights' type.

    Raises:
        ImportError: if torchao is not installed.
    """
    require_torchao()
    from torchao import optim

    kind: Any = optim.AdamW8bit if eight_bit else optim._AdamW
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching.*")  # of its own types, when it compiles

    def make(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(
            parameters, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, bf16_stochastic_round=True
        )
        made.register_step_pre_hook(lambda optimizer, *_: _seed_generators(optimizer, seed))
        made.register_state_dict_post_hook(lambda _, saved: _each_value(saved, _take_apart))
        made.register_load_state_dict_pre_hook(lambda _, saved: _each_value(saved, _put_together))
        return made

    return make


def state_bytes(make_optimizer: MakeOptimizer, dtype: torch.dtype) -> float:
    """Return the bytes a parameter of an optimiser's state, by a step with some parameters of this type."""
    weight = torch.nn.Parameter(torch.zeros(SOME, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = make_optimizer([weight])
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor)) / SOME


def stochastic_state_bytes(dtype: torch.dtype, eight_bit: bool) -> float:
    """Return the bytes a parameter of the state of `stochastic_adamw`, whose step is compiled, so it is not tried."""
    return 2 * (1 + torch.float.itemsize / BLOCK) if eight_bit else 2 * dtype.itemsize


def require_torchao() -> None:
    """Raise ImportError with one sentence if torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("torchao is not installed; pip install 'blockwise-advantage[torchao]'")


def _seed_generators(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Seed torch's global generators by the seed and the number of steps that `optimizer` has taken."""
    taken = next((int(state["step"]) for state in optimizer.state.values()), 0)
    drawn = np.random.SeedSequence(key(seed, Namespace.ROUNDING, taken)).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn[0]))


def _each_value(saved: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return an optimiser's state dict with every value of its state changed."""
    state = {n: {name: change(value) for name, value in values.items()} for n, values in saved["state"].items()}
    return saved | {"state": state}


def _take_apart(value: Any) -> Any:
    """Return a moment of 8 bits as a dict of plain tensors, because Lightning can load no others; all else as it is."""
    if not hasattr(value, "__tensor_flatten__"):
        return value
    names, context = value.__tensor_flatten__()
    parts: dict[str, Tensor] = {name: getattr(value, name) for name in names}
    return {"parts": parts, "context": context}


def _put_together(value: Any) -> Any:
    """Undo `_take_apart`."""
    if not isinstance(value, dict):
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.__tensor_unflatten__(value["parts"], value["context"])
