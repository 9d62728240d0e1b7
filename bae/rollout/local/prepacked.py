"""Weights in the order that oneDNN's matrix products want, for as long as nobody changes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

FEW = 128
"""Rows of a call up to which weights in fp32 gain: twice the speed for a head at 64, a quarter less at 512."""


@contextmanager
def prepacked(model: Any, rows: int) -> Iterator[None]:
    """Within, linear layers on a CPU use copies in that order, which else are made anew in every call, where
    that gains anything. It takes the memory of the weights again. rows: that each call is expected to have."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and _gains(m.weight, rows)]
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        vars(layer)["forward"] = partial(_linear, packed, layer.bias)  # before the class's own
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _gains(weight: Tensor, rows: int) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float and rows <= FEW


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
