"""The policy's distributions over the tokens of sampled completions: one forward pass; and the flat gradient of what is
made of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from bae.batch import SampledTokens
from bae.method.losses import log_probs_and_entropy
from bae.method.stated_numbers import Decisions, candidate_log_probs, expected
from bae.training import attention
from bae.training.chunked_head import head_log_probs
from bae.training.packing import Packing, PrefetchedPrompt, micro_batches


class ForwardResult(NamedTuple):
    """Of B completions and their (B, T') tokens, T' the longest among them, on the model's device.

    log_p, entropy: (B, T'), of each token and of the distribution that it was drawn from, in nats, at the sampling
    temperature; some finite numbers outside the mask. logits_at: (B, D) positions, negative for none -> (B, D, V).
    """

    log_p: Tensor
    entropy: Tensor
    logits_at: Callable[[Tensor], Tensor]


def completion_pass(
    model: Any, samples: SampledTokens, rows: Tensor, temperature: float,
    prefetched: PrefetchedPrompt | None = None, to_complete: PrefetchedPrompt | None = None,
) -> ForwardResult:  # fmt: skip
    """rows: (B,) long. A prompt is encoded once for the neighbours that share it, and there are never logits of all
    tokens, if the model has been told (bae.training.attention.share); else by plain rows and whole logits. prefetched,
    to_complete: see
    bae.training.packing.Packing."""
    with _checkpointing(model):
        if attention.is_shared(model):
            return _packed_pass(model, samples, rows, temperature, prefetched, to_complete)
        logits, ids = completion_logits(model, samples, rows)
    log_p, entropy = log_probs_and_entropy(logits, ids, temperature)
    batch = torch.arange(len(rows), device=logits.device).unsqueeze(1)
    return ForwardResult(log_p, entropy, lambda position: logits[batch, position.clamp(min=0)])


def completion_logits(model: Any, samples: SampledTokens, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T', V) logits, those at t the distribution from which token t was drawn, and the (B, T') tokens, T' the
    longest completion among `rows`; both on the model's device. Padded rows, prompt by prompt again."""
    mask = samples.completion_mask[rows]
    width = int(mask.sum(1).max())
    start = int(samples.prompt_mask[rows].int().argmax(1).min())
    ids = samples.completion_ids[rows, :width].to(model.device)
    inputs = torch.cat([samples.prompt_ids[rows, start:].to(model.device), ids], 1)
    padded = torch.cat([samples.prompt_mask[rows, start:], mask[:, :width]], 1).long().to(model.device)
    logits = model(
        input_ids=inputs[:, :-1],
        attention_mask=padded[:, :-1],
        position_ids=(padded.cumsum(1) - 1).clamp(min=0)[:, :-1],
        use_cache=False,
        logits_to_keep=width,
    ).logits
    return logits, ids


def _packed_pass(
    model: Any,
    samples: SampledTokens,
    rows: Tensor,
    temperature: float,
    prefetched: PrefetchedPrompt | None,
    to_complete: PrefetchedPrompt | None,
) -> ForwardResult:
    mask = samples.completion_mask[rows]
    mask = mask[:, : int(mask.sum(1).max())].to(model.device)
    ids = samples.completion_ids[rows, : mask.shape[1]].to(model.device)
    hidden = Packing(samples, rows, model.device, prefetched, to_complete).states(model)
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if torch.is_autocast_enabled(hidden.device.type):  # as for any linear layer
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    flat = head_log_probs(hidden, weight, bias, ids[mask], temperature)
    log_p, entropy = (torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in flat)
    first = mask.sum(1).cumsum(0) - mask.sum(1)
    logits_at = lambda position: torch.nn.functional.linear(  # noqa: E731
        hidden[(first.unsqueeze(1) + position.clamp(min=0)).clamp(max=len(hidden) - 1)], weight, bias
    )
    return ForwardResult(log_p, entropy, logits_at)


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Let layers that have been told to checkpoint do it: transformers has them do so in training mode alone, but what
    is inside them must not drop out."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.training = mode


@torch.no_grad()
def expected_reward(
    model: Any, samples: SampledTokens, decisions: Decisions, temperature: float, micro_batch_tokens: int
) -> Tensor:
    """(N,): the reward that the policy's distribution over the number promises before its first decision; NaN where a
    completion has none."""
    out = torch.full((len(decisions.position),), torch.nan)
    if not decisions.position.shape[1]:
        return out
    deciding = (decisions.position[:, 0] >= 0).nonzero().squeeze(1)
    for rows in micro_batches(samples, deciding, micro_batch_tokens):
        part = decisions.rows(rows).to(model.device)
        logits = completion_pass(model, samples, rows, temperature).logits_at(part.position)
        out[rows] = expected(candidate_log_probs(logits, part.ids, temperature), part)[:, 0].cpu()
    return out


def flat_gradient(loss: Tensor, model: torch.nn.Module) -> Tensor:
    """(D,): the gradient in the trained parameters, in fp32 or more; the graph stays for the next."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float)) for g in gradients])


@torch.no_grad()
def check_shared_prefix(model: Any) -> None:
    """Raise ValueError if passes that share prompts do not give this model's own logits: some models have states of
    another kind beside attention, or do more than a matrix product to make logits."""
    name, advice = type(model).__name__, "set model.shared_prefix=false"
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (2, 6), generator=draw).repeat_interleave(2, 0)
    mask = torch.arange(5) < torch.tensor([[5], [3], [4], [5]])
    prompt_mask = torch.arange(6) >= torch.tensor([[0], [0], [2], [2]])
    ids = torch.randint(vocabulary, (4, 5), generator=draw)
    samples, rows = SampledTokens(prompts, prompt_mask, ids, mask, mask[:, 0]), torch.arange(4)
    try:
        found = completion_pass(model, samples, rows, 1.0).logits_at(torch.arange(5).expand(4, -1))
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"model: {name} cannot encode a prompt once for several completions ({error}); {advice}"
        ) from error
    wanted, _ = completion_logits(model, samples, rows)
    found, wanted = (x[mask.to(x.device)].float() for x in (found, wanted))
    # Single precision agrees to 1e-5; in half precision both are off by a percent or two.
    off = float((found - wanted).norm() / wanted.norm())
    if not off < (1e-3 if model.dtype in (torch.float, torch.double) else 0.1):
        raise ValueError(
            f"model: {name} gives other logits ({off:.1%} off) when a prompt is encoded once for several completions; "
            f"{advice}"
        )
