"""docs/extending.md at its word: its files, written to an empty folder, do what it says they do."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bae.batch import Completion, ForwardResult, Problem
from bae.commands import cli, schema
from bae.commands.build import make_format
from bae.commands.cli import CONF
from bae.method.baselines import RewardView
from bae.objectives import check_objectives
from bae.objectives.async_rewards import AsyncRewards
from bae.objectives.outcomes import given_reward
from bae.objectives.refining import Ranks, RefiningBaseline
from bae.objectives.reward_view import score_table
from bae.objectives.values import reward_values
from bae.text.blocks import Section
from bae.text.verdict import Verdict
from tests.objectives.test_scoring import score
from tests.support import ROOT, package, runs

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`(\S+)`:\n\n```(?:python|yaml|csv)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SHORT = [
    "steps=2", "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=4", "callbacks.held_out.samples=2",
    "callbacks.checkpoints.log_policy=false", "callbacks.completions.every=1", "training.micro_batch_tokens=1000",
    "callbacks.throughput.seconds=0.01",
]  # fmt: skip
SHOWN = ["steps=2", "prompts_per_step=4", "callbacks.held_out.prompts=4", "callbacks.held_out.samples=2"]
QUICK = {"bae-train": SHORT, "bae-warmstart": SHOWN, "bae-evaluate": ["samples=2", "prompts=4", "resamples=10"]}


def commands(title):
    """What stands in the bash fences under a heading, or with None before the first, but what needs a server."""
    section = PAGE.split("\n## ")[0] if title is None else PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    fences = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [fence for fence in fences if "vllm serve" not in fence]  # tests/test_tutorials.py composes it


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The page's files in an empty folder, from which Python finds them while the test lasts."""
    with package(FILES, "my_study", tmp_path, monkeypatch):
        yield tmp_path


def completion(*sections, answer="12"):
    read = tuple(Section(tag, content) for tag, content in sections)
    return Completion(Problem("p", "7+5=", answer), "", read, (True,), (), 0, False, verdicts=())


def option(study, path):
    return OmegaConf.load(study / "my_study" / "conf" / path)


def test_each_is_a_file_and_a_yaml_of_the_users_own():
    assert len(FILES) == 22 and all(path.startswith("my_study/") for path in FILES)
    assert not re.findall(
        r"^```(?!python|yaml|csv|bash|$)", PAGE, re.MULTILINE
    )  # no other fences, which would not be read


def test_the_baseline_is_the_median_of_the_others(study):
    baseline = instantiate(option(study, "baseline/median.yaml"))
    nan = torch.nan
    # Two groups. In the first: four alike, one of them absent; one alone. In the second: two alike, two alike.
    rewards = RewardView(
        reward=torch.tensor([1.0, 2.0, 9.0, 50.0, 7.0, 3.0, 4.0, 5.0, 6.0, 8.0]),
        group=torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        outcome=torch.tensor([1, 1, 1, 1, 0, 1, 1, 0, 0, 0]),
        present=torch.tensor([True, True, True, False, True, True, True, True, True, True]),
    )
    value = baseline(rewards)
    expected = torch.tensor([2.0, 1.0, 1.0, nan, nan, 4.0, 3.0, 6.0, 5.0, 5.0])
    torch.testing.assert_close(value[rewards.present], expected[rewards.present], equal_nan=True)


def test_the_score_is_what_acting_earns(study):
    objective = instantiate(option(study, "objectives/confidence_acting.yaml").rewards.acting, name="acting")
    q, c = torch.tensor([0.9, 0.9, 0.6, 0.6, 0.7]), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    earned = objective.score(q, c)
    torch.testing.assert_close(earned, torch.tensor([0.3, -0.7, 0.0, 0.0, 0.3]))
    assert earned.min().item() == pytest.approx(objective.worst)
    # Proper: no report earns more in the mean than the chance of being right.
    report, chance = torch.linspace(0, 1, 11), torch.linspace(0, 1, 11).unsqueeze(1)
    right, wrong = (objective.score(report, torch.tensor(c)) for c in (1.0, 0.0))
    mean = chance * right + (1 - chance) * wrong
    torch.testing.assert_close(mean.diagonal(), mean.max(1).values)


def test_the_reward_that_sees_its_group(study):
    objective = instantiate(option(study, "objectives/near_the_group.yaml").rewards.near_the_group, name="mine")
    group = [
        replace(completion(answer="12"), verdicts=(verdict,), confidences=(q,))
        for verdict, q in ((Verdict.CORRECT, 0.5), (Verdict.WRONG, 1.0), (Verdict.WRONG, None), (Verdict.CORRECT, 0.25))
    ]
    found = reward_values(objective, group)
    torch.testing.assert_close(found, torch.tensor([0.0, -0.25, torch.nan, -(0.25**2)]), equal_nan=True)


def test_the_reward_that_asks_a_service(study):
    objective = instantiate(option(study, "objectives/looked_up.yaml").rewards.looked_up, name="mine")
    asked = [completion(("answer", text)) for text in ("12", "300", "twelve")] + [completion()]
    for n, c in enumerate(asked):
        asked[n] = replace(c, text=str(n))  # equal texts would be asked about once
    values, unanswered = AsyncRewards([objective], [0]).values(0, asked)
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0, torch.nan, torch.nan]), equal_nan=True)
    assert unanswered.tolist() == [False, False, True, False]


def test_the_reward_of_the_reasoning(study):
    from my_study.formats import reasoned

    assert reasoned(completion(("reasoning", "7 12"), ("answer", "13"))) == 1.0
    assert reasoned(completion(("reasoning", "12 7"), ("answer", "12"))) == 0.0
    assert reasoned(completion(("reasoning", " "))) is None
    assert reasoned(completion()) is None


def test_the_refining_baseline_scales_by_the_entropy(study):
    """Its change is the strength times entropy times advantage, on the tokens of the block alone."""
    baseline = instantiate(option(study, "baseline/unsure_tokens.yaml"))
    assert isinstance(baseline, RefiningBaseline)
    scored = score(
        [
            f"{r}<analysis>short</analysis><confidence>0.{i}</confidence>"
            for i, r in enumerate(["<reasoning>5</reasoning><answer>5</answer>"] * 3)
        ]
    )
    scorer = SimpleNamespace(block_of_objective=[0, 1])
    refinement = baseline.refine(1, torch.tensor([1.0, -2.0, 0.0]), scored, scorer, Ranks())
    entropy = torch.rand(scored.block_of.shape)
    forward = ForwardResult(-entropy, entropy, lambda position: None, 1.0)
    rows = torch.tensor([2, 0])
    change, gain = refinement.apply(forward._replace(entropy=entropy[rows]), rows, torch.ones_like(entropy[rows]))
    in_block = scored.block_of[rows] == 1
    torch.testing.assert_close(change, 0.5 * entropy[rows] * torch.tensor([[0.0], [1.0]]) * in_block)
    assert gain == 0 and not refinement.unrefined.any() and change.any()
    with pytest.raises(ValueError, match=r"baseline\.strength=-1"):
        instantiate(option(study, "baseline/unsure_tokens.yaml"), strength=-1).check(scorer)


def test_the_outcome_tells_answers_of_other_sizes_apart(study):
    outcome = instantiate(option(study, "outcome/digits.yaml"))
    answers = [completion(("reasoning", ""), ("answer", text)) for text in ("5", "6", "12", "1234", "-123456")]
    answers.append(completion())
    given, group = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0]), torch.zeros(6).long()
    found = outcome(answers, given, group).tolist()
    assert found[3] == found[4] and len(set(found)) == 5  # of four digits and more alike
    assert outcome(answers[:1], given[:1], group[:1]).tolist() == found[:1]  # the same in every batch


def test_the_spreadsheet_is_a_task(study):
    task = instantiate(option(study, "task/sums.yaml"))
    assert (task.size("train"), task.size("val")) == (4, 4)
    assert task.problem("val", 2) == Problem("val/2", "7+7+7=", "21")


def test_the_task_multiplies_and_keeps_its_splits_apart(study):
    task, again = (instantiate(option(study, "task/multiplication.yaml")) for _ in range(2))
    problems = {split: [task.problem(split, i) for i in range(task.size(split))] for split in ("train", "val")}
    questions = {split: {p.question for p in those} for split, those in problems.items()}
    assert {split: len(those) for split, those in questions.items()} == {"train": 238, "val": 59}
    assert not questions["train"] & questions["val"]
    assert problems["train"][5] == again.problem("train", 5)
    for problem in problems["train"] + problems["val"]:
        terms = [int(term) for term in problem.question.removesuffix("=").split("+")]
        assert len(set(terms)) == 1 and int(problem.answer) == terms[0] * len(terms)
    with pytest.raises(ValueError, match="no split 'test'"):
        task.size("test")


def composed(study, *overrides):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"hydra.searchpath=[file://{study / 'my_study' / 'conf'}]", *overrides])


def test_its_options_are_options_like_others(study):
    cfg = composed(study, "task=multiplication", "objectives=confidence_acting", "baseline=median")
    assert cfg.task.largest == 99 and cfg.baseline._target_ == "my_study.baselines.median_of_others"
    blocks, objectives = make_format(cfg)
    check_objectives(objectives, blocks)
    assert [o.name for o in objectives] == ["correctness", "acting"] and objectives[1].givens == ("correctness",)


def test_a_name_that_conf_has_already_is_refused(study, monkeypatch):
    """Hydra would read the one in conf/ without a word."""
    (study / "my_study" / "conf" / "baseline" / "ocb.yaml").write_text("# Mine.\n_target_: my_study.x\n")
    monkeypatch.setattr(sys, "argv", ["bae-train", "--config-dir", "my_study/conf", "baseline=ocb", "steps=1"])
    with pytest.raises(cli.UserError, match=r"baseline/ocb\.yaml: conf/baseline/ocb\.yaml of the package hides it"):
        cli.check_names()
    monkeypatch.setattr(sys, "argv", ["bae-train", "steps=1"])
    cli.check_names()


def test_the_three_blocks_are_rewarded_each_given_those_before(study):
    blocks, objectives = make_format(composed(study, "objectives=three_blocks"))
    sure = "<analysis>short</analysis><confidence>0.9</confidence>"
    texts = [f"<reasoning>{r}</reasoning><answer>{a}</answer>{sure}" for r in ("2 5", "2 6") for a in ("5", "6")]
    spoilt = f"<reasoning> </reasoning><answer>5</answer>{sure}"
    scored = score([*texts, spoilt], blocks=blocks, objectives=objectives)  # the answer is 5
    right, wrong = -0.01, -0.81
    expected = [[1, 1, right], [1, 0, wrong], [0, 1, right], [0, 0, wrong], [0, 1, right]]
    torch.testing.assert_close(scored.rewards, torch.tensor(expected))
    assert scored.malformed.tolist() == [[False] * 3] * 4 + [[True, False, False]]
    assert [len(set(row)) for row in scored.block_of.tolist()[:4]] == [3] * 4
    outcome = score_table(scored, objectives, given_reward, torch.zeros(5).long()).outcome[:4]
    assert [len(column.unique()) for column in outcome.T] == [1, 2, 4]


@pytest.fixture
def shell(study, tmp_path_factory):
    """Run the commands of a section as they stand, and return all runs; the entry points on the path are given options
    for a short run."""
    short = tmp_path_factory.mktemp("bin")
    for name, options in QUICK.items():
        script = short / name
        script.write_text(f'#!/bin/sh\nexec {Path(sys.executable).parent / name} "$@" {" ".join(options)}\n')
        script.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{short}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)

    def run(title):
        before = digests()
        for fence in commands(title):
            for placeholder in re.findall(r"(?<=outputs/)\w+/<\w+>", fence):
                (folder,) = (study / "outputs" / placeholder.partition("/")[0]).iterdir()
                fence = fence.replace(placeholder, str(folder.relative_to(study / "outputs")))
            lines = "\n".join(["set -e", *commands(None), fence])
            done = subprocess.run(["bash", "-c", lines], cwd=study, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{fence}\n{done.stdout}\n{done.stderr}"
        assert digests() == before  # nothing of the project's own
        return runs(study / "outputs")[1]

    return run


def digests():
    return {
        path: hashlib.sha256(path.read_bytes()).digest()
        for folder in ("bae", "conf")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def finished(run, metrics):
    assert run.info.status == "FINISHED"
    missing = {f"train/{metric}" for metric in metrics} - set(run.data.metrics)
    assert not missing, missing


OBJECTIVE = ("reward", "advantage_std", "zero_signal", "fallback", "singleton", "malformed")
BLOCK = ("block_zero_signal", "block_advantage_std")


@pytest.mark.slow
def test_the_baselines_commands(shell):
    median, first = shell("A baseline")
    finished(median, [f"{metric}/confidence_brier" for metric in OBJECTIVE])
    assert median.data.params["baseline"] == "median"
    finished(first, [f"{metric}/correctness" for metric in OBJECTIVE])
    assert first.data.params["baseline"] == "ocb"
    assert first.data.params["first_block_baseline"] == "median"


@pytest.mark.slow
def test_the_refining_baselines_command(shell):
    (run,) = shell("A baseline that is finished in the training pass")
    finished(run, [f"{metric}/confidence_brier" for metric in OBJECTIVE])
    assert run.data.params["baseline"] == "unsure_tokens"
    assert run.data.metrics["train/fallback/confidence_brier"] == 0


@pytest.mark.slow
def test_the_outcomes_command(shell):
    (run,) = shell("An outcome")
    finished(run, ["singleton/confidence_brier"])
    assert run.data.params["outcome"] == "digits"


@pytest.mark.slow
def test_the_spreadsheets_commands(shell):
    (run,) = shell("Problems from a file")
    finished(run, ["accuracy"])
    assert run.data.params["task"] == "sums"
    questions = {"8+7=", "12+9=", "6+5+4=", "30-8="}
    for table in tables(run):
        asked = table["columns"].index("question")
        assert {row[asked] for row in table["data"]} <= questions


@pytest.mark.slow
def test_the_objectives_command(shell):
    (run,) = shell("An objective")
    finished(run, [f"{metric}/acting" for metric in OBJECTIVE])
    assert -0.7 <= run.data.metrics["val/reward/acting"] <= 0.3
    assert run.data.params["objectives.rewards.acting.score.threshold"] == "0.7"
    assert any("reward/acting" in table["columns"] for table in tables(run))


@pytest.mark.slow
def test_the_tasks_commands(shell, study):
    (run,) = shell("A task")
    finished(run, ["accuracy"])
    from my_study.tasks import Multiplication

    task = Multiplication(99, [2, 3, 4])
    questions = {task.problem("train", i).question for i in range(task.size("train"))}
    for table in tables(run):
        asked = table["columns"].index("question")
        assert {row[asked] for row in table["data"]} <= questions
    assert run.data.params["task"] == "multiplication"
    assert run.data.metrics["eval/multiplication_val/samples"] == 8


@pytest.mark.slow
def test_the_formats_command(shell):
    (run,) = shell("Three blocks")
    finished(run, [f"reward/{name}" for name in ("reasoned", "correctness", "confidence_brier")])
    finished(run, [f"{metric}/{block}" for metric in BLOCK for block in ("reasoning", "answer", "confidence")])


@pytest.mark.slow
def test_the_demonstrations_command(shell):
    (run,) = shell("Demonstrations")
    finished(run, ["loss", "demonstrations"])
    assert run.data.metrics["train/demonstrations"] == 4
    assert run.data.params["demonstrations"] == "direct"


@pytest.mark.slow
def test_the_sweep_and_its_evaluation(shell, study):
    parent, *jobs = shell("All of it")
    assert [job.data.params["baseline"] for job in jobs] == ["ocb", "median"]
    assert {job.data.tags["mlflow.parentRunId"] for job in jobs} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *jobs)} == {"FINISHED"}
    client, _ = runs(study / "outputs")
    reward, spread = (
        [client.get_metric_history(job.info.run_id, f"train/{metric}/confidence_brier")[0].value for job in jobs]
        for metric in ("reward", "advantage_std")
    )
    assert reward[0] == reward[1] and spread[0] != spread[1]  # the same first completions, otherwise compared
    assert jobs[1].data.metrics["eval/val/samples"] == 8


def tables(run):
    """The logged tables of completions."""
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / "completions"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
