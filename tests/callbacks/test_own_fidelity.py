"""Check the callback that measures the run's own baseline: by hand, and in runs of the tiny policy."""

import math
from pathlib import Path

import pytest
import torch

from bae.callbacks.own_fidelity import _Prefixes, agreement
from bae.commands import train
from tests.support import call, runs

SMALL = [
    "steps=4", "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=4", "callbacks.checkpoints.every=2",
    "training.warmup_steps=2", "lr=1e-3", "callbacks.throughput.seconds=0.01", "callbacks.checkpoints.keep=9",
]  # fmt: skip
EVERY = ["callbacks.own_fidelity.every=2", "callbacks.own_fidelity.rollouts=4"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("own") / "outputs"


@pytest.fixture(scope="module")
def run(outputs):
    """Train, and return the folder of the run and {fidelity metric: {step: value}}."""

    def trained(*arguments):
        call(train, outputs, *SMALL, *arguments)
        return newest(outputs)

    return trained


def newest(outputs):
    client, every = runs(outputs)
    last = every[-1]
    names = [name for name in last.data.metrics if name.startswith("fidelity/")]
    found = {n: {m.step: m.value for m in client.get_metric_history(last.info.run_id, n)} for n in names}
    return Path(last.data.tags["output_folder"]), found


@pytest.fixture(scope="module")
def watched(run):
    return run(*EVERY)


def test_the_error_without_the_noise_of_monte_carlo():
    """V̂ is 0.5 and 0.25; its noise s²/M is 1/4 in the first row and 1/16 in the second."""
    mine = _Prefixes(
        reward=torch.tensor([0.0, 1.0]),
        baseline=torch.tensor([1.5, -0.75]),
        outcome=torch.tensor([0.0, 1.0]),
        prompt=torch.tensor([0, 1]),
        rollouts=torch.tensor([[0.0, 1.0], [0.0, 0.5]]),
    )
    found = agreement([mine])
    assert found["rmse_incorrect"] == pytest.approx(math.sqrt(1 - 1 / 4))
    assert found["rmse_correct"] == pytest.approx(math.sqrt(1 - 1 / 16))
    assert found["rmse"] == pytest.approx(math.sqrt(((1 - 1 / 4) + (1 - 1 / 16)) / 2))
    assert found["bias"] == pytest.approx((1.0 - 1.0) / 2)
    halves = [_Prefixes(*(getattr(mine, f)[i : i + 1] for f in mine.__dataclass_fields__)) for i in (0, 1)]
    assert agreement(halves) == found  # as two ranks have them
    assert agreement([_Prefixes(*(getattr(mine, f)[:0] for f in mine.__dataclass_fields__))]) == {}


def test_the_training_is_bit_for_bit_the_same(run, watched):
    folder, found = watched
    plain, nothing = run("callbacks.own_fidelity=null")
    assert nothing == {} and list(found["fidelity/own/rmse"]) == [2, 4]
    for step in (2, 4):
        ours, theirs = (checkpoint(where, step) for where in (folder, plain))
        assert_equal(ours["state_dict"], theirs["state_dict"])
        assert_equal(ours["optimizer_states"], theirs["optimizer_states"])


def test_a_resumed_run_measures_the_same(run, watched, outputs):
    folder, found = watched
    (folder / "checkpoints" / "step_000004.ckpt").unlink()
    import shutil

    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "tracking")
    (copy / "run_id").unlink()
    from bae.report.run_log import RunLog

    RunLog(copy).append("run", id="copy", name="copy", experiment="copy", artifacts=None, tags={})
    call(train, outputs, f"resume={copy}")
    again = RunLog(copy).history("fidelity/")
    assert again["fidelity/own/rmse"] == {4: found["fidelity/own/rmse"][4]}


@pytest.mark.parametrize("baseline", ["none", "batch_mean", "ocb_shrunk", "rao_blackwell", "all_action", "monte_carlo"])
def test_every_baseline_has_an_error(run, baseline):
    _, found = run(f"baseline={baseline}", *EVERY, "steps=2")
    assert list(found["fidelity/own/rmse"]) == [2] and math.isfinite(found["fidelity/own/rmse"][2])
    if baseline == "none":  # b = 0, and the Brier reward is never positive
        assert found["fidelity/own/bias"][2] > 0


@pytest.mark.parametrize("method", ["dcpo", "stratified_grpo"])
def test_rival_methods_have_an_error_too(run, method):
    folder, found = run(f"method={method}", *EVERY, "steps=2")
    assert list(found["fidelity/own/rmse"]) == [2] and math.isfinite(found["fidelity/own/rmse"][2])
    assert (folder / "policy").is_dir()


def test_without_a_later_block_it_is_left_out_with_a_sentence(run, capsys):
    _, found = run("method=rlcr", *EVERY, "steps=2")
    assert found == {}
    assert "fidelity/own/rmse is left out: no objective conditions on an outcome" in capsys.readouterr().err


def test_an_engine_that_refuses_a_prefix_does_not_end_the_run(run, capsys, monkeypatch):
    from bae.callbacks import own_fidelity

    def refuse(*arguments):
        raise ValueError("a prompt of 99 tokens is too long")

    monkeypatch.setattr(own_fidelity, "resample", refuse)
    folder, found = run(*EVERY)
    assert found == {} and (folder / "policy").is_dir()
    sentence = (
        "fidelity/own/rmse is left out: the engine does not go on from a prefix: a prompt of 99 tokens is too long"
    )
    assert capsys.readouterr().err.count(sentence) == 1


@pytest.mark.parametrize(
    ("option", "message"), [("every=0", "every=0: must be 1"), ("rollouts=1", "must be 2 or more")]
)
def test_settings_that_cannot_work(run, option, message):
    with pytest.raises(SystemExit, match=message):
        run(f"callbacks.own_fidelity.{option}")


def checkpoint(folder, step):
    return torch.load(folder / "checkpoints" / f"step_{step:06d}.ckpt", weights_only=True)


def assert_equal(one, other):
    """Compare nested values bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other
