"""The examples do what they and the tutorials say."""

import importlib.util
import json

import pytest
import torch

from tests.support import DATA, ROOT, needs


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ocb_leads_where_the_formula_says(tmp_path):
    bias = example("ocb_bias")
    assert bias.resting_point(0.75, 2) == pytest.approx(0.9)  # by hand, in the tutorial
    best = bias.main(tmp_path / "bias.svg", groups=20_000)
    assert best["OCB"] == pytest.approx(bias.resting_point(0.85, 8), abs=0.03)
    assert best["leave-one-out"] == pytest.approx(0.85, abs=0.03)
    assert (tmp_path / "bias.svg").stat().st_size > 5000


def test_a_stratum_of_two_keeps_one_part_of_signal():
    """The hand-worked table: in a pair of right answers each keeps half of its distance to the other."""
    bias = example("ocb_bias")
    reward = torch.tensor([-0.04, -0.36])
    ones = torch.ones(2)
    view = bias.RewardView(reward, torch.zeros(2, dtype=torch.long), ones, ones.bool())
    torch.testing.assert_close(reward - bias.outcome_conditioned(view), torch.tensor([0.16, -0.16]))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} is wrong, \boxed{4} is right", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1", None),
        ("none", None),
    ],
)
def test_the_last_box_is_the_answer(solution, answer):
    assert example("math_dapo").last_boxed(solution) == answer


def test_the_recipe_leaves_out_and_counts(tmp_path, capsys):
    def write(name, *rows):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    math = write("math.jsonl", {"problem": "What is $1+1$?", "solution": r"\boxed{2}"},
                 {"problem": "No box", "solution": "2"})  # fmt: skip
    dapo = write("dapo.jsonl", {"prompt": "What is 1 + 1?", "solution": "2"}, {"prompt": "Held out.", "solution": "5"},
                 {"prompt": "New", "solution": "7"}, {"prompt": "Bad", "solution": "(7"})  # fmt: skip
    held_out = write("test.jsonl", {"problem": "held out"})
    file = tmp_path / "train.jsonl"
    example("math_dapo").main([str(file), "--math", math, "--dapo", dapo, "--held-out", held_out])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"problem": "What is $1+1$?", "answer": "2"}, {"problem": "New", "answer": "7"}]
    out = capsys.readouterr().out
    assert "2 problems" in out and "'twice': 1" in out and "'held out': 1" in out and "can read': 2" in out


@needs("math500.jsonl")
def test_the_boxes_of_math500_are_its_answers():
    rows = [json.loads(line) for line in (DATA / "math500.jsonl").open(encoding="utf-8")]
    last_boxed = example("math_dapo").last_boxed
    same = sum(last_boxed(row["solution"]) == row["answer"] for row in rows)
    assert same / len(rows) > 0.97  # a few were corrected by hand


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="make docs installs nbclient")
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "first_look.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "accuracy" in printed and "ECE" in printed
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))
