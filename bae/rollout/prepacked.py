"""Weights in the order that oneDNN's matrix products want, for as long as nobody changes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


@contextmanager
def prepacked(model: Any, rows: int) -> Iterator[None]:
    """Within, linear layers on a CPU use copies in that order, which else are made anew in every call. It takes the
    memory of the weights again. rows: that each call is expected to have."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and _gains(m.weight)]
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        vars(layer)["forward"] = partial(_linear, packed, layer.bias)  # before the class's own
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _gains(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
