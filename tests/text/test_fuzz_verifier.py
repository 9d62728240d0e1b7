"""Let benchmarks/fuzz_verifier.py make wrong answers and hostile texts, and test what it makes."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.text.verdict import Verdict
from bae.text.verifier import _compare

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_verifier.py"
specification = importlib.util.spec_from_file_location("fuzz_verifier", SCRIPT)
fuzz = importlib.util.module_from_spec(specification)
specification.loader.exec_module(fuzz)
KNOWN = fuzz.references()


@given(st.integers(0, 2**48))
@settings(max_examples=1000, deadline=None)
def test_no_perturbed_answer_is_accepted_and_no_text_breaks_the_verifier(seed):
    assert fuzz.complaint(KNOWN, seed, slow=5.0) == ""


@given(st.sampled_from(KNOWN), st.sampled_from(fuzz.WORDS))
@settings(max_examples=300, deadline=None)
def test_no_word_that_changes_or_hedges_is_accepted(reference, word):
    for answer in (f"{reference} {word}", rf"{reference}\text{{ {word}}}", f"{reference} ({word})"):
        assert _compare(answer, reference) is not Verdict.CORRECT


@pytest.mark.parametrize("change", fuzz.CHANGES)
def test_each_change_changes_references(change):
    made = [change(text, random.Random(seed)) for seed, text in enumerate(KNOWN)]
    assert sum(answer not in ("", text) for answer, text in zip(made, KNOWN, strict=True)) >= 3


def test_a_verifier_that_accepts_too_much_is_found(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "_check", lambda answer, reference: Verdict.CORRECT)
    monkeypatch.setattr(sys, "argv", ["fuzz_verifier.py", "--count", "30"])
    with pytest.raises(SystemExit, match="1"):
        fuzz.main()
    assert "accepted: " in capsys.readouterr().out
