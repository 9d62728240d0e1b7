"""A place for attention of our own in any transformers model, for passes whose tokens share prompts.

transformers asks a registry for the attention function that the model's configuration names, and hands keyword
arguments of the forward call down to it. `share` names one that gives the work to the call's `layout`, where there is
one, and else to the function that the model had. A model that has been told so encodes a prompt once for all its
completions, in training (bae.training.packing) and in sampling (bae.rollout.local.engine).
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "bae_over_"


class Layout(Protocol):
    """Which tokens of a forward pass see which."""

    longest: int
    """Tokens of the longest sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query: (B, H, S, D). key, value: (B, H_kv, S, D), those of the tokens of this pass. Returns (B, S, H, D)."""
        ...


def share(model: Any) -> None:
    """Let `model` take a `layout`; without one it computes what it did before. Calling it again changes nothing."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        before = config._attn_implementation
        if before.startswith(PREFIX):
            continue
        # "eager" is each model's own function and in no registry.
        inner = before if before in ALL_ATTENTION_FUNCTIONS else "sdpa"
        if PREFIX + inner not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(PREFIX + inner, partial(_attend, ALL_ATTENTION_FUNCTIONS[inner]))
            ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])
        config._attn_implementation = PREFIX + inner


def is_shared(model: Any) -> bool:
    """Whether `share` was called."""
    return model.config._attn_implementation.startswith(PREFIX)


def run(model: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Hidden states of the last layer, (B, S, width), of a pass whose attention is the layout's.

    ids, positions: (B, S). Raises ValueError for a model whose attention cannot be told.
    """
    # A mask of four dimensions is taken as it is, so that transformers makes none of its own.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    return model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, layout=layout
    ).last_hidden_state


@torch.compiler.disable  # shapes differ from call to call, and the loops are over Python lists
def _attend(
    inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float,
    layout: Layout | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if layout is None:
        return inner(module, query, key, value, attention_mask, scaling=scaling, **others)
    window = others.get("sliding_window")
    if (window is not None and window < layout.longest) or any(others.get(x) is not None for x in ("softcap", "s_aux")):
        raise ValueError(
            f"{type(module).__name__} has a sliding window, a soft cap or sinks, which attention with shared prompts "
            "has not; set model.shared_prefix=false"
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return layout.attend(module.layer_idx, query, key, value, scaling), None
