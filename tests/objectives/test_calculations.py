"""The process reward: which calculations of a text are right, by hand, and that no text breaks it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bae.batch import Completion, Problem
from bae.commands import train
from bae.objectives.calculations import calculations, right_calculations
from bae.text.blocks import Section
from tests.support import call, runs

RIGHT, WRONG = [True], [False]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7 + 7 = 14", RIGHT),
        ("7 + 7 = 15", WRONG),
        ("2 + 3 * 4 = 14", RIGHT),
        ("20 - 2 - 3 = 15", RIGHT),
        ("12/3/2 = 2", RIGHT),
        ("2 + 3 = 5 + 1 = 6", [False, True]),  # each equals sign is asked about
        ("so 3+4=7, and 7*2=13.", [True, False]),
        ("48/2 = <<48/2=24>>24", RIGHT),  # GSM8K's own notes
        ("- 7 + 5 = 12\n* 3 × 4 = 12\n2. 8 ÷ 4 = 2", [True] * 3),  # noqa: RUF001  bullets are no signs
        ("-7 + 5 = -2", RIGHT),
        ("$1,200 * 2 = $2,400.", RIGHT),
        ("x = 3 + 4 = 7", RIGHT),
        ("0.1 + 0.2 = 0.3", RIGHT),
        ("10 / 3 = 3.33", RIGHT),  # rounded
        ("10 / 3 = 3.34", WRONG),
        ("10 / 3 = 3.3", WRONG),  # too short to tell
        ("0.5 * 0.5 = 0.3", WRONG),
        ("5 = 5", []),  # nothing is worked out
        ("x + 3 = 7", []),
        ("2x + 3 = 7", []),
        ("3 + 4 = 7x", []),
        ("2^3 + 1 = 9", []),
        ("20% - 5 = 15", []),
        ("(2+3)*4 = 20", []),
        ("\\sqrt{9} + 1 = 4", []),
        ("1/0 = 5", []),
        ("9 - -3 = 12", []),
        ("3 4 = 12", []),
        ("12345678901234567890 + 1 = 2", []),
        (" + ".join(["1"] * 11) + " = 11", []),  # longer than is read
        ("= = =", []),
        ("", []),
    ],
)
def test_by_hand(text, found):
    assert calculations(text) == found


def written(*sections):
    return Completion(Problem("p", "2+3=", "5"), "", sections, (True,), (), 9, False, verdicts=())


def test_the_share_of_all_sections_of_that_name():
    first, second = Section("reasoning", "1 + 1 = 2, 2 + 2 = 5"), Section("reasoning", "3 + 3 = 6 and 6 + 1 = 7")
    assert right_calculations(written(first, Section("answer", "1 + 1 = 3"), second)) == 0.75
    assert right_calculations(written(Section("reasoning", "It is clear.")), empty=0.2) == 0.2
    assert right_calculations(written(Section("answer", "7"))) is None  # no such section


@given(st.integers(-999, 999), st.integers(1, 999), st.sampled_from("+-*/"), st.integers(-2, 2))
def test_a_calculation_is_right_if_its_result_is(a, b, operator, off):
    if operator == "/":
        a *= b
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
    assert calculations(f"We have {a} {operator} {b} = {result + off}.") == [off == 0]


@given(st.text(alphabet="0123456789 +-*/=.,$%^()x\n", max_size=200))
def test_any_text_is_read(text):
    assert all(isinstance(right, bool) for right in calculations(text))


@pytest.mark.parametrize("part", ["1+", "=", "1=", "1 ", "1,234", "- ", "1/3=", "9" * 15 + "*"])
def test_long_texts_take_linear_time(part):
    start = time.process_time()
    calculations(part * (10**5 // len(part)))
    assert time.process_time() - start < 5.0  # .1 s to .3 s


def test_each_section_has_its_own_reward(tmp_path):
    short = ["steps=1", "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=4",
             "callbacks.held_out.samples=2", "callbacks.checkpoints.log_policy=false"]  # fmt: skip
    call(train, tmp_path / "outputs", "objectives=process", *short)
    _, (run,) = runs(tmp_path / "outputs")
    assert {f"train/block_zero_signal/{block}" for block in ("reasoning", "answer", "confidence")} <= set(
        run.data.metrics
    )
    for name in ("calculations", "leads_to_right", "correctness", "confidence_brier"):
        assert f"train/reward/{name}" in run.data.metrics
    assert run.data.metrics["train/reward/calculations"] == 0  # the tiny policy writes running totals alone
