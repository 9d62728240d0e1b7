"""The best policy on held-out problems: which one is kept, what stands beside it, and that a resumed run agrees."""

import math

import pytest
import torch

from bae.callbacks.best import FOLDER, Best, Record, best_of
from bae.errors import UserError
from bae.evaluation.direction import low_is_good
from bae.training.policy import load_pretrained


def run(policy, folder, values, metric="val/ece", first=1):
    """See these values after steps `first`, `first` + 1, …; the weights are those of the number of the step."""
    best = Best(policy, folder, metric)
    for step, value in enumerate(values, first):
        policy.model.get_input_embeddings().weight.data.fill_(step)
        best.see({} if value is None else {metric: value, "val/accuracy": 0.5}, step, is_first=True)


def kept(folder):
    """The step of the weights that are kept."""
    policy = load_pretrained(str(folder / FOLDER), "float32", "{question}")
    weight = policy.model.get_input_embeddings().weight
    assert torch.equal(weight, weight[0, 0].expand_as(weight))
    return weight[0, 0].item()


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [
        ("val/ece", [0.3, 0.1, None, 0.2, 0.1], 2),  # the first of equal ones
        ("val/auroc", [math.nan, 0.6, 0.5, 0.7], 4),
        ("val/reward/correctness", [0.2, 0.1], 1),
        ("val/attempt_2/malformed", [0.2, 0.1], 2),
    ],
)
def test_the_best_is_kept_with_what_is_known_of_it(tiny, tmp_path, metric, values, step):
    run(tiny, tmp_path, values, metric)
    assert best_of(tmp_path) == Record(metric, step, values[step - 1])
    assert kept(tmp_path) == step


def test_nothing_is_kept_where_nothing_was_measured(tiny, tmp_path):
    run(tiny, tmp_path, [None, math.nan])
    assert best_of(tmp_path) is None and not (tmp_path / FOLDER).exists()
    Best(tiny, tmp_path, "val/ece").see({"val/ece": 0.1}, 1, is_first=False)  # another rank
    assert best_of(tmp_path) is None


def test_a_resumed_run_goes_on_with_the_best_before_it(tiny, tmp_path):
    run(tiny, tmp_path, [0.3, 0.2, 0.4])
    run(tiny, tmp_path, [0.25, 0.3], first=3)  # resumed after step 2
    assert best_of(tmp_path).step == 2
    run(tiny, tmp_path, [0.5, 0.4], first=2)  # after step 1: step 2 is done anew, and came out differently
    assert best_of(tmp_path) == Record("val/ece", 3, 0.4) and kept(tmp_path) == 3
    assert str(best_of(tmp_path)) == "val/ece 0.400 after step 3"


def test_a_metric_that_is_not_measured_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"best=val/auroc: this run does not measure it; there are val/accuracy$"):
        Best(tiny, tmp_path, "val/auroc").see({"val/accuracy": 0.5}, 1, is_first=True)


@pytest.mark.parametrize("metric", ["val/bias", "val/confidence", "val/length", "val/eec", "ece", "test/ece", "val/"])
def test_a_metric_without_a_direction_is_refused(metric):
    with pytest.raises(ValueError, match=rf"^optimize={metric}: .* low or high is good; choose from .*val/ece"):
        low_is_good("optimize", metric, "val")
