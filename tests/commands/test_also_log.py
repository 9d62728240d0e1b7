"""also_log: TensorBoard and Weights & Biases beside MLflow."""

from importlib.util import find_spec

import pytest

from bae.commands import train
from bae.report.run_log import RunLog
from tests.support import call

SMALL = ["prompts_per_step=2", "group_size=2", "callbacks.held_out.prompts=4", "callbacks.interference=null"]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed; make loggers")
def test_tensorboard_has_what_mlflow_has_also_after_a_resume(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    call(train, tmp_path / "outputs", "also_log=tensorboard", "steps=1", *SMALL, f"hydra.run.dir={folder}")
    call(train, tmp_path / "outputs", f"resume={folder}", "steps=2")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    log = RunLog(folder)
    for metric in ("train/grad_norm", "val/accuracy", "val/ece"):
        shown = {event.step: event.value for event in events.Scalars(metric)}
        assert shown == pytest.approx(log.history(metric)[metric], nan_ok=True) and len(shown) >= 2, metric


def test_a_logger_whose_package_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"also_log=wandb: its package is not installed; pip install 'blockwise-adv"):
        call(train, tmp_path / "outputs", "also_log=wandb", *SMALL)
    assert not list(tmp_path.rglob("log.jsonl"))
