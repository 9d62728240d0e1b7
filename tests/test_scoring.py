"""From sampled ids to rewards, and what malformed output earns."""

import math
from functools import partial

import pytest
import torch

from bae.batch import Problem, Samples
from bae.blocks import make_blocks
from bae.objectives import Objective, check_objectives, combined
from bae.objectives.bce import bce
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.scoring import Scorer
from bae.tokens import token_bytes
from bae.verifier import IntegerVerifier, Verdict
from bae.warmstart import make_tokenizer

TOKENIZER = make_tokenizer()
BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
OBJECTIVES = [
    Objective("correctness", "solution", worst=0.0, reward=correctness),
    Objective("confidence_brier", "confidence", worst=-1.0, score=brier, given="correctness"),
]
RIGHT, WRONG = "<reasoning>5</reasoning><answer>5</answer>", "<reasoning>5</reasoning><answer>6</answer>"
SURE = "<analysis>short</analysis><confidence>0.9</confidence>"


def score(texts, malformed="penalise", blocks=BLOCKS, objectives=OBJECTIVES, ended=True, verifier=None):
    rows = [TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] * ended for text in texts]
    width = max(1, *map(len, rows))
    ids = torch.tensor([row + [TOKENIZER.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    samples = Samples(ids[:, :1], mask[:, :1], ids, mask, torch.full((len(rows),), ended))
    scorer = Scorer(blocks, objectives, verifier or IntegerVerifier(), token_bytes(TOKENIZER), malformed)
    return scorer([Problem("p", "2+3=", "5")] * len(rows), samples)


def test_rewards_of_completions_in_form():
    scored = score([RIGHT + SURE, WRONG + SURE])
    torch.testing.assert_close(scored.rewards, torch.tensor([[1.0, -0.01], [0.0, -0.81]]))
    assert scored.present.all() and not scored.malformed.any()
    assert [c.verdicts for c in scored.completions] == [(Verdict.CORRECT,), (Verdict.WRONG,)]


def test_the_logarithmic_reward():
    rule = partial(bce, epsilon=0.01)
    objectives = [Objective("confidence_bce", "confidence", worst=math.log(0.01), score=rule)]
    sure, certain = SURE, SURE.replace("0.9", "1.0")
    scored = score([RIGHT + sure, WRONG + sure, RIGHT + certain, WRONG + certain, RIGHT], objectives=objectives)
    expected = [math.log(0.9), math.log(0.1), math.log(0.99), math.log(0.01), math.log(0.01)]  # clipped; the worst
    torch.testing.assert_close(scored.rewards[:, 0], torch.tensor(expected))


MALFORMED = {
    "empty": "",
    "prose": "5 + 5",
    "no answer": "<reasoning>5</reasoning>" + SURE,
    "truncated solution": "<reasoning>5</reasoning><answer>5",
    "no confidence": RIGHT + "<analysis>short</analysis>",
    "two confidences": RIGHT + SURE + "<confidence>0.9</confidence>",
    "above one": RIGHT + SURE.replace("0.9", "1.7"),
    "not a number": RIGHT + SURE.replace("0.9", "short"),
    "nested": RIGHT + "<analysis><confidence>0.9</confidence></analysis>",
    "truncated confidence": RIGHT + "<analysis>short</analysis><confidence>0.",
    "stopped": RIGHT,
}
FIRST_BLOCK = {"empty", "prose", "no answer", "truncated solution"}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize(("policy", "given"), [("penalise", (0.0, -1.0)), ("zero", (0.0, 0.0)), ("mask", (0.0, 0.0))])
def test_malformed_output(name, policy, given):
    scored = score([MALFORMED[name]], policy)
    k = 0 if name in FIRST_BLOCK else 1
    counts = policy != "mask"
    assert scored.malformed[0].tolist() == [k == 0, k == 1]
    assert scored.present[0].tolist() == ([counts, False] if k == 0 else [True, counts])
    assert scored.rewards[0].tolist() == ([given[0], 0.0] if k == 0 else [1.0, given[1]])


def test_an_end_of_sequence_is_a_token_of_the_block_it_cuts_short():
    scored = score([RIGHT])
    length = scored.completions[0].length
    assert scored.block_of[0].tolist() == [0] * (length - 1) + [1]


def test_truncation_right_after_the_answer_leaves_no_second_block():
    scored = score([RIGHT], ended=False)
    assert scored.completions[0].truncated
    assert scored.present[0].tolist() == [True, False] and not scored.malformed.any()


def test_tokens_after_the_end_belong_to_no_block():
    scored = score([RIGHT + SURE, ""])
    assert scored.block_of[1].tolist() == [0] + [-1] * (scored.block_of.shape[1] - 1)


def test_one_block_and_a_scalar():
    blocks = make_blocks({"completion": ["reasoning", "answer", "analysis", "confidence"]})
    parts = {"correctness": correctness, "confidence": partial(combined.scored, score=brier)}
    rlcr = partial(combined.weighted_sum, rewards=parts, weights={"correctness": 1.0, "confidence": 1.0})
    objectives = [Objective("rlcr", "completion", worst=-1.0, reward=rlcr)]
    scored = score([RIGHT + SURE, WRONG + SURE, RIGHT, RIGHT + SURE + SURE], blocks=blocks, objectives=objectives)
    torch.testing.assert_close(scored.rewards[:, 0], torch.tensor([0.99, -0.81, -1.0, -1.0]))
    assert scored.completions[2].correct  # accuracy still sees the answer


def test_a_timeout_is_not_wrong_but_is_not_rewarded():
    class Slow:
        def verify(self, pairs):
            return [Verdict.TIMEOUT] * len(pairs)

        def close(self): ...

    scored = score([RIGHT + SURE], verifier=Slow())
    assert scored.completions[0].verdicts == (Verdict.TIMEOUT,)
    torch.testing.assert_close(scored.rewards, torch.tensor([[0.0, -0.81]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "confidense"}, "no such block"),
        ({"given": "corectness"}, "no such objective"),
        ({"given": "confidence_brier"}, "before"),
        ({"score": None}, "one of the two"),
        ({"reward": correctness}, "one of the two"),
    ],
)
def test_objectives_that_name_what_is_not_there(changes, message):
    options = {
        "name": "confidence_brier",
        "block": "confidence",
        "score": brier,
        "worst": -1.0,
        "given": "correctness",
    }
    with pytest.raises(ValueError, match=message):
        check_objectives([OBJECTIVES[0], Objective(**options | changes)], BLOCKS)


def test_equal_answers_are_verified_once():
    class Counting(IntegerVerifier):
        seen = 0

        def verify(self, pairs):
            self.seen += len(pairs)
            return super().verify(pairs)

    verifier = Counting()
    scored = score([RIGHT + SURE, WRONG + SURE, RIGHT, RIGHT + SURE], verifier=verifier)
    assert verifier.seen == 2
    assert [c.correct for c in scored.completions] == [True, False, True, True]


def test_numbers_are_where_they_were_sampled():
    scored = score([RIGHT + SURE, RIGHT, RIGHT + SURE.replace("0.9", "1.7")])
    (number,), nothing, (unreadable,) = scored.numbers
    assert nothing == () and (unreadable.content, unreadable.value) == (b"1.7", None)
    ids = TOKENIZER(RIGHT + SURE)["input_ids"]
    assert TOKENIZER.decode(ids[number.first : number.first + 4]) == "0.9</confidence>"
    assert (number.content, number.offsets) == (b"0.9", (0, 1, 2, 3))


def test_a_number_that_the_limit_cuts_off_has_no_token_after_it():
    scored = score([RIGHT + "<analysis>short</analysis><confidence>0.9"], ended=False)
    ((number,),) = scored.numbers
    assert number.value is None and number.first + len(number.offsets) == scored.completions[0].length


def test_what_cannot_be_read_has_no_score_whatever_the_rule_makes_of_it():
    rule = lambda q, c: (q >= 0.5) * (c - 0.5)  # noqa: E731 - a comparison with NaN is False
    objectives = [Objective("acting", "confidence", worst=-0.5, score=rule)]
    scored = score([RIGHT + SURE, RIGHT + SURE.replace("0.9", "1.7")], objectives=objectives)
    assert scored.rewards[:, 0].tolist() == [0.5, -0.5] and scored.malformed[:, 0].tolist() == [False, True]
