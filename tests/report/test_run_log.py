"""The log of a run: whole after any kill, each key and step once, and a queue that says how far it was sent."""

import json
import math

import pytest

from bae.report.run_log import LOG, RunLog, Sent, logs_below


def kinds(log):
    return [entry["kind"] for entry, _ in log.entries()]


def test_what_was_logged_is_read_back_exactly(tmp_path):
    log = RunLog(tmp_path)
    assert log.is_empty and list(log.entries()) == [] and log.unsent() == 0
    log.append("run", id="a")
    log.append_metrics({"x": 0.1 + 0.2, "y": math.nan, "z": -math.inf}, 3)
    _, (entry, end) = RunLog(tmp_path).entries()
    (key, value, step), y, z = entry["metrics"]
    assert (key, value, step) == ("x", 0.1 + 0.2, 3) and math.isnan(y[1]) and z[1] == -math.inf
    assert end == (tmp_path / LOG).stat().st_size


@pytest.mark.fault("store")
def test_a_step_made_again_is_logged_only_where_it_was_missing(tmp_path):
    """Killed between two metrics of step 2: train/ is there and val/ is not."""
    log = RunLog(tmp_path)
    log.append_metrics({"train/accuracy": 0.1}, 1)
    log.append_metrics({"val/accuracy": 0.5}, 1)
    log.append_metrics({"train/accuracy": 0.2}, 2)
    again = RunLog(tmp_path)  # resumed at step 1
    again.append_metrics({"train/accuracy": 0.2}, 2)
    again.append_metrics({"val/accuracy": 0.6}, 2)
    again.append_metrics({"train/accuracy": 0.3, "new": 1.0}, 3)
    assert RunLog(tmp_path).history("") == {
        "train/accuracy": {1: 0.1, 2: 0.2, 3: 0.3}, "val/accuracy": {1: 0.5, 2: 0.6}, "new": {3: 1.0}
    }  # fmt: skip
    values = [m for entry, _ in again.entries() for m in entry["metrics"]]
    assert len(values) == 6  # nothing twice


def test_an_evaluation_is_logged_again_only_where_it_differs(tmp_path):
    curve = [("eval/x", 0.25, 1), ("eval/x", math.nan, 2)]
    RunLog(tmp_path).append_results(curve)
    again = RunLog(tmp_path)
    again.append_results(curve)
    assert kinds(again) == ["results"]
    again.append_results([("eval/x", 0.5, 1), ("eval/x", math.nan, 2)])  # of a policy that was trained longer
    assert [e["metrics"] for e, _ in again.entries()][1] == [["eval/x", 0.5, 1]]
    again.append_results(curve)  # back again: the newest counts
    assert again.history("eval/")["eval/x"][1] == 0.25


@pytest.mark.fault("store")
@pytest.mark.parametrize("lost", range(1, 40, 4))
def test_a_torn_line_is_left_out_and_what_follows_is_whole(tmp_path, lost):
    log = RunLog(tmp_path)
    log.append_metrics({"a": 1.0}, 1)
    log.append_metrics({"a": 2.0}, 2)
    log.close()
    whole = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(whole[:-lost])
    again = RunLog(tmp_path)
    assert len(kinds(again)) == 1  # a line without its end counts as being written
    again.append_metrics({"a": 2.0, "b": 2.0}, 2)
    history = RunLog(tmp_path).history("")
    assert history == {"a": {1: 1.0, 2: 2.0}, "b": {2: 2.0}}


def test_it_knows_how_far_it_was_sent(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.append_metrics({"a": 1.0}, step)
    (_, first), *_ = log.entries()
    log.mark_sent(Sent(first, "id"))
    assert log.unsent() == 2 and RunLog(tmp_path).sent() == Sent(first, "id")
    (tmp_path / "tracking" / "sent.json").write_text("")  # a loss of power
    assert log.sent() == Sent() and log.unsent() == 3


def test_a_new_run_in_the_same_folder_logs_everything(tmp_path):
    """bae-evaluate completions= makes a run each time, of the same folder."""
    log = RunLog(tmp_path)
    for run in ("one", "two"):
        log.append("run", id=run)
        log.append_results([("eval/a", 1.0, 0)])
        log.append_metrics({"b": 1.0}, 1)
    assert kinds(log) == ["run", "results", "metrics"] * 2 and log.begun()["id"] == "two"


@pytest.mark.fault("store")
def test_a_full_disk_is_named(tmp_path):
    log = RunLog(tmp_path)
    (tmp_path / LOG).parent.mkdir()
    (tmp_path / LOG).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        log.append("run", id="a" * 10_000)


def test_logs_are_found_below_a_folder(tmp_path):
    for name in ("b", "a/deep"):
        RunLog(tmp_path / name).append("run", id=name)
    assert [log.folder for log in logs_below(tmp_path)] == [tmp_path / "a/deep", tmp_path / "b"]
    assert [log.folder for log in logs_below(tmp_path / "b")] == [tmp_path / "b"]
    assert json.loads((tmp_path / "b" / LOG).read_text())["id"] == "b"
