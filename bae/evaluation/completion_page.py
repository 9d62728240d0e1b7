"""Write completions as a page for people: one HTML file without scripts, that asks for nothing from elsewhere.

Jinja escapes all that is put into the template, and hidden characters are made visible before. The page forbids itself
scripts and requests, too (a content security policy). So what a policy writes cannot act in the reader's browser.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from bae.batch import Problem
from bae.evaluation.completion_view import KINDS, CompletionView
from bae.text.visible import shortened, visible

TEMPLATE = "completion_page.html"


@dataclass(frozen=True)
class GroupView:
    """Hold the completions of one problem that are shown.

    Attributes:
        problem: that was answered.
        completions: those that are shown.
        size: completions of the group, shown or not.
        right: how many of the group are right.
    """

    problem: Problem
    completions: Sequence[CompletionView]
    size: int
    right: int


def page(title: str, groups: Sequence[GroupView], characters: int, unit: str = "tokens") -> str:
    """Return the page, as HTML.

    Args:
        title: of the page.
        groups: at least one, with at least one completion each.
        characters: of a block, a question or a reference that are shown, about; the middle of a longer one is left out.
        unit: what the lengths of completions count.
    """
    shown = [completion for group in groups for completion in group.completions]
    blocks = [block.name for block in shown[0].blocks]
    advantages = [
        b.advantage for c in shown for b in c.blocks if b.advantage is not None and math.isfinite(b.advantage)
    ]
    return _template().render(
        title=title,
        unit=unit,
        groups=groups,
        blocks=blocks,
        kinds=KINDS,
        counts=Counter(completion.kind for completion in shown),
        has_advantages=bool(advantages),
        largest=max(map(abs, advantages), default=0.0),
        text=lambda text: shortened(visible(text), characters),
    )


def number(value: float | None) -> str:
    """Return a number for people, with three places; a dash for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Return a number as `number` does, with a plus if it is above 0."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def shade(advantage: float | None, largest: float) -> float:
    """Return how strongly an advantage is shaded, from 0 to 1; largest: the largest of the page."""
    if advantage is None or not math.isfinite(advantage) or largest == 0:
        return 0.0
    return round(abs(advantage) / largest, 2)


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"number": number, "signed": signed, "shade": shade}
    return made.get_template(TEMPLATE)
