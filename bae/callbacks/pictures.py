"""Two pictures of a run: held-out problems over training, and their reliability before and after."""

from pathlib import Path
from typing import Any

import lightning as L
import pandas

from bae.callbacks.held_out import measurements
from bae.callbacks.run_logger import run_logger
from bae.evaluation import figures
from bae.evaluation.completion_table import pairs
from bae.evaluation.metrics import all_metrics, reliability_table

CURVES = {"ece": "ECE", "auroc": "AUROC", "accuracy": "accuracy"}


class Pictures(L.Callback):
    """Draw and log `pictures/training.png` and `pictures/reliability.png` (and .svg) after the last step.

    They are drawn from what HeldOut wrote. A format without a confidence has the accuracy alone.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        tables = measurements(self.folder) if trainer.is_global_zero else {}
        if tables:
            run_logger(trainer).log_folder(draw(tables, self.folder / "pictures"))


def draw(tables: dict[int, pandas.DataFrame], folder: Path) -> Path:
    """Draw both pictures into a folder, and return it. tables: {step: completion table}, not empty."""
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for step, table in tables.items():
        metrics = all_metrics(*pairs(table)[:2])
        for name in CURVES:
            curves[name][step] = metrics[name].item()
    has_confidence = any(table["confidence"].notna().any() for table in tables.values())
    shown = CURVES if has_confidence else {"accuracy": "accuracy"}
    histories = {label: {"this run": [curves[name]]} for name, label in shown.items()}
    figures.save(figures.training_curves(histories, "held-out problems"), folder / "training")
    if has_confidence:
        first, last = min(tables), max(tables)
        panels = {
            f"{when} (step {step})": reliability_table(*pairs(tables[step])[:2])
            for when, step in {"before": first, "after": last}.items()
        }
        figures.save(figures.reliability(panels), folder / "reliability")
    return folder
