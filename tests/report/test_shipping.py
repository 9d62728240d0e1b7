"""Faults of a store: whatever it does, the run goes on at once, and in the end the store has everything once."""

import json
import sqlite3
import threading
import time

import pandas
import pytest

from bae.report import shipping, tracking
from bae.report.run_log import RUN_FILE, RunLog, Sent
from tests.support.mlflow_server import serving


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """MLflow tries once, and we try again at once, so that tests take seconds."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(shipping, "LONGEST_PAUSE", 0.2)


def log_steps(logger, steps):
    """Log as a run does; returns the longest time that a step took."""
    longest = 0.0
    for step in steps:
        start = time.perf_counter()
        logger.log_metrics({"train/accuracy": step / 10, "val/accuracy": step / 100}, step)
        logger.log_completions({"text": [f"step {step}"]}, step)
        longest = max(longest, time.perf_counter() - start)
    return longest


def expected(steps):
    return {"train/accuracy": [(s, repr(s / 10)) for s in steps], "val/accuracy": [(s, repr(s / 100)) for s in steps]}


def sync(folder, uri):
    shipper = shipping.Shipper(RunLog(folder), uri)
    with shipper.alone(timeout=5):
        while shipper.send():
            pass
    return shipper.sent.run_id


@pytest.mark.fault("store")
@pytest.mark.parametrize("fault", ["error", "abort", "freeze"])
def test_a_store_that_fails_delays_nothing_and_gets_everything_once(tmp_path, capsys, fault):
    with serving(tmp_path / "artifacts") as server:
        logger = tracking.MLflowRun(server.uri, "e", str(tmp_path / "run"))
        log_steps(logger, [1, 2])
        deadline = time.monotonic() + 30
        while logger.log.unsent() and time.monotonic() < deadline:
            time.sleep(0.02)
        server.fault = fault
        assert log_steps(logger, range(3, 9)) < 1
        time.sleep(0.5)
        server.fault = None
        server.released.set()
        logger.finalize("success")
        (run_id,) = server.runs
        assert server.history(run_id) == expected(range(1, 9))
        assert server.runs[run_id]["info"]["status"] == "FINISHED"
        assert len(list((tmp_path / "artifacts").rglob("step_*.json"))) == 8
        assert logger.run_id == run_id == (tmp_path / "run" / RUN_FILE).read_text()
    said = capsys.readouterr().err
    assert said.count("does not take what this run logs") <= 1 and "bae-sync" not in said


@pytest.mark.fault("store")
def test_a_run_begins_and_ends_without_its_store(tmp_path, capsys):
    """Nobody listens at the address; later somebody does, and the log is sent there."""
    with serving(tmp_path / "artifacts") as server:
        uri, port = server.uri, server.server_address[1]
    logger = tracking.MLflowRun(uri, "e", str(tmp_path / "run"), wait=0.5)
    assert log_steps(logger, [1, 2, 3]) < 1
    start = time.perf_counter()
    logger.finalize("success")
    assert time.perf_counter() - start < 3
    assert f"send them later with: bae-sync run={tmp_path / 'run'}" in capsys.readouterr().err
    assert logger.run_id is None and not (tmp_path / "run" / RUN_FILE).exists()
    time.sleep(1.5)  # the worker, which was told to stop, lets go of the log
    with serving(tmp_path / "artifacts", port) as server:
        run_id = sync(tmp_path / "run", uri)
        assert server.history(run_id) == expected([1, 2, 3])
        assert server.runs[run_id]["info"]["status"] == "FINISHED"
        assert sync(tmp_path / "run", uri) == run_id and server.history(run_id) == expected([1, 2, 3])


@pytest.mark.fault("store")
def test_the_end_of_a_run_waits_for_a_frozen_store_as_long_as_told(tmp_path):
    with serving(tmp_path / "artifacts") as server:
        server.fault = "freeze"
        logger = tracking.MLflowRun(server.uri, "e", str(tmp_path / "run"), wait=1)
        assert log_steps(logger, [1, 2, 3]) < 1
        start = time.perf_counter()
        logger.finalize("success")
        assert 0.9 < time.perf_counter() - start < 3
        assert logger.log.unsent() == 8  # the run, three steps with a table each, and the status


@pytest.mark.fault("store")
@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_locked_database_delays_nothing(tmp_path, store, capsys, seconds):
    tracking.prepare_store(store.uri, "locked", str(tmp_path / "artifacts"))
    logger = tracking.MLflowRun(store.uri, "locked", str(tmp_path / "run"))
    log_steps(logger, [1])
    lock = sqlite3.connect(store.uri.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    threading.Timer(seconds, lambda: lock.execute("ROLLBACK")).start()
    assert log_steps(logger, [2, 3]) < 1
    logger.finalize("success")
    lock.close()
    for metric, values in expected([1, 2, 3]).items():
        found = [(m.step, repr(m.value)) for m in store.client.get_metric_history(logger.run_id, metric)]
        assert sorted(found) == values
    assert "bae-sync" not in capsys.readouterr().err


@pytest.mark.fault("store")
@pytest.mark.parametrize("forgotten", ["the last entries", "everything", "the run, too"])
def test_sending_twice_changes_nothing(tmp_path, store, forgotten):
    """Killed after the store had an entry, before it was written down; or power was lost, and sent.json with it."""
    folder = tmp_path / "run"
    logger = tracking.MLflowRun(store.uri, "twice", str(folder), str(tmp_path / "artifacts"))
    log_steps(logger, [1, 2])
    logger.finalize("success")
    offsets = [offset for _, offset in logger.log.entries()]
    if forgotten == "the last entries":
        logger.log.mark_sent(Sent(offsets[1], logger.run_id))
    else:
        (folder / "tracking" / "sent.json").unlink()
    if forgotten == "the run, too":
        (folder / RUN_FILE).unlink()
    before = [run.info.run_id for run in tracking.search(store.uri, ["twice"], "")]
    run_id = sync(folder, store.uri)
    assert [run.info.run_id for run in tracking.search(store.uri, ["twice"], "")] == before and run_id in before
    assert [(m.step, m.value) for m in store.client.get_metric_history(run_id, "train/accuracy")] == [
        (1, 0.1),
        (2, 0.2),
    ]
    table = store.client.download_artifacts(run_id, "completions/step_000002.json", str(tmp_path))
    assert pandas.read_json(table, orient="split").equals(pandas.DataFrame({"text": ["step 2"]}))
    listed = json.loads(store.client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert [table["path"] for table in listed] == [f"completions/step_00000{step}.json" for step in (1, 2)]


@pytest.mark.fault("store")
def test_what_the_store_refuses_for_good_holds_up_nothing(tmp_path, store, capsys):
    logger = tracking.MLflowRun(store.uri, "sent", str(tmp_path / "run"), str(tmp_path / "artifacts"))
    logger.log.append(
        "run",
        id="refused",
        name=None,
        experiment="sent",
        artifacts=str(tmp_path / "artifacts"),
        tracking_uri=store.uri,
        tags={},
    )
    logger.log.append("metrics", metrics=[["good", 1.0, 1]])
    logger.log.append("metrics", metrics=[["a=b", 1.0, 1]])  # MLflow allows no such name
    logger.log.append("of a later version", text="x")
    logger.log_metrics({"good": 2.0}, 2)
    logger.finalize("success")
    run = store.client.get_run(logger.run_id)
    assert run.data.metrics == {"good": 2.0} and run.info.status == "FINISHED"
    assert "MLflow refused an entry" in capsys.readouterr().err


@pytest.mark.fault("store")
def test_only_one_process_sends_a_log(tmp_path, store):
    logger = tracking.MLflowRun(store.uri, "sent", str(tmp_path / "run"), str(tmp_path / "artifacts"), wait=0.3)
    with shipping.Shipper(RunLog(tmp_path / "run"), store.uri).alone(timeout=1):
        log_steps(logger, [1])
        logger.finalize("success")
        assert logger.log.unsent() == 4
    time.sleep(1.5)
    sync(tmp_path / "run", store.uri)
    assert logger.log.unsent() == 0


def test_more_tables_than_a_tag_can_list(tmp_path, store):
    logger = tracking.MLflowRun(store.uri, "sent", str(tmp_path / "run"), str(tmp_path / "artifacts"))
    logger.set_tags(
        {"mlflow.loggedArtifacts": "[" + ", ".join(['{"path": "completions/x.json", "type": "table"}'] * 160) + "]"}
    )
    logger.log_completions({"text": ["x"]}, 7)
    logger.finalize("success")
    tag = store.client.get_run(logger.run_id).data.tags["mlflow.loggedArtifacts"]
    assert len(tag) <= shipping.TAG_LIMIT and "step_000007.json" in tag


def test_what_a_log_names_outside_its_folder_is_not_sent(tmp_path, capsys):
    """The log may be a stranger's: it cannot make a file of this machine go to a store."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = tracking.MLflowRun(uri, "test", str(tmp_path / "run"), artifacts=str(tmp_path / "artifacts"))
    logger.begin()
    for name in (str(secret), "../secret"):
        logger.log.append("artifact", file=name, to="stolen")
    logger.set_status("FINISHED")
    logger.close()
    assert logger.log.unsent() == 0 and "outside the run's folder" in capsys.readouterr().err
    assert not list((tmp_path / "artifacts").rglob("secret"))
