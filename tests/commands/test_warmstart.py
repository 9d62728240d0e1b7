"""The policies that ship, and the command that makes policies like them."""

import json

import pytest
from hydra import compose, initialize_config_dir

from bae.commands import schema
from bae.commands import train as train_command
from bae.commands import warmstart as command
from bae.commands.build import make
from bae.commands.cli import CONF
from bae.demonstrations.tiny import make_tokenizer
from bae.evaluation.metrics import auroc
from bae.objectives import Objective
from bae.objectives.correctness import correctness
from bae.objectives.scoring import Scorer
from bae.rollout.interface import SamplingRequest
from bae.rollout.local.engine import LocalEngine
from bae.rollout.pipeline import Pipeline
from bae.text.blocks import find_spans, make_blocks
from bae.text.tokens import token_bytes
from bae.training.policy import PACKAGE, Policy, load_pretrained
from tests.support import call, runs


@pytest.fixture(scope="module")
def task():
    return make(composed("experiment=warmstart/tiny").task)


def composed(*overrides):
    """The command's configuration."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("warmstart", list(overrides))


def measured(policy: Policy, task, split="val", prompts=200):
    """Share correct, AUROC and share malformed on held-out problems."""
    import torch

    blocks = make_blocks({"completion": ["reasoning", "answer", "analysis", "confidence"]})
    objectives = [Objective("correctness", "completion", worst=0.0, reward=correctness)]
    scorer = Scorer(blocks, objectives, task.verifier, token_bytes(policy.tokenizer))
    pipeline = Pipeline(policy, LocalEngine(), scorer, task, "", 48, 1.0)
    problems = [task.problem(split, i) for i in range(prompts)]
    _, scored, _ = pipeline(problems, [(0, 0, i) for i in range(prompts)], 4)
    readable = [c for c in scored.completions if c.confidence is not None]
    q = torch.tensor([c.confidence for c in readable])
    c = torch.tensor([float(c.correct) for c in readable])
    return float(c.mean()), float(auroc(q, c)), float(scored.malformed.float().mean())


def attempts(policy: Policy, task, split="val", prompts=200):
    """Of completions with two attempts: the share in form, and (first answer, second answer, reference) of those."""
    blocks = make_blocks({"first": ["reasoning", "answer"], "second": ["reasoning", "answer"]})
    tokenizer = policy.tokenizer
    problems = [task.problem(split, i) for i in range(prompts)]
    request = SamplingRequest(
        [policy.encode("", problem.question) for problem in problems],
        [(0, 0, i) for i in range(prompts)],
        group_size=4,
        max_new_tokens=64,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    samples = LocalEngine().sample(policy.model, request)
    rows = []
    for n, (ids, mask) in enumerate(zip(samples.completion_ids, samples.completion_mask, strict=True)):
        spans = find_spans(tokenizer.decode(ids[mask], skip_special_tokens=False), blocks)
        if all(spans.well_formed) and samples.ended[n]:
            rows.append((spans.sections[1].content, spans.sections[3].content, problems[n // 4].answer))
    return len(rows) / len(samples.completion_ids), rows


def check_confidence(policy, task):
    accuracy, discrimination, malformed = measured(policy, task)
    assert 0.25 <= accuracy <= 0.60
    assert 0.44 <= discrimination <= 0.56  # its confidence says nothing
    assert malformed <= 0.03


def check_two_attempts(policy, task):
    in_form, rows = attempts(policy, task)
    share = lambda flags: sum(flags) / len(flags)  # noqa: E731
    wrong = [(first, second) for first, second, reference in rows if first != reference]
    assert in_form >= 0.98
    assert 0.30 <= share([first == reference for first, _, reference in rows]) <= 0.55
    assert 0.35 <= share([second == reference for _, second, reference in rows]) <= 0.60
    assert 0.25 <= share([first == second for first, second in wrong]) <= 0.60  # no copy, and not independent


CHECKS = {"solution_confidence": check_confidence, "two_attempt": check_two_attempts}
SHIPPED = {"solution_confidence": "tiny", "two_attempt": "tiny_two_attempt"}


@pytest.mark.parametrize("demonstrations", SHIPPED)
def test_the_policies_that_ship(demonstrations, task):
    name = SHIPPED[demonstrations]
    policy = load_pretrained(f"package://assets/{name}", "float32", "{question}")
    assert (PACKAGE / "assets" / name / "model.safetensors").stat().st_size <= 2_000_000
    assert policy.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    CHECKS[demonstrations](policy, task)


def test_difficulty_is_graded_for_the_policy_that_ships(task):
    policy = load_pretrained("package://assets/tiny", "float32", "{question}")
    accuracy, _, _ = measured(policy, task)
    assert measured(policy, task, "easy")[0] > accuracy + 0.2
    assert measured(policy, task, "hard")[0] < accuracy - 0.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_makes_an_equivalent_one(task, tmp_path):
    """Of the first policy that ships; the second takes twice as long."""
    call(command, tmp_path, "experiment=warmstart/tiny", f"hydra.run.dir={tmp_path}/run")
    check_confidence(load_pretrained(str(tmp_path / "run" / "policy"), "float32", "{question}"), task)


SMALL = ["experiment=warmstart/tiny", "prompts_per_step=8", "training.warmup_steps=1", "callbacks.held_out.prompts=8",
         "callbacks.held_out.samples=2", "callbacks.checkpoints.every=2"]  # fmt: skip


def logged(outputs, run=0):
    """{metric: {step: value}} of a run."""
    client, found = runs(outputs)
    keys = found[run].data.metrics
    return {key: {m.step: m.value for m in client.get_metric_history(found[run].info.run_id, key)} for key in keys}


def test_a_warm_start_is_a_run_that_reports_before_and_after(tmp_path, capsys):
    call(command, tmp_path, *SMALL, "steps=12", f"hydra.run.dir={tmp_path}/run")
    metrics = logged(tmp_path)
    assert {"val/malformed", "val/accuracy", "val/ece", "val/auroc", "train/loss", "perf/tokens_per_second"} <= set(
        metrics
    )
    assert set(metrics["val/malformed"]) == {0, 12} and set(metrics["train/loss"]) == set(range(1, 13))
    assert metrics["train/loss"][12] < metrics["train/loss"][1] - 1
    assert "held-out problems" in (printed := capsys.readouterr().out) and "bae-train model=pretrained" in printed
    call(train_command, tmp_path, "model.path=" + str(tmp_path / "run" / "policy"), "steps=1", "group_size=4",
         "prompts_per_step=2", "callbacks.held_out.prompts=4", "callbacks.throughput.seconds=0.01")  # fmt: skip
    assert "train/reward/correctness" in logged(tmp_path, 1)


def test_a_resumed_warm_start_ends_as_if_it_had_not_stopped(tmp_path):
    call(command, tmp_path / "a", *SMALL, "steps=4", f"hydra.run.dir={tmp_path}/a/run")
    call(command, tmp_path / "b", *SMALL, "steps=4", f"hydra.run.dir={tmp_path}/b/run")
    (tmp_path / "b" / "run" / "checkpoints" / "step_000004.ckpt").unlink()
    call(command, tmp_path / "b", f"resume={tmp_path}/b/run")
    policies = [(tmp_path / x / "run" / "policy" / "model.safetensors").read_bytes() for x in "ab"]
    assert policies[0] == policies[1]


WORDS = ["model=tiny", "demonstrations=columns", "steps=1", "prompts_per_step=4", "callbacks.held_out.prompts=2",
         "callbacks.held_out.samples=1", "max_new_tokens=8", "task.splits.gsm8k=none.jsonl"]  # fmt: skip


def sums(folder, rows):
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"task.splits.train={path}", f"task.splits.val={path}", "task=word_problems"]


def test_demonstrations_come_from_columns(tmp_path):
    rows = [{"question": f"{n}+1=", "answer": str(n + 1), "reasoning": f"{n} + 1 = {n + 1}"} for n in range(6)]
    rows[2]["reasoning"] = None
    call(command, tmp_path, *WORDS, *sums(tmp_path, rows), "prompts_per_step=6")
    assert logged(tmp_path)["train/demonstrations"] == {1: 5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reasoning": None}, "there are none to write"),
        ({"reasoning": "<answer>2</answer>"}, "is not: '<reasoning><answer>2"),
        ({}, "has no column 'reasoning'; its columns: question, answer"),
    ],
)
def test_data_that_cannot_be_demonstrated_is_refused_before_any_work(tmp_path, capsys, change, said):
    with pytest.raises(SystemExit) as refused:
        call(command, tmp_path, *WORDS, *sums(tmp_path, [{"question": "1+1=", "answer": "2"} | change] * 3))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not runs(tmp_path)[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model"),
        ([*WORDS, "task=arithmetic", "demonstrations.read_only=[thought]"], "no section 'thought'"),
        ([*WORDS, "task=arithmetic", "demonstrations.write.remove='('"], "not a regular expression"),
        (["model=tiny", "task=arithmetic", "demonstrations=own"], "demonstrations.examples"),
        (
            ["model=tiny", "task=arithmetic", "demonstrations=own", "demonstrations.examples=[]", "max_new_tokens=64"],
            "examples is empty",
        ),
        (["experiment=warmstart/tiny", "group_size=4"], "there is no key group_size"),
        (["experiment=warmstart/tiny", "training.clip=.2"], "there is no key training.clip"),
        (["experiment=warmstart/tiny", "steps=0"], "steps=0: must be above 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(tmp_path, arguments, said):
    with pytest.raises(SystemExit) as refused:
        call(command, tmp_path, *[a for a in arguments if not a.startswith("task.splits")])
    assert said in str(refused.value) and "\n" not in str(refused.value)
