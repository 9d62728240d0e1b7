"""Replace groups that have no signal by groups that have some."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor

from bae import seeds
from bae.batch import RolloutBatch, Scored, concatenate, group_index, rows_of
from bae.callbacks.collectives import gather, gather_objects
from bae.method.baselines import outcome_strata, stratified_mean
from bae.objectives.outcomes import Outcome
from bae.objectives.reward_view import reward_view, score_table
from bae.rollout.pipeline import Pipeline

T = TypeVar("T")


class DynamicSampling(L.Callback):
    """Sample further problems, and put their groups where groups had no signal in any block.

    This is DAPO's dynamic sampling (arXiv 2503.14476), block by block. It stands between Rollouts and
    BlockwiseAdvantages, and writes `problems`, `samples` and `scored` anew. The batch keeps its size: groups that
    cannot be replaced stay. Those of all ranks are chosen together, so they are the same on any number of ranks; a rank
    that has too many sends some to those that have too few. It writes into `metrics` sampling_rounds, the number of
    rounds with the first one, and groups_replaced, the share of the groups.

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
        count, size, world = len(batch.problems), batch.group_size, trainer.world_size
        problems, signal = list(batch.problems), gather(trainer, self._has_signal(scored, size))
        done, pad = 0, self.pipeline.policy.tokenizer.pad_token_id
        while done < self.rounds and int(signal.sum()) < world * count:
            done += 1
            fresh = batch.further_problems(done)
            first = count * (world * done + trainer.global_rank)
            keys = seeds.keys(self.seed, batch.step, first, count)
            more, its_scores, seconds = self.pipeline(fresh, keys, size)
            for name, value in seconds.items():
                batch.seconds[name] = batch.seconds.get(name, 0.0) + value
            problems += fresh
            signal = torch.cat([signal, gather(trainer, self._has_signal(its_scores, size))])
            samples, scored = concatenate([(samples, scored), (more, its_scores)], pad)
        groups = chosen_groups(signal, world * count)
        sampled = [
            (problem, rows_of(samples, scored, p * size + torch.arange(size))) for p, problem in enumerate(problems)
        ]
        taken = exchanged(trainer, sampled, groups, count)
        batch.problems = [problem for problem, _ in taken]
        batch.samples, batch.scored = concatenate([rollout for _, rollout in taken], pad)
        batch.metrics["sampling_rounds"] = 1.0 + done
        batch.metrics["groups_replaced"] = (groups >= world * count).double().mean().item()

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


def exchanged(trainer: L.Trainer, sampled: Sequence[T], groups: Tensor, count: int) -> list[T]:
    """Return `count` of the chosen groups on every rank: its own, as far as they are so many, and some of others.

    Args:
        trainer: knows the ranks.
        sampled: the groups of this rank, `count` for each round.
        groups: (world * count,) long, the chosen ones. They are numbered over all ranks: round by round, and in a round
            rank by rank.
        count: groups of a rank.
    """
    rank, world = trainer.global_rank, trainer.world_size
    owner, place = groups // count % world, groups // (world * count) * count + groups % count
    places = [place[owner == r].tolist() for r in range(world)]
    if all(len(each) == count for each in places):
        return [sampled[p] for p in places[rank]]
    spare = chain(*gather_objects(trainer, [sampled[p] for p in places[rank][count:]]))
    lack = [max(0, count - len(each)) for each in places]
    received = list(islice(spare, sum(lack[:rank]), sum(lack[: rank + 1])))
    return [sampled[p] for p in places[rank][:count]] + received
