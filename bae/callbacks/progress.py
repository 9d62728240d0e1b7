"""How far a run is: a bar on a terminal; elsewhere a dated line every few per cent."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from bae.batch import RolloutBatch
from bae.callbacks.schedule import due

BAR = "{desc} {n_fmt}/{total_fmt} |{bar:16}| {elapsed}<{remaining}{postfix}"
"""With ECE and accuracy, 76 columns at most for a run of 9,999 steps and of less than ten hours."""


class Progress(ProgressBar):
    """Show the step, the time that is left, and what the last batch was measured to be, ECE first.

    A step before which a resumed run begins counts as done, and not for the time that is left.

    Args:
        lines: how many lines to print over the whole run if the output is no terminal. A bar there would fill a log
            with carriage returns.
    """

    def __init__(self, lines: int = 20) -> None:
        super().__init__()
        if lines < 1:
            raise ValueError(f"callbacks.progress.lines={lines}: must be 1 or more")
        self.lines = lines
        self._bar: tqdm | None = None
        self._began, self._first, self._is_shown = 0.0, 0, True

    def disable(self) -> None:
        """Show nothing. Lightning calls this on all ranks but the first."""
        self._is_shown = False

    def enable(self) -> None:
        """Show again."""
        self._is_shown = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time before anything is sampled, held-out problems among it."""
        self._began = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self._is_shown and sys.stdout.isatty():
            self._bar = tqdm(
                desc="step",
                initial=self._first,
                total=self._steps,
                dynamic_ncols=True,
                file=sys.stdout,
                smoothing=0,
                bar_format=BAR,
            )
        elif self._is_shown:
            self._print_line(self._first, {})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done, values = batch.step + 1, trainer.progress_bar_metrics
        if self._bar is not None:
            self._bar.set_postfix_str(_in_words(values), refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._is_shown and due(done, max(1, self._steps // self.lines), self._steps):
            self._print_line(done, values)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the bar as it is, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def _steps(self) -> int:
        return int(self.total_train_batches)

    def _print_line(self, done: int, values: Mapping[str, Any]) -> None:
        """Print the date, the step, the values and the time that is left."""
        parts = [f"{time.strftime('%Y-%m-%d %H:%M:%S')}  step {done}/{self._steps}", _in_words(values)]
        if done > self._first:
            left = (time.monotonic() - self._began) / (done - self._first) * (self._steps - done)
            parts.append(f"left {tqdm.format_interval(left)}")
        print("  ".join(filter(None, parts)), flush=True)


def _in_words(values: Mapping[str, Any]) -> str:
    """Return the values that are numbers, as in "ECE 0.031, accuracy 0.482"."""
    named = {"ECE" if name == "ece" else name: value for name, value in values.items()}
    return ", ".join(f"{name} {value:.3f}" for name, value in named.items() if not math.isnan(value))
