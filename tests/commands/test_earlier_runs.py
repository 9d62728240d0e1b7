"""A run that an earlier layout of this package made is refused in one sentence, wherever it is named."""

import pytest
from omegaconf import OmegaConf

from bae.commands import evaluate, fidelity, train
from bae.commands.build import CONFIG_FILE, RUN_FILE
from tests.support import call


@pytest.fixture
def earlier(tmp_path):
    """The output folder of such a run, made by hand."""
    folder = tmp_path / "outputs" / "runs" / "earlier"
    for part in ("checkpoints", "policy"):
        (folder / part).mkdir(parents=True)
    (folder / "checkpoints" / "step_000001.ckpt").touch()
    (folder / RUN_FILE).write_text("0123456789abcdef0123456789abcdef")
    uri = f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"
    baseline = {"_target_": "bae.baselines.outcome_conditioned", "_partial_": True}
    OmegaConf.save({"steps": 3, "baseline": baseline, "logger": {"tracking_uri": uri}}, folder / CONFIG_FILE)
    return folder


@pytest.mark.parametrize(("module", "key"), [(train, "resume"), (evaluate, "run"), (fidelity, "run")])
def test_it_is_refused_in_one_sentence(earlier, tmp_path, module, key):
    with pytest.raises(SystemExit) as stopped:
        call(module, tmp_path / "outputs", f"{key}={earlier}")
    sentence = str(stopped.value)
    assert "\n" not in sentence and str(earlier) in sentence
    assert "its baseline is bae.baselines.outcome_conditioned, which this version lacks" in sentence
    assert "made by an earlier version" in sentence and "make the run anew" in sentence


def test_parts_of_others_are_not_judged(earlier, tmp_path):
    """A part of the user's own that cannot be imported is no reason to name another version."""
    saved = OmegaConf.load(earlier / CONFIG_FILE)
    saved.baseline._target_ = "my_study.baselines.median_of_others"
    OmegaConf.save(saved, earlier / CONFIG_FILE)
    with pytest.raises(SystemExit) as stopped:
        call(train, tmp_path / "outputs", f"resume={earlier}")
    assert "version" not in str(stopped.value) and "\n" not in str(stopped.value)
