"""A policy that states one confidence for all: what is measured, when the user is told, and that a run remembers."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from bae.batch import RolloutBatch
from bae.callbacks.collapse import ConfidenceCollapse, confidence_spread

ALONE = SimpleNamespace(world_size=1)


def test_by_hand():
    confidence = torch.tensor([0.5, 0.5, 0.9, 0.5, 0.1], dtype=torch.double)
    correct = torch.tensor([True, True, True, False, False])
    # .5, .5, .9: mean 19/30, squares (4/30)² twice and (8/30)². .5, .1: .2 from their mean.
    assert confidence_spread(confidence, correct) == {
        "confidence_distinct": 3, "confidence_mode_share": 0.6,
        "confidence_std/correct": pytest.approx((96 / 900 / 3) ** 0.5), "confidence_std/wrong": pytest.approx(0.2),
    }  # fmt: skip
    none_right = confidence_spread(confidence, torch.zeros(5).bool())
    assert math.isnan(none_right["confidence_std/correct"]) and none_right["confidence_std/wrong"] > 0


def step(callback, number, confidences, trainer=ALONE):
    """Metrics and warnings of one step; every second answer is right."""
    completions = [SimpleNamespace(confidence=q, correct=n % 2 == 0) for n, q in enumerate(confidences)]
    batch = RolloutBatch(number, [], 4)
    batch.samples, batch.scored = SimpleNamespace(), SimpleNamespace(completions=completions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.on_train_batch_start(trainer, None, batch, 0)
    return batch.metrics, [str(warning.message) for warning in caught]


def collapse(patience=3, mode_share=0.75):
    return ConfidenceCollapse(None, mode_share, patience)


SAME, SPREAD = [0.25, 0.25, 0.25, 0.75], [0.25, 0.25, 0.5, 0.75]  # shares of the mode .75 and .5


def told(callback, steps, first=0):
    """The steps, counted from 0, in which there was a warning."""
    return [n for n, stated in enumerate(steps, first) if step(callback, n, stated)[1]]


def test_the_warning_comes_once_in_a_collapse():
    assert told(collapse(), [SAME] * 9) == [2]
    assert told(collapse(), [SPREAD, SAME, SAME, SPREAD, SAME, SAME, SAME, SAME]) == [6]
    assert told(collapse(), [SAME] * 4 + [SPREAD] + [SAME] * 4) == [2, 7]  # and again after a recovery
    assert told(collapse(mode_share=0.76), [SAME] * 9) == []
    assert told(collapse(patience=1), [SPREAD, SAME, SAME]) == [1]


def test_what_the_warning_says():
    callback = collapse()
    for number in (10, 11):
        assert step(callback, number, SAME)[1] == []
    (sentence,) = step(callback, 12, SAME)[1]
    for part in ("at step 13, 75% ", "say 0.25", "since step 11", "reward hacking", "train/accuracy",
                 "train/confidence_std/correct"):  # fmt: skip
        assert part in sentence
    assert "\n" not in sentence


def test_completions_without_a_confidence_count_for_nothing():
    metrics, _ = step(collapse(), 0, [0.25, None, 0.75, 0.25, None])
    assert metrics["confidence_mode_share"] == pytest.approx(2 / 3) and metrics["confidence_distinct"] == 2
    assert metrics["confidence_std/correct"] == pytest.approx(0.25)  # of .25 and .75; the last one states none
    callback = collapse()
    assert step(callback, 0, [None] * 4) == ({}, []) and callback.streak == 0
    assert told(callback, [SAME, [None] * 4, SAME, SAME]) == [3]  # such a step counts neither way


def test_a_resumed_run_remembers():
    for stopped in range(1, 6):
        first, second = collapse(), collapse()
        before = told(first, [SAME] * stopped)
        second.load_state_dict(first.state_dict())
        assert before + told(second, [SAME] * (6 - stopped), first=stopped) == [2]


def test_ranks_judge_all_together():
    said = []
    two = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device="cpu"))
    for mine in ([0.25, None], [0.25, 0.75]):
        two.strategy.all_gather = lambda tensor: (said.append(tensor), tensor.expand(2, *tensor.shape))[1]
        step(collapse(), 0, mine, two)
    columns = iter([torch.stack([said[0], said[2]]), torch.stack([said[1], said[3]])])
    two.strategy.all_gather = lambda tensor: next(columns)
    metrics, warned = step(collapse(patience=1, mode_share=0.6), 0, [0.25, 0.75], two)
    assert metrics["confidence_mode_share"] == pytest.approx(2 / 3) and len(warned) == 1


@pytest.mark.parametrize(("option", "value"), [("mode_share", 0), ("mode_share", 1.1), ("patience", 0)])
def test_what_cannot_work_is_refused(option, value):
    with pytest.raises(ValueError, match=rf"callbacks\.collapse\.{option}={value}"):
        collapse(**{option: value})
