"""Sketch the gradient that a baseline's advantages give, and the one that many fresh samples of the block give.

The gradient of one block's objective is linear in its advantages. So the gradient of each completion's log-probability
is kept once, sketched to a few numbers (bae.training.sketch.count_sketch), and every baseline's gradient is a weighted
sum of these. A refinement changes the advantages of single tokens by an affine function of the advantage. So a refining
baseline needs two sketches of each completion: with advantage 0, and with advantage 1.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bae.batch import ForwardResult, Refinement, SampledTokens
from bae.fidelity.continuations import Continuations
from bae.method.baselines import mean_of_others
from bae.rollout.pipeline import Pipeline
from bae.training.forward import completion_pass, flat_gradient
from bae.training.packing import micro_batches
from bae.training.sketch import count_sketch

RefinementPair = tuple[Refinement | None, Refinement | None]
"""What a refining baseline makes of advantages that are all 0, and all 1; None where it adds nothing."""


def sketch_completions(
    pipeline: Pipeline,
    samples: SampledTokens,
    in_block: Tensor,
    rows: Tensor,
    refinements: Mapping[str, RefinementPair],
    size: int,
) -> dict[str, Tensor]:
    """Sketch the gradients of each completion in `rows`, mean over the block's tokens.

    Args:
        pipeline: its policy is differentiated.
        samples: N completions.
        in_block: (N, T) bool, the tokens of the block.
        rows: (R,) long.
        refinements: of each refining baseline, by name.
        size: S, numbers of a sketch.

    Returns:
        (R, S) each: "whole", of the log-probability; "<name>/0" and "<name>/1", of what the loss of a refining baseline
        raises if the advantage is 0, and 1.
    """
    names = ["whole", *(f"{name}/{advantage}" for name in refinements for advantage in (0, 1))]
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for n in rows.unsqueeze(1):
        forward = completion_pass(pipeline.policy.model, samples, n, pipeline.temperature)
        mask = in_block[n, : forward.log_p.shape[1]].to(forward.log_p.device)
        kept["whole"].append(_sketch(pipeline, [(forward.log_p * mask).sum() / mask.sum()], size))
        for name, pair in refinements.items():
            for advantage, refinement in enumerate(pair):
                term = _refined(forward, n, mask / mask.sum(), advantage, refinement)
                kept[f"{name}/{advantage}"].append(_sketch(pipeline, [term], size))
    return {name: torch.stack(sketches) if sketches else torch.zeros(0, size) for name, sketches in kept.items()}


def _refined(
    forward: ForwardResult, rows: Tensor, weights: Tensor, advantage: float, refinement: Refinement | None
) -> Tensor:
    """Return the scalar that the loss raises for the completions `rows`, all of the same advantage."""
    if refinement is None:
        return (weights * advantage * forward.log_p).sum()
    change, gain = refinement.apply(forward, rows, weights)
    return (weights * (advantage + change.detach()) * forward.log_p).sum() + gain


def sketch_reference(
    pipeline: Pipeline,
    again: Continuations,
    block: int,
    j: int,
    group: Tensor,
    groups: int,
    size: int,
    micro_batch_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Sketch the gradient of each group's prefixes in one objective, from each half of the fresh samples.

    Every sample is judged against the others of its prefix and half.

    Args:
        pipeline: its policy is differentiated.
        again: fresh samples of R prefixes.
        block: the number of the block.
        j: the number of the objective.
        group: (R,) long, below P.
        groups: P.
        size: S, numbers of a sketch.
        micro_batch_tokens: tokens of a forward pass.

    Returns:
        (P, S) twice: from the first half, and from the second.
    """
    half = again.rollouts // 2
    in_block = (again.scored.block_of == block) & again.samples.completion_mask
    found = []
    for first in (0, half):
        rows, weight = _judged(again, j, first, half)
        each = []
        for p in range(groups):
            chosen = group.repeat_interleave(half) == p
            terms = _weighted(pipeline, again.samples, in_block, rows[chosen], weight[chosen], micro_batch_tokens)
            each.append(_sketch(pipeline, terms, size))
        found.append(torch.stack(each))
    return found[0], found[1]


def _judged(again: Continuations, j: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return (R * count,) rows and weights of `count` samples of each prefix, from number `first` on."""
    rewards = again.rewards(j)[:, first : first + count]
    prefix = torch.arange(len(rewards)).repeat_interleave(count)
    flat = rewards.flatten()
    others = mean_of_others(flat.nan_to_num(), prefix, ~flat.isnan())
    rows = torch.arange(len(rewards)).unsqueeze(1) * again.rollouts + torch.arange(first, first + count)
    return rows.flatten(), (flat - others).nan_to_num() / count


def _weighted(
    pipeline: Pipeline, samples: SampledTokens, in_block: Tensor, rows: Tensor, weight: Tensor, micro_batch_tokens: int
) -> Iterator[Tensor]:
    """Yield the weighted sum of the completions' mean log-probabilities in the block, for each micro-batch."""
    weight_of = weight.new_zeros(len(in_block)).index_put((rows,), weight)
    for part in micro_batches(samples, rows, micro_batch_tokens):
        log_p = completion_pass(pipeline.policy.model, samples, part, pipeline.temperature).log_p
        mask = in_block[part, : log_p.shape[1]].to(log_p.device)
        yield (weight_of[part].to(log_p.device) * (log_p * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()


def _sketch(pipeline: Pipeline, terms: Iterable[Tensor], size: int) -> Tensor:
    """Return (S,): the sketch of the gradient of a sum, term by term."""
    total = torch.zeros(size)
    for term in terms:
        total += count_sketch(flat_gradient(term, pipeline.policy.model), size).cpu()
    return total


def prompt_gradients(
    sketches: Mapping[str, Tensor], advantage: Tensor, prompt: Tensor, refining: str | None = None
) -> Tensor:
    """Return (P, S): the gradient of each prompt, a sum over its completions.

    Args:
        sketches: of `sketch_completions`, (N, S) each, and of `sketch_reference`, "half_a" and "half_b", (P, S) each.
        advantage: (N,), before any refinement.
        prompt: (N,) long, from 0 to P - 1.
        refining: the name of the refining baseline that gave the advantages, None for any other baseline.
    """
    if refining is None:
        each = advantage.unsqueeze(1) * sketches["whole"]
    else:
        at_zero, at_one = sketches[f"{refining}/0"], sketches[f"{refining}/1"]
        each = at_zero + advantage.unsqueeze(1) * (at_one - at_zero)
    return torch.zeros_like(sketches["half_a"]).index_add(0, prompt, each)
