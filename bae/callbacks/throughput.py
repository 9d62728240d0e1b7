"""How much of what the device can do is used for the policy, and how much memory."""

from typing import Any

import lightning as L
import torch

from bae.batch import RolloutBatch
from bae.callbacks.collectives import gather
from bae.callbacks.run_logger import run_logger
from bae.rollout.pipeline import Pipeline
from bae.training.causal_lm import CausalLM
from bae.training.flops import decoding_flops, matmul_rate, model_size, update_flops
from bae.training.heap import most_since_last


class Throughput(L.Callback):
    """Measure the rate of matrix products when training starts, and log it after each step with the rates of stages.

    For sampling and for the update these are `perf/<stage>_flops` and `perf/<stage>_mfu`, means over all ranks, and
    `perf/<stage>_tokens_per_second`, of all ranks together. `perf/memory_gb` is the most memory of a step, of the rank
    that had most.

    Args:
        pipeline: has the policy.
        seconds: for how long the rate is measured.

    Raises:
        ValueError: if seconds is not above 0.
    """

    def __init__(self, pipeline: Pipeline, seconds: float) -> None:
        if seconds <= 0:
            raise ValueError(f"callbacks.throughput.seconds={seconds}: must be above 0")
        self.size = model_size(pipeline.policy.model)  # now: in an update with shards it has no weights
        self.seconds = seconds
        self.rate = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        dtype = product_dtype(trainer, pl_module.model)
        self.rate = matmul_rate(pl_module.device, dtype, self.seconds)  # all ranks at a time, as in a step
        most_since_last(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        samples, _ = batch.require_rollouts()
        tokens = trainer.world_size * int(samples.completion_mask.sum())  # so that the mean over ranks is their sum
        mine = {"matmul_flops": self.rate}
        for stage, count in (("rollout", decoding_flops), ("update", update_flops)):
            rate = count(self.size, samples, batch.group_size) / batch.seconds[stage]
            mine[f"{stage}_flops"], mine[f"{stage}_mfu"] = rate, rate / self.rate
            mine[f"{stage}_tokens_per_second"] = tokens / batch.seconds[stage]
        mine["memory_gb"] = most_since_last(pl_module.device) / 1e9
        every = gather(trainer, torch.tensor([list(mine.values())], dtype=torch.double))
        logged = {f"perf/{name}": mean for name, mean in zip(mine, every.mean(0).tolist(), strict=True)}
        logged["perf/memory_gb"] = every[:, -1].max().item()
        run_logger(trainer).log_metrics(logged, step=batch.step + 1)


def product_dtype(trainer: L.Trainer, model: CausalLM) -> torch.dtype:
    """Return the type of matrix products in the training step: that of the weights, unless the precision casts."""
    kind = model.device.type
    with trainer.precision_plugin.forward_context():
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
