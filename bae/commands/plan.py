"""Print what a run needs before any weight is loaded: memory by part, operations, hours, and whether it fits."""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from bae.commands import cli
from bae.commands.build import check_config, quieten
from bae.commands.setting import Planned, knobs, more_devices, planned

if TYPE_CHECKING:
    from bae.rollout.footprint import Parts

COLUMNS = 80
FILLED = 0.9
"""Share of the memory that a plan may fill: runs took up to a tenth more than planned (docs/planning.md)."""
LABEL = 24
"""Columns of the names of lines and parts."""


def plan(cfg: DictConfig, check: Callable[[DictConfig], None]) -> None:
    """Print what a run needs, and train nothing.

    Args:
        cfg: of bae-train.
        check: refuses values that cannot work; raises UserError.
    """
    with cli.user_errors():
        if cfg.resume:
            raise cli.UserError(f"plan=true, resume={cfg.resume}: only a new run can be planned; leave resume out")
        check(cfg)
        quieten()
        found = planned(cfg, check_config(cfg))
    print("\n".join(lines(cfg, found)))


def lines(cfg: DictConfig, found: Planned) -> Iterator[str]:
    """Yield the lines of a plan, of at most COLUMNS columns."""
    from bae.rollout.footprint import nearest, peak, phases

    shape, setting, card = found.shape, found.setting, found.card
    memory = phases(shape, setting)
    trained = "all" if shape.trained == shape.parameters else f"{shape.trained / 1e6:,.2f} M"
    yield from _line("model", f"{found.kind}, {shape.parameters / 1e6:,.2f} M parameters, {trained} trained, "
                              f"{shape.number} bytes each")  # fmt: skip
    yield from _line("devices", f"{setting.devices} x {card.name}, {card.memory / 1e9:.0f} GB each")
    yield ""
    yield from _table(memory)
    yield ""
    yield from _work(cfg, found)
    most, room = peak(memory), FILLED * card.memory
    of = f"{most / 1e9:.1f} of {card.memory / 1e9:.0f} GB, of which a plan leaves {1 - FILLED:.0%} free"
    if most <= room:
        yield from _line("fits", f"yes: {of}")
        return
    mended = nearest(shape, setting, knobs(cfg, found), more_devices(cfg, found), room)
    advice = "nothing that a plan tries would make it fit; take a smaller model or fewer tokens"
    if mended is not None:
        advice = f"it would with {' '.join(mended[0])}, which takes {peak(mended[1]) / 1e9:.1f} GB"
    yield from _line("fits", f"no: {of}; {advice}")


def _table(memory: "Mapping[str, Parts]") -> Iterator[str]:
    """Yield the table of memory: a line for each part, a column for each phase."""
    parts = list(dict.fromkeys(part for phase in memory.values() for part in phase))
    yield f"{'GB a device':<{LABEL}}" + "".join(f"{phase:>14}" for phase in memory)
    for part in parts:
        cells = (phase.get(part) for phase in memory.values())
        yield f"{part:<{LABEL}}" + "".join(f"{'' if size is None else _gb(size):>14}" for size in cells)
    yield f"{'peak':<{LABEL}}" + "".join(f"{_gb(sum(phase.values())):>14}" for phase in memory.values())


def _work(cfg: DictConfig, found: Planned) -> Iterator[str]:
    """Yield the lines of tokens, operations and time."""
    from bae.rollout.footprint import decoding
    from bae.training.cards import sampling_seconds, update_seconds
    from bae.training.flops import decoding_flops, update_flops
    from bae.training.footprint import longest_group

    shape, setting, card = found.shape, found.setting, found.card
    group = longest_group(setting)
    sampling, update = (
        setting.prompts * count(shape.size, group, setting.group_size) for count in (decoding_flops, update_flops)
    )
    completions = setting.completions * setting.devices
    yield from _line("a step", f"{completions} completions of {setting.new_tokens} tokens at most, prompts of "
                               f"{setting.prompt_tokens} ({found.prompts})")  # fmt: skip
    tokens = completions * setting.new_tokens + setting.prompts * setting.devices * setting.prompt_tokens
    operations = [_short(f * setting.devices) for f in (sampling, update)]
    yield from _line("", f"{_short(tokens)} tokens; {operations[0]}FLOP of sampling, {operations[1]}FLOP of the update")
    update_s = update_seconds(card, update, shape.product, setting.checkpointing)
    if not setting.max_rows:
        yield from _line("time of a step", f"update {_time(update_s)}; sampling is vLLM's, and not estimated")
        return
    sampling_s = sampling_seconds(card, sampling, shape.number, *decoding(shape, setting))
    yield from _line("time of a step", f"sampling {_time(sampling_s)}, update {_time(update_s)}, if every completion "
                     f"is so long and products reach {card.sampling_share:.0%} and {card.update_share:.0%} of "
                     f"{_short(card.rate(shape.product))}FLOP/s")  # fmt: skip
    hours = _time(cfg.steps * (sampling_s + update_s))
    rest = "held-out problems and evaluation are not counted"
    yield from _line("time of the run", f"{cfg.steps} steps, {hours} at most; {rest}")


def _line(label: str, text: str) -> list[str]:
    """Return a text beside its label, in as many lines as it takes."""
    wrapped = textwrap.wrap(text, COLUMNS - LABEL, break_on_hyphens=False)
    return [f"{label if not i else '':<{LABEL}}{line}" for i, line in enumerate(wrapped)]


def _gb(size: float) -> str:
    """Return bytes in GB, with as many digits as matter."""
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"


def _short(number: float) -> str:
    """Return a number with three digits and the prefix of its thousands."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def _time(seconds: float) -> str:
    """Return a time in the unit that fits it."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
