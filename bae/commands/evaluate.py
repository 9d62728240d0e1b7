"""`bae-evaluate`: measure a trained policy, or completions that someone else generated."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig

from bae.commands import cli
from bae.commands.build import logger_of, make, plain, quieten, trained
from bae.signals import Stopped

if TYPE_CHECKING:
    import pandas

    from bae.evaluation.measure import Summary
    from bae.report.tracking import MLflowRun
    from bae.text.verifier import Verifier


def main() -> None:
    """Run `bae-evaluate`."""
    cli.run(evaluate, "evaluate")


def evaluate(cfg: DictConfig) -> None:
    """Evaluate what the configuration names; print a table, and where its numbers are."""
    with cli.user_errors():
        check(cfg)
    if cfg.run is not None:
        evaluate_run(cfg)
    else:
        evaluate_file(cfg)


def check(cfg: DictConfig) -> None:
    """Refuse values that cannot work. Raises UserError."""
    if (cfg.run is None) == (cfg.completions is None):
        raise cli.UserError(
            "name what to evaluate, one of the two: run=<MLflow run id or output folder>, or completions=<file>"
        )
    if cfg.policy not in ("last", "best"):
        raise cli.UserError(f"policy={cfg.policy}: choose last or best")
    if cfg.unreadable not in ("fail", "drop"):
        raise cli.UserError(f"unreadable={cfg.unreadable}: choose fail or drop")
    for key in ("samples", "prompts", "resamples", "max_new_tokens", "temperature"):
        if cfg[key] is not None and cfg[key] <= 0:
            raise cli.UserError(f"{key}={cfg[key]}: must be above 0")


def evaluate_run(cfg: DictConfig) -> None:
    """Sample from the policy that a run left, split by split, and log to that run."""
    from bae.callbacks import best
    from bae.evaluation.measure import sample

    is_best = cfg.policy == "best"
    with cli.user_errors():
        folder, before, pipeline = trained(cfg, best.FOLDER if is_best else "policy")
        task = pipeline.task
        splits = list(cfg.split) if isinstance(cfg.split, ListConfig) else [cfg.split]
        for split in splits:
            task.size(split)
        logger = logger_of(before, folder)
    prefix = ("best_" if is_best else "") + (f"{cli.choice('task')}_" if cfg.task else "")
    tables = ((f"{prefix}{split}", sample(pipeline, split, cfg.prompts, cfg.samples, cfg.seed)) for split in splits)
    record(tables, task.verifier, folder / "evaluation", logger, cfg.resamples)


def evaluate_file(cfg: DictConfig) -> None:
    """Score the completions of a file, model by model; no model is loaded."""
    from bae.evaluation.read_completions import read_completions

    with cli.user_errors():
        quieten()
        verifier = make(cfg.verifier)
        tables = read_completions(cfg.completions, plain(cfg.columns), plain(cfg.tags), verifier, cfg.unreadable)
        stem = Path(cfg.completions).stem
        folder = Path(cfg.outputs) / "evaluations" / stem
        logger = make(cfg.logger, folder=str(folder), run_name=stem)
    logger.begin()  # each time a run of its own
    logger.set_tags({"completions": cfg.completions})
    named = ((model.replace("/", "_"), table) for model, table in tables.items())
    status = "FAILED"
    try:
        record(named, verifier, folder, logger, cfg.resamples)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        logger.finalize(status)


def record(
    tables: "Iterable[tuple[str, pandas.DataFrame]]",
    verifier: "Verifier",
    folder: Path,
    logger: "MLflowRun",
    resamples: int,
) -> None:
    """Measure each table as it comes, write it to `folder` and log it to the run; print what was found."""
    from bae.evaluation.measure import lines, measure

    summaries: dict[str, Summary] = {}
    for name, table in tables:
        found, files = measure(table, verifier, folder, name, resamples)
        logger.log_evaluation(found, files)
        summaries |= found
    print("\n".join(["", *lines(summaries), ""]))
    logger.close()
    print(f"samples  {folder}\nrun      {logger.place}")


if __name__ == "__main__":
    main()
