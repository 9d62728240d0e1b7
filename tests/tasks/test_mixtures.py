"""Splits of several sources: shares, order, columns of their own; rows on the disk; prompts that are too long."""

import json
import sys
import types

import numpy as np
import pytest

from bae.tasks.dataset import DatasetTask, alternate
from bae.tasks.loader import PromptLoader
from bae.tasks.short_prompts import ShortPrompts
from bae.tasks.tables import read_table
from bae.text.verifier import IntegerVerifier


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task(splits, **options):
    return DatasetTask(splits, "question", "answer", IntegerVerifier(), **options)


def problems(of, split="train"):
    return [of.problem(split, i) for i in range(of.size(split))]


@pytest.fixture
def sums(tmp_path):
    return write(tmp_path / "sums.jsonl", [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)])


@pytest.fixture
def dapo(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i}*2="}], "reward": {"truth": 2 * i}} for i in range(2)]
    return {"source": write(tmp_path / "dapo.jsonl", rows), "question": "prompt.0.content", "answer": "reward.truth"}


def test_sources_are_joined_and_alternate(sums, dapo):
    mixed = problems(task({"train": [sums, dapo]}))
    assert [p.question for p in mixed] == ["0+1=", "0*2=", "1+1=", "2+1=", "1*2=", "3+1="]  # at 1/8 1/4 3/8 5/8 3/4 7/8
    assert [p.answer for p in mixed] == ["1", "0", "2", "3", "2", "4"]
    assert [p.id for p in mixed[:3]] == ["train/0/0", "train/1/0", "train/0/1"]
    assert mixed[1].columns["reward"] == {"truth": 0}  # rewards see the whole row


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([4, 2], None, [4, 2]),
        ([4, 2], [1, 1], [4, 4]),  # the smaller one is gone through twice
        ([4, 2], [1, 3], [4, 12]),
        ([4, 2], [0.2, 0.05], [8, 2]),  # now the larger one is
        ([3, 100], [0.5, 0.5], [100, 100]),
        ([5], [7.0], [5]),
    ],
)
def test_shares_are_the_weights_and_every_problem_comes(sizes, weights, counts):
    part, position = alternate(sizes, weights)
    assert np.bincount(part).tolist() == counts
    for s, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        times = np.bincount(position[part == s], minlength=size)
        assert times.min() >= 1 and times.max() - times.min() <= 1 and times.sum() == count
    for end in (len(part) // 2, len(part) // 4):  # each beginning of the split is a mixture, too
        share = np.bincount(part[:end], minlength=len(sizes)) / end
        np.testing.assert_allclose(share, np.array(counts) / sum(counts), atol=1 / end)


def test_the_order_of_a_mixture_is_one_of_the_seed_and_goes_on(sums, dapo):
    splits = {"train": [{"source": sums, "weight": 1}, dapo | {"weight": 2}]}

    def loader(seed):
        return PromptLoader(task(splits, streaming=True), "train", 6, 4, 2, seed=seed, rank=0, world=1)

    asked = [[p.id for p in batch.problems] for batch in loader(0)]
    resumed = loader(0)
    resumed.load_state_dict({"next_step": 3})
    assert [[p.id for p in batch.problems] for batch in resumed] == asked[3:]
    assert [[p.id for p in batch.problems] for batch in loader(1)] != asked
    first = [name for step in asked[:3] for name in step]  # an epoch: 4 and 8 problems
    assert sorted(first) == sorted([f"train/0/{i}" for i in range(4)] + [f"train/1/{i % 2}" for i in range(8)])


CSV = '\ufeffquestion,answer\r\n"a, ""b""\r\nc",012\r\n\r\nnone,3\r\n'
JSONL = '{"question": "a\\u2028b \u2028 c", "answer": "1"}\n\n  \n{"question": "q", "answer": 2, "more": [1]}'


@pytest.mark.parametrize(("name", "text"), [("a.csv", CSV), ("a.jsonl", JSONL)])
def test_rows_on_the_disk_are_those_in_memory(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    held, streamed = read_table(str(path)), read_table(str(path), streaming=True)
    assert len(streamed) == len(held) == 2
    assert list(streamed) == held and [streamed[i] for i in (1, 0)] == held[::-1]
    assert problems(task({"train": str(path)}, streaming=True)) == problems(task({"train": str(path)}))
    path.write_bytes(text.replace("none", "more").replace('"q"', '"other"').encode())
    with pytest.raises(ValueError, match=f"{name} was changed while it is in use"):
        streamed[0]


def test_parquet_is_streamed_by_the_package_of_the_hub(tmp_path):
    pytest.importorskip("datasets")
    import pandas

    path = str(tmp_path / "a.parquet")
    pandas.DataFrame({"question": ["p", "q"], "answer": [3, 4], "tags": [["x"], []]}).to_parquet(path)
    assert read_table(path) == list(read_table(path, streaming=True))
    assert read_table(path)[0] == {"question": "p", "answer": 3, "tags": ["x"]}  # lists, not arrays
    assert [p.answer for p in problems(task({"train": path}, streaming=True))] == ["3", "4"]


def test_the_hub_is_asked_for_a_revision(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return ({"question": "q", "answer": "1"},)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = {"source": "openai/gsm8k:main:train", "revision": "e53f048"}
    assert [p.answer for p in problems(task({"train": source}))] == ["1"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": "e53f048"})]


def test_only_some_rows(tmp_path):
    rows = [{"question": f"q{year}", "answer": "1", "year": year} for year in (2022, 2023, 2024)]
    path = write(tmp_path / "a.jsonl", [*rows, {"question": None, "answer": "", "year": 2021}])
    kept = problems(task({"train": {"source": path, "only": {"year": [2023, 2024]}}}))
    assert [(p.id, p.question) for p in kept] == [("train/1", "q2023"), ("train/2", "q2024")]  # a bad row is not read
    with pytest.raises(ValueError, match=r"no row is left by only=\{'year': \[1\]\}"):
        task({"train": {"source": path, "only": {"year": [1]}}}).size("train")
    with pytest.raises(ValueError, match="no column 'yaer'; it has question, answer, year"):
        task({"train": {"source": path, "only": {"yaer": [1]}}}).size("train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"task\.splits\.train=\[\]: it has no source"),
        (3, r"task\.splits\.train=3: must be a file, a hub dataset, or a mapping with the key source"),
        ([{"weight": 1}], r"task\.splits\.train\.0=.*: must be a file"),
        ({"source": "a.jsonl", "wieght": 1}, r"there is no key task\.splits\.train\.wieght; a source has source, q"),
        (["a.jsonl", {"source": "b.jsonl", "weight": 0}], r"train\.1\.weight=0: must be a number above 0"),
        ({"source": "a.jsonl", "weight": True}, r"weight=True: must be a number above 0"),
        ({"source": "a.jsonl", "weight": float("inf")}, r"weight=inf: must be a number above 0"),
        ({"source": "a.jsonl", "question": None}, r"question=None: must be a text"),
        ({"source": "a.jsonl", "revision": 3}, r"revision=3: must be a text"),
        ({"source": "a.jsonl", "only": {"year": 3}}, r"only=.*: must be a mapping of columns to lists"),
        (["a.jsonl", {"source": "b.jsonl", "weight": 1}], r"some of its sources have a weight and others none"),
    ],
)
def test_a_wrong_source_is_one_sentence(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        task({"train": given})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.json", "[]", {"streaming": True}, r"a .json file is one value, and cannot be streamed; make it a .jsonl"),
        ("a.jsonl", "{}\n[1]\n", {"streaming": True}, r"a.jsonl, line 2: not a JSON object"),
        ("a.jsonl", "{}\n", {"revision": "main"}, r"a file has no revision \(main\)"),
    ],
)
def test_what_cannot_be_read_so(tmp_path, name, text, options, message):
    path = tmp_path / name
    path.write_text(text)
    source, streaming = {"source": str(path)}, options.pop("streaming", False)
    with pytest.raises(ValueError, match=message) as refused:
        task({"train": source | options}, streaming=streaming).size("train")
    assert "\n" not in str(refused.value)


def test_long_prompts_are_left_out_and_counted_once(sums):
    asked = []

    def length(problem):
        asked.append(problem.id)
        return 10 + int(problem.answer)

    short = ShortPrompts(task({"train": sums}), length, 12)
    with pytest.warns(UserWarning, match="max_prompt_tokens=12: 2 of the 4 problems of train are left out"):
        assert short.size("train") == 2
    assert [p.answer for p in problems(short)] == ["1", "2"] and len(asked) == 4
    with pytest.raises(ValueError, match="max_prompt_tokens=10: no prompt of train is that short; raise it"):
        ShortPrompts(task({"train": sums}), length, 10).size("train")
