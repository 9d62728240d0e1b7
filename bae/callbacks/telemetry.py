"""The `train/`, `time/` and `perf/` metrics. docs/metrics.md says what each one means."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bae.batch import Completion, RolloutBatch, Scored
from bae.callbacks.collectives import gather
from bae.callbacks.run_logger import run_logger
from bae.evaluation.metrics import Calibration
from bae.objectives.scoring import Scorer
from bae.rollout.pipeline import Pipeline
from bae.text.verdict import Verdict


class Telemetry(L.Callback):
    """Measure the batch over all ranks, log it, and show ECE and accuracy, or else the rewards, as its progress."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.scorer = pipeline.scorer
        self.objectives = [objective.name for objective in pipeline.scorer.objectives]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        samples, scored = batch.require_rollouts()
        present = gather(trainer, scored.present)
        advantages = gather(trainer, batch.require_advantages().per_objective)
        metrics = completion_metrics(trainer, scored, self.scorer)
        for j, name in enumerate(self.objectives):
            mine = advantages[present[:, j], j]
            metrics[f"advantage_std/{name}"] = mine.std(correction=0).item() if len(mine) else 0.0
            metrics[f"zero_signal/{name}"] = (mine == 0).float().mean().item()
        metrics |= batch.metrics | {"entropy_coef": batch.entropy_coef}
        logged = {f"train/{name}": value for name, value in metrics.items()}
        logged |= {f"time/{name}": value for name, value in batch.seconds.items()}
        tokens = gather(trainer, samples.completion_mask.sum(1)).sum().item()
        logged["perf/tokens_per_second"] = tokens / sum(batch.seconds.values())
        run_logger(trainer).log_metrics(logged, step=batch.step + 1)
        shown = {name: metrics[name] for name in ("ece", "accuracy") if not math.isnan(metrics.get(name, math.nan))}
        shown = shown or {name: metrics[f"reward/{name}"] for name in self.objectives}
        pl_module.log_dict(shown, prog_bar=True, logger=False)


def completion_metrics(trainer: L.Trainer, scored: Scored, scorer: Scorer) -> dict[str, float]:
    """Measure completions over all ranks. Training and held-out problems share these metrics.

    Args:
        scored: the completions of this rank.
        scorer: names the objectives, and tells which confidence is about which answer.

    Returns:
        {name: value}. The metrics of further answers have the prefix `attempt_2/` and so on.
    """
    completions, unanswered = scored.completions, scored.unanswered
    objectives = [objective.name for objective in scorer.objectives]

    def share(values: Sequence[float]) -> float:
        return gather(trainer, torch.tensor(values, dtype=torch.double)).mean().item()

    judged: dict[str, float] = {}
    for attempt, number in enumerate(scorer.attempts):
        prefix = f"attempt_{attempt + 1}/" if attempt else ""
        found = _calibration(trainer, completions, attempt, number)
        judged |= {f"{prefix}{name}": value for name, value in found.items()}
    rewards, present, malformed = (gather(trainer, x) for x in (scored.rewards, scored.present, scored.malformed))
    return {
        **judged,
        **{f"reward/{name}": _mean(rewards[present[:, j], j]) for j, name in enumerate(objectives)},
        **{f"malformed/{name}": malformed[:, j].float().mean().item() for j, name in enumerate(objectives)},
        **{
            f"unanswered/{objective.name}": share(unanswered[:, j].tolist())
            for j, objective in enumerate(scorer.objectives)
            if objective.is_async and unanswered is not None
        },
        "malformed": malformed.any(1).float().mean().item(),
        "truncated": share([c.truncated for c in completions]),
        "length": share([c.length for c in completions]),
        "unparseable": share([Verdict.UNPARSEABLE in c.verdicts for c in completions]),
        "timeout": share([Verdict.TIMEOUT in c.verdicts for c in completions]),
        "abstained": share([Verdict.ABSTAINED in c.verdicts for c in completions]),
    }


def _calibration(trainer: L.Trainer, completions: Sequence[Completion], attempt: int, number: int) -> dict[str, float]:
    """Measure one answer of all ranks; number: the index of the confidence about it, -1 for accuracy alone."""
    alone = trainer.world_size == 1
    metric = Calibration(sync_on_compute=not alone).to("cpu" if alone else trainer.strategy.root_device)
    stated = [None if number < 0 else c.stated(number) for c in completions]
    confidence = torch.tensor([torch.nan if q is None else q for q in stated], dtype=torch.double)
    metric.update(confidence, torch.tensor([c.is_correct(attempt) for c in completions], dtype=torch.double))
    return {name: value.item() for name, value in metric.compute().items() if number >= 0 or name == "accuracy"}


def _mean(values: Tensor) -> float:
    return values.mean().item()  # NaN if there are none, and MLflow shows it as such
