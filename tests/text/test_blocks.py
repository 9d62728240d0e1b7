"""Find blocks in text: cases worked out by hand, and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bae.text.blocks import find_spans, make_blocks
from bae.text.number import parse_confidence

BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
TAGS = [f"<{slash}{tag}>" for tag in ("reasoning", "answer", "analysis", "confidence") for slash in ("", "/")]
SOLUTION = "<reasoning>1+1</reasoning><answer>2</answer>"
CONFIDENCE = "<analysis>sure</analysis><confidence>0.9</confidence>"


def test_a_completion_in_form():
    spans = find_spans(SOLUTION + CONFIDENCE, BLOCKS)
    assert spans.starts == (0, len(SOLUTION))
    assert spans.well_formed == (True, True)
    assert [(s.tag, s.content) for s in spans.sections] == [
        ("reasoning", "1+1"),
        ("answer", "2"),
        ("analysis", "sure"),
        ("confidence", "0.9"),
    ]


@pytest.mark.parametrize(
    ("text", "start", "reason"),
    [
        ("", 0, "<reasoning> was due, but the text ended"),
        (f"so {CONFIDENCE}", 0, "<reasoning> was due, but <analysis> came"),
        ("so <reasoning>1<answer>", 3, "</reasoning> was due, but <answer> came"),
        ("<reasoning>1</reasoning> so", 24, "<answer> was due, but the text ended"),
        (SOLUTION, len(SOLUTION), "<analysis> was due, but the text ended"),
        (f"{SOLUTION}{CONFIDENCE}.</answer>", len(SOLUTION + CONFIDENCE) + 1, "</answer> came after the last section"),
    ],
)
def test_a_fault_says_where_and_why(text, start, reason):
    fault = find_spans(text, BLOCKS).fault
    assert (fault.start, fault.reason) == (start, reason)
    assert find_spans(SOLUTION + CONFIDENCE, BLOCKS).fault is None


def test_the_fault_of_a_block_without_sections():
    blocks = make_blocks({"rest": [], "solution": ["answer"]})
    assert find_spans("so <answer>1</answer>", blocks).fault is None
    for text, reason in (
        ("so", "<answer> was due, but the text ended"),
        ("so </answer>", "<answer> was due, but </answer> came"),
    ):
        fault = find_spans(text, blocks).fault
        assert (fault.start, fault.reason) == (text.find("<") if "<" in text else len(text), reason)


@pytest.mark.parametrize(
    ("text", "well_formed", "starts"),
    [
        ("", (False, False), 1),
        ("just prose", (False, False), 1),
        ("<reasoning>1+1</reasoning>" + CONFIDENCE, (False, False), 1),  # no answer
        ("<reasoning>1+1</reasoning><answer>2", (False, False), 1),  # truncated in block 1
        (SOLUTION, (True, False), 2),  # stopped before block 2, which is block 2's fault
        (SOLUTION + "<analysis>hm", (True, False), 2),  # truncated in block 2
        (SOLUTION + "<analysis>hm</analysis>", (True, False), 2),  # no confidence
        (SOLUTION + CONFIDENCE + "<confidence>0.1</confidence>", (True, False), 2),  # two confidences
        (SOLUTION + SOLUTION + CONFIDENCE, (True, False), 2),  # two answers
        ("<reasoning><answer>2</answer></reasoning><answer>2</answer>" + CONFIDENCE, (False, False), 1),  # nested
        ("<reasoning>x</reasoning><answer><answer>2</answer>" + CONFIDENCE, (False, False), 1),
        ("</reasoning>" + SOLUTION + CONFIDENCE, (False, False), 1),
        ("\n " + SOLUTION + "\n\n" + CONFIDENCE + "\n bye", (True, True), 2),  # text around sections is allowed
        (SOLUTION.replace("answer", "Answer") + CONFIDENCE, (False, False), 1),  # tags are literal
    ],
)
def test_malformed_text(text, well_formed, starts):
    spans = find_spans(text, BLOCKS)
    assert spans.well_formed == well_formed
    assert len(spans.starts) == starts


@given(st.lists(st.sampled_from([*TAGS, "x", " ", "\n", "<", "0.5"]), max_size=16).map("".join))
def test_blocks_partition_any_text(text):
    spans = find_spans(text, BLOCKS)
    assert spans.starts[0] == 0
    assert list(spans.starts) == sorted(spans.starts)
    assert spans.starts[-1] <= len(text)
    assert all(spans.well_formed[: len(spans.starts) - 1])  # a later block is reached only through good ones
    assert not any(spans.well_formed[len(spans.starts) :])


def test_a_block_without_tags_takes_whatever_comes():
    blocks = make_blocks({"answer": ["answer"], "rest": []})
    spans = find_spans("<answer>1</answer> and <answer> more", blocks)
    assert spans.well_formed == (True, True)
    assert spans.starts == (0, len("<answer>1</answer>"))


def test_a_block_without_tags_ends_where_the_next_begins():
    blocks = make_blocks({"free": [], "answer": ["answer"], "confidence": ["confidence"]})
    text = "so 1 < 2 and <answer>1</answer>, sure: <confidence>0.9</confidence>"
    spans = find_spans(text, blocks)
    assert spans.well_formed == (True, True, True)
    assert spans.starts == (0, text.index("<answer>"), text.index(", sure"))
    assert find_spans("<answer>1</answer><confidence>1</confidence>", blocks).starts[:2] == (0, 0)  # of no length
    for broken in ("no end", "hm </answer><answer>1</answer>", "<confidence>0.9</confidence>"):
        assert find_spans(broken, blocks).well_formed == (False, False, False)
        assert find_spans(broken, blocks).starts == (0,)


def test_a_tag_may_recur():
    blocks = make_blocks({"first": ["reasoning", "answer"], "second": ["reasoning", "answer"]})
    twice = SOLUTION + SOLUTION.replace("2", "3")
    spans = find_spans(twice, blocks)
    assert spans.starts == (0, len(SOLUTION)) and spans.well_formed == (True, True)
    assert [s.content for s in spans.sections] == ["1+1", "2", "1+1", "3"]
    assert [s.start for s in spans.sections] == [
        twice.index("1+1"),
        twice.index("2<"),
        twice.rindex("1+1"),
        twice.index("3<"),
    ]
    assert find_spans(SOLUTION, blocks).well_formed == (True, False)
    assert find_spans(twice + "<answer>4</answer>", blocks).well_formed == (True, False)
    assert find_spans("<answer>2</answer>" + twice, blocks).well_formed == (False, False)


def test_tags_of_any_form():
    blocks = make_blocks(
        {
            "solution": [{"name": "answer", "opening": "Answer: ", "closing": "\n"}],
            "confidence": {"sections": [{"name": "confidence", "opening": "Answer: sure ", "closing": "."}]},
        }
    )
    text = "Answer: 2\nAnswer: sure 1."  # one opening tag begins as the other does
    spans = find_spans(text, blocks)
    assert spans.well_formed == (True, True) and spans.starts == (0, 10)
    assert [(s.tag, s.content) for s in spans.sections] == [("answer", "2"), ("confidence", "1")]
    plain = find_spans("x = 3.5\nor so. Answer: 2\nand.\nAnswer: sure .5.\n.", blocks)  # "." and "\n" where none is due
    assert plain.well_formed == (True, True) and [s.content for s in plain.sections] == ["2", ""]
    plain = find_spans("x = 3.5\nor so. Answer: 2\nand.\nAnswer: sure 1.\n.", blocks)
    assert plain.well_formed == (True, True) and [s.content for s in plain.sections] == ["2", "1"]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({}, "empty"),
        ({"a": [], "b": [], "c": ["x"]}, "a has no sections"),
        ({"a": ["x"], "b": {"sections": ["y"], "malformed": "ignore"}}, "b.malformed=ignore: choose penalise"),
        ({"a": [{"name": "x", "opening": "[["}]}, "a name, an opening and a closing"),
        ({"a": [{"name": "x", "opening": "", "closing": "]"}]}, "none of them empty"),
        ({"a": ["x", {"name": "y", "opening": "<x>", "closing": "]"}]}, "close with ']' and with '</x>'"),
        ({"a": ["<x>"]}, "not a word"),
        ({"a": {"sections": ["x"], "wieght": 2}}, "wieght"),
    ],
)
def test_a_bad_schema_is_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        make_blocks(schema)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.85", 0.85), (" 1 ", 1.0), ("1.0", 1.0), (".5", 0.5), ("0.", 0.0), ("0", 0.0), ("00.5\n", 0.5)],
)
def test_confidences(text, value):
    assert parse_confidence(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.7",
        "-0.1",
        "NaN",
        "inf",
        "85%",
        "1e-1",
        "0.5.5",
        "high",
        "0,5",
        "\u0660.\u0665",
        "9" * 10_000,
        "0." + "1" * 99,
    ],
)
def test_what_is_no_confidence(text):
    assert parse_confidence(text) is None
