"""Wrong inputs, as users give them: each is one sentence with what, where and the mend, before any run is begun."""

import re
import warnings
from pathlib import Path

import pytest

from bae.commands import cli
from bae.commands import train as command
from bae.errors import UserError
from tests.commands.test_train import outputs, runs, train  # noqa: F401
from tests.support import call

FSDP = ["strategy=fsdp", "strategy.accelerator=cpu"]
QUESTION = '{"question": "QUESTION", "answer": "3"}\n'


def refused(run, *arguments):
    """The sentence with which a command refuses these arguments, and that it began no run."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    sentence = str(stopped.value)
    assert "\n" not in sentence and sentence.startswith("bae-")
    assert not (outputs() / "mlflow.db").exists() or not runs()
    return sentence


def no_work(*arguments):
    raise UserError("before any work")


@pytest.fixture(autouse=True)
def sentences(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["callbacks.held_out.prompts=0"], "callbacks.held_out.prompts=0: must be 1 or more"),
        (["callbacks.held_out.prompts=-1"], "callbacks.held_out.prompts=-1: must be 1 or more"),
        (["callbacks.held_out.samples=0"], "callbacks.held_out.samples=0: must be 1 or more"),
        (["callbacks.held_out.every=-1"], "callbacks.held_out.every=-1: must not be negative"),
        (["callbacks.evaluation.samples=0"], "callbacks.evaluation.samples=0: must be 1 or more"),
        (["callbacks.rollouts=null"], "callbacks.rollouts=null: a step needs it, because it writes completions"),
        (["callbacks.advantages=null"], "callbacks.advantages=null: a step needs it, because it writes advantages"),
        (["optimizer.betas=[2,0.9]"], "optimizer: Invalid beta parameter at index 0: 2"),
        (["optimizer.betas=[0.9]"], r"optimizer.betas=\[0.9\]: must be two numbers"),
        (["optimizer.weight_decay=nan"], "optimizer: Invalid weight_decay value: nan"),
        (["strategy.devices=0"], "strategy.devices=0: must be 1 or more"),
        (["strategy.devices=-3"], "strategy.devices=-3: must be 1 or more"),
        (["adapter=lora", "adapter.rank=0"], "adapter.rank=0: must be 1 or more"),
        (["adapter=lora", "adapter.rank=two"], "adapter.rank=two: must be a whole number"),
        (["adapter=lora", "adapter.targets=[q_prj]"], "adapter.targets: the model has no linear layers q_prj; there"),
        (["adapter=lora", "adapter.save=half"], "adapter.save=half: must be one of merged, adapter"),
        (["adapter=lora", "adapter.dropout=0.1"], "adapter.dropout"),
        (["adapter=null"], "adapter=null: adapter takes the name of an option"),
        (["training.kl_coef=-1"], "training.kl_coef=-1.0: must be 0 or more"),
        (["training.kl_coef=nan"], "training.kl_coef=nan: must be 0 or more"),
        (["training.kl_estimator=k4"], "training.kl_estimator=k4: must be one of k1, k2, k3"),
        (["callbacks.checkpoints.best=val/bias"], "best=val/bias: of this metric it is not known whether low or high"),
        (["callbacks.checkpoints.best=train/ece"], "best=train/ece: of this metric it is not known"),
        (["callbacks.checkpoints.best=val/reward/x"], "no such objective; there are correctness, confidence_brier"),
        (["optimize=ece"], "optimize=ece: of this metric it is not known .*; choose from .*val/reward/<objective>"),
        (["optimize=val/ece", "callbacks.held_out=null"], "nothing measures it, because callbacks.held_out is null"),
        (["+strategy.strategy=deepspeed_stage_2"], "strategy.strategy=deepspeed_stage_2: .*; strategy=fsdp shards as"),
        (
            ["+strategy.strategy._target_=lightning.pytorch.strategies.FSDPStrategy"],
            "strategy.strategy=FSDPStrategy: an update takes several backward passes",
        ),
        ([*FSDP, "optimizer=adamw_stochastic"], "optimizer: .* with strategy=fsdp use optimizer=adamw_kahan"),
        ([*FSDP, "model.compile=true"], "model.compile=true: .* with strategy=fsdp set model.compile=false"),
        ([*FSDP, "strategy.strategy.process_group_backend=3"], "process_group_backend=3: must be a text or null"),
        (["seed=4294967296"], "seed=4294967296: must be 4294967295 at most"),
        (["+objectives.rewards.confidence_brier.weight=nan"], "confidence_brier.weight=nan: must be 0 or more"),
        (["+objectives.rewards.correctness.weight=-1"], "correctness.weight=-1: must be 0 or more"),
        (["objectives.rewards.correctness.worst=nan"], "correctness.worst=nan: must be finite"),
        (["objectives.blocks.solution.weight=-1"], "objectives.blocks.solution.weight=-1: must be a number, 0 or"),
        (["objectives.rewards.confidence_brier.given=none"], "confidence_brier.given=none: no such objective"),
        (["model.prompt_template=hello"], "model.prompt_template='hello': the policy would never see a question"),
        (["+objectives.examples=[{question: q, completion: c}]"], "objectives.examples are turns of a chat"),
        (["max_new_tokens=256"], "max_new_tokens=256: with the prompt of problem train/.* use max_new_tokens=2.. or"),
        (
            ["hydra/launcher=no_such", "seed=0,1", "-m"],
            "hydra/launcher=no_such: no such option.*such as hydra-no_such-launcher",
        ),
        (["name=a(b"], r"name=a\(b: it cannot be read as key=value"),
        (["resume=/no/such:run"], "resume=/no/such:run: neither an output folder nor a run"),
        (['resume="/no/such run"'], "resume=/no/such run: neither an output folder nor a run"),
        (["resume=\u201c/no/such(run"], r"resume=/no/such\(run: neither an output folder nor a run"),
        (["resume=latest"], "resume=latest: there is no run below .*outputs; name its folder"),
        (["outputs=/dev/null/x"], "/dev/null/x.*: it cannot be made .*; set outputs to another"),
    ],
)
def test_a_wrong_value_is_one_sentence(train, arguments, message):  # noqa: F811
    sentence = refused(train, "steps=1", *arguments)
    assert re.search(message, sentence), sentence


@pytest.mark.parametrize("strategy", ["gpu", "fsdp"])
def test_a_gpu_that_is_not_there(train, monkeypatch, strategy):  # noqa: F811
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "strategy.accelerator=gpu: there is no GPU here; use strategy=cpu" in refused(train, f"strategy={strategy}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sentence = refused(train, "strategy=gpu", "strategy.devices=3")
    assert "strategy.devices=3: there are 2 GPUs here; use 2 or fewer" in sentence


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "device=cuda: there is no GPU here; use auto"), ("gpu", "device=gpu: no such device; use auto, cpu")],
)
def test_a_device_of_an_evaluation(train, tmp_path, monkeypatch, device, message):  # noqa: F811
    import torch

    from bae.commands import evaluate

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert message in refused(lambda *a: call(evaluate, outputs(), *a), "run=anything", f"device={device}")


@pytest.mark.parametrize("length", [300, 200])
def test_a_question_without_room(train, tmp_path, length):  # noqa: F811
    file = tmp_path / "long.jsonl"
    file.write_text(QUESTION.replace("QUESTION", "1+1") + QUESTION.replace("QUESTION", "1" * length))
    splits = [f"task.splits.{split}={file}" for split in ("train", "val")]
    sentence = refused(train, "steps=1", "task=word_problems", *splits, "max_new_tokens=100")
    if length > 256:
        assert f"the prompt of problem train/1 has {length} tokens, and the context of the model 256" in sentence
    else:
        assert "max_new_tokens=100: with the prompt of problem train/1 that is more than the 256 tokens" in sentence
        assert "use max_new_tokens=56 or less" in sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.warmup_steps=3"], "training.warmup_steps=3 is more than the 1 optimiser steps of this run"),
        (["training.kl_coef=0.1", "training.kl_estimator=k1"], "kl_estimator=k1: its gradient has the mean 0"),
        (["objectives=rlvr", "baseline=rao_blackwell"], "baseline=rao_blackwell: nothing reads it"),
        (["objectives=rlvr", "outcome=answer_length"], "outcome=answer_length: nothing reads it"),
    ],
)
def test_what_may_be_meant_is_a_warning(train, monkeypatch, arguments, message):  # noqa: F811
    monkeypatch.setattr(command, "make_run", no_work)
    with pytest.warns(UserWarning, match=message), pytest.raises(SystemExit, match="before any work"):
        train("steps=1", *arguments)


def test_what_is_not_chosen_is_not_warned_of(train, monkeypatch):  # noqa: F811
    monkeypatch.setattr(command, "make_run", no_work)
    with warnings.catch_warnings(), pytest.raises(SystemExit, match="before any work"):
        warnings.simplefilter("error", UserWarning)
        train("steps=2", "objectives=rlvr")


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("resume='outputs/runs/a'", "resume=outputs/runs/a"),
        ('resume="outputs/2026-11-27_22:01_a"', "resume='outputs/2026-11-27_22:01_a'"),
        ("run=\u2018outputs/a b\u2019 ", "run='outputs/a b'"),
        ("run=it's=here", "run='it\\'s=here'"),
        ("resume=auto", "resume=auto"),
        ("run=a:1,b:2", "run=a:1,b:2"),  # a sweep
        ("resume=${outputs}/x", "resume=${outputs}/x"),
        ("name='a b'", "name='a b'"),  # other keys are the user's own business
        ("-m", "-m"),
    ],
)
def test_pasted_folders_are_read(argument, read):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert cli.pasted(argument) == read
    if "=" in argument and "$" not in argument and "," not in argument and not argument.startswith("name"):
        (parsed,) = OverridesParser.create().parse_overrides([cli.pasted(argument)])
        assert str(parsed.value()) == argument.partition("=")[2].strip().strip("'\"\u2018\u2019")


def test_the_latest_run_is_found_and_a_finished_one_is_not_changed(train, capsys):  # noqa: F811
    short = ["steps=1", "callbacks.held_out.every=0", "callbacks.checkpoints.log_policy=false"]
    train(*short, "name=one:two")  # a colon in the folder's name
    train(*short, "seed=1", "name=newer")
    older, newer = (Path(run.data.tags["output_folder"]) for run in runs())

    def resume(*arguments):
        call(command, outputs(), *arguments)

    with pytest.raises(SystemExit, match=r"lr=1: this run has done its 1 steps, so nothing would change"):
        resume("resume=latest", "lr=1")
    assert f"resume=latest: the run in {newer}" in capsys.readouterr().err
    resume(f'resume="{older}"', "steps=2")
    assert (older / "checkpoints" / "step_000002.ckpt").is_file()
    resume("resume=latest", "steps=2")
    assert (newer / "checkpoints" / "step_000002.ckpt").is_file() and len(runs()) == 2
