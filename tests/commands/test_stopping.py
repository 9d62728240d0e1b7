"""Runs that are stopped by signals, find damaged checkpoints, meet a full disk, or are resumed twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from bae.callbacks import Telemetry
from bae.commands import train as command
from tests.commands.test_train import SMALL, history, outputs, resume_without_small, runs, train, weights  # noqa: F401
from tests.support import ROOT

PLAIN = ["callbacks.held_out.every=0", "callbacks.checkpoints.log_policy=false"]


@pytest.fixture
def at_step(monkeypatch):
    """Do something once, at the end of a step, before the callbacks that stand later."""
    real = Telemetry.on_train_batch_end

    def plan(step, action):
        def hook(self, trainer, module, outputs, batch, index):
            real(self, trainer, module, outputs, batch, index)
            if batch.step + 1 == step:
                monkeypatch.setattr(Telemetry, "on_train_batch_end", real)
                action()

        monkeypatch.setattr(Telemetry, "on_train_batch_end", hook)

    return plan


def kill(signum):
    return lambda: os.kill(os.getpid(), signum)


def checkpoints(folder):
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


@pytest.mark.fault("signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_saves_the_step_and_the_run_goes_on(train, at_step, capsys, signum, code):  # noqa: F811
    at_step(2, kill(signum))
    with pytest.raises(SystemExit) as stopped:
        train("steps=3", *PLAIN, "callbacks.checkpoints.every=50")
    (run,) = runs()
    folder = run.data.tags["output_folder"]
    assert stopped.value.code == code and run.info.status == "KILLED"
    assert checkpoints(folder) == ["step_000002.ckpt", "step_000002.ckpt.sha256"]
    error = capsys.readouterr().err
    name = signal.Signals(signum).name
    assert f"stopped by {name}; step 2 is saved; go on with: bae-train resume={folder}\n" in error
    resume_without_small(folder)
    assert runs()[0].info.status == "FINISHED" and (Path(folder) / "policy" / "SHA256SUMS").is_file()
    assert [step for step, _ in history(run, "train/accuracy")] == [1, 2, 3]


@pytest.mark.fault("damage")
def test_a_damaged_checkpoint_is_passed_over(train, capsys, tmp_path):  # noqa: F811
    train("steps=3", *PLAIN)
    (run,) = runs()
    folder = Path(run.data.tags["output_folder"])
    final, places = weights(folder), folder / "checkpoints"
    flipped = bytearray((places / "step_000003.ckpt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (places / "step_000003.ckpt").write_bytes(flipped)
    os.truncate(places / "step_000002.ckpt", 1000)
    (places / "step_000002.ckpt.sha256").unlink()  # as an earlier version wrote it
    (places / "step_000009.ckpt.partial").touch()  # of a process that was killed
    shutil.rmtree(folder / "policy")
    resume_without_small(folder)
    error = capsys.readouterr().err
    assert f"step_000003.ckpt, step_000002.ckpt in {folder} are damaged; the run goes on from step_000001.ckpt" in error
    assert all(torch.equal(value, final[name]) for name, value in weights(folder).items())
    assert not list(places.glob("*.partial"))
    for path in places.glob("*.ckpt"):
        os.truncate(path, 1000)
    with pytest.raises(SystemExit) as stopped:
        resume_without_small(folder)
    assert re.search(r"all checkpoints in .* are damaged .*; start the run anew", str(stopped.value))

    model = folder / "policy" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\1")
    with pytest.raises(SystemExit) as stopped:
        train("steps=1", f"model.path={folder / 'policy'}")
    assert "model.safetensors: not the file that was written" in str(stopped.value)


@pytest.mark.fault("lock")
def test_a_run_that_another_process_has_is_refused(train):  # noqa: F811
    from tests.test_files import HOLD

    train("steps=1", *PLAIN)
    folder = runs()[0].data.tags["output_folder"]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit) as stopped:
            resume_without_small(folder, "steps=2")
        assert f"process {holder.pid} on {os.uname().nodename} works on this run" in str(stopped.value)
        assert runs()[0].info.status == "FINISHED"  # it was not touched
    finally:
        holder.kill()
        holder.wait()
    resume_without_small(folder, "steps=2")
    assert (Path(folder) / "checkpoints" / "step_000002.ckpt").is_file()


def test_resume_auto_finds_the_unfinished_run(train, at_step):  # noqa: F811
    again = ["steps=3", *PLAIN, "resume=auto"]
    at_step(2, kill(signal.SIGUSR1))
    with pytest.raises(SystemExit):
        train(*again)  # there is none, so it starts one
    train(*again, "seed=1", "steps=1")  # of another configuration
    stopped, other = runs()
    assert (stopped.info.status, other.info.status) == ("KILLED", "FINISHED")
    train(*again, "name=other_name")  # where it writes does not matter
    assert len(runs()) == 2 and runs()[0].info.status == "FINISHED"
    assert [step for step, _ in history(stopped, "train/accuracy")] == [1, 2, 3]
    train(*again, "skip_finished=true")  # a job that is started once more
    assert len(runs()) == 2


def test_a_run_is_resumed_from_another_working_directory(train, monkeypatch, tmp_path):  # noqa: F811
    from tests.support import call

    monkeypatch.chdir(tmp_path)
    call(command, "outputs", *SMALL, "steps=1", *PLAIN)  # relative
    (run,) = runs()
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    before = sys.argv
    try:
        sys.argv = ["bae-train", f"resume={run.data.tags['output_folder']}", "steps=2"]
        command.main()
    finally:
        sys.argv = before
    monkeypatch.chdir(tmp_path)
    assert len(runs()) == 1 and [step for step, _ in history(run, "train/accuracy")] == [1, 2]


@pytest.mark.fault("files")
def test_a_full_disk_fails_the_run_and_leaves_the_last_checkpoint(train, monkeypatch):  # noqa: F811
    from bae.callbacks.checkpoints import AtomicCheckpointIO
    from tests.test_files import no_file_above

    real = AtomicCheckpointIO.save_checkpoint

    def save(self, checkpoint, path, storage_options=None):
        with no_file_above(10**9 if "000001" in str(path) else 10_000):  # the store has a disk of its own
            real(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    with pytest.raises(SystemExit) as stopped:
        train("steps=3", *PLAIN)
    (run,) = runs()
    folder = run.data.tags["output_folder"]
    sentence = str(stopped.value)
    assert "there is no room for" in sentence and f"step 1 is saved; go on with: bae-train resume={folder}" in sentence
    assert run.info.status == "FAILED"
    assert checkpoints(folder) == ["step_000001.ckpt", "step_000001.ckpt.sha256"]
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", real)
    resume_without_small(folder)
    assert [step for step, _ in history(run, "train/accuracy")] == [1, 2, 3]


HANGING = """
import time
def reward(completion):
    print("reward hangs", flush=True)
    time.sleep(3600)
"""


def start(*arguments, cwd, **environment):
    """Start bae-train with a policy that is small, and return the process and the file of what it writes."""
    log = Path(cwd) / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{cwd}", **environment}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bae.commands.train", *SMALL, *PLAIN, *arguments],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, log


def until(condition, process, log):
    for _ in range(5000):
        if condition():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.fault("signals")
@pytest.mark.slow
def test_a_hanging_reward_does_not_keep_a_signalled_run(tmp_path):
    (tmp_path / "hanging.py").write_text(HANGING)
    reward = ["objectives.rewards.correctness.reward._target_=hanging.reward"]
    process, log = start("steps=3", *reward, cwd=tmp_path)
    until(lambda: "reward hangs" in log.read_text(), process, log)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None  # the step may still end
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert "no step is saved, so start it anew" in log.read_text()


@pytest.mark.fault("signals")
@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_signal_to_one_rank_stops_both(tmp_path, monkeypatch, which):
    two = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2", "callbacks.checkpoints.every=1"]
    process, log = start("steps=100000", *two, "resume=auto", cwd=tmp_path)
    try:
        until(lambda: list(tmp_path.glob("outputs/runs/*/checkpoints/*.ckpt")), process, log)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [pid for pid in children if b"train_ddp_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        (second,) = map(int, ranks)
        os.kill(process.pid if which == "first" else second, signal.SIGTERM)
        assert process.wait(300) == 143, log.read_text()
    finally:
        process.kill()
    monkeypatch.chdir(tmp_path)
    (run,) = runs()
    step = int(re.search(r"stopped by SIGTERM; step (\d+) is saved", log.read_text())[1])
    assert run.info.status == "KILLED"
    assert [s for s, _ in history(run, "train/accuracy")] == list(range(1, step + 1))
    assert log.read_text().count("stopped by") == 1  # one sentence, of the first rank
    for _ in range(600):
        if not Path(f"/proc/{second}").exists():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the second rank goes on")


@pytest.mark.fault("signals")
@pytest.mark.slow
def test_slurm_is_asked_to_run_the_job_again(tmp_path, monkeypatch):
    """As under srun, with a scontrol that writes down what it is asked."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    own = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "77", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in own.items()}
    slurm |= {"SLURM_NODELIST": "localhost", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process, log = start("steps=100000", cwd=tmp_path, **slurm)
    until(lambda: list(tmp_path.glob("outputs/runs/*/checkpoints/*.ckpt")), process, log)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(300) == 75, log.read_text()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert not list(tmp_path.glob("hpc_ckpt*"))


@pytest.mark.fault("signals")
def test_an_evaluation_of_a_file_that_is_stopped_is_marked(train, monkeypatch, tmp_path):  # noqa: F811
    from bae.commands import evaluate
    from bae.evaluation import measure
    from tests.support import call

    monkeypatch.setattr(measure, "measure", lambda *arguments: kill(signal.SIGTERM)())
    lines = [{"problem": "1+1", "answer": "2", "completion": "<answer>2</answer>"}] * 2
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit) as stopped:
        call(evaluate, outputs(), f"completions={tmp_path / 'answers.jsonl'}")
    assert stopped.value.code == 143
    client = MlflowClient(f"sqlite:///{outputs() / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "KILLED"
