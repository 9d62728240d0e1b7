"""Blockwise advantages in slime (its source was read at v0.3.1-38-g624b824a8; it is not installed here).

slime's advantage function sees the share of one rank, in which groups are cut up. So the advantages are computed where
all samples are together, in the hook for rewards, and travel in the place of the rewards. docs/integrations.md has the
options that name the two functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bae.batch import Problem
from bae.integrations.blockwise import Blockwise, for_token_lists


async def no_reward(args: Any, sample: Any, **unused: Any) -> float:
    """Return 0, for `--custom-rm-path`. slime wants a reward of each sample, and `PostProcess` replaces it."""
    return 0.0


@dataclass(frozen=True)
class PostProcess:
    """Put advantages in the place of rewards, for `--custom-reward-post-process-path`.

    Args:
        blockwise: makes them.
        ends: the ids that end a sequence.
    """

    blockwise: Blockwise
    ends: Sequence[int]

    def __call__(self, args: Any, samples: Sequence[Any]) -> tuple[list[float], list[Tensor]]:
        """Return N rewards of the first objective, which slime logs; and N tensors of advantages, one value a token.

        Args:
            args: slime's options; `n_samples_per_prompt` is read.
            samples: N, `slime.utils.types.Sample`, group by group. `label` is the reference answer, and `tokens` ends
                with `response_length` ids of the response. `loss_mask` tells which of them were sampled; None for all.

        Raises:
            ValueError: if the samples of a group do not stand together.
        """
        size = args.n_samples_per_prompt
        groups = [[sample.group_index for sample in samples[n : n + size]] for n in range(0, len(samples), size)]
        if any(len(set(group)) > 1 or len(group) != size for group in groups):
            raise ValueError(
                f"slime's samples are not whole groups of n_samples_per_prompt={size}; one rollout must make one sample"
            )
        masks = [torch.tensor(sample.loss_mask or [1] * sample.response_length).bool() for sample in samples]
        problems = [Problem(str(s.group_index), str(s.prompt), str(s.label)) for s in samples]
        completions = [
            torch.as_tensor(sample.tokens)[-len(mask) :][mask].tolist() if len(mask) else []
            for sample, mask in zip(samples, masks, strict=True)
        ]
        each, scored = for_token_lists(self.blockwise, problems, completions, self.ends, size)
        spread = [torch.zeros(len(mask)).masked_scatter(mask, row) for mask, row in zip(masks, each, strict=True)]
        return scored.rewards[:, 0].tolist(), spread


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Write `advantages` and `returns`, for `--custom-advantage-function-path`: what `PostProcess` computed.

    Args:
        args: slime's options; `context_parallel_size` is read.
        rollout_data: of one rank. `rewards` has the advantages of its samples, and `loss_masks` the device.

    Raises:
        ValueError: with context parallelism, which cuts up completions; and if the rewards are no advantages.
    """
    if args.context_parallel_size > 1:
        raise ValueError(f"context_parallel_size={args.context_parallel_size}: must be 1 with blockwise advantages")
    rewards = rollout_data["rewards"]
    if not all(isinstance(each, Tensor) for each in rewards):
        raise ValueError("slime's rewards are no advantages: name a PostProcess in --custom-reward-post-process-path")
    masks = rollout_data["loss_masks"]
    rollout_data["advantages"] = [each.to(mask.device) for each, mask in zip(rewards, masks, strict=True)]
    rollout_data["returns"] = list(rollout_data["advantages"])
