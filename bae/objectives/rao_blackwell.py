"""The policy's own expectation of the reward, over the number that it may state (see bae.method.stated_numbers)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bae.batch import ForwardResult, Refinement, Scored
from bae.method.baselines import Baseline, RewardView, load_state, state_of
from bae.method.stated_numbers import (
    DIGITS,
    Candidates,
    Decisions,
    all_action,
    candidate_log_probs,
    expected,
    token_advantages,
)
from bae.objectives.refining import Ranks
from bae.objectives.reward_view import number_decisions
from bae.objectives.scoring import Scorer
from bae.text.blocks import CONFIDENCE, tags_named


@dataclass
class RaoBlackwell:
    """Judge the tokens of a number against the expectation before each of them, from the training pass.

    The text before the number is judged by that expectation minus `text`.

    Args:
        text: the baseline of what stands before the number. It must leave the completion itself out.
        all_action: whether the number learns from the expected reward of every token that might have been drawn, with
            no noise of sampling. Otherwise it learns from the token that was drawn.
    """

    text: Baseline
    all_action: bool = False
    _candidates: Candidates | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, rewards: RewardView) -> Tensor:
        text = self.text(rewards)
        return text if rewards.expected is None else torch.where(rewards.expected.isnan(), text, rewards.expected)

    def check(self, scorer: Scorer, optimizer_steps: int = 1) -> None:
        """Refuse objectives whose reward cannot be expected over the stated number. Raises ValueError."""
        if self.all_action and optimizer_steps > 1:
            raise ValueError(
                "baseline.all_action=true is for one optimiser step a batch, because nothing clips it in later ones; "
                "set training.optimizer_steps=1 or baseline.all_action=false"
            )
        closings = {tags.closing for tags in tags_named(scorer.blocks, CONFIDENCE)}
        if len(closings) > 1:
            raise ValueError(
                f"baseline=rao_blackwell: the {CONFIDENCE} sections close with {' and '.join(sorted(closings))}; "
                "let them close alike"
            )
        if scorer.closing[0] in DIGITS:
            raise ValueError(
                f"baseline=rao_blackwell: the {CONFIDENCE} sections close with {scorer.closing!r}, which begins as a "
                "number goes on; let them close with another sign"
            )
        for objective, malformed in zip(scorer.objectives, scorer.malformed, strict=True):
            if objective.givens and objective.score is None:
                raise ValueError(
                    f"baseline=rao_blackwell: objectives.rewards.{objective.name} has no score of a stated number to "
                    "take the expectation of; choose another baseline"
                )
            if objective.givens and malformed == "mask":
                raise ValueError(
                    "baseline=rao_blackwell: under malformed=mask a malformed number has no reward to expect, and "
                    f"objectives.rewards.{objective.name} has that policy; choose penalise or zero"
                )

    def refine(self, j: int, advantage: Tensor, scored: Scored, scorer: Scorer, ranks: Ranks) -> Refinement | None:
        """Return the advantages of the tokens of stated numbers; None for a reward that is no scoring rule."""
        if scorer.objectives[j].score is None:
            return None
        if self._candidates is None:
            self._candidates = Candidates(scorer.vocabulary, scorer.closing)
        decisions = number_decisions(scored, scorer, j, self._candidates, ranks)
        in_block = scored.block_of == scorer.block_of_objective[j]
        return NumberRefinement(j, decisions, scored.rewards[:, j], advantage, in_block, self.all_action)

    def state_dict(self) -> dict[str, Any]:
        return state_of(self.text)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(self.text, state)


@dataclass(frozen=True)
class NumberRefinement:
    """Give the tokens of stated numbers advantages of their own, for one objective.

    Attributes:
        objective: its number.
        decisions: of N completions.
        reward, advantage: (N,), of the objective.
        in_block: (N, T) bool, the tokens of the objective's block.
        all_action: whether numbers learn from every alternative.
    """

    objective: int
    decisions: Decisions
    reward: Tensor
    advantage: Tensor
    in_block: Tensor
    all_action: bool

    @property
    def unrefined(self) -> Tensor:
        """Return (N,) bool: the completions without a decision, whose advantages stay as they are."""
        return ~(self.decisions.position >= 0).any(1)

    def apply(self, forward: ForwardResult, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See bae.batch.Refinement."""
        device, width = forward.log_p.device, forward.log_p.shape[1]
        decisions = self.decisions.rows(rows).to(device)
        reward, before = self.reward[rows].to(device), self.advantage[rows].to(device)
        in_block = self.in_block[rows, :width].to(device)
        with torch.set_grad_enabled(self.all_action and torch.is_grad_enabled()):
            logits = forward.logits_at(decisions.position)
            log_probs = candidate_log_probs(logits, decisions.ids, forward.temperature)
        values = expected(log_probs.detach(), decisions)
        change = token_advantages(before, reward, values, decisions, in_block) - before.unsqueeze(1) * in_block
        if not self.all_action:
            return change, torch.zeros((), device=device)
        # The token that was drawn gives way to the expectation over all that might have been drawn.
        decides = decisions.position >= 0
        place = decisions.position.clamp(min=0)
        change = change.scatter_add(1, place, -(before.unsqueeze(1) + change.gather(1, place)) * decides)
        gain = (weights.gather(1, place) * decides * all_action(log_probs, decisions)).sum()
        return change, gain
