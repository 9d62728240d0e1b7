"""bae-train as a user meets it: real runs of a few steps, resumed, refused, side by side."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from bae.commands import train as command
from tests.support import ROOT, call, needs_gpu, needs_torchao

BAE_TRAIN = Path(sys.executable).parent / "bae-train"
SMALL = [
    "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=8", "callbacks.held_out.every=2",
    "callbacks.checkpoints.every=1", "callbacks.checkpoints.keep=9", "callbacks.completions.every=2",
    "callbacks.completion_page.every=2", "callbacks.completion_page.prompts=2", "lr=1e-3",
    "training.warmup_steps=2", "training.micro_batch_tokens=400", "callbacks.throughput.seconds=0.01",
]  # fmt: skip


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run bae-train in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        call(command, outputs(), *SMALL, *arguments)

    return run


def outputs():
    """In the working directory, but absolute: MLflow keeps one engine for each address in a process."""
    return Path.cwd() / "outputs"


def store():
    return f"sqlite:///{outputs() / 'mlflow.db'}"


def runs():
    client = MlflowClient(store())
    return client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time"])


def history(run, metric):
    return [(m.step, m.value) for m in MlflowClient(store()).get_metric_history(run.info.run_id, metric)]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "policy" / "model.safetensors")


def test_a_run_is_found_in_mlflow(train, capsys):
    train("steps=3", "name=first")
    (run,) = runs()
    folder = Path(run.data.tags["output_folder"])
    assert run.info.status == "FINISHED"
    assert run.data.params["baseline"] == "ocb" and run.data.params["seed"] == "0"
    assert "| ece" in run.data.tags["mlflow.note.content"] and "name=first" in run.data.tags["mlflow.source.name"]
    assert run.data.tags["version.torch"] == torch.__version__
    assert run.data.tags["git_revision"]
    assert [step for step, _ in history(run, "train/accuracy")] == [1, 2, 3]
    assert [step for step, _ in history(run, "val/ece")] == [0, 2, 3]
    artifacts = {a.path for a in MlflowClient(store()).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "completions", "policy"} <= artifacts
    shown = {a.path for a in MlflowClient(store()).list_artifacts(run.info.run_id, "completions")}
    assert shown == {f"completions/step_00000{step}.{kind}" for step in (1, 2, 3) for kind in ("json", "html")}
    source = (folder / "completions" / "step_000003.html").read_text()
    assert source.count("<article") == 8 and "confidence_brier" in source  # 2 problems with 4 completions each
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for metric in run.data.metrics:
        prefix, _, name = metric.partition("/")
        name = name.replace("correctness", "<objective>").replace("confidence_brier", "<objective>")
        name = re.sub(r"(?<=/)(solution|confidence)(?=/|$)", "<block>", name)
        assert f"`{name}`" in documented or f"`{prefix}/{name}`" in documented, f"docs/metrics.md lacks {metric}"
    out = capsys.readouterr().out
    assert "before" in out and "mlflow ui" in out and run.info.run_id in out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "policy", use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    text = tokenizer.decode(model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=4)[0])
    assert text.startswith("1+2=<reasoning>")


def test_the_completion_table_can_be_read(train, monkeypatch):
    train("steps=1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store())  # load_table searches there, whatever the client
    (run,) = runs()
    where = {"run_ids": [run.info.run_id], "experiment_id": run.info.experiment_id}
    table = MlflowClient(store()).load_table(artifact_file="completions/step_000001.json", **where)
    assert len(table) == 16
    row = table.iloc[0]
    assert (row["block/solution"] + row["block/confidence"]).startswith(row["text"])  # then the end of sequence
    assert {"prompt", "answer", "verdict", "confidence", "reward/correctness", "advantage/confidence_brier"} <= set(
        table
    )


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["training.optimizer_steps=2", "callbacks.entropy.target=9", "training.kl_coef=0.5"],
        pytest.param(["optimizer=adamw_kahan", "model.dtype=bfloat16"], marks=pytest.mark.slow),
        pytest.param(["optimizer=adamw_8bit", "model.dtype=bfloat16"], marks=[pytest.mark.slow, needs_torchao]),
    ],
)
def test_resuming_at_any_saved_step_is_bit_identical(train, options, tmp_path):
    steps = 3
    train(f"steps={steps}", *options)
    (whole,) = runs()
    folder = Path(whole.data.tags["output_folder"])
    reference = {p.name: torch.load(p, weights_only=True) for p in (folder / "checkpoints").glob("*.ckpt")}
    final = weights(folder)
    metrics = {m: history(whole, m) for m in whole.data.metrics if not m.startswith(("time/", "perf/"))}
    for saved in range(1, steps):
        # Stop after `saved` steps: later checkpoints are gone, as is the policy.
        for step in range(saved + 1, steps + 1):
            (folder / "checkpoints" / f"step_{step:06d}.ckpt").unlink()
        shutil.rmtree(folder / "policy")
        resume_without_small(folder)
        for name, value in final.items():
            assert torch.equal(weights(folder)[name], value), f"{name} after resuming at {saved}"
        again = torch.load(folder / "checkpoints" / f"step_{steps:06d}.ckpt", weights_only=True)
        assert_equal(again["optimizer_states"], reference[f"step_{steps:06d}.ckpt"]["optimizer_states"])
        assert again["callbacks"] == reference[f"step_{steps:06d}.ckpt"]["callbacks"]
    assert len(runs()) == 1  # the same MLflow run throughout
    # Nothing in it twice, and nothing changed; as text, so that NaN equals NaN.
    assert str({m: history(whole, m) for m in metrics}) == str(metrics)
    assert runs()[0].info.status == "FINISHED"


@needs_gpu
@pytest.mark.parametrize(
    "options",
    [
        ["model.dtype=float32"],
        ["model.dtype=bfloat16"],
        ["model.dtype=bfloat16", "optimizer=adamw_kahan"],
        pytest.param(["model.dtype=bfloat16", "optimizer=adamw_8bit"], marks=needs_torchao),
    ],
)
def test_a_gpu_trains_and_resumes(train, options):
    """Sums of atomic additions differ in their last bits from run to run, so what is resumed is near, not the same."""
    train("steps=3", "strategy=gpu", "temperature=1e-3", *options)
    (whole,) = runs()
    folder = Path(whole.data.tags["output_folder"])
    final, rewards = weights(folder), history(whole, "train/reward/correctness")
    (folder / "checkpoints" / "step_000003.ckpt").unlink()
    shutil.rmtree(folder / "policy")
    resume_without_small(folder)
    assert all((weights(folder)[name] - value).abs().max() < 5e-3 for name, value in final.items())
    (again,) = runs()
    assert len(history(again, "train/reward/correctness")) == len(rewards) == 3
    assert 0 < again.data.metrics["perf/update_mfu"] < 1 and 0 < again.data.metrics["perf/rollout_mfu"] < 1


def resume_without_small(run, *arguments):
    call(command, outputs(), f"resume={run}", *arguments)


def assert_equal(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    else:
        assert first == second


def test_a_stopped_run_goes_on_where_it_was(train, monkeypatch):
    """Stopped by an exception between two checkpoints; metrics of the lost steps are not logged twice."""
    from bae.callbacks import Telemetry

    real = Telemetry.on_train_batch_end

    def stop(self, trainer, module, outputs, batch, index):
        real(self, trainer, module, outputs, batch, index)
        if batch.step == 2:
            raise RuntimeError("stopped")

    monkeypatch.setattr(Telemetry, "on_train_batch_end", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        train("steps=4", "callbacks.checkpoints.every=2")
    (run,) = runs()
    assert run.info.status == "FAILED"
    monkeypatch.setattr(Telemetry, "on_train_batch_end", real)
    resume_without_small(run.info.run_id)  # by id this time
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(run, "train/accuracy")] == [1, 2, 3, 4]
    assert [step for step, _ in history(run, "val/accuracy")] == [0, 2, 4]


def test_a_run_killed_in_its_last_held_out_pass_goes_on_and_reports_the_last_step(train, monkeypatch, capsys):
    """Telemetry of the last step is logged, held-out problems are not; the table must not show those of step 2."""
    from bae.callbacks import HeldOut

    real = HeldOut._measure

    def stop(self, trainer, step):
        if step == 3:
            raise RuntimeError("stopped")
        return real(self, trainer, step)

    monkeypatch.setattr(HeldOut, "_measure", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        train("steps=3")
    (run,) = runs()
    assert [step for step, _ in history(run, "train/accuracy")] == [1, 2, 3]
    monkeypatch.setattr(HeldOut, "_measure", real)
    capsys.readouterr()
    (Path(run.data.tags["output_folder"]) / "run_id").unlink()  # as if MLflow had not made the run yet
    resume_without_small(run.data.tags["output_folder"])
    assert [step for step, _ in history(run, "val/accuracy")] == [0, 2, 3] and len(runs()) == 1
    (shown,) = re.findall(r"^accuracy +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M)
    values = dict(history(run, "val/accuracy"))
    assert shown == (f"{values[0]:.3f}", f"{values[3]:.3f}")


@pytest.mark.parametrize("place", ["command line", "a list", "experiment", "sweep"])
def test_credentials_are_refused_before_anything_is_written(train, tmp_path, capsys, monkeypatch, place):
    secret = "http://user:hunter2@localhost:1"
    arguments = {
        "command line": [f"logger.tracking_uri={secret}"],
        "a list": [f"logger={{tracking_uri: '{secret}'}}"],
        "experiment": ["experiment=mine", f"--config-dir={tmp_path / 'own'}"],
        "sweep": ["experiment=mine", "seed=0,1", "-m", f"--config-dir={tmp_path / 'own'}"],
    }[place]
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nlogger:\n  tracking_uri: http://${oc.env:LOGIN}@localhost:1\n"
    )
    monkeypatch.setenv("LOGIN", "user:hunter2")
    with pytest.raises(SystemExit) as stopped:
        train(*arguments)
    said = str(stopped.value) + "".join(capsys.readouterr())
    assert "MLFLOW_TRACKING_USERNAME" in said and "hunter2" not in said and "\n" not in str(stopped.value)
    assert not list(outputs().rglob(".hydra")) and not list(outputs().rglob("config.yaml"))


def test_a_finished_run_can_be_made_longer(train):
    train("steps=2", "training.final_lr=1")  # the fall of the rate would depend on the steps
    whole = weights(runs()[0].data.tags["output_folder"])
    train("steps=1", "training.final_lr=1")
    short = runs()[1]
    resume_without_small(short.info.run_id, "steps=2")
    assert [step for step, _ in history(short, "train/accuracy")] == [1, 2]
    resume_without_small(short.info.run_id, "steps=2")  # there is nothing left to do
    assert [step for step, _ in history(short, "train/accuracy")] == [1, 2]
    for name, value in weights(short.data.tags["output_folder"]).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "no key stepz; did you mean steps"),
        (["+typo=3"], "typo: nothing reads this key"),
        (["model.pth=x"], "no key model.pth; did you mean path"),
        (["+model.typo=3"], "no key model.typo"),
        (["+training.typo=3"], "no key training.typo"),
        (["optimizer=adam"], "optimizer=adam: no such option; optimizer has adamw, adamw_8bit, adamw_kahan, "),
        (["+objectives.typo=3"], "objectives.typo: nothing reads this key"),
        (["lr=abc"], "lr=abc: must be a number"),
        (["steps=no"], "steps=no: must be a whole number"),
        (["baseline=ocbb"], "baseline=ocbb: no such option; baseline has all_action, .*none, ocb, ocb_batch"),
        (["experiment=null"], "experiment=null: experiment takes the name of an option; .* write ~experiment"),
        (["optimizer=3"], "optimizer=3: optimizer takes the name of an option"),
        (["basline=ocb"], "did you mean baseline"),
        (["task=dataset"], "task.splits.train: it has no default; give it, as in task.splits.train="),
        (["group_size=1"], "group_size=1: .* use group_size=2"),
        (["steps=0"], "steps=0: must be above 0"),
        (["temperature=0"], "temperature=0.0: must be above 0"),
        (["training.clip=2"], "training.clip=2"),
        (["training.optimizer_steps=3"], "training.optimizer_steps=3 does not divide"),
        (["objectives.malformed=ignore"], "objectives.malformed=ignore"),
        (["objectives.blocks.confidence.sections=['an answer']"], "not a word"),
        (["objectives.blocks.confidence.malformed=ignore"], "choose penalise"),
        (["objectives.rewards.correctness.block=solutoin"], "no such block"),
        (["+objectives.rewards.confidence_brier.answer=1"], "answer=1: the blocks have 1 sections 'answer'"),
        (["baseline=all_action", "normalisation=group_std"], "normalisation.objective: this baseline finishes"),
        (["training.clip_high=0"], "training.clip_high=0"),
        (["callbacks=fidelity", "objectives=rlcr"], "no later block"),
        (["callbacks.dynamic_sampling.rounds=-1"], "rounds=-1: must not be negative"),
        (["model.path=/no/such/model"], "model.path=/no/such/model"),
        (["model=pretrained"], "model.path"),
        (["task=gsm8k", "task.splits.train=/no/such.jsonl"], "task.splits.train=/no/such.jsonl: no such file"),
        (["task=math", "model=pretrained", "model.path=x"], "task.splits|model.path"),
        (["resume=/no/such/run"], "resume=/no/such/run"),
        (["rollout.max_rows=0"], "max_rows"),
        (["callbacks.held_out.split=vall"], "no split 'vall'"),
        (["callbacks.checkpoints.every=0"], "callbacks.checkpoints.every=0: must be 1 or more"),
        (["callbacks.completions.every=0"], "callbacks.completions.every=0: must be 1 or more"),
        (["callbacks.completion_page.characters=0"], "callbacks.completion_page.characters=0: must be 1 or more"),
        (["model.dtype=bfloat61"], "model.dtype=bfloat61: not a floating-point type"),
        (["+baseline.typo=1"], "there is no key baseline.typo"),
        (["baseline=ocb_shrunk", "baseline.decay=abc"], "baseline.decay=abc: must be a number"),
        (["baseline=ocb_shrunk", "+baseline.decai=0.5"], "there is no key baseline.decai; did you mean decay"),
        (["training.clip=abc"], "training.clip=abc: must be a number"),
        (["+training.clp=1"], "no key training.clp; did you mean clip"),
        (["training.warmup_steps=abc"], "training.warmup_steps=abc: must be a whole number"),
        (["training.warmup_steps=-1"], "training.warmup_steps=-1: must not be negative"),
        (["training.optimizer_steps=0"], "training.optimizer_steps=0: must be 1 or more"),
        (["training.importance_cap=nan"], "training.importance_cap=nan: must be above 0, or null"),
        (["training.max_grad_norm=nan"], "training.max_grad_norm=nan: must be above 0"),
        (["callbacks.held_out.every=abc"], "callbacks.held_out.every=abc: must be a whole number"),
        (["+callbacks.held_out.typo=1"], "there is no key callbacks.held_out.typo"),
        (["lr=inf"], "lr=inf: must be finite"),
        (["lr=nan"], "lr=nan: must be finite"),
        (["lr=-1"], "lr=-1.0: must not be negative"),
        (["temperature=nan"], "temperature=nan: must be finite"),
        (["temperature=inf"], "temperature=inf: must be finite"),
        (["seed=-1"], "seed=-1: must not be negative"),
        (
            ["first_block_baseline=name"],
            "first_block_baseline: .* choose an option with baseline@first_block_baseline=",
        ),
        (["baseline@first_block_baseline=name"], "no such option; baseline has"),
        (["+strategy.typo=1"], "there is no key strategy.typo"),
        (["+optimizer.typo=1"], "there is no key optimizer.typo"),
        (["+logger.typo=1"], "there is no key logger.typo"),
        (
            ["+objectives.rewards.confidence_brier.worst=-0.5"],
            "objectives.rewards.confidence_brier.worst=-0.5: the score goes down to -1, so malformed output would pay",
        ),
        (["+objectives.rewards.confidence_brier.wurst=-1"], "no key .*confidence_brier.wurst; did you mean worst"),
        (
            ["objectives=confidence_bce", "objectives.rewards.confidence_bce.score.epsilon=0"],
            "objectives.rewards.confidence_bce.score is not finite for the confidence",
        ),
        (["baseline._target_=my_study.baselines.median"], "baseline._target_=my_study.baselines.median: cannot be"),
        (["baseline._target_=bae.method.baselines.grup_mean"], "baseline._target_=.*grup_mean: cannot be imported"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(train, capsys, arguments, message, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        train("steps=1", *arguments)
    sentence = str(stopped.value)
    assert re.search(message, sentence), sentence
    assert "\n" not in sentence
    assert not (outputs() / "mlflow.db").exists() or not runs()  # no run was begun


def spawn(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [BAE_TRAIN, *SMALL, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_sweep_is_a_parent_with_its_jobs_under_it(train):
    train("baseline=none,ocb", "steps=1", "callbacks.checkpoints.log_policy=false", "-m")
    parent, *jobs = runs()
    assert [job.data.tags["mlflow.parentRunId"] for job in jobs] == [parent.info.run_id] * 2
    assert [job.data.params["baseline"] for job in jobs] == ["none", "ocb"]
    assert [job.info.run_name for job in jobs] == ["baseline=none", "baseline=ocb"]
    assert parent.info.run_name == "baseline=none,ocb"
    assert "| baseline=ocb" in parent.data.tags["mlflow.note.content"]
    assert {run.info.status for run in (parent, *jobs)} == {"FINISHED"}
    assert "BAE_PARENT_RUN" not in os.environ


@pytest.mark.slow
def test_eight_jobs_on_a_fresh_store_all_log(tmp_path, monkeypatch):
    jobs = [spawn("steps=2", f"seed={i}", "skip_finished=true", cwd=tmp_path) for i in range(8)]
    errors = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 8, errors
    monkeypatch.chdir(tmp_path)
    assert sorted(run.data.params["seed"] for run in runs()) == [str(i) for i in range(8)]
    assert all(len(history(run, "train/accuracy")) == 2 and run.info.status == "FINISHED" for run in runs())


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, monkeypatch):
    evaluation = [f"callbacks.evaluation.{option}" for option in ("splits=[val]", "prompts=5", "samples=2")]
    plain = ["steps=3", "logger.run_name=one", "training.optimizer_steps=2", "callbacks.entropy.target=9", *evaluation]
    two = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2", "logger.run_name=two"]
    for arguments in (plain, plain + two):
        job = spawn(*arguments, "baseline=batch_mean", cwd=tmp_path)
        error = job.communicate()[1]
        assert job.returncode == 0, error
    monkeypatch.chdir(tmp_path)
    one, both = runs()
    assert both.info.run_name == "two" and len(runs()) == 2  # the second rank makes no run of its own
    for metric in ("train/reward/correctness", "train/ece", "train/entropy", "train/grad_norm", "val/brier",
                   "eval/val/brier", "eval/val/samples"):  # fmt: skip
        assert dict(history(both, metric)) == pytest.approx(dict(history(one, metric)), abs=1e-4), metric
    assert_same_policy(one, both)


@pytest.mark.slow
def test_each_job_of_a_sweep_over_two_processes_is_its_own(tmp_path, monkeypatch):
    """Lightning starts the second rank with the command line; it must be that of the job, not of the sweep."""
    two = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]
    for arguments in (["steps=2", "seed=1"], ["steps=2", "seed=0,1", *two, "-m"]):
        job = spawn(*arguments, cwd=tmp_path)
        error = job.communicate()[1]
        assert job.returncode == 0, error
    monkeypatch.chdir(tmp_path)
    alone, _, zero, one = runs()
    assert (zero.data.params["seed"], one.data.params["seed"]) == ("0", "1")
    assert_same_policy(alone, one)


def assert_same_policy(one, other):
    """Up to rounding: a step of AdamW with a wrong gradient would move a weight by the learning rate, 1e-3."""
    first, second = (weights(run.data.tags["output_folder"]) for run in (one, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=5e-5, rtol=1e-4)
