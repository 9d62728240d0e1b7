"""Read from a configuration what decides its memory and its time, for a plan. No weight is loaded."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from bae.commands import cli
from bae.commands.build import make, make_optimizer, plain
from bae.commands.checks import SHARDED, strategy_class
from bae.commands.validate import find_target

if TYPE_CHECKING:
    import torch

    from bae.rollout.footprint import Knob
    from bae.training.cards import Card
    from bae.training.footprint import Setting, Shape, Sharding

DEFAULT_CARD = "h100"
"""The card of a plan for GPUs, on a machine that has none."""
CHARACTERS = 4
"""Characters of a token, where there is no tokenizer: about those of English in a large vocabulary."""
QUESTION = 300
"""Characters of a question, where there are no data."""
FEWEST_ROWS = 8
"""Completions decoded at a time below which no plan goes."""
MOST_DEVICES = 64
"""Devices above which no plan goes."""
MEASURED = 0.4
"""Seconds for which the rate of this machine's products is measured, as in callbacks.throughput."""


@dataclass(frozen=True)
class Planned:
    """Hold what a plan is about.

    Attributes:
        kind: of the model, as its configuration names it.
        shape, setting, card: see there; `card` is each device.
        prompts: how the number of tokens of a prompt is known, in words.
    """

    kind: str
    shape: "Shape"
    setting: "Setting"
    card: "Card"
    prompts: str


def planned(cfg: DictConfig, config: Mapping[str, Any]) -> Planned:
    """Return what a configuration says about memory and time.

    Args:
        cfg: of bae-train, checked.
        config: the same as plain dicts and lists.

    Raises:
        UserError: for a model whose shape is not known, and a card that is not known.
        ValueError: for prompts that the ranks cannot share equally.
    """
    from bae.tasks.loader import share_of
    from bae.training.footprint import Setting
    from bae.training.options import UpdateOptions
    from bae.training.shapes import adapter_parameters, measure

    options = UpdateOptions(**config["training"])
    on_cpu = _is_on_cpu(config["strategy"].get("accelerator", "auto"), cfg.plan_card)
    devices, per_node = _devices(config["strategy"], on_cpu)
    share = share_of(cfg.prompts_per_step, devices)
    model_config, dtype = _model(cfg, on_cpu)
    dtype, autocast = _types(str(config["strategy"].get("precision")), dtype)
    shape = measure(model_config, dtype, autocast)
    if cfg.adapter:
        shape = replace(shape, trained=adapter_parameters(model_config, make(cfg.adapter)))
    card = _card(cfg.plan_card, on_cpu, dtype, per_node)
    tokens, prompts = _prompt_tokens(cfg)
    setting = Setting(
        on_cpu=on_cpu,
        bf16_on_cpu=dtype.itemsize == 2,
        prompts=share,
        group_size=cfg.group_size,
        prompt_tokens=tokens,
        new_tokens=cfg.max_new_tokens,
        micro_batch_tokens=options.micro_batch_tokens,
        checkpointing=bool(cfg.model.get("gradient_checkpointing", False)),
        packed=bool(cfg.model.get("shared_prefix", True)),
        state=_state(cfg, dtype),
        devices=devices,
        sharding=sharding(config["strategy"].get("strategy"), devices, shape),
        interference=bool(cfg.callbacks.get("interference")) and len(cfg.objectives.blocks) > 1,
        reference=options.kl_coef > 0 and not cfg.adapter,
        **_engine(cfg, card, on_cpu),
    )
    return Planned(model_config.model_type, shape, setting, card, prompts)


def _is_on_cpu(accelerator: str, card: str | None) -> bool:
    """Tell whether the policy is on a CPU. Raises UserError for a card that is not known, or has no use."""
    import torch

    from bae.training.cards import CARDS

    if card is not None and card not in CARDS:
        raise cli.UserError(f"plan_card={card}: no such card; there are {', '.join(CARDS)}")
    if accelerator == "cpu" and card is not None:
        raise cli.UserError(f"plan_card={card}: strategy.accelerator=cpu has no use for a card; choose strategy=gpu")
    return accelerator == "cpu" or (accelerator == "auto" and card is None and not torch.cuda.is_available())


def _devices(strategy: Mapping[str, Any], on_cpu: bool) -> tuple[int, int]:
    """Return the devices of all nodes, and those of a node. On a machine without GPUs, `auto` counts as one."""
    import torch

    devices, nodes = strategy.get("devices", 1), int(strategy.get("num_nodes", 1))
    if isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", "-1", -1):
        devices = 1 if on_cpu else max(1, torch.cuda.device_count())
    return int(devices) * nodes, int(devices)


def _model(cfg: DictConfig, on_cpu: bool) -> "tuple[Any, torch.dtype]":
    """Return the configuration of the model and the type of its weights.

    A model of another kind than those of bae.training.policy is made as for training, with its weights.
    """
    import torch

    from bae.training import policy, shapes

    target = find_target("model", cfg.model._target_)
    if target is policy.load_pretrained:
        found = shapes.pretrained_config(cfg.model.path, bool(cfg.model.get("trust_remote_code", False)))
    elif target is policy.load_gguf:
        found = shapes.gguf_config(cfg.model.package, cfg.model.file)
    else:
        model = make(cfg.model).model
        return model.config, model.dtype
    name = cfg.model.get("dtype", "auto")
    if name == "auto" and not on_cpu:
        return found, torch.bfloat16
    with warnings.catch_warnings():
        if not on_cpu:
            warnings.simplefilter("ignore")  # of bfloat16 on this machine's processor
        return found, policy.weights_dtype(name)


def _types(precision: str, dtype: "torch.dtype") -> "tuple[torch.dtype, torch.dtype | None]":
    """Return the type of the weights under Lightning's `precision`, and that of the products if these are cast."""
    import torch

    half = torch.float16 if precision.startswith("16") else torch.bfloat16
    if precision.endswith("-mixed"):
        return dtype, half
    return (half if precision in ("bf16", "bf16-true", "16-true") else dtype), None


def _card(name: str | None, on_cpu: bool, dtype: "torch.dtype", per_node: int) -> "Card":
    """Return what a device can do: a card by name, this machine's GPU, or this machine."""
    import torch

    from bae.training.cards import CARDS, of_this_cpu
    from bae.training.flops import matmul_rate

    if on_cpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        rate = matmul_rate(torch.device("cpu"), dtype, MEASURED)
        return of_this_cpu(memory / per_node, rate / per_node, dtype.itemsize == 2)
    if name is None and torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        half, single = (matmul_rate(torch.device("cuda"), kind, MEASURED) for kind in (torch.bfloat16, torch.float32))
        # Its bandwidth is not measured.
        return replace(CARDS[DEFAULT_CARD], name=here.name, memory=here.total_memory, half=half, single=single)
    return CARDS[name or DEFAULT_CARD]


def _state(cfg: DictConfig, dtype: "torch.dtype") -> float:
    """Return the bytes a parameter of the optimiser's state."""
    from bae.training.optimizers import state_bytes, stochastic_adamw, stochastic_state_bytes

    if find_target("optimizer", cfg.optimizer._target_) is stochastic_adamw:
        return stochastic_state_bytes(dtype, bool(cfg.optimizer.get("eight_bit", False)))
    return state_bytes(make_optimizer(cfg), dtype)


def sharding(strategy: Any, devices: int, shape: "Shape") -> "Sharding":
    """Return which parts the devices share under a strategy.

    Args:
        strategy: of lightning.Trainer, a name or a node with a `_target_`; None for one device.
        devices: of all nodes.
        shape: of the model.
    """
    from bae.training.footprint import Sharding

    if devices == 1 or strategy is None:
        return Sharding()
    if strategy_class({"strategy": strategy}) != SHARDED:
        return Sharding(beside=1.0)  # DDP's buckets hold the gradients once more
    # Whole at a time in an update: two layers, embedding and head, and the gradients of all these.
    gathered = 2 * (2 * shape.size.layers / shape.layers + shape.size.head * (2 - shape.tied)) / shape.parameters
    return Sharding(devices, devices, devices, whole=1.0, gathered=gathered)


def _engine(cfg: DictConfig, card: "Card", on_cpu: bool) -> dict[str, Any]:
    """Return `max_rows`, `engine` and `asleep` of a setting."""
    from bae.rollout.local.engine import LocalEngine

    kind = find_target("rollout", cfg.rollout._target_)
    if kind is LocalEngine:
        return {"max_rows": make(cfg.rollout).max_rows, "engine": 0.0, "asleep": 0.0}
    share = cfg.rollout.get("gpu_memory_utilization")  # vLLM in this process; a server has devices of its own
    engine = 0.0 if share is None or on_cpu else float(share) * card.memory
    return {"max_rows": 0, "engine": engine, "asleep": 0.0 if cfg.rollout.get("sleep_level") else engine}


def _prompt_tokens(cfg: DictConfig) -> tuple[int, str]:
    """Return the mean number of tokens of the first step's prompts, and in words how it is known."""
    from bae.tasks.loader import problem_indices
    from bae.training.policy import Policy

    try:
        task = make(cfg.task)
        indices = problem_indices(cfg.seed, 0, task.size("train"), cfg.prompts_per_step)
        questions = [task.problem("train", i).question for i in indices]
        data = ""
    except Exception:  # data that are elsewhere; training says what is wrong with them
        questions, data = [" " * QUESTION], f", with questions of {QUESTION}, for the data are not here"
    system, examples = cfg.objectives.system_prompt, plain(cfg.objectives.examples)
    tokenizer = None if data else _tokenizer(cfg)
    if tokenizer is not None:
        options = plain(cfg.model).get("chat_template_kwargs") or {}
        policy = Policy(None, tokenizer, cfg.model.get("prompt_template"), options)  # type: ignore[arg-type]
        lengths = [len(policy.encode(system, question, examples)) for question in questions]
        return -(-sum(lengths) // len(lengths)), "the mean of the first step"
    template = cfg.model.get("prompt_template")
    if template is None:
        template = "{system}{question}" + "".join(text for example in examples for text in example.values())
    same = len(template.replace("{system}", system).replace("{question}", ""))
    characters = same + sum(map(len, questions)) / len(questions)
    return int(characters / CHARACTERS) + 1, f"from their characters, {CHARACTERS} a token{data}"


def _tokenizer(cfg: DictConfig) -> Any:
    """Return the tokenizer of the model if it is on this machine, or None."""
    from transformers import AutoTokenizer

    from bae.training import policy

    try:
        if "file" in cfg.model:
            folder = policy.package_folder(cfg.model.package, cfg.model.file)
            return None if folder is None else AutoTokenizer.from_pretrained(folder, gguf_file=cfg.model.file)
        folder = policy.local_folder(cfg.model.path) if "path" in cfg.model else None
        return None if folder is None else AutoTokenizer.from_pretrained(str(folder))
    except Exception:  # whatever a tokenizer's files lack; training says what
        return None


def knobs(cfg: DictConfig, plan: Planned) -> "list[Knob]":
    """Return the options that save memory on any number of devices, in the order in which they are to be turned."""
    import torch

    from bae.training.optimizers import stochastic_state_bytes

    setting = plan.setting
    smaller = _halves(setting.pass_tokens, setting.prompt_tokens + setting.new_tokens)
    fewer = _halves(setting.rows, FEWEST_ROWS)
    eight = stochastic_state_bytes(torch.bfloat16, eight_bit=True)
    found: list[Knob] = [
        [(f"training.micro_batch_tokens={n}", partial(replace, micro_batch_tokens=n)) for n in smaller],
        [(f"rollout.max_rows={n}", partial(replace, max_rows=n)) for n in fewer],
        [("model.gradient_checkpointing=true", partial(replace, checkpointing=True))] * (not setting.checkpointing),
        [("optimizer=adamw_8bit", partial(_unless_sharded, eight))] * (setting.state > eight and not shards(cfg)),
    ]
    return [knob for knob in found if knob]


def shards(cfg: DictConfig) -> bool:
    """Tell whether the strategy of a configuration cuts weights up, on however many devices."""
    return strategy_class(plain(cfg.strategy)) == SHARDED


def _unless_sharded(state: float, setting: "Setting") -> "Setting":
    """Return the setting with another optimiser state, which shards cannot have."""
    return setting if setting.sharding.states > 1 else replace(setting, state=state)


def _halves(value: int, least: int) -> list[int]:
    """Return the powers of two below a value, largest first, down to the first that is not above `least`."""
    powers = [2**k for k in range(value.bit_length(), -1, -1) if 2**k < value]
    return [n for n in powers if n > least] + [n for n in powers if n <= least][:1]


def more_devices(cfg: DictConfig, plan: Planned) -> "Knob":
    """Return what sharding over more GPUs changes: FSDP, or the sharded strategy that the configuration has."""
    setting = plan.setting
    found: list[tuple[str, Callable[[Setting], Setting]]] = []
    if setting.on_cpu:
        return found
    for devices in (setting.devices * 2**k for k in range(1, MOST_DEVICES.bit_length())):
        if devices > MOST_DEVICES or setting.prompts * setting.devices % devices:
            break
        option = f"{'' if shards(cfg) else 'strategy=fsdp '}strategy.devices={devices}"
        share = sharding(SHARDED, devices, plan.shape)
        prompts = setting.prompts * setting.devices // devices
        found.append((option, partial(replace, prompts=prompts, devices=devices, sharding=share)))
    return found
