"""Give a sweeper what it optimises: a metric of held-out problems after the last step of each job."""

import math
import sys
from pathlib import Path

from omegaconf import DictConfig, read_write

from bae.commands.process_setup import program


def value_of(cfg: DictConfig, folder: Path | None) -> float | None:
    """Return the value of the metric `cfg.optimize` after the last step of a run.

    None if none is asked for, and for a run without that value, or whose value is NaN: sweepers take a job without a
    value as failed, and go on.

    Args:
        cfg: of the run.
        folder: of the run; None if it was done before.
    """
    from bae.commands.resuming import finished_run
    from bae.report.run_log import RunLog

    metric = cfg.get("optimize")
    if not metric:
        return None
    if folder is None:
        run = finished_run(cfg)
        value = run.data.metrics.get(metric) if run else None
    else:
        value = RunLog(folder).history(metric).get(metric, {}).get(cfg.steps)
    return None if value is None or math.isnan(value) else value


def set_direction(cfg: DictConfig) -> None:
    """Tell a sweeper that optimises, such as Optuna's, whether low or high values of its metric are good.

    Exits with one sentence if it has no metric. cfg: of a multirun, with `hydra`.
    """
    from bae.evaluation.direction import low_is_good

    if "direction" not in cfg.hydra.sweeper:
        return
    if not cfg.optimize:
        sys.exit(f"{program()}: optimize=null: this sweeper needs a value of each job; set it, as in optimize=val/ece")
    prefix = cfg.optimize.partition("/")[0]
    try:
        is_low = low_is_good("optimize", cfg.optimize, prefix)
    except ValueError as error:
        sys.exit(f"{program()}: {error}")
    with read_write(cfg):
        cfg.hydra.sweeper.direction = "minimize" if is_low else "maximize"
