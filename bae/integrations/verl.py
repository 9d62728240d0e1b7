"""Blockwise advantages in verl (its source was read at v0.9.0; it is not installed here).

verl calls a registered advantage estimator with rewards and masks. It gives the tokens only to the estimator that is
named gdpo, and only in the trainer that `trainer.use_v1=false` chooses. A trainer of one's own may call
`token_advantages`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bae.batch import Problem
from bae.integrations.blockwise import Blockwise, for_token_lists


def token_advantages(
    blockwise: Blockwise,
    uids: Sequence[str],
    responses: Tensor,
    response_mask: Tensor,
    answers: Sequence[str],
    ends: Sequence[int],
) -> Tensor:
    """Compute the advantages of a batch of verl, whose completions may stand in any order.

    Args:
        blockwise: makes them.
        uids: N, the name of the prompt of each completion.
        responses: (N, T), ids.
        response_mask: (N, T), 1 where the policy sampled the token. What a tool wrote is skipped.
        answers: N reference answers.
        ends: the ids that end a sequence.

    Returns:
        (N, T), 0 outside the mask, on the device of the mask.

    Raises:
        ValueError: if the groups differ in size.
    """
    order = sorted(range(len(uids)), key=lambda n: uids[n])
    sizes = {uid: len(list(members)) for uid, members in groupby(uids[n] for n in order)}
    if len(set(sizes.values())) > 1:
        few, many = min(sizes, key=lambda uid: sizes[uid]), max(sizes, key=lambda uid: sizes[uid])
        raise ValueError(
            f"prompt {few} has {sizes[few]} completions and prompt {many} has {sizes[many]}; a group must be whole "
            "when its advantages are computed"
        )
    ids, mask = responses.cpu(), response_mask.cpu().bool()
    problems = [Problem(uids[n], uids[n], answers[n]) for n in order]
    completions = [ids[n][mask[n]].tolist() for n in order]
    each, _ = for_token_lists(blockwise, problems, completions, ends, next(iter(sizes.values())))
    advantages = torch.zeros(mask.shape)
    for n, row in zip(order, each, strict=True):
        advantages[n, mask[n]] = row
    return advantages.to(response_mask.device)


@dataclass(frozen=True)
class AdvantageEstimator:
    """Estimate advantages as `verl.trainer.ppo.core_algos.compute_gdpo_outcome_advantage` is called.

    Args:
        blockwise: makes them.
        ends: the ids that end a sequence.
    """

    blockwise: Blockwise
    ends: Sequence[int]

    def __call__(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Sequence[str],
        config: Any = None,
        non_tensor_batch: Mapping[str, Any] | None = None,
        batch: Mapping[str, Tensor] | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns, (N, T) each and equal, as in verl's own estimators without a critic.

        Args:
            token_level_rewards: (N, T), not used: the objectives reward.
            response_mask: (N, T).
            index: N, verl's `uid`, the prompt of each completion.
            config: verl's `algorithm`, not used.
            non_tensor_batch: `reward_model` has the reference answer of each completion as its `ground_truth`.
            batch: `responses` has the ids, (N, T).
            unused: whatever else verl gives an estimator.

        Raises:
            ValueError: if verl did not give the tokens; and if the groups differ in size.
        """
        if batch is None or non_tensor_batch is None:
            raise ValueError(
                "verl gave no tokens: it gives them to the estimator gdpo alone, so put this one in "
                'ADV_ESTIMATOR_REGISTRY["gdpo"] and set algorithm.adv_estimator=gdpo and trainer.use_v1=false'
            )
        answers = [str(entry["ground_truth"]) for entry in non_tensor_batch["reward_model"]]
        uids = [str(uid) for uid in index]
        advantages = token_advantages(self.blockwise, uids, batch["responses"], response_mask, answers, self.ends)
        return advantages, advantages
