"""`bae-fidelity`: measure how near the advantages of each baseline come to Monte Carlo's (paper, Fig. 1)."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from bae.commands import cli
from bae.commands.build import logger_of, make, plain, trained
from bae.seeds import Namespace, key

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from bae.fidelity.measure import Study
    from bae.method.baselines import Baseline
    from bae.rollout.pipeline import Pipeline


def main() -> None:
    """Run `bae-fidelity`."""
    cli.run(fidelity, "fidelity")


def fidelity(cfg: DictConfig) -> None:
    """Sample, compare, write, log and print what the configuration names."""
    with cli.user_errors():
        check(cfg)
        folder, before, pipeline = trained(cfg)
        pipeline.task.size(cfg.split)
        baselines = {name: make(baseline_config(name)) for name in cfg.baselines}
        logger = logger_of(before, folder)
        fallback, study = make(cfg.fallback_baseline), make_study(cfg, pipeline, baselines)
    place = folder / "fidelity" / cfg.split
    table, sketches = collect(measured(cfg, study, place / f"parts_{digest(cfg, folder, study.refining)}"))
    if table.empty:
        raise cli.UserError(f"run={cfg.run}: none of its completions reaches a later block, so nothing can be compared")
    results, gradients, files = compare(cfg, table, sketches, baselines, fallback, place)
    logger.log_fidelity(cfg.split, results, files)
    logger.close()
    shown = [*lines(results), *([] if gradients is None else gradient_lines(gradients)), "", *map(str, files)]
    print("\n".join([*shown, f"run {logger.place}"]))


def check(cfg: DictConfig) -> None:
    """Refuse values that cannot work. Raises UserError."""
    if cfg.run is None:
        raise cli.UserError("name whose policy to measure: run=<MLflow run id or output folder>")
    for name in ("prompts", "resamples", "temperature", "micro_batch_tokens"):
        if cfg[name] <= 0:
            raise cli.UserError(f"{name}={cfg[name]}: must be above 0")
    for name in ("nested", "gradient"):
        if cfg[name] < 0:
            raise cli.UserError(f"{name}={cfg[name]}: must not be negative")
    if cfg.rollouts < 2:
        raise cli.UserError(f"rollouts={cfg.rollouts}: must be 2 or more, or their noise cannot be told")
    if cfg.gradient and cfg.rollouts + cfg.nested < 4:
        raise cli.UserError(
            f"rollouts={cfg.rollouts}: gradient={cfg.gradient} needs 4 or more, two in either half; raise rollouts"
        )
    if cfg.reference not in cfg.baselines:
        raise cli.UserError(f"reference={cfg.reference}: not among baselines={list(cfg.baselines)}")
    sizes = group_sizes(cfg)
    if not sizes or min(sizes) < 1 or any(max(sizes) % size for size in sizes):
        raise cli.UserError(f"group_size={sizes}: each must divide the largest, whose groups are cut into smaller ones")


def group_sizes(cfg: DictConfig) -> list[int]:
    """Return the sizes of groups that are asked for, in order."""
    return sorted({cfg.group_size} if isinstance(cfg.group_size, int) else set(cfg.group_size))


def baseline_config(name: str) -> DictConfig:
    """Return an option of the group `baseline`. Raises UserError if there is none of that name."""
    known = cli.options("baseline")
    if name not in known:
        raise cli.UserError(f"baselines: no baseline {name}; there are {', '.join(known)}")
    node: DictConfig = hydra.compose(f"baseline/{name}")["baseline"]
    return node


def make_study(cfg: DictConfig, pipeline: "Pipeline", baselines: "dict[str, Baseline]") -> "Study":
    """Describe what is sampled. Raises ValueError if it cannot be, or if it is too little for a baseline."""
    from bae.fidelity.measure import Study, check_conditioned, check_nested
    from bae.objectives.refining import RefiningBaseline

    check_nested(baselines, cfg.nested)
    check_conditioned(pipeline.scorer.objectives)
    return Study(
        pipeline=pipeline,
        outcome=make(cfg.outcome),
        group_size=max(group_sizes(cfg)),
        rollouts=cfg.rollouts,
        nested=cfg.nested,
        micro_batch_tokens=cfg.micro_batch_tokens,
        sketch=cfg.gradient,
        refining={name: baseline for name, baseline in baselines.items() if isinstance(baseline, RefiningBaseline)},
    )


def digest(cfg: DictConfig, folder: Path, refining: Iterable[str] = ()) -> str:
    """Return a digest of all that decides what is sampled, so that parts of other settings are not taken for ours.

    Args:
        cfg: the configuration.
        folder: of the run, for its policy.
        refining: names of the baselines whose gradients are sketched, if gradients are.
    """
    weights = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted((folder / "policy").iterdir())
    ]
    names = ("split", "group_size", "rollouts", "nested", "temperature", "max_new_tokens", "seed", "task", "outcome")
    decisive: dict[str, Any] = {name: plain(cfg)[name] for name in (*names, "gradient")} | {"weights": weights}
    if cfg.gradient:
        decisive["refining"] = {name: plain(baseline_config(name)) for name in refining}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def measured(cfg: DictConfig, study: "Study", parts: Path) -> "Iterator[tuple[pandas.DataFrame, dict[str, Tensor]]]":
    """Yield the rows of every prompt and sketches of their gradients, a few prompts at a time.

    What is in the folder `parts` is not sampled again.
    """
    import pandas
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    parts.mkdir(parents=True, exist_ok=True)
    task = study.pipeline.task
    prompts = range(min(cfg.prompts, task.size(cfg.split)))
    at_a_time = max(1, 64 // study.group_size)
    with tqdm(total=len(prompts), desc="measuring", unit="prompt") as bar:
        for start in range(0, len(prompts), at_a_time):
            chosen = prompts[start : start + at_a_time]
            rows = parts / f"prompts_{chosen[0]:06d}_{chosen[-1]:06d}.parquet"
            tensors = rows.with_suffix(".safetensors")
            if not rows.is_file():
                problems = [task.problem(cfg.split, i) for i in chosen]
                part, sketches = study.measure(problems, [key(cfg.seed, Namespace.FIDELITY, i) for i in chosen])
                if sketches:
                    save_file(sketches, tensors)
                part.to_parquet(rows.with_suffix(".partial"), index=False)
                os.replace(rows.with_suffix(".partial"), rows)  # last, so that what is there is whole
            yield pandas.read_parquet(rows), load_file(tensors) if tensors.is_file() else {}
            bar.update(len(chosen))


def collect(
    parts: "Iterator[tuple[pandas.DataFrame, dict[str, Tensor]]]",
) -> "tuple[pandas.DataFrame, dict[str, Tensor]]":
    """Join all parts."""
    import pandas
    import torch

    tables, sketches = zip(*parts, strict=True)
    return pandas.concat(tables, ignore_index=True), {
        name: torch.cat([part[name] for part in sketches]) for name in sketches[0]
    }


def compare(
    cfg: DictConfig,
    table: "pandas.DataFrame",
    sketches: "dict[str, Tensor]",
    baselines: "dict[str, Baseline]",
    fallback: "Baseline",
    place: Path,
) -> "tuple[pandas.DataFrame, pandas.DataFrame | None, list[Path]]":
    """Compare all baselines, and write what was found to the folder `place`.

    Args:
        cfg: the configuration.
        table, sketches: of all prompts.
        baselines: by name.
        fallback: the baseline where one has none.
        place: an existing folder.

    Returns:
        The results of advantages, of gradients (None without sketches), and the files.
    """
    from bae.evaluation import figures
    from bae.fidelity.compare import compare_advantages, compare_gradients, draw_errors, errors_of

    results, values = compare_advantages(table, baselines, fallback, group_sizes(cfg), cfg.reference, cfg.resamples)
    errors = errors_of(table, values, results)
    table.to_parquet(place / "rollouts.parquet", index=False)
    results.to_csv(place / "fidelity.csv", index=False)
    errors.to_parquet(place / "errors.parquet", index=False)
    files = [place / name for name in ("rollouts.parquet", "fidelity.csv", "errors.parquet")]
    for (objective, size), part in errors.groupby(["objective", "group_size"], sort=False):
        files += figures.save(draw_errors(part), place / f"figure1_{objective}_{size}")
    if not sketches:
        return results, None, files
    gradients = compare_gradients(table, sketches, values, baselines, fallback, cfg.resamples)
    gradients.to_csv(place / "gradients.csv", index=False)
    return results, gradients, [*files, place / "gradients.csv"]


def gradient_lines(gradients: "pandas.DataFrame") -> list[str]:
    """Return a table for the terminal."""
    shown = ["", f"{'gradient of the block':<56}{'cosine':>24}{'squared error':>24}{'share of the noise':>24}"]
    for row in gradients.to_dict("records"):
        cells = [
            f"{row[column]:.3f} [{row[f'{column}_low']:.3f}, {row[f'{column}_high']:.3f}]"
            for column in ("cosine", "mse", "noise_share")
        ]
        name = f"  {row['objective']}, G = {row['group_size']}, {row['baseline']}"
        shown.append(f"{name:<56}" + "".join(f"{cell:>24}" for cell in cells))
    return shown


def lines(results: "pandas.DataFrame") -> list[str]:
    """Return a table for the terminal: all completions, and those of each outcome; 95 % intervals are in brackets."""
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
