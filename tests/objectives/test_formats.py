"""Formats of more than two blocks, of two attempts, and of two numbers, from the scorer to what is reported."""

import itertools
import json
import math
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch

from bae.batch import Problem, RolloutBatch, group_index
from bae.callbacks import BlockwiseAdvantages, HeldOut
from bae.callbacks.telemetry import completion_metrics
from bae.commands import fidelity, train
from bae.demonstrations.tiny import make_tokenizer
from bae.evaluation.completion_table import by_attempt, by_prompt, columns, frame, merge
from bae.evaluation.measure import lines, measure, test_time_scaling
from bae.fidelity.compare import compare_advantages, rewards_of
from bae.fidelity.measure import Study
from bae.method import normalisation
from bae.method.baselines import group_mean, leave_one_out, outcome_conditioned, without_self
from bae.method.stated_numbers import Candidates
from bae.objectives import Objective
from bae.objectives.bce import bce
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.objectives.form import brevity, in_format
from bae.objectives.outcomes import given_reward
from bae.objectives.rao_blackwell import RaoBlackwell
from bae.objectives.reward_view import number_decisions, reward_view, score_table
from bae.objectives.scoring import Scorer
from bae.objectives.second_attempt import second_attempt
from bae.objectives.values import correct_flags, stated_confidences
from bae.rollout.local.engine import LocalEngine
from bae.rollout.pipeline import Pipeline
from bae.text.blocks import make_blocks
from bae.text.tokens import token_bytes
from bae.text.verifier import IntegerVerifier
from bae.training.policy import load_pretrained
from tests.callbacks.test_dynamic_sampling import Written, alone
from tests.fidelity.test_continuations import TASK
from tests.objectives.test_scoring import score
from tests.support import call, runs
from tests.support.judge_server import judge_server
from tests.support.updates import make_update

test_time_scaling.__test__ = False  # it only sounds like a test
TOKENIZER = make_tokenizer()
PLAIN = {"objective": normalisation.none, "block": normalisation.none}

# Three blocks: reasoning, to be brief; an answer, given that; a number, given both.
THREE = make_blocks(
    {
        "thinking": ["reasoning"],
        "answer": {"sections": ["answer"], "malformed": "mask"},
        "confidence": {"sections": ["analysis", "confidence"], "malformed": "zero"},
    }
)
BRIEF = Objective("brief", "thinking", -1.0, reward=partial(brevity, block="thinking", free=3, limit=5))
RIGHT = Objective("correctness", "answer", 0.0, reward=correctness, given="brief")
BRIER = Objective("brier", "confidence", -1.0, score=brier, given=["brief", "correctness"])
ALL_THREE = [BRIEF, RIGHT, BRIER]
# Two attempts; and two attempts with a number about each, of which the last is scored by another rule.
TWICE = make_blocks({"first": ["reasoning", "answer"], "second": ["reasoning", "answer"]})
ATTEMPTS = [
    Objective("correctness", "first", 0.0, reward=correctness),
    Objective("second", "second", 0.0, reward=partial(second_attempt, changed=0.1), given="correctness"),
]
FOUR = make_blocks({"a": ["answer"], "b": ["confidence"], "c": ["answer"], "d": ["confidence"]})
TWO_NUMBERS = [
    Objective("first", "a", 0.0, reward=correctness),
    Objective("one", "b", -1.0, score=brier, given="first"),
    Objective("second", "c", 0.0, reward=partial(second_attempt, changed=0.1)),
    Objective("two", "d", math.log(0.01), score=partial(bce, epsilon=0.01), given=["first", "second"],
              number=1, answer=1, weight=0.5),
]  # fmt: skip


def three(reasoning, answer, q):
    """reasoning: digits, one token each; three tokens are free, five too many, and the tags are two."""
    return (
        f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"
        f"<analysis>short</analysis><confidence>{q}</confidence>"
    )


def twice(first, second):
    return "".join(f"<reasoning>1</reasoning><answer>{answer}</answer>" for answer in (first, second))


def four(*parts):
    tags = ["answer", "confidence"] * 2
    return "".join(f"<{tag}>{text}</{tag}>" for tag, text in zip(tags, parts, strict=False))


# The scorer.

SPOILT = {  # text, rewards, present, malformed
    "in form": (three(1, 5, 0.9), [0, 1, -0.01], "+++", "---"),
    "half brief": (three(12, 6, 0.5), [-0.5, 0, -0.25], "+++", "---"),
    "no reasoning": ("5", [-1, 0, 0], "+--", "+--"),  # penalised
    "unfinished answer": ("<reasoning>1</reasoning><answer>5", [0, 0, 0], "+--", "-+-"),  # masked
    "stops after the reasoning": ("<reasoning>1</reasoning>", [0, 0, 0], "+--", "-+-"),
    "no confidence": (three(1, 5, 0.9)[: -len("<confidence>0.9</confidence>")], [0, 1, 0], "+++", "--+"),  # zero
    "no number": (three(1, 5, "+"), [0, 1, 0], "+++", "--+"),
    "stops after the answer": ("<reasoning>123</reasoning><answer>5</answer>", [-1, 1, 0], "+++", "--+"),
    "nothing": ("", [-1, 0, 0], "+--", "+--"),
}


def flags(signs):
    return [sign == "+" for sign in signs]


@pytest.mark.parametrize("name", SPOILT)
def test_each_block_has_its_own_way_with_malformed_output(name):
    text, rewards, present, malformed = SPOILT[name]
    found = score([text], "penalise", THREE, ALL_THREE)
    torch.testing.assert_close(found.rewards[0], torch.tensor(rewards, dtype=torch.float))
    assert found.present[0].tolist() == flags(present) and found.malformed[0].tolist() == flags(malformed)


@pytest.mark.parametrize("policy", ["penalise", "mask", "zero"])
def test_blocks_without_a_way_of_their_own_take_the_general_one(policy):
    scorer = Scorer(THREE, ALL_THREE, IntegerVerifier(), token_bytes(TOKENIZER), policy)
    assert scorer.malformed == [policy, "mask", "zero"]
    assert [scorer.malformed_reward(j) for j in range(3)] == [-1.0 if policy == "penalise" else 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="malformed=skip: choose penalise"):
        Scorer(THREE, ALL_THREE, IntegerVerifier(), token_bytes(TOKENIZER), "skip")


def test_malformed_output_is_counted_by_objective():
    found = score([text for text, *_ in SPOILT.values()], "penalise", THREE, ALL_THREE)
    scorer = Scorer(THREE, ALL_THREE, IntegerVerifier(), token_bytes(TOKENIZER))
    metrics = completion_metrics(alone(), found, scorer)
    assert [round(9 * metrics[f"malformed/{name}"]) for name in ("brief", "correctness", "brier")] == [2, 2, 3]
    assert metrics["malformed"] == pytest.approx(7 / 9)
    assert metrics["accuracy"] == pytest.approx(4 / 9)
    # Masked rewards enter no mean; zeros do.
    assert metrics["reward/brief"] == pytest.approx((-0.5 - 1 - 1 - 1) / 9)
    assert metrics["reward/correctness"] == pytest.approx(4 / 5)
    assert metrics["reward/brier"] == pytest.approx((-0.01 - 0.25) / 5)
    assert metrics["coverage"] == pytest.approx(2 / 9) and "attempt_2/accuracy" not in metrics


def test_every_token_is_in_the_block_it_decides():
    found = score([three(12, 5, 0.9)], blocks=THREE, objectives=ALL_THREE)
    assert found.block_of[0].tolist() == [0] * 4 + [1] * 3 + [2] * 9
    assert found.completions[0].tokens == {"thinking": 4, "answer": 3, "confidence": 9}


def test_a_score_reads_the_number_and_the_answer_that_it_names():
    found = score([four(5, 0.9, 6, 0.8), four(6, 0.9, 5, 0.8), four(6, 1.7, 5, 1), four(5, 0.2, 5, "+"), four(5, 0.2)],
                  blocks=FOUR, objectives=TWO_NUMBERS)  # fmt: skip
    worst = math.log(0.01)
    hand = [
        [1, -0.01, 0.1, math.log(0.2)],
        [0, -0.81, 1, math.log(0.8)],
        [0, -1, 1, math.log(0.99)],  # the first number is none, which is no fault of the second
        [1, -0.64, 1, worst],
        [1, -0.64, 0, 0],  # stopped: the third block is malformed, the fourth was never reached
    ]
    torch.testing.assert_close(found.rewards, torch.tensor(hand), atol=1e-5, rtol=0)
    assert found.present.tolist() == [[True] * 4] * 4 + [[True, True, True, False]]
    assert found.malformed.int().tolist() == [[0] * 4, [0] * 4, [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert [c.confidences for c in found.completions] == [(0.9, 0.8), (0.9, 0.8), (None, 1.0), (0.2, None), (0.2,)]
    second = [0.8, 0.8, 1.0, math.nan, math.nan]
    torch.testing.assert_close(stated_confidences(found.completions, 1), torch.tensor(second), equal_nan=True)
    assert correct_flags(found.completions, 1).tolist() == [0, 1, 1, 1, 0]
    assert correct_flags(found.completions).tolist() == [1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("schema", "objectives", "attempts"),
    [
        (FOUR, TWO_NUMBERS, (0, 1)),
        (FOUR, TWO_NUMBERS[:2], (0, -1)),  # no objective says what the second number is about
        (TWICE, ATTEMPTS, (0, -1)),
        (THREE, ALL_THREE, (0,)),
        (make_blocks({"all": []}), [Objective("form", "all", 0.0, reward=in_format)], (0,)),
    ],
)
def test_which_number_is_about_which_attempt(schema, objectives, attempts):
    assert Scorer(schema, objectives, IntegerVerifier(), []).attempts == attempts


# What baselines see.

TEXTS = [  # brief, right, number; the pairs of the first two are 6 different ones, of 8
    three(1, 5, 0.9), three(1, 5, 0.5), three(12, 5, 0.4), three(1, 6, 0.2),
    three(12, 5, 0.6), three(12, 6, 0.3), three(12, 6, 0.1), three(123, 6, 0.5),
]  # fmt: skip
PAIRS = [(0, 1), (0, 1), (-0.5, 1), (0, 0), (-0.5, 1), (-0.5, 0), (-0.5, 0), (-1, 0)]


def test_outcomes_of_two_objectives_are_pairs():
    found = score(TEXTS, blocks=THREE, objectives=ALL_THREE)
    assert found.rewards[:, :2].tolist() == [list(map(float, pair)) for pair in PAIRS]
    outcome = score_table(found, ALL_THREE, given_reward, group_index(8, 8)).outcome
    assert outcome[:, 0].unique().numel() == 1
    assert outcome[:, 1].tolist() == [brief for brief, _ in PAIRS]
    for n, one in enumerate(PAIRS):
        for m, other in enumerate(PAIRS):
            assert (outcome[n, 2] == outcome[m, 2]) == (one == other)


ADVANTAGES = {  # of the third block, group of 8: -.01 -.25 -.36 -.04 -.16 -.09 -.01 -.25
    "ocb": (outcome_conditioned, [0.12, -0.12, -0.1, 0, 0.1, -0.04, 0.04, 0]),
    # Alone, the fourth and the last are compared with the other seven, had they been of wrong answers.
    "ocb_loo": (leave_one_out, [0.24, -0.24, -0.2, -0.04 + (0.81 + 0.25 + 0.16 + 0.36 + 0.09 + 0.01 + 0.25) / 7, 0.2,
                                -0.08, 0.08, -0.25 + (0.81 + 0.25 + 0.16 + 0.04 + 0.36 + 0.09 + 0.01) / 7]),
    "group_mean": (group_mean, [r + 1.17 / 8 for r in (-0.01, -0.25, -0.36, -0.04, -0.16, -0.09, -0.01, -0.25)]),
}  # fmt: skip


def pipeline_of(policy, blocks, objectives, engine=None, malformed="penalise", task=TASK, limit=60):
    scorer = Scorer(blocks, objectives, task.verifier, token_bytes(policy.tokenizer), malformed)
    return Pipeline(policy, engine or LocalEngine(), scorer, task, "", limit, 1.0)


def require_advantages(policy, blocks, objectives, texts, baseline, groups=1):
    """A batch of one question whose completions are these."""
    size = len(texts) // groups
    problems = [Problem(str(n), f"{n + 2}+3=", "5") for n in range(groups)]
    engine = Written(policy.tokenizer, {p.question: texts[n * size :][:size] for n, p in enumerate(problems)})
    pipeline = pipeline_of(policy, blocks, objectives, engine)
    batch = RolloutBatch(0, problems, size)
    batch.samples, batch.scored, _ = pipeline(problems, [(n,) for n in range(groups)], size)
    weigh = BlockwiseAdvantages(pipeline, baseline, group_mean, without_self, given_reward, PLAIN, 0)
    weigh.on_train_batch_start(alone(), None, batch, 0)
    return batch


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_three_blocks_by_hand(tiny, name):
    baseline, hand = ADVANTAGES[name]
    batch = require_advantages(tiny, THREE, ALL_THREE, TEXTS, baseline)
    per_objective = batch.require_advantages().per_objective
    torch.testing.assert_close(per_objective[:, 2], torch.tensor(hand), atol=1e-6, rtol=0)
    mean = sum(brief for brief, _ in PAIRS) / 8
    torch.testing.assert_close(per_objective[:, 0], torch.tensor([brief - mean for brief, _ in PAIRS]))
    # Of the second: right among the brief 2/3, among the half brief 1/2, among the long 0.
    of_right = {"ocb": [1 / 3, 1 / 3, 0.5, -2 / 3, 0.5, -0.5, -0.5, 0], "group_mean": [c - 0.5 for _, c in PAIRS]}
    if name in of_right:
        torch.testing.assert_close(per_objective[:, 1], torch.tensor(of_right[name]), atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.require_advantages().per_block, per_objective)
    assert batch.metrics["singleton/brier"] == 2 / 8 and batch.metrics["singleton/correctness"] == 1 / 8
    assert batch.metrics["fallback/brier"] == (2 / 8 if name == "ocb_loo" else 0)


def test_advantages_of_a_second_attempt_by_hand(tiny):
    """Judged among those whose first attempt came out alike."""
    texts = [twice(5, 5), twice(5, 6), twice(6, 5), twice(6, 6), twice(6, 7), twice(6, 7), twice(5, "5"), twice(4, 5)]
    batch = require_advantages(tiny, TWICE, ATTEMPTS, texts, outcome_conditioned)
    rewards = batch.require_rollouts()[1].rewards[:, 1]
    torch.testing.assert_close(rewards, torch.tensor([1, 0.1, 1, 0, 0.1, 0.1, 1, 1]))
    right, wrong = 2.1 / 3, 2.2 / 5
    hand = rewards - torch.tensor([right, right, wrong, wrong, wrong, wrong, right, wrong])
    torch.testing.assert_close(batch.require_advantages().per_objective[:, 1], hand)
    assert batch.metrics["singleton/second"] == 0


def test_two_objectives_on_a_block_share_its_tokens(tiny):
    form = Objective("form", "confidence", 0.0, reward=in_format, weight=0.1, given="correctness")
    texts = [*TEXTS[:4], three(1, 5, 0.7), three(1, 5, 0.7)[:-1], three(1, 6, "+"), three(1, 6, 0.4)[:-1]]
    batch = require_advantages(tiny, THREE, [*ALL_THREE, form], texts, outcome_conditioned)
    each, per_block = batch.require_advantages().per_objective, batch.require_advantages().per_block
    torch.testing.assert_close(per_block[:, 2], each[:, 2] + 0.1 * each[:, 3])
    assert each[:, 3].any()
    # Given the answer alone: of five right ones one is spoilt, of three wrong ones two, one by its number.
    hand = [0.2, 0.2, 0.2, 2 / 3, 0.2, -0.8, -1 / 3, -1 / 3]
    torch.testing.assert_close(each[:, 3], torch.tensor(hand), atol=1e-6, rtol=0)


UNCONDITIONED = Objective("correctness", "answer", 0.0, reward=correctness)


def test_numbers_of_three_blocks_are_left_to_the_training_step(tiny):
    batch = require_advantages(tiny, THREE, [BRIEF, UNCONDITIONED, BRIER], TEXTS, RaoBlackwell(leave_one_out), groups=2)
    given = batch.require_advantages()
    (numbers,) = given.refinements
    samples, scored = batch.require_rollouts()
    assert given.block_of_objective[numbers.objective] == 2 and (numbers.decisions.position[:, 0] >= 0).all()
    first = samples.completion_ids.gather(1, numbers.decisions.position[:, :1]).squeeze(1).tolist()
    assert TOKENIZER.convert_ids_to_tokens(first) == [f"{c.confidence}"[2] for c in scored.completions]
    torch.testing.assert_close(numbers.decisions.final, scored.rewards[:, 2])


def test_two_numbers_have_decisions_of_their_own(tiny):
    texts = [four(5, 0.9, 6, 0.8), four(6, 0.3, 5, 0.7), four(6, 0.4, 5, 0.25), four(5, 0.2, 5, "+")]
    batch = require_advantages(tiny, FOUR, TWO_NUMBERS, texts, RaoBlackwell(leave_one_out))
    samples, scored = batch.require_rollouts()
    given = batch.require_advantages()
    one, two = given.refinements
    assert [given.block_of_objective[found.objective] for found in (one, two)] == [1, 3]
    assert [given.weights[found.objective] for found in (one, two)] == [1.0, 0.5]
    for found, digits in ((one, "9342"), (two, "872 ")):
        for n, digit in enumerate(digits.rstrip()):
            place = int(found.decisions.position[n, 0])
            assert TOKENIZER.convert_ids_to_tokens(int(samples.completion_ids[n, place])) == digit
            assert scored.block_of[n, place] == given.block_of_objective[found.objective]
    assert two.decisions.position[3].tolist() == [-1] * two.decisions.position.shape[1]  # no point, no decision
    torch.testing.assert_close(one.decisions.final, torch.tensor([-0.01, -0.09, -0.16, -0.64]))
    hand = [math.log(0.2), math.log(0.7), math.log(0.25), math.log(0.01)]
    torch.testing.assert_close(two.decisions.final, torch.tensor(hand))
    # Where the second number is decided, the next digit is worth what the others that begin so earned by their rule.
    candidates = Candidates(token_bytes(TOKENIZER))
    again = number_decisions(scored, pipeline_of(tiny, FOUR, TWO_NUMBERS).scorer, 3, candidates)
    assert again.value.equal(two.decisions.value) and again.position.equal(two.decisions.position)
    seven = int((candidates.ids == TOKENIZER.convert_tokens_to_ids("7")).nonzero())
    # Of completion 2, right: another began 0.7, and would have earned log .7 under a right answer.
    assert float(two.decisions.value[2, 0, seven]) == pytest.approx(math.log(0.7), abs=1e-5)
    # Of completion 0, wrong: the same one, under a wrong answer.
    assert float(two.decisions.value[0, 0, seven]) == pytest.approx(math.log(0.3), abs=1e-5)


def test_each_number_is_rescored_under_the_answer_it_is_about():
    texts = [four(5, 0.9, 6, 0.8), four(6, 0.3, 5, 0.7), four(5, 0.2, 5, "+"), four(6)]
    found = score(texts, blocks=FOUR, objectives=TWO_NUMBERS)
    table = score_table(found, TWO_NUMBERS, given_reward, group_index(4, 4))
    one, two = (reward_view(TWO_NUMBERS[j], j, table, group_index(4, 4)) for j in (1, 3))
    assert (one.correct.tolist(), two.correct.tolist()) == ([1, 0, 1, 0], [0, 1, 1, 0])
    torch.testing.assert_close(one.rescored[:2], torch.tensor([[-0.81, -0.01], [-0.09, -0.49]]))
    hand = [[math.log(0.2), math.log(0.8)], [math.log(0.3), math.log(0.7)], [math.log(0.01)] * 2, [0, 0]]
    torch.testing.assert_close(two.rescored, torch.tensor(hand))
    picked = two.rescored.gather(1, two.correct.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(picked, two.reward)


@pytest.mark.parametrize("all_action", [False, True])
def test_a_training_step_with_two_numbers(tiny, all_action):
    """Gradients of all four blocks, and each number's block moves by its own."""
    texts = [four(5, 0.9, 6, 0.8), four(6, 0.3, 5, 0.7), four(6, 0.4, 5, 0.25), four(5, 0.2, 5, 0.6)]
    batch = require_advantages(tiny, FOUR, TWO_NUMBERS, texts, RaoBlackwell(leave_one_out, all_action))
    made = make_update(tiny, blocks=FOUR)
    found = made.block_gradients(batch, torch.arange(4), 0)
    assert found.shape[0] == 4 and found.isfinite().all() and (found.norm(dim=1) > 1e-4).all()
    made.step(batch)
    assert 0 < batch.metrics["grad_norm"] < math.inf


def test_what_has_no_number_to_expect_is_refused(tiny):
    for blocks, objectives, name in ((TWICE, ATTEMPTS, "second"), (THREE, ALL_THREE, "correctness")):
        with pytest.raises(ValueError, match=rf"objectives\.rewards\.{name} has no score of a stated number"):
            RaoBlackwell(leave_one_out).check(pipeline_of(tiny, blocks, objectives).scorer)
    RaoBlackwell(leave_one_out).check(pipeline_of(tiny, THREE, [BRIEF, UNCONDITIONED, BRIER]).scorer)
    masked = make_blocks({"a": ["reasoning", "answer"], "b": {"sections": ["confidence"], "malformed": "mask"}})
    objectives = [Objective("c", "a", 0.0, reward=correctness), Objective("q", "b", -1.0, score=brier, given="c")]
    with pytest.raises(ValueError, match=r"objectives\.rewards\.q has that policy"):
        RaoBlackwell(leave_one_out).check(pipeline_of(tiny, masked, objectives).scorer)
    elsewhere = make_blocks({"a": {"sections": ["answer"], "malformed": "mask"}, "b": ["confidence"]})
    RaoBlackwell(leave_one_out).check(pipeline_of(tiny, elsewhere, objectives).scorer)
    other = {"name": "confidence", "opening": "[", "closing": "]"}
    twice = make_blocks({"a": ["answer"], "b": ["confidence", other]})
    objectives = [Objective("c", "a", 0.0, reward=correctness), Objective("q", "b", -1.0, score=brier, given="c")]
    with pytest.raises(ValueError, match="close with </confidence> and ]; let them close alike"):
        RaoBlackwell(leave_one_out).check(pipeline_of(tiny, twice, objectives).scorer)
    for closing, refused in (("\n", False), (".", True)):
        lines = make_blocks({"a": ["answer"], "b": [{"name": "confidence", "opening": "%", "closing": closing}]})
        with pytest.raises(ValueError, match="begins as a number goes on") if refused else nullcontext():
            RaoBlackwell(leave_one_out).check(pipeline_of(tiny, lines, objectives).scorer)


# Nested rollouts.


@pytest.fixture(scope="module")
def warm():
    return load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")


@pytest.fixture(scope="module")
def two_attempt():
    return load_pretrained("package://assets/tiny_two_attempt", dtype="float32", prompt_template="{question}")


def rollouts_of(pipeline, prompts=3, sketch=0):
    problems = [TASK.problem("val", i) for i in range(prompts)]
    keys = [(0, 7, i) for i in range(prompts)]
    return Study(pipeline, given_reward, 4, 3, 2, 64, sketch).measure(problems, keys)


BASELINES = {"ocb": outcome_conditioned, "loo": leave_one_out, "rao_blackwell": RaoBlackwell(leave_one_out)}


def test_rollouts_of_three_blocks(warm):
    form = Objective("form", "confidence", 0.0, reward=in_format, given="correctness")
    pipeline = pipeline_of(warm, THREE, [*ALL_THREE, form], limit=40)
    table, sketches = rollouts_of(pipeline, sketch=8)
    parts = dict(list(table.groupby("objective", sort=False)))
    assert list(parts) == ["correctness", "brier", "form"]  # block by block
    assert set(parts["correctness"]["outcome"]) <= {0.0, -0.5, -1.0}
    pairs = parts["brier"]["outcome"]
    assert parts["brier"].groupby("outcome")["correct"].nunique().eq(1).all()
    assert pairs.nunique() > parts["correctness"]["outcome"].nunique()
    assert set(parts["form"]["outcome"]) <= {0.0, 1.0}
    # Fresh samples of the last block alone: rows of the same completions, and rollouts of the same texts.
    assert parts["brier"]["sample"].tolist() == parts["form"]["sample"].tolist()
    assert parts["brier"]["expected"].notna().any() and parts["form"]["expected"].isna().all()
    results, values = compare_advantages(table, BASELINES, without_self, [2, 4], "ocb", resamples=2)
    assert {(o, g) for o, g in zip(results["objective"], results["group_size"], strict=True)} == set(values)
    assert set(values) == {(o, g) for o in parts for g in (2, 4)}
    for objective in ("correctness", "form"):
        assert values[objective, 4]["rao_blackwell"].equal(values[objective, 4]["loo"])
    assert not values["brier", 4]["rao_blackwell"].equal(values["brier", 4]["loo"])
    assert sketches["form/whole"].shape == (len(parts["form"]), 8)
    assert results[results["set"] == "all"]["rmse"].notna().all()


def test_rollouts_of_a_second_attempt(two_attempt):
    table, _ = rollouts_of(pipeline_of(two_attempt, TWICE, ATTEMPTS, limit=64), prompts=6)
    assert table["objective"].unique().tolist() == ["second"]
    assert set(table["outcome"]) == {0.0, 1.0} and (table["outcome"] == table["correct"]).all()
    drawn = {round(float(x), 3) for row in [*table["rollouts"], *table["nested"], table["reward"]] for x in row}
    assert drawn <= {0.0, 0.1, 1.0} and len(drawn) > 1
    assert table[["rescored_wrong", "rescored_right", "expected"]].isna().all().all()
    assert rewards_of(table, 4).rescored is None
    results, values = compare_advantages(table, BASELINES, without_self, [4], "ocb", resamples=2)
    assert set(results["set"]) >= {"all", "incorrect", "correct"} and list(values) == [("second", 4)]


# Evaluation, attempt by attempt.

LISTED = [  # two questions, four samples of each: first and second answers
    [(5, 6), (5, 6), (6, 5), (7, 5)],
    [(6, 5), (6, 5), (5, 5), (7, 6)],
]
VERIFIER = IntegerVerifier()


def listed(blocks=TWICE, objectives=ATTEMPTS, write=twice, rows=None):
    scorer = Scorer(blocks, objectives, VERIFIER, token_bytes(TOKENIZER))
    completions = []
    for n, question in enumerate(rows or LISTED):
        found = score([write(*row) for row in question], blocks=blocks, objectives=objectives).completions
        completions += [type(c)(**(vars(c) | {"problem": Problem(f"p{n}", f"{n}+5=", "5")})) for c in found]
    return completions, scorer.attempts


def test_a_table_has_columns_for_each_attempt():
    made, attempts = listed()
    table = frame([columns(made, attempts)])
    assert list(table) == ["prompt", "question", "text", "reference", "answer", "verdict", "correct", "confidence",
                           "answer_2", "verdict_2", "correct_2", "confidence_2", "length", "truncated"]  # fmt: skip
    assert table["answer"].tolist() == ["5", "5", "6", "7", "6", "6", "5", "7"]
    assert table["answer_2"].tolist() == ["6", "6", "5", "5", "5", "5", "5", "6"]
    assert table["correct_2"].tolist() == [False, False, True, True, True, True, True, False]
    assert table["verdict_2"].tolist()[:3] == ["wrong", "wrong", "correct"]
    assert table["confidence"].isna().all() and table["confidence_2"].isna().all()
    assert table["confidence_2"].dtype == "float64"
    views = by_attempt(table)
    assert list(views) == ["", "attempt_2"] and views[""] is table
    for column in ("answer", "verdict", "correct", "confidence"):
        assert views["attempt_2"][column].tolist() == pytest.approx(table[f"{column}_2"].tolist(), nan_ok=True)
    assert by_prompt(views["attempt_2"], "answer") == [["6", "6", "5", "5"], ["5", "5", "5", "6"]]
    assert table["answer"].tolist()[0] == "5"  # the views are copies


def test_an_attempt_that_was_never_made():
    made, attempts = listed(write=lambda first, second: twice(first, second)[: -20 if second == 6 else None])
    table = frame([columns(made, attempts)])
    assert table["answer_2"].isna().tolist() == [True, True, False, False, False, False, False, True]
    assert table["verdict_2"].tolist()[0] == "none" and not table["correct_2"][0]


def test_two_numbers_are_in_two_columns():
    made, attempts = listed(FOUR, TWO_NUMBERS, four, [[(5, 0.9, 6, 0.8), (6, 1.7, 5, 0.7), (5, 0.2)]])
    table = frame([columns(made, attempts)])
    assert table["confidence"].tolist() == pytest.approx([0.9, math.nan, 0.2], nan_ok=True)
    assert table["confidence_2"].tolist() == pytest.approx([0.8, 0.7, math.nan], nan_ok=True)
    view = by_attempt(table)["attempt_2"]
    assert view["confidence"].tolist()[:2] == [0.8, 0.7] and view["correct"].tolist() == [False, True, False]


def test_measures_of_each_attempt(tmp_path):
    made, attempts = listed()
    summaries, files = measure(frame([columns(made, attempts)]), VERIFIER, tmp_path, "val", resamples=20)
    assert list(summaries) == ["val", "val/attempt_2"]
    first, second = summaries.values()
    assert (first.metrics["accuracy"], second.metrics["accuracy"]) == (3 / 8, 5 / 8)
    assert (first.scaling["pass@1"][0], second.scaling["pass@1"][0]) == (3 / 8, 5 / 8)
    assert (first.scaling["maj"][-1], second.scaling["maj"][-1]) == (0.5, 0.75)  # a tie at the first question's second
    assert first.scaling["pass@k"][-1] == second.scaling["pass@k"][-1] == 1
    for summary in (first, second):
        assert set(summary.scaling) == {"pass@1", "pass@k", "maj"}  # no confidence was stated
        assert summary.metrics["coverage"] == 0 and math.isnan(summary.metrics["ece"])
    assert {path.name for path in files} == {"val.parquet", "val.json", "val_scaling.png", "val_scaling.svg"}
    assert all(path.stat().st_size > 100 for path in files)
    written = json.loads((tmp_path / "val.json").read_text())
    assert list(written) == ["val", "val/attempt_2"] and written["val/attempt_2"]["metrics"]["accuracy"] == 5 / 8
    again = pandas.read_parquet(tmp_path / "val.parquet")
    assert again["answer_2"].tolist() == ["6", "6", "5", "5", "5", "5", "5", "6"]
    assert len(lines(summaries)) == 3 and "val/attempt_2" in lines(summaries)[2]


def test_measures_of_two_numbers(tmp_path):
    made, attempts = listed(FOUR, TWO_NUMBERS, four, [[(5, 0.9, 6, 0.8), (6, "+", 5, 0.7)], [(6, "+", 5, 0.3)] * 2])
    summaries, files = measure(frame([columns(made, attempts)]), VERIFIER, tmp_path, "val", resamples=20)
    first, second = summaries.values()
    assert first.metrics["coverage"] == 0.25 and second.metrics["coverage"] == 1
    assert first.metrics["brier"] == pytest.approx(0.01)
    assert second.metrics["brier"] == pytest.approx((0.64 + 0.09 + 0.49 + 0.49) / 4)
    assert second.scaling["maxconf"][-1] == 0.5 and first.scaling["maxconf"][-1] == 0.5
    assert "val_reliability.png" in {path.name for path in files}


def test_one_answer_is_one_attempt(tmp_path):
    made, attempts = listed(THREE, ALL_THREE, three, [[(1, 5, 0.9), (1, 6, 0.2)]])
    table = frame([columns(made, attempts)])
    assert "answer_2" not in table and list(by_attempt(table)) == [""]
    assert list(measure(table, VERIFIER, tmp_path, "val", resamples=5)[0]) == ["val"]


class Asked:
    """A task of questions that are written down."""

    verifier = VERIFIER

    def __init__(self, questions):
        self.questions = questions

    def size(self, split):
        return len(self.questions)

    def problem(self, split, index):
        return Problem(f"{split}/{index}", self.questions[index], "5")


def held_out(policy, rows, blocks, objectives, write):
    """What the callback logs before the first step."""
    asks = [f"{n}+5=" for n in range(len(rows))]
    engine = Written(policy.tokenizer, {q: [write(*row) for row in each] for q, each in zip(asks, rows, strict=True)})
    logged = {}
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=-1))
    trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, loggers=[logger], fit_loop=loops)
    pipeline = pipeline_of(policy, blocks, objectives, engine, task=Asked(asks))
    with tempfile.TemporaryDirectory() as folder:
        HeldOut(pipeline, "val", 500, len(rows[0]), 0, 0, "val", folder).on_train_start(trainer, None)
    return logged


def test_held_out_metrics_of_each_attempt(tiny):
    logged = held_out(tiny, LISTED, TWICE, ATTEMPTS, twice)
    assert (logged["val/accuracy"], logged["val/attempt_2/accuracy"]) == (3 / 8, 5 / 8)
    assert (logged["val/scaling/maj"], logged["val/attempt_2/scaling/maj"]) == (0.5, 0.75)
    assert (logged["val/scaling/pass_at_1"], logged["val/attempt_2/scaling/pass_at_1"]) == (3 / 8, 5 / 8)
    assert logged["val/scaling/pass_at_k"] == logged["val/attempt_2/scaling/pass_at_k"] == 1
    # 5 then 6, twice: changed; 6 or 7 then 5 is right, so are 5 then 5, and 7 then 6 is changed.
    assert logged["val/reward/second"] == pytest.approx((0.1 + 0.1 + 1 + 1 + 1 + 1 + 1 + 0.1) / 8)
    assert math.isnan(logged["val/ece"]) and "val/attempt_2/ece" not in logged
    assert not [name for name in logged if "maxconf" in name or "weighted_maj" in name]


def test_held_out_metrics_of_two_numbers(tiny):
    rows = [[(5, 0.9, 6, 0.8), (6, 0.1, 5, 0.7), (6, 0.2, 6, 0.6)]]
    logged = held_out(tiny, rows, FOUR, TWO_NUMBERS, four)
    assert logged["val/brier"] == pytest.approx((0.01 + 0.01 + 0.04) / 3)
    assert logged["val/attempt_2/brier"] == pytest.approx((0.64 + 0.09 + 0.36) / 3)
    assert (logged["val/scaling/maxconf"], logged["val/attempt_2/scaling/maxconf"]) == (1, 0)
    assert (logged["val/scaling/maj"], logged["val/attempt_2/scaling/maj"]) == (0, 0)
    # Of the second answers, 6 has .8 and .6, 5 has .7; of the first, 5 has .9 and 6 has .3.
    assert (logged["val/scaling/weighted_maj"], logged["val/attempt_2/scaling/weighted_maj"]) == (1, 0)


# Real runs.

SMALL = [
    "steps=1", "group_size=4", "prompts_per_step=4", "callbacks.completions.rows=2", "callbacks.progress=null",
    "callbacks.checkpoints.log_policy=false", "lr=1e-4", "callbacks.held_out.prompts=4", "callbacks.held_out.every=0",
    "training.warmup_steps=2", "training.micro_batch_tokens=400", "callbacks.throughput.seconds=0.01",
]  # fmt: skip
OF_THREE = [
    "~objectives.blocks", "~objectives.rewards",
    "+objectives.blocks={thinking: [reasoning], answer: {sections: [answer], malformed: mask}, "
    "confidence: [analysis, confidence]}",
    "+objectives.rewards={"
    "brief: {_target_: bae.objectives.Objective, block: thinking, worst: -1.0, "
    "reward: {_target_: bae.objectives.form.brevity, _partial_: true, block: thinking, free: 3, limit: 9}}, "
    "correctness: {_target_: bae.objectives.Objective, block: answer, worst: 0.0, "
    "reward: {_target_: bae.objectives.correctness.correctness, _partial_: true}}, "
    "brier: {_target_: bae.objectives.Objective, block: confidence, worst: -1.0, "
    "score: {_target_: bae.objectives.brier.brier, _partial_: true}, given: [brief, correctness]}}",
]  # fmt: skip
OF_TWO = ["experiment=two_attempt", "callbacks.held_out.samples=4", "callbacks.evaluation.splits=[val]",
          "callbacks.evaluation.prompts=4", "callbacks.evaluation.samples=4"]  # fmt: skip
GIVEN_BRIEF = "+objectives.rewards.correctness.given=brief"  # what rao_blackwell cannot have


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("formats") / "outputs"


def trained(outputs, *arguments):
    call(train, outputs, *SMALL, "skip_finished=false", *arguments)
    return runs(outputs)[1][-1]


def check_run(run, objectives):
    metrics = run.data.metrics
    assert run.info.status == "FINISHED" and 0 < metrics["train/grad_norm"] < math.inf
    for name in objectives:
        assert math.isfinite(metrics[f"train/reward/{name}"]) and 0 <= metrics[f"train/fallback/{name}"] <= 1
        assert 0 <= metrics[f"train/zero_signal/{name}"] <= 1
    assert sum(metrics[f"train/advantage_std/{name}"] for name in objectives) > 0.05


def test_a_run_of_three_blocks(outputs):
    run = trained(outputs, *OF_THREE, GIVEN_BRIEF, "baseline=ocb")
    check_run(run, ("brief", "correctness", "brier"))
    assert {"train/block_advantage_std/thinking", "train/block_zero_signal/answer", "val/ece", "val/malformed/brier",
            "train/gradient_cosine/thinking/confidence"} <= set(run.data.metrics)  # fmt: skip
    assert not [name for name in run.data.metrics if "attempt_2" in name]


def test_a_run_of_two_attempts(outputs):
    run = trained(outputs, *OF_TWO, "baseline=ocb")
    check_run(run, ("correctness", "second_attempt"))
    metrics = run.data.metrics
    for name in ("val", "train", "eval/val"):
        assert 0 <= metrics[f"{name}/accuracy"] <= 1 and 0 <= metrics[f"{name}/attempt_2/accuracy"] <= 1
    assert 0 <= metrics["val/attempt_2/scaling/maj"] <= 1
    assert not [name for name in metrics if "maxconf" in name]
    folder = Path(run.data.tags["output_folder"]) / "evaluation"
    assert list(json.loads((folder / "val.json").read_text())) == ["val", "val/attempt_2"]
    table = pandas.read_parquet(folder / "val.parquet")
    assert table["answer_2"].notna().any() and len(table) == 16
    assert metrics["eval/val/accuracy"] == table["correct"].mean()
    assert metrics["eval/val/attempt_2/accuracy"] == table["correct_2"].mean()


def test_a_run_with_a_judge_that_is_slow_for_a_fifth(outputs):
    """Such a step takes the time limit longer, and no more, because all wait at the same time."""
    limit, number = 2.0, itertools.count()

    def reply(message):
        time.sleep(4 * limit * (next(number) % 5 == 0))
        return f"Its steps follow. Score: {len(message) % 11}"

    with judge_server(reply) as server:
        judge = "objectives.rewards.judged.reward.judge"
        options = ["objectives=judged", f"{judge}.url={server.url}", f"{judge}.model=m", "group_size=16",
                   f"objectives.rewards.judged.timeout={limit}", "callbacks.evaluation.splits=[]"]  # fmt: skip
        run = trained(outputs, *options)
    metrics, folder = run.data.metrics, Path(run.data.tags["output_folder"])
    check_run(run, ("correctness", "judged", "confidence_brier"))
    assert 0.1 < metrics["train/unanswered/judged"] < 0.3 and metrics["train/malformed/judged"] < 0.1
    assert "val/unanswered/judged" in metrics and "train/unanswered/correctness" not in metrics
    assert limit / 2 < metrics["time/reward"] < limit + 1
    replies = [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]
    assert replies and {"question", "reasoning", "reply", "score"} <= replies[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["ocb_loo", "group_mean", "ocb_shrunk", "monte_carlo", "ocb_batch", "none"])
@pytest.mark.parametrize("kind", ["three", "two"])
def test_runs_with_other_baselines(outputs, kind, baseline):
    more = [*OF_THREE, GIVEN_BRIEF] if kind == "three" else OF_TWO
    names = ("brief", "correctness", "brier") if kind == "three" else ("correctness", "second_attempt")
    check_run(trained(outputs, *more, f"baseline={baseline}"), names)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["rao_blackwell", "all_action"])
def test_runs_that_expect_the_number(outputs, monkeypatch, baseline):
    check_run(trained(outputs, *OF_THREE, f"baseline={baseline}"), ("brief", "correctness", "brier"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for arguments, name in (([*OF_THREE, GIVEN_BRIEF], "correctness"), (OF_TWO, "second_attempt")):
        with pytest.raises(SystemExit, match=rf"rewards\.{name} has no score of a stated number"):
            trained(outputs, *arguments, f"baseline={baseline}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["three", "two"])
def test_how_near_baselines_come(outputs, kind):
    more = [*OF_THREE, GIVEN_BRIEF] if kind == "three" else OF_TWO
    folder = Path(trained(outputs, *more).data.tags["output_folder"])
    call(fidelity, outputs, f"run={folder}", "prompts=4", "group_size=4", "rollouts=4", "nested=0", "gradient=16",
         "resamples=10", "baselines=[ocb,ocb_loo,rao_blackwell]")  # fmt: skip
    results = pandas.read_csv(folder / "fidelity" / "val" / "fidelity.csv")
    names = ["correctness", "brier"] if kind == "three" else ["second_attempt"]
    assert results["objective"].unique().tolist() == names
    assert results[results["set"] == "all"].groupby("objective")["baseline"].nunique().eq(3).all()


def test_a_number_about_the_second_answer_is_not_about_the_first():
    blocks = make_blocks({"a": ["answer"], "b": ["answer"], "c": ["confidence"]})
    objectives = [Objective("c", "a", 0.0, reward=correctness), Objective("q", "c", -1.0, score=brier, answer=1)]
    assert Scorer(blocks, objectives, IntegerVerifier(), []).attempts == (-1, 0)


def test_ranks_whose_completions_state_no_number(tiny, tmp_path):
    """One rank's completions state numbers, the other's none: strategies are those of the whole table."""
    texts = [[three(1, 5, 0.9), three(1, 6, 0.2)], [three(1, 5, "+"), three(1, 6, "+")]]
    ranks = [score(mine, blocks=THREE, objectives=ALL_THREE).completions for mine in texts]
    tables = [frame([columns(completions, (0,))]).assign(prompt=str(rank)) for rank, completions in enumerate(ranks)]
    pipeline = pipeline_of(tiny, THREE, ALL_THREE, task=Asked(["1+4="] * 2))
    callback = HeldOut(pipeline, "val", 2, 2, 0, 0, "val", str(tmp_path))
    assert callback._votes(merge(tables))["scaling/maxconf"] == pytest.approx((1 + 0.5) / 2)
