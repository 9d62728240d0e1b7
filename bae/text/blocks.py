"""The blocks of a completion: what they are (Block) and where they lie in a text (find_spans). Pure text.

A block is a run of consecutive tagged sections. The blocks, in order, cut a completion into contiguous pieces
(paper, section 3): each ends with the closing tag of its last section, the last one reaches to the end. So
whatever follows `</answer>`, be it `<analysis>` or an early stop, is a decision of the next block. A block without
sections is the rest: all up to the opening tag with which the next block begins, or up to the end.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

Malformed = Literal["penalise", "mask", "zero"]

ANSWER = "answer"
"""The name of the sections that a verifier checks."""

CONFIDENCE = "confidence"
"""The name of the sections that state a number."""


@dataclass(frozen=True)
class SectionTags:
    """The pair of texts around a section. name: how it is referred to; a format may have it more than once.

    A closing tag of one's own form counts only where it is due, so that it may be a line's end or a bracket; one like
    </answer> counts everywhere, and spoils the format where it is not due.
    """

    name: str
    opening: str
    closing: str


@dataclass(frozen=True)
class Block:
    """One block of the completion's format.

    name: how objectives refer to it.
    tags: those of the sections that it must have, in order; none: the rest.
    weight: w_k of the loss.
    malformed: what its objectives give a completion that spoils it, in the place of what holds for all blocks.
    """

    name: str
    tags: tuple[SectionTags, ...]
    weight: float = 1.0
    malformed: Malformed | None = None


@dataclass(frozen=True)
class Section:
    """The text between one pair of tags. tag: their name. start: its offset in the completion."""

    tag: str
    content: str
    start: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Spans:
    """Where the K blocks of one completion lie.

    starts: offsets, the first 0; block k is text[starts[k]:starts[k + 1]], the last found one reaches to the end. A
        block that was never reached has no entry, so len(starts) <= K.
    well_formed: K flags; a block is well formed if each of its sections was opened and closed, in order.
    sections: the sections that were read before the format broke, if it did.
    unfinished: the section in which it broke, up to the next tag or the end; None if it did not break in one.
    """

    starts: tuple[int, ...]
    well_formed: tuple[bool, ...]
    sections: tuple[Section, ...]
    unfinished: Section | None = None


def make_blocks(schema: Mapping[str, Iterable | Mapping]) -> tuple[Block, ...]:
    """Blocks from plain data: {name: [section, …]} or {name: {sections: [section, …], weight: w, malformed: policy}}.

    A section is a word, `answer` for <answer> and </answer>, or {name, opening, closing} for tags of any other form.
    Raises ValueError for a schema that cannot be read, or under which a block could never end.
    """
    blocks = []
    for name, value in schema.items():
        where = f"objectives.blocks.{name}"
        options: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"sections": value}
        unknown = options.keys() - {"sections", "weight", "malformed"}
        if unknown:
            raise ValueError(f"{where}: unknown option {sorted(unknown)[0]!r}; known: sections, weight, malformed")
        malformed = options.get("malformed")
        if malformed is not None:
            check_malformed(f"{where}.malformed", malformed)
        sections = tuple(_tags(where, section) for section in options["sections"] or ())
        blocks.append(Block(name, sections, float(options.get("weight", 1.0)), malformed))
    closings: dict[str, str] = {}
    for block in blocks:
        for tags in block.tags:
            if closings.setdefault(tags.opening, tags.closing) != tags.closing:
                raise ValueError(
                    f"objectives.blocks.{block.name}: sections that open with {tags.opening!r} close with "
                    f"{tags.closing!r} and with {closings[tags.opening]!r}; choose one"
                )
    if not blocks:
        raise ValueError("objectives.blocks is empty; name at least one block, e.g. completion: [reasoning, answer]")
    for block, following in pairwise(blocks):
        if not block.tags and not following.tags:
            raise ValueError(
                f"objectives.blocks.{block.name} has no sections, so it ends where {following.name} begins; but "
                f"{following.name} has none either"
            )
    return tuple(blocks)


def check_malformed(where: str, policy: str) -> None:
    """Raises ValueError for what is no policy for malformed output."""
    if policy not in get_args(Malformed):
        raise ValueError(f"{where}={policy}: choose {', '.join(get_args(Malformed))}")


def _tags(where: str, section: str | Mapping) -> SectionTags:
    if isinstance(section, Mapping):
        if section.keys() != {"name", "opening", "closing"} or not all(section.values()):
            raise ValueError(
                f"{where}: a section is a word, or has a name, an opening and a closing, none of them empty"
            )
        return SectionTags(*(str(section[key]) for key in ("name", "opening", "closing")))
    if not re.fullmatch(r"\w+", str(section)):
        raise ValueError(
            f"{where}: tag {section!r} is not a word; write it without < and >, or as {{name, opening, closing}}"
        )
    return SectionTags(str(section), f"<{section}>", f"</{section}>")


def tags_named(blocks: Iterable[Block], name: str) -> list[SectionTags]:
    """The sections of that name, in the order in which a completion has them."""
    return [tags for block in blocks for tags in block.tags if tags.name == name]


def _find_tags(text: str, blocks: tuple[Block, ...]) -> list[re.Match]:
    """Every tag that counts where it stands, in order."""
    closing = {tags.opening: tags.closing for block in blocks for tags in block.tags}
    found: list[re.Match] = []
    place, due = 0, ""
    while match := _tag_pattern(blocks, due).search(text, place):
        found.append(match)
        place, due = match.end(), "" if due else closing.get(match.group(), "")
    return found


@lru_cache(maxsize=256)
def _tag_pattern(blocks: tuple[Block, ...], due: str) -> re.Pattern:
    """The tags that count inside a section that `due` closes; outside of all, where it is empty."""
    sections = [tags for block in blocks for tags in block.tags]
    texts = {tags.opening for tags in sections} | {due} - {""}
    texts |= {tags.closing for tags in sections if tags.closing == f"</{tags.name}>"}
    longest_first = sorted(texts, key=lambda text: (-len(text), text))  # one tag may begin as another does
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def find_spans(text: str, blocks: Sequence[Block]) -> Spans:
    """Find the blocks by their tags, in one pass, whatever the text.

    The tags of the format must come exactly as it has them, in order, unnested; any text may stand around the sections.
    At the first tag that is missing, or that is not the one due, the block in which it was met is malformed and takes
    the rest of the text; later blocks are then absent.
    """
    found = _find_tags(text, tuple(blocks))
    starts, well_formed, sections, used = [0], [], [], 0
    unfinished = None
    for k, block in enumerate(blocks):
        last = k == len(blocks) - 1
        complete = True
        for tags in block.tags:
            opening, closing = (found[i] if i < len(found) else None for i in (used, used + 1))
            if opening is None or opening.group() != tags.opening:
                complete = False
                break
            section = Section(tags.name, text[opening.end() : closing.start() if closing else None], opening.end())
            if closing is None or closing.group() != tags.closing:
                complete, unfinished = False, section
                break
            sections.append(section)
            used += 2
        if last:
            complete = complete and (used == len(found) or not block.tags)
        elif complete:
            end = found[used - 1].end() if block.tags else _begins(found, used, blocks[k + 1])
            if end is None:
                complete = False
            else:
                starts.append(end)
        well_formed.append(complete)
        if not complete:
            break
    flags = tuple(well_formed) + (False,) * (len(blocks) - len(well_formed))
    return Spans(tuple(starts), flags, tuple(sections), unfinished)


def _begins(found: Sequence[re.Match], used: int, block: Block) -> int | None:
    """Where the next tag stands, if it is the one with which `block` begins."""
    due = used < len(found) and found[used].group() == block.tags[0].opening
    return found[used].start() if due else None


def read_section(text: str, tag: str) -> str | None:
    """What stands between `<tag>` and `</tag>`, if each comes exactly once and in this order; for completions whose
    format is not ours."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    return text.partition(opening)[2].partition(closing)[0] if text.index(opening) < text.index(closing) else None
