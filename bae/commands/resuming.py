"""Decide what a command that trains begins with: a new run, or a checkpoint of one that was stopped."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bae.commands import cli
from bae.commands.build import plain, run_folder, run_id_of, saved_config
from bae.commands.schema import WITHOUT_EFFECT

if TYPE_CHECKING:
    from mlflow.entities import Run

AUTO = "auto"
"""The value of `resume` that means the newest unfinished run of this configuration, or a new run."""


@dataclass(frozen=True)
class Beginning:
    """Hold what a run begins with.

    Attributes:
        cfg: its configuration.
        run_id: in MLflow; None for a new run, and for one that MLflow has not made yet.
        checkpoint: None for a new run.
    """

    cfg: DictConfig
    run_id: str | None = None
    checkpoint: Path | None = None


def begin(cfg: DictConfig, check: Callable[[DictConfig], None], held: ExitStack) -> Beginning | None:
    """Find what the command asks for, and lock its folder until `held` is left. None if it was done before.

    Args:
        cfg: of the command.
        check: refuses values that cannot work; raises UserError.
        held: takes the lock.

    Raises:
        UserError: if there is nothing to resume.
        ValueError: if another process works on the run.
    """
    from bae.report.tracking import join_sweep

    if cfg.resume and cfg.resume != AUTO:
        folder = run_folder("resume", cfg.resume, cfg)
        given = HydraConfig.get().overrides.task
        changes = [o for o in given if o.partition("=")[0] not in ("resume", "trust")]
        saved = saved_config("resume", folder, cfg.trust, changes)
        check(saved)
        beginning = resumed(f"resume={cfg.resume}", folder, saved, held)
        check_work_left(beginning, changes)
        return beginning
    check(cfg)
    if cfg.resume and (found := newest_unfinished(cfg, held)):
        return found
    if skips_finished(cfg) and (finished := finished_run(cfg)):
        join_sweep(cfg.logger.tracking_uri, finished.info.run_id)
        print(
            f"done before: run {finished.info.run_id} in {cfg.logger.tracking_uri}; skip_finished=false does it again"
        )
        return None
    make_absolute(cfg)
    lock(Path(cfg.output_folder), held)
    return Beginning(cfg)


def skips_finished(cfg: DictConfig) -> bool:
    """Tell whether a run that was done before is not done again: if the user says so, or in a sweep with a name."""
    from bae.report.tracking import PARENT_RUN

    if cfg.skip_finished is not None:
        return bool(cfg.skip_finished)
    return PARENT_RUN in os.environ and any(o.startswith("name=") for o in HydraConfig.get().overrides.task)


def check_work_left(beginning: Beginning, changes: Sequence[str]) -> None:
    """Refuse to change values of a run that has no step left to do. Raises UserError. changes: overrides."""
    from bae.callbacks.checkpoints import step_of

    assert beginning.checkpoint is not None
    done, wanted = step_of(beginning.checkpoint), beginning.cfg.steps
    lost = [o for o in changes if o.partition("=")[0].partition(".")[0] not in ("steps", *WITHOUT_EFFECT)]
    if done >= wanted and lost:
        raise cli.UserError(
            f"{lost[0]}: this run has done its {wanted} steps, so nothing would change; begin a new run, or give it "
            f"steps above {done}"
        )


def resumed(asked: str, folder: Path, saved: DictConfig, held: ExitStack) -> Beginning:
    """Lock a run's folder and find its newest sound checkpoint; say so if a newer one is damaged.

    Args:
        asked: what the user wrote, for messages.
        folder: of the run.
        saved: its configuration.
        held: takes the lock.

    Raises:
        UserError: if there is no sound checkpoint.
        ValueError: if another process works on the run.
    """
    from bae.callbacks.checkpoints import sound_checkpoints
    from bae.report.tracking import is_rank_zero

    lock(folder, held)
    checkpoint, damaged = sound_checkpoints(folder)
    names = ", ".join(path.name for path in damaged)
    if checkpoint is None and damaged:
        raise cli.UserError(f"{asked}: all checkpoints in {folder} are damaged ({names}); start the run anew")
    if checkpoint is None:
        raise cli.UserError(f"{asked}: {folder} holds no checkpoint yet; start the run anew")
    if damaged and is_rank_zero():
        verb = "is" if len(damaged) == 1 else "are"
        print(f"{names} in {folder} {verb} damaged; the run goes on from {checkpoint.name}", file=sys.stderr)
    return Beginning(saved, run_id_of(folder), checkpoint)


def newest_unfinished(cfg: DictConfig, held: ExitStack) -> Beginning | None:
    """Find the newest unfinished run with these settings that has a sound checkpoint and no process.

    It is locked until `held` is left. Returns None if there is none.
    """
    from bae.report.tracking import search

    wanted = f"tags.settings = '{settings(cfg)}' and attributes.status != 'FINISHED'"
    for run in search(cfg.logger.tracking_uri, [cfg.logger.experiment], wanted):
        folder = Path(run.data.tags.get("output_folder", ""))
        if not folder.is_dir():
            continue
        with ExitStack() as attempt:
            try:
                found = resumed("resume=auto", folder, saved_config("resume", folder, cfg.trust), attempt)
            except (cli.UserError, ValueError) as error:
                print(f"not resumed: {error}", file=sys.stderr)
                continue
            held.enter_context(attempt.pop_all())
            print(f"resume=auto: the run in {folder} goes on", file=sys.stderr)
            return found
    return None


def lock(folder: Path, held: ExitStack) -> None:
    """Hold the lock of a run's folder until `held` is left. Only the first rank locks. Raises ValueError."""
    from bae.files import only_process
    from bae.report.tracking import is_rank_zero

    if is_rank_zero():
        held.enter_context(only_process(folder))


def make_absolute(cfg: DictConfig) -> None:
    """Let a new run name its places by absolute paths, so that it can be resumed from any working directory."""
    from bae.report.tracking import absolute

    cfg.outputs = str(Path(cfg.outputs).absolute())
    cfg.output_folder = str(Path(cfg.output_folder).absolute())
    # By default they refer to `outputs`.
    if not OmegaConf.is_interpolation(cfg.logger, "tracking_uri"):
        cfg.logger.tracking_uri = absolute(cfg.logger.tracking_uri)
    if cfg.logger.get("artifacts") and not OmegaConf.is_interpolation(cfg.logger, "artifacts"):
        cfg.logger.artifacts = str(Path(cfg.logger.artifacts).absolute())


def settings(cfg: DictConfig) -> str:
    """Return a digest of all that decides what a run computes; where it writes is left out."""
    placeless = cfg.copy()
    placeless.outputs = placeless.output_folder = ""  # callbacks refer to them
    decisive = {key: value for key, value in plain(placeless).items() if key not in WITHOUT_EFFECT}
    text = json.dumps(decisive, sort_keys=True)
    for place in (cfg.output_folder, cfg.outputs):  # in a resumed run's configuration no references are left
        text = text.replace(json.dumps(str(Path(place).absolute()))[1:-1], "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_run(cfg: DictConfig) -> "Run | None":
    """Return the newest finished run in MLflow with these settings, or None."""
    from bae.report.tracking import search

    found = search(
        cfg.logger.tracking_uri,
        [cfg.logger.experiment],
        f"tags.settings = '{settings(cfg)}' and attributes.status = 'FINISHED'",
    )
    return found[0] if found else None
