"""Read completions that someone else wrote; what cannot be used is refused with its row, or warned of."""

import json

import pandas
import pytest

from bae.evaluation.read_completions import read_completions
from bae.text.blocks import read_section
from bae.text.verifier import IntegerVerifier, MathVerifier
from tests.support import DATA, needs

TAGS = {"answer": "answer", "confidence": "confidence"}
NAMES = {"text": "completion", "reference": "answer", "question": "problem", "model": None}


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


JUDGED = [{"right": True, "q": 0.5}, {"right": "wrong", "q": "0.25"}, {"right": 1, "q": None}]
AS_THEY_ARE = NAMES | {"correct": "right", "confidence": "q", "question": None}


def read(path, rows, names=AS_THEY_ARE, tags=TAGS, verifier=None):
    return read_completions(write(path / "a.jsonl", rows), names, tags, verifier)["completions"]


def test_verdicts_are_taken_without_texts_references_and_a_verifier(tmp_path):
    with pytest.warns(UserWarning, match=r"a\.jsonl, row 3: it states no confidence .* 1 of 3 rows"):
        table = read(tmp_path, JUDGED)
    assert list(table["correct"]) == [True, False, True] and list(table["verdict"]) == ["correct", "wrong", "correct"]
    assert list(table["confidence"][:2]) == [0.5, 0.25] and "answer" not in table


def test_our_own_tables_are_read_again(tmp_path):
    """So a table of a run can be measured anew, also from its verdicts."""
    made = pandas.DataFrame({"verdict": ["correct", "none", "timeout"], "confidence": [0.5, 0.25, 1.0]})
    made.to_parquet(tmp_path / "val.parquet")
    names = {"correct": "verdict", "confidence": "confidence"}
    table = read_completions(str(tmp_path / "val.parquet"), names, TAGS, None)["completions"]
    assert list(table["correct"]) == [True, False, False] and list(table["confidence"]) == [0.5, 0.25, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": "high"}, r"row 2: columns.confidence=q is 'high'; it must be a number from 0 to 1, or empty"),
        ({"q": 85}, "row 2: columns.confidence=q is 85; it must be a number from 0 to 1"),
        ({"q": True}, "row 2: columns.confidence=q is True; it must be a number"),
        ({"q": [0.5]}, "row 2: .* it must be a number"),
        ({"right": None}, "row 2: columns.correct=right is None; it must be true or false"),
        ({"right": "perhaps"}, "row 2: columns.correct=right is 'perhaps'"),
    ],
)
def test_a_verdict_or_confidence_that_cannot_be_read_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [JUDGED[0], JUDGED[1] | change])


def test_a_row_that_lacks_a_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: columns.correct=right is missing; it must be"):
        read(tmp_path, [JUDGED[0], {"q": 0.5}])


def test_a_text_that_is_null_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 2: columns.text=completion is None; it must be a text"):
        read(tmp_path, [ROWS[0], ROWS[1] | {"completion": None}], NAMES, verifier=IntegerVerifier())


def test_a_tag_that_no_text_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tags.answer=final: no row of .* exactly one <final>…</final>; name the tag"):
        read(tmp_path, ROWS[:2], NAMES, TAGS | {"answer": "final"}, IntegerVerifier())


@pytest.mark.parametrize("stated", ["NaN", "high", "85%"])
def test_confidences_that_cannot_be_read_are_warned_of(tmp_path, stated):
    rows = [ROWS[0], ROWS[0] | {"completion": f"<answer>5</answer><confidence>{stated}</confidence>"}]
    with pytest.warns(UserWarning, match=r"row 2: it states no confidence that can be read; 1 of 2 rows"):
        table = read(tmp_path, rows, NAMES, verifier=IntegerVerifier())
    assert table["confidence"].isna().tolist() == [False, True]


def test_references_that_match_no_answer_are_warned_of(tmp_path):
    """For instance the letters of choices, where the answers are texts."""
    rows = [{"problem": f"{n}?", "answer": "B", "completion": "<answer>hyperbola</answer>"} for n in range(2)]
    rows = [row | {"completion": row["completion"] + "<confidence>0.5</confidence>"} for row in rows]
    verifier = MathVerifier(workers=1)
    with pytest.warns(UserWarning, match=r"row 1: .* finds 'hyperbola' .* reference 'B', and none of 2"):
        read(tmp_path, rows, NAMES, verifier=verifier)
    verifier.close()
