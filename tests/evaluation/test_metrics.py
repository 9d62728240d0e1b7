"""Compare calibration metrics with hand-worked values and other computations, and on sets without a value."""

import math
import warnings
from fractions import Fraction
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc

from bae.evaluation.metrics import (
    Calibration,
    accuracy,
    accuracy_at,
    all_metrics,
    as_double,
    aurc,
    auroc,
    brier_parts,
    brier_score,
    calibration,
    ece,
    ece_adaptive,
    ece_over,
    nll,
    reliability_table,
    smooth_ece,
    tenth,
)

NAMES = {"ece", "ece_10", "ece_adaptive", "brier", "reliability", "resolution", "uncertainty", "nll", "auroc"}
NAMES |= {"confidence", "bias", "coverage", "ece_over", "aurc", "accuracy_at_half", "smooth_ece"}
PRECISIONS = [torch.float32, torch.float64]
patient = settings(deadline=None)  # the cores may be busy


def decimals(places):
    """Draw texts of decimals in [0, 1] with up to `places` places; borders of bins and their neighbours are likely."""
    near = st.builds(
        lambda k, d: min(max(k * 10 ** (places - 1) + d, 0), 10**places), st.integers(0, 10), st.integers(-2, 2)
    )
    return (near | st.integers(0, 10**places)).map(lambda k: f"{k // 10**places}.{k % 10**places:0{places}d}")


def stated(places, min_size=1):
    return st.lists(st.tuples(decimals(places), st.booleans()), min_size=min_size, max_size=40)


def pairs(said, dtype=torch.double):
    return torch.tensor([float(q) for q, _ in said], dtype=dtype), torch.tensor([c for _, c in said])


def exact_ece(said, bins=11):
    """Compute the definition in a plain loop, in fractions."""
    gaps = [Fraction(0)] * bins
    for q, c in said:
        gaps[min(int(Fraction(q) * 10), bins - 1)] += Fraction(q) - c
    return float(sum(map(abs, gaps)) / len(said))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("places", [1, 2, 3, 6])
def test_every_decimal_is_in_its_bin(dtype, places):
    step = max(1, 10**places // 20_000)
    texts = [f"{k}e-{places}" for k in range(0, 10**places + 1, step)]
    bins = torch.tensor([int(Fraction(text) * 10) for text in texts])
    assert torch.equal(tenth(torch.tensor([float(text) for text in texts], dtype=dtype)), bins)


@pytest.mark.parametrize(
    ("q", "bin_of"),
    [(0.3, 3), (0.6, 6), (0.7, 7), (0.29999, 2), (0.2999999, 2), (0.299999999999, 2), (0.1 + 0.2, 3), (1.0, 10)],
)
def test_bins_of_what_a_shift_would_misplace(q, bin_of):
    assert int(tenth(torch.tensor([q], dtype=torch.double))) == bin_of


@patient
@given(decimals(12), decimals(6))
def test_twelve_places_as_float64_and_six_as_float32(twelve, six):
    assert int(tenth(torch.tensor([float(twelve)], dtype=torch.double))) == int(Fraction(twelve) * 10)
    assert int(tenth(torch.tensor([float(six)]))) == int(Fraction(six) * 10)


@pytest.mark.parametrize(("dtype", "places"), [(torch.float32, 6), (torch.float16, 3), (torch.bfloat16, 2)])
def test_narrow_types_stand_for_decimals(dtype, places):
    step = max(1, 10**places // 20_000)
    written = torch.tensor([k / 10**places for k in range(0, 10**places + 1, step)], dtype=torch.double)
    assert torch.equal(as_double(written.to(dtype)), written)


def test_widening_keeps_order_and_ties():
    q = torch.cat([torch.rand(5000), torch.arange(1000) / 999, torch.tensor([1e-10, 2e-10, 0.3, 0.3])])
    ascending = q.unique()
    assert bool((as_double(ascending).diff() > 0).all())
    assert torch.equal(as_double(ascending).float(), ascending)
    assert torch.equal(as_double(torch.tensor([0, 1])), torch.tensor([0.0, 1.0]).double())


def test_every_tenth_has_its_own_bin():
    # 0.3, 0.6 and 0.7 fall short of their bin in binary floats; a bin apart, errors of opposite sign would cancel.
    q = torch.tensor([i / 10 for i in range(11)]).repeat_interleave(2)
    c = torch.tensor([1.0, 0.0] * 11)
    expected = sum(abs(i / 10 - 0.5) for i in range(11)) / 11
    assert float(ece(q, c)) == pytest.approx(expected)


def test_by_hand():
    q, c = torch.tensor([0.95, 0.91, 1.0, 0.2]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    got = {name: float(value) for name, value in all_metrics(q, c).items()}
    # bins: {0.95, 0.91}: |0.93 - 0.5| * 2/4; {1.0}: 0; {0.2}: 0.8 * 1/4. With 10 bins, {0.95, 0.91, 1.0}: |2.86 - 2|
    assert got["accuracy"] == 0.75
    assert got["ece"] == pytest.approx(0.43 / 2 + 0.8 / 4)
    assert got["ece_over"] == pytest.approx(0.43 / 2)  # .95 and .91, one right; the other two are too modest
    assert got["ece_10"] == pytest.approx(0.86 / 4 + 0.8 / 4)
    assert got["ece_adaptive"] == pytest.approx((0.05 + 0.91 + 0 + 0.8) / 4)  # each alone in its bin
    assert got["brier"] == pytest.approx((0.05**2 + 0.91**2 + 0 + 0.8**2) / 4)
    assert got["nll"] == pytest.approx(-(math.log(0.95) + math.log(0.09) + math.log(0.999) + math.log(0.2)) / 4)
    assert got["auroc"] == pytest.approx(2 / 3)
    assert got["confidence"] == pytest.approx(3.06 / 4)
    assert got["bias"] == pytest.approx(0.06 / 4)
    assert got["coverage"] == 1


def test_brier_parts_by_hand():
    # 0.8 is said four times, right three times; 0.4 twice, right once. Base rate 4/6.
    q, c = torch.tensor([0.8] * 4 + [0.4] * 2), torch.tensor([1, 1, 1, 0, 1, 0])
    reliability, resolution, uncertainty = map(float, brier_parts(q, c))
    assert reliability == pytest.approx((4 * 0.05**2 + 2 * 0.1**2) / 6)
    assert resolution == pytest.approx((4 * (1 / 12) ** 2 + 2 * (1 / 6) ** 2) / 6)
    assert uncertainty == pytest.approx(2 / 9)


def test_nll_is_finite_for_certainty():
    q, c = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    assert float(nll(q, c, clip=0.01)) == pytest.approx(-(2 * math.log(0.01) + math.log(0.99)) / 3)


def test_adaptive_bins_have_equal_mass():
    q = torch.arange(100).double() / 128
    c = (torch.arange(100) % 3 == 0).double()
    expected = sum(abs(float((q - c)[k : k + 10].sum())) for k in range(0, 100, 10)) / 100
    assert float(ece_adaptive(q, c)) == pytest.approx(expected)


@patient
@given(st.permutations(range(12)))
def test_adaptive_bins_never_split_a_tie(order):
    q, c = torch.tensor([0.9] * 7 + [0.2] * 5), torch.tensor([1, 0] * 6)
    expected = abs(7 * 0.9 - 4) / 12 + abs(5 * 0.2 - 2) / 12
    assert float(ece_adaptive(q[list(order)], c[list(order)])) == pytest.approx(expected)


def test_a_tie_goes_where_its_middle_is():
    # Middles of 4, 4 and 2 at 0.2, 0.6 and 0.9: of two bins, the second takes the last two.
    q, c = torch.tensor([0.2] * 4 + [0.4] * 4 + [0.9] * 2), torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    assert float(ece_adaptive(q, c, bins=2)) == pytest.approx((abs(0.8 - 1) + abs(1.6 + 1.8 - 3)) / 10)


def reflected(q, t, width):
    """A Gaussian around q at t, reflected at 0 and 1 as often as matters."""
    images = [m + sign * q for m in range(-6, 7, 2) for sign in (1, -1)]
    return sum(math.exp(-(((t - image) / width) ** 2) / 2) for image in images) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("seed", range(3))
def test_smooth_ece_is_the_fixed_point_of_its_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(40, generator=generator, dtype=torch.double).round(decimals=2)
    c = (torch.rand(40, generator=generator, dtype=torch.double) < q**3).double()
    found = float(smooth_ece(q, c))
    places = [(k + 0.5) / 500 for k in range(500)]
    residuals = list(zip(q.tolist(), (c - q).tolist(), strict=True))
    integral = sum(abs(sum(r * reflected(x, t, found) for x, r in residuals)) for t in places) / 500 / 40
    assert found > 0.05 and found == pytest.approx(integral, abs=2e-3)


def test_smooth_ece_of_one_confidence_is_its_gap():
    for gap in (0.001, 0.01, 0.2):
        q, c = torch.full((1000,), 0.5 + gap, dtype=torch.double), torch.arange(1000).double() % 2
        assert float(smooth_ece(q, c)) == pytest.approx(gap, rel=1e-2)
    assert float(smooth_ece(torch.ones(3), torch.zeros(3))) == pytest.approx(1)
    assert float(smooth_ece(torch.tensor([0.25] * 4), torch.tensor([1.0, 0, 0, 0]))) == pytest.approx(0, abs=1e-9)


def test_auroc_counts_ties_half():
    q, c = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert float(auroc(q, c)) == 3.5 / 4


def orders(said):
    """All orders of completions from the most confident down, with ties in every order."""
    return [o for o in permutations(said) if all(float(a[0]) >= float(b[0]) for a, b in pairwise(o))]


@patient
@given(stated(1).filter(lambda said: len(said) <= 6))
def test_the_most_confident_are_taken_in_every_order_of_ties(said):
    q, c = pairs(said)
    n, every = len(said), orders(said)
    risks = [sum(sum(not c for _, c in o[:k]) / k for k in range(1, n + 1)) / n for o in every]
    assert float(aurc(q, c)) == pytest.approx(sum(risks) / len(risks))
    for k in range(1, n + 1):
        expected = sum(sum(c for _, c in o[:k]) / k for o in every) / len(every)
        assert float(accuracy_at(q, c, coverage=k / n)) == pytest.approx(expected)


@patient
@given(stated(2))
def test_over_and_underconfidence_are_all_of_ece(said):
    q, c = pairs(said)
    over, every, bias = float(ece_over(q, c)), float(ece(q, c)), float((q - c.double()).mean())
    assert over >= 0 and 2 * over - every == pytest.approx(bias, abs=1e-12)


@patient
@given(stated(6))
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_ece_is_the_definition(dtype, said):
    q, c = pairs(said, dtype)
    assert float(ece(q, c)) == pytest.approx(exact_ece(said), abs=1e-12)
    assert float(ece(q, c, bins=10)) == pytest.approx(exact_ece(said, bins=10), abs=1e-12)


@patient
@given(stated(12))
def test_brier_is_reliability_less_resolution_plus_uncertainty(said):
    q, c = pairs(said)
    reliability, resolution, uncertainty = brier_parts(q, c)
    torch.testing.assert_close(brier_score(q, c), reliability - resolution + uncertainty, atol=1e-14, rtol=0)


@patient
@given(stated(2))
def test_auroc_is_that_of_torchmetrics(said):
    said = [("0.50", True), ("0.50", False), *said]
    q, c = pairs(said)
    assert float(auroc(q, c)) == pytest.approx(float(binary_auroc(q, c.long())), abs=1e-6)  # which is float32


def test_scikit_learn_agrees():
    sklearn = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    for values in (11, 101, 10**9):
        q = torch.randint(0, values, (3000,), generator=g).double() / (values - 1)
        c = torch.rand(3000, generator=g).double() < 0.2 + q / 2
        clipped = q.clamp(1e-3, 1 - 1e-3)
        assert float(auroc(q, c)) == pytest.approx(sklearn.roc_auc_score(c, q), abs=1e-9)
        assert float(brier_score(q, c)) == pytest.approx(sklearn.brier_score_loss(c, q), abs=1e-9)
        assert float(nll(q, c)) == pytest.approx(sklearn.log_loss(c, clipped), abs=1e-9)


@patient
@given(st.lists(st.tuples(decimals(2) | st.just("nan"), st.booleans(), st.integers(0, 3)), max_size=30))
def test_a_weight_is_a_number_of_copies(said):
    q, c = pairs([row[:2] for row in said])
    w = torch.tensor([row[2] for row in said], dtype=torch.long)
    rows = torch.stack([w, torch.ones_like(w), torch.zeros_like(w)])
    got = all_metrics(q, c, rows)
    for i, times in enumerate(rows):
        for name, value in all_metrics(q.repeat_interleave(times), c.repeat_interleave(times)).items():
            torch.testing.assert_close(got[name][i], value, equal_nan=True, atol=1e-12, rtol=0, msg=name)
    table = reliability_table(q, c, rows)
    assert torch.equal(table["count"][0], reliability_table(q.repeat_interleave(w), c.repeat_interleave(w))["count"])


@patient
@given(stated(2), st.randoms())
def test_order_does_not_matter(said, random):
    shuffled = random.sample(said, len(said))
    torch.testing.assert_close(all_metrics(*pairs(shuffled)), all_metrics(*pairs(said)), equal_nan=True)


@patient
@given(stated(3))
def test_the_table_holds_the_ece(said):
    q, c = pairs(said)
    table = reliability_table(q, c)
    gaps = (table["count"] * (table["accuracy"] - table["confidence"])).nan_to_num().abs()
    assert float(gaps.sum() / len(q)) == pytest.approx(float(ece(q, c)), abs=1e-12)
    assert torch.equal(table["count"] == 0, table["accuracy"].isnan())


def test_the_table_by_hand():
    table = reliability_table(torch.tensor([0.3, 0.38, 1.0, torch.nan]), torch.tensor([1, 0, 1, 1]))
    assert table["count"].tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1]
    assert float(table["confidence"][3]) == pytest.approx(0.34)
    assert float(table["accuracy"][3]) == 0.5
    assert table["accuracy"][0].isnan()


@pytest.mark.parametrize("c", [[], [1.0, 1.0], [0.0]])
def test_auroc_of_one_kind_is_nan(c):
    assert auroc(torch.rand(len(c)), torch.tensor(c)).isnan()


def test_unreadable_confidences_count_in_coverage_and_accuracy_alone():
    q, c = torch.tensor([0.5, torch.nan, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    got = calibration(q, c)
    assert got.keys() == NAMES
    assert float(got["coverage"]) == pytest.approx(2 / 3)
    assert float(got["ece"]) == float(ece(q, c)) == pytest.approx(0.25)
    assert float(got["bias"]) == pytest.approx(0.75 - 1)
    assert float(accuracy(c)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("q", [[], [torch.nan], [torch.nan] * 3])
def test_nothing_readable_is_nan_without_a_warning(q):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = calibration(torch.tensor(q), torch.ones(len(q)))
    coverage = got.pop("coverage")
    assert all(value.isnan() for value in got.values())
    assert coverage.isnan() if not q else float(coverage) == 0


@pytest.mark.parametrize("q", [[85.0], [-0.1], [0.5, 0.5]])
def test_what_is_no_confidence_is_refused(q):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]|one shape"):
        calibration(torch.tensor(q), torch.ones(1))
    with pytest.raises(ValueError, match=r"outside \[0, 1\]|one shape"):
        Calibration().update(torch.tensor(q), torch.ones(1))


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="weights"):
        ece(torch.rand(3), torch.ones(3), torch.ones(2, 4))


def sample(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (n,), generator=g) / 10, torch.randint(0, 2, (n,), generator=g).float()


def test_the_metric_accumulates_and_resets():
    q, c = sample()
    metric = Calibration()
    for part in (slice(0, 16), slice(16, 16), slice(16, 64)):
        metric.update(as_double(q)[part] if part.start else q[part], c[part])  # types may differ
    torch.testing.assert_close(metric.compute(), all_metrics(q, c))
    metric.reset()
    metric.update(q[:20], c[:20])
    torch.testing.assert_close(metric.compute(), all_metrics(q[:20], c[:20]))


def test_as_a_step_of_training_uses_it():
    q, c = sample()
    metric = Calibration()
    torch.testing.assert_close(metric(q[:40], c[:40]), all_metrics(q[:40], c[:40]))  # of the batch
    metric(q[40:], c[40:])
    torch.testing.assert_close(metric.compute(), all_metrics(q, c))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("mine", [40, 0])
def test_the_metric_gathers_ranks(mine):
    """Another rank holds the rest; with 0 this rank was never updated."""
    q, c = sample()
    theirs = iter([as_double(q[mine:]), c[mine:].double()])
    metric = Calibration().to("cpu")
    if mine:
        metric.update(q[:mine], c[:mine])
    metric.distributed_available_fn = lambda: True

    def gathered(state, group):
        other = next(theirs)
        assert state.dtype == other.dtype  # a collective of two types is garbage
        return [state, other]

    metric.dist_sync_fn = gathered
    torch.testing.assert_close(metric.compute(), all_metrics(q, c))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("q", "c"), [([0.5, 0.6], [1, 1]), ([], []), ([torch.nan], [1])])
def test_the_metric_is_nan_without_a_warning(q, c):
    metric = Calibration()
    metric.update(torch.tensor(q), torch.tensor(c))
    assert metric.compute()["auroc"].isnan()
