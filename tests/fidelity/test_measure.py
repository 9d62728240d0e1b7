"""Nested rollouts and what they say of baselines: by hand, and of the policy that ships."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas
import pytest
import torch

from bae.batch import Problem, SampledTokens
from bae.fidelity.compare import baseline_values, compare_advantages, errors_of, rewards_of
from bae.fidelity.measure import Study, check_nested
from bae.method.baselines import (
    MonteCarlo,
    group_mean,
    leave_one_out,
    none,
    outcome_conditioned,
    without_self,
)
from bae.method.shrinkage import EmpiricalBayes
from bae.objectives import Objective
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.objectives.outcomes import given_reward
from bae.objectives.rao_blackwell import RaoBlackwell
from bae.objectives.scoring import Scorer
from bae.training.policy import load_pretrained
from tests.fidelity.test_continuations import SOLUTION, TASK, THREE, make_pipeline

COLUMNS = ["objective", "prompt", "group", "sample", "reward", "outcome", "correct", "rescored_wrong",
           "rescored_right", "expected", "rollouts", "nested"]  # fmt: skip
BASELINES = {"ocb": outcome_conditioned, "rao_blackwell": RaoBlackwell(leave_one_out)}


@pytest.fixture(scope="module")
def warm():
    return load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")


def measured(pipeline, prompts=4, group_size=4, rollouts=3, nested=2, seed=0, problems=None, **options):
    problems = problems or [TASK.problem("val", i) for i in range(prompts)]
    keys = [(seed, 7, i) for i in range(len(problems))]
    return Study(pipeline, given_reward, group_size, rollouts, nested, 64, **options).measure(problems, keys)


@pytest.fixture(scope="module")
def sampled(warm):
    return measured(make_pipeline(warm), prompts=12, group_size=8, rollouts=32, nested=8)[0]


def confident(q):
    return f"<analysis></analysis><confidence>{q}</confidence>"


class Script:
    """An engine that writes what it is told: first `texts`, whatever the problem, then the same ends of each prefix."""

    def __init__(self, tokenizer, texts, ends):
        self.tokenizer, self.texts, self.ends, self.keys = tokenizer, texts, ends, []

    def sample(self, model, request):
        texts = self.ends if self.keys else self.texts
        assert len(texts) == request.group_size
        self.keys += request.keys
        rows = [[*self.tokenizer(text)["input_ids"], request.eos_token_id] for _ in request.prompts for text in texts]
        length = torch.tensor([[len(row)] for row in rows])
        ids = torch.tensor([row + [request.pad_token_id] * (int(length.max()) - len(row)) for row in rows])
        mask = torch.arange(ids.shape[1]) < length
        return SampledTokens(*request.padded_prompts(), ids, mask, torch.ones(len(ids)).bool())


WRONG = "<reasoning>4</reasoning><answer>4</answer>"
TEXTS = [SOLUTION + confident(0.9), "<reasoning>3", WRONG + confident(0.2), SOLUTION + confident(1.7)]


def scripted(policy, texts=TEXTS, prompts=1, sketch=0):
    """A table of problems `1+2=`, four fresh ends of each prefix: three rollouts and a nested one."""
    engine = Script(policy.tokenizer, texts, [confident(q) for q in (0.0, 0.1, 0.2, 0.5)])
    pipeline = make_pipeline(policy, limit=60, engine=engine)
    problems = [Problem(f"p{i}", "1+2=", "3") for i in range(prompts)]
    return *measured(pipeline, group_size=len(texts), rollouts=3, nested=1, problems=problems, sketch=sketch), engine


def test_the_table_by_hand(warm):
    table, sketches, _ = scripted(warm, prompts=2)
    assert list(table) == COLUMNS and sketches == {}
    assert table["objective"].unique().tolist() == ["confidence_brier"]  # correctness conditions on nothing
    assert table["prompt"].tolist() == ["p0"] * 3 + ["p1"] * 3 and table["group"].tolist() == [0] * 3 + [1] * 3
    first = table[:3]
    assert first["sample"].tolist() == [0, 2, 3]  # the second never answered
    assert first["outcome"].tolist() == first["correct"].tolist() == [1, 0, 1]
    np.testing.assert_allclose(first["reward"], [-0.01, -0.04, -1.0], atol=1e-6)  # 1.7 is no confidence
    np.testing.assert_allclose(first["rescored_wrong"], [-0.81, -0.04, -1.0], atol=1e-6)
    np.testing.assert_allclose(first["rescored_right"], [-0.01, -0.64, -1.0], atol=1e-6)
    hand = [[-1, -0.81, -0.64], [0, -0.01, -0.04], [-1, -0.81, -0.64]]
    np.testing.assert_allclose(np.stack(first["rollouts"]), hand, atol=1e-6)
    np.testing.assert_allclose(np.stack(first["nested"]), [[-0.25]] * 3, atol=1e-6)
    assert first["expected"].between(-1, 0).all()


def test_no_draw_is_used_twice(warm):
    """numpy takes a seed and the same seed with zeros after it for one."""
    *_, engine = scripted(warm, prompts=2)
    assert len(engine.keys) == 2 + 6
    draws = {tuple(np.random.default_rng(key).random(4)) for key in engine.keys}
    assert len(draws) == len(engine.keys)


def test_a_table_of_nobody(warm):
    table, sketches, _ = scripted(warm, texts=["", "3"], sketch=4)
    assert table.empty and list(table) == COLUMNS
    assert sketches["confidence_brier/whole"].shape == (0, 4) and not sketches["confidence_brier/half_a"].any()
    results, values = compare_advantages(table, BASELINES, without_self, [2], None, resamples=2)
    assert results.empty and values == {}


def test_masked_samples_stand_for_the_mean_of_the_others(warm):
    engine = Script(warm.tokenizer, TEXTS, [confident(q) for q in (0.0, 0.2, "x", 0.0)])
    table, _ = measured(make_pipeline(warm, limit=60, engine=engine, malformed="mask"), rollouts=4, nested=0,
                        problems=[Problem("p", "1+2=", "3")])  # fmt: skip
    assert table["sample"].tolist() == [0, 2]  # the malformed number does not count
    np.testing.assert_allclose(table["rollouts"][0], [-1, -0.64, -2.64 / 3, -1], atol=1e-6)


def test_shapes_and_keys(warm, sampled):
    assert len(sampled) == 96 and list(sampled) == COLUMNS
    assert np.stack(sampled["rollouts"]).shape == (96, 32) and np.stack(sampled["nested"]).shape == (96, 8)
    first, second, other = (measured(make_pipeline(warm), seed=seed)[0] for seed in (3, 3, 4))
    pandas.testing.assert_frame_equal(first, second)
    assert not first["reward"].equals(other["reward"])


def test_the_policys_own_expectation_is_what_rollouts_say(sampled):
    results, values = compare_advantages(sampled, BASELINES, without_self, [8], "ocb", resamples=100)
    everyone = results[results["set"] == "all"].set_index("baseline")
    assert everyone["rmse_ratio"]["rao_blackwell"] <= 0.2 and everyone["rmse_ratio_high"]["rao_blackwell"] < 0.4
    assert everyone["rmse"]["ocb"] > 0.08
    assert everyone["fallback"]["rao_blackwell"] == 0
    # As many as there should be lie within two standard errors of the mean of their rollouts.
    rollouts = np.stack(sampled["rollouts"])
    error = (sampled["expected"] - rollouts.mean(1)) / (rollouts.std(1, ddof=1) / 32**0.5)
    assert (error.abs() < 2).mean() > 0.85
    torch.testing.assert_close(
        values["confidence_brier", 8]["rao_blackwell"], torch.tensor(sampled["expected"].tolist())
    )


def test_three_blocks_of_which_two_are_conditioned(warm):
    """Whether the reasoning is short is the outcome of the answer; whether the answer is right that of the number."""
    pipeline = make_pipeline(warm, THREE)

    def short(completion):
        return float(len(completion.sections[0].content) <= 8)

    objectives = [
        Objective("short", "reasoning", 0.0, reward=short),
        Objective("right", "solution", 0.0, reward=correctness, given="short"),
        Objective("brier", "confidence", -1.0, score=brier, given="right"),
    ]
    scorer = Scorer(pipeline.scorer.blocks, objectives, TASK.verifier, pipeline.scorer.vocabulary)
    refining = {"rb": BASELINES["rao_blackwell"]}
    table, sketches = measured(replace(pipeline, scorer=scorer), prompts=6, sketch=16, refining=refining)
    parts = dict(list(table.groupby("objective", sort=False)))
    assert list(parts) == ["right", "brier"]
    assert parts["right"]["expected"].isna().all() and parts["right"]["rescored_wrong"].isna().all()
    assert rewards_of(parts["right"], 4).rescored is None and rewards_of(parts["brier"], 4).rescored is not None
    assert set(np.stack(parts["right"]["rollouts"]).flatten()) == {0.0, 1.0}
    assert (parts["brier"]["outcome"] == parts["brier"]["correct"]).all()
    assert (parts["right"]["outcome"] != parts["right"]["correct"]).any()
    assert sketches["right/whole"].shape == (len(parts["right"]), 16)
    assert not sketches["right/rb/0"].any()  # there is no number to refine
    torch.testing.assert_close(sketches["right/rb/1"], sketches["right/whole"])
    assert sketches["brier/rb/0"].any() and sketches["brier/rb/1"].shape == sketches["brier/whole"].shape
    assert sketches["brier/half_a"].shape == (6, 16) and sketches["brier/half_b"].any()
    results, values = compare_advantages(
        table, BASELINES | {"loo": leave_one_out}, without_self, [2, 4], "ocb", resamples=2
    )
    assert results.groupby(["objective", "group_size"]).ngroups == len(values) == 4
    assert values["right", 4]["rao_blackwell"].equal(values["right", 4]["loo"])  # there is no number to expect
    assert not values["brier", 4]["rao_blackwell"].equal(values["brier", 4]["loo"])


def table_of(reward, group, sample, outcome=None, expected=torch.nan, rollouts=None, nested=None):
    """Of one objective, whose reward is no score."""
    n = len(reward)
    outcome = outcome or [1.0] * n
    g = np.random.default_rng(0)
    return pandas.DataFrame({
        "objective": "o", "prompt": [f"p{i}" for i in group], "group": group, "sample": sample, "reward": reward,
        "outcome": outcome, "correct": [int(o) for o in outcome], "rescored_wrong": torch.nan,
        "rescored_right": torch.nan, "expected": expected,
        "rollouts": list(rollouts if rollouts is not None else -g.random((n, 4))),
        "nested": list(nested if nested is not None else -g.random((n, 4))),
    })  # fmt: skip


def test_larger_groups_are_cut_into_smaller_ones():
    # Of a group of 8, samples 1 and 6 never came so far; the other group has none in its first half.
    table = table_of(
        [-0.1, -0.3, -0.5, -0.9, -0.7, -0.2, 0.0, -0.4], [0, 0, 0, 0, 0, 2, 2, 2], [0, 2, 3, 4, 5, 4, 5, 7],
        outcome=[1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    )  # fmt: skip
    chosen = {"group_mean": group_mean, "ocb": outcome_conditioned}
    results, values = compare_advantages(table, chosen, without_self, [4, 8], None, resamples=2)
    hand = {
        (4, "group_mean"): [-0.3, -0.3, -0.3, -0.8, -0.8, -0.2, -0.2, -0.2],
        (4, "ocb"): [-0.2, -0.2, -0.5, -0.8, -0.8, -0.2, -0.2, -0.2],
        (8, "group_mean"): [-0.5, -0.5, -0.5, -0.5, -0.5, -0.2, -0.2, -0.2],
        (8, "ocb"): [-0.2, -0.2, -0.7, -0.7, -0.7, -0.2, -0.2, -0.2],
    }
    for (size, name), value in hand.items():
        torch.testing.assert_close(
            values["o", size][name], torch.tensor(value), msg=lambda m, k=(size, name): f"{k} {m}"
        )
    everyone = results[results["set"] == "all"]
    assert everyone["completions"].tolist() == [8] * 4 and everyone["prompts"].tolist() == [2] * 4
    assert set(results["set"]) == {"all", "incorrect", "correct", "size=1", "size=2-3"}
    singles = results[(results["set"] == "size=1") & (results["baseline"] == "ocb")]
    assert dict(zip(singles["group_size"], singles["completions"], strict=True)) == {4: 2, 8: 1}


def graded(prompts=8, size=8, seed=0):
    g = np.random.default_rng(seed)
    group = np.arange(prompts).repeat(size)
    reward = -0.5 + 0.2 * g.standard_normal(prompts)[group] + 0.1 * g.standard_normal(prompts * size)
    return table_of(reward.tolist(), group.tolist(), (np.arange(prompts * size) % size).tolist())


def shrunk(table, size, baseline=None):
    prompt = torch.tensor(table["group"].tolist())
    made = {"shrunk": baseline or EmpiricalBayes(decay=0.0)}
    values, _ = baseline_values(rewards_of(table, size), made, without_self, prompt)
    return values["shrunk"]


@pytest.mark.parametrize("size", [4, 8])
def test_what_a_baseline_learns_is_of_other_prompts(size):
    """Every other prompt is of one's own half; a prompt's smaller groups are in one half together."""
    table, baseline = graded(), EmpiricalBayes(decay=0.0)
    before = shrunk(table, size, baseline)
    assert baseline.moments == {}  # that of training knows nothing of it
    changed = table.copy()
    theirs = (changed["group"] == 2) & (changed["sample"] >= 8 - size)  # with 4, the second group of the third prompt
    changed.loc[theirs, "reward"] += np.linspace(-0.9, 0.7, theirs.sum())
    after, theirs = shrunk(changed, size), torch.tensor(theirs.tolist())
    own_half = torch.tensor((table["group"] % 2 == 0).tolist())
    assert after[own_half & ~theirs].equal(before[own_half & ~theirs])
    assert (after[theirs] != before[theirs]).all()  # by the others of its stratum
    assert (after[~own_half] != before[~own_half]).all()  # by what is learnt


def test_one_prompt_teaches_itself_nothing():
    table = graded(prompts=1)
    alone, baseline = shrunk(table, 4), EmpiricalBayes()
    assert alone.equal(leave_one_out(rewards_of(table, 4)))
    for size in (2, 4):
        last = shrunk(table, size, baseline)
    assert last.equal(alone)


def test_the_share_of_the_fallback():
    table = table_of([-0.1, -0.3, -0.5, -0.9], [0, 0, 1, 1], [0, 1, 0, 1], outcome=[1.0, 0.0, 1.0, 1.0])
    chosen = {"loo": leave_one_out, "none": none}
    values, shares = baseline_values(rewards_of(table, 2), chosen, without_self, torch.tensor([0, 0, 1, 1]))
    assert shares == {"loo": 0.5, "none": 0.0}
    # The first is compared with the other right ones of the batch, the only wrong one with itself.
    torch.testing.assert_close(values["loo"], torch.tensor([-0.7, -0.3, -0.9, -0.5]))


def test_monte_carlo_has_samples_of_its_own():
    nested, rollouts = np.array([[-0.2, -0.4, -9.0], [-0.6, 0.0, -9.0]]), np.full((2, 4), -7.0)
    table = table_of([-0.1, -0.3], [0, 0], [0, 1], rollouts=rollouts, nested=nested)
    chosen = {"monte_carlo": MonteCarlo(2)}
    results, values = compare_advantages(table, chosen, without_self, [2], None, resamples=2)
    torch.testing.assert_close(values["o", 2]["monte_carlo"], torch.tensor([-0.3, -0.3]))
    assert results["rmse"][0] == pytest.approx(6.7)
    with pytest.raises(ValueError, match=r"rollouts=4, but nested=3; raise nested$"):
        compare_advantages(table, {"monte_carlo": MonteCarlo(4)}, without_self, [2], None, resamples=2)


def test_too_few_samples_are_refused_beforehand():
    check_nested({"monte_carlo": MonteCarlo(4), "ocb": partial(outcome_conditioned)}, 4)
    with pytest.raises(ValueError, match=r"^nested=3: baseline monte_carlo needs 4 of its own"):
        check_nested({"monte_carlo": MonteCarlo(4)}, 3)


def test_errors_by_hand():
    rollouts = np.array([[-0.2, -0.4], [-0.6, -0.6], [0.0, -0.2]])
    table = table_of([-0.1, -0.3, -0.4], [0, 0, 1], [0, 1, 0], outcome=[1.0, 0.0, 1.0], rollouts=rollouts)
    results, values = compare_advantages(
        table, {"none": none, "ocb": outcome_conditioned}, without_self, [1, 2], None, 2
    )
    errors = errors_of(table, values, results).set_index(["group_size", "set", "baseline"])
    assert list(errors.index) == [(size, name, baseline) for size in (1, 2) for name in ("incorrect", "correct")
                                  for baseline in ("none", "ocb")]  # fmt: skip
    np.testing.assert_allclose(errors["errors"][2, "correct", "none"], [-0.3, -0.1], atol=1e-6)
    np.testing.assert_allclose(errors["errors"][2, "incorrect", "ocb"], [-0.6 + 0.3], atol=1e-6)
    # Squares of -.3 and -.1, less the variances of the two means, .01 and .01.
    assert errors["rmse"][2, "correct", "none"] == pytest.approx((0.05 - 0.01) ** 0.5, abs=1e-6)


def test_outcomes_that_are_not_right_and_wrong_keep_their_numbers():
    table = table_of([-0.1, -0.3], [0, 1], [0, 0], outcome=[1.0, 1001.0])
    results, _ = compare_advantages(table, {"none": none}, without_self, [1], None, resamples=2)
    assert set(results["set"]) == {"all", "outcome=1", "outcome=1001", "size=1"}
