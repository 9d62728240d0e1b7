"""Runs into which a bad number is injected: what they skip, write down and save, and when they stop."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bae.commands import train, warmstart
from bae.objectives.correctness import correctness
from bae.training.finite import non_finite
from tests.commands.test_train import BAE_TRAIN, SMALL, assert_equal, weights
from tests.support import ROOT, call, faults, runs
from tests.support.faults import problems_of

QUIET = ["callbacks.held_out=null", "callbacks.progress=null", "callbacks.checkpoints.log_policy=false"]
SPOILED = "objectives.rewards.correctness.reward"


def faulty_reward(value, *steps):
    """Options of a run whose rewards are spoiled for the problems of these steps, counted from 0."""
    problems = [problem for step in steps for problem in problems_of(step, 4)]
    return [
        f"{SPOILED}._target_=tests.support.faults.spoiled",
        f"+{SPOILED}.problems=[{','.join(problems)}]",
        f"+{SPOILED}.value={value}",
    ]


def run_of(folder):
    """The client, the run that is in the store of this folder, and its output folder."""
    client, (run,) = runs(folder)
    return client, run, Path(run.data.tags["output_folder"])


def history(folder, name):
    client, run, _ = run_of(folder)
    return [m.value for m in client.get_metric_history(run.info.run_id, name)]


def checkpoint(folder, step):
    return torch.load(folder / "checkpoints" / f"step_{step:06d}.ckpt", weights_only=True)


@pytest.mark.fault("finite")
def test_an_infinite_reward_costs_one_step(tmp_path, capfd):
    """The baseline learns from rewards, and the table and the sketches of that step are made, too."""
    call(train, tmp_path, *SMALL, *QUIET, *faulty_reward("inf", 1), "steps=3", "baseline=ocb_shrunk",
         "callbacks.completions.every=1", "callbacks.interference.every=1")  # fmt: skip
    error = capfd.readouterr().err
    _, run, folder = run_of(tmp_path)
    assert run.info.status == "FINISHED" and history(tmp_path, "train/skipped") == [0, 1, 0]
    (file,) = (folder / "skipped").iterdir()
    problem = problems_of(1, 4)[0]
    line = f"step 2 is skipped: the reward correctness of a completion of problem {problem} is inf; see {file}"
    assert error.count("is skipped") == 1 and line in error
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    assert len(rows) == 16 and {row["problem"] for row in rows} == set(problems_of(1, 4))
    assert any(row["rewards"]["correctness"] == "inf" for row in rows) and all(row["text"] for row in rows)
    saved = [checkpoint(folder, step) for step in (1, 2, 3)]
    assert all(non_finite(state) is None for state in saved)
    assert_equal(saved[0]["state_dict"], saved[1]["state_dict"])
    assert_equal(saved[0]["optimizer_states"], saved[1]["optimizer_states"])
    assert str(saved[0]["lr_schedulers"]) == str(saved[1]["lr_schedulers"])
    whole = weights(folder)
    assert any(not torch.equal(saved[1]["state_dict"][f"model.{name}"], w) for name, w in whole.items())
    for left in (2, 1):  # resumed after the skipped step, and before it
        for step in range(left + 1, 4):
            (folder / "checkpoints" / f"step_{step:06d}.ckpt").unlink()
        call(train, tmp_path, f"resume={folder}", "trust=[tests]")
        assert_equal(weights(folder), whole)
        assert_equal(checkpoint(folder, 3)["callbacks"], saved[2]["callbacks"])


@pytest.mark.fault("finite")
def test_several_skipped_steps_stop_the_run_and_a_mended_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        call(train, tmp_path, *SMALL, *QUIET, *faulty_reward("-inf", 0, 2, 3), "steps=5",
             "callbacks.skipped.patience=2", "callbacks.skipped.completions=3", "callbacks.skipped.keep=2")  # fmt: skip
    _, run, folder = run_of(tmp_path)
    good = folder / "checkpoints" / "step_000003.ckpt"
    message = str(stopped.value)
    assert "\n" not in message and "the last 2 steps were skipped" in message and str(good) in message
    assert run.info.status == "FAILED" and history(tmp_path, "train/skipped") == [1, 0, 1, 1]
    files = sorted((folder / "skipped").iterdir())
    assert [file.name for file in files] == ["step_000003.jsonl", "step_000004.jsonl"]
    assert [len(file.read_text().splitlines()) for file in files] == [3, 3]
    assert non_finite(checkpoint(folder, 3)) is None and not (folder / "policy").exists()
    monkeypatch.setattr(faults, "spoiled", lambda completion, problems, value: correctness(completion))
    call(train, tmp_path, f"resume={folder}", "trust=[tests]")
    assert run_of(tmp_path)[1].info.status == "FINISHED" and non_finite(weights(folder)) is None


@pytest.mark.fault("finite")
def test_nan_as_reward_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        call(train, tmp_path, *SMALL, *QUIET, *faulty_reward("nan", 1), "steps=3")
    _, run, folder = run_of(tmp_path)
    problem = problems_of(1, 4)[0]
    assert re.search(rf"objectives\.rewards\.correctness\.reward gave nan for problem {problem} ", str(stopped.value))
    assert run.info.status == "FAILED" and non_finite(checkpoint(folder, 1)) is None


WARM = ["experiment=warmstart/tiny", "prompts_per_step=8", "training.warmup_steps=1", "steps=3",
        "callbacks.checkpoints.every=1", "callbacks.checkpoints.keep=9", *QUIET]  # fmt: skip


def fault(name, **options):
    return [f"+callbacks.fault._target_=tests.support.faults.{name}",
            *(f"+callbacks.fault.{key}={value}" for key, value in options.items())]  # fmt: skip


@pytest.mark.fault("finite")
def test_a_gradient_that_is_nan_costs_a_warm_start_one_step(tmp_path, capfd):
    call(warmstart, tmp_path, *WARM, *fault("BadGradient", step=1))
    _, run, folder = run_of(tmp_path)
    assert run.info.status == "FINISHED" and history(tmp_path, "train/skipped") == [0, 1, 0]
    assert "step 2 is skipped: the norm of its gradient is nan; see " in capfd.readouterr().err
    rows = [json.loads(row) for row in (folder / "skipped" / "step_000002.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all("<answer>" in row["text"] for row in rows)
    assert_equal(checkpoint(folder, 1)["state_dict"], checkpoint(folder, 2)["state_dict"])
    assert non_finite(weights(folder)) is None


@pytest.mark.fault("finite")
@pytest.mark.parametrize("watched", [True, False])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, watched):
    """Also where a run has no callback that looks after each step."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    options = [] if watched else ["callbacks.skipped=null"]
    with pytest.raises(SystemExit) as stopped:
        call(warmstart, tmp_path, *WARM, *fault("BadWeight", step=1), *options)
    _, run, folder = run_of(tmp_path)
    assert ("weights are not finite after step 2" if watched else "step_000002.ckpt is not saved") in str(stopped.value)
    assert str(folder / "checkpoints" / "step_000001.ckpt") in str(stopped.value)
    assert [path.name for path in (folder / "checkpoints").glob("*.ckpt")] == ["step_000001.ckpt"]
    assert run.info.status == "FAILED" and not (folder / "policy").exists()


def spawn(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "0"}
    two = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2", f"outputs={folder}"]
    command = [BAE_TRAIN, *SMALL, *QUIET, *two, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.fault("finite")
@pytest.mark.slow
def test_two_ranks_skip_what_one_of_them_sees(tmp_path):
    """The bad rewards of step 2, and the bad gradient of step 4, are those of the second rank alone."""
    rewards = faulty_reward("inf", 1)
    rewards[1] = f"+{SPOILED}.problems=[{','.join(problems_of(1, 4)[2:])}]"
    done = spawn(tmp_path, *rewards, *fault("BadGradient", step=3, rank=1), "steps=5")
    assert done.returncode == 0, done.stderr
    _, run, folder = run_of(tmp_path)
    assert run.info.status == "FINISHED" and history(tmp_path, "train/skipped") == [0, 1, 0, 1, 0]
    assert done.stderr.count("is skipped") == 2 and f"of problem {problems_of(1, 4)[2]} is inf" in done.stderr
    assert_equal(checkpoint(folder, 1)["state_dict"], checkpoint(folder, 2)["state_dict"])
    assert_equal(checkpoint(folder, 3)["state_dict"], checkpoint(folder, 4)["state_dict"])
    assert all(non_finite(checkpoint(folder, step)) is None for step in range(1, 6))


@pytest.mark.fault("finite")
@pytest.mark.slow
def test_two_ranks_stop_together(tmp_path):
    rewards = faulty_reward("inf", 1, 2)
    rewards[1] = f"+{SPOILED}.problems=[{','.join(problems_of(1, 4)[2:] + problems_of(2, 4)[2:])}]"
    done = spawn(tmp_path, *rewards, "steps=5", "callbacks.skipped.patience=2")
    _, run, folder = run_of(tmp_path)
    assert done.returncode == 1 and run.info.status == "FAILED"
    assert str(folder / "checkpoints" / "step_000002.ckpt") in done.stderr
