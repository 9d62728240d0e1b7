"""Test the rules of bae.text.answers through the comparison that the workers of MathVerifier make.

tests/text/answers/accepted.csv has answers in another form than the reference; most references are facts of MATH500
(MIT licence, openai/prm800k) and GSM8K (MIT licence, openai/grade-school-math). refused.csv has answers that are wrong,
or that would be a cheap way to a reward.
"""

import csv
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bae.text import answers
from bae.text.expressions import equal as _equal
from bae.text.spelling import canonical
from bae.text.verdict import Verdict
from bae.text.verifier import MathVerifier, _compare
from tests.support import DATA, needs

TABLES = Path(__file__).parent / "answers"
FALLS_SHORT = {"540m"}  # right, but not accepted


def table(name):
    with open(TABLES / name, encoding="utf-8", newline="") as file:
        return [(row["answer"], row["reference"]) for row in csv.DictReader(file)]


def math500():
    return [json.loads(line)["answer"] for line in (DATA / "math500.jsonl").read_text(encoding="utf-8").splitlines()]


def test_refused():
    pairs = table("refused.csv")
    assert len(set(pairs)) == len(pairs) >= 600
    assert [pair for pair in pairs if _compare(*pair) not in (Verdict.WRONG, Verdict.UNPARSEABLE)] == []


def test_accepted():
    pairs = table("accepted.csv")
    assert len(set(pairs)) == len(pairs) >= 700
    refused = {answer for answer, reference in pairs if _compare(answer, reference) is not Verdict.CORRECT}
    assert refused == FALLS_SHORT
    assert len(refused) <= 0.02 * len(pairs)


def test_verifier_judges_as_its_comparison():
    pairs = table("refused.csv")[::8] + table("accepted.csv")[::16]
    verifier = MathVerifier(timeout=20.0)
    assert verifier.verify(pairs) == [_compare(*pair) for pair in pairs]
    verifier.close()


@needs("math500.jsonl")
@pytest.mark.parametrize("form", [r"\boxed{{ {} }}", "$ {} $.", r"\( \displaystyle {}\)"])
def test_math500_against_itself(form):
    references = math500()
    assert len(references) == 500
    rewritten = [form.format(text.replace(r"\frac", r"\tfrac").replace("(", r" \left( ")) for text in references]
    pairs = zip(rewritten, references, strict=True)
    assert [pair for pair in pairs if _compare(*pair) is not Verdict.CORRECT] == []


@needs("math500.jsonl")
def test_expressions_of_math500_are_read():
    """Compare by value: with brackets around it, no text equals another as text."""
    compared = set()

    def equal(answer, reference):
        compared.add(answer)
        return _equal(f"({answer})" if "=" not in answer else f"{answer}+0", reference)

    for text in map(canonical, math500()):
        for item in answers._structure(text)[1]:
            if not answers._TEXT.fullmatch(item) and not answers._name(item) and not answers._structure(item)[0]:
                assert answers._same_value(item, item, equal), item
    assert len(compared) > 50


@needs("math500.jsonl")
@pytest.mark.parametrize("shift", [1, 7, 50])
def test_math500_against_another(shift):
    references = math500()
    same = {("5", "x=5")}  # 5 answers x=5
    for answer, reference in zip(references, references[shift:] + references[:shift], strict=True):
        verdict = _compare(answer, reference)
        expected = canonical(answer) == canonical(reference) or (answer, reference) in same
        assert (verdict is Verdict.CORRECT) == expected, (answer, reference, verdict)
        assert verdict is not Verdict.TIMEOUT


# Reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r" \boxed{ \dfrac12 }. ", r"\frac{1}{2}"),
        (r"$\left(3, \tfrac{\pi}{2}\right]$", r"(3,\frac{\pi}{2}]"),
        ("\N{MINUS SIGN}½ ÷ √13", r"-\frac{1}{2}/\sqrt{13}"),
        ("x²³ ≤ 5₈", r"x^{23}\le5_8"),
        (r"\$1{,}234.50", "$1234.50"),
        (r"10,\!080", "10080"),
        ("1,234 dollars", "1234dollars"),
        ("1 1/2", "1 1/2"),
        (r"\mathrm{east}", r"\text{east}"),
        ("3 and 5", "3;5"),
        (".5", ".5"),
        ("5.", "5"),
        (r"\boxed{1}+\boxed{2}", None),
        (r"\boxed{\boxed{1}}", None),
        ("1} or {2", None),
        (r"\( 5 )", None),
        ("(1,2]", "(1,2]"),
        ("(1,2}", None),
        (r"\boxed{5", None),
        ("", None),
        (" . ", None),
    ],
)
def test_canonical(text, expected):
    assert canonical(text) == expected


@given(st.text(max_size=30) | st.text(alphabet=r"\{}()[]$,;.=+-^_/ 15xe%", max_size=40))
def test_any_text_is_read(text):
    found = canonical(text)
    if found is not None:
        assert canonical(found) is not None
        for reference in ("5", "(1,2)", "1,-2", r"\sqrt{2}", r"\text{east}", "x+1"):
            answers.matches(found, reference, lambda one, other: False)
            answers.readable(found, reference)


@given(st.integers(-(10**6), 10**6), st.integers(1, 999), st.integers(-(10**6), 10**6), st.integers(1, 999))
def test_numbers_are_compared_exactly(a, b, c, d):
    equal = a * d == b * c
    one, other = (rf"\frac{{{x}}}{{{y}}}" if x % y else str(x // y) for x, y in ((a, b), (c, d)))
    assert answers.matches(one, other, lambda *_: pytest.fail("not for algebra")) == equal


@pytest.mark.parametrize(
    "part",
    ["(", "{", "[", "(1)", r"\frac{", r"\frac1", r"\sqrt(", "√", "½", "²", "1,", "1,234", "1 ", "a", "ab ", " ", "$",
     "x=", r"\pm", "<", "+", r"\text{a}", r"\text{", r"\boxed{", r"\cup", ";", " and ", "square ", "a/", "1/1", "\\",
     r"\cdot1", "\ud800", "\ufdfa", r"x\in "],
)  # fmt: skip
def test_hostile_texts_are_read_in_time(part):
    """The texts have 1000 characters, as many as an answer may have; the slowest takes 0.15 s on an idle core."""
    closing = "".join({"(": ")", "{": "}", "[": "]"}.get(sign, "") for sign in reversed(part * 499))
    for text in ((part * 1000)[:1000], (part * 1000)[:998] + " !", (part * 499)[: 1000 - len(closing)] + closing):
        start = time.process_time()
        found = canonical(text)
        for reference in ("5", r"\{1,2\}", r"\sqrt{2}") if found else ():
            answers.matches(found, reference, lambda one, other: False)
            answers.readable(found, reference)
        assert time.process_time() - start < 2.0
