"""Whether blocks pull against each other: by hand, on a policy, and over ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from bae.callbacks.interference import Interference, interference
from tests.support.updates import BLOCKS, batch, make_update, rows_of

ALONE = SimpleNamespace(world_size=1)


def pipeline(blocks=BLOCKS):
    return SimpleNamespace(scorer=SimpleNamespace(blocks=blocks))


def test_by_hand():
    found = interference(torch.tensor([[3.0, 4.0], [-5.0, 0.0], [0.0, 10.0]]), ["a", "b", "c"])
    assert found == {
        "gradient_share/a": 0.25, "gradient_share/b": 0.25, "gradient_share/c": 0.5,
        "gradient_cosine/a/b": pytest.approx(-0.6), "gradient_cosine/a/c": pytest.approx(0.8),
        "gradient_cosine/b/c": 0,
    }  # fmt: skip


def test_a_gradient_that_is_zero():
    found = interference(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), ["a", "b"])
    assert (found["gradient_share/a"], found["gradient_share/b"]) == (1, 0)
    assert math.isnan(found["gradient_cosine/a/b"])
    assert all(map(math.isnan, interference(torch.zeros(2, 4), ["a", "b"]).values()))


def measure(policy, work, trainer=ALONE, **options):
    settings = {"every": 1, "completions": 8, "size": 1 << 16}
    made = SimpleNamespace(update=make_update(policy))
    Interference(pipeline(), **settings | options).on_train_batch_start(trainer, made, work, 0)
    return work.metrics


def exact(policy, work, rows):
    return interference(make_update(policy).block_gradients(work, rows, 0), ["solution", "confidence"])


def test_it_is_measured_on_the_first_whole_groups(tiny):
    for completions, groups in ((1, 1), (4, 1), (7, 1), (8, 2), (99, 2)):  # of four completions
        work = batch(seed=2)
        found = measure(tiny, work, completions=completions)
        assert found == pytest.approx(exact(tiny, work, torch.arange(4 * groups)), abs=0.02)
        assert work.seconds["interference"] > 0
    assert exact(tiny, work, torch.arange(4)) != pytest.approx(exact(tiny, work, torch.arange(8)), abs=0.02)


def test_blocks_that_push_apart(tiny):
    """Both blocks credit the same tokens of the same completions, with opposite advantages."""
    work = batch()
    samples, scored = work.require_rollouts()
    samples.completion_ids[:] = 5
    samples.completion_mask[:] = True
    scored.block_of[:] = torch.arange(6) % 2
    work.require_advantages().per_block[:, 1] = -work.require_advantages().per_block[:, 0]
    against = measure(tiny, work)["gradient_cosine/solution/confidence"]
    work.require_advantages().per_block[:, 1] *= -1
    assert against == pytest.approx(-measure(tiny, work)["gradient_cosine/solution/confidence"]) and against < -0.5


def test_when_it_is_measured(tiny):
    measured = []
    for step in range(7):
        work = batch()
        work.step = step
        if measure(tiny, work, every=3):
            measured.append(step)
    assert measured == [0, 3, 6]


def test_one_block_has_nobody_to_interfere_with():
    work = batch()
    Interference(pipeline(BLOCKS[:1]), 1, 8, 64).on_train_batch_start(ALONE, None, work, 0)
    assert work.metrics == {} and work.seconds == {}


def test_ranks_measure_the_mean_of_their_gradients(tiny):
    work = batch(seed=2)
    whole = measure(tiny, work)
    parts, said = [rows_of(work, torch.arange(4)), rows_of(work, torch.arange(4, 8))], []
    two = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device="cpu"))
    two.strategy.all_gather = lambda mine: (said.append(mine), mine.expand(2, *mine.shape))[1]
    for part in parts:
        part.metrics = {}
        measure(tiny, part, two)
    two.strategy.all_gather = lambda mine: torch.stack(said)
    for part in parts:
        assert part.metrics != pytest.approx(whole, abs=1e-3)
        assert measure(tiny, part, two) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("name", ["every", "completions", "size"])
def test_what_cannot_work_is_refused(name):
    with pytest.raises(ValueError, match=rf"callbacks\.interference\.{name}=0: must be 1 or more"):
        Interference(pipeline(), **{"every": 1, "completions": 8, "size": 64} | {name: 0})
