"""The gradient that a baseline's advantages give, against the one that many fresh samples of the block give.

A gradient of one block's objective is linear in its advantages, so the gradient of each completion's log-probability is
kept once, sketched to a few numbers (bae.fidelity.compare_to_monte_carlo.count_sketch), and every baseline's gradient
is a weighted sum.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.fidelity.compare_to_monte_carlo import GradientAgreement, gradient_agreement
from bae.fidelity.continuations import Continuations
from bae.method.baselines import mean_of_others
from bae.method.stated_numbers import Decisions, all_action, candidate_log_probs, expected, token_advantages
from bae.rollout.pipeline import Pipeline
from bae.training.forward import completion_pass, flat_gradient
from bae.training.packing import micro_batches
from bae.training.sketch import count_sketch

ALL_ACTION = "rao_blackwell, all actions"


def sketch_completions(
    pipeline: Pipeline,
    samples: SampledTokens,
    in_block: Tensor,
    rows: Tensor,
    reward: Tensor,
    decisions: Decisions | None,
    size: int,
) -> dict[str, Tensor]:
    """Gradients of each completion in `rows`, mean over the block's tokens, (R, size) each: `whole`, of its
    log-probability; `text`, of that before the number; `sampled` and `every`, of the number with its own advantages,
    from the token drawn and from all actions. Without decisions `text` is `whole`, and the last two are 0.

    in_block: (N, T) bool. reward: (N,).
    """
    kept: dict[str, list[Tensor]] = {"whole": [], "text": [], "sampled": [], "every": []}
    for n in rows.unsqueeze(1):
        seen = completion_pass(pipeline.policy.model, samples, n, pipeline.temperature)
        log_p = seen.log_p
        mask = in_block[n, : log_p.shape[1]].to(log_p.device)
        whole = (log_p * mask).sum() / mask.sum()
        parts = {"whole": whole, "text": whole}
        if decisions is not None and (decisions.position[n] >= 0).any():
            one = decisions.rows(n).to(log_p.device)
            log_probs = candidate_log_probs(seen.logits_at(one.position), one.ids, pipeline.temperature)
            values = expected(log_probs.detach(), one)
            earned = reward[n].to(log_p.device)
            # With b = V_1 the text has no advantage, so what is left is that of the number and of what follows it.
            number = token_advantages(earned - values[:, 0], earned, values, one, mask)
            text = mask * (torch.arange(mask.shape[1], device=mask.device) < one.position[:, :1])
            at = torch.zeros_like(number).scatter_add(1, one.position.clamp(min=0), (one.position >= 0).to(number))
            gain = (all_action(log_probs, one) * (one.position >= 0)).sum()
            parts |= {"text": (log_p * text).sum() / mask.sum(), "sampled": (log_p * number).sum() / mask.sum(),
                      "every": ((log_p * number * (at == 0)).sum() + gain) / mask.sum()}  # fmt: skip
        for name, sketches in kept.items():
            sketches.append(_sketch(pipeline, [parts[name]], size) if name in parts else torch.zeros(size))
    return {name: torch.stack(sketches) if sketches else torch.zeros(0, size) for name, sketches in kept.items()}


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
    """(P, size) twice: the gradient of each group's prefixes in objective j, from each half of the fresh samples, every
    one judged against the others of its prefix and half. group: (R,) long, below P. groups: P."""
    rewards = again.rewards(j)
    half = again.rollouts // 2
    in_block = (again.scored.block_of == block) & again.samples.completion_mask
    found = []
    for columns in (slice(0, half), slice(half, 2 * half)):
        mine = rewards[:, columns]
        prefix = torch.arange(len(mine)).repeat_interleave(half)
        flat = mine.flatten()
        others = mean_of_others(flat.nan_to_num(), prefix, ~flat.isnan())
        rows = torch.arange(len(mine)).unsqueeze(1) * again.rollouts + torch.arange(again.rollouts)[columns]
        weight = (flat - others).nan_to_num() / half
        each = []
        for p in range(groups):
            chosen = group[prefix] == p
            terms = _weighted(
                pipeline, again.samples, in_block, rows.flatten()[chosen], weight[chosen], micro_batch_tokens
            )
            each.append(_sketch(pipeline, terms, size))
        found.append(torch.stack(each))
    return found[0], found[1]


def _weighted(
    pipeline: Pipeline, samples: SampledTokens, in_block: Tensor, rows: Tensor, weight: Tensor, micro_batch_tokens: int
) -> Iterator[Tensor]:
    """The weighted sum of the completions' mean log-probabilities in the block, micro-batch by micro-batch."""
    weight_of = weight.new_zeros(len(in_block)).index_put((rows,), weight)
    for part in micro_batches(samples, rows, micro_batch_tokens):
        log_p = completion_pass(pipeline.policy.model, samples, part, pipeline.temperature).log_p
        mask = in_block[part, : log_p.shape[1]].to(log_p.device)
        yield (weight_of[part].to(log_p.device) * (log_p * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()


def _sketch(pipeline: Pipeline, terms: Sequence[Tensor] | Iterator[Tensor], size: int) -> Tensor:
    """Of the gradient of a sum, term by term."""
    total = torch.zeros(size)
    for term in terms:
        total += count_sketch(flat_gradient(term, pipeline.policy.model), size).cpu()
    return total


def compare_gradients(
    sketches: Mapping[str, Tensor],
    reward: Tensor,
    expected_reward: Tensor,
    values: Mapping[str, Tensor],
    text_values: Mapping[str, Tensor],
    prompt: Tensor,
    resamples: int,
) -> dict[str, GradientAgreement]:
    """Of each baseline in `values`, (N,) each; of those in `text_values` with the number judged by its own expectation,
    and, as ALL_ACTION, from every action.

    sketches: of `sketch_completions`, (N, size) each, and of `sketch_reference`, `half_a` and `half_b`, (P, size).
    reward, expected_reward: (N,), NaN for the latter where there is no decision. prompt: (N,) long, 0 to P - 1.
    """
    sums = lambda each: torch.zeros_like(sketches["half_a"]).index_add(0, prompt, each)  # noqa: E731
    proxies = {}
    for name, value in values.items():
        if name not in text_values:
            proxies[name] = sums((reward - value).unsqueeze(1) * sketches["whole"])
            continue
        advantage = torch.where(expected_reward.isnan(), reward, expected_reward) - text_values[name]
        text = advantage.unsqueeze(1) * sketches["text"]
        proxies[name] = sums(text + sketches["sampled"])
        proxies[ALL_ACTION] = sums(text + sketches["every"])
    return {
        name: gradient_agreement(proxy, sketches["half_a"], sketches["half_b"], resamples)
        for name, proxy in proxies.items()
    }
