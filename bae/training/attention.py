"""Let any transformers model use attention of our own, in passes whose tokens share prompts.

transformers looks up the attention function that the model's configuration names in a registry, and passes keyword
arguments of the forward call on to it. `share` registers a function that gives the work to the `layout` of the call.
Without a layout, it calls the function that the model had before. A model with this function encodes a prompt once for
all its completions, in training (bae.training.packing) and in sampling (bae.rollout.local.engine).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bae.training.causal_lm import CausalLM

PREFIX = "bae_over_"
"""The name in the registry is this prefix and the name of the function that the model had before."""


class Layout(Protocol):
    """Decide which tokens of a forward pass see which."""

    longest: int
    """The number of tokens of the longest sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Compute attention in one layer.

        Args:
            layer: its index.
            query: (B, H, S, D).
            key, value: (B, H_kv, S, D), of the tokens of this pass.
            scaling: multiplies the products of queries and keys.

        Returns:
            (B, S, H, D).
        """
        ...


def share(model: CausalLM) -> None:
    """Let `model` take a `layout`. Without one it computes the same as before. A second call changes nothing."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        before = config._attn_implementation
        if before.startswith(PREFIX):
            continue
        # "eager" is each model's own function, and in no registry.
        inner = before if before in ALL_ATTENTION_FUNCTIONS else "sdpa"
        if PREFIX + inner not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(PREFIX + inner, partial(_attend, ALL_ATTENTION_FUNCTIONS[inner]))
            ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])
        config._attn_implementation = PREFIX + inner


def is_shared(model: CausalLM) -> bool:
    """Tell whether `share` was called for this model."""
    return str(model.config._attn_implementation).startswith(PREFIX)


def run(model: CausalLM, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Run a pass whose attention is that of the layout.

    Args:
        model: a causal language model for which `share` was called.
        ids, positions: (B, S) long.
        layout: of the tokens.

    Returns:
        The hidden states of the last layer, (B, S, width).

    Raises:
        ValueError: if the model's attention has a sliding window, a soft cap or sinks that would matter.
    """
    # transformers takes a mask of four dimensions as it is, and makes none of its own.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    out = model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, layout=layout
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


@torch.compiler.disable  # shapes differ from call to call, and the loops are over Python lists
def _attend(
    inner: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by the layout, or by `inner` if there is none; as transformers calls attention functions."""
    if layout is None:
        return inner(module, query, key, value, attention_mask, scaling=scaling, **others)
    window = others.get("sliding_window")
    if (window is not None and window < layout.longest) or any(others.get(x) is not None for x in ("softcap", "s_aux")):
        raise ValueError(
            f"{type(module).__name__} has a sliding window, a soft cap or sinks, and attention with shared prompts "
            "does not support them; set model.shared_prefix=false"
        )
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):  # torch knows no autocast for meta
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return layout.attend(module.layer_idx, query, key, value, scaling), None
