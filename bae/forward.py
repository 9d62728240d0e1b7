"""The policy's distributions over the tokens of sampled completions: one forward pass, without padding that no row
needs; and the flat gradient of what is made of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bae.batch import Samples
from bae.numbers import Decisions, candidate_log_probs, expected


def completion_logits(model: Any, samples: Samples, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T', V) logits, those at t the distribution from which token t was drawn, and the (B, T') tokens, T' the
    longest completion among `rows`; both on the model's device."""
    mask = samples.completion_mask[rows]
    width = int(mask.sum(1).max())
    start = int(samples.prompt_mask[rows].int().argmax(1).min())
    ids = samples.completion_ids[rows, :width].to(model.device)
    inputs = torch.cat([samples.prompt_ids[rows, start:].to(model.device), ids], 1)
    attention = torch.cat([samples.prompt_mask[rows, start:], mask[:, :width]], 1).long().to(model.device)
    logits = model(
        input_ids=inputs[:, :-1],
        attention_mask=attention[:, :-1],
        position_ids=(attention.cumsum(1) - 1).clamp(min=0)[:, :-1],
        use_cache=False,
        logits_to_keep=width,
    ).logits
    return logits, ids


@torch.no_grad()
def expected_reward(
    model: Any, samples: Samples, decisions: Decisions, temperature: float, micro_batch_size: int
) -> Tensor:
    """(N,): the reward that the policy's distribution over the number promises before its first decision; NaN where a
    completion has none."""
    out = torch.full((len(decisions.position),), torch.nan)
    if not decisions.position.shape[1]:
        return out
    deciding: Sequence[Tensor] = (decisions.position[:, 0] >= 0).nonzero().squeeze(1).split(micro_batch_size)
    for rows in deciding:
        if len(rows):
            part = decisions.rows(rows).to(model.device)
            logits, _ = completion_logits(model, samples, rows)
            log_probs = candidate_log_probs(logits, part.position, part.ids, temperature)
            out[rows] = expected(log_probs, part)[:, 0].cpu()
    return out


def flat_gradient(loss: Tensor, model: torch.nn.Module) -> Tensor:
    """(D,): the gradient in the trained parameters, in fp32 or more; the graph stays for the next."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float)) for g in gradients])
