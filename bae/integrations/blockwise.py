"""From sampled tokens to an advantage for each token, in one call, for training loops of any make."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bae.batch import Problem, SampledTokens, Scored, group_index
from bae.method.advantages import advantages, spread_over_tokens, sum_by_block
from bae.method.baselines import Baseline, group_mean, outcome_conditioned, with_fallback, without_self
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

    Raises:
        ValueError: for a baseline that is finished in this project's own training pass.
    """

    scorer: Scorer
    baseline: Baseline = field(default=outcome_conditioned)
    first_block_baseline: Baseline = field(default=group_mean)
    fallback_baseline: Baseline = field(default=without_self)
    outcome: Outcome = field(default=given_reward)

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
        return spread_over_tokens(per_block, scored.block_of), scored
