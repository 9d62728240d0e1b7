"""Describe what the project uses of a transformers causal language model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class CausalLM(Protocol):
    """Describe the part of a transformers causal language model that this project uses.

    transformers' own class promises nothing about the submodules and outputs that a model of this kind has, so their
    types are Any here. The comments say what they hold.
    """

    @property
    def config(self) -> Any: ...  # a transformers PreTrainedConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any: ...  # has .logits

    def get_decoder(self) -> Any: ...  # the module below the head; its output has .last_hidden_state

    def get_input_embeddings(self) -> Any: ...  # a module with a weight of (V, width)

    def get_output_embeddings(self) -> Any: ...  # the head: a module with a weight of (V, width), maybe a bias

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...

    def tie_weights(self) -> Any: ...

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None: ...

    def eval(self) -> Any: ...

    @property
    def to(self) -> Callable[..., Any]: ...  # a method; transformers wraps it, so it has no signature to name here

    def save_pretrained(self, save_directory: str | Path, *, state_dict: dict[str, Any] | None = None) -> Any: ...
