"""Measure the sizes of a model without its weights: from its configuration, on torch's meta device.

A configuration is a config.json, the header of a GGUF file, or one of the published shapes in bae/assets/shapes.json.
What layers keep for the backward pass is measured, too: the model's own forward pass runs on that device, and autograd
tells what it keeps.
"""

import copy
import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from bae.errors import UserError
from bae.training import attention, lora
from bae.training.causal_lm import CausalLM
from bae.training.flops import model_size
from bae.training.footprint import Shape
from bae.training.policy import PACKAGE, local_folder, package_folder

KNOWN = PACKAGE / "assets" / "shapes.json"
"""The configurations of models that are named by an experiment of conf/, as published: they are known without a hub."""
SOME, MORE = 64, 128
"""Tokens of the passes that tell how the memory grows with tokens."""


def pretrained_config(path: str, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model, by a folder or a hub id, as `bae.training.policy.load_pretrained` takes it.

    Raises UserError if there is none.
    """
    folder = local_folder(path)
    if folder is None and (known := _known(path)) is not None:
        return known
    try:
        return AutoConfig.from_pretrained(str(folder or path), trust_remote_code=trust_remote_code)
    except OSError as error:
        raise UserError(
            f"model.path={path}: its shape is not known here, for there is no such folder, and the hub does not give "
            "it; name a folder that has its config.json, or a model of the same shape"
        ) from error


def gguf_config(package: str, file: str) -> Any:
    """Return the configuration of a GGUF file inside an installed package. Raises UserError if there is none."""
    folder = package_folder(package, file)
    if folder is not None:
        return AutoConfig.from_pretrained(folder, gguf_file=file)
    known = _known(file)
    if known is None:
        raise UserError(f"model: no {file} in the package {package}, and its shape is not known; install the package")
    return known


def _known(name: str) -> Any:
    """Return a published configuration, or None. A name may be an alias of another."""
    shapes = json.loads(KNOWN.read_text())["models"]
    found = shapes.get(name)
    found = shapes[found] if isinstance(found, str) else found
    return None if found is None else AutoConfig.for_model(**found)


def without_weights(config: Any, dtype: torch.dtype) -> CausalLM:
    """Make a model on the meta device, where tensors have shapes and no memory."""
    with torch.device("meta"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    tied: CausalLM = model
    return tied


def adapter_parameters(config: Any, adapter: lora.Lora) -> int:
    """Return the numbers in the adapters of a model. Raises ValueError for targets that it does not have."""
    model = without_weights(config, torch.float32)
    with torch.device("meta"):
        lora.attach(model, replace(adapter, save="merged"))
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def measure(config: Any, dtype: torch.dtype, autocast: torch.dtype | None = None) -> Shape:
    """Measure a model.

    Its layers count as alike: what they keep is measured on the first two.

    Args:
        config: of transformers.
        dtype: of the weights.
        autocast: the type of the products of the update under mixed precision; None without.

    Raises:
        UserError: if the model's forward pass needs the values of its tensors, as with experts.
    """
    model, text = without_weights(config, dtype), config.get_text_config()
    try:
        (one, casts_one), (two, casts_two) = (_kept(_with_layers(config, n), dtype, autocast) for n in (1, 2))
    except Exception as error:  # whatever a model's code does with tensors that have no values
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model: what the layers of {type(model).__name__} keep for the backward pass cannot be told without "
            f"weights ({reason}), so this model cannot be planned"
        ) from error
    layers = int(text.num_hidden_layers)
    head = model.get_output_embeddings().weight
    casts = casts_one + (layers - 1) * (casts_two - casts_one)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        size=model_size(model),
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=layers,
        width=int(text.hidden_size),
        vocabulary=len(head),
        keys=int(heads * width),
        number=dtype.itemsize,
        kept=two - one,
        kept_beside=2 * one - two,
        casts=casts + (0 if autocast is None else head.numel() * autocast.itemsize),
        product=(autocast or dtype).itemsize,
        tied=head is model.get_input_embeddings().weight,
    )


def _with_layers(config: Any, layers: int) -> Any:
    """Return the configuration of the same model with fewer layers."""
    few = copy.deepcopy(config)
    text = few.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return few


def _kept(config: Any, dtype: torch.dtype, autocast: torch.dtype | None) -> tuple[float, float]:
    """Return the bytes that the backward pass of a model keeps: for each token, and whatever the number of tokens."""
    model: Any = without_weights(config, dtype)
    model.eval()
    attention.share(model)
    if autocast is not None:  # torch has no autocast for the meta device
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                vars(layer)["forward"] = partial(_cast_linear, layer, autocast)
    some, more = (_kept_of(model, tokens, autocast) for tokens in (SOME, MORE))
    each = (more - some) / (MORE - SOME)
    return each, some - SOME * each


def _kept_of(model: CausalLM, tokens: int, autocast: torch.dtype | None) -> int:
    """Return the bytes of the tensors that autograd keeps in a pass over so many tokens, the weights left out."""
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x  # held, so that no other tensor takes its place
        return x

    ids, positions = (torch.zeros(1, tokens, dtype=torch.long, device=model.device) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        attention.run(model, ids, positions, _Flash(autocast))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def _cast_linear(layer: torch.nn.Linear, dtype: torch.dtype, x: Tensor) -> Tensor:
    """Compute a linear layer as autocast does."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), layer.weight.to(dtype), bias)


class _Flash:
    """Attend as bae.training.attention_cpu and attention_gpu do as far as memory goes: no scores are kept."""

    longest = 0

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype  # of products; None for that of the states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if self.dtype is not None:
            query, key, value = query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)
        out: Tensor = _Keep.apply(query * scaling, key, value)
        return out


class _Keep(torch.autograd.Function):
    """Keep query, key and value for a backward pass that is never taken."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query).transpose(1, 2).contiguous()
