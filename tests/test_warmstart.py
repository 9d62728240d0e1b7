"""The policy that ships, and the command that makes it."""

import pytest

from bae.blocks import make_blocks
from bae.metrics import auroc
from bae.models import PACKAGE, Policy, load_pretrained
from bae.objectives import Objective
from bae.objectives.correctness import correctness
from bae.rollout.local import LocalEngine
from bae.rollout.pipeline import Pipeline
from bae.scoring import Scorer
from bae.tasks.arithmetic import Arithmetic
from bae.tokens import token_bytes


def settings():
    from omegaconf import OmegaConf

    from bae.cli import CONF

    task = OmegaConf.load(CONF / "task" / "arithmetic.yaml")
    return OmegaConf.load(CONF / "warmstart.yaml"), OmegaConf.to_container(task.splits)


def measured(policy: Policy, split="val", prompts=200):
    """Share correct, AUROC and share malformed on held-out problems."""
    import torch

    task = Arithmetic(settings()[1])
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


def check(policy):
    accuracy, discrimination, malformed = measured(policy)
    assert 0.25 <= accuracy <= 0.60
    assert 0.44 <= discrimination <= 0.56  # its confidence says nothing
    assert malformed <= 0.03


def test_the_policy_that_ships():
    policy = load_pretrained("package://assets/tiny", "float32", "{question}")
    assert (PACKAGE / "assets" / "tiny" / "model.safetensors").stat().st_size <= 2_000_000
    check(policy)
    accuracy, _, _ = measured(policy)
    assert measured(policy, "easy")[0] > accuracy + 0.2
    assert measured(policy, "hard")[0] < accuracy - 0.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_rebuilds_an_equivalent_one():
    from omegaconf import OmegaConf

    from bae.warmstart import warm_start

    cfg, splits = settings()
    confidences = OmegaConf.to_container(cfg.confidences)
    check(
        warm_start(Arithmetic(splits), confidences, cfg.steps, cfg.batch_size, cfg.micro_batch_size, cfg.lr, cfg.seed)
    )
