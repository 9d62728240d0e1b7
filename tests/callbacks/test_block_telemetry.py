"""How much signal the advantages of a block carry: by hand, and over ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from bae.batch import Advantages
from bae.callbacks.block_telemetry import BlockTelemetry, block_signal
from tests.callbacks.test_interference import ALONE, pipeline
from tests.support.updates import batch, rows_of


def test_by_hand():
    advantage = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0])
    reached = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0]).bool()
    # Of 1, -1, 0 and 2 the mean is 1/2, the squares .25 + 2.25 + .25 + 2.25. The second and third group are 0.
    assert block_signal(advantage, reached, 2) == {
        "block_advantage_std": pytest.approx(1.25**0.5), "block_zero_signal": 0.25, "group_zero_signal": 0.5,
    }  # fmt: skip


def test_a_block_that_nobody_reached():
    found = block_signal(torch.zeros(4), torch.zeros(4).bool(), 2)
    assert math.isnan(found["block_advantage_std"]) and math.isnan(found["block_zero_signal"])
    assert found["group_zero_signal"] == 1


def measure(work, trainer=ALONE):
    work.metrics = {}
    BlockTelemetry(pipeline()).on_train_batch_end(trainer, None, None, work, 0)
    return work.metrics


def test_each_block_by_name():
    work = batch()
    per_block = work.require_advantages().per_block.clone()
    per_block[:4, 1] = 0  # the first group
    work.advantages = Advantages(per_block, per_block)
    found = measure(work)
    assert found["group_zero_signal/solution"] == 0 and found["group_zero_signal/confidence"] == 0.5
    reached = (work.scored.block_of == 1).any(1)
    assert found["block_zero_signal/confidence"] == pytest.approx(float(reached[:4].sum() / reached.sum()))
    std = per_block[reached, 1].std(correction=0)
    assert found["block_advantage_std/confidence"] == pytest.approx(float(std)) and not reached.all()


def test_ranks_measure_the_whole_batch():
    work = batch()
    work.require_advantages().per_block[5:, 0] = 0
    whole = measure(work)
    said = []
    two = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device="cpu"))
    for part in (rows_of(work, torch.arange(4)), rows_of(work, torch.arange(4, 8))):
        said.append([])
        two.strategy.all_gather = lambda mine: (said[-1].append(mine), mine.expand(2, *mine.shape))[1]
        measure(part, two)
    columns = iter([torch.stack(both) for both in zip(*said, strict=True)])
    two.strategy.all_gather = lambda mine: next(columns)
    assert measure(part, two) == whole
