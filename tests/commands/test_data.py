"""Data of several sources, on the disk and of short prompts, from the command line to the table of completions."""

import json
import re
from pathlib import Path

import pandas
import pytest

from bae.commands import evaluate
from tests.commands.test_train import outputs, runs, train  # noqa: F401
from tests.commands.test_wrong_inputs import refused, sentences  # noqa: F401
from tests.support import call


@pytest.fixture
def splits(tmp_path):
    """Two files with columns of their own, as the training split; and some problems to evaluate on."""
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"question": "{i}+1=", "answer": "{i + 1}", "level": {i}}}\n' for i in range(1, 9))
    )
    (tmp_path / "b.csv").write_text("sum,total\n3+4+5=,12\n10+20+30=,60\n")
    one = f"{{source: {tmp_path}/a.jsonl, weight: 1}}"
    other = f"{{source: {tmp_path}/b.csv, weight: 1, question: sum, answer: total}}"
    return ["task=dataset", f"task.splits.train=[{one}, {other}]", f"task.splits.val={tmp_path}/a.jsonl"]


def test_a_run_on_a_mixture(train, splits, recwarn):  # noqa: F811
    more = ["task.streaming=true", "max_prompt_tokens=6", "callbacks.completions.rows=16", "max_new_tokens=48"]
    train("steps=1", *splits, *more, "callbacks.held_out.prompts=4", "callbacks.held_out.samples=2")
    assert "max_prompt_tokens=6: 4 of the 16 problems of train are left out" in " ".join(
        str(w.message) for w in recwarn.list
    )
    (run,) = runs()
    folder = run.data.tags["output_folder"]
    table = json.loads(next(Path(run.info.artifact_uri.removeprefix("file://")).rglob("step_000001.json")).read_text())
    rows = [json.loads(row) for row in pandas.DataFrame(table["data"], columns=table["columns"])["row"]]
    assert {"question", "answer", "level"} in map(set, rows) and {"sum": "3+4+5=", "total": "12"} in rows
    call(evaluate, outputs(), f"run={folder}", "samples=2", "device=cpu", "max_new_tokens=48")
    assert "eval/val/accuracy" in runs()[0].data.metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["max_prompt_tokens=0"], "max_prompt_tokens=0: must be above 0, or null"),
        (["max_prompt_tokens=many"], "max_prompt_tokens=many: must be a whole number"),
        (["max_prompt_tokens=2"], "max_prompt_tokens=2: no prompt of train is that short; raise it"),
        (["task.streaming=perhaps"], "task.streaming=perhaps: must be true or false"),
        (["task.reference_lines=3"], "task.reference_lines=3: must be a text or null"),
        (["+task.splits.train.0.reference_lines=3"], r"task\.splits\.train\.0\.reference_lines=3: must be a text"),
        (["task.verifier.timeout=soon"], "task.verifier.timeout=soon: must be a number"),
        (["verifier@task.verifier=exact", "task.verifier.max_chars=0"], "verifier.max_chars=0: must be above 0"),
        (["verifier@task.verifier=pattern", "task.verifier.timeout=-1"], "verifier.timeout=-1: must be above 0"),
        (
            ["verifier@task.verifier=abstention", "task.verifier.phrases=[]"],
            r"verifier\.phrases=\[\]: must have a phrase",
        ),
        (["verifier@task.verifier=pattern", "task.verifier.tmeout=1"], r"task\.verifier\.tmeout"),
        (["verifier@task.verifier=exakt"], "exakt"),
        (["task.splits.train=[]"], r"task\.splits\.train=\[\]: it has no source"),
        (["task.splits.train=[{source: a.csv, weigth: 2}]"], r"there is no key task\.splits\.train\.0\.weigth"),
        (["task.splits.train=[{source: 'x:y', revision: 1}]"], r"task\.splits\.train\.0\.revision=1: must be a text"),
        (["task.splits.train={source: a.csv}"], r"task\.splits\.train: it is a list, and cannot be made a mapping; wr"),
        (["task=math", "task.splits.gsm8k=[a]"], r"gsm8k: it is a mapping, and cannot be made a list; remove it first"),
        (["model.chat_template_kwargs=[1]"], r"there is no key model\.chat_template_kwargs|must be a mapping or null"),
        (["+model.chat_template_kwargs=[1]"], r"model\.chat_template_kwargs=\[1\]: must be a mapping or null"),
        (["+model.chat_template_kwargs={a: 1}"], r"with model\.prompt_template there is no chat template"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(train, splits, arguments, message):  # noqa: F811
    sentence = refused(train, "steps=1", *splits, *arguments)
    assert re.search(message, sentence), sentence
