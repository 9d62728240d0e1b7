"""Every `train/`, `time/` and `perf/` metric. What each one means: docs/metrics.md."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bae.batch import RolloutBatch, Scored
from bae.callbacks.collectives import gather
from bae.evaluation.metrics import calibration
from bae.objectives.scoring import Scorer
from bae.rollout.pipeline import Pipeline
from bae.text.verdict import Verdict


class Telemetry(L.Callback):
    """Measures the batch over all ranks, logs it, and shows rewards and ECE on the progress bar."""

    def __init__(self, pipeline: Pipeline):
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
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=batch.step + 1)
        shown = {name: metrics[f"reward/{name}"] for name in self.objectives}
        if not math.isnan(metrics.get("ece", math.nan)):  # the format has a confidence
            shown["ece"] = metrics["ece"]
        pl_module.log_dict(shown, prog_bar=True, logger=False)


def completion_metrics(trainer: L.Trainer, scored: Scored, scorer: Scorer) -> dict[str, float]:
    """What there is to say of completions alone, over all ranks; the same in training and on held-out problems."""
    completions, objectives = scored.completions, [objective.name for objective in scorer.objectives]
    column = lambda values: gather(trainer, torch.tensor(values, dtype=torch.double))  # noqa: E731
    share = lambda flags: column(flags).mean().item()  # noqa: E731
    judged: dict[str, float] = {}
    for attempt, number in enumerate(scorer.attempts):
        correct = column([c.is_correct(attempt) for c in completions])
        stated = [None if number < 0 else c.stated(number) for c in completions]
        confidence = column([torch.nan if q is None else q for q in stated])
        values = {"accuracy": correct.mean(), **(calibration(confidence, correct) if number >= 0 else {})}
        judged |= {f"{f'attempt_{attempt + 1}/' * (attempt > 0)}{name}": value.item() for name, value in values.items()}
    rewards, present, malformed = (gather(trainer, x) for x in (scored.rewards, scored.present, scored.malformed))
    return {
        **judged,
        **{f"reward/{name}": _mean(rewards[present[:, j], j]) for j, name in enumerate(objectives)},
        **{f"malformed/{name}": malformed[:, j].float().mean().item() for j, name in enumerate(objectives)},
        "malformed": malformed.any(1).float().mean().item(),
        "truncated": share([c.truncated for c in completions]),
        "length": share([c.length for c in completions]),
        "unparseable": share([Verdict.UNPARSEABLE in c.verdicts for c in completions]),
        "timeout": share([Verdict.TIMEOUT in c.verdicts for c in completions]),
    }


def _mean(values: Tensor) -> float:
    return values.mean().item()  # NaN if there are none, and MLflow shows it as such
