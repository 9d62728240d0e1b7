"""The policy's weights as another engine wants them, and whether they have changed since it got them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.core_model_loading import revert_weight_conversion

Fingerprint = tuple[int, ...]


class _Steps:
    """Counts the steps of all optimisers of this process: fused ones change weights without torch's counting it."""

    def __init__(self) -> None:
        self.taken = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.taken += 1


_steps = _Steps()


def fingerprint(model: Any) -> Fingerprint:
    """Changes with every step of an optimiser, every other in-place change of a weight and every exchange of one.

    Cheap: no weight is read. Only what is done to `weight.data` goes unseen.
    """
    of_weights = [number for x in _tensors(model) for number in (id(x), x.data_ptr(), x._version)]
    return (_steps.taken, *of_weights)


def checkpoint(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as a file of the model would have them, tied ones under their first name; nothing is copied."""
    seen: set[int] = set()
    # Where transformers keep weights under names of their own, or several in one tensor, the reader knows the file's.
    for name, weight in revert_weight_conversion(model, dict(model.state_dict(keep_vars=True))).items():
        if id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight.detach()


def _tensors(model: Any) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
