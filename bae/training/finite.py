"""Find numbers that are not finite: infinities and NaN."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bae.training.sharding import here


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all numbers of some tensors are finite. It reads each number once, and copies none.

    Of tensors that are spread over ranks, it looks at this rank's parts. The norm of them all is finite only if they
    are; if it overflows, each tensor is looked at for itself.
    """
    floats = [here(x.detach()) for x in tensors if x.is_floating_point()]
    norm = torch.nn.utils.get_total_norm(floats)
    return bool(norm.isfinite()) or all(bool(x.isfinite().all()) for x in floats)


def non_finite(tree: Mapping[str, Any]) -> str | None:
    """Return the path of the first tensor with a number that is not finite; None if there is none.

    tree: nested mappings and lists, such as the state of a model or of an optimiser.
    """
    if all_finite(x for _, x in _tensors(tree)):
        return None
    return next(path for path, x in _tensors(tree) if not here(x).isfinite().all())


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every floating-point tensor with its path."""
    if isinstance(tree, Tensor) and tree.is_floating_point():
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _tensors(value, f"{path}.{i}" if path else str(i))
