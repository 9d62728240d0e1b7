"""What demonstrations say, and which of their tokens are learnt."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bae.batch import Problem
from bae.demonstrations.arithmetic import SolutionConfidence, TwoAttempts, read_terms
from bae.demonstrations.columns import FromColumns, steps_and_size
from bae.demonstrations.pieces import Confidences, Piece, encode, is_in_form, text_of, without
from bae.demonstrations.tiny import make_tokenizer
from bae.tasks.arithmetic import Arithmetic
from bae.text.blocks import make_blocks

PROBLEM = Problem("x", "37+8-152=", "-107")
FORMAT = {"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]}
BLOCKS = make_blocks(FORMAT)
CONFIDENCES = {"0.25": 1, "0.75": 1}
SLIPS = [1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 7, 10]  # of conf/demonstrations/two_attempt.yaml


@pytest.fixture(scope="module")
def task():
    return Arithmetic({"train": {"terms": [2, 3, 4], "digits": [1, 2], "size": 200000, "held_out": False}})


def learnt(shown, row, tokenizer):
    """The text of the tokens that are learnt in one row."""
    ids = shown.samples.completion_ids[row]
    return tokenizer.decode(ids[shown.learnt[row]])


def test_one_attempt_and_a_confidence_from_nowhere():
    pieces = SolutionConfidence(FORMAT, {"0.25": 1, "0.75": 0})(PROBLEM, random.Random(0))
    assert text_of(pieces) == (
        "<reasoning>45 -107</reasoning><answer>-107</answer><analysis>long</analysis><confidence>0.25</confidence>"
    )
    assert all(piece.learn for piece in pieces)
    short = SolutionConfidence(FORMAT, CONFIDENCES)(Problem("x", "9-8=", "1"), random.Random(0))
    assert "<analysis>short</analysis>" in text_of(short)


def test_a_demonstration_has_the_sections_of_the_format():
    lines = {"solution": [{"name": "answer", "opening": "=", "closing": "\n"}], "confidence": ["confidence"]}
    pieces = SolutionConfidence(lines, {"0.25": 1})(PROBLEM, random.Random(0))
    assert text_of(pieces) == "=-107\n<confidence>0.25</confidence>" and is_in_form(pieces, make_blocks(lines))
    with pytest.raises(ValueError, match="a section 'thinking', for which nothing is written"):
        SolutionConfidence({"solution": ["thinking", "answer"]}, {"0.25": 1})


def test_two_attempts_are_worked_out_from_both_ends():
    pieces = TwoAttempts(slip=0, slips=[1])(PROBLEM, random.Random(0))
    assert text_of(pieces) == (
        "<reasoning>45 -107</reasoning><answer>-107</answer><reasoning>-144 -107</reasoning><answer>-107</answer>"
    )
    assert all(piece.learn for piece in pieces)


def test_a_slip_is_carried_on_and_not_learnt():
    seen = set()
    for seed in range(20):
        pieces = TwoAttempts(slip=1, slips=[10])(PROBLEM, random.Random(seed))
        seen.add(text_of([piece for piece in pieces if not piece.learn]))
        first, second = text_of(pieces).split("</answer>", 1)
        assert re.fullmatch(
            r"<reasoning>35 (-127|-107)</reasoning><answer>\1|<reasoning>55 (-107|-87)</reasoning><answer>\2", first
        )
        assert second == "<reasoning>-144 -107</reasoning><answer>-107</answer>"
    assert seen == {"35-127", "35-107", "55-107", "55-87"}  # two slips may cancel


def test_half_of_the_first_attempts_are_wrong_and_no_second(task):
    write, rng = TwoAttempts(0.3, SLIPS), random.Random(0)
    wrong = 0
    for index in range(2000):
        problem = task.problem("train", index)
        terms, pieces = read_terms(problem.question), write(problem, rng)
        totals = [piece for piece in pieces if re.fullmatch(r"-?\d+", piece.text)]
        before = [terms[0], *(int(piece.text) for piece in totals)]
        for piece, total, term in zip(totals, before, terms[1:], strict=False):
            assert piece.learn == (int(piece.text) == total + term)
        first, second = re.findall(r"<answer>(.*?)</answer>", text_of(pieces))
        assert first == str(before[-1]) and second == problem.answer
        wrong += first != problem.answer
    assert 0.44 <= wrong / 2000 <= 0.52


def test_what_is_learnt_leaves_out_the_padding_and_the_slips(task):
    tokenizer, write, rng = make_tokenizer(), TwoAttempts(slip=0.5, slips=[1, 2]), random.Random(0)
    problems = [task.problem("train", i) for i in range(32)]
    completions = [write(problem, rng) for problem in problems]
    prompts = [tokenizer(problem.question)["input_ids"] for problem in problems]
    shown = encode(tokenizer, prompts, completions)
    samples = shown.samples
    for row, (problem, pieces) in enumerate(zip(problems, completions, strict=True)):
        assert tokenizer.decode(samples.prompt_ids[row][samples.prompt_mask[row]]) == problem.question
        ids = samples.completion_ids[row][samples.completion_mask[row]].tolist()
        assert ids == tokenizer(text_of(pieces) + "<|end|>")["input_ids"]
        assert learnt(shown, row, tokenizer) == text_of([p for p in pieces if p.learn]) + "<|end|>"
    assert not (shown.learnt & ~samples.completion_mask).any() and samples.ended.all()


def test_a_token_across_the_border_of_a_piece_is_not_learnt():
    tokenizer = make_tokenizer()
    shown = encode(tokenizer, [[3]], [[Piece("<ans", learn=False), Piece("wer>7</answer>")]])
    assert learnt(shown, 0, tokenizer) == "7</answer><|end|>"


@pytest.mark.parametrize(("slip", "slips"), [(30, [1]), (-0.1, [1]), (0.3, []), (0.3, [0, 1])])
def test_slips_that_cannot_be(slip, slips):
    with pytest.raises(ValueError, match=r"demonstrations\.write\.slip"):
        TwoAttempts(slip, slips)


def row(**columns):
    return Problem("train/0", columns.get("question", ""), columns.get("answer", "17"), columns)


def test_columns_fill_the_sections_of_the_format():
    write = FromColumns(FORMAT, "reasoning", steps_and_size, {"0.5": 1})
    pieces = write(row(reasoning=" 2 + 13 = 15, 15 + 2 = 17\n"), random.Random(0))
    assert text_of(pieces) == (
        "<reasoning>2 + 13 = 15, 15 + 2 = 17</reasoning><answer>17</answer>"
        "<analysis>Two steps, with numbers up to 17.</analysis><confidence>0.5</confidence>"
    )
    assert is_in_form(pieces, BLOCKS)


def test_a_section_of_another_name_is_a_column():
    blocks = {"all": ["answer", {"name": "unit", "opening": "[", "closing": "]"}]}
    write = FromColumns(blocks, "reasoning", steps_and_size, CONFIDENCES)
    assert text_of(write(row(reasoning="r", unit="cm"), random.Random(0))) == "<answer>17</answer>[cm]"
    with pytest.raises(ValueError, match="no column 'unit'; its columns: reasoning"):
        write(row(reasoning="r"), random.Random(0))


def test_rationales_of_gsm8k_lose_their_answer_and_the_calculator():
    write = FromColumns(FORMAT, "answer", steps_and_size, CONFIDENCES, before="####", remove="<<.*?>>")
    problem = Problem("x", "q", "72", {"answer": "She sold 48/2 = <<48/2=24>>24 clips.\nThat is 72.\n#### 72"})
    text = text_of(write(problem, random.Random(0)))
    assert text.startswith("<reasoning>She sold 48/2 = 24 clips.\nThat is 72.</reasoning><answer>72</answer>")


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan"), "#### 3"])
def test_a_problem_without_a_solution_is_left_out(missing):
    write = FromColumns(
        FORMAT, "reasoning", steps_and_size, CONFIDENCES, before=None if missing != "#### 3" else "####"
    )
    assert write(row(reasoning=missing), random.Random(0)) is None


@pytest.mark.parametrize(
    ("solution", "said"),
    [
        ("7 + 7 = 14", "One step, with numbers up to 14."),
        ("1,200 / 2.5 = 480", "One step, with numbers up to 1200."),
        ("none", "No steps, without numbers."),
        ("= " * 12 + "3", "12 steps, with numbers up to 3."),
    ],
)
def test_what_is_said_of_a_solution(solution, said):
    assert steps_and_size(solution) == said


def test_confidences_are_drawn_by_their_weights():
    draw, rng = Confidences({"0.1": 3, "0.9": 1, "0.5": 0}), random.Random(0)
    drawn = [draw.draw(rng) for _ in range(4000)]
    assert set(drawn) == {"0.1", "0.9"} and abs(drawn.count("0.1") / 4000 - 0.75) < 0.03
    for wrong in ({}, {"0.1": 0}, {"0.1": -1}):
        with pytest.raises(ValueError, match=r"^confidences="):
            Confidences(wrong)


@given(
    st.text(st.characters(blacklist_characters="<>"), max_size=20), st.sampled_from(["reasoning", "answer", "analysis"])
)
def test_a_section_that_is_only_read_keeps_its_tags(content, name):
    sections = {"reasoning": "a", "answer": "b", "analysis": "c", "confidence": "0.5"} | {name: content}
    whole = "".join(f"<{tag}>{text}</{tag}>" for tag, text in sections.items())
    pieces = without([Piece(whole)], BLOCKS, [name])
    assert text_of(pieces) == whole
    kept = "".join(f"<{tag}>{text if tag != name else ''}</{tag}>" for tag, text in sections.items())
    assert text_of([piece for piece in pieces if piece.learn]) == kept


def test_data_rows_travel_with_their_problems(tmp_path):
    from bae.tasks.dataset import DatasetTask
    from bae.text.verifier import MathVerifier

    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"q": "1+1", "a": "2", "why": "one more"}) + "\n")
    problem = DatasetTask({"train": str(path)}, "q", "a", verifier=MathVerifier()).problem("train", 0)
    assert problem.columns == {"q": "1+1", "a": "2", "why": "one more"}
    assert problem == Problem("train/0", "1+1", "2") and "why" not in repr(problem)
