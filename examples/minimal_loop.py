"""Blockwise advantages in one file: prompts, rollout, blocks, rewards, baselines, loss, step. No Lightning, no Hydra.

    python examples/minimal_loop.py [steps]

A tiny policy answers sums and states a confidence. The solution is rewarded for being right, the confidence for being
calibrated (Brier). Each reward moves only the tokens of its own block, and the confidence is compared with the group's
completions that have the same outcome (OCB).
"""

import sys
from functools import partial

import torch

from bae import seeds
from bae.batch import Advantages, RolloutBatch, group_index
from bae.evaluation.metrics import calibration
from bae.method.advantages import advantages, sum_by_block
from bae.method.baselines import group_mean, outcome_conditioned
from bae.objectives import Objective
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.objectives.outcomes import given_reward
from bae.objectives.reward_view import reward_view, score_table
from bae.objectives.scoring import Scorer
from bae.objectives.values import correct_flags, stated_confidences
from bae.rollout.local.engine import LocalEngine
from bae.rollout.pipeline import Pipeline
from bae.tasks.arithmetic import Arithmetic
from bae.tasks.loader import problem_indices
from bae.text.blocks import make_blocks
from bae.text.tokens import token_bytes
from bae.training.options import UpdateOptions
from bae.training.policy import load_pretrained
from bae.training.update import Update

SEED, PROMPTS, GROUP = 0, 16, 8


def main(steps: int) -> float:
    """Train for some steps, print how calibrated the policy is, and return the last ECE."""
    policy = load_pretrained("package://assets/tiny", prompt_template="{question}")
    task = Arithmetic({"train": {"terms": [2, 3, 4], "digits": [1, 2], "size": 20_000, "held_out": False}})
    blocks = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
    objectives = [
        Objective("correctness", "solution", reward=correctness, worst=0.0),
        Objective("brier", "confidence", score=brier, given="correctness"),
    ]
    baselines = [group_mean, outcome_conditioned]
    scorer = Scorer(blocks, objectives, task.verifier, token_bytes(policy.tokenizer))
    pipeline = Pipeline(policy, LocalEngine(), scorer, task, system_prompt="", max_new_tokens=48, temperature=1.0)

    options = UpdateOptions(clip=0.2, max_grad_norm=1.0, warmup_steps=10, micro_batch_tokens=8192)
    update = Update(policy.model, blocks, temperature=1.0, options=options)
    update.configure(partial(torch.optim.AdamW, lr=2e-4, weight_decay=0.1), steps)

    ece = float("nan")
    for step in range(steps):
        # 1. Rollout: sample a group of completions of each prompt, find their blocks, verify and reward them.
        problems = [task.problem("train", i) for i in problem_indices(SEED, step, task.size("train"), PROMPTS)]
        batch = RolloutBatch(step, problems, GROUP)
        keys = seeds.keys(SEED, step, 0, PROMPTS)
        batch.samples, batch.scored, _ = pipeline(problems, keys, GROUP)

        # 2. Advantages: each objective's reward minus its own baseline, summed up block by block.
        group = group_index(PROMPTS * GROUP, GROUP)
        table = score_table(batch.scored, objectives, given_reward, group)
        views = [reward_view(objective, j, table, group) for j, objective in enumerate(objectives)]
        values = torch.stack([baseline(view) for baseline, view in zip(baselines, views, strict=True)], 1)
        per_objective = advantages(table.rewards, values, table.present)
        per_block = sum_by_block(per_objective, scorer.block_of_objective, [1.0, 1.0], len(blocks))
        batch.advantages = Advantages(per_objective, per_block)

        # 3. Update: the clipped loss, block by block, on the tokens of each block alone.
        update.step(batch)

        completions = batch.scored.completions
        ece = calibration(stated_confidences(completions), correct_flags(completions))["ece"].item()
        accuracy = correct_flags(completions).mean().item()
        print(f"step {step + 1:>4}  accuracy {accuracy:.3f}  ECE {ece:.3f}  entropy {batch.metrics['entropy']:.3f}")
    return ece


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
