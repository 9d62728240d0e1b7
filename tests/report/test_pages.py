"""Check the pages of runs and of sweeps in MLflow: tables by hand, and what a store that is there gives."""

import math

import pytest

from bae.report import sweep_page, tracking
from bae.report.run_log import RunLog, Sent
from bae.report.run_page import GAP, changes, description
from bae.report.store import connect, page


@pytest.fixture
def log(tmp_path):
    made = RunLog(tmp_path / "run")
    made.append("run", id="x")
    made.append(
        "params", values={"objectives": "rlcr", "task": "sums", "model": "tiny", "group_size": "4", "lr": "0.1"}
    )
    made.append("tags", values={"mlflow.source.name": "bae-train method=rlcr"})
    made.append_metrics({"val/ece": 0.5, "val/accuracy": 0.25}, 0)
    return made


def test_a_run_says_what_it_trains_before_it_has_results(log):
    text = description(log, 7, "val")
    assert "**rlcr** on **sums**" in text and "7 steps" in text and "`bae-train method=rlcr`" in text
    assert f"bae-train resume={log.folder.absolute()}" in text
    assert f"| ece{GAP} | 0.500{GAP} | - |" in text and "get-artifact" not in text


def test_a_run_shows_what_it_changed_and_its_own_rmse(log):
    log.append_metrics({"val/ece": 0.125}, 6)  # of another step than the last
    log.append_metrics({"val/ece": 0.0625}, 7)
    log.append_metrics({"fidelity/own/rmse": 0.3}, 2)
    log.append_metrics({"fidelity/own/rmse": 0.1}, 4)
    log.mark_sent(Sent(0, "abc", "1"))
    (log.folder / "pictures").mkdir()
    (log.folder / "pictures" / "reliability.png").touch()
    text = description(log, 7, "val", ["val"])
    assert f"| ece{GAP} | 0.500{GAP} | 0.062 |" in text and "**ece 0.500 → 0.062 · RMSE 0.100**" in text
    assert f"| RMSE of the baseline, step 4{GAP} | {GAP} | 0.100 |" in text
    assert "get-artifact?path=pictures/reliability.png&run_uuid=abc" in text and "training.png" not in text
    assert "`evaluation/val_reliability.png`" in text
    (accuracy, ece) = changes(log, "val", 7)
    assert ece == ("ece", 0.5, 0.0625) and accuracy[:2] == ("accuracy", 0.25) and math.isnan(accuracy[2])


def test_the_address_of_a_page():
    where = "#/experiments/1/runs/abc?workflowType=machine_learning"
    assert page("sqlite:////tmp/mlflow.db", "1", "abc") == f"http://127.0.0.1:5000/{where}"
    assert page("https://host/mlflow/", "1", "abc") == f"https://host/mlflow/{where}"
    assert page("sqlite:///x.db").endswith("#/experiments?workflowType=machine_learning")


@pytest.fixture
def parent(store):
    tags = {sweep_page.VARIED: "method seed", "mlflow.source.name": "bae-train -m method=ocb,rlcr seed=0,1"}
    return tracking.open_parent(store.uri, "pages", str(store.folder / "artifacts"), "method=ocb,rlcr", "d1", tags)


def child(store, parent, method, seed, ece, status="FINISHED", **tags):
    tags = {"mlflow.parentRunId": parent, **tags}
    metrics = {"val/accuracy": 0.5, "val/ece": ece, "fidelity/own/rmse": ece / 2}
    return store.run("pages", {"method": method, "seed": seed}, metrics, status, tags)


def test_a_sweep_has_a_table_of_means_and_errors_over_seeds(store, parent):
    child(store, parent, "ocb", "0", 0.9, "FAILED")  # then made again
    first = child(store, parent, "ocb", "0", 0.25)
    child(store, parent, "ocb", "1", 0.75)
    child(store, parent, "rlcr", "0", 0.5)
    child(store, parent, "rlcr", "1", 0.1, "KILLED")
    sweep_page.write(store.uri, parent)
    text = connect(store.uri).get_run(parent).data.tags[tracking.NOTE].replace(GAP, "")
    # The standard deviation of 0.25 and 0.75 is 0.3536; divided by the root of 2 seeds, 0.25.
    assert "| method=ocb | 0.500 ± 0.000 | 0.500 ± 0.250 | 0.250 ± 0.125 |" in text
    assert "| method=rlcr | 0.500 | 0.500 | 0.250 |" in text and "1 finished, 1 killed" in text
    assert f"runs/{first}?workflowType=machine_learning" in text and "Brier" not in text
    files = {file.path for file in connect(store.uri).list_artifacts(parent)}
    assert files == {"sweep.csv", "sweep_runs.csv", "sweep.png", "sweep.svg"}


def test_the_same_sweep_goes_on_under_the_same_parent(store, parent, monkeypatch):
    again = tracking.open_parent(store.uri, "pages", None, "method=ocb,rlcr", "d1", {})
    other = tracking.open_parent(store.uri, "pages", None, "method=ocb,rlcr", "d2", {sweep_page.VARIED: "method"})
    assert again == parent != other
    done = child(store, parent, "grpo", "0", 0.5)
    monkeypatch.setenv(tracking.PARENT_RUN, other)
    tracking.join_sweep(store.uri, done)  # skipped by the other sweep, as done before
    members = sweep_page.members(connect(store.uri), connect(store.uri).get_run(other))
    assert [run.info.run_id for run in members] == [done]
    sweep_page.write(store.uri, other)
    assert "| method=grpo" in connect(store.uri).get_run(other).data.tags[tracking.NOTE]


def test_a_page_of_many_runs_fits_in_a_tag(store):
    parent = tracking.open_parent(store.uri, "pages", None, "many", "d3", {sweep_page.VARIED: "method seed"})
    runs = [child(store, parent, f"m{i:02d}|", str(i), 0.5) for i in range(60)]
    run = connect(store.uri).get_run(parent)
    table = sweep_page.runs_table([connect(store.uri).get_run(r) for r in runs], ["method", "seed"])
    text = sweep_page.description(run, table, sweep_page.summarise(table))
    assert len(text) <= sweep_page.TAG_LIMIT and "m59\\|" in text and "#/experiments" not in text


def test_a_store_that_is_away_is_reported_and_not_raised(store, capsys):
    sweep_page.write(store.uri, "0" * 32)
    assert "is not up to date" in capsys.readouterr().err
