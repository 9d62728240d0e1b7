"""`bae-fidelity`: how near the advantages of each baseline come to Monte Carlo's (paper, Fig. 1)."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from bae.commands import cli, schema
from bae.commands.build import RUN_FILE, make, plain, trained

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from bae.method.baselines import Baseline
    from bae.rollout.pipeline import Pipeline

DRAWS = 2**32 - 4
"""In the place of a step in the seeds of groups; no training step has this number."""


def main() -> None:
    """Entry point of `bae-fidelity`."""
    schema.register()
    cli.run(fidelity, "fidelity")


def fidelity(cfg: DictConfig) -> None:
    """Sample, compare, write, log, print."""
    from mlflow import MlflowClient

    from bae.evaluation import figures
    from bae.fidelity import measure as nested
    from bae.report.tracking import log_fidelity

    with cli.user_errors():
        check(cfg)
        folder, before, pipeline = trained(cfg)
        pipeline.task.size(cfg.split)
        baselines = {name: load_baseline(name) for name in cfg.baselines}
        nested.check_nested(baselines, cfg.nested)
        outcome, fallback = make(cfg.outcome), make(cfg.fallback_baseline)
        nested.check_conditioned(pipeline.scorer.objectives)
    sizes = sorted({cfg.group_size} if isinstance(cfg.group_size, int) else set(cfg.group_size))
    place = folder / "fidelity" / cfg.split
    parts = place / f"parts_{digest(cfg, folder)}"
    table, sketches = collect(measured(cfg, pipeline, outcome, max(sizes), parts))
    if table.empty:
        raise cli.UserError(f"run={cfg.run}: none of its completions reaches a later block, so nothing can be compared")
    table.to_parquet(place / "rollouts.parquet", index=False)
    results, values = nested.compare(table, baselines, fallback, sizes, cfg.reference, cfg.resamples)
    results.to_csv(place / "fidelity.csv", index=False)
    errors = nested.errors_of(table, values, results)
    errors.to_parquet(place / "errors.parquet", index=False)
    files = [place / name for name in ("rollouts.parquet", "fidelity.csv", "errors.parquet")]
    for (objective, size), part in errors.groupby(["objective", "group_size"], sort=False):
        files += figures.save(nested.draw_errors(part), place / f"figure1_{objective}_{size}")
    if sketches:
        gradients = nested.compare_gradient(table, sketches, values, baselines, fallback, cfg.resamples)
        gradients.to_csv(place / "gradients.csv", index=False)
        files.append(place / "gradients.csv")
    run_id, uri = (folder / RUN_FILE).read_text(), before.logger.tracking_uri
    log_fidelity(MlflowClient(uri), run_id, cfg.split, results, files)
    print("\n".join([*lines(results), *(gradient_lines(gradients) if sketches else []), "", *map(str, files),
                     f"run {run_id} in {uri}"]))  # fmt: skip


def check(cfg: DictConfig) -> None:
    """Raises UserError for values that cannot work."""
    if cfg.run is None:
        raise cli.UserError("name whose policy to measure: run=<MLflow run id or output folder>")
    for key in ("prompts", "resamples", "temperature", "micro_batch_tokens"):
        if cfg[key] <= 0:
            raise cli.UserError(f"{key}={cfg[key]}: must be above 0")
    for key in ("nested", "gradient"):
        if cfg[key] < 0:
            raise cli.UserError(f"{key}={cfg[key]}: must not be negative")
    if cfg.rollouts < 2:
        raise cli.UserError(f"rollouts={cfg.rollouts}: must be 2 or more, or their noise cannot be told")
    if cfg.gradient and cfg.rollouts + cfg.nested < 4:
        raise cli.UserError(
            f"rollouts={cfg.rollouts}: gradient={cfg.gradient} needs 4 or more, two in either half; raise rollouts"
        )
    if cfg.reference not in cfg.baselines:
        raise cli.UserError(f"reference={cfg.reference}: not among baselines={list(cfg.baselines)}")
    sizes = [cfg.group_size] if isinstance(cfg.group_size, int) else list(cfg.group_size)
    if not sizes or min(sizes) < 1 or any(max(sizes) % size for size in sizes):
        raise cli.UserError(f"group_size={sizes}: each must divide the largest, whose groups are cut into smaller ones")


def load_baseline(name: str) -> "Baseline":
    """An option of the group `baseline`. Raises UserError if there is none of that name."""
    known = cli.options("baseline")
    if name not in known:
        raise cli.UserError(f"baselines: no baseline {name}; there are {', '.join(known)}")
    return make(hydra.compose(f"baseline/{name}")["baseline"])


def digest(cfg: DictConfig, folder: Path) -> str:
    """Of all that decides what is sampled, the policy included: parts of another setting are not taken for ours."""
    weights = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted((folder / "policy").iterdir())
    ]
    keys = ("split", "group_size", "rollouts", "nested", "temperature", "max_new_tokens", "seed", "task", "outcome",
            "gradient")  # fmt: skip
    decisive: dict[str, Any] = {key: plain(cfg)[key] for key in keys} | {"weights": weights}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def measured(
    cfg: DictConfig, pipeline: "Pipeline", outcome: Any, group_size: int, parts: Path
) -> "Iterator[tuple[pandas.DataFrame, dict[str, Tensor]]]":
    """The rows of every prompt and sketches of their gradients, a few prompts at a time; what is on disk is not sampled
    again."""
    import pandas
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    from bae.fidelity.measure import measure
    from bae.method.stated_numbers import Candidates

    parts.mkdir(parents=True, exist_ok=True)
    candidates = Candidates(pipeline.scorer.vocabulary, pipeline.scorer.closing)
    prompts = range(min(cfg.prompts, pipeline.task.size(cfg.split)))
    at_a_time = max(1, 64 // group_size)
    with tqdm(total=len(prompts), desc="measuring", unit="prompt") as bar:
        for start in range(0, len(prompts), at_a_time):
            chosen = prompts[start : start + at_a_time]
            rows = parts / f"prompts_{chosen[0]:06d}_{chosen[-1]:06d}.parquet"
            tensors = rows.with_suffix(".safetensors")
            if not rows.is_file():
                problems = [pipeline.task.problem(cfg.split, i) for i in chosen]
                keys = [(cfg.seed, DRAWS, i) for i in chosen]
                part, sketches = measure(pipeline, outcome, candidates, problems, keys, group_size, cfg.rollouts,
                                         cfg.nested, cfg.micro_batch_tokens, cfg.gradient)  # fmt: skip
                if sketches:
                    save_file(sketches, tensors)
                part.to_parquet(rows.with_suffix(".partial"), index=False)
                os.replace(rows.with_suffix(".partial"), rows)  # last, so that what is there is whole
            yield pandas.read_parquet(rows), load_file(tensors) if tensors.is_file() else {}
            bar.update(len(chosen))


def collect(
    parts: "Iterator[tuple[pandas.DataFrame, dict[str, Tensor]]]",
) -> "tuple[pandas.DataFrame, dict[str, Tensor]]":
    """All parts in one."""
    import pandas
    import torch

    tables, sketches = zip(*parts, strict=True)
    return pandas.concat(tables, ignore_index=True), {
        name: torch.cat([part[name] for part in sketches]) for name in sketches[0]
    }


def gradient_lines(gradients: "pandas.DataFrame") -> list[str]:
    """A table for the terminal."""
    shown = ["", f"{'gradient of the block':<56}{'cosine':>24}{'squared error':>24}{'share of the noise':>24}"]
    for row in gradients.to_dict("records"):
        cells = [
            f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]"
            for key in ("cosine", "mse", "noise_share")
        ]
        name = f"  {row['objective']}, G = {row['group_size']}, {row['baseline']}"
        shown.append(f"{name:<56}" + "".join(f"{cell:>24}" for cell in cells))
    return shown


def lines(results: "pandas.DataFrame") -> list[str]:
    """A table for the terminal: what holds for all completions and for each outcome; 95 % intervals in brackets."""
    shown = []
    for (objective, size, name), rows in results.groupby(["objective", "group_size", "set"], sort=False):
        if str(name).startswith("size="):
            continue
        title = f"{objective}, G = {size}, {name}: {rows.completions.iloc[0]} completions"
        shown += ["", f"{title:<58}{'of reference':>13}{'p':>8}{'bias':>8}{'slope':>7}{'corr.':>7}{'fallback':>10}"]
        for row in rows.to_dict("records"):
            rmse = f"RMSE {row['rmse']:.4f} [{row['rmse_low']:.4f}, {row['rmse_high']:.4f}]"
            rest = f"{row['slope']:>7.2f}{row['correlation']:>7.2f}{row['fallback']:>10.3f}"
            ratio = f"{row['rmse_ratio']:>13.2f}{row['p']:>8.3f}{row['bias']:>+8.3f}"
            shown.append(f"  {row['baseline']:<24}{rmse:<32}{ratio}{rest}")
    return shown


if __name__ == "__main__":
    main()
