"""Calibration metrics against hand-worked values and sets that have no answer."""

import pytest
import torch

from bae.metrics import Calibration, auroc, brier_score, calibration, ece


def test_every_tenth_has_its_own_bin():
    # 0.3, 0.6 and 0.7 fall short of their bin in binary floats; a bin apart, errors of opposite sign would cancel.
    q = torch.tensor([i / 10 for i in range(11)]).repeat_interleave(2)
    c = torch.tensor([1.0, 0.0] * 11)
    expected = sum(abs(i / 10 - 0.5) for i in range(11)) / 11
    assert float(ece(q, c)) == pytest.approx(expected, abs=1e-6)


def test_ece_by_hand():
    q, c = torch.tensor([0.95, 0.91, 1.0, 0.2]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    # bins: {0.95, 0.91}: |0.93 - 0.5| * 2/4; {1.0}: 0; {0.2}: 0.8 * 1/4
    assert float(ece(q, c)) == pytest.approx(0.43 / 2 + 0.8 / 4)
    assert float(brier_score(q, c)) == pytest.approx((0.05**2 + 0.91**2 + 0 + 0.8**2) / 4)


def test_auroc_counts_ties_half():
    q, c = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert float(auroc(q, c)) == pytest.approx(3.5 / 4)


@pytest.mark.parametrize("c", [[], [1.0, 1.0], [0.0]])
def test_auroc_of_one_kind_is_nan(c):
    assert auroc(torch.rand(len(c)), torch.tensor(c)).isnan()


def test_unreadable_confidences_count_in_coverage_alone():
    got = calibration(torch.tensor([0.5, torch.nan, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert float(got["coverage"]) == pytest.approx(2 / 3)
    assert float(got["ece"]) == pytest.approx(0.25)
    nothing = calibration(torch.tensor([torch.nan]), torch.tensor([1.0]))
    assert nothing["ece"].isnan() and nothing["brier"].isnan() and float(nothing["coverage"]) == 0


def test_the_metric_accumulates():
    torch.manual_seed(0)
    q, c = torch.randint(0, 11, (64,)) / 10, torch.randint(0, 2, (64,)).float()
    metric = Calibration()
    for part in range(0, 64, 16):
        metric.update(q[part : part + 16], c[part : part + 16])
    got = metric.compute()
    assert float(got["accuracy"]) == pytest.approx(float(c.mean()))
    assert float(got["ece"]) == pytest.approx(float(ece(q, c)))
