"""An update of a random tiny policy, and a random batch for it."""

from dataclasses import replace
from functools import partial

import torch

from bae.batch import Advantages, RolloutBatch, SampledTokens, Scored
from bae.method.losses import block_mean
from bae.text.blocks import make_blocks
from bae.training.options import UpdateOptions
from bae.training.stepper import OneProcess
from bae.training.update import Update

BLOCKS = make_blocks({"solution": ["answer"], "confidence": {"sections": ["confidence"], "weight": 2.0}})


class TwoRanks(OneProcess):
    """The loop of one of two ranks; reduce: of tensors, to their mean over the ranks."""

    def __init__(self, reduce):
        self.reduce = reduce

    def over_ranks(self, value, operation="mean"):
        return self.reduce(value.double()).double().cpu()


def make_update(policy, reduce=None, blocks=BLOCKS, aggregation=block_mean, temperature=0.8, **options):
    """An update by plain SGD; reduce: see TwoRanks, None for one process. options: of UpdateOptions."""
    settings = {"warmup_steps": 0, "clip": 0.2, "max_grad_norm": 1e9, "micro_batch_tokens": 1000} | options
    loop = TwoRanks(reduce) if reduce else None
    made = Update(policy.model, blocks, temperature, UpdateOptions(**settings), aggregation, loop)
    made.configure(partial(torch.optim.SGD, lr=0.1), steps=9)
    return made


def batch(n=8, width=6, entropy_coef=0.0, seed=0):
    """Random completions of two prompts in two blocks, with random advantages."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (n,), generator=g)
    lengths[0] = width
    mask = torch.arange(width) < lengths.unsqueeze(1)
    first = torch.randint(1, width, (n,), generator=g).unsqueeze(1)
    block_of = torch.where(mask, (torch.arange(width) >= first).long(), -1)
    group = torch.arange(n) // 4
    prompt_mask = torch.arange(4) >= torch.randint(0, 3, (n, 1), generator=g)[group]
    samples = SampledTokens(
        torch.randint(3, 25, (n, 4), generator=g)[group].masked_fill(~prompt_mask, 0),
        prompt_mask,
        torch.randint(3, 25, (n, width), generator=g).masked_fill(~mask, 0),
        mask,
        torch.ones(n).bool(),
    )
    nothing = torch.zeros(n, 2)
    made = RolloutBatch(0, [], 4, samples, Scored([], block_of, nothing, nothing.bool(), nothing.bool()))
    per_block = torch.randn(n, 2, generator=g)
    made.advantages, made.entropy_coef = Advantages(per_block, per_block), entropy_coef
    return made


def rows_of(work, rows):
    """The batch of a rank that has these completions."""
    samples, scored = work.require_rollouts()
    given = work.require_advantages()
    return replace(
        work,
        samples=SampledTokens(*(column if column is None else column[rows] for column in vars(samples).values())),
        scored=replace(scored, block_of=scored.block_of[rows]),
        advantages=replace(given, per_objective=given.per_objective[rows], per_block=given.per_block[rows]),
        metrics={},
        seconds={},
    )
