"""Make completion tables from completions, and from files that someone else wrote."""

import json

import pandas
import pytest
import torch

from bae.batch import Completion, Problem
from bae.evaluation.completion_table import by_prompt, columns, frame, merge, pairs, read_completions
from bae.text.blocks import Section, read_section
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier, MathVerifier
from tests.support import DATA, needs

TAGS = {"answer": "answer", "confidence": "confidence"}
NAMES = {"text": "completion", "reference": "answer", "question": "problem", "model": None}


def completion(prompt, answer, verdict, confidence):
    sections = (Section("reasoning", "…"), Section("answer", answer)) if answer else ()
    verdicts = (verdict,) if verdict else ()
    return Completion(Problem(prompt, "2+3=", "5"), "…", sections, (True, True), verdicts, (confidence,), 7, False)


def test_a_row_for_each_completion():
    made = [completion("a", "5", Verdict.CORRECT, 0.9), completion("a", "6", Verdict.WRONG, None)]
    table = merge([frame([columns(made)]), frame([columns([completion("b", None, None, 0.2)])])])
    assert list(table["verdict"]) == ["correct", "wrong", "none"]
    assert [list(map(bool, group)) for group in by_prompt(table, "correct")] == [[True, False], [False]]
    q, c, prompt = pairs(table)
    assert prompt == ["a", "a", "b"]
    assert q.dtype == torch.double and q[0] == 0.9 and q[1].isnan() and q[2] == 0.2
    assert c.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<answer>5</answer>", "5"),
        ("a<answer></answer>b", ""),
        ("<answer>5</answer><answer>6</answer>", None),  # which of the two?
        ("<answer>5", None),
        ("</answer>5<answer>", None),
        ("<answer><answer>5</answer>", None),
        ("", None),
    ],
)
def test_a_section_counts_if_its_tags_come_once(text, content):
    assert read_section(text, "answer") == content


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


ROWS = [
    {"problem": "2+3=", "answer": "5", "completion": "<answer>5</answer><confidence>0.9</confidence>", "who": "x/y"},
    {"problem": "2+3=", "answer": "5", "completion": "<answer>6</answer><confidence>1.7</confidence>", "who": "x/y"},
    {"problem": "2+4=", "answer": "6", "completion": "<answer>six</answer>", "who": "z"},
    {"problem": "2+4=", "answer": "6", "completion": "6", "who": "z"},
]


def test_completions_of_others(tmp_path):
    tables = read_completions(write(tmp_path / "a.jsonl", ROWS), NAMES | {"model": "who"}, TAGS, IntegerVerifier())
    assert list(tables) == ["x/y", "z"]
    first, second = tables.values()
    assert list(first["verdict"]) == ["correct", "wrong"] and first["confidence"].isna().tolist() == [False, True]
    assert list(second["verdict"]) == ["unparseable", "none"]
    assert first["prompt"].nunique() == second["prompt"].nunique() == 1


def test_every_row_is_a_prompt_without_questions(tmp_path):
    names = NAMES | {"question": None}
    (table,) = read_completions(write(tmp_path / "a.jsonl", ROWS), names, TAGS, IntegerVerifier()).values()
    assert table["prompt"].nunique() == 4


def test_a_file_that_does_not_fit_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"columns.text=output: .* has no such column; it has problem, answer"):
        read_completions(write(tmp_path / "a.jsonl", ROWS), NAMES | {"text": "output"}, TAGS, IntegerVerifier())
    with pytest.raises(ValueError, match="no rows"):
        read_completions(write(tmp_path / "b.jsonl", []), NAMES, TAGS, IntegerVerifier())


def test_a_bad_reference_is_named_or_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS[:3], ROWS[3] | {"answer": "A) 6"}, ROWS[3] | {"answer": None}])
    with pytest.raises(ValueError, match=r"a\.jsonl: 2 of 5 .* row 4, 'A\) 6': it is not .* with unreadable=drop"):
        read_completions(path, NAMES, TAGS, IntegerVerifier())
    with pytest.warns(UserWarning, match="2 of 5 rows are left out"):
        (table,) = read_completions(path, NAMES, TAGS, IntegerVerifier(), "drop").values()
    assert list(table["verdict"]) == ["correct", "wrong", "unparseable"] and list(table["reference"]) == ["5", "5", "6"]


def test_parquet_keeps_the_table(tmp_path):
    table = frame([columns([completion("a", "5", Verdict.CORRECT, 0.9), completion("a", None, None, None)])])
    table.to_parquet(tmp_path / "t.parquet", index=False)
    again = pandas.read_parquet(tmp_path / "t.parquet")
    assert again["verdict"].tolist() == table["verdict"].tolist()
    assert pairs(again).confidence.isnan().tolist() == [False, True]


@needs("rlcr_math500_completions.jsonl")
@pytest.mark.slow
def test_confidences_of_published_completions_are_read_as_published():
    """Where a completion of RLCR has exactly one well-formed number, ours is theirs.

    Not read are percentages (`90.`, which they divide by 100), nested or repeated tags, and the model that states none.
    """
    file = DATA / "rlcr_math500_completions.jsonl"
    verifier = MathVerifier()
    names = NAMES | {"model": "model"}
    ours = pandas.concat(read_completions(str(file), names, TAGS, verifier).values())
    verifier.close()
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    published = {(row["completion"], row["problem"]): row["published_confidence"] for row in rows}
    read = ours[ours["confidence"].notna()]
    assert len(ours) == 1500 and len(read) == 905
    for row in read.itertuples():
        assert row.confidence == pytest.approx(published[row.text, row.question], abs=1e-12)
