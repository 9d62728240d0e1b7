"""From sampled ids to rewards, and what malformed output earns."""

import asyncio
import math
import multiprocessing
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bae.batch import Problem, SampledTokens
from bae.demonstrations.tiny import make_tokenizer
from bae.errors import UserError
from bae.objectives import Objective, check_objectives, combined
from bae.objectives.bce import bce
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.objectives.scoring import Scorer, Scoring
from bae.objectives.second_attempt import second_attempt
from bae.rollout.pipeline import Pipeline
from bae.text.blocks import make_blocks
from bae.text.tokens import token_bytes
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier, MathVerifier

TOKENIZER = make_tokenizer()
BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
OBJECTIVES = [
    Objective("correctness", "solution", worst=0.0, reward=correctness),
    Objective("confidence_brier", "confidence", worst=-1.0, score=brier, given="correctness"),
]
RIGHT, WRONG = "<reasoning>5</reasoning><answer>5</answer>", "<reasoning>5</reasoning><answer>6</answer>"
SURE = "<analysis>short</analysis><confidence>0.9</confidence>"


def rows_of(texts, ended=True):
    return [TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] * ended for text in texts]


def samples_of(rows, ended):
    """ended: of each row, or of all."""
    width = max(1, *map(len, rows))
    ids = torch.tensor([row + [TOKENIZER.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return SampledTokens(ids[:, :1], mask[:, :1], ids, mask, torch.tensor(ended).expand(len(rows)))


def score(texts, malformed="penalise", blocks=BLOCKS, objectives=OBJECTIVES, ended=True, verifier=None):
    rows = rows_of(texts, ended)
    scorer = Scorer(blocks, objectives, verifier or IntegerVerifier(), token_bytes(TOKENIZER), malformed)
    return scorer([Problem("p", "2+3=", "5")] * len(rows), samples_of(rows, ended))


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


def test_rewards_see_how_likely_each_token_was():
    """The log-probabilities are -1, -2, … from the first token of a row on, so the sums can be told by hand."""
    rows = rows_of([RIGHT + SURE, WRONG])
    samples = samples_of(rows, True)
    log_probs = -torch.arange(1.0, samples.completion_ids.shape[1] + 1).expand(2, -1) * samples.completion_mask
    parts = {}

    def keep(completion):
        parts[completion.text] = completion.log_probs("solution"), completion.log_probs("confidence")
        return 0.0

    def least_likely(completions):
        return [float(c.log_probs("confidence").sum()) for c in completions]

    objectives = [
        Objective("kept", "solution", worst=0.0, reward=keep),
        Objective("surprise", "confidence", worst=-1e9, group_reward=least_likely),
    ]
    scorer = Scorer(BLOCKS, objectives, IntegerVerifier(), token_bytes(TOKENIZER))
    scored = scorer([Problem("p", "2+3=", "5")] * 2, replace(samples, log_probs=log_probs))
    first = len(TOKENIZER(RIGHT)["input_ids"])
    (solution, confidence), (other, rest) = parts.values()
    assert solution.tolist() == other.tolist() == [-n for n in range(1, first + 1)]
    assert confidence.tolist() == [-n for n in range(first + 1, len(rows[0]) + 1)]
    assert rest.tolist() == [-first - 1]  # the end of sequence cuts the second block short
    assert scored.rewards[0, 1] == confidence.sum()
    with pytest.raises(ValueError, match="there is no block 'thought'; there are solution, confidence"):
        scored.completions[0].log_probs("thought")
    assert score([RIGHT]).completions[0].log_probs("solution") is None  # this engine reports none


def test_a_completion_is_sent_to_another_rank_without_its_neighbours():
    rows = rows_of([RIGHT + SURE] * 256)
    samples = samples_of(rows, True)
    scorer = Scorer(BLOCKS, OBJECTIVES, IntegerVerifier(), token_bytes(TOKENIZER))
    log_probs = torch.zeros(samples.completion_ids.shape)
    scored = scorer([Problem("p", "2+3=", "5")] * 256, replace(samples, log_probs=log_probs))
    assert len(pickle.dumps(scored.completions[7])) < 4000 < log_probs.nbytes


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
        def submit(self, pairs):
            return lambda: [Verdict.TIMEOUT] * len(pairs)

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
        ({"score": None}, "one of the three"),
        ({"reward": correctness}, "one of the three"),
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
    verifier = Counting()
    scored = score([RIGHT + SURE, WRONG + SURE, RIGHT, RIGHT + SURE], verifier=verifier)
    assert verifier.asked == [("5", "5"), ("6", "5")]
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


# Completions that come in one by one.

PROBLEMS = [Problem("p", "2+3=", "5"), Problem("q", "2+4=", "6")]
TWICE = make_blocks({"first": ["reasoning", "answer"], "second": ["reasoning", "answer"]})
ATTEMPTS = [
    Objective("correctness", "first", worst=0.0, reward=correctness),
    Objective("second", "second", worst=0.0, reward=partial(second_attempt, changed=0.1), given="correctness"),
]
FORMATS = {
    "with confidence": (BLOCKS, OBJECTIVES, [RIGHT + SURE, WRONG + SURE, *MALFORMED.values()]),
    "two attempts": (TWICE, ATTEMPTS, [a + b for a in (RIGHT, WRONG) for b in (RIGHT, WRONG, WRONG[:-9], "")]
                     + [WRONG + WRONG.replace("6", "06"), WRONG.replace("6", "7") * 2]),
}  # fmt: skip


class Counting(IntegerVerifier):
    """Counts the pairs that it is asked about, and its closings."""

    def __init__(self):
        super().__init__()
        self.asked, self.closed = [], 0

    def submit(self, pairs):
        self.asked += pairs
        return super().submit(pairs)

    def close(self):
        self.closed += 1


def batch(name, verifier=None):
    """A scorer, problems, rows and whether they ended: every text of a format, ended and cut off, for both problems."""
    blocks, objectives, texts = FORMATS[name]
    rows = rows_of(texts) + rows_of(texts, ended=False)
    problems = [problem for problem in PROBLEMS for _ in rows]
    ended = ([True] * len(texts) + [False] * len(texts)) * 2
    return Scorer(blocks, objectives, verifier or Counting(), token_bytes(TOKENIZER)), problems, rows * 2, ended


def assert_same(one, other):
    assert one.completions == other.completions and list(one.numbers) == list(other.numbers)
    for name in ("block_of", "rewards", "present", "malformed"):
        assert getattr(one, name).equal(getattr(other, name)), name


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_the_order_in_which_completions_come_changes_nothing(name, data):
    """Nor does it that some are not announced, or twice, or wrongly: what `finish` is given decides."""
    scorer, problems, rows, ended = batch(name)
    announced = data.draw(st.lists(st.sampled_from(range(len(rows)))))
    mistaken = data.draw(st.sets(st.sampled_from(range(len(rows))), max_size=3))
    samples = samples_of(rows, ended)
    with scorer.begin(problems) as scoring:
        for n in announced:
            if n in mistaken:
                scoring.add(n, rows[n - 1], ended[n - 1])
            else:
                scoring.add(n, rows[n], ended[n])
        scored = scoring.finish(samples)
    assert len(set(scorer.verifier.asked)) == len(scorer.verifier.asked)
    assert_same(scored, scorer(problems, samples))
    assert scorer.verifier.closed == 0


def test_a_batch_too_short_or_too_long_is_refused():
    scorer, problems, rows, ended = batch("with confidence")
    for wrong in (problems[1:], [*problems, PROBLEMS[0]]):
        with pytest.raises(ValueError, match="zip"):
            scorer(wrong, samples_of(rows, ended))


class Paced:
    """An engine that takes its time for each completion, and tells of each, or of none."""

    def __init__(self, rows, pace, tells=True, fails=False):
        self.rows, self.pace, self.tells, self.fails = rows, pace, tells, fails

    def sample(self, model, request):
        for n, row in enumerate(self.rows):
            time.sleep(self.pace)
            if self.tells and request.on_finished:
                request.on_finished(n, row, True)
        if self.fails:
            raise RuntimeError("out of memory")
        return samples_of(self.rows, True)


class Slow:
    """Right, but only after a while, one check at a time."""

    def __init__(self, pace):
        self.pace, self.worker = pace, ThreadPoolExecutor(1)

    def submit(self, pairs):
        check = self.worker.submit(time.sleep, self.pace * len(pairs))
        return lambda: check.result() or [Verdict.CORRECT] * len(pairs)

    def close(self):
        self.worker.shutdown(cancel_futures=True)


def run(engine, verifier, problem=PROBLEMS[0], vocabulary=None):
    tokenizer = SimpleNamespace(eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id)
    policy = SimpleNamespace(model=None, tokenizer=tokenizer, encode=lambda *question: [0])
    scorer = Scorer(BLOCKS, OBJECTIVES, verifier, vocabulary or token_bytes(TOKENIZER))
    return Pipeline(policy, engine, scorer, None, "", 100, 1.0)([problem], [(0,)], len(engine.rows))


def test_answers_are_verified_while_others_are_sampled():
    rows = rows_of([RIGHT.replace("<answer>5", f"<answer>{n}") + SURE for n in range(8)])
    verifier, took, results = Slow(0.1), {}, {}
    for tells in (False, True):
        start = time.perf_counter()
        _, results[tells], seconds = run(Paced(rows, 0.1, tells), verifier)
        took[tells] = time.perf_counter() - start
        assert sum(seconds.values()) == pytest.approx(took[tells], abs=0.1)
        assert seconds["rollout"] > 0.8
        assert (seconds["reward"] > 0.8) != tells
    verifier.close()
    assert took[False] > 1.6 and took[True] < 1.4  # 0.9 on an idle machine
    assert_same(results[True], results[False])


def test_reading_between_is_counted_as_reward(monkeypatch):
    add = Scoring.add
    monkeypatch.setattr(Scoring, "add", lambda *arguments: time.sleep(0.05) or add(*arguments))
    *_, seconds = run(Paced(rows_of([RIGHT + SURE] * 4), 0.0), IntegerVerifier())
    assert seconds["reward"] > 0.4 and seconds["rollout"] < 0.2  # four between, four at the end


def test_an_engine_that_fails_leaves_nothing_under_way():
    """A slow check, in processes, and one that waits for it."""
    before = {process.pid for process in multiprocessing.active_children()}
    texts = [RIGHT.replace("<answer>5", f"<answer>{answer}") for answer in ("10^{10^{9}}", "1+y")]
    vocabulary = [bytes([byte]) for byte in range(256)]
    rows = [[*text.encode(), TOKENIZER.eos_token_id] for text in texts]
    verifier = MathVerifier(timeout=60.0, workers=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(Paced(rows, 0.0, fails=True), verifier, Problem("p", "", r"x+\binom{x}{2}"), vocabulary)
    assert {process.pid for process in multiprocessing.active_children()} == before
    assert verifier.verify([("1.0", "1")]) == [Verdict.CORRECT]
    verifier.close()


def test_a_bad_reference_stops_the_batch():
    verifier = Counting()
    with pytest.raises(UserError, match="problem p: the reference 'five' cannot be read: it is not an integer"):
        run(Paced(rows_of([RIGHT]), 0.0), verifier, Problem("p", "", "five"))
    assert verifier.closed == 1


def test_a_worst_that_is_not_the_lowest_reward_is_warned_of():
    generous = [replace(OBJECTIVES[0], worst=0.5), OBJECTIVES[1]]
    with pytest.warns(UserWarning, match=r"objectives.rewards.correctness.worst=0.5: .* malformed output pays"):
        score([WRONG + SURE], objectives=generous)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        score([RIGHT + SURE, WRONG + SURE, "no tags"])
        score([WRONG + SURE], objectives=generous, malformed="mask")  # then it earns nothing


@pytest.mark.parametrize("changes", [{"weight": -1.0}, {"weight": math.nan}, {"weight": math.inf}, {"worst": math.nan}])
def test_numbers_of_an_objective_that_cannot_work(changes):
    with pytest.raises(ValueError, match=r"objectives.rewards.correctness.(weight|worst)="):
        replace(OBJECTIVES[0], **changes)


async def slow(completion):
    """Answer about right answers alone."""
    await asyncio.sleep(60 * (completion.answer() != "5"))
    return 0.5


def test_an_async_reward_that_does_not_answer_is_masked():
    objectives = [*OBJECTIVES, Objective("slow", "solution", worst=-1.0, reward=slow, timeout=0.3)]
    scored = score([RIGHT + SURE, WRONG + SURE, "<reasoning>5"], objectives=objectives)
    assert scored.rewards[:, 2].tolist() == [0.5, 0.0, -1.0]
    assert scored.present[:, 2].tolist() == [True, False, True]
    assert scored.malformed[:, 2].tolist() == [False, False, True]  # the verifier has nothing to do with it
    assert scored.unanswered[:, 2].tolist() == [False, True, False] and not scored.unanswered[:, :2].any()


def test_async_rewards_are_asked_while_others_are_sampled():
    begun = []

    async def noted(completion):
        begun.append(completion.text)
        return 1.0

    objectives = [*OBJECTIVES, Objective("slow", "solution", worst=-1.0, reward=noted)]
    scorer = Scorer(BLOCKS, objectives, IntegerVerifier(), token_bytes(TOKENIZER))
    with scorer.begin([Problem("p", "2+3=", "5")] * 2) as scoring:
        scoring.add(0, rows_of([RIGHT + SURE])[0], ended=True)
        for _ in range(100):
            time.sleep(0.01 * (not begun))
        assert begun == [RIGHT + SURE]  # and completion 1 is not there yet
        rows = rows_of([RIGHT + SURE, WRONG + SURE])
        assert scoring.finish(samples_of(rows, True)).rewards[:, 2].tolist() == [1.0, 1.0]
    assert begun == [RIGHT + SURE, WRONG + SURE]
