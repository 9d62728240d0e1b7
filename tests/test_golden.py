"""A golden trajectory: the same completions must give the same rewards, advantages, gradients and weights for ever.

Three steps of quickstart's configuration on completions that are stored in tests/golden, so that no rounding error can
turn a draw. The stored numbers were computed before the code was moved into its present rooms. After a change that is
meant to alter results, write them anew with `python -m tests.test_golden`.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from bae.batch import RolloutBatch, SampledTokens
from bae.callbacks.writers import Rollouts
from bae.commands import schema
from bae.commands.build import make, make_pipeline, plain
from bae.commands.cli import CONF
from bae.evaluation.metrics import calibration
from bae.method.advantages import spread_over_tokens
from bae.objectives.values import correct_flags, stated_confidences
from bae.training.forward import completion_pass
from bae.training.options import UpdateOptions
from bae.training.sketch import count_sketch
from bae.training.update import Update
from tests.callbacks.test_writers import alone

GOLDEN = Path(__file__).parent / "golden"
STEPS, PROMPTS, GROUP = 3, 4, 8
SMALL = ["prompts_per_step=4", "group_size=8", "training.warmup_steps=1", "training.micro_batch_tokens=400"]
CASES = {
    "ocb": [],
    "all_action": ["baseline=all_action"],
    "two_attempt": ["experiment=two_attempt", "training.optimizer_steps=2"],
}


class Stored:
    """An engine that returns stored completions: rows of token ids, which end unless they are cut off."""

    def __init__(self, rows):
        self.rows = rows

    def sample(self, model, request):
        width = max(map(len, self.rows))
        ids = torch.tensor([row + [request.pad_token_id] * (width - len(row)) for row in self.rows])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in self.rows])
        ended = torch.tensor([row[-1] == request.eos_token_id for row in self.rows])
        return SampledTokens(*request.padded_prompts(), ids, mask, ended)


def trajectory(overrides, completions):
    """What three steps on stored completions compute; completions: for each step, a row of ids for each completion."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*SMALL, *overrides, f"steps={STEPS}"])
    task, policy, engine = make(cfg.task), make(cfg.model, dtype="float32"), Stored([])
    pipeline = make_pipeline(cfg, policy, task)
    object.__setattr__(pipeline, "engine", engine)
    weigh = make(cfg.callbacks.advantages)(pipeline)
    options = UpdateOptions(**plain(cfg.training))
    update = Update(policy.model, pipeline.scorer.blocks, cfg.temperature, options, make(cfg.aggregation))
    # Plain gradient steps: Adam's first steps are signs, which rounding errors may turn.
    update.configure(partial(torch.optim.SGD, lr=0.2), STEPS)
    start = flat(policy)
    steps = []
    for step in range(STEPS):
        engine.rows = [[int(token) for token in row.split()] for row in completions[step]]
        batch = RolloutBatch(step, [task.problem("train", step * PROMPTS + p) for p in range(PROMPTS)], GROUP)
        for callback in (Rollouts(pipeline, 0), weigh):
            callback.on_train_batch_start(alone(), None, batch, 0)
        before = measured(update, batch)
        update.step(batch)
        names = ("entropy", "grad_norm", "clip_fraction", "lr")
        after = {name: batch.metrics[name] for name in names}
        steps.append(before | after | {"change": count_sketch(flat(policy) - start, 16).tolist()})
    return steps


def measured(update, batch):
    """What one step knows before the update."""
    samples, scored = batch.require_rollouts()
    advantages = batch.require_advantages()
    counts = torch.stack([(scored.block_of == k).sum() for k in range(len(update.block_weights))])
    weights = update.aggregation(scored.block_of, update.block_weights, counts.to(update.block_weights))
    with torch.no_grad():
        log_p = completion_pass(update.model, samples, torch.arange(len(samples.ended)), update.temperature).log_p
    log_p = log_p.where(samples.completion_mask, 0.0)
    token_advantages = spread_over_tokens(advantages.per_block, scored.block_of)
    confidence, correct = stated_confidences(scored.completions), correct_flags(scored.completions)
    return {
        "accuracy": correct.mean().item(),
        "ece": calibration(confidence, correct)["ece"].item() if not confidence.isnan().all() else None,
        "rewards": scored.rewards.tolist(),
        "malformed": scored.malformed.sum(0).tolist(),
        "advantages": advantages.per_objective.tolist(),
        "token_weights": [weights[scored.block_of == k].sum().item() for k in range(len(counts))],
        "log_p": log_p.sum(1).tolist(),
        "loss": -(weights * token_advantages * log_p).sum().item(),
    }


def flat(policy):
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def assert_close(found, stored, where=""):
    """Equal to 1e-4 of the largest number of a list, or of one."""
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), where
        for key in stored:
            assert_close(found[key], stored[key], f"{where} {key}")
    elif stored is None:
        assert found is None, where
    else:
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(stored), rtol=1e-4, msg=lambda m: f"{where}: {m}",
            atol=1e-4 * max(1e-3, torch.tensor(stored).abs().max().item()),
        )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_is_the_stored_one(name):
    stored = json.loads((GOLDEN / f"{name}.json").read_text())
    found = trajectory(CASES[name], stored["completions"])
    for step, (one, other) in enumerate(zip(found, stored["steps"], strict=True)):
        assert_close(one, other, f"step {step}")
    # The case is worth its while: right and wrong answers, malformed output, signal, weights that move.
    assert all(0.1 < step["accuracy"] < 0.9 and step["grad_norm"] > 0.05 for step in stored["steps"])
    assert torch.tensor([step["malformed"] for step in stored["steps"]]).sum(0).min() > 0
    assert torch.tensor([step["advantages"] for step in stored["steps"]]).abs().amax((0, 1)).min() > 0.5
    assert math.dist(stored["steps"][0]["change"], stored["steps"][2]["change"]) > 1e-3


def rounded(value):
    """Floats to seven digits, wherever they stand."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def write(name, completions, steps):
    GOLDEN.mkdir(exist_ok=True)
    lines = [json.dumps(part) for part in rounded(steps)]
    rows = [json.dumps(part) for part in completions]
    body = '{"completions": [\n' + ",\n".join(rows) + '\n],\n"steps": [\n' + ",\n".join(lines) + "\n]}\n"
    (GOLDEN / f"{name}.json").write_text(body)


if __name__ == "__main__":
    for name, overrides in CASES.items():
        kept = json.loads((GOLDEN / f"{name}.json").read_text())["completions"]
        write(name, kept, trajectory(overrides, kept))
