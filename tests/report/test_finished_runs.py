"""Check which runs are taken for a method, and what is read from them."""

import pytest

from bae.report.finished_runs import FinishedRuns
from bae.report.store import NotInStore
from tests.support import empty_store

SPEC = {"experiments": ["runs"]}


@pytest.fixture(scope="module")
def made(store):
    """Return the store, and the ids of its runs by name."""
    ocb = {"model": "tiny", "baseline": "ocb"}
    runs = {
        "old": store.run("runs", ocb | {"seed": 0}, {"eval/val/accuracy": 0.1}),
        "seed 1": store.run("runs", ocb | {"seed": 1}, {"val/ece": {1: 0.5, 3: 0.25}}),
        "new": store.run("runs", ocb | {"seed": 0}, {"eval/val/accuracy": 0.2, "eval/easy/accuracy": 0.9}),
        "failed": store.run("runs", ocb | {"seed": 0}, status="FAILED"),
        "large": store.run("runs", ocb | {"seed": 0, "model": "large"}),
        "mean": store.run("runs", {"model": "tiny", "baseline": "group_mean", "seed": 0}),
        "elsewhere": store.run("other", ocb | {"seed": 2}),
    }
    row = {"prompt": "val/0", "correct": True, "confidence": 0.5}
    store.table(runs["new"], [row], "evaluation/val.parquet")
    store.table(runs["old"], [row | {"confidence": 0.75}], "evaluation/val.parquet")
    store.table(runs["new"], [{"baseline": "ocb", "error": 0.5}], "fidelity/val/errors.parquet")
    return store, runs


def evidence(made, experiments=None, runs=None, models=None):
    return FinishedRuns(made[0].uri, experiments, runs, models, resamples=10)


def chosen(made, method, **options):
    """Return the names of the runs that are taken, by model."""
    names = {run_id: name for name, run_id in made[1].items()}
    found = evidence(made, **options).by_model(SPEC, method)
    return {model: [names[run.info.run_id] for run in runs] for model, runs in found.items()}


def test_the_newest_finished_run_of_each_seed(made):
    assert chosen(made, {"baseline": "ocb"}) == {"large": ["large"], "tiny": ["new", "seed 1"]}


def test_a_method_may_have_several_values_of_a_parameter(made):
    assert chosen(made, {"baseline": ["group_mean", "batch_mean"]}) == {"tiny": ["mean"]}
    assert chosen(made, {"baseline": "ocb", "objectives": "rlcr"}) == {}


def test_runs_can_be_chosen(made):
    _, ids = made
    assert chosen(made, {}, models=["large"]) == {"large": ["large"]}
    assert chosen(made, {}, runs=[ids["old"], ids["failed"]]) == {"tiny": ["old"]}
    assert chosen(made, {}, runs=[ids["elsewhere"]]) == {"tiny": ["elsewhere"]}  # an id says enough
    assert chosen(made, {}, experiments=["other"]) == {"tiny": ["elsewhere"]}


def test_the_first_split_with_an_evaluation(made):
    found = evidence(made)
    runs = found.by_model(SPEC, {"baseline": "ocb"})["tiny"]
    for splits, expected in ((["math500", "easy", "val"], "easy"), (["val", "easy"], "val")):
        split, evaluated = found.evaluated(runs, splits)
        assert split == expected and [run.info.run_id for run in evaluated] == [made[1]["new"]]
    assert found.evaluated(runs, ["math500"]) is None and found.evaluated([], ["val"]) is None


def test_what_runs_logged(made):
    store, ids = made
    found = evidence(made)
    new, old, seed_1 = (store.client.get_run(ids[name]) for name in ("new", "old", "seed 1"))
    pooled = found.pooled([old, new], "val")
    assert list(pooled["confidence"]) == [0.75, 0.5] and list(pooled.index) == [0, 1]
    assert list(found.errors(new, "val")["error"]) == [0.5]
    assert found.errors(new, "easy") is None and found.errors(old, "val") is None
    assert found.history(seed_1, "val/ece") == {1: 0.5, 3: 0.25}


def test_what_cannot_be_reported_is_refused(made, tmp_path):
    _, ids = made
    evidence(made, runs=[ids["old"]]).check()
    with pytest.raises(NotInStore, match=r"not in the MLflow store .*abc"):
        evidence(made, runs=["abc"]).check()
    with pytest.raises(NotInStore, match=f"runs: {ids['failed']} is FAILED; only finished"):
        evidence(made, runs=[ids["failed"]]).check()
    with pytest.raises(NotInStore, match=r"no MLflow store at .*; name another with outputs="):
        FinishedRuns(f"sqlite:///{tmp_path}/mlflow.db", None, None, None, 10).check()
    assert not list(tmp_path.iterdir())  # MLflow would make the file
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    with pytest.raises(NotInStore, match="has no finished run"):
        FinishedRuns(f"sqlite:///{tmp_path}/mlflow.db", None, None, None, 10).check()
