"""Keep copies of weights in the order that oneDNN's matrix products want, as long as nobody changes the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bae.training.causal_lm import CausalLM

FEW_ROWS = 128
"""Most rows of a call for which fp32 weights gain: twice the speed for a head at 64 rows, a quarter less at 512.

For each number of rows and shape of weights oneDNN keeps a third of a MB, part of it for ever. Prompts are rows of ever
other numbers, so in fp32 they do without it.
"""


@contextmanager
def prepacked(model: CausalLM, rows: int) -> Iterator[None]:
    """Let linear layers on a CPU use reordered copies of their weights, if that gains anything.

    Without these copies oneDNN reorders the weights anew in every call. The copies take the memory of the weights a
    second time. They are dropped at the end of the `with` block. Calls with many rows use the weights themselves where
    copies gain nothing.

    Args:
        model: its weights must not change inside the `with` block.
        rows: the number of rows that each call is expected to have.
    """
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and _gains(m.weight, rows)]
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        vars(layer)["forward"] = partial(_linear, layer, packed)  # found before the method of the class
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _gains(weight: Tensor, rows: int) -> bool:
    """Tell whether products with this weight become faster when it is reordered ahead."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float and rows <= FEW_ROWS


def _linear(layer: torch.nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    """Multiply `x` by the weight of the layer, of which `packed` is a reordered copy, and add the bias."""
    if x.dtype == torch.float and x.shape[:-1].numel() > FEW_ROWS:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")
    return product
