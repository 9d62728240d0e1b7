"""bae-sync: what was logged while the store was away is sent later, by one command."""

import re
import time

import pytest

from bae.commands import report, sync
from bae.commands import train as command
from bae.report.run_log import RunLog
from bae.report.tracking import MLflowRun
from tests.support import call
from tests.support.mlflow_server import serving


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


def bae_sync(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bae-sync", *arguments])
    sync.main()


@pytest.mark.fault("store")
def test_a_run_trains_without_its_store_and_is_sent_later(tmp_path, monkeypatch, capsys):
    """The store is away from the first request to after the end."""
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "artifacts") as server:
        uri, port = server.uri, server.server_address[1]
    small = ["group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=8", "callbacks.throughput.seconds=0.01"]
    call(command, tmp_path / "outputs", "steps=2", *small, f"logger.tracking_uri={uri}", "logger.wait=0.1")
    said = capsys.readouterr()
    (run,) = re.findall(r"bae-sync run=(\S+)", said.err)
    assert "after" in said.out and f"not in {uri} yet" in said.out  # the table is that of the log
    with pytest.raises(SystemExit, match="entries wait for the MLflow store"):
        bae_sync(monkeypatch, f"run={run}")
    assert report.unsent(tmp_path / "outputs") and run in report.unsent(tmp_path / "outputs")[0]
    with serving(tmp_path / "artifacts", port) as server:
        bae_sync(monkeypatch, f"run={tmp_path / 'outputs'}")
        (run_id,) = server.runs
        assert server.runs[run_id]["info"]["status"] == "FINISHED"
        assert [step for step, _ in server.history(run_id)["train/accuracy"]] == [1, 2]
        assert [step for step, _ in server.history(run_id)["val/accuracy"]] == [0, 2]
        assert server.runs[run_id]["params"]["steps"] == "2"
        files = {path.relative_to(tmp_path / "artifacts" / run_id).parts[0] for path in
                 (tmp_path / "artifacts" / run_id).rglob("*")}  # fmt: skip
        assert files == {"config.yaml", "completions", "pictures", "policy"}
        call(command, tmp_path / "outputs", f"resume={run}", "steps=3", "logger.wait=60")
        assert [step for step, _ in server.history(run_id)["train/accuracy"]] == [1, 2, 3] and len(server.runs) == 1
    assert report.unsent(tmp_path / "outputs") == []


def test_all_runs_below_a_folder_are_sent(tmp_path, monkeypatch, capsys):
    uri = "http://127.0.0.1:1"  # nobody listens there
    for name in ("a", "b"):
        logger = MLflowRun(uri, "e", str(tmp_path / "runs" / name), wait=0.1)
        logger.log_metrics({"x": 1.0}, 1)
        logger.close(0.1)
    time.sleep(2)  # the workers let go
    with serving(tmp_path / "artifacts") as server:
        bae_sync(monkeypatch, f"run={tmp_path}", f"tracking_uri={server.uri}")
        assert len(server.runs) == 2
    assert capsys.readouterr().out.count("2 entries sent") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to send"),
        (["run=/no/such/folder"], "no run below it"),
        (["rum=x"], "no key rum; did you mean run"),
        (["run=log", "tracking_uri=http://a:b@c"], "tracking_uri: this address has a user name"),
        (["run=log"], "2 entries wait for the MLflow store http://127.0.0.1:1 does not answer"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    log = RunLog(tmp_path / "log")
    uri = "http://127.0.0.1:1"
    log.append("run", id="x", name="n", experiment="e", artifacts=None, tracking_uri=uri, tags={})
    log.append_metrics({"x": 1.0}, 1)
    with pytest.raises(SystemExit) as stopped:
        bae_sync(monkeypatch, *arguments)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
