"""Test bae.text.short_answers and bae.text.abstention: right and wrong answers, and hostile ones."""

import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.text.abstention import AbstentionVerifier
from bae.text.short_answers import ChoiceVerifier, ExactVerifier, RegexVerifier, normalised
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier

CORRECT, WRONG, UNPARSEABLE, TIMEOUT = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE, Verdict.TIMEOUT
ABSTAINED = Verdict.ABSTAINED

EXACT = [
    # reference, right answers, wrong answers
    (
        "Paris",
        ["paris", "  Paris.", "PARIS", "the Paris", "'Paris'"],
        ["Paris, France", "Pari", "London", "Paris London"],
    ),
    ("The Beatles", ["Beatles", "the beatles!", "A Beatles"], ["Beatle", "The", "Rolling Stones"]),
    ("U.S.A.\nUnited States\nAmerica", ["USA", "the United States", "america"], ["United", "USA America", "U S A"]),
    ("Schindler's List", ["Schindler\u2019s List", "schindlers list"], ["Schindler List"]),
    ("1.5", ["1.5", "1.5.", "$1.5"], ["15", "1,5", "1-5", "-1.5", "1. 5"]),
    ("15", ["15", "15%", "#15"], ["1.5", "-15", "1/5", ".15", "1^5", "1:5", "1,5", "1'5", "$-15"]),
    ("-5", ["-5", "\u22125", "(-5)"], ["5", "- 5", "+5"]),
    ("1,000", ["1000", "1,000", "$1,000."], ["1.000", "1", "10,00", "1,0000", "1, 000"]),
    ("9/11", ["9/11", "9/11."], ["911", "9-11"]),
    ("The", ["the", "THE."], ["a", "an", ""]),
    ("?", ["?"], ["!", "the"]),
    ("café", ["cafe\u0301", "Café"], ["cafe"]),
]


@pytest.mark.parametrize(("reference", "right", "wrong"), EXACT)
def test_exact_match(reference, right, wrong):
    verifier = ExactVerifier()
    assert {
        a: v for a, v in zip(right, verifier.verify([(a, reference) for a in right]), strict=True) if v is not CORRECT
    } == {}
    found = verifier.verify([(a, reference) for a in wrong])
    assert {a: v for a, v in zip(wrong, found, strict=True) if v is not (WRONG if a else UNPARSEABLE)} == {}
    assert verifier.equivalent([(right[0], right[-1])]) == [len(reference.split("\n")) == 1]


SQUAD = ["The Norman Conquest", "10th and 11th centuries", "an apple, a day", "Rollo's", "Denmark, Iceland and Norway"]


@pytest.mark.parametrize("text", SQUAD)
def test_normalisation_is_squads_where_no_number_is_broken(text):
    """Compare with the function of SQuAD's evaluation script, written out."""
    plain = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
    words = [word for word in plain.split() if word not in ("a", "an", "the")]
    assert normalised(text) == " ".join(words)


OPTIONS = "B\nquandary\nrefrigerator\noven\nnight stand\nA"
TWICE = "D\nsupermarket\npantry\nmotherboard\nbar\nbar"


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        *[(OPTIONS, a, CORRECT) for a in ["B", "b", "(B)", "B.", "B)", " B:", "refrigerator", "Refrigerator.",
                                          "B. refrigerator", "(b) REFRIGERATOR", "B:\nrefrigerator"]],
        *[(OPTIONS, a, WRONG) for a in ["A", "c", "(D)", "oven", "night  stand", "D) night stand"]],
        *[(OPTIONS, a, UNPARSEABLE) for a in ["", "F", "Z", "B or C", "B, C", "BC", "A B", "B refrigerator", "B) oven",
                                              "a refrigerator", "the refrigerator", "not B", "(B", "refrigerator oven",
                                              "fridge", "1", "\u0412", "B) refrigerator or oven", "-B", "B" * 1001]],
        (TWICE, "D", CORRECT), (TWICE, "E", WRONG), (TWICE, "bar", UNPARSEABLE), (TWICE, "D) bar", CORRECT),
        ("B", "B", CORRECT), ("B", "(c)", WRONG), ("B", "refrigerator", UNPARSEABLE), ("B", "B. oven", UNPARSEABLE),
    ],
)  # fmt: skip
def test_choices(reference, answer, verdict):
    assert ChoiceVerifier().verify([(answer, reference)]) == [verdict]


def test_choices_that_are_the_same():
    pairs = [("B", "(b)"), ("B", "refrigerator"), ("Oven", "oven."), ("A", "B"), ("B) x", "B"), ("x", "y")]
    assert ChoiceVerifier().equivalent(pairs) == [True, False, True, False, False, False]


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        (r"colou?r", "Color", CORRECT), (r"colou?r", "colours", WRONG), (r"colou?r", "a color", WRONG),
        (r"(19|20)\d\d", "1999", CORRECT), (r"(19|20)\d\d", "1999\n", CORRECT), (r"(19|20)\d\d", "1999 2001", WRONG),
        (r"a|b", "ab", WRONG), (r"colou?r", "", UNPARSEABLE), (r"colou?r", "x" * 1001, UNPARSEABLE),
    ],
)  # fmt: skip
def test_regular_expressions(reference, answer, verdict):
    assert RegexVerifier().verify([(answer, reference)]) == [verdict]


def test_case_may_matter():
    verifier = RegexVerifier(ignore_case=False)
    assert verifier.verify([("NaCl", "NaCl"), ("nacl", "NaCl")]) == [CORRECT, WRONG]
    assert verifier.equivalent([("A", "a"), ("a ", "a")]) == [False, True]
    assert RegexVerifier().equivalent([("A", "a"), ("A", "b")]) == [True, False]


def test_a_text_that_is_made_for_an_expression_does_not_hang():
    start = time.process_time()
    found = RegexVerifier(timeout=0.1).verify([("a" * 200 + "b", r"(a|aa)+$"), ("a" * 40 + "!", r"(?:a|a)+x?")])
    assert found == [TIMEOUT, TIMEOUT] and time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("verifier", "reference", "why"),
    [
        (ExactVerifier(), " \n ", "it is blank"),
        (ChoiceVerifier(), "b", "its first line must be the letter"),
        (ChoiceVerifier(), "refrigerator", "its first line must be the letter"),
        (ChoiceVerifier(), "", "its first line must be the letter"),
        (ChoiceVerifier(), "C\nx\ny", "it has 2 options, and the letter C"),
        (ChoiceVerifier(), "A\nx\n \ny", "an option is blank"),
        (RegexVerifier(), "", "it is blank"),
        (RegexVerifier(), "(a", "it is no regular expression"),
        (RegexVerifier(), "a*", "it accepts an empty answer"),
        (AbstentionVerifier(ExactVerifier(), ["unknown"]), "Unknown", "it is a phrase that abstains"),
        (AbstentionVerifier(IntegerVerifier(), ["unknown"]), "five", "it is not an integer"),
    ],
)
def test_bad_references(verifier, reference, why):
    assert verifier.fault(reference).startswith(why)
    with pytest.raises(ValueError, match="cannot be read: " + why):
        verifier.submit([("x", reference)])


def test_bad_limits():
    with pytest.raises(ValueError, match=r"verifier\.max_chars=0: must be above 0"):
        ExactVerifier(0)
    with pytest.raises(ValueError, match=r"verifier\.timeout=inf: must be above 0, and finite"):
        RegexVerifier(timeout=float("inf"))
    for phrases in ([], ["x", " "]):
        with pytest.raises(ValueError, match=r"verifier\.phrases=.* no blank one"):
            AbstentionVerifier(ExactVerifier(), phrases)


def test_abstentions_are_neither_right_nor_wrong():
    verifier = AbstentionVerifier(IntegerVerifier(), ["I don't know", "unknown"])
    answers = ["5", "I don\u2019t know.", "6", "UNKNOWN", "5, or unknown", "unknown" * 100]
    pending = verifier.submit([(answer, "5") for answer in answers])
    assert pending() == pending() == [CORRECT, ABSTAINED, WRONG, ABSTAINED, UNPARSEABLE, UNPARSEABLE]
    pairs = [("unknown", "i dont know"), ("unknown", "5"), ("05", "5"), ("5", "6")]
    assert verifier.equivalent(pairs) == [True, False, True, False]


VERIFIERS = [(ExactVerifier(), "Marie Curie"), (ExactVerifier(), "3.14"), (ChoiceVerifier(), OPTIONS),
             (RegexVerifier(timeout=0.2), r"[A-Z][a-z]+ (\d+\.)*\d+"), (IntegerVerifier(), "-17"),
             (AbstentionVerifier(ChoiceVerifier(), ["unknown"]), OPTIONS)]  # fmt: skip
RIGHT = {"Marie Curie": "Marie Curie", "3.14": "3.14", OPTIONS: "refrigerator", VERIFIERS[3][1]: "Ab 1.2", "-17": "-17"}


@given(st.sampled_from(VERIFIERS), st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_breaks_a_verifier(case, text):
    verifier, reference = case
    assert isinstance(verifier.verify([(text, reference)])[0], Verdict)
    assert verifier.equivalent([(text, text)]) == [True]
    (one,), (other,) = verifier.equivalent([(text, RIGHT[reference])]), verifier.equivalent([(RIGHT[reference], text)])
    assert one == other  # symmetric


@given(st.sampled_from(VERIFIERS), st.data())
@settings(max_examples=300, deadline=None)
def test_no_perturbed_answer_is_accepted(case, data):
    """Insert, remove or change one letter or digit, or append a word: the answer is another one."""
    verifier, reference = case
    text = RIGHT[reference]
    place = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from("qxz789"))
    kind = data.draw(st.sampled_from(["insert", "remove", "change", "append"]))
    if kind == "append":
        changed = f"{text} {data.draw(st.sampled_from(['or oven', 'not', 'and 7', 'x', 'unknown']))}"
    elif kind == "insert":
        changed = text[:place] + new + text[place:]
    elif text[place].isalnum():
        changed = text[:place] + (new if kind == "change" else "") + text[place + 1 :]
    else:
        return
    if changed.lower() != text.lower() and not (isinstance(verifier, RegexVerifier) and kind != "append"):
        assert verifier.verify([(changed, reference)]) != [CORRECT]
