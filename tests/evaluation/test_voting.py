"""Check test-time scaling by hand, by all subsets, and by what must not matter; and classes of answers."""

from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.evaluation.voting import answer_classes, max_confidence, pass_at_k, scaling, votes

nan = torch.nan
patient = settings(deadline=None)  # the cores may be busy


def strategies(answer, correct, confidence, **options):
    """Score one prompt; the curves are lists."""
    got = scaling(
        torch.tensor([answer]), torch.tensor([correct]), torch.tensor([confidence], dtype=torch.double), **options
    )
    return {name: curve[0].tolist() for name, curve in got.items()}


def test_three_samples_by_hand():
    got = strategies([0, 1, 1], [True, False, False], [0.9, 0.5, 0.3])
    assert got["pass@1"] == pytest.approx([1 / 3] * 3)
    assert got["pass@k"] == pytest.approx([1 / 3, 2 / 3, 1])
    # Of two: {0, 1} and {0, 1'} are ties, {1, 1'} is wrong.
    assert got["maj"] == pytest.approx([1 / 3, (1 / 2 + 1 / 2 + 0) / 3, 0])
    assert got["maxconf"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert got["weighted_maj"] == pytest.approx([1 / 3, 2 / 3, 1])  # 0.9 beats 0.5 + 0.3


def test_sums_of_decimals_tie():
    # 0.1 + 0.2 is above 0.3 in floats. All three gave a tied answer, and one of them is right.
    assert strategies([0, 1, 1], [True, False, False], [0.3, 0.1, 0.2])["weighted_maj"][2] == pytest.approx(1 / 3)
    single = scaling(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 0, 0]]), torch.tensor([[0.3, 0.1, 0.2]]))
    assert float(single["weighted_maj"][0, 2]) == pytest.approx(1 / 3)


def test_no_answer_wins_only_where_there_is_no_other():
    got = strategies([-1, -1, 0], [False, False, True], [1.0, 1.0, nan])
    for name in ("maj", "maxconf", "weighted_maj"):
        assert got[name] == pytest.approx([1 / 3, 2 / 3, 1]), name  # right as soon as the third is drawn
    assert got["pass@1"] == pytest.approx([1 / 3] * 3)
    nothing = strategies([-1, -1], [False, False], [0.5, nan])
    assert all(curve == [0, 0] for curve in nothing.values())


def test_an_unreadable_confidence_is_worth_nothing():
    got = strategies([0, 1, 0], [True, False, True], [nan, 0.1, nan])
    assert got["maxconf"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert got["weighted_maj"] == pytest.approx([2 / 3, 1 / 3, 0])


def test_without_confidences_both_are_pass_at_1():
    got = strategies([0, 0, 1], [True, True, False], [nan] * 3)
    assert got["maxconf"] == pytest.approx([2 / 3] * 3)
    assert got["weighted_maj"] == pytest.approx([2 / 3] * 3)


def test_a_class_of_which_the_verifier_thinks_differently():
    assert strategies([0, 0, 0, 1], [True, True, False, False], [0.5] * 4)["maj"][3] == pytest.approx(2 / 3)


def test_pass_at_k_is_the_unbiased_estimator():
    n = 16
    for c in range(n + 1):
        expected = [1 - comb(n - c, k) / comb(n, k) for k in range(1, n + 1)]
        assert pass_at_k(torch.arange(n)[None] < c)[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_of_many_samples_is_stable():
    curve = pass_at_k(torch.arange(5000)[None] < 3)[0]
    assert float(curve[0]) == pytest.approx(3 / 5000)
    assert bool((curve.diff() >= 0).all()) and float(curve[-1]) == 1 and not curve.isnan().any()


def winner_score(answer, correct, value, by_class):
    """Apply the rule to one subset, in a plain loop."""
    given_answers = [i for i, a in enumerate(answer) if a >= 0]
    if not given_answers:
        return 0.0
    if by_class:
        value = [sum(v for a, v in zip(answer, value, strict=True) if a == mine) for mine in answer]
    best = max(value[i] for i in given_answers)
    tied = [correct[i] for i in given_answers if value[i] == best]
    return sum(tied) / len(tied)


def enumerated(answer, correct, value, by_class):
    n = len(answer)
    scores = [
        [
            winner_score(*([xs[i] for i in s] for xs in (answer, correct, value)), by_class)
            for s in combinations(range(n), k)
        ]
        for k in range(1, n + 1)
    ]
    return [sum(s) / len(s) for s in scores]


# Answer class, whether right, confidence in tenths; a class is right or wrong as a whole unless `mixed`.
def samples(mixed=False):
    one = st.tuples(st.integers(-1, 3), st.booleans(), st.integers(0, 10))

    def right(a, c):
        return a >= 0 and (c if mixed else a == 0)

    return st.lists(one, min_size=1, max_size=6).map(
        lambda rows: ([a for a, _, _ in rows], [right(a, c) for a, c, _ in rows], [q for _, _, q in rows])
    )


@patient
@given(samples(mixed=True))
def test_all_subsets_agree(drawn):
    answer, correct, tenths = drawn
    got = strategies(answer, correct, [q / 10 for q in tenths], orders=4)
    n = len(answer)
    exact = sorted({0, max(n - 2, 0), n - 1})  # n = 1, N - 1, N
    maj = enumerated(answer, correct, [1] * n, by_class=True)
    weighted = enumerated(answer, correct, tenths, by_class=True)
    assert got["maxconf"] == pytest.approx(enumerated(answer, correct, tenths, by_class=False))
    assert [got["maj"][i] for i in exact] == pytest.approx([maj[i] for i in exact])
    assert [got["weighted_maj"][i] for i in exact] == pytest.approx([weighted[i] for i in exact])


def test_random_subsets_approach_all_subsets():
    answer, correct, tenths = (
        [0, 1, 1, 2, 0, 2, 2, -1],
        [True, *[False] * 3, True, *[False] * 3],
        [9, 5, 3, 4, 2, 1, 2, 8],
    )
    got = strategies(answer, correct, [q / 10 for q in tenths], orders=2000)
    assert got["maj"] == pytest.approx(enumerated(answer, correct, [1] * 8, True), abs=0.01)
    assert got["weighted_maj"] == pytest.approx(enumerated(answer, correct, tenths, True), abs=0.01)


@patient
@given(samples())
def test_what_holds_of_every_prompt(drawn):
    answer, correct, tenths = drawn
    got = strategies(answer, correct, [q / 10 for q in tenths], orders=2)
    share = sum(correct) / len(correct)
    for name, curve in got.items():
        assert curve[0] == pytest.approx(share), name  # one sample leaves nothing to choose
        assert all(-1e-12 <= x <= 1 + 1e-12 for x in curve)
        assert curve[-1] <= any(correct) + 1e-12, name
    assert all(x <= best + 1e-12 for x, best in zip(got["maxconf"], got["pass@k"], strict=True))
    assert all(b >= a for a, b in zip(got["pass@k"], got["pass@k"][1:], strict=False))


@patient
@given(samples(), st.integers(0, 10))
def test_equal_confidences_say_nothing(drawn, tenth):
    answer, correct, _ = drawn
    got = strategies([abs(a) for a in answer], correct, [tenth / 10] * len(answer), orders=2)
    assert got["maxconf"] == pytest.approx(got["pass@1"])
    if tenth:
        assert got["weighted_maj"] == pytest.approx(got["maj"])


@patient
@given(samples(), st.randoms())
def test_the_order_of_samples_does_not_matter(drawn, random):
    n = len(drawn[0])
    order = random.sample(range(n), n)
    one, other = (
        strategies(a, c, [x / 10 for x in q], orders=2) for a, c, q in (drawn, [[xs[i] for i in order] for xs in drawn])
    )
    for name in ("pass@1", "pass@k", "maxconf"):
        assert one[name] == pytest.approx(other[name])
    for name in ("maj", "weighted_maj"):  # where random subsets are all subsets
        assert [one[name][i] for i in (0, n - 2, n - 1)] == pytest.approx([other[name][i] for i in (0, n - 2, n - 1)])


@patient
@given(samples(), st.permutations(range(4)))
def test_names_of_classes_do_not_matter(drawn, names):
    answer, correct, tenths = drawn
    renamed = [100 * names[a] if a >= 0 else -1 for a in answer]
    confidence = [q / 10 for q in tenths]
    assert strategies(answer, correct, confidence, orders=2) == strategies(renamed, correct, confidence, orders=2)


def test_prompts_do_not_touch_each_other():
    g = torch.Generator().manual_seed(0)
    answer = torch.randint(-1, 3, (5, 4), generator=g)
    correct, q = answer == 0, torch.rand(5, 4, generator=g)
    together = scaling(answer, correct, q)
    for p in range(5):
        alone = scaling(answer[p : p + 1], correct[p : p + 1], q[p : p + 1])
        for name, curve in together.items():
            exact = [0, 2, 3] if "maj" in name else slice(None)
            torch.testing.assert_close(curve[p, exact], alone[name][0, exact])


def test_the_seed_decides_and_the_size_of_chunks_does_not(monkeypatch):
    g = torch.Generator().manual_seed(0)
    answer = torch.randint(0, 3, (7, 9), generator=g)
    args = answer, answer == 0, torch.ones_like(answer)
    curve = votes(*args, seed=1)
    assert torch.equal(curve, votes(*args, seed=1))
    assert not torch.equal(curve, votes(*args, seed=2))
    monkeypatch.setattr("bae.evaluation.voting._CHUNK", 1)
    torch.testing.assert_close(curve, votes(*args, seed=1))


def test_wrong_input_is_refused():
    answer = torch.tensor([[0, -1]])
    with pytest.raises(ValueError, match="marked correct but has no answer"):
        max_confidence(answer, torch.tensor([[True, True]]), torch.rand(1, 2))
    with pytest.raises(ValueError, match=r"shape \(P, N\)"):
        votes(answer, torch.tensor([[True]]), torch.ones(1, 2).long())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    nothing = torch.zeros(shape)
    for curve in scaling(nothing.long(), nothing.bool(), nothing).values():
        assert curve.shape == shape


class Numbers:
    """Compare texts as numbers, and remember the pairs of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, pairs):
        self.calls.append(list(pairs))
        return [float(a) == float(b) for a, b in pairs]


def test_classes_of_one_prompt():
    numbers = Numbers()
    answers = ["1", None, "2", " ", "2.0", "2 ", "3", "2", "3.0"]
    assert answer_classes([answers], numbers) == [[0, -1, 1, -1, 1, 1, 2, 1, 2]]
    # Distinct texts only, each with founders until it has a class; the last class needs a comparison as well.
    assert numbers.calls == [
        [("2", "1"), ("2.0", "1"), ("3", "1"), ("3.0", "1")],
        [("2.0", "2"), ("3", "2"), ("3.0", "2")],
        [("3.0", "3")],
    ]


def test_prompts_share_calls_and_nothing_else():
    numbers = Numbers()
    prompts = [["1", "1.0", "2"], [], [None], ["1", "7", "7.0"], ["5"]]
    assert answer_classes(prompts, numbers) == [[0, 0, 1], [], [-1], [0, 1, 1], [0]]
    assert numbers.calls == [[("1.0", "1"), ("2", "1"), ("7", "1"), ("7.0", "1")], [("7.0", "7")]]


def test_nothing_to_compare_is_not_asked():
    numbers = Numbers()
    assert answer_classes([["4", " 4", None, "4"]], numbers) == [[0, 0, -1, 0]]
    assert numbers.calls == []


def test_without_transitivity_the_first_founder_takes_it():
    def close(pairs):
        return [abs(int(a) - int(b)) <= 1 for a, b in pairs]

    assert answer_classes([["1", "3", "2"]], close) == [[0, 1, 0]]


@patient
@given(st.lists(st.lists(st.none() | st.integers(0, 5).map(str) | st.integers(0, 5).map("{}.0".format), max_size=8)))
def test_classes_are_those_of_the_numbers(prompts):
    for answers, found in zip(prompts, answer_classes(prompts, Numbers()), strict=True):
        numbers = [None if a is None else float(a) for a in answers]
        order = list(dict.fromkeys(x for x in numbers if x is not None))
        assert found == [-1 if x is None else order.index(x) for x in numbers]
