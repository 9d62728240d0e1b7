"""What objectives pay: by hand, and that no scoring rule pays for saying anything but what one believes."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bae.batch import Completion, Problem, SampledTokens
from bae.demonstrations.tiny import make_tokenizer
from bae.objectives import Objective, check_objectives
from bae.objectives.bce import bce
from bae.objectives.brier import brier
from bae.objectives.combined import scored, weighted_sum
from bae.objectives.correctness import correctness
from bae.objectives.form import brevity, in_format
from bae.objectives.likelihood import inverse_success
from bae.objectives.scoring import Scorer
from bae.objectives.second_attempt import second_attempt
from bae.objectives.spherical import spherical
from bae.objectives.truthful import truthful
from bae.text.blocks import Section, make_blocks
from bae.text.tokens import token_bytes
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier, MathVerifier
from tests.objectives.test_scoring import score

EPSILON = 1e-3
RULES = {"brier": brier, "bce": partial(bce, epsilon=EPSILON), "spherical": spherical}
RANGES = {"brier": (-1.0, 0.0), "bce": (math.log(EPSILON), 0.0), "spherical": (0.0, 1.0)}
every_rule = pytest.mark.parametrize("name", RULES)
WORDS = {"right": Verdict.CORRECT, "wrong": Verdict.WRONG, "unreadable": Verdict.UNPARSEABLE, "late": Verdict.TIMEOUT,
         "abstained": Verdict.ABSTAINED}  # fmt: skip


def completion(verdicts=("right",), repeats=(), confidences=(0.9,), well_formed=(True, True), length=9, tokens=None):
    """One that no policy wrote; answers are numbered."""
    sections = tuple(Section("answer", str(n)) for n in range(len(verdicts)))
    return Completion(Problem("p", "2+3=", "5"), "", sections, well_formed, confidences, length, False,
                      tokens or {}, repeats, verdicts=tuple(WORDS[word] for word in verdicts))  # fmt: skip


# Scoring rules.


@pytest.mark.parametrize(
    ("name", "q", "c", "reward"),
    [
        ("brier", 0.0, 1, -1.0),
        ("brier", 0.3, 1, -0.49),
        ("brier", 0.3, 0, -0.09),
        ("bce", 0.25, 1, math.log(0.25)),
        ("bce", 0.25, 0, math.log(0.75)),
        ("bce", 0.0, 1, math.log(EPSILON)),
        ("bce", 1.0, 0, math.log(EPSILON)),
        ("bce", 1.0, 1, math.log(1 - EPSILON)),
        ("spherical", 0.0, 1, 0.0),
        ("spherical", 1.0, 1, 1.0),
        ("spherical", 0.0, 0, 1.0),
        ("spherical", 0.5, 1, math.sqrt(0.5)),
        ("spherical", 0.5, 0, math.sqrt(0.5)),
        ("spherical", 0.6, 1, 0.6 / math.sqrt(0.52)),  # 0.36 + 0.16
        ("spherical", 0.6, 0, 0.4 / math.sqrt(0.52)),
    ],
)
def test_scores_by_hand(name, q, c, reward):
    assert float(RULES[name](torch.tensor(q), torch.tensor(float(c)))) == pytest.approx(reward, abs=1e-4)


@every_rule
def test_the_best_report_is_what_one_believes(name):
    """The expected score p s(q, 1) + (1 - p) s(q, 0) is largest at q = p, and there alone."""
    q = torch.arange(101, dtype=torch.double) / 100
    p = q.unsqueeze(1)
    expected = p * RULES[name](q, torch.ones_like(q)) + (1 - p) * RULES[name](q, torch.zeros_like(q))
    assert expected.argmax(1).tolist() == list(range(101))
    best = expected.max(1, keepdim=True).values
    near = expected > best - 1e-9
    assert near.sum(1).eq(1).all()


@every_rule
def test_scores_stay_in_their_range_and_pay_the_surer(name):
    low, high = RANGES[name]
    q = torch.linspace(0, 1, 1001, dtype=torch.double)
    right, wrong = (RULES[name](q, torch.full_like(q, c)) for c in (1.0, 0.0))
    for reward in (right, wrong):
        assert reward.min() >= low - 1e-9 and reward.max() <= high + 1e-9
    assert float(right[0]) == pytest.approx(low, abs=1e-6) and float(wrong[-1]) == pytest.approx(low, abs=1e-6)
    assert (right.diff() >= 0).all() and (wrong.diff() <= 0).all()
    torch.testing.assert_close(right, wrong.flip(0))  # none prefers one outcome to the other


@every_rule
def test_scores_are_elementwise_and_keep_what_cannot_be_read(name):
    q, c = torch.tensor([[0.2], [0.7], [torch.nan]]), torch.tensor([[0.0, 1.0]])
    grid = RULES[name](q, c.expand(3, 2))
    assert grid.shape == (3, 2) and grid[2].isnan().all()
    for i in range(2):
        for j in range(2):
            assert grid[i, j] == RULES[name](q[i, 0], c[0, j])


# A second attempt.


@pytest.mark.parametrize(
    ("verdicts", "repeats", "reward"),
    [
        (("right", "right"), (True, True), 1.0),
        (("wrong", "right"), (True, False), 1.0),
        (("wrong", "wrong"), (True, False), 0.1),  # another wrong answer
        (("wrong", "wrong"), (True, True), 0.0),  # the same again
        (("right", "wrong"), (True, False), 0.1),
        (("unreadable", "unreadable"), (True, True), 0.0),
        (("wrong", "late"), (True, False), 0.1),
        (("wrong", "wrong", "right"), (True, True, False), 0.0),  # the second one counts, not the last
        (("right",), (True,), None),
        ((), (), None),
    ],
)
def test_a_second_attempt_by_hand(verdicts, repeats, reward):
    assert second_attempt(completion(verdicts, repeats), changed=0.1) == reward


TWICE = make_blocks({"first": ["reasoning", "answer"], "second": ["reasoning", "answer"]})
ATTEMPTS = [
    Objective("correctness", "first", 0.0, reward=correctness),
    Objective("second", "second", 0.0, reward=partial(second_attempt, changed=0.1), given="correctness"),
]


def twice(first, second):
    return "".join(f"<reasoning>1</reasoning><answer>{answer}</answer>" for answer in (first, second))


@pytest.mark.parametrize(
    ("first", "second", "repeats", "reward"),
    [
        ("5", "05", True, 1.0),
        ("05", "5", True, 1.0),
        ("6", "06", True, 0.0),
        ("6", " +6 ", True, 0.0),
        ("6", "7", False, 0.1),
        ("6", "5", False, 1.0),
        ("5", "6", False, 0.1),  # a right answer spoilt is a changed one
        ("6", "...", False, 0.1),
        ("...", "...", True, 0.0),
        ("-0", "0", True, 0.0),
        ("", "", True, 0.0),
    ],
)
def test_a_second_attempt_through_the_scorer(first, second, repeats, reward):
    found = score([twice(first, second)], blocks=TWICE, objectives=ATTEMPTS)
    assert found.completions[0].repeats == (True, repeats)
    assert found.rewards[0, 1] == pytest.approx(reward) and not found.malformed.any()


def test_completions_of_one_call_are_compared_apart():
    """Which second answers repeat the first is asked once for each pair of texts."""

    class Counting(IntegerVerifier):
        asked = ()

        def equivalent(self, pairs):
            self.asked += tuple(pairs)
            return super().equivalent(pairs)

    verifier = Counting()
    texts = [twice("6", "06"), twice("6", "7"), twice("6", "06"), twice("5", "5"), twice("5", "6"), twice("6", "5"),
             twice("6", "7")[:-9]]  # fmt: skip
    found = score(texts, blocks=TWICE, objectives=ATTEMPTS, verifier=verifier)
    assert verifier.asked == (("06", "6"), ("7", "6"))
    repeats = [c.repeats for c in found.completions]
    assert repeats == [(True, True), (True, False), (True, True), (True, True), (True, False), (True, False), (True,)]
    torch.testing.assert_close(found.rewards[:, 1], torch.tensor([0.0, 0.1, 0.0, 1.0, 0.1, 1.0, 0.0]))
    assert found.malformed[:, 1].tolist() == [False] * 6 + [True]


@pytest.fixture(scope="module")
def mathematician():
    verifier = MathVerifier(workers=1)
    yield verifier
    verifier.close()


def test_fractions_and_decimals_are_the_same_wrong_answer(mathematician):
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    scorer = Scorer(TWICE, ATTEMPTS, mathematician, vocabulary)
    pairs = [("1/2", "0.5"), ("1/2", "1/3"), ("5", "5.0"), ("x", "x")]
    rows = [[*twice(*pair).encode(), 256] for pair in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [256] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    samples = SampledTokens(ids[:, :1], mask[:, :1], ids, mask, torch.ones(len(rows)).bool())
    found = scorer([Problem("p", "2+3=", "5")] * len(rows), samples)
    assert [c.repeats[1] for c in found.completions] == [True, False, True, True]
    torch.testing.assert_close(found.rewards[:, 1], torch.tensor([0.0, 0.1, 1.0, 0.0]))


# Form.


def test_in_format():
    assert in_format(completion(well_formed=(True, True))) == 1.0
    assert in_format(completion(well_formed=(True, False))) == 0.0
    assert in_format(completion(well_formed=(False,))) == 0.0
    assert in_format(completion(confidences=(0.9, None))) == 0.0  # tags alone do not make a number
    assert in_format(completion(confidences=())) == 1.0


@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0.0), (4, 0.0), (5, -0.25), (6, -0.5), (7, -0.75), (8, -1.0), (9, -1.0), (10**6, -1.0)]
)
def test_brevity_by_hand(length, reward):
    assert brevity(completion(length=length), free=4, limit=8) == reward
    both = completion(length=10**6, tokens={"solution": length, "confidence": 99, "never reached": 0})
    assert brevity(both, free=4, limit=8, block="solution") == reward
    assert brevity(both, free=4, limit=8, block="confidence") == -1.0
    assert brevity(both, free=4, limit=8, block="never reached") == 0.0


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 200))
def test_brevity_falls_evenly_between_its_ends(free, more, length):
    at = lambda tokens: brevity(completion(length=tokens), free, free + more)  # noqa: E731
    assert -1 <= at(length) <= 0 and at(length + 1) <= at(length)
    assert at(free) == 0 and at(free + more) == -1
    assert at(free) - at(free + 1) == pytest.approx(1 / more)


@pytest.mark.parametrize(("free", "limit"), [(8, 8), (9, 8), (-1, 8), (0, 0)])
def test_brevity_without_room_is_refused(free, limit):
    with pytest.raises(ValueError, match=f"free={free} must be below limit={limit}"):
        brevity(completion(length=0), free, limit)


def test_tokens_of_a_block_are_those_it_owns():
    blocks = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
    objectives = [
        Objective("brief", "solution", -1.0, reward=partial(brevity, free=6, limit=10, block="solution")),
        Objective(
            "brief_confidence", "confidence", -1.0, reward=partial(brevity, free=0, limit=16, block="confidence")
        ),
        Objective("brief_both", "confidence", -1.0, reward=partial(brevity, free=0, limit=20)),
    ]
    solution, rest = (
        "<reasoning>12</reasoning><answer>5</answer>",
        "<analysis>short</analysis><confidence>1</confidence>",
    )
    found = score([solution + rest, solution], blocks=blocks, objectives=objectives)
    # Seven tokens of the solution; three and three of the rest, and the end of sequence, which is the rest's.
    assert [c.tokens for c in found.completions] == [{"solution": 7, "confidence": 7}, {"solution": 7, "confidence": 1}]
    torch.testing.assert_close(found.rewards[0], torch.tensor([-1 / 4, -7 / 16, -14 / 20]))
    assert found.rewards[1].tolist() == [-0.25, -1.0, -1.0]  # the second block is malformed, so it earns the worst


@given(st.lists(st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "5", "+"]), max_size=12),
       st.booleans())  # fmt: skip
def test_tokens_of_the_blocks_add_up_to_the_length(pieces, ended):
    found = score(["".join(pieces)], blocks=TWICE, objectives=ATTEMPTS, ended=ended)
    (made,) = found.completions
    assert sum(made.tokens.values()) == made.length == len(pieces) + ended
    for k, block in enumerate(TWICE):
        assert made.tokens.get(block.name, 0) == int((found.block_of[0] == k).sum())


# One scalar of several rewards.

BRIER, BCE = partial(scored, score=brier), partial(scored, score=partial(bce, epsilon=EPSILON))


@pytest.mark.parametrize("verdict", ["right", "wrong"])
@pytest.mark.parametrize("q", [0.0, 0.25, 0.9, 1.0])
def test_scalars_by_hand(verdict, q):
    made, c = completion((verdict,), confidences=(q,)), float(verdict == "right")
    rlcr = partial(weighted_sum, rewards={"c": correctness, "q": BRIER}, weights={"c": 1.0, "q": 1.0})
    rlvr_bce = partial(weighted_sum, rewards={"c": correctness, "q": BCE}, weights={"c": 1.0, "q": 1.0})
    clipped = min(max(q, EPSILON), 1 - EPSILON)
    assert rlcr(made) == pytest.approx(c - (q - c) ** 2)
    assert rlvr_bce(made) == pytest.approx(c + c * math.log(clipped) + (1 - c) * math.log(1 - clipped), abs=1e-4)
    half = partial(weighted_sum, rewards={"c": correctness, "q": BRIER}, weights={"c": 2.0, "q": 0.5})
    assert half(made) == pytest.approx(2 * c - 0.5 * (q - c) ** 2)


def test_nothing_to_score():
    both = partial(weighted_sum, rewards={"c": correctness, "q": BRIER}, weights={"c": 1.0, "q": 1.0})
    for made in (completion(confidences=()), completion(confidences=(None,)), completion((), confidences=(0.9,))):
        assert BRIER(made) is None and both(made) is None
    assert correctness(completion(())) is None
    assert correctness(completion(("wrong", "right"))) == 0.0  # the first answer alone
    assert BRIER(completion(("wrong", "right"), confidences=(0.5, 1.0))) == -0.25  # of the first, about the first
    assert weighted_sum(completion(), {}, {}) == 0.0
    zero = partial(weighted_sum, rewards={"c": correctness, "q": BRIER}, weights={"c": 1.0, "q": 0.0})
    assert zero(completion(confidences=(None,))) is None


def test_every_reward_has_a_weight():
    with pytest.raises(KeyError, match="q"):
        weighted_sum(completion(), {"c": correctness, "q": BRIER}, {"c": 1.0})


# What objectives may name.

FOUR = make_blocks(
    {"solution": ["answer"], "confidence": ["confidence"], "again": ["answer"], "last": ["confidence", "note"]}
)


def objectives(**changes):
    options = {"name": "last", "block": "last", "worst": -1.0, "score": brier, "number": 1, "answer": 1}
    return [
        Objective("first", "solution", 0.0, reward=correctness),
        Objective("second", "confidence", -1.0, score=brier, given="first"),
        Objective("third", "again", 0.0, reward=correctness, given=["first", "second"]),
        Objective(**options | changes),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"number": 0, "answer": 0},
        {"number": 0, "answer": 1},
        {"given": None},
        {"given": []},
        {"given": "third"},
        {"given": ["third"]},
        {"given": ["first", "second", "third"]},
        {"given": ("third", "first")},
        {"score": None, "reward": correctness, "number": 9},  # a reward states no number
    ],
)
def test_objectives_that_fit(changes):
    check_objectives(objectives(**changes), FOUR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"number": 2},
            r"objectives\.rewards\.last\.number=2: the blocks have 2 sections 'confidence', counted from 0",
        ),
        ({"number": -1}, "number=-1: the blocks have 2"),
        ({"answer": 2}, "answer=2: the blocks have 2 sections 'answer'"),
        ({"answer": -1}, "answer=-1"),
        ({"given": ["first", "forth"]}, "given=forth: no such objective; there are first, second, third, last"),
        ({"given": "last"}, "given=last: it must belong to a block before last"),  # its own block
        ({"block": "confidence", "given": ["first", "third"]}, "given=third: it must belong to a block before"),
        ({"block": "again", "given": ["third"]}, "given=third: it must belong to a block before again"),
        ({"block": "solution", "given": "first"}, "given=first"),
    ],
)
def test_objectives_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_objectives(objectives(**changes), FOUR)
    assert "\n" not in str(refused.value)


def test_a_number_needs_a_section_and_an_answer():
    for sections in (["answer"], ["confidence"]):
        with pytest.raises(ValueError, match="the blocks have 0 sections"):
            check_objectives([Objective("o", "all", -1.0, score=brier)], make_blocks({"all": sections}))
    with pytest.raises(ValueError, match="is empty"):
        check_objectives([], FOUR)


def test_the_outcomes_an_objective_is_conditioned_on():
    assert Objective("o", "b", 0.0).givens == ()
    assert Objective("o", "b", 0.0, given="correctness").givens == ("correctness",)
    assert Objective("o", "b", 0.0, given=["a", "b"]).givens == ("a", "b")


def test_a_scorer_refuses_what_does_not_fit():
    vocabulary = token_bytes(make_tokenizer())
    with pytest.raises(ValueError, match="number=2"):
        Scorer(FOUR, objectives(number=2), IntegerVerifier(), vocabulary)


def test_a_block_that_is_not_there_is_no_silent_zero():
    with pytest.raises(ValueError, match="block=solutoin: no such block; there are solution"):
        brevity(completion(tokens={"solution": 5}), 3, 9, block="solutoin")


# Rewards that other methods are known for.


@pytest.mark.parametrize(
    ("word", "reward"), [("right", 1.0), ("wrong", -1.0), ("unreadable", -1.0), ("abstained", 0.0), (None, None)]
)
def test_the_truthful_reward_pays_for_abstaining(word, reward):
    assert truthful(completion(() if word is None else (word,))) == reward


def test_right_answers_count_more_where_they_are_rare():
    """With the group mean as baseline the advantages are (c - m) / m."""
    group = [completion(("right",)), completion(("wrong",)), completion(()), completion(("wrong",))]
    assert inverse_success(group) == [4.0, 0.0, None, 0.0]
    assert inverse_success(group[:2]) == [2.0, 0.0]
    assert inverse_success(group[1:]) == [0.0, None, 0.0]
