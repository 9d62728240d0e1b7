"""The options of an update. Light to import, because the configuration's schema has it too."""

from dataclasses import dataclass


@dataclass
class UpdateOptions:
    """Say how a rollout batch becomes optimiser steps. conf/train.yaml, key `training`, explains the defaults.

    Args:
        clip: epsilon of the clipped surrogate.
        max_grad_norm: the global norm to which gradients are clipped.
        warmup_steps: optimiser steps over which the learning rate rises linearly from 0.
        micro_batch_tokens: tokens of one forward and backward pass. A prompt counts once for the completions that share
            it.
        clip_high: the same as `clip` for ratios above 1; None for `clip`.
        final_lr: the share of the learning rate that is left at the last step. It falls linearly after the warm-up.
        optimizer_steps: mini-batches, one optimiser step each, that a rollout batch is cut into.
        importance_cap: tokens count by policy over sampler probability, up to this; None: all count alike. See
            bae.method.losses.importance.

    Raises:
        ValueError: for values that cannot work.
    """

    clip: float
    max_grad_norm: float
    warmup_steps: int
    micro_batch_tokens: int
    clip_high: float | None = None
    final_lr: float = 1.0
    optimizer_steps: int = 1
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        inf = float("inf")  # every comparison with NaN is False, so NaN is refused, too
        rules = {
            "clip": (0 < self.clip < 1, "must lie between 0 and 1"),
            "clip_high": (self.clip_high is None or 0 < self.clip_high < inf, "must be above 0, or null"),
            "max_grad_norm": (self.max_grad_norm > 0, "must be above 0"),
            "warmup_steps": (self.warmup_steps >= 0, "must not be negative"),
            "final_lr": (0 <= self.final_lr <= 1, "must be a share of lr, from 0 to 1"),
            "micro_batch_tokens": (self.micro_batch_tokens >= 1, "must be 1 or more"),
            "optimizer_steps": (self.optimizer_steps >= 1, "must be 1 or more"),
            "importance_cap": (
                self.importance_cap is None or 0 < self.importance_cap < inf,
                "must be above 0, or null",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"training.{name}={getattr(self, name)}: {rule}")
