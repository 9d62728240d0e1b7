"""SIGKILL at many places of a run that logs. benchmarks/faults.py has the places; `make faults` runs them, too."""

import importlib.util
import re
import sys

import pytest

from tests.support import ROOT


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    module = sys.modules["faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 48 runs, of seconds each on an idle machine
@pytest.mark.parametrize("name", ["sigkill", "sigkill_logging"])
def test_forty_kills_leave_the_undisturbed_record(faults, tmp_path, name):
    outcomes = list(faults.FAULTS[name].inject(40, tmp_path))
    assert len(outcomes) >= 40 and not any(outcomes), [outcome for outcome in outcomes if outcome]


def test_a_hole_a_repetition_and_another_value_are_seen(faults):
    """That the comparison can fail."""
    whole = {"a": [(1, "0.1"), (2, "0.2")], "status": "FINISHED", "artifact x.json": b"1"}
    assert faults.differences(whole, dict(whole)) is None
    for key, value in (("a", [(1, "0.1")]), ("a", [(1, "0.1"), (2, "0.2"), (2, "0.2")]), ("status", "RUNNING")):
        assert faults.differences(whole | {key: value}, whole) == f"differs in {key}"
    assert faults.differences({"runs": 2}, whole)


def test_rows_of_other_faults_stay(faults, tmp_path):
    for fault, survived in (("a", 1), ("b", 2), ("a", 3)):
        faults.write_row(tmp_path / "x.csv", {"promise": "p", "fault": fault, "injected": 3, "survived": survived})
    assert (tmp_path / "x.csv").read_text().splitlines() == ["promise,fault,injected,survived", "p,b,3,2", "p,a,3,3"]


def test_every_marked_fault_has_a_promise(faults):
    marks = re.findall(r'pytest.mark.fault\("(\w+)"\)', "".join(f.read_text() for f in (ROOT / "tests").rglob("*.py")))
    assert set(marks) == set(faults.PROMISES)
