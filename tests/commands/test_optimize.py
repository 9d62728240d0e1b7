"""What the jobs of a sweep return to a sweeper that optimises, and that a job that fails ends no other."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bae.commands import evaluate
from bae.commands.sweep import SweepParent
from tests.commands.test_train import history, outputs, runs, train  # noqa: F401
from tests.support import call

SHORT = [
    "steps=2",
    "callbacks.checkpoints.log_policy=false",
    "callbacks.completions=null",
    "callbacks.completion_page=null",
]


@pytest.fixture
def returned(monkeypatch):
    """What Hydra was given by each job, and hands to its sweeper."""
    found = []
    real = SweepParent.on_job_end

    def on_job_end(self, config, job_return, **more):
        found.append(job_return.return_value)
        real(self, config, job_return, **more)

    monkeypatch.setattr(SweepParent, "on_job_end", on_job_end)
    return found


def test_a_job_returns_the_metric_after_its_last_step(train, returned, capsys):  # noqa: F811
    best = ["callbacks.checkpoints.best=val/brier", "callbacks.held_out.every=1"]
    with pytest.raises(SystemExit, match="1 of the jobs failed"):
        train(*SHORT, *best, "optimize=val/brier", "lr=1e-3,-1", "-m")
    (run,) = runs()[1:]
    values = dict(history(run, "val/brier"))
    assert returned == [values[2], None] and len(values) == 3
    step = min((1, 2), key=values.get)
    words = f"val/brier {values[step]:.3f} after step {step}"
    assert run.data.tags["best"] == words
    folder = Path(run.data.tags["output_folder"])
    assert f"best     {folder / 'policy_best'}: {words}" in capsys.readouterr().out
    assert (folder / "policy_best" / "model.safetensors").is_file()
    call(evaluate, outputs(), f"run={folder}", "policy=best", "prompts=4", "samples=2", "resamples=20")
    assert (folder / "evaluation" / "best_val.parquet").is_file() and "eval/best_val/ece" in runs()[1].data.metrics
    shutil.rmtree(folder / "policy_best")
    for policy, said in (("best", "policy=best: .* kept none"), ("first", "policy=first: choose last or best")):
        with pytest.raises(SystemExit, match=said):
            call(evaluate, outputs(), f"run={folder}", f"policy={policy}")

    train(*SHORT, *best, "optimize=val/brier", "lr=1e-3", "skip_finished=true", "-m")  # done before
    assert returned[2:] == [values[2]] and len(runs()) == 3


def test_optuna_knows_what_is_good_and_a_refused_job_is_a_failed_trial(train, capsys):  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'blockwise-advantage[optuna]'")
    optuna = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
    ]
    with pytest.raises(SystemExit, match="optimize=null: this sweeper needs a value of each job"):
        train(*SHORT, *optuna, "temperature=choice(0.9,1.0)", "-m")
    with pytest.raises(SystemExit, match="of the jobs failed"):
        train(*SHORT, *optuna, "optimize=val/accuracy", "temperature=choice(0.9,-1)", "-m")
    out = capsys.readouterr().out
    assert "3 jobs: " in out or "2 jobs: " in out  # the same values again are the same job
    (file,) = (outputs() / "sweeps").glob("*/optimization_results.yaml")
    found = OmegaConf.load(file)
    values = [dict(history(run, "val/accuracy"))[2] for run in runs() if run.data.params.get("temperature") == "0.9"]
    assert values and found.best_value == max(values) and float(found.best_params.temperature) == 0.9
