"""Name the policy's weights as another engine wants them, and tell whether they have changed since it got them."""

from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any, cast

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from bae.training.causal_lm import CausalLM
from bae.training.lora import merged_state

Fingerprint = tuple[int, ...]


class _StepCounter:
    """Count the steps of all optimisers of this process: fused ones change weights, and torch does not count that."""

    def __init__(self) -> None:
        self.steps = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1


@cache
def _step_counter() -> _StepCounter:
    """Return the counter of this process. It counts from the first call on."""
    return _StepCounter()


def fingerprint(model: CausalLM) -> Fingerprint:
    """Return numbers that differ from those of an earlier call if weights have changed in between.

    They change with every step of an optimiser, every other in-place change of a weight, and every exchange of a weight
    tensor. What changes only through `weight.data` is not seen. This is cheap, because no weight is read.
    """
    weights = chain(model.parameters(), model.buffers())
    return (_step_counter().steps, *(number for x in weights for number in (id(x), x.data_ptr(), x._version)))


def checkpoint(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights as a file of the model would hold them, tied ones once, under their first name.

    Adapters are merged, and merged weights are new; no other is copied.
    """
    # transformers may keep weights under its own names, or several in one tensor. It knows how files hold them.
    weights = revert_weight_conversion(cast(PreTrainedModel, model), merged_state(model))
    seen: set[int] = set()
    for name, weight in weights.items():
        if id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight.detach()
