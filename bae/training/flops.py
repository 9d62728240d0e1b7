"""Floating-point operations that a step cannot do without, and how many a second a device is good for. Pure torch.

What is done twice counts once: old log-probabilities, gradient checkpointing, logits that are made again, a prompt in
several micro-batches. So do norms, rotations, activations and softmax count for nothing; matrix products are what takes
the time. A product of (a, b) and (b, c) has 2abc operations, and its backward pass twice as many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bae.batch import SampledTokens

SMALLEST, LARGEST_ON_CPU, LARGEST = 256, 2048, 8192
"""Sides of the squares that matmul_rate multiplies."""


@dataclass(frozen=True)
class ModelSize:
    """layers: weights that multiply the state of each token. head: those that make its logits. pair: operations for
    each query and each key that it sees, in all layers."""

    layers: int
    head: int
    pair: int


def model_size(model: Any) -> ModelSize:
    """Of a causal language model of transformers, with whole weights.

    Of a mixture's experts (`…experts…` among the modules), those that a token goes to count, if the configuration tells
    by num_experts_per_tok how many these are, else all. Every layer counts as one of full attention.
    """
    head = model.get_output_embeddings().weight
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    active, layers = _active_share(model.config.get_text_config()), 0.0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or id(weight) in embeddings or name.endswith("bias"):
            continue
        layers += weight.numel() * (active if "experts" in name.split(".") else 1)
    return ModelSize(round(layers), head.numel(), _pair_flops(model.config.get_text_config()))


def _active_share(config: Any) -> float:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((found for name in names if (found := getattr(config, name, None))), None)
    return (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0


def _pair_flops(config: Any) -> int:
    """A product of query and key, and one of weight and value, in each head of each layer."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = getattr(config, "qk_head_dim", None) or width  # with latent attention, head_dim is the rotated part alone
    value = getattr(config, "v_head_dim", None) or width
    return 2 * config.num_hidden_layers * heads * (key + value)


def update_flops(size: ModelSize, samples: SampledTokens, group_size: int) -> int:
    """Of a forward and a backward pass over completions, group by group, each group's prompt once; all weights are
    trained. Logits are of completion tokens alone."""
    return 3 * (_state_flops(size, samples, group_size) + 2 * size.head * int(samples.completion_mask.sum()))


def decoding_flops(size: ModelSize, samples: SampledTokens, group_size: int) -> int:
    """Of sampling them with a cache: each group's prompt is read once, and so are the logits that follow it."""
    prompts = len(samples.completion_mask) // group_size
    logits = prompts + int(_fed(samples).sum())
    return _state_flops(size, samples, group_size) + 2 * size.head * logits


def _state_flops(size: ModelSize, samples: SampledTokens, group_size: int) -> int:
    """Of the layers, forward: a prompt sees itself, a completion its prompt and itself."""
    prompt, fed = samples.prompt_mask[::group_size].sum(1), _fed(samples)
    before = prompt.repeat_interleave(group_size)
    pairs = (prompt * (prompt + 1) // 2).sum() + (fed * before + fed * (fed + 1) // 2).sum()
    return 2 * size.layers * int(prompt.sum() + fed.sum()) + size.pair * int(pairs)


def _fed(samples: SampledTokens) -> Tensor:
    """(N,): tokens of each completion that something is predicted from, which are all but the last."""
    return (samples.completion_mask.sum(1) - 1).clamp(min=0)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Floating-point operations a second of the fastest of some products of square matrices, in about that time.

    The squares grow up to 2048 on a CPU and 8192 elsewhere, as long as there is time for larger ones. The draws of the
    run are left alone.
    """
    draw = torch.Generator(device).manual_seed(0)
    side, largest = SMALLEST, LARGEST_ON_CPU if device.type == "cpu" else LARGEST
    multiply = _squares(side, dtype, draw)
    multiply()  # the first one loads libraries, which takes its own time
    took, best, end = 0.0, 0.0, perf_counter() + seconds
    while (left := end - perf_counter()) > took:
        took = multiply()
        best = max(best, 2 * side**3 / took)
        if side < largest and 8 * took < left:
            side *= 2
            multiply = _squares(side, dtype, draw)
    return best


def _squares(side: int, dtype: torch.dtype, draw: torch.Generator) -> Callable[[], float]:
    """Multiplies two of them and returns the seconds that it took."""
    a, b = (torch.rand(side, side, generator=draw, device=draw.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> float:
        start = perf_counter()
        torch.mm(a, b, out=out)
        if a.device.type != "cpu":
            torch.accelerator.synchronize(a.device)
        return perf_counter() - start

    return multiply
