"""Train low-rank adapters beside frozen weights: LoRA (Hu et al. 2021, arXiv 2106.09685), by the library peft.

peft puts its layers into the model itself, so all that takes a model takes one with adapters, too. What else must know
of them is here: the weights that the model would have if its adapters were merged (for files and for other engines),
sampling with these, and the model as it was before training (for the KL term).
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bae.seeds import Namespace, key
from bae.training.causal_lm import CausalLM

ALL_LINEAR = "all-linear"
NAME = "default"
"""peft's name of the one adapter that a model has here."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter's folder, as peft names them."""


@dataclass(frozen=True)
class Lora:
    """Say which adapters a policy is given: a layer W becomes W + alpha / rank · B A, and only A and B are trained.

    There is no dropout, because the ratio of the first update must be exactly 1.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the scale of an adapter, times its rank.
        targets: the last parts of the names of linear layers, such as [q_proj, v_proj]; `all-linear` for all but the
            head.
        seed: of A's random start. B starts at zero, so training begins with the policy as it was.
        save: `merged`, a finished policy is saved with its adapters merged, as any other model; `adapter`, the
            adapters alone, which name the folder or hub id of the weights that they belong to.

    Raises:
        ValueError: for values that cannot work.
        ImportError: if peft is not installed.
    """

    rank: int
    alpha: float
    targets: str | Sequence[str]
    seed: int
    save: Literal["merged", "adapter"] = "merged"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank}: must be 1 or more")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"adapter.alpha={self.alpha}: must be above 0")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ValueError(f"adapter.targets={self.targets}: must be {ALL_LINEAR}, or a list such as [q_proj,v_proj]")
        require_peft()


def require_peft() -> None:
    """Raise ImportError with one sentence if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("peft is not installed; pip install 'blockwise-advantage[lora]', in a checkout make lora")


def attach(model: CausalLM, lora: Lora) -> None:
    """Put adapters into a model, in single precision, and freeze all else.

    Raises ValueError for targets that the model does not have, and if adapters that are saved alone could not name what
    they belong to.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets: Any = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    _check_targets(model, targets)
    if lora.save == "adapter":
        _check_named(model)
    alpha: Any = lora.alpha  # peft's hint is int, and a float works
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng():  # peft draws from the global generators
        draw = np.random.SeedSequence(key(lora.seed, Namespace.ADAPTER)).generate_state(1, np.uint64)
        torch.manual_seed(int(draw[0]))
        inject_adapter_in_model(config, model, NAME)  # type: ignore[arg-type]
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    model.eval()


def adapted(model: CausalLM) -> dict[str, Any]:
    """Return peft's layers of a model by their names; none if it has no adapters."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def merged_state(model: CausalLM) -> dict[str, Tensor]:
    """Return the weights that a model would have if its adapters were merged, under the names that it had before.

    Merged weights are new, of the type of the weights themselves; the others are the model's own, and so are all of a
    model without adapters.
    """
    state, layers = dict(model.state_dict(keep_vars=True)), adapted(model)
    if not layers:
        return state
    merged: dict[str, Tensor] = {}
    for name, weight in state.items():
        layer, _, own = name.partition(".base_layer.")
        if own:
            merged[f"{layer}.{own}"] = merged_weight(layers[layer]) if own == "weight" else weight
        elif name.partition(".lora_")[0] not in layers:
            merged[name] = weight
    return merged


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Return W + alpha / rank · B A of a layer of peft's, computed in single precision or more, of the type of W."""
    weight: Tensor = layer.get_base_layer().weight
    merged: Tensor = (weight + layer.get_delta_weight(NAME)).to(weight.dtype)
    return merged


@contextmanager
def sampling_weights(model: CausalLM) -> Iterator[None]:
    """Let a model with adapters multiply by merged weights in the `with` block: one product a layer instead of three.

    Weights in half precision stay as they are, because rounding would swallow most of a small adapter: the policy that
    is sampled would not be the one that is trained. Merged weights take the memory of the layers a second time. No
    gradient may be computed in the block.
    """
    layers = [x for x in adapted(model).values() if x.get_base_layer().weight.dtype in (torch.float, torch.double)]
    own = [layer.get_base_layer().weight.data for layer in layers]
    for layer in layers:
        layer.get_base_layer().weight.data = merged_weight(layer)
    try:
        with _off(layers):
            yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.get_base_layer().weight.data = weight  # subtracting the adapter again would leave rounding errors


@contextmanager
def without_adapters(model: CausalLM) -> Iterator[None]:
    """Let a model compute what it would without its adapters in the `with` block. No gradient may be computed in it."""
    with _off(list(adapted(model).values())):
        yield


@contextmanager
def _off(layers: Sequence[Any]) -> Iterator[None]:
    """Switch the adapters of these layers off in the `with` block."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(model: CausalLM, folder: Path) -> None:
    """Write the adapters of a model to a folder as peft does; `peft.PeftModel.from_pretrained` reads them."""
    from peft import get_peft_model_state_dict

    config = model.peft_config[NAME]  # type: ignore[attr-defined]
    config.base_model_name_or_path, config.inference_mode = model.config.name_or_path, True
    config.save_pretrained(str(folder))
    state = get_peft_model_state_dict(model, adapter_name=NAME)
    named = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in state.items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder has an adapter instead of a model."""
    return (folder / CONFIG_FILE).is_file()


def base_of(folder: Path) -> str:
    """Return the folder or hub id of the model that the adapter of a folder belongs to. Raises ValueError for none."""
    named = json.loads((folder / CONFIG_FILE).read_text()).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{folder / CONFIG_FILE}: it names no model that the adapter belongs to")
    return str(named)


def merge_saved(model: Any, folder: Path) -> Any:
    """Return a model with the adapter of a folder merged into its weights. Only safetensors are read.

    Raises FileNotFoundError if there are none, and ImportError if peft is not installed.
    """
    require_peft()
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder}: it has {CONFIG_FILE} and no {WEIGHTS_FILE}; take a whole copy")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged.requires_grad_(True)  # peft has frozen it


def _check_targets(model: CausalLM, targets: str | list[str]) -> None:
    """Refuse targets that are no linear layers of the model, or its head, whose weight is used without the layer."""
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in [] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ValueError(f"adapter.targets: the model has no linear layers {target}; there are {', '.join(known)}")
    if targets == []:
        raise ValueError(f"adapter.targets=[]: nothing would be trained; there are {', '.join(known)}")


def _check_named(model: CausalLM) -> None:
    """Refuse a model that no folder and no hub id stands for. Raises ValueError."""
    name = model.config.name_or_path
    if not name or (Path(name).is_dir() and not (Path(name) / "config.json").is_file()):
        raise ValueError(
            "adapter.save=adapter: this model is not of a folder or a hub id that an adapter could name; use "
            "adapter.save=merged"
        )
