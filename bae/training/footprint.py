"""Count the memory that an update takes on a device, part by part, before any weight is loaded. Pure arithmetic.

The lines are counted from the code, at their largest: every completion is as long as it may be. bae.training.shapes
measures a `Shape`, bae.rollout.footprint adds what sampling takes, and docs/planning.md compares with what runs took.
"""

from dataclasses import dataclass

import torch

from bae.batch import SampledTokens
from bae.training.attention_cpu import TILE
from bae.training.chunked_head import LOGITS, SLICE
from bae.training.flops import ModelSize

LIBRARIES = 0.7e9
"""Bytes of a process without a model: libraries, and on a GPU the context. Measured on a CPU: .69e9."""
MALLOC = 1.3
"""Bytes that a CPU's heap takes for a byte of tensors that come and go, because freed pieces do not fit the next. It is
chosen so that the runs of docs/planning.md come out."""
TOKEN = 64
"""Bytes for each place of a completion that a step keeps beside its model: ids, draws, masks, weights, advantages."""


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a policy that decide how much memory it takes.

    Attributes:
        size: what counts its operations.
        parameters, trained: numbers.
        layers, width, vocabulary: of the model; `width` of a hidden state.
        keys: numbers of all key heads of a layer together; values have as many.
        number: bytes of a weight.
        kept, kept_beside: bytes a token that a layer, and what is no layer, keep for the backward pass.
        casts: bytes of the copies of weights that mixed precision keeps for the backward pass; 0 without.
        product: bytes of a number in the products of the update.
        tied: whether head and embedding are one.
    """

    size: ModelSize
    parameters: int
    trained: int
    layers: int
    width: int
    vocabulary: int
    keys: int
    number: int
    kept: float
    kept_beside: float
    casts: float
    product: int
    tied: bool


@dataclass(frozen=True)
class Sharding:
    """Say by how much a device's share of each part is smaller, and what the strategy keeps beside.

    Attributes:
        weights, gradients, states: devices that share the part; 1: each has the whole.
        beside: bytes for each byte of the weights at all times: the buckets of DDP.
        whole: the same while it samples: the weights of all shards.
        gathered: the same in an update: the layers that are whole for a moment, with their gradients.
    """

    weights: int = 1
    gradients: int = 1
    states: int = 1
    beside: float = 0.0
    whole: float = 0.0
    gathered: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Hold what a configuration says about memory and time.

    Attributes:
        on_cpu: whether the policy is on a CPU.
        bf16_on_cpu: whether that CPU multiplies bfloat16.
        prompts: of a step, on this device.
        group_size: completions of each.
        prompt_tokens, new_tokens: the longest prompt and completion.
        micro_batch_tokens: of a forward and backward pass.
        checkpointing: whether layers are computed again in the backward pass.
        packed: whether a prompt is encoded once, and only some logits are in memory at a time.
        max_rows: completions that are decoded at a time; 0 if another process samples.
        engine: bytes that a sampler of its own holds on this device while sampling (vLLM).
        asleep: bytes of those that stay during the update.
        state: bytes of optimiser state a parameter.
        devices: that share the work.
        sharding: what they share.
        interference: whether the gradients of blocks are compared.
        reference: whether a frozen copy of the policy is kept, for the divergence from it.
    """

    on_cpu: bool
    bf16_on_cpu: bool
    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    micro_batch_tokens: int
    checkpointing: bool
    packed: bool
    max_rows: int
    engine: float
    asleep: float
    state: float
    devices: int
    sharding: Sharding
    interference: bool
    reference: bool = False

    @property
    def completions(self) -> int:
        """Return the completions of a step on this device."""
        return self.prompts * self.group_size

    @property
    def rows(self) -> int:
        """Return the completions that are decoded at a time."""
        return min(self.max_rows, self.completions)

    @property
    def pass_tokens(self) -> int:
        """Return the most tokens of a forward and backward pass. A longer completion is alone in its pass."""
        whole = self.prompts * self.prompt_tokens + self.completions * self.new_tokens
        return min(max(self.micro_batch_tokens, self.prompt_tokens + self.new_tokens), whole)


def always(shape: Shape, setting: Setting) -> dict[str, float]:
    """Return the parts that are there in every phase."""
    sharding = setting.sharding
    tokens = setting.completions * setting.new_tokens * TOKEN if setting.on_cpu else 0
    return {
        "libraries": LIBRARIES,
        "weights": shape.parameters * shape.number / sharding.weights,
        "optimiser states": shape.trained * setting.state / sharding.states,
        "strategy's copies": shape.parameters * shape.number * sharding.beside,
        "start policy": float(shape.parameters * shape.number * setting.reference),
        "tokens of the step": float(tokens),
    }


def update(shape: Shape, setting: Setting) -> dict[str, float]:
    """Return the parts of the update in a backward pass: at its start in the head, or in its first layer.

    Whichever takes more counts. Everything that the forward pass keeps is still there.
    """
    tokens = setting.pass_tokens
    several = setting.prompts * setting.prompt_tokens + setting.completions * setting.new_tokens > tokens
    layer = shape.kept * tokens
    kept = shape.layers * layer
    if setting.checkpointing:  # the input of each layer alone
        kept = shape.layers * shape.width * (4 if shape.casts else shape.number) * tokens
    parts = {
        # One pass leaves gradients where activations were. Those of several passes are there beside these.
        "gradients": shape.trained * shape.number / setting.sharding.gradients * several,
        "gathered layers": shape.parameters * shape.number * setting.sharding.gathered,
        "weights in half precision": shape.casts,
        "vLLM": setting.asleep,
        "activations": fragmented(setting, kept + shape.kept_beside * tokens),
    }
    in_head = {
        "gradient of the head": float(shape.size.head * (4 + (0 if shape.number == 4 else shape.number))),
        "logits": fragmented(setting, _logits(shape, setting)),
    }
    in_layer = {
        # Tied to the embedding, the head's gradient waits for the embedding's.
        "gradient of the head": float(shape.size.head * shape.number * shape.tied),
        "a layer's backward pass": fragmented(setting, _backward(shape, setting) + layer * setting.checkpointing),
    }
    return parts | max(in_head, in_layer, key=lambda stage: sum(stage.values()))


def _backward(shape: Shape, setting: Setting) -> float:
    """Return the bytes of the gradients inside a layer, as many as what it keeps, and of some tiles of scores."""
    return shape.kept * setting.pass_tokens + (5 * 4 * TILE if setting.on_cpu else 0)


def _logits(shape: Shape, setting: Setting) -> float:
    """Return the bytes of the logits of a pass: a part of them, twice, for the old part goes when the new one is there.

    A GPU works on the whole part in fp32, three times over; a CPU on slices.
    """
    every = shape.vocabulary * setting.pass_tokens
    if not setting.packed:
        return float(every * (shape.product + 12))
    part = min(every, max(LOGITS, shape.vocabulary))
    copies = 2 if every > part else 1
    return float(part * shape.product * copies + 12 * (SLICE if setting.on_cpu else part))


def fragmented(setting: Setting, size: float) -> float:
    """Return the bytes that tensors that come and go take on a heap."""
    return float(size * MALLOC if setting.on_cpu else size)


def longest_group(setting: Setting) -> SampledTokens:
    """Return a group whose completions are as long as they may be, for bae.training.flops; its ids mean nothing."""
    rows = setting.group_size
    prompts = torch.ones(rows, setting.prompt_tokens, dtype=torch.bool)
    own = torch.ones(rows, setting.new_tokens, dtype=torch.bool)
    return SampledTokens(prompts, prompts, own, own, own[:, 0])
