"""Check tasks: pure functions of split and index, disjoint splits, and data files that are wrong."""

import json
import sys
import types

import pytest

from bae.tasks.arithmetic import Arithmetic
from bae.tasks.dataset import DatasetTask
from bae.tasks.loader import PromptDataModule, PromptLoader, problem_indices
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier, MathVerifier
from tests.support import DATA, needs

SPLITS = {
    "train": {"terms": [2, 3], "digits": [1, 2], "size": 3000, "held_out": False},
    "val": {"terms": [2, 3], "digits": [1, 2], "size": 300, "held_out": True},
}


def test_arithmetic_is_right_and_repeatable():
    task, again = Arithmetic(SPLITS), Arithmetic(SPLITS)
    for i in range(200):
        problem = task.problem("train", i)
        assert problem == again.problem("train", i)
        assert eval(problem.question.rstrip("=")) == int(problem.answer)  # our own text, not a policy's
        assert task.verifier.verify([(problem.answer, problem.answer)]) == [Verdict.CORRECT]


def test_no_expression_is_in_two_splits():
    task = Arithmetic(SPLITS)
    train = {task.problem("train", i).question for i in range(task.size("train"))}
    held_out = {task.problem("val", i).question for i in range(task.size("val"))}
    assert len(train) > 500 and len(held_out) > 100
    assert not train & held_out


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="no split 'test'"):
        Arithmetic(SPLITS).problem("test", 0)


def test_epochs_are_permutations_and_the_order_is_pure():
    size, count = 10, 4
    seen = [i for step in range(5) for i in problem_indices(7, step, size, count)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert problem_indices(7, 3, size, count) == seen[12:16]
    assert problem_indices(8, 0, size, count) != seen[:4]


def test_ranks_share_out_the_step_of_one_process():
    task = Arithmetic(SPLITS)
    whole = next(iter(PromptLoader(task, "train", 3, 4, 2, seed=0, rank=0, world=1))).problems
    parts = [next(iter(PromptLoader(task, "train", 3, 2, 2, seed=0, rank=r, world=2))).problems for r in (0, 1)]
    assert parts[0] + parts[1] == whole


def test_the_loader_goes_on_where_it_was():
    task = Arithmetic(SPLITS)
    loader, resumed = (PromptLoader(task, "train", 5, 4, 2, seed=0, rank=0, world=1) for _ in range(2))
    first = iter(loader)
    next(first), next(first)
    resumed.load_state_dict(loader.state_dict())
    assert [b.problems for b in resumed] == [b.problems for b in first]


def dataset(path, **changes):
    options = {"question": "question", "answer": "answer", "answer_after": "####"} | changes
    return DatasetTask({"train": str(path)}, verifier=MathVerifier(), **options)


def test_a_jsonl_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "2+3?", "answer": "so\\n#### 5"}\n\n{"question": "q", "answer": "#### 1,000"}\n')
    task = dataset(path)
    assert task.size("train") == 2
    assert (task.problem("train", 0).question, task.problem("train", 0).answer) == ("2+3?", "5")
    assert task.problem("train", 1).answer == "1,000"


ROW = '{"question": "q", "answer": "#### 1"}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"question": "q"}\n', r"no column 'answer'; it has question"),
        ("a.jsonl", f"{ROW}\n{{oops\n", r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", "", r"no rows"),
        ("a.jsonl", f'{ROW}\n\n{{"answer": "#### 1"}}\n', r"in row 2, 'question' is missing or empty; correct"),
        ("a.jsonl", '{"question": null, "answer": "#### 1"}\n', r"in row 1, 'question' is missing or empty"),
        ("a.jsonl", '{"question": " ", "answer": "#### 1"}\n', r"in row 1, 'question' is missing or empty"),
        ("a.jsonl", '{"question": ["q"], "answer": "#### 1"}\n', r"in row 1, 'question' is .* not a text"),
        ("a.jsonl", f'{ROW}\n{{"question": "q"}}\n', r"1 of 2 references cannot be read, .* row 2: there is none"),
        ("a.jsonl", f'{ROW}\n{{"question": "q", "answer": null}}\n', r"row 2: there is none"),
        ("a.jsonl", f'{ROW}\n{{"question": "q", "answer": ["#### 1"]}}\n', r"row 2: there is none"),
        ("a.jsonl", f'{ROW}\n{{"question": "q", "answer": "#### "}}\n', r"row 2, '': it is blank"),
        ("a.jsonl", f"{ROW}\ncaf\u00e9".encode("latin-1"), r"a.jsonl, line 2: not UTF-8; save the file in"),
        ("a.csv", "question,answer\ncaf\u00e9,1\n".encode("latin-1"), r"a.csv, line 2: not UTF-8"),
        ("a.json", ROW, r"a.json: not a list of objects; write"),
        ("a.json", "[1]", r"a.json, row 1: not a JSON object"),
        ("a.json", f"[{ROW},\n", r"a.json, line 2: not JSON"),
        ("a.parquet", "text", r"a.parquet: not a Parquet file that can be read"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as refused:
        dataset(path).size("train")
    assert str(refused.value).startswith("task.splits.train") and "\n" not in str(refused.value)


def test_what_is_no_file_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"task.splits.train: .* is a folder; name a file in it"):
        dataset(tmp_path).size("train")
    with pytest.raises(ValueError, match=r"task.splits.train: openai/gsm8k: neither a file .* nor a hub dataset"):
        dataset("openai/gsm8k").size("train")

    def unreachable(*arguments, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(ValueError, match=r"the hub does not give it \(no route\); check the spelling and the network"):
        dataset("openai/gsm8k:main:train").size("train")


def test_a_missing_file_is_noticed_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task.splits.train=.*gone.jsonl: no such file"):
        PromptDataModule(dataset(tmp_path / "gone.jsonl"), steps=1, prompts_per_step=1, group_size=2, seed=0)


def test_a_split_may_have_columns_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "#### 5"}')
    (tmp_path / "b.jsonl").write_text('{"problem": "p", "answer": "#### 6"}')
    other = {"source": str(tmp_path / "b.jsonl"), "question": "problem", "answer_after": None}
    task = DatasetTask({"train": str(tmp_path / "a.jsonl"), "val": other}, "question", "answer", MathVerifier(), "#")
    assert [task.problem("val", 0).question, task.problem("val", 0).answer] == ["p", "#### 6"]
    assert task.problem("train", 0).answer == "5"


@needs("gsm8k_train.jsonl")
def test_gsm8k():
    task = dataset(DATA / "gsm8k_train.jsonl")
    assert task.size("train") == 7473
    rows = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    for i in (0, 7472):
        assert json.loads(rows[i])["answer"].endswith(f"#### {task.problem('train', i).answer}")


def test_a_csv_is_read_as_a_spreadsheet_writes_it(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_bytes('\ufeffquestion,answer\r\n"a, ""b""\r\nc",012\r\nnone,NA\r\n'.encode())
    task = DatasetTask({"train": str(path)}, "question", "answer", MathVerifier())
    assert [(p.question, p.answer) for p in (task.problem("train", i) for i in range(task.size("train")))] == [
        ('a, "b"\r\nc', "012"),
        ("none", "NA"),  # cells are texts: no number, no missing value is made of them
    ]
    with pytest.raises(ValueError, match="no column 'reply'; it has question, answer"):
        DatasetTask({"train": str(path)}, "question", "reply", IntegerVerifier()).size("train")


ROWS = ["12", "A) 11", "", "\\frac{1}{2", None, "\\boxed{3}\\boxed{4}", "\\frac{1}{2}"]


def unreadable(path, verifier, references=ROWS, **options):
    path.write_text("".join(json.dumps({"question": "q", "answer": answer}) + "\n" for answer in references))
    return DatasetTask({"train": str(path)}, "question", "answer", verifier, **options)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (ROWS, r"task\.splits\.train=.*data\.jsonl: 5 of 7 references cannot be read, the first in row 2, 'A\) 11': "
               r"its brackets do not match.*; correct it, or leave such rows out with task\.unreadable=drop"),
        (["1", "2", " "], r"1 of 3 references cannot be read, the first in row 3, '': it is blank; correct it"),
        (["1", None], r"1 of 2 references cannot be read, the first in row 2: there is none; correct it"),
        (["1", "(" * 5000], r"row 2, '\({100}'…: its brackets"),
        (["{"], r"1 of 1 references cannot be read, the first in row 1, '\{': its brackets .*; correct it$"),
    ],
)  # fmt: skip
def test_an_unreadable_reference_is_named_before_training(tmp_path, references, message):
    task = unreadable(tmp_path / "data.jsonl", MathVerifier(), references)
    with pytest.raises(ValueError, match=message) as refused:
        PromptDataModule(task, steps=1, prompts_per_step=1, group_size=2, seed=0)
    assert "\n" not in str(refused.value)


def test_rows_with_unreadable_references_can_be_left_out(tmp_path):
    task = unreadable(tmp_path / "data.jsonl", MathVerifier(), unreadable="drop")
    with pytest.warns(UserWarning, match=r"train=.*: 5 of 7 rows are left out, .* the first in row 2, 'A\) 11'"):
        assert task.size("train") == 2
    problems = [task.problem("train", i) for i in range(2)]
    assert [problem.id for problem in problems] == ["train/0", "train/6"]  # the rows of the file
    verdicts = task.verifier.verify([(problem.answer, problem.answer) for problem in problems])
    assert verdicts == [Verdict.CORRECT] * 2
    with pytest.raises(ValueError, match="2 of 2 references cannot be read"):
        unreadable(tmp_path / "none.jsonl", MathVerifier(), ["", "{"], unreadable="drop").size("train")


def test_each_verifier_says_what_it_can_read(tmp_path):
    with pytest.raises(ValueError, match=r"4 of 5 .* row 2, '1,000': it is not an integer"):
        unreadable(tmp_path / "data.jsonl", IntegerVerifier(), ["-7", "1,000", "1.0", "x", "9" * 200]).size("train")


@pytest.mark.parametrize("verifier", [IntegerVerifier(), MathVerifier()])
@pytest.mark.parametrize("reference", [row for row in ROWS if row is not None])
def test_what_a_verifier_finds_no_fault_with_it_can_verify(verifier, reference):
    """And what it finds one with, it refuses when it meets it."""
    if verifier.fault(reference) is None:
        assert verifier.verify([(reference, reference)]) == [Verdict.CORRECT]
    else:
        with pytest.raises(ValueError, match="reference"):
            verifier.verify([("1", reference)])


def test_a_row_without_the_text_before_the_reference_has_none(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "q", "answer": "#### 5"}\n{"question": "q", "answer": "it is 6"}\n')
    with pytest.raises(ValueError, match="1 of 2 references cannot be read, the first in row 2: there is none"):
        dataset(path).size("train")


def test_a_split_is_read_when_it_is_first_needed(tmp_path):
    task = unreadable(tmp_path / "bad.jsonl", MathVerifier())
    (tmp_path / "good.jsonl").write_text('{"question": "q", "answer": "5"}')
    good = {"val": str(tmp_path / "good.jsonl"), "train": task.sources["train"][0].source}
    assert DatasetTask(good, "question", "answer", MathVerifier()).size("val") == 1
