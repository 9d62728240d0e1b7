"""Count the floating-point operations that a step needs, and measure how many a device can do per second. Pure torch.

Work that is done twice counts once: old log-probabilities, gradient checkpointing, logits that are made again, a prompt
in several micro-batches. Only matrix products count, because they take the time; norms, rotations, activations and
softmax do not. A product of (a, b) and (b, c) has 2abc operations, and its backward pass has twice as many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.training.causal_lm import CausalLM

SMALLEST, LARGEST_ON_CPU, LARGEST = 256, 2048, 8192
"""The sides of the square matrices that matmul_rate multiplies: the first, and the largest on a CPU and elsewhere."""


@dataclass(frozen=True)
class ModelSize:
    """Hold the sizes of a model that decide how many operations it needs.

    Args:
        layers: the number of weights that multiply the state of each token.
        head: the number of weights that make the logits of a token.
        pair: operations for each pair of a query and a key that it sees, in all layers together.
        frozen: the number of weights among `layers` that are not trained, so that no gradient of theirs is computed.
        frozen_head: the same for `head`.
    """

    layers: int
    head: int
    pair: int
    frozen: int = 0
    frozen_head: int = 0


def model_size(model: CausalLM) -> ModelSize:
    """Measure a causal language model of transformers that has whole weights.

    In a mixture of experts (modules named `experts`), only the experts that a token goes to count. If the configuration
    does not tell how many these are (num_experts_per_tok), all experts count. Every layer counts as one with full
    attention.
    """
    head = model.get_output_embeddings().weight
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    active, layers, frozen = _active_share(model.config.get_text_config()), 0.0, 0.0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or id(weight) in embeddings or name.endswith("bias"):
            continue
        count = weight.numel() * (active if "experts" in name.split(".") else 1)
        layers, frozen = layers + count, frozen + (0 if weight.requires_grad else count)
    pair, frozen_head = _pair_flops(model.config.get_text_config()), 0 if head.requires_grad else head.numel()
    return ModelSize(round(layers), head.numel(), pair, round(frozen), frozen_head)


def _active_share(config: Any) -> float:
    """Return the share of the experts that a token goes to, or 1 if there are none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((found for name in names if (found := getattr(config, name, None))), None)
    return (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0


def _pair_flops(config: Any) -> int:
    """Count one product of query and key, and one of weight and value, in each head of each layer."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = getattr(config, "qk_head_dim", None) or width  # with latent attention, head_dim is only the rotated part
    value = getattr(config, "v_head_dim", None) or width
    return int(2 * config.num_hidden_layers * heads * (key + value))


def update_flops(size: ModelSize, samples: SampledTokens, group_size: int) -> int:
    """Count the operations of a forward and a backward pass, without the gradients of weights that are not trained.

    The prompt of each group is encoded once, and only completion tokens have logits.

    Args:
        size: of the model.
        samples: N completions, group by group.
        group_size: G.
    """
    predicted = int(samples.completion_mask.sum())
    every = 3 * (_state_flops(size, samples, group_size) + 2 * size.head * predicted)
    read = int(samples.prompt_mask[::group_size].sum() + _fed(samples).sum())
    return every - 2 * size.frozen * read - 2 * size.frozen_head * predicted


def decoding_flops(size: ModelSize, samples: SampledTokens, group_size: int) -> int:
    """Count the operations of sampling with a cache. The prompt of each group is read once, with one row of logits.

    Args:
        size: of the model.
        samples: N completions, group by group.
        group_size: G.
    """
    prompts = len(samples.completion_mask) // group_size
    logits = prompts + int(_fed(samples).sum())
    return _state_flops(size, samples, group_size) + 2 * size.head * logits


def _state_flops(size: ModelSize, samples: SampledTokens, group_size: int) -> int:
    """Count the operations of the layers, forward. A prompt sees itself; a completion sees its prompt and itself."""
    prompt, fed = samples.prompt_mask[::group_size].sum(1), _fed(samples)
    before = prompt.repeat_interleave(group_size)
    pairs = (prompt * (prompt + 1) // 2).sum() + (fed * before + fed * (fed + 1) // 2).sum()
    return 2 * size.layers * int(prompt.sum() + fed.sum()) + size.pair * int(pairs)


def _fed(samples: SampledTokens) -> Tensor:
    """Return the number of tokens of each completion from which another is predicted: all but the last; (N,)."""
    return (samples.completion_mask.sum(1) - 1).clamp(min=0)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Measure the floating-point operations per second of the fastest product of square matrices.

    The matrices grow up to a side of 2048 on a CPU and 8192 elsewhere, as long as there is time for larger ones. The
    run's own random draws are not touched.

    Args:
        device: to measure.
        dtype: of the matrices.
        seconds: about how long to measure.
    """
    draw = torch.Generator(device).manual_seed(0)
    side, largest = SMALLEST, LARGEST_ON_CPU if device.type == "cpu" else LARGEST
    multiply = _squares(side, dtype, draw)
    multiply()  # the first product loads libraries, which would be measured too
    took, best, end = 0.0, 0.0, perf_counter() + seconds
    while (left := end - perf_counter()) > took:
        took = multiply()
        best = max(best, 2 * side**3 / took)
        if side < largest and 8 * took < left:
            side *= 2
            multiply = _squares(side, dtype, draw)
    return best


def _squares(side: int, dtype: torch.dtype, draw: torch.Generator) -> Callable[[], float]:
    """Make two square matrices, and return a function that multiplies them and returns the seconds that it took."""
    a, b = (torch.rand(side, side, generator=draw, device=draw.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> float:
        start = perf_counter()
        torch.mm(a, b, out=out)
        if a.device.type != "cpu":
            torch.accelerator.synchronize(a.device)
        return perf_counter() - start

    return multiply
