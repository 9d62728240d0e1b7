"""Check the store in MLflow: how it is made, what is logged to a run, and how runs are found again."""

import math

import pandas
import pytest

from bae.evaluation.measure import Summary
from bae.report import tracking


@pytest.fixture(scope="module")
def uri(store):
    """Return the store, with the experiment `e`; its artifacts lie beside it."""
    tracking.prepare_store(store.uri, "e", str(store.folder / "artifacts"))
    return store.uri


def artifacts(logger, folder=None):
    return [file.path for file in logger.experiment.list_artifacts(logger.run_id, folder)]


def test_a_store_that_is_there_stays_as_it_is(uri):
    first = tracking.prepare_store(uri, "e", "/somewhere/else")
    assert first == tracking.prepare_store(uri, "e", None) != tracking.prepare_store(uri, "another", None)
    with tracking.store(uri) as client:
        assert client.get_experiment(first).artifact_location.endswith("/artifacts")


def test_an_absolute_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.absolute("sqlite:///outputs/mlflow.db") == f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"
    assert tracking.absolute("http://localhost:5000") == "http://localhost:5000"


def test_the_configuration_is_flat_and_short(uri):
    logger = tracking.MLflowRun(uri, "e", run_name="config")
    many = {f"k{i}": i for i in range(120)}  # more than MLflow takes in one call
    logger.log_config({"a": {"b": {"c": 1}, "none": None}, "long": "x" * 600, "many": many}, {"model": "tiny"})
    params = logger.experiment.get_run(logger.run_id).data.params
    assert params["a.b.c"] == "1" and params["model"] == "tiny" and params["many.k119"] == "119"
    assert params["long"] == "x" * tracking.PARAM_LIMIT and "a.none" not in params and "a" not in params
    assert artifacts(logger) == ["config.yaml"]


def test_a_run_tells_what_made_it(uri, monkeypatch):
    monkeypatch.setenv(tracking.PARENT_RUN, "parent")
    logger = tracking.MLflowRun(uri, "e")
    tags = logger.experiment.get_run(logger.run_id).data.tags
    assert tags["mlflow.parentRunId"] == "parent" and tags["git_revision"] == tracking.git_revision()
    assert {f"version.{package}" for package in tracking.PACKAGES} <= tags.keys()


def test_a_continued_run_logs_no_step_twice(uri):
    first = tracking.MLflowRun(uri, "e")
    for step in (1, 2):
        first.log_metrics({"train/accuracy": step / 10}, step=step)
    first.experiment.set_terminated(first.run_id, "FAILED")
    again = tracking.MLflowRun(uri, "e", run_id=first.run_id)
    assert again.run_id == first.run_id and again.logged_until == 2
    assert again.experiment.get_run(first.run_id).info.status == "RUNNING"
    for step in (2, 3):
        again.log_metrics({"train/accuracy": 0.9}, step=step)
        again.log_completions({"text": ["x"]}, step=step)
    assert tracking.history(uri, first.run_id, "train/accuracy") == {1: 0.1, 2: 0.2, 3: 0.9}
    assert artifacts(again, "completions") == ["completions/step_000003.json"]


def test_an_evaluation_is_logged_by_name_and_number_of_samples(uri, tmp_path):
    logger = tracking.MLflowRun(uri, "e")
    file = tmp_path / "val.json"
    file.write_text("{}")
    summary = Summary({"accuracy": 0.5, "ece": math.nan}, {"pass@1": [0.25, 0.5]})
    logger.log_evaluation({"val/attempt_2": summary}, [file])
    name = "eval/val/attempt_2"
    assert tracking.history(uri, logger.run_id, f"{name}/accuracy") == {0: 0.5}
    assert tracking.history(uri, logger.run_id, f"{name}/scaling/pass_at_1") == {1: 0.25, 2: 0.5}
    assert math.isnan(logger.experiment.get_run(logger.run_id).data.metrics[f"{name}/ece"])
    assert artifacts(logger, "evaluation") == ["evaluation/val.json"]


def test_results_of_fidelity_are_logged_without_signs(uri, tmp_path):
    logger = tracking.MLflowRun(uri, "e")
    row = {"set": "c=0+1", "objective": "brier", "group_size": 8, "baseline": "ocb"}
    row |= {"rmse": 0.1, "observed_rmse": 0.2, "bias": 0.0, "slope": 1.0, "correlation": 0.9, "fallback": 0.0}
    tracking.log_fidelity(logger.experiment, logger.run_id, "val", pandas.DataFrame([row]), [])
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics["fidelity/val/brier/8/c_01/ocb/observed_rmse"] == 0.2 and len(metrics) == 6


def test_the_folder_of_a_run(uri, tmp_path):
    logger = tracking.MLflowRun(uri, "e")
    sentence = f"run={logger.run_id}: neither an output folder nor a run in {uri}"
    with pytest.raises(FileNotFoundError, match=sentence):  # a run without the tag
        tracking.find_run_folder("run", logger.run_id, uri)
    with pytest.raises(FileNotFoundError, match="init=nothing: neither an output folder nor a run"):
        tracking.find_run_folder("init", "nothing", uri)
    logger.set_tags({"output_folder": str(tmp_path)})
    assert tracking.find_run_folder("run", logger.run_id, uri) == tmp_path


def test_runs_are_found_newest_first(uri):
    tracking.prepare_store(uri, "order", None)
    with tracking.store(uri) as client:
        experiment = client.get_experiment_by_name("order").experiment_id
        ids = [client.create_run(experiment, start_time=time).info.run_id for time in (20, 30, 10)]
        for run in ids[:2]:
            client.set_terminated(run)
    finished = "attributes.status = 'FINISHED'"
    found = tracking.search(uri, ["no such experiment", "order"], finished)
    assert [run.info.run_id for run in found] == [ids[1], ids[0]]
    assert tracking.search(uri, ["no such experiment"], finished) == []


def test_the_revision_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert tracking.git_revision() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # and where there is no git
    assert tracking.git_revision() == "unknown"
