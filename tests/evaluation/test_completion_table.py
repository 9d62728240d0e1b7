"""Make completion tables from completions."""

import pandas
import torch

from bae.batch import Completion, Problem
from bae.evaluation.completion_table import by_prompt, columns, frame, merge, pairs
from bae.text.blocks import Section
from bae.text.verdict import Verdict


def completion(prompt, answer, verdict, confidence):
    sections = (Section("reasoning", "…"), Section("answer", answer)) if answer else ()
    verdicts = (verdict,) if verdict else ()
    return Completion(
        Problem(prompt, "2+3=", "5"), "…", sections, (True, True), (confidence,), 7, False, verdicts=verdicts
    )


def test_a_row_for_each_completion():
    made = [completion("a", "5", Verdict.CORRECT, 0.9), completion("a", "6", Verdict.WRONG, None)]
    table = merge([frame([columns(made)]), frame([columns([completion("b", None, None, 0.2)])])])
    assert list(table["verdict"]) == ["correct", "wrong", "none"]
    assert [list(map(bool, group)) for group in by_prompt(table, "correct")] == [[True, False], [False]]
    q, c, prompt = pairs(table)
    assert prompt == ["a", "a", "b"]
    assert q.dtype == torch.double and q[0] == 0.9 and q[1].isnan() and q[2] == 0.2
    assert c.tolist() == [1, 0, 0]


def test_parquet_keeps_the_table(tmp_path):
    table = frame([columns([completion("a", "5", Verdict.CORRECT, 0.9), completion("a", None, None, None)])])
    table.to_parquet(tmp_path / "t.parquet", index=False)
    again = pandas.read_parquet(tmp_path / "t.parquet")
    assert again["verdict"].tolist() == table["verdict"].tolist()
    assert pairs(again).confidence.isnan().tolist() == [False, True]
