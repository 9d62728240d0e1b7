"""Check tasks: pure functions of split and index, disjoint splits, and data files that are wrong."""

import json

import pytest

from bae.tasks.arithmetic import Arithmetic
from bae.tasks.dataset import DatasetTask
from bae.tasks.loader import PromptDataModule, PromptLoader, problem_indices
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier
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
    return DatasetTask({"train": str(path)}, verifier=IntegerVerifier(), **options)


def test_a_jsonl_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "2+3?", "answer": "so\\n#### 5"}\n\n{"question": "q", "answer": "#### 1,000"}\n')
    task = dataset(path)
    assert task.size("train") == 2
    assert (task.problem("train", 0).question, task.problem("train", 0).answer) == ("2+3?", "5")
    assert task.problem("train", 1).answer == "1,000"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "q"}\n', "no column 'answer'"),
        ('{"question": "q", "answer": "1"}\n{oops\n', "line 2: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ("", "no rows"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        dataset(path).size("train")


def test_a_missing_file_is_noticed_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task.splits.train=.*gone.jsonl: no such file"):
        PromptDataModule(dataset(tmp_path / "gone.jsonl"), steps=1, prompts_per_step=1, group_size=2, seed=0)


def test_a_split_may_have_columns_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "#### 5"}')
    (tmp_path / "b.jsonl").write_text('{"problem": "p", "answer": "#### 6"}')
    other = {"source": str(tmp_path / "b.jsonl"), "question": "problem", "answer_after": None}
    task = DatasetTask({"train": str(tmp_path / "a.jsonl"), "val": other}, "question", "answer", IntegerVerifier(), "#")
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
    task = DatasetTask({"train": str(path)}, "question", "answer", IntegerVerifier())
    assert [(p.question, p.answer) for p in (task.problem("train", i) for i in range(task.size("train")))] == [
        ('a, "b"\r\nc', "012"),
        ("none", "NA"),  # cells are texts: no number, no missing value is made of them
    ]
    with pytest.raises(ValueError, match="no column 'reply'; it has question, answer"):
        DatasetTask({"train": str(path)}, "question", "reply", IntegerVerifier()).size("train")
