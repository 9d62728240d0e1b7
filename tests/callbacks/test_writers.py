"""The advantages of a training step: every baseline in a real run, what a run remembers, and what is drawn again."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowClient

from bae.batch import RolloutBatch, SampledTokens
from bae.callbacks import BlockwiseAdvantages
from bae.commands import train
from bae.commands.cli import CONF
from bae.method import normalisation
from bae.method.baselines import MonteCarlo, group_mean, leave_one_out, none, without_self
from bae.objectives import Objective
from bae.objectives.correctness import correctness
from bae.objectives.outcomes import given_reward
from bae.objectives.rao_blackwell import RaoBlackwell
from bae.training.policy import load_pretrained
from tests import support
from tests.commands.test_train import assert_equal, assert_same_policy, weights
from tests.fidelity.test_continuations import SOLUTION, by_hand, make_pipeline, roll_out

SMALL = [
    "steps=1", "group_size=4", "prompts_per_step=4", "callbacks.held_out=null", "callbacks.completions=null",
    "callbacks.checkpoints.every=1", "callbacks.checkpoints.keep=9", "callbacks.checkpoints.log_policy=false",
    "callbacks.progress=null", "callbacks.throughput.seconds=0.01", "lr=1e-3", "training.warmup_steps=2",
    "training.micro_batch_tokens=400",
]  # fmt: skip
OPTIONS = sorted(path.stem for path in (CONF / "baseline").glob("*.yaml"))

PLAIN = {"objective": normalisation.none, "block": normalisation.none}


def call(folder, *arguments):
    support.call(train, folder / "outputs", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("writers")


def found(folder, experiment):
    """Its runs; None if it was never begun."""
    client = MlflowClient(f"sqlite:///{folder / 'outputs' / 'mlflow.db'}")
    known = client.get_experiment_by_name(experiment)
    return known and client.search_runs([known.experiment_id], order_by=["start_time"])


def metric_history(folder, run, metric):
    client = MlflowClient(f"sqlite:///{folder / 'outputs' / 'mlflow.db'}")
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, metric)]


@pytest.fixture(scope="module")
def each(folder):
    """One step with a baseline: its run."""

    @cache
    def run(option):
        call(folder, *SMALL, f"baseline={option}", f"logger.experiment={option}")
        (made,) = found(folder, option)
        return made

    return run


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_with_every_baseline(each, option):
    run = each(option)
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith("train/")}
    assert all(map(math.isfinite, metrics.values())), metrics
    for objective in ("correctness", "confidence_brier"):
        assert 0 <= metrics[f"train/fallback/{objective}"] <= 1
    alone = metrics["train/singleton/confidence_brier"]
    assert 0 < alone < 0.5 and metrics["train/singleton/correctness"] == 0
    assert metrics["train/fallback/correctness"] == 0  # of the first block, whose baseline is another
    fallback = {"ocb_loo": alone, "ocb_shrunk": alone}.get(option, 0)  # in the first step shrinkage knows nothing yet
    assert metrics["train/fallback/confidence_brier"] == fallback
    assert metrics["train/reward/confidence_brier"] == each("ocb").data.metrics["train/reward/confidence_brier"]


def test_which_baselines_train_alike_at_first(each):
    folders = {option: each(option).data.tags["output_folder"] for option in OPTIONS}
    after = {option: torch.cat([w.flatten() for w in weights(folder).values()]) for option, folder in folders.items()}
    assert after["ocb_shrunk"].equal(after["ocb_loo"])
    different = [after[option] for option in OPTIONS if option != "ocb_shrunk"]
    assert len({tuple(w[w != different[0]][:50].tolist()) for w in different}) == len(different)


@pytest.fixture(scope="module")
def warm():
    return load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")


def callback(pipeline, baseline, seed=0):
    return BlockwiseAdvantages(pipeline, baseline, group_mean, without_self, given_reward, PLAIN, seed)


def alone(rank=0):
    return SimpleNamespace(world_size=1, global_rank=rank)


def confident(solution, q):
    return f"{solution}<analysis></analysis><confidence>{q}</confidence>"


WRONG = SOLUTION.replace("<answer>3", "<answer>4")
TEXTS = [
    confident(SOLUTION, 0.9), confident(SOLUTION, 0.5), confident(WRONG, 0.2), "<reasoning>3",
    confident(WRONG, 0.4), confident(WRONG, 1.7), confident(SOLUTION, 0.6), confident(SOLUTION, 1),
]  # fmt: skip


def test_strata_are_those_of_the_outcome(tiny):
    """A normalisation sees prompt and outcome together; for the first block and for whole blocks, the prompt alone."""
    seen = []

    def watch(advantage, group, present, stratum):
        seen.append((group.tolist(), stratum.unique(return_inverse=True)[1].tolist()))
        return advantage

    problems, samples, scored = by_hand(tiny, TEXTS)
    batch = RolloutBatch(0, problems, 4, samples, scored)
    both = {"objective": watch, "block": watch}
    pipeline = make_pipeline(tiny)
    weigh = BlockwiseAdvantages(pipeline, group_mean, group_mean, without_self, given_reward, both, 0)
    seen.clear()  # what it asked to see whether they work
    weigh.on_train_batch_start(alone(), None, batch, 0)
    group = [0, 0, 0, 0, 1, 1, 1, 1]
    outcomes = [1, 1, 0, 0, 2, 2, 3, 3]
    assert seen == [(group, group), (group, outcomes), (group, group), (group, group)]


def require_advantages(policy, baseline, texts=TEXTS):
    problems, samples, scored = by_hand(policy, texts)
    batch = RolloutBatch(0, problems, 4, samples, scored)
    callback(make_pipeline(policy), baseline).on_train_batch_start(alone(), None, batch, 0)
    return batch


def test_advantages_by_hand(tiny):
    batch = require_advantages(tiny, leave_one_out)
    # Right answers of .9 and .5 earn -.01 and -.25, each the other's baseline. The wrong one of .2 is alone: had the
    # two been of wrong answers, they would have earned -.81 and -.25. The fourth never came so far.
    hand = torch.tensor([0.24, -0.24, -0.04 + 0.53, 0, 0.84, -0.84, -0.16, 0.16])
    torch.testing.assert_close(batch.require_advantages().per_objective[:, 1], hand)
    torch.testing.assert_close(
        batch.require_advantages().per_objective[:, 0], torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5, -0.5, 0.5, 0.5])
    )
    torch.testing.assert_close(batch.require_advantages().per_block, batch.require_advantages().per_objective)
    assert batch.require_advantages().refinements == []
    baselines, outcomes = batch.require_advantages().baselines, batch.require_advantages().outcomes
    torch.testing.assert_close(baselines[:3, 1], torch.tensor([-0.25, -0.01, -0.53]))  # what each was compared with
    assert outcomes[:, 1].tolist() == [1, 1, 0, 0, 0, 0, 1, 1] and not outcomes[:, 0].any()
    assert batch.metrics == {
        "fallback/correctness": 0, "singleton/correctness": 0,
        "fallback/confidence_brier": pytest.approx(1 / 7), "singleton/confidence_brier": pytest.approx(1 / 7),
    }  # fmt: skip
    assert batch.seconds["baseline"] > 0


def test_numbers_are_left_to_the_training_step(tiny):
    batch = require_advantages(tiny, RaoBlackwell(leave_one_out, all_action=True))
    plain = require_advantages(tiny, leave_one_out)
    torch.testing.assert_close(batch.require_advantages().per_objective, plain.require_advantages().per_objective)
    given = batch.require_advantages()
    (numbers,) = given.refinements
    assert numbers.objective == 1 and numbers.all_action
    assert given.block_of_objective[1] == 1 and given.weights[1] == 1
    assert numbers.in_block.equal(batch.require_rollouts()[1].block_of == 1)
    assert numbers.reward.equal(batch.require_rollouts()[1].rewards[:, 1])
    assert numbers.advantage.equal(batch.require_advantages().per_objective[:, 1])
    decided = (numbers.decisions.position >= 0).any(1).tolist()
    assert decided == [True, True, True, False, True, True, True, False]  # the last stated "1", without a point
    assert batch.metrics["fallback/confidence_brier"] == pytest.approx(1 / 7)  # of those that came so far
    assert batch.metrics["singleton/confidence_brier"] == pytest.approx(1 / 7)


def test_nobody_came_so_far(tiny):
    batch = require_advantages(tiny, RaoBlackwell(leave_one_out), ["3", "", "<reasoning>", SOLUTION[:-1]])
    assert not batch.require_advantages().per_objective.any()
    assert math.isnan(batch.metrics["fallback/confidence_brier"]) and batch.metrics["fallback/correctness"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["baseline=rao_blackwell", "objectives.malformed=mask"], "malformed=mask a malformed number"),
        (
            ["baseline=rao_blackwell", "objectives.rewards.confidence_brier.score=null",
             "+objectives.rewards.confidence_brier.worst=0",
             "+objectives.rewards.confidence_brier.reward={_target_: bae.objectives.form.in_format, _partial_: true}"],
            "objectives.rewards.confidence_brier has no score of a stated number",
        ),
        (["baseline=all_action", "training.optimizer_steps=2"], "baseline.all_action=true is for one optimiser step"),
        (["baseline=rao_blackwell", "baseline.all_action=true", "training.optimizer_steps=2"], "optimizer_steps=1 or"),
        (["baseline=ocb_shrunk", "baseline.decay=1"], r"baseline.decay=1: must be at least 0"),
        (["baseline=monte_carlo", "baseline.rollouts=0"], "baseline.rollouts=0: must be 1 or more"),
        (["baseline@first_block_baseline=all_action"], "first_block_baseline: a baseline that is finished"),
        (
            ["baseline=group_mean", "baseline._partial_=false"],
            "group_mean.* missing 1 required positional argument.*; if it is called later, add _partial_: true",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_sentence(folder, monkeypatch, arguments, message):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit, match=message) as stopped:
        call(folder, *SMALL, *arguments, "logger.experiment=refused")
    assert "\n" not in str(stopped.value)
    assert not found(folder, "refused")  # no run was begun


def test_a_first_block_needs_no_score(tiny):
    """Only what the baseline of later blocks weighs must have one."""
    pipeline = make_pipeline(tiny)
    callback(pipeline, RaoBlackwell(leave_one_out))
    later = Objective("right", "confidence", 0.0, reward=correctness, given="correctness")
    scorer = replace_objectives(pipeline.scorer, [pipeline.scorer.objectives[0], later])
    with pytest.raises(ValueError, match=r"rewards\.right has no score"):
        callback(replace(pipeline, scorer=scorer), RaoBlackwell(leave_one_out))
    callback(replace(pipeline, scorer=scorer), leave_one_out)


def replace_objectives(scorer, objectives):
    return type(scorer)(scorer.blocks, objectives, scorer.verifier, scorer.vocabulary)


def draws(policy, rows, step=0, seed=0, rank=0, rollouts=3):
    """Rewards that MonteCarlo takes the mean of, for some completions of a batch of 8, on a rank."""
    problems, samples, scored = roll_out(make_pipeline(policy), prompts=2)
    one = SampledTokens(*(column if column is None else column[rows] for column in vars(samples).values()))
    scored = replace(scored, block_of=scored.block_of[rows], completions=[scored.completions[n] for n in rows])
    batch = RolloutBatch(step, problems, 4, one, scored)
    made = callback(make_pipeline(policy), MonteCarlo(rollouts), seed)
    return made._resample(alone(rank), batch, 1, rollouts)


def test_draws_depend_on_seed_step_and_completion_alone(warm):
    everyone = list(range(8))
    whole = draws(warm, everyone)
    assert whole.shape == (8, 3) and (whole.std(1) > 0).any()
    assert draws(warm, everyone[:4]).equal(whole[:4]) and draws(warm, everyone[4:], rank=1).equal(whole[4:])
    assert not draws(warm, everyone[4:]).equal(whole[4:])
    for other in ({"step": 1}, {"seed": 1}):
        assert not draws(warm, everyone, **other).equal(whole)


def test_monte_carlo_is_the_mean_of_its_draws(warm):
    pipeline = make_pipeline(warm)
    problems, samples, scored = roll_out(pipeline, prompts=2)
    batch = RolloutBatch(0, problems, 4, samples, scored)
    callback(pipeline, MonteCarlo(3)).on_train_batch_start(alone(), None, batch, 0)
    expected = scored.rewards[:, 1] - draws(warm, list(range(8))).mean(1)
    torch.testing.assert_close(batch.require_advantages().per_objective[:, 1], expected)


def test_completions_that_never_came_so_far_have_no_draws(warm):
    problems, samples, scored = by_hand(warm, [SOLUTION, "3"])
    made = callback(make_pipeline(warm), MonteCarlo(2))
    drawn = made._resample(alone(), RolloutBatch(0, problems, 1, samples, scored), 1, 2)
    assert drawn.isnan().tolist() == [[False] * 2, [True] * 2]


def test_what_a_baseline_learnt_is_resumed(folder):
    call(folder, *SMALL, "steps=3", "baseline=ocb_shrunk", "logger.experiment=resumed")
    (run,) = found(folder, "resumed")
    history = lambda: metric_history(folder, run, "train/fallback/confidence_brier")  # noqa: E731
    place = Path(run.data.tags["output_folder"])
    saved = [torch.load(path, weights_only=True) for path in sorted((place / "checkpoints").glob("*.ckpt"))]
    states = [checkpoint["callbacks"]["BlockwiseAdvantages"] for checkpoint in saved]
    assert set(states[0]["baseline"]["moments"]) == {0.0, 1.0} and states[0]["first_block_baseline"] == {}
    assert states[0] != states[1] != states[2]
    final = weights(place)
    fallback = history()
    assert fallback[0][1] > 0 and fallback[1][1] == fallback[2][1] == 0  # then there is a prior
    for step in (2, 1):
        for later in range(step + 1, 4):
            (place / "checkpoints" / f"step_{later:06d}.ckpt").unlink()
        shutil.rmtree(place / "policy")
        call(folder, f"resume={place}")
        assert_equal(weights(place), final)
        again = torch.load(place / "checkpoints" / "step_000003.ckpt", weights_only=True)
        assert again["callbacks"] == saved[2]["callbacks"]
        assert_equal(again["optimizer_states"], saved[2]["optimizer_states"])
    assert history() == fallback


def test_a_checkpoint_of_a_baseline_that_learns_nothing(tiny):
    made = callback(make_pipeline(tiny), none)
    assert made.state_dict() == {"baseline": {}, "first_block_baseline": {}}
    made.load_state_dict(made.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["rao_blackwell", "ocb_shrunk", "monte_carlo"])
def test_two_processes_train_like_one(folder, baseline):
    prompts = {"rao_blackwell": 1, "ocb_shrunk": 3, "monte_carlo": 2}[baseline]  # for two ranks to share
    watched = ["callbacks=fidelity", "callbacks.fidelity.every=1", "callbacks.fidelity.rollouts=4"]
    plain = ["steps=3", f"baseline={baseline}", f"logger.experiment=two_{baseline}", *watched]
    plain += [f"callbacks.fidelity.prompts={prompts}"]
    two = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]
    command = Path(sys.executable).parent / "bae-train"
    for arguments in (plain, plain + two):
        job = subprocess.run([command, *SMALL, *arguments], cwd=folder, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert job.returncode == 0, job.stderr
    one, both = found(folder, f"two_{baseline}")
    for metric in ("train/fallback/confidence_brier", "train/singleton/confidence_brier", "train/grad_norm",
                   "train/advantage_std/confidence_brier", "fidelity/confidence_brier/ocb/rmse",
                   "fidelity/confidence_brier/ocb_shrunk/bias"):  # fmt: skip
        first, second = (dict(metric_history(folder, run, metric)) for run in (one, both))
        assert second == pytest.approx(first, abs=1e-4), metric
    assert_same_policy(one, both)
