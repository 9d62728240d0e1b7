"""Measure how far the run's own baseline is from Monte Carlo, so that RMSE and ECE stand side by side."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bae.batch import RolloutBatch, group_index, rows_of
from bae.callbacks.collectives import gather_objects
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one, due
from bae.fidelity.compare import names_of
from bae.fidelity.compare_to_monte_carlo import compare_to_monte_carlo
from bae.fidelity.continuations import Continuations, resample
from bae.fidelity.measure import check_conditioned, fill_absent, promised
from bae.method.baselines import Baseline, with_fallback
from bae.method.stated_numbers import Candidates
from bae.objectives.outcomes import Outcome
from bae.objectives.refining import Ranks, RefiningBaseline
from bae.objectives.reward_view import ScoreTable, reward_view, score_table
from bae.rollout.pipeline import Pipeline
from bae.seeds import Namespace, key


@dataclass(frozen=True)
class _Prefixes:
    """Hold the prefixes of this rank that were continued, R of them, for one objective; all are (R,) but `rollouts`."""

    reward: Tensor
    baseline: Tensor
    outcome: Tensor
    prompt: Tensor  # over all ranks
    rollouts: Tensor  # (R, M), rewards of the fresh ends


class OwnFidelity(L.Callback):
    """Log `fidelity/own/rmse` of the baseline that trains: the root mean square of V - b (bae.fidelity).

    Every M-th completion of a step gives a prefix, and M fresh ends of it estimate V. So a measurement samples no more
    completions than the step itself, and of each only the later block. The baseline is what the step really used. Draws
    have keys of their own and no weight changes, so the training is the same with this callback and without it.

    It is left out, with a sentence, if no objective conditions on an outcome, and from the first measurement on that
    the engine refuses.

    Args:
        pipeline: the policy, and the objectives.
        baseline, fallback_baseline: of the run.
        outcome: of a prefix.
        every: steps between two measurements.
        rollouts: M.
        micro_batch_tokens: of a forward pass, for a baseline that needs the policy's own distribution.
        seed: of the draws.

    Raises:
        ValueError: if `every` is below 1, or `rollouts` below 2.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        baseline: Baseline,
        fallback_baseline: Baseline,
        outcome: Outcome,
        every: int,
        rollouts: int,
        micro_batch_tokens: int,
        seed: int,
    ) -> None:
        at_least_one("own_fidelity", every=every)
        if rollouts < 2:
            raise ValueError(
                f"callbacks.own_fidelity.rollouts={rollouts}: must be 2 or more, for their noise is needed"
            )
        self.pipeline = pipeline
        self.baseline = baseline
        self.fallback_baseline = fallback_baseline
        self.outcome = outcome
        self.every = every
        self.rollouts = rollouts
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.left_out = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        try:
            check_conditioned(self.pipeline.scorer.objectives)
        except ValueError:
            self._leave_out(trainer, "no objective conditions on an outcome, so no baseline has a prefix to know")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        if self.left_out or not due(batch.step + 1, self.every) or not _is_finite(batch):
            return
        with batch.timed("fidelity"):
            logged = self._measure(trainer, batch)
        run_logger(trainer).log_metrics(logged, step=batch.step + 1)

    def _measure(self, trainer: L.Trainer, batch: RolloutBatch) -> dict[str, float]:
        """Return the metrics of one step, over all ranks."""
        scorer = self.pipeline.scorer
        later = [j for j, objective in enumerate(scorer.objectives) if objective.givens]
        chosen = torch.arange(0, len(batch.require_advantages().per_block), self.rollouts)
        ends: dict[int, Continuations] = {}
        for block in sorted({scorer.block_of_objective[j] for j in later}):
            again = self._sample_again(trainer, batch, chosen, block)
            refusals = gather_objects(trainer, again if isinstance(again, str) else "")
            if isinstance(again, str) or any(refusals):
                self._leave_out(trainer, f"the engine does not go on from a prefix: {max(refusals, key=len)}")
                return {}
            ends[block] = again
        found: dict[str, float] = {}
        for j in later:
            mine = self._prefixes(trainer, batch, chosen, ends[scorer.block_of_objective[j]], j)
            place = "own" if len(later) == 1 else f"own/{scorer.objectives[j].name}"
            results = agreement(gather_objects(trainer, mine))
            found |= {f"fidelity/{place}/{name}": value for name, value in results.items()}
        return found

    def _sample_again(self, trainer: L.Trainer, batch: RolloutBatch, chosen: Tensor, block: int) -> Continuations | str:
        """Sample the block again from the prefixes of the completions `chosen`; or say why the engine refuses."""
        first = trainer.global_rank * len(batch.require_advantages().per_block)
        samples, scored = rows_of(*batch.require_rollouts(), chosen)
        keys = [key(self.seed, Namespace.OWN_FIDELITY, batch.step, first + n) for n in chosen.tolist()]
        problems = [completion.problem for completion in scored.completions]
        try:
            return resample(self.pipeline, problems, samples, scored.block_of, block, self.rollouts, keys)
        except ValueError as error:  # such as a prompt that is too long for it; the run itself can go on
            return " ".join(str(error).split())

    def _prefixes(
        self, trainer: L.Trainer, batch: RolloutBatch, chosen: Tensor, again: Continuations, j: int
    ) -> _Prefixes:
        """Return what is known of the prefixes that were continued, for objective j."""
        _, scored = batch.require_rollouts()
        count = len(scored.completions)
        table = score_table(scored, self.pipeline.scorer.objectives, self.outcome, group_index(count, batch.group_size))
        rollouts = fill_absent(again.rewards(j))
        keep = scored.present[chosen[again.rows], j] & rollouts.isfinite().all(1)
        rows = chosen[again.rows[keep]]
        return _Prefixes(
            reward=scored.rewards[rows, j],
            baseline=self._baseline(trainer, batch, table, rows, j),
            outcome=table.outcome[rows, j],
            prompt=(trainer.global_rank * count + rows) // batch.group_size,
            rollouts=rollouts[keep],
        )

    def _baseline(self, trainer: L.Trainer, batch: RolloutBatch, table: ScoreTable, rows: Tensor, j: int) -> Tensor:
        """Return the baseline of the completions `rows`: what the step used, or what a refinement makes of it."""
        used = batch.require_advantages().baselines
        assert used is not None, "bae.callbacks.BlockwiseAdvantages writes the baselines"
        if not isinstance(self.baseline, RefiningBaseline):
            return used[rows, j]
        samples, scored = rows_of(*batch.require_rollouts(), rows)
        ranks = Ranks(trainer.global_rank, partial(gather_objects, trainer))
        expected = torch.full((len(used),), torch.nan)
        expected[rows] = promised(self.pipeline, samples, scored, j, self._candidates, self.micro_batch_tokens, ranks)
        group = group_index(len(used), batch.group_size)
        view = reward_view(self.pipeline.scorer.objectives[j], j, table, group, expected=expected)
        return with_fallback(self.baseline, self.fallback_baseline, view)[0][rows]

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self.pipeline.scorer.vocabulary, self.pipeline.scorer.closing)

    def _leave_out(self, trainer: L.Trainer, why: str) -> None:
        self.left_out = True
        if trainer.is_global_zero:
            print(f"fidelity/own/rmse is left out: {why}", file=sys.stderr)


def agreement(parts: Sequence[_Prefixes]) -> dict[str, float]:
    """Return {metric: value} of the prefixes of all ranks; nothing if there are none.

    The metrics are `rmse` and `bias` of all prefixes. Where outcomes are no more than right and wrong, there are
    `rmse_correct` and `rmse_incorrect`, too.
    """
    reward, baseline, outcome, prompt, rollouts = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("reward", "baseline", "outcome", "prompt", "rollouts")
    )
    if not len(reward):
        return {}

    def compare(where: Tensor) -> Any:
        return compare_to_monte_carlo(reward, {"own": baseline}, rollouts, prompt, None, 2, where=where)["own"]

    everything = compare(torch.ones_like(reward, dtype=torch.bool))
    found = {"rmse": everything.rmse.value, "bias": everything.bias.value}
    for value, name in (names_of(outcome) or {}).items():
        if (outcome == value).any():
            found[f"rmse_{name}"] = compare(outcome == value).rmse.value
    return found


def _is_finite(batch: RolloutBatch) -> bool:
    """Tell whether the step has baselines: a step with an infinite reward has none, on no rank."""
    return batch.require_advantages().baselines is not None
