"""Replace groups that have no signal by groups that have some."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from bae import seeds
from bae.batch import RolloutBatch, Scored, concatenate, group_index, rows_of
from bae.method.baselines import outcome_strata, stratified_mean
from bae.objectives.outcomes import Outcome
from bae.objectives.reward_view import reward_view, score_table
from bae.rollout.pipeline import Pipeline


class DynamicSampling(L.Callback):
    """Sample further problems, and put their groups where groups had no signal in any block.

    This is DAPO's dynamic sampling (arXiv 2503.14476), block by block. It stands between Rollouts and
    BlockwiseAdvantages, and writes `problems`, `samples` and `scored` anew. The batch keeps its size: groups that
    cannot be replaced stay. Every rank works for itself. It writes into `metrics` sampling_rounds, the number of rounds
    with the first one, and groups_replaced, the share of the groups.

    Args:
        pipeline: encodes, samples and scores.
        outcome: of a prefix, as for BlockwiseAdvantages.
        rounds: of further problems, as many as the step has in each.
        seed: of the draws.

    Raises:
        ValueError: if rounds is negative.
    """

    def __init__(self, pipeline: Pipeline, outcome: Outcome, rounds: int, seed: int) -> None:
        if rounds < 0:
            raise ValueError(f"callbacks.dynamic_sampling.rounds={rounds}: must not be negative")
        self.pipeline = pipeline
        self.outcome = outcome
        self.rounds = rounds
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        if self.rounds == 0:
            return
        samples, scored = batch.require_rollouts()
        count, size, pad = len(batch.problems), batch.group_size, self.pipeline.policy.tokenizer.pad_token_id
        problems, signal = list(batch.problems), self._has_signal(scored, size)
        done = 0
        while done < self.rounds and int(signal.sum()) < count:
            done += 1
            fresh = batch.further_problems(done)
            first = count * (trainer.world_size * done + trainer.global_rank)
            keys = seeds.keys(self.seed, batch.step, first, count)
            more, its_scores, seconds = self.pipeline(fresh, keys, size)
            for name, value in seconds.items():
                batch.seconds[name] = batch.seconds.get(name, 0.0) + value
            problems, signal = problems + fresh, torch.cat([signal, self._has_signal(its_scores, size)])
            samples, scored = concatenate([(samples, scored), (more, its_scores)], pad)
        groups = chosen_groups(signal, count)
        rows = (groups.unsqueeze(1) * size + torch.arange(size)).flatten()
        batch.samples, batch.scored = rows_of(samples, scored, rows)
        batch.problems = [problems[p] for p in groups.tolist()]
        batch.metrics["sampling_rounds"] = 1.0 + done
        batch.metrics["groups_replaced"] = (groups >= count).double().mean().item()

    def _has_signal(self, scored: Scored, group_size: int) -> Tensor:
        """Return (P,) bool: the groups in which some reward differs from the mean of its stratum."""
        group = group_index(len(scored.completions), group_size)
        objectives = self.pipeline.scorer.objectives
        table = score_table(scored, objectives, self.outcome, group)
        found = torch.zeros(len(group), dtype=torch.bool)
        for j, objective in enumerate(objectives):
            rewards = reward_view(objective, j, table, group)
            mean = stratified_mean(rewards.reward, outcome_strata(rewards), rewards.present)
            found |= rewards.present & (rewards.reward != mean)
        return found.view(-1, group_size).any(1)


def chosen_groups(signal: Tensor, count: int) -> Tensor:
    """Return (count,) long, in order: the first groups that have signal, and others if there are too few of these.

    signal: (P,) bool, count <= P.
    """
    by_use = torch.cat([signal.nonzero().squeeze(1), (~signal).nonzero().squeeze(1)])
    return by_use[:count].sort().values
