"""Keep the policy as it was when its run began, for the divergence from it in the loss."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from bae.training.causal_lm import CausalLM
from bae.training.lora import adapted, without_adapters


class Reference:
    """Hold the policy from which a run began: a frozen copy, or, if adapters are trained, the policy without them.

    A copy takes the memory of the weights once more; the policy without its adapters takes none. A resumed run has the
    same reference, because it is made of the policy before the checkpoint is read.

    Args:
        model: the policy, before its first step.
    """

    def __init__(self, model: CausalLM) -> None:
        self._policy = model
        self._copy = None if adapted(model) else copy.deepcopy(model)
        if self._copy is not None:
            for weight in self._copy.parameters():
                weight.requires_grad_(False)

    @contextmanager
    def model(self) -> Iterator[CausalLM]:
        """Give the model of the reference, on the device of the policy, for passes without gradients."""
        if self._copy is None:
            with without_adapters(self._policy):
                yield self._policy
        else:
            self._copy.to(self._policy.device)
            yield self._copy
