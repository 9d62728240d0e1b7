"""Test prompts with options and paragraphs, references of several lines, and the tasks that have them."""

import json
import string

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from bae.commands import schema
from bae.commands.cli import CONF
from bae.tasks.dataset import DatasetTask
from bae.tasks.rows import with_options, with_paragraphs, with_shuffled_options
from bae.text.short_answers import ChoiceVerifier, ExactVerifier
from bae.text.verdict import Verdict
from tests.support import DATA, needs

# Rows of our own making, with the columns that the data sets have.
SAMPLES = {
    "commonsenseqa": {"question": "Where is cake kept?", "choices": ["road", "fridge", "sea"], "answer": "B"},
    "mmlu_pro": {"question_id": 7, "question": "2 + 2?", "options": ["3", "4", "5", "22"], "answer": "B",
                 "answer_index": 1, "cot_content": "", "category": "math", "src": "own"},
    "gpqa": {"Question": "Which is a metal?", "Correct Answer": "iron\n", "Incorrect Answer 1": "neon",
             "Incorrect Answer 2": "argon", "Incorrect Answer 3": "helium"},
    "triviaqa": {"question": "Who wrote Hamlet?", "question_id": "1",
                 "answer": {"value": "William Shakespeare", "aliases": ["Shakespeare", "The  Bard"], "type": "x"}},
    "simpleqa": {"metadata": "{}", "problem": "What is the capital of Peru?", "answer": "Lima"},
    "hotpotqa": {"id": "1", "question": "Which is older?", "answer": "The Alps", "type": "comparison", "level": "easy",
                 "supporting_facts": {"title": ["A"], "sent_id": [0]},
                 "context": {"title": ["A", "B"], "sentences": [["A is old.", " Very."], ["B is new."]]}},
    "big_math": {"problem": "1/2 + 1/2?", "answer": "1", "source": "own", "domain": ["x"], "llama8b_solve_rate": 0.5},
}  # fmt: skip
ANSWERS = {
    "commonsenseqa": (["B", "fridge", "(b) fridge"], ["A", "road", "A) fridge"]),
    "mmlu_pro": (["B", "4"], ["C", "22", "2"]),
    "gpqa": (["iron"], ["neon", "E"]),
    "triviaqa": (["shakespeare", "The Bard", "William Shakespeare"], ["Marlowe", "Shakespeare or Marlowe"]),
    "simpleqa": (["lima."], ["Lima, Peru", "Quito"]),
    "hotpotqa": (["Alps", "the alps."], ["B"]),
    "big_math": (["1", "1.0"], ["2"]),
}
OVERRIDES = {"hotpotqa": ["task.splits.val.revision=null"], "big_math": ["task.verifier.timeout=60"]}
PROMPTS = {
    "commonsenseqa": "Where is cake kept?\n\nA. road\nB. fridge\nC. sea\n\nAnswer with the letter of one option.",
    "mmlu_pro": "2 + 2?\n\nA. 3\nB. 4\nC. 5\nD. 22\n\nAnswer with the letter of one option.",
    "triviaqa": "Who wrote Hamlet?",
    "simpleqa": "What is the capital of Peru?",
    "hotpotqa": "A: A is old. Very.\n\nB: B is new.\n\nWhich is older? Answer in a few words.",
    "big_math": "1/2 + 1/2?",
}


def task_of(name, *overrides):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", [f"task={name}", *overrides]).task
    return instantiate(node, _convert_="all")


@pytest.mark.parametrize("name", SAMPLES)
def test_each_task_reads_rows_with_the_columns_of_its_data(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(SAMPLES[name]) + "\n")
    source = "task.splits.val.source" if name == "hotpotqa" else "task.splits.val"
    task = task_of(name, f"{source}={path}", *OVERRIDES.get(name, []))
    problem = task.problem("val", 0)
    if name in PROMPTS:
        assert problem.question == PROMPTS[name]
    right, wrong = ANSWERS[name]
    assert set(task.verifier.verify([(a, problem.reference) for a in [problem.answer, *right]])) == {Verdict.CORRECT}
    assert Verdict.CORRECT not in task.verifier.verify([(a, problem.reference) for a in wrong])
    assert SAMPLES[name].items() <= problem.columns.items()
    task.verifier.close()


def test_options_are_shuffled_by_the_question_alone():
    row, columns = SAMPLES["gpqa"], ["Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    made = [
        with_shuffled_options(
            {**row, "Question": f"{n}?"}, "Question", "Correct Answer", columns, "{question}\n{options}"
        )
        for n in range(400)
    ]
    assert made[7] == with_shuffled_options(
        {**row, "Question": "7?"}, "Question", "Correct Answer", columns, "{question}\n{options}"
    )
    for one in made:
        assert one["options"][string.ascii_uppercase.index(one["letter"])] == "iron"
        assert sorted(one["options"]) == ["argon", "helium", "iron", "neon"]
        assert f"{one['letter']}. iron" in one["prompt"]
    counts = [sum(one["letter"] == letter for one in made) for letter in "ABCD"]
    assert min(counts) > 60  # 100 each; 60 is 4.6 standard deviations below


def test_braces_of_a_question_are_not_filled():
    row = {"q": "Is {options} a set? {x}", "o": ["{question}", "no"]}
    assert (
        with_options(row, "q", "o", "{question}\n{options}")["prompt"]
        == "Is {options} a set? {x}\nA. {question}\nB. no"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_options({"q": "x", "o": ["a", "b"]}, "q", "o", "{question}"), r"prompt has no \{options\}"),
        (lambda: with_options({"q": "", "o": ["a", "b"]}, "q", "o", "{question}{options}"), "'q' is missing, empty"),
        (lambda: with_options({"q": "x"}, "q", "o", "{question}{options}"), "'o' is missing, or not a list of texts"),
        (lambda: with_options({"q": "x", "o": ["a", 1]}, "q", "o", "{question}{options}"), "'o' is missing, or not"),
        (
            lambda: with_options({"q": "x", "o": ["a"]}, "q", "o", "{question}{options}"),
            "there are 1 options; .* 2 to 26",
        ),
        (
            lambda: with_paragraphs({"q": "x", "t": ["a"], "s": []}, "q", "t", "s", "{question}{paragraphs}"),
            "'s' has not",
        ),
    ],
)
def test_rows_without_what_is_needed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_references_have_lines(tmp_path, streaming):
    rows = [
        {"q": "x?", "a": "b c", "more": ["d\n e", "f"]},
        {"q": "y?", "a": "g", "more": "h"},
        {"q": "z?", "a": "i", "more": []},
    ]
    splits = {"train": written(tmp_path / "a.jsonl", *rows)}
    task = DatasetTask(splits, "q", "a", ExactVerifier(), reference_lines="more", streaming=streaming)
    problems = [task.problem("train", i) for i in range(task.size("train"))]
    assert [p.reference for p in problems] == ["b c\nd e\nf", "g\nh", "i"]
    assert [p.answer for p in problems] == ["b c", "g", "i"] and problems[2].address is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x?", "a": "A", "more": [1, 2]}, "row 2, .*: there is none|row 2: there is none"),
        ({"q": "x?", "a": "D", "more": ["u", "v"]}, "row 2, 'D.*': it has 2 options, and the letter D"),
        ({"q": "x?", "a": "A"}, "row 2: there is none"),
    ],
)
def test_a_row_with_bad_lines_is_named(tmp_path, row, message):
    source = written(tmp_path / "a.jsonl", {"q": "x?", "a": "A", "more": ["u", "v"]}, row)
    task = DatasetTask({"train": source}, "q", "a", ChoiceVerifier(), reference_lines="more")
    with pytest.raises(ValueError, match=f"task.splits.train=.* 1 of 2 references .*, the first in {message}"):
        task.size("train")


def test_a_row_of_which_no_prompt_can_be_made_is_named(tmp_path):
    source = written(
        tmp_path / "a.jsonl", SAMPLES["commonsenseqa"], {"question": "x?", "choices": "a, b", "answer": "B"}
    )
    with pytest.raises(ValueError, match=r"task\.splits\.val=.*a\.jsonl, row 2: 'choices' is missing, or not a list"):
        task_of("commonsenseqa", f"task.splits.val={source}").size("val")


@needs("commonsenseqa_val.jsonl")
def test_commonsenseqa(monkeypatch):
    monkeypatch.setenv("BAE_DATA", str(DATA))
    task = task_of("commonsenseqa")
    assert (task.size("train"), task.size("val")) == (900, 321)
    for split in ("train", "val"):
        for i in range(0, task.size(split), 50):
            problem = task.problem(split, i)
            text = problem.columns["choices"]["ABCDE".index(problem.answer)]
            assert task.verifier.verify([(problem.answer, problem.reference)]) == [Verdict.CORRECT]
            assert f"{problem.answer}. {text}" in problem.question
