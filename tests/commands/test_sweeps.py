"""Sweeps whose jobs are refused, crash or are killed: the others go on, and the end tells what came of each."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bae.callbacks import Telemetry
from bae.commands.jobs import JobLog, State
from bae.signals import Stopped
from tests.commands.test_train import SMALL, runs, train  # noqa: F401
from tests.support import ROOT, empty_store

PLAIN = ["callbacks.held_out.every=0", "callbacks.checkpoints.log_policy=false"]
KILLS = """
import os, sys, time
from pathlib import Path

from bae.callbacks import Telemetry


class Killing(Telemetry):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        if module.trainer.datamodule.seed == 2 and batch.step == 1:
            os._exit(9) if HOW == "exit" else os.kill(os.getpid(), 9)
"""


LIGHT = """
import os
from pathlib import Path

from bae.commands import cli
from bae.errors import UserError


def job(cfg):
    if cfg.steps == 0:
        raise UserError("steps=0: must be above 0")
    if cfg.seed == 2:
        os.kill(os.getpid(), 9)
    return Path(f"prompts_{cfg.prompts_per_step}")


if __name__ == "__main__":
    cli.run(job, "train")
"""


@pytest.fixture
def crash_at(monkeypatch):
    """Let the job with this seed crash at the end of its first step."""
    real = Telemetry.on_train_batch_end

    def plan(seed, action):
        def hook(self, trainer, module, outputs, batch, index):
            real(self, trainer, module, outputs, batch, index)
            if trainer.datamodule.seed == seed:
                action()

        monkeypatch.setattr(Telemetry, "on_train_batch_end", hook)

    return plan


def raises():
    raise RuntimeError("two\nlines")


def rows(out):
    """{job: (state, note)} of the closing table."""
    found = re.findall(r"^(\S*(?: \S+=\S+)*)  (done|failed|skipped|stopped|not begun) +(.*)$", out, re.M)
    return {job: (state, note) for job, state, note in found}


@pytest.mark.fault("sweeps")
def test_no_job_ends_the_others(train, crash_at, capsys):  # noqa: F811
    crash_at(1, raises)
    sweep = ["seed=0,1", "steps=0,1", *PLAIN, "-m"]
    with pytest.raises(SystemExit) as stopped:
        train(*sweep)
    assert re.search(r"3 of the jobs failed; .* skip_finished=true, which skips what is done", str(stopped.value))
    out, error = capsys.readouterr()
    table = rows(out)
    assert table["seed=0 steps=0"] == ("failed", "steps=0: must be above 0")
    assert table["seed=1 steps=1"] == ("failed", "RuntimeError: two lines")
    assert table["seed=0 steps=1"][0] == "done" and Path(table["seed=0 steps=1"][1]).is_dir()
    assert "4 jobs: 1 done, 3 failed" in out
    assert error.count("Traceback") == 1  # for what nobody foresaw
    parent, *jobs = runs()
    assert parent.info.status == "FAILED" and sorted(run.info.status for run in jobs) == ["FAILED", "FINISHED"]
    assert "BAE_PARENT_RUN" not in os.environ and "BAE_SWEPT" not in os.environ

    crash_at(None, raises)
    train("seed=0,1", "steps=1", *PLAIN, "name=again", "-m")  # a sweep with a name skips what is done
    table = rows(capsys.readouterr().out)
    assert table["seed=0"] == ("skipped", "done before") and table["seed=1"][0] == "done"
    assert runs()[-2].info.status == "FINISHED"


@pytest.mark.fault("signals")
def test_a_signal_stops_the_whole_sweep(train, crash_at, capsys):  # noqa: F811
    crash_at(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        train("seed=0,1,2", "steps=2", *PLAIN, "-m")
    assert stopped.value.code == 143
    assert [state for state, _ in rows(capsys.readouterr().out).values()] == ["done", "stopped", "not begun"]
    assert [run.info.status for run in runs()] == ["KILLED", "FINISHED", "KILLED"]


def test_a_job_is_known_by_its_overrides(tmp_path):
    log = JobLog(tmp_path / "sweep")
    assert log.jobs() == []
    for seed in (0, 1):
        log.append([f"seed={seed}", "steps=1"], State.WAITING)
    log.append(["seed=0", "steps=1", "resume=auto", "hydra.run.dir=x"], State.FAILED, "why")
    assert log.jobs() == [(["seed=0", "steps=1"], State.FAILED, "why"), (["seed=1", "steps=1"], State.WAITING, "")]
    assert log.table(["seed"]) == ["seed=0  failed     why", "seed=1  not begun  ", "2 jobs: 1 not begun, 1 failed"]


@pytest.mark.fault("sweeps")
@pytest.mark.slow
def test_submitit_waits_for_each_job(tmp_path, monkeypatch):
    """The command and its jobs are those of bae-train; what a job does is light, or kills its process."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    (tmp_path / "my_jobs.py").write_text(LIGHT)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "mlflow.db").write_bytes(empty_store())
    command = [sys.executable, "my_jobs.py", "seed=2,0", "steps=0,3", "prompts_per_step=${share:16,4}",
               "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20", "-m"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "3 of the jobs failed" in ended.stderr, ended.stderr
    table = rows(ended.stdout)
    assert len(table) == 4 and table["seed=0 steps=3"] == ("done", "prompts_4")  # of `share`, in the job's process
    assert table["seed=0 steps=0"] == table["seed=2 steps=0"] == ("failed", "steps=0: must be above 0")
    assert table["seed=2 steps=3"][0] == "failed"
    assert re.match(r"its process ended without a result \(\w+\); /.* may say why", table["seed=2 steps=3"][1])
    monkeypatch.chdir(tmp_path)
    assert [run.info.status for run in runs()] == ["FAILED"]  # the parent


def test_slurm_that_is_not_there_is_one_sentence(train, monkeypatch):  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        SystemExit, match="there is no Slurm here, because sbatch is not found; hydra/launcher=submitit_l"
    ):
        train("seed=0,1", "hydra/launcher=submitit_slurm", "-m")


@pytest.mark.fault("sweeps")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_killed_process_of_joblib_ends_its_own_job_alone(tmp_path, monkeypatch, how):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    (tmp_path / "my_kill.py").write_text(KILLS.replace("HOW", repr(how)))
    sweep = ["seed=0,1,2", "steps=0,3", *PLAIN, "callbacks.telemetry._target_=my_kill.Killing"]
    command = [sys.executable, "-m", "bae.commands.train", *SMALL, *sweep,
               "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "-m"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    table = rows(ended.stdout)
    assert ended.returncode == 1 and "what is left runs in processes of its own" in ended.stderr
    states = {job: state for job, (state, _) in table.items()}
    jobs = [(seed, steps) for seed in range(3) for steps in (0, 3)]
    assert states == {f"seed={s} steps={n}": "failed" if n == 0 or s == 2 else "done" for s, n in jobs}
    words = "its process ended with exit code 9" if how == "exit" else "its process was killed by SIGKILL"
    assert words in table["seed=2 steps=3"][1]
    monkeypatch.chdir(tmp_path)
    parent, *jobs = runs()
    assert parent.info.status == "FAILED"
    assert {run.data.params["seed"] for run in jobs if run.info.status == "FINISHED"} == {"0", "1"}
    assert not [run for run in jobs if run.info.status == "RUNNING"]
