"""Advantages for each token: of lists of ids, under weights of blocks, and in a loss that means over completions."""

from functools import partial

import pytest
import torch

from bae.integrations.blockwise import Blockwise, for_token_lists
from bae.method.losses import block_mean, blockwise_clipped_loss, constant_length, token_mean
from bae.objectives.scoring import Scorer
from bae.text.blocks import make_blocks
from tests.callbacks.test_writers import TEXTS
from tests.fidelity.test_continuations import TWO, by_hand, make_pipeline

WEIGHTS = {"solution": 0.5, "confidence": 2.0}


def weighted(scorer):
    """The scorer with other weights of its blocks."""
    blocks = make_blocks({name: {"sections": TWO[name], "weight": weight} for name, weight in WEIGHTS.items()})
    return Scorer(blocks, scorer.objectives, scorer.verifier, scorer.vocabulary)


def lists(samples):
    rows = zip(samples.completion_ids, samples.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def test_lists_of_ids_have_the_advantages_of_tensors(tiny):
    problems, samples, _ = by_hand(tiny, TEXTS)
    blockwise = Blockwise(make_pipeline(tiny).scorer)
    expected, scored = blockwise(problems, samples, 4)
    end = tiny.tokenizer.eos_token_id
    each, again = for_token_lists(blockwise, problems, lists(samples), [end], 4)
    assert [len(row) for row in each] == samples.completion_mask.sum(1).tolist()
    assert all(row.equal(whole[: len(row)]) for row, whole in zip(each, expected, strict=True))
    assert again.completions == scored.completions and not any(c.truncated for c in again.completions)
    _, cut = for_token_lists(blockwise, problems, lists(samples), [end + 1], 4)
    assert all(c.truncated for c in cut.completions)


def test_a_completion_may_be_empty(tiny):
    problems, samples, _ = by_hand(tiny, TEXTS)
    rows = lists(samples)
    rows[2] = []
    each, scored = for_token_lists(Blockwise(make_pipeline(tiny).scorer), problems, rows, [], 4)
    assert each[2].shape == (0,) and not scored.present[2].any()


def test_weights_of_blocks_count(tiny):
    problems, samples, _ = by_hand(tiny, TEXTS)
    scorer = make_pipeline(tiny).scorer
    plain, scored = Blockwise(scorer)(problems, samples, 4)
    heavy, _ = Blockwise(weighted(scorer))(problems, samples, 4)
    factor = torch.tensor([*WEIGHTS.values(), 0.0])[scored.block_of]  # -1, outside all blocks, is the last
    assert heavy.equal(plain * factor) and not heavy.equal(plain)


@pytest.mark.parametrize("aggregation", [block_mean, token_mean, partial(constant_length, length=48)])
def test_a_mean_over_completions_becomes_the_loss_of_an_aggregation(tiny, aggregation):
    """The loss that verl calls seq-mean-token-mean, on both sides of the clip; values and gradients."""
    problems, samples, _ = by_hand(tiny, TEXTS)
    scorer = weighted(make_pipeline(tiny).scorer)
    folded, scored = Blockwise(scorer, aggregation=aggregation)(problems, samples, 4)
    unweighted, _ = Blockwise(make_pipeline(tiny).scorer)(problems, samples, 4)
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(folded.shape, generator=g)
    new = (old + 0.5 * torch.randn(folded.shape, generator=g)).requires_grad_()

    ratio, mask = (new - old).exp(), samples.completion_mask
    each = -torch.min(ratio * folded, ratio.clamp(0.8, 1.2) * folded)
    theirs = ((each * mask).sum(1) / mask.sum(1)).mean()
    tokens = torch.stack([(scored.block_of == k).sum() for k in range(2)])
    weights = aggregation(scored.block_of, torch.tensor(list(WEIGHTS.values())), tokens)
    ours = blockwise_clipped_loss(new, old, unweighted, weights, 0.2, 0.2)
    torch.testing.assert_close(theirs, ours)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (theirs, ours)]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients)
