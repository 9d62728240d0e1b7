"""The options of an update. Light to import, because the configuration's schema has it too."""

from dataclasses import dataclass

KL_ESTIMATORS = ("k1", "k2", "k3")
"""Functions of bae.method.losses."""


@dataclass(kw_only=True)
class StepOptions:
    """Say how gradients become an optimiser step. The yaml of a command, key `training`, explains the defaults.

    Args:
        max_grad_norm: the global norm to which gradients are clipped.
        warmup_steps: optimiser steps over which the learning rate rises linearly from 0.
        micro_batch_tokens: tokens of one forward and backward pass. A prompt counts once for the completions that share
            it.
        final_lr: the share of the learning rate that is left at the last step. It falls linearly after the warm-up.

    Raises:
        ValueError: for values that cannot work.
    """

    max_grad_norm: float
    warmup_steps: int
    micro_batch_tokens: int
    final_lr: float = 1.0

    def __post_init__(self) -> None:
        for name, (holds, rule) in self._rules().items():
            if not holds:
                raise ValueError(f"training.{name}={getattr(self, name)}: {rule}")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        """Return for each option whether its value can work, and the rule in words. NaN never can."""
        return {
            "max_grad_norm": (self.max_grad_norm > 0, "must be above 0"),
            "warmup_steps": (self.warmup_steps >= 0, "must not be negative"),
            "final_lr": (0 <= self.final_lr <= 1, "must be a share of lr, from 0 to 1"),
            "micro_batch_tokens": (self.micro_batch_tokens >= 1, "must be 1 or more"),
        }


@dataclass(kw_only=True)
class UpdateOptions(StepOptions):
    """Say how a rollout batch becomes optimiser steps.

    Args:
        clip: epsilon of the clipped surrogate.
        clip_high: the same as `clip` for ratios above 1; None for `clip`.
        optimizer_steps: mini-batches, one optimiser step each, that a rollout batch is cut into.
        importance_cap: tokens count by policy over sampler probability, up to this; None: all count alike. See
            bae.method.losses.importance.
        kl_coef: the coefficient of the divergence from the reference, the policy from which the run began; at 0 nothing
            is computed of it.
        kl_estimator: how it is estimated, one of KL_ESTIMATORS.
        The others are as in `StepOptions`.

    Raises:
        ValueError: for values that cannot work.
    """

    clip: float
    clip_high: float | None = None
    optimizer_steps: int = 1
    importance_cap: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"

    def _rules(self) -> dict[str, tuple[bool, str]]:
        def positive(value: float | None) -> bool:
            return value is None or 0 < value < float("inf")

        return super()._rules() | {
            "clip": (0 < self.clip < 1, "must lie between 0 and 1"),
            "clip_high": (positive(self.clip_high), "must be above 0, or null"),
            "optimizer_steps": (self.optimizer_steps >= 1, "must be 1 or more"),
            "importance_cap": (positive(self.importance_cap), "must be above 0, or null"),
            "kl_coef": (0 <= self.kl_coef < float("inf"), "must be 0 or more"),
            "kl_estimator": (self.kl_estimator in KL_ESTIMATORS, f"must be one of {', '.join(KL_ESTIMATORS)}"),
        }
