"""The policy's distributions over the tokens of sampled completions, from one forward pass, and flat gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from bae.batch import ForwardResult, SampledTokens
from bae.method.losses import log_probs_and_entropy
from bae.method.stated_numbers import Decisions, candidate_log_probs, expected
from bae.training import attention
from bae.training.causal_lm import CausalLM
from bae.training.chunked_head import head_log_probs
from bae.training.packing import Packing, PrefetchedPrompt, micro_batches
from bae.training.sharding import as_forward


def completion_pass(
    model: CausalLM,
    samples: SampledTokens,
    rows: Tensor,
    temperature: float,
    prefetched: PrefetchedPrompt | None = None,
    to_complete: PrefetchedPrompt | None = None,
) -> ForwardResult:
    """Run the policy over the completions `rows`.

    If the model was told to share prompts (bae.training.attention.share), a prompt is encoded once for the neighbours
    that share it, and the logits of all tokens never exist at once. Otherwise the rows are padded and the logits whole.

    Args:
        model: the policy.
        samples: N completions.
        rows: (B,) long.
        temperature: of sampling.
        prefetched, to_complete: see bae.training.packing.Packing.
    """
    with _checkpointing(model):
        if attention.is_shared(model):
            return _packed_pass(model, samples, rows, temperature, prefetched, to_complete)
        logits, ids = completion_logits(model, samples, rows)
    log_p, entropy = log_probs_and_entropy(logits, ids, temperature)
    batch = torch.arange(len(rows), device=logits.device).unsqueeze(1)

    def logits_at(position: Tensor) -> Tensor:
        return logits[batch, position.clamp(min=0)]

    return ForwardResult(log_p, entropy, logits_at, temperature)


def completion_logits(model: CausalLM, samples: SampledTokens, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of all completion tokens, from padded rows in which each completion has its own prompt.

    Returns:
        logits: (B, T', V). Those at t are the distribution from which token t was drawn.
        ids: (B, T'), the tokens. T' is the longest completion among `rows`. Both are on the model's device.
    """
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
    model: CausalLM,
    samples: SampledTokens,
    rows: Tensor,
    temperature: float,
    prefetched: PrefetchedPrompt | None,
    to_complete: PrefetchedPrompt | None,
) -> ForwardResult:
    """Run the policy over one row of tokens without padding, each prompt once."""
    mask = samples.completion_mask[rows]
    mask = mask[:, : int(mask.sum(1).max())].to(model.device)
    ids = samples.completion_ids[rows, : mask.shape[1]].to(model.device)

    weight: Any = None
    bias: Any = None

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        nonlocal weight, bias
        hidden = Packing(samples, rows, model.device, prefetched, to_complete).states(model)
        head = model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if torch.is_autocast_enabled(hidden.device.type):  # as for any linear layer
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return *head_log_probs(hidden, weight, bias, ids[mask], temperature), hidden

    *flat, hidden = as_forward(model, forward)
    log_p, entropy = (torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in flat)
    first = mask.sum(1).cumsum(0) - mask.sum(1)

    def logits_at(position: Tensor) -> Tensor:
        place = (first.unsqueeze(1) + position.clamp(min=0)).clamp(max=len(hidden) - 1)
        return torch.nn.functional.linear(hidden[place], weight, bias)

    return ForwardResult(log_p, entropy, logits_at, temperature)


@contextmanager
def _checkpointing(model: CausalLM) -> Iterator[None]:
    """Let layers that were told to checkpoint do it.

    transformers lets them only in training mode, but the modules inside them must not drop anything out.
    """
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
    model: CausalLM, samples: SampledTokens, decisions: Decisions, temperature: float, micro_batch_tokens: int
) -> Tensor:
    """Return (N,): the reward that the policy's distribution over the number promises before its first decision.

    It is NaN where a completion has no decision. micro_batch_tokens: tokens of a forward pass.
    """
    out = torch.full((len(decisions.position),), torch.nan)
    if not decisions.position.shape[1]:
        return out
    deciding = (decisions.position[:, 0] >= 0).nonzero().squeeze(1)
    for rows in micro_batches(samples, deciding, micro_batch_tokens):
        part = decisions.rows(rows).to(model.device)
        logits = completion_pass(model, samples, rows, temperature).logits_at(part.position)
        out[rows] = expected(candidate_log_probs(logits, part.ids, temperature), part)[:, 0].cpu()
    return out


def flat_gradient(loss: Tensor, model: CausalLM) -> Tensor:
    """Return the flat gradient in the trained parameters, in fp32 or more. The graph stays for the next gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float)) for g in gradients])


@torch.no_grad()
def check_shared_prefix(model: CausalLM) -> None:
    """Refuse a model whose own logits a pass with shared prompts does not give. Raises ValueError.

    Some models have states of another kind beside attention, or do more than a matrix product to make logits.
    """
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
