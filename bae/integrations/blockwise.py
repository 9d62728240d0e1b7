"""From sampled tokens to an advantage for each token, in one call, for training loops of any make."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bae.batch import Problem, SampledTokens, Scored, group_index
from bae.method.advantages import advantages, spread_over_tokens, sum_by_block
from bae.method.baselines import Baseline, group_mean, outcome_conditioned, with_fallback, without_self
from bae.method.losses import Aggregation
from bae.objectives.outcomes import Outcome, given_reward
from bae.objectives.refining import RefiningBaseline
from bae.objectives.reward_view import reward_view, score_table
from bae.objectives.scoring import Scorer


@dataclass
class Blockwise:
    """Score completions and compute blockwise advantages (paper, section 3), by default with OCB for later blocks.

    Args:
        scorer: the format, the objectives and the verifier.
        baseline: for objectives that are conditioned on an outcome (`given`).
        first_block_baseline: for the other objectives.
        fallback_baseline: for completions where either has none.
        outcome: of a prefix; what the baseline of later blocks may condition on.
        aggregation: how this project's loss would weigh the tokens, `bae.method.losses.block_mean` in the paper. It is
            put into the advantages, for a loss that takes the mean over the tokens of each completion and then over
            completions: the clipped loss is proportional to its advantages. None leaves the weighing to the trainer.
            Weights of blocks (w_k) count in both cases.

    Raises:
        ValueError: for a baseline that is finished in this project's own training pass.
    """

    scorer: Scorer
    baseline: Baseline = field(default=outcome_conditioned)
    first_block_baseline: Baseline = field(default=group_mean)
    fallback_baseline: Baseline = field(default=without_self)
    outcome: Outcome = field(default=given_reward)
    aggregation: Aggregation | None = None

    def __post_init__(self) -> None:
        for name in ("baseline", "first_block_baseline"):
            if isinstance(getattr(self, name), RefiningBaseline):
                raise ValueError(f"{name}: it is finished in this project's own training pass; choose another here")

    def __call__(self, problems: Sequence[Problem], samples: SampledTokens, group_size: int) -> tuple[Tensor, Scored]:
        """Return (N, T) advantages, zero outside blocks and where there is no token, and the scores.

        Args:
            problems: N, one for each completion, group by group.
            samples: N completions.
            group_size: G, completions of one problem. Groups must be whole.

        Raises:
            ValueError: if N is not a multiple of G.
        """
        if len(problems) % group_size:
            raise ValueError(f"{len(problems)} completions are not whole groups of {group_size}")
        scored = self.scorer(problems, samples)
        objectives, group = self.scorer.objectives, group_index(len(problems), group_size)
        table = score_table(scored, objectives, self.outcome, group)
        baselines = torch.zeros_like(table.rewards)
        for j, objective in enumerate(objectives):
            view = reward_view(objective, j, table, group)
            baseline = self.baseline if objective.givens else self.first_block_baseline
            baselines[:, j], _ = with_fallback(baseline, self.fallback_baseline, view)
        centred = advantages(table.rewards, baselines, table.present)
        weights = [objective.weight for objective in objectives]
        per_block = sum_by_block(centred, self.scorer.block_of_objective, weights, len(self.scorer.blocks))
        return spread_over_tokens(per_block, scored.block_of) * self._weights(scored.block_of), scored

    def _weights(self, block_of: Tensor) -> Tensor:
        """Return (N, T): the weight of each token, as a multiple of what it has in a mean over completions' tokens."""
        block_weights = torch.tensor([block.weight for block in self.scorer.blocks])
        if self.aggregation is None:
            return spread_over_tokens(block_weights.expand(len(block_of), -1), block_of)
        tokens = torch.stack([(block_of == k).sum() for k in range(len(block_weights))])
        lengths = (block_of >= 0).sum(1, keepdim=True)
        return self.aggregation(block_of, block_weights, tokens) * lengths * len(block_of)


def for_token_lists(
    blockwise: Blockwise,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[int]],
    ends: Sequence[int],
    group_size: int,
) -> tuple[list[Tensor], Scored]:
    """Compute the advantages of completions that are lists of token ids.

    Args:
        blockwise: makes them.
        problems: N, at least one, one for each completion, group by group.
        completions: N lists of the ids that the policy sampled, in order.
        ends: the ids that end a sequence.
        group_size: G, completions of one problem.

    Returns:
        N tensors, as long as the completions; and the scores.

    Raises:
        ValueError: if N is not a multiple of G.
    """
    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.long)
    rows = [torch.tensor(ids, dtype=torch.long) for ids in completions]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
    ended = torch.tensor([len(ids) > 0 and ids[-1] in ends for ids in completions], dtype=torch.bool)
    no_prompt = torch.zeros(len(rows), 0, dtype=torch.long)  # nothing reads it
    samples = SampledTokens(no_prompt, no_prompt.bool(), padded, mask, ended)
    advantages, scored = blockwise(problems, samples, group_size)
    return [row[:length] for row, length in zip(advantages, lengths.tolist(), strict=True)], scored
