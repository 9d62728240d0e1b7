"""Runs on two ranks, and in shards: they do what one process does, and go on where they were stopped."""

import shutil
from pathlib import Path

import pytest
import torch

from bae.training.policy import load_pretrained
from tests.commands.test_train import history, runs, spawn, train, weights  # noqa: F401

TWO = ["strategy.accelerator=cpu", "strategy.devices=2"]
SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.fused=false", "lr=0.3"]
EVERYTHING = [
    "steps=3", "temperature=0.3", "group_size=2", "baseline=batch_mean", "training.optimizer_steps=2",
    "callbacks.dynamic_sampling.rounds=2", "callbacks.entropy.target=9", "callbacks.entropy.step_size=0.01",
    "callbacks.interference.every=1", "callbacks.own_fidelity.every=1", "callbacks.own_fidelity.rollouts=2",
    "callbacks.checkpoints.every=9", "callbacks.evaluation.splits=[val]", "callbacks.evaluation.prompts=5",
    "callbacks.evaluation.samples=2",
]  # fmt: skip
OF_THE_MACHINE = ("time/", "perf/")
BOOTSTRAP = "/sem"  # resamples rows, whose order is that of ranks
ROUNDING = "train/mismatch_max"  # the largest difference between two computations of the same numbers


def done(folder, *arguments):
    job = spawn(*arguments, cwd=folder)
    error = job.communicate()[1]
    assert job.returncode == 0, error


@pytest.mark.slow
def test_two_ranks_log_what_one_process_logs(tmp_path, monkeypatch):
    for name in ("one", "ddp", "fsdp"):
        done(
            tmp_path,
            *EVERYTHING,
            *SGD,
            f"logger.run_name={name}",
            *([f"strategy={name}", *TWO] if name != "one" else []),
        )
    monkeypatch.chdir(tmp_path)
    one, *others = runs()
    assert [run.info.run_name for run in others] == ["ddp", "fsdp"]
    alike = {key for key in one.data.metrics if not key.startswith(OF_THE_MACHINE) and BOOTSTRAP not in key}
    assert {"train/gradient_share/solution", "fidelity/own/rmse", "eval/val/brier", "val/ece"} <= alike
    assert max(value for _, value in history(one, "train/groups_replaced")) > 0
    for run in others:
        assert alike <= run.data.metrics.keys()
        for key in alike:
            found, wanted = (dict(history(each, key)) for each in (run, one))
            limit = 1e-4 if key == ROUNDING else 5e-6
            assert found == pytest.approx(wanted, abs=limit, rel=5e-5, nan_ok=True), (run.info.run_name, key)
        first, second = (weights(each.data.tags["output_folder"]) for each in (one, run))
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def stopped_after_one(folder, copy):
    """A copy of a run of two steps as it was after the first."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step_000002.ckpt")
    shutil.rmtree(copy / "policy")


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit(train, tmp_path):  # noqa: F811
    """On one rank, in this process: through Lightning, as two ranks do it."""
    train("steps=2", "strategy=fsdp", "strategy.accelerator=cpu", "strategy.devices=1")
    (run,) = runs()
    folder = Path(run.data.tags["output_folder"])
    wanted = weights(folder)
    stopped_after_one(folder, tmp_path / "copy")
    train(f"resume={tmp_path / 'copy'}")
    torch.testing.assert_close(weights(tmp_path / "copy"), wanted, atol=0, rtol=0)
    load_pretrained(str(folder / "policy"), prompt_template="{question}")  # the checksums hold
    damaged = next((folder / "checkpoints" / "step_000002.ckpt").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.rmtree(folder / "policy")
    train(f"resume={folder}")  # from step 1
    torch.testing.assert_close(weights(folder), wanted, atol=0, rtol=0)


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit_and_one_rank_nearly(tmp_path, monkeypatch):
    done(tmp_path, "steps=2", "strategy=fsdp", *TWO, "output_folder=whole")
    monkeypatch.chdir(tmp_path)
    wanted = weights(tmp_path / "whole")
    for name, ranks in (("again", 2), ("alone", 1)):
        stopped_after_one(tmp_path / "whole", tmp_path / name)
        done(tmp_path, f"resume={tmp_path / name}", f"strategy.devices={ranks}")
    torch.testing.assert_close(weights(tmp_path / "again"), wanted, atol=0, rtol=0)
    torch.testing.assert_close(weights(tmp_path / "alone"), wanted, atol=5e-5, rtol=1e-4)
    assert not list(tmp_path.glob("*/checkpoints/*.partial"))
