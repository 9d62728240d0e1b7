"""The blocks of a completion: what they are (Block) and where they lie in a text (find_spans). Pure text.

A block is a run of consecutive tagged sections. The blocks, in order, cut a completion into contiguous pieces
(paper, section 3): each ends with the closing tag of its last section, the last one reaches to the end. So
whatever follows `</answer>`, be it `<analysis>` or an early stop, is a decision of the next block.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Block:
    """One block of the completion's format.

    name: how objectives refer to it.
    sections: tag names in the order in which they must appear; none means "whatever comes" (last block only).
    weight: w_k of the loss.
    """

    name: str
    sections: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Section:
    """The text between one pair of tags. start: its offset in the completion."""

    tag: str
    content: str
    start: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Spans:
    """Where the K blocks of one completion lie.

    starts: K offsets, the first 0; block k is text[starts[k]:starts[k + 1]], the last found one reaches to the
        end. A block that was never reached has no entry, so len(starts) <= K.
    well_formed: K flags; a block is well formed if each of its sections was opened and closed once, in order.
    sections: the sections that were read before the format broke, if it did.
    unfinished: the section in which it broke, up to the next tag or the end; None if it did not break in one.
    """

    starts: tuple[int, ...]
    well_formed: tuple[bool, ...]
    sections: tuple[Section, ...]
    unfinished: Section | None = None


def make_blocks(schema: Mapping[str, Iterable[str] | Mapping]) -> tuple[Block, ...]:
    """Blocks from plain data: {name: [tag, …]} or {name: {sections: [tag, …], weight: w}}.

    Raises ValueError for a schema under which blocks could overlap or never end.
    """
    blocks = []
    for name, value in schema.items():
        options: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"sections": value}
        unknown = options.keys() - {"sections", "weight"}
        if unknown:
            raise ValueError(
                f"objectives.blocks.{name}: unknown option {sorted(unknown)[0]!r}; known: sections, weight"
            )
        blocks.append(Block(name, tuple(options["sections"]), float(options.get("weight", 1.0))))
    _check(blocks)
    return tuple(blocks)


def _check(blocks: Sequence[Block]) -> None:
    if not blocks:
        raise ValueError("objectives.blocks is empty; name at least one block, e.g. completion: [reasoning, answer]")
    owner: dict[str, str] = {}
    for block in blocks:
        if not block.sections and block is not blocks[-1]:
            raise ValueError(f"objectives.blocks.{block.name} has no tags and so never ends; only the last block may")
        for tag in block.sections:
            if not re.fullmatch(r"\w+", tag):
                raise ValueError(f"objectives.blocks.{block.name}: tag {tag!r} is not a word; write it without < and >")
            if owner.setdefault(tag, block.name) != block.name:
                raise ValueError(
                    f"objectives.blocks: tag {tag!r} stands in {owner[tag]} and in {block.name}, so the two overlap; "
                    "name it in one of them"
                )


def find_spans(text: str, blocks: Sequence[Block]) -> Spans:
    """Find the blocks by their tags, in one pass, whatever the text.

    The tags of the format must come once each, in order, unnested; any text may stand around the sections. At the
    first tag that is missing, repeated, nested or out of order, the block in which it was met is malformed and
    takes the rest of the text; later blocks are then absent.
    """
    tags = {tag for block in blocks for tag in block.sections}
    found = list(re.finditer(rf"<(/?)({'|'.join(map(re.escape, tags))})>", text)) if tags else []
    starts, well_formed, sections, used = [0], [], [], 0
    unfinished = None
    for block in blocks:
        pairs = [found[i : i + 2] for i in range(used, used + 2 * len(block.sections), 2)]
        good = 0
        for tag, pair in zip(block.sections, pairs, strict=True):
            if not pair or pair[0].groups() != ("", tag):
                break
            start = pair[0].end()
            section = Section(tag, text[start : pair[1].start() if pair[1:] else None], start)
            if not pair[1:] or pair[1].groups() != ("/", tag):
                unfinished = section
                break
            sections.append(section)
            good += 1
        used += 2 * good
        last = block is blocks[-1]
        complete = good == len(block.sections) and not (last and block.sections and used < len(found))
        well_formed.append(complete)
        if last or not complete:
            break
        starts.append(found[used - 1].end())
    flags = tuple(well_formed) + (False,) * (len(blocks) - len(well_formed))
    return Spans(tuple(starts), flags, tuple(sections), unfinished)


def read_section(text: str, tag: str) -> str | None:
    """What stands between `<tag>` and `</tag>`, if each comes exactly once and in this order; for completions whose
    format is not ours."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    return text.partition(opening)[2].partition(closing)[0] if text.index(opening) < text.index(closing) else None


def parse_confidence(text: str) -> float | None:
    """The number in [0, 1] that `text` is, else None ("1.7", "NaN", "85%", "1e-1" and long digit strings are not)."""
    stripped = text.strip()
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{0,12})?|\.[0-9]{1,12}", stripped):
        return None
    value = float(stripped)
    return value if value <= 1.0 else None
