"""Check the store in MLflow: how it is made, what is logged to a run, and how runs are found again."""

import math

import pandas
import pytest

from bae.evaluation.measure import Summary
from bae.report import tracking
from bae.report.store import connect


@pytest.fixture(scope="module")
def uri(store):
    """Return the store, with the experiment `e`; its artifacts lie beside it."""
    tracking.prepare_store(store.uri, "e", str(store.folder / "artifacts"))
    return store.uri


@pytest.fixture
def make(uri, tmp_path):
    """Return a function that makes the logger of a run in a folder of its own."""
    return lambda **options: tracking.MLflowRun(uri, "e", str(tmp_path / "run"), **options)


def sent(logger):
    """Wait until the store has everything, and return the run as it has it."""
    logger.close()
    assert logger.log.unsent() == 0
    return connect(logger.uri).get_run(logger.run_id)


def artifacts(logger, folder=None):
    return [file.path for file in connect(logger.uri).list_artifacts(logger.run_id, folder)]


def test_a_store_that_is_there_stays_as_it_is(uri):
    first = tracking.prepare_store(uri, "e", "/somewhere/else")
    assert first == tracking.prepare_store(uri, "e", None) != tracking.prepare_store(uri, "another", None)
    with tracking.store(uri) as client:
        assert client.get_experiment(first).artifact_location.endswith("/artifacts")


def test_an_absolute_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.absolute("sqlite:///outputs/mlflow.db") == f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"
    assert tracking.absolute("http://localhost:5000") == "http://localhost:5000"


def test_parameters_are_short_and_the_configuration_is_whole(make):
    logger = make(run_name="config")
    many = {f"k{i}": str(i) for i in range(120)}  # more than MLflow takes in one call
    logger.log_config({"a": {"b": {"c": 1}}}, {"model": "tiny", "long": "x" * 600, **many})
    run = sent(logger)
    params = run.data.params
    assert params["model"] == "tiny" and params["k119"] == "119" and len(params) == 122
    assert params["long"] == "x" * tracking.PARAM_LIMIT
    assert artifacts(logger) == ["config.yaml"] and run.info.run_name == "config"


def test_a_run_tells_what_made_it(make, monkeypatch):
    monkeypatch.setenv(tracking.PARENT_RUN, "parent")
    logger = make()
    logger.begin()
    logger.set_tags({"settings": "x"})
    tags = sent(logger).data.tags
    assert tags["mlflow.parentRunId"] == "parent" and tags["git_revision"] == tracking.git_revision()
    assert {f"version.{package}" for package in tracking.PACKAGES} | {"settings"} <= tags.keys()


def test_a_continued_run_logs_what_is_missing_and_nothing_twice(uri, make):
    """Killed between two metrics of step 2, in which the store was not told that the run had ended."""
    first = make()
    first.log_metrics({"train/accuracy": 0.1, "val/accuracy": 0.1}, step=1)
    first.log_metrics({"train/accuracy": 0.2}, step=2)
    first.finalize("failed")
    assert sent(first).info.status == "FAILED"
    again = make(run_id=first.run_id)
    again.set_status("RUNNING")
    for step in (2, 3):
        again.log_metrics({"train/accuracy": step / 10, "val/accuracy": step / 10}, step=step)
        again.log_completions({"text": ["x"]}, step=step)
    assert sent(again).info.status == "RUNNING" and again.run_id == first.run_id
    for metric in ("train/accuracy", "val/accuracy"):
        found = connect(uri).get_metric_history(again.run_id, metric)
        assert [(m.step, m.value) for m in found] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert artifacts(again, "completions") == [f"completions/step_00000{step}.json" for step in (2, 3)]


def test_a_run_that_has_no_log_goes_on_from_what_the_store_has(uri, store, make):
    """As an earlier version left it."""
    run_id = store.run("e", {}, {"train/accuracy": {1: 0.1, 2: 0.2}, "val/accuracy": {0: 0.5}, "eval/val/ece": 0.4})
    logger = make(run_id=run_id)
    for step in (1, 2, 3):
        logger.log_metrics({"train/accuracy": step / 10, "val/accuracy": 0.5}, step=step)
    assert sent(logger).info.run_id == run_id
    assert len(connect(uri).get_metric_history(run_id, "train/accuracy")) == 3
    assert tracking.history(uri, run_id, "val/accuracy") == {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}
    assert logger.log.history("eval/") == {"eval/val/ece": {0: 0.4}}


def test_a_run_without_a_log_that_the_store_does_not_have_is_refused(make):
    with pytest.raises(ValueError, match=r"not in the MLflow store .*/mlflow\.db"):
        make(run_id="0" * 32)


def test_an_evaluation_is_logged_by_name_and_number_of_samples(uri, make, tmp_path):
    logger = make()
    file = logger.log.folder / "evaluation" / "val.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    summary = Summary({"accuracy": 0.5, "ece": math.nan}, {"pass@1": [0.25, 0.5]})
    logger.log_evaluation({"val/attempt_2": summary}, [file])
    name = "eval/val/attempt_2"
    assert math.isnan(sent(logger).data.metrics[f"{name}/ece"])
    assert tracking.history(uri, logger.run_id, f"{name}/accuracy") == {0: 0.5}
    assert tracking.history(uri, logger.run_id, f"{name}/scaling/pass_at_1") == {1: 0.25, 2: 0.5}
    assert artifacts(logger, "evaluation") == ["evaluation/val.json"]


def test_results_of_fidelity_are_logged_without_signs(make):
    logger = make()
    row = {"set": "c=0+1", "objective": "brier", "group_size": 8, "baseline": "ocb"}
    row |= {"rmse": 0.1, "observed_rmse": 0.2, "bias": 0.0, "slope": 1.0, "correlation": 0.9, "fallback": 0.0}
    logger.log_fidelity("val", pandas.DataFrame([row]), [])
    metrics = sent(logger).data.metrics
    assert metrics["fidelity/val/brier/8/c_01/ocb/observed_rmse"] == 0.2 and len(metrics) == 6


def test_the_folder_of_a_run(uri, make, tmp_path):
    logger = make()
    logger.log_metrics({"a": 1.0}, 1)
    sent(logger)
    sentence = f"run={logger.run_id}: neither an output folder nor a run in {uri}"
    with pytest.raises(FileNotFoundError, match=sentence):  # a run without the tag
        tracking.find_run_folder("run", logger.run_id, uri)
    with pytest.raises(FileNotFoundError, match="init=nothing: neither an output folder nor a run"):
        tracking.find_run_folder("init", "nothing", uri)
    logger.set_tags({"output_folder": str(tmp_path)})
    sent(logger)
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
