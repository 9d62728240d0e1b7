"""`bae-evaluate`: measure a trained policy, or completions that someone else generated."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from bae import cli, schema
from bae.build import make, make_pipeline, plain, quieten


def main() -> None:
    """Entry point of `bae-evaluate`."""
    schema.register()
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
    """Raises UserError for values that cannot work."""
    if (cfg.run is None) == (cfg.completions is None):
        raise cli.UserError(
            "name what to evaluate, one of the two: run=<MLflow run id or output folder>, or completions=<file>"
        )
    for key in ("samples", "prompts", "resamples", "max_new_tokens", "temperature"):
        if cfg[key] is not None and cfg[key] <= 0:
            raise cli.UserError(f"{key}={cfg[key]}: must be above 0")


def evaluate_run(cfg: DictConfig) -> None:
    """Sample from the policy that a run left, split by split, and log to that run."""
    import torch
    from mlflow import MlflowClient

    from bae.evaluation import lines, measure, sample
    from bae.models import load_pretrained
    from bae.tracking import log_evaluation
    from bae.train import RUN_FILE, run_folder, saved_config

    with cli.user_errors():
        quieten()
        folder = run_folder("run", cfg.run, cfg.logger.tracking_uri)
        trained = saved_config(folder)
        if not (folder / "policy").is_dir():
            raise cli.UserError(f"run={cfg.run}: {folder} has no policy yet; finish it with: bae-train resume={folder}")
        policy = load_pretrained(
            str(folder / "policy"),
            trained.model.dtype,
            trained.model.prompt_template,
            trained.model.get("trust_remote_code", False),
        )
        policy.model.to(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
        task = make(cfg.task or trained.task)
        splits = list(cfg.split) if isinstance(cfg.split, ListConfig) else [cfg.split]
        for split in splits:
            task.size(split)
        pipeline = replace(
            make_pipeline(trained, policy, task),
            temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens or trained.max_new_tokens,
        )
    run_id = (folder / RUN_FILE).read_text()
    client = MlflowClient(trained.logger.tracking_uri)
    prefix = f"{cli.choice('task')}_" if cfg.task else ""
    summaries = {}
    for split in splits:
        name = f"{prefix}{split}"
        table = sample(pipeline, split, cfg.prompts, cfg.samples, cfg.seed)
        summaries[name], files = measure(table, task.verifier, folder / "evaluation", name, cfg.resamples)
        log_evaluation(client, run_id, name, summaries[name], files)
    print("\n".join(["", *lines(summaries), ""]))
    print(f"samples  {folder / 'evaluation'}\nrun      {run_id} in {trained.logger.tracking_uri}")


def evaluate_file(cfg: DictConfig) -> None:
    """Score the completions of a file, model by model; no model is loaded."""
    from mlflow import MlflowClient

    from bae.evaluation import lines, measure
    from bae.samples import read_completions
    from bae.tracking import log_evaluation, prepare_store

    with cli.user_errors():
        quieten()
        verifier = make(cfg.verifier)
        tables = read_completions(cfg.completions, plain(cfg.columns), plain(cfg.tags), verifier)
        store = prepare_store(cfg.logger.tracking_uri, cfg.logger.experiment, cfg.logger.artifacts)
    client = MlflowClient(cfg.logger.tracking_uri)
    stem = Path(cfg.completions).stem
    folder = Path(cfg.outputs) / "evaluations" / stem
    run_id = client.create_run(store, run_name=stem, tags={"completions": cfg.completions}).info.run_id
    summaries = {}
    for model, table in tables.items():
        name = model.replace("/", "_")
        summaries[name], files = measure(table, verifier, folder, name, cfg.resamples)
        log_evaluation(client, run_id, name, summaries[name], files)
    client.set_terminated(run_id)
    print("\n".join(["", *lines(summaries), ""]))
    print(f"samples  {folder}\nrun      {run_id} in {cfg.logger.tracking_uri}")


if __name__ == "__main__":
    main()
