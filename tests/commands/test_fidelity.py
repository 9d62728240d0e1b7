"""bae-fidelity as a user meets it, on a policy of one training step, and the callback that does it in training."""

import shutil
from pathlib import Path

import hydra
import numpy as np
import pandas
import pytest
import torch

from bae.commands import cli, fidelity, report, schema, train
from bae.fidelity.measure import Study
from bae.seeds import Namespace, key
from tests.support import call, runs

SMALL = [
    "steps=1", "group_size=4", "prompts_per_step=2", "callbacks.held_out.prompts=4", "callbacks.held_out.samples=1",
    "callbacks.held_out.every=0", "callbacks.completions=null", "callbacks.checkpoints.every=1",
    "callbacks.checkpoints.keep=9", "callbacks.checkpoints.log_policy=false", "lr=1e-3",
]  # fmt: skip
ASKED = ["prompts=4", "group_size=[2,4]", "rollouts=4", "nested=8", "gradient=64", "resamples=50"]
BASELINES = ["none", "batch_mean", "group_mean", "ocb", "ocb_loo", "ocb_shrunk", "rao_blackwell", "monte_carlo"]


def newest(outputs):
    return Path(runs(outputs)[1][-1].data.tags["output_folder"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """With one run in it."""
    folder = tmp_path_factory.mktemp("fidelity") / "outputs"
    call(train, folder, *SMALL)
    return folder


@pytest.fixture(scope="module")
def run(outputs):
    return newest(outputs)


@pytest.fixture(scope="module")
def measured(outputs, run):
    call(fidelity, outputs, f"run={run}", *ASKED)
    return run / "fidelity" / "val"


@pytest.fixture
def no_sampling(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something is sampled")

    monkeypatch.setattr(Study, "measure", refuse)


def counted(monkeypatch):
    """The group numbers that are sampled from now on."""
    real, groups = Study.measure, []

    def measure(study, problems, keys):
        groups.extend(key[-1] for key in keys)
        return real(study, problems, keys)

    monkeypatch.setattr(Study, "measure", measure)
    return groups


def test_what_is_measured_is_in_the_folder(measured):
    table = pandas.read_parquet(measured / "rollouts.parquet")
    assert table["group"].unique().tolist() == [0, 1, 2, 3] and table["sample"].max() == 3
    assert np.stack(table["rollouts"]).shape == (len(table), 4) and np.stack(table["nested"]).shape == (len(table), 8)
    results = pandas.read_csv(measured / "fidelity.csv")
    everyone = results[results["set"] == "all"]
    assert everyone["baseline"].tolist() == BASELINES * 2 and everyone["group_size"].tolist() == [2] * 8 + [4] * 8
    assert everyone["completions"].eq(len(table)).all()
    assert everyone.set_index("baseline")["rmse_ratio"]["ocb"].tolist() == [1, 1]
    gradients = pandas.read_csv(measured / "gradients.csv")
    assert gradients["baseline"].tolist() == BASELINES * 2
    assert gradients["mse"].notna().all()
    errors = pandas.read_parquet(measured / "errors.parquet")
    assert set(errors["baseline"]) == set(BASELINES) and set(errors["set"]) <= {"correct", "incorrect"}
    for size in (2, 4):
        for kind in ("png", "svg"):
            assert (measured / f"figure1_confidence_brier_{size}.{kind}").stat().st_size > 5000


def test_what_is_measured_is_in_mlflow(outputs, run, measured):
    client, found = runs(outputs)
    (mine,) = [r for r in found if r.data.tags.get("output_folder") == str(run)]
    results = pandas.read_csv(measured / "fidelity.csv")
    for row in results.to_dict("records"):
        place = row["set"].replace("=", "_").replace("+", "")
        logged = mine.data.metrics[f"fidelity/val/confidence_brier/{row['group_size']}/{place}/{row['baseline']}/rmse"]
        assert logged == pytest.approx(row["rmse"], nan_ok=True)
    artifacts = {a.path for a in client.list_artifacts(mine.info.run_id, "fidelity/val")}
    names = ("rollouts.parquet", "fidelity.csv", "errors.parquet", "gradients.csv", "figure1_confidence_brier_4.png")
    assert {f"fidelity/val/{name}" for name in names} <= artifacts
    assert len(found) == len({r.info.run_id for r in found}) and mine.info.status == "FINISHED"


def test_what_is_there_is_not_sampled_again(outputs, run, measured, no_sampling, capsys):
    before = (measured / "fidelity.csv").read_text(), (measured / "gradients.csv").read_text()
    (measured / "fidelity.csv").unlink()
    call(fidelity, outputs, f"run={run}", *ASKED)
    assert ((measured / "fidelity.csv").read_text(), (measured / "gradients.csv").read_text()) == before
    out = capsys.readouterr().out
    assert "confidence_brier, G = 4, all: " in out and "RMSE" in out and "G = 4, rao_blackwell" in out
    assert "size=" not in out and str(measured / "fidelity.csv") in out and "run " in out
    # Other plain baselines want no other samples; by the id of the run.
    call(fidelity, outputs, f"run={(run / 'run_id').read_text()}", *ASKED, "baselines=[ocb,ocb_batch,rao_blackwell]")
    assert pandas.read_csv(measured / "gradients.csv")["baseline"].tolist() == ["ocb", "ocb_batch", "rao_blackwell"] * 2
    with pytest.raises(AssertionError, match="is sampled"):  # the gradients of a refining baseline are sketched
        call(fidelity, outputs, f"run={run}", *ASKED, "baselines=[ocb,all_action]")


def test_other_settings_are_sampled_anew(outputs, run, measured, no_sampling):
    with pytest.raises(AssertionError, match="is sampled"):
        call(fidelity, outputs, f"run={run}", *ASKED, "rollouts=5")


def test_what_decides_what_is_sampled(run, tmp_path):
    schema.register()

    def digest(*overrides, folder=run, refining=()):
        with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
            return fidelity.digest(hydra.compose("fidelity", overrides), folder, refining)

    others = ["rollouts=5", "nested=9", "seed=1", "gradient=32", "temperature=0.9", "max_new_tokens=30", "split=easy",
              "outcome=answer_length", "group_size=4", "task=gsm8k"]  # fmt: skip
    assert len({digest(), *map(digest, others)}) == 1 + len(others)
    assert digest("baselines=[ocb]", "resamples=9", "prompts=3", "reference=none", f"outputs={tmp_path}") == digest()
    assert digest(refining=["rao_blackwell"]) == digest()  # nothing is sketched
    chosen = [(), ("rao_blackwell",), ("all_action",), ("rao_blackwell", "all_action")]
    assert len({digest("gradient=8", refining=names) for names in chosen}) == 4
    shutil.copytree(run / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors").touch()
    assert digest(folder=tmp_path) != digest()


def test_what_is_missing_alone_is_sampled(outputs, run, monkeypatch):
    """Groups of 64 are a part each."""
    arguments = [f"run={run}", "split=hard", "prompts=3", "group_size=64", "rollouts=2", "nested=0",
                 "baselines=[ocb,none]", "resamples=20"]  # fmt: skip
    sampled = counted(monkeypatch)
    call(fidelity, outputs, *arguments)
    assert sampled == [0, 1, 2]
    place = run / "fidelity" / "hard"
    before = [(place / name).read_bytes() for name in ("fidelity.csv", "rollouts.parquet")]
    (missing,) = place.glob("parts_*/prompts_000001_000001.parquet")
    missing.unlink()
    sampled.clear()
    call(fidelity, outputs, *arguments)
    assert sampled == [1] and missing.is_file()
    assert [(place / name).read_bytes() for name in ("fidelity.csv", "rollouts.parquet")] == before
    call(fidelity, outputs, *arguments, "prompts=4")
    assert sampled == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=null"], "name whose policy to measure: run="),
        (["run=nowhere"], "run=nowhere: neither an output folder nor a run"),
        (["baselines=[ocb,ocbb]"], "baselines: no baseline ocbb; there are .*ocb_loo"),
        (["reference=ocb_batch"], "reference=ocb_batch: not among baselines"),
        (["group_size=[3,4]"], r"group_size=\[3, 4\]: each must divide the largest"),
        (["rollouts=1"], "rollouts=1: must be 2 or more"),
        (["prompts=0"], "prompts=0: must be above 0"),
        (["nested=7"], "nested=7: baseline monte_carlo needs 8 of its own; raise nested"),
        (["nested=-1"], "nested=-1: must not be negative"),
        (["gradient=8", "rollouts=3", "nested=0"], "rollouts=3: gradient=8 needs 4 or more"),
        (["split=vall"], "no split 'vall'"),
        (["rolouts=3"], "no key rolouts; did you mean rollouts"),
    ],
)
def test_what_cannot_work_is_one_sentence(outputs, run, no_sampling, monkeypatch, arguments, message):
    import re

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    given = [] if arguments[0].startswith("run=") else [f"run={run}"]
    with pytest.raises(SystemExit) as stopped:
        call(fidelity, outputs, *given, *arguments)
    sentence = str(stopped.value)
    assert re.search(message, sentence) and "\n" not in sentence, sentence


def test_without_a_later_block_there_is_nothing_to_measure(outputs, run, no_sampling, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    call(train, outputs, *SMALL, "objectives=rlvr")
    with pytest.raises(SystemExit, match="none of the objectives is conditioned on an outcome"):
        call(fidelity, outputs, f"run={newest(outputs)}")


def test_a_policy_that_never_gets_so_far(outputs, run, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit, match="none of its completions reaches a later block"):
        call(fidelity, outputs, f"run={run}", *ASKED, "max_new_tokens=2")


CALLBACK = ["callbacks=fidelity", "callbacks.fidelity.every=1", "callbacks.fidelity.prompts=2",
            "callbacks.fidelity.rollouts=2"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(outputs, run):
    """Three steps without the callback, and with it."""
    call(train, outputs, *SMALL, "steps=3")
    plain = newest(outputs)
    call(train, outputs, *SMALL, *CALLBACK, "steps=3")
    return plain, newest(outputs)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "policy" / "model.safetensors")


def assert_same_weights(one, other):
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def logged(outputs, folder):
    """{metric: [(step, value)]} of fidelity."""
    client, _ = runs(outputs)
    run_id = (folder / "run_id").read_text()
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith("fidelity/")]
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def test_training_is_watched_and_not_changed(outputs, trained):
    plain, watched = trained
    assert_same_weights(weights(plain), weights(watched))
    found = logged(outputs, watched)
    assert {name.split("/")[2] for name in found} == set(BASELINES) - {"monte_carlo"}
    assert set(found) >= {f"fidelity/confidence_brier/ocb/{key}" for key in ("rmse", "bias", "slope", "correlation")}
    assert [step for step, _ in found["fidelity/confidence_brier/ocb/rmse"]] == [1, 2, 3]
    assert not logged(outputs, plain)


def test_a_watched_run_resumes_where_it_was(outputs, trained, tmp_path):
    _, watched = trained
    final, before = weights(watched), str(logged(outputs, watched))
    for step in (2, 3):
        (watched / "checkpoints" / f"step_{step:06d}.ckpt").unlink()
    shutil.rmtree(watched / "policy")
    call(train, outputs, f"resume={watched}")
    assert_same_weights(final, weights(watched))
    assert str(logged(outputs, watched)) == before


def test_the_callback_agrees_with_the_command(outputs, trained, monkeypatch):
    """They differ in the keys of the draws, so the command is given those of the callback."""
    _, watched = trained
    monkeypatch.setattr(fidelity, "key", lambda seed, _, i: key(seed, Namespace.FIDELITY_IN_TRAINING, i))
    call(fidelity, outputs, f"run={watched}", "prompts=2", "group_size=4", "rollouts=2", "nested=0",
         "baselines=[ocb,ocb_loo,ocb_shrunk,rao_blackwell]", "resamples=2")  # fmt: skip
    results = pandas.read_csv(watched / "fidelity" / "val" / "fidelity.csv")
    for row in results[results["set"] == "all"].to_dict("records"):
        last = logged(outputs, watched)[f"fidelity/confidence_brier/{row['baseline']}/rmse"][-1]
        assert last == (3, pytest.approx(row["rmse"], abs=1e-6)), row["baseline"]


def test_it_asks_for_samples_before_training(outputs, run, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = len(runs(outputs)[1])
    with pytest.raises(SystemExit, match="nested=0: baseline monte_carlo needs 8"):
        call(train, outputs, *SMALL, *CALLBACK, "+baseline@callbacks.fidelity.baselines.monte_carlo=monte_carlo")
    assert len(runs(outputs)[1]) == before


def test_a_policy_that_never_gets_so_far_is_trained_all_the_same(outputs, run):
    call(train, outputs, *SMALL, *CALLBACK, "max_new_tokens=2")
    assert not logged(outputs, newest(outputs))


def test_the_report_draws_figure_1(outputs, run, measured, capsys):
    client, found = runs(outputs)
    experiment = client.get_experiment(found[0].info.experiment_id).name
    call(report, outputs, "figure=1", f"experiments=[{experiment}]", f"runs=[{(run / 'run_id').read_text()}]")
    for kind in ("png", "svg"):
        # No groups of 32 here, so the largest that there are.
        assert (outputs / "reports" / f"figure1_tiny_confidence_brier_4.{kind}").stat().st_size > 5000
    assert "missing" not in capsys.readouterr().out
    call(report, outputs, "figure=1", "experiments=[nothing]")
    assert "missing: no finished runs; bae-train -m experiment=table1, then bae-fidelity" in capsys.readouterr().out
