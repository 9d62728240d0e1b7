"""The algorithm in one file runs, and prints what it says."""

import importlib.util
import re

from tests.support import ROOT

PATH = ROOT / "examples" / "minimal_loop.py"


def test_it_runs_and_prints_each_step(capsys):
    spec = importlib.util.spec_from_file_location("minimal_loop", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    last = example.main(2)
    lines = capsys.readouterr().out.splitlines()
    number = r"(\d\.\d{3})"
    found = [re.fullmatch(rf"step +(\d+)  accuracy {number}  ECE {number}  entropy {number}", line) for line in lines]
    assert [int(match[1]) for match in found] == [1, 2]
    assert all(0 < float(match[2]) < 1 and 0 < float(match[3]) < 1 for match in found)
    assert float(found[-1][3]) == round(last, 3)


def test_it_is_the_algorithm_without_lightning_and_hydra():
    source = PATH.read_text()
    assert not re.search(r"^(from|import) (lightning|hydra|mlflow)", source, re.MULTILINE)
    assert "python examples/minimal_loop.py [steps]" in source
