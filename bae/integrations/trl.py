"""Blockwise advantages in TRL's GRPOTrainer (read and tried with TRL 1.16)."""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from bae.batch import Problem, SampledTokens
from bae.integrations.blockwise import Blockwise


def no_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Return 0 for each completion. TRL wants a reward function, and its advantages are replaced."""
    return [0.0] * len(completions)


class BlockwiseGRPOTrainer(GRPOTrainer):
    """Train with an advantage for each token, where GRPOTrainer has one for each completion.

    TRL samples, and TRL's loss is used as it is: it takes advantages of shape (N, T). All its `loss_type`s weigh the
    tokens of a completion alike, where this project's own default takes the mean of each block.

    Args:
        blockwise: makes the advantages.
        answer_column: of the data set; the reference answers. Problems are named by their prompts.
        arguments, options: of GRPOTrainer; `reward_funcs` may be left out, and further ones are logged alone.

    Raises:
        ValueError: in a step, if a process has no whole groups: let per_device_train_batch_size times
            steps_per_generation be a multiple of num_generations.
    """

    def __init__(self, *arguments: Any, blockwise: Blockwise, answer_column: str = "answer", **options: Any) -> None:
        if len(arguments) < 2:
            options.setdefault("reward_funcs", no_reward)
        super().__init__(*arguments, **options)
        self.blockwise = blockwise
        self.answer_column = answer_column

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        is_evaluation = self.model is not None and not self.model.training
        mode, size = ("eval", self.num_generations_eval) if is_evaluation else ("train", self.num_generations)
        problems = [Problem(str(row["prompt"]), str(row["prompt"]), str(row[self.answer_column])) for row in inputs]
        samples = sampled_tokens(output, self.eos_token_ids)
        advantages, scored = self.blockwise(problems, samples, size or 1)
        for j, objective in enumerate(self.blockwise.scorer.objectives):
            rewards = scored.rewards[scored.present[:, j], j]
            self._metrics[mode][f"rewards/{objective.name}/mean"].append(rewards.mean().item())
        output["advantages"] = advantages.to(output["completion_ids"].device)
        return output


def sampled_tokens(output: dict[str, Tensor], ends: list[int]) -> SampledTokens:
    """Return TRL's batch as this project has it, on the CPU; ends: the ids that end a sequence."""
    ids, mask = output["completion_ids"].cpu(), output["completion_mask"].cpu().bool()
    last = ids.gather(1, (mask.sum(1) - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    ended = torch.isin(last, torch.tensor(ends)) & mask.any(1)
    return SampledTokens(output["prompt_ids"].cpu(), output["prompt_mask"].cpu().bool(), ids, mask, ended)
