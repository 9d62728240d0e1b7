"""`bae-evaluate`: measure a trained policy, or completions that someone else generated."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig

from bae.commands import cli
from bae.commands.build import RUN_FILE, make, plain, quieten, trained
from bae.signals import Stopped

if TYPE_CHECKING:
    import pandas

    from bae.evaluation.measure import Summary
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
    for key in ("samples", "prompts", "resamples", "max_new_tokens", "temperature"):
        if cfg[key] is not None and cfg[key] <= 0:
            raise cli.UserError(f"{key}={cfg[key]}: must be above 0")


def evaluate_run(cfg: DictConfig) -> None:
    """Sample from the policy that a run left, split by split, and log to that run."""
    from bae.evaluation.measure import sample

    with cli.user_errors():
        folder, before, pipeline = trained(cfg)
        task = pipeline.task
        splits = list(cfg.split) if isinstance(cfg.split, ListConfig) else [cfg.split]
        for split in splits:
            task.size(split)
    prefix = f"{cli.choice('task')}_" if cfg.task else ""
    tables = ((f"{prefix}{split}", sample(pipeline, split, cfg.prompts, cfg.samples, cfg.seed)) for split in splits)
    run_id = (folder / RUN_FILE).read_text()
    record(tables, task.verifier, folder / "evaluation", before.logger.tracking_uri, run_id, cfg.resamples)


def evaluate_file(cfg: DictConfig) -> None:
    """Score the completions of a file, model by model; no model is loaded."""
    from mlflow import MlflowClient

    from bae.evaluation.completion_table import read_completions
    from bae.report.tracking import prepare_store

    with cli.user_errors():
        quieten()
        verifier = make(cfg.verifier)
        tables = read_completions(cfg.completions, plain(cfg.columns), plain(cfg.tags), verifier)
        uri = cfg.logger.tracking_uri
        experiment_id = prepare_store(uri, cfg.logger.experiment, cfg.logger.artifacts)
    client = MlflowClient(uri)
    stem = Path(cfg.completions).stem
    run_id = client.create_run(experiment_id, run_name=stem, tags={"completions": cfg.completions}).info.run_id
    named = ((model.replace("/", "_"), table) for model, table in tables.items())
    status = "FAILED"
    try:
        record(named, verifier, Path(cfg.outputs) / "evaluations" / stem, uri, run_id, cfg.resamples)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run_id, status)


def record(
    tables: "Iterable[tuple[str, pandas.DataFrame]]",
    verifier: "Verifier",
    folder: Path,
    tracking_uri: str,
    run_id: str,
    resamples: int,
) -> None:
    """Measure each table as it comes, write it to `folder` and log it to the run; print what was found."""
    from mlflow import MlflowClient

    from bae.evaluation.measure import lines, measure
    from bae.report.tracking import log_evaluation

    client = MlflowClient(tracking_uri)
    summaries: dict[str, Summary] = {}
    for name, table in tables:
        found, files = measure(table, verifier, folder, name, resamples)
        log_evaluation(client, run_id, found, files)
        summaries |= found
    print("\n".join(["", *lines(summaries), ""]))
    print(f"samples  {folder}\nrun      {run_id} in {tracking_uri}")


if __name__ == "__main__":
    main()
