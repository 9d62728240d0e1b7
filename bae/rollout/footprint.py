"""Count the memory of a step's phases, and find the nearest setting that fits. The arithmetic is pure.

bae.training.footprint has the update; here are sampling, and the phases together.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from math import ceil

from bae.rollout.local.cache import GROWTH, PASS_TOKENS
from bae.rollout.local.prepacked import FEW_ROWS
from bae.training.footprint import Setting, Shape, always, fragmented, update

Parts = Mapping[str, float]
"""Bytes by part."""
Knob = Sequence[tuple[str, Callable[[Setting], Setting]]]
"""What an option that saves memory may be set to, from the least change on: as on the command line, and its effect."""


def phases(shape: Shape, setting: Setting) -> dict[str, Parts]:
    """Return the bytes that each part takes on one device at the peak of each phase: sampling and update.

    There is a phase `interference` if the gradients of blocks are compared.
    """
    there, step = always(shape, setting), update(shape, setting)
    whole = {"whole weights": shape.parameters * shape.number * setting.sharding.whole}
    found = {"sampling": there | whole | _sampling(shape, setting), "update": there | step}
    if setting.interference:
        # A block's gradient as autograd returns it, flat in fp32, and its products with the signs of a sketch.
        found["interference"] = found["update"] | {"gradients": 0.0, "gradients of a block": 15.0 * shape.trained}
    return {phase: {part: size for part, size in parts.items() if size} for phase, parts in found.items()}


def peak(found: Mapping[str, Parts]) -> float:
    """Return the bytes of the largest phase."""
    return max(sum(parts.values()) for parts in found.values())


def nearest(
    shape: Shape, setting: Setting, knobs: Sequence[Knob], devices: Knob, room: float
) -> tuple[list[str], dict[str, Parts]] | None:
    """Find the nearest setting that fits.

    It has as few devices as can be, then as few options changed, the first ones first, and each as little as can be.

    Args:
        shape: of the policy.
        setting: that does not fit.
        knobs: that may be turned on any number of devices, in the order of preference.
        devices: that turns to more devices.
        room: bytes of a device.

    Returns:
        The options, and the phases with them; None if nothing fits.
    """
    for first in ([], *([value] for value in devices)):
        for count in range(len(knobs) + 1):
            for chosen in combinations(knobs, count):
                for values in sorted(product(*map(enumerate, chosen)), key=lambda values: sum(i for i, _ in values)):
                    turned = [*(value for _, value in values), *first]
                    changed = setting
                    for _, turn in reversed(turned):  # an option may depend on the devices
                        changed = turn(changed)
                    found = phases(shape, changed)
                    if peak(found) <= room:
                        return [option for option, _ in turned], found
    return None


def _sampling(shape: Shape, setting: Setting) -> dict[str, float]:
    """Return the parts of sampling."""
    if not setting.max_rows:
        return {"vLLM": setting.engine}
    number, rows = shape.number, setting.rows
    token = _keys_and_values(shape)
    # A prompt stays as long as one of its completions is decoded. Both old and new ones are there when some go.
    prompts = min(setting.prompts, ceil(rows / setting.group_size) + 1) * setting.prompt_tokens
    reorders = setting.on_cpu and (setting.bf16_on_cpu if number == 2 else rows <= FEW_ROWS)
    encoded = min(PASS_TOKENS, prompts)
    # On a GPU in fp32: what the draw makes of the logits. On a CPU it works on slices.
    logits = rows * shape.vocabulary * (2 * number if setting.on_cpu else number + 12)
    return {
        "reordered weights": float((shape.size.layers + shape.size.head) * number * reorders),
        "keys and values": fragmented(setting, token * (rows * _places(setting) + 2 * prompts)),
        "logits": fragmented(setting, logits + setting.prompts * shape.vocabulary * number),
        "prompts being encoded": fragmented(setting, encoded * shape.kept / 2),
    }


def decoding(shape: Shape, setting: Setting) -> tuple[int, float]:
    """Return the steps of decoding in which all completions are sampled, and the bytes that a step reads.

    It reads the weights, and the keys and values of the completions so far, in the mean half of their length.
    """
    steps = ceil(setting.completions / setting.rows) * setting.new_tokens
    tokens = setting.rows * setting.new_tokens / 2 + ceil(setting.rows / setting.group_size) * setting.prompt_tokens
    return steps, (shape.size.layers + shape.size.head) * shape.number + tokens * _keys_and_values(shape)


def _keys_and_values(shape: Shape) -> int:
    """Return the bytes of the keys and values of a token, in all layers."""
    return 2 * shape.keys * shape.layers * shape.number


def _places(setting: Setting) -> int:
    """Return the places for tokens of a completion: in steps of GROWTH on a CPU, doubled with CUDA graphs."""
    if setting.on_cpu:
        return ceil(setting.new_tokens / GROWTH) * GROWTH
    places = GROWTH
    while places < setting.new_tokens:
        places *= 2
    return places
