"""The progress bar: step, rewards, ECE and time left."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class ProgressBar(TQDMProgressBar):
    """Show Lightning's bar, which counts rollout steps instead of epochs."""

    BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining}{postfix}"

    def init_train_tqdm(self) -> Tqdm:
        total = self.total_train_batches
        return Tqdm(
            desc="step",
            total=total,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, *args: Any) -> None:
        """Do nothing: the run is one epoch, and the bar has been there since it began."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: f"{value:.3f}" for name, value in metrics.items()}
