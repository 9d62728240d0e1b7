"""Define the blocks of a completion (Block), and find where they lie in a text (find_spans). Pure text.

A block is a run of consecutive tagged sections. The blocks, in order, cut a completion into contiguous pieces
(paper, section 3). Each block ends with the closing tag of its last section, and the last block reaches to the end.
So whatever follows `</answer>`, for example `<analysis>` or an early stop, is a decision of the next block. A block
without sections is the rest: everything up to the opening tag with which the next block begins, or up to the end.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

Malformed = Literal["penalise", "mask", "zero"]
"""The policies for malformed output."""

ANSWER = "answer"
"""The name of the sections that a verifier checks."""

CONFIDENCE = "confidence"
"""The name of the sections that state a number."""


@dataclass(frozen=True)
class SectionTags:
    """Hold the pair of tags around a section.

    A closing tag of the form </name> counts everywhere, and makes the format malformed where it is not due. A closing
    tag of any other form counts only where it is due, so it may be the end of a line or a bracket.

    Args:
        name: how the section is referred to. A format may have the same name more than once.
        opening, closing: the two tags, as the policy writes them.
    """

    name: str
    opening: str
    closing: str


@dataclass(frozen=True)
class Block:
    """Describe one block of the format of completions.

    Args:
        name: how objectives refer to the block.
        tags: the tags of the sections that the block must have, in order. A block without any is the rest.
        weight: w_k in the loss.
        malformed: the policy for completions in which this block is malformed. None takes the policy of all blocks.
    """

    name: str
    tags: tuple[SectionTags, ...]
    weight: float = 1.0
    malformed: Malformed | None = None


@dataclass(frozen=True)
class Section:
    """Hold the text between one pair of tags.

    Args:
        tag: the name of the tags.
        content: the text.
        start: the offset of the content in the completion.
    """

    tag: str
    content: str
    start: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Fault:
    """Say where and why a text ceases to be in form.

    Args:
        start: the offset from which it is not.
        due: the tag that should have come next; empty if the format was complete.
        came: the tag that came instead; empty for the end of the text.
    """

    start: int
    due: str
    came: str

    @property
    def reason(self) -> str:
        """Return one clause for people, such as "<answer> was due, but the text ended"."""
        if not self.due:
            return f"{self.came} came after the last section"
        return f"{self.due} was due, but " + (f"{self.came} came" if self.came else "the text ended")


@dataclass(frozen=True)
class Spans:
    """Hold where the K blocks of one completion lie.

    Args:
        starts: offsets, the first one 0. Block k is text[starts[k]:starts[k + 1]], and the last block found reaches
            to the end. A block that was never reached has no entry, so len(starts) <= K.
        well_formed: K flags. A block is well formed if each of its sections was opened and closed, in order.
        sections: all sections, or those before the point at which the format broke.
        unfinished: the section in which the format broke, up to the next tag or the end. None if the format did not
            break inside a section.
        fault: where and why the format broke; None if every block is well formed.
    """

    starts: tuple[int, ...]
    well_formed: tuple[bool, ...]
    sections: tuple[Section, ...]
    unfinished: Section | None = None
    fault: Fault | None = None


def make_blocks(schema: Mapping[str, Iterable | Mapping]) -> tuple[Block, ...]:
    """Make blocks from plain data.

    Args:
        schema: {name: [section, …]} or {name: {sections: [section, …], weight: w, malformed: policy}}. A section is a
            word (`answer` stands for <answer> and </answer>), or {name, opening, closing} for tags of any other form.

    Raises:
        ValueError: if the schema cannot be read, or a block could never end under it.
    """
    blocks = tuple(_make_block(name, value) for name, value in schema.items())
    _check_closings(blocks)
    if not blocks:
        raise ValueError("objectives.blocks is empty; name at least one block, e.g. completion: [reasoning, answer]")
    for block, following in pairwise(blocks):
        if not block.tags and not following.tags:
            raise ValueError(
                f"objectives.blocks.{block.name} has no sections, so it ends where {following.name} begins; but "
                f"{following.name} has none either"
            )
    return blocks


def _make_block(name: str, value: Iterable | Mapping) -> Block:
    """Make one block; value: its sections, or a mapping of its options."""
    where = f"objectives.blocks.{name}"
    options: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"sections": value}
    unknown = options.keys() - {"sections", "weight", "malformed"}
    if unknown:
        raise ValueError(f"{where}: unknown option {sorted(unknown)[0]!r}; known: sections, weight, malformed")
    malformed = options.get("malformed")
    if malformed is not None:
        check_malformed(f"{where}.malformed", malformed)
    tags = tuple(_make_tags(where, section) for section in options["sections"] or ())
    weight = options.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"{where}.weight={weight}: must be a number, 0 or more, and finite")
    return Block(name, tags, float(weight), malformed)


def _check_closings(blocks: Iterable[Block]) -> None:
    """Raise ValueError if an opening tag has two different closing tags."""
    closings: dict[str, str] = {}
    for block in blocks:
        for tags in block.tags:
            if closings.setdefault(tags.opening, tags.closing) != tags.closing:
                raise ValueError(
                    f"objectives.blocks.{block.name}: sections that open with {tags.opening!r} close with "
                    f"{tags.closing!r} and with {closings[tags.opening]!r}; choose one"
                )


def check_malformed(where: str, policy: str) -> None:
    """Raise ValueError if `policy` is no policy for malformed output; `where` is the key that the message names."""
    if policy not in get_args(Malformed):
        raise ValueError(f"{where}={policy}: choose {', '.join(get_args(Malformed))}")


def _make_tags(where: str, section: str | Mapping) -> SectionTags:
    """Make the tags of one section from a word, or from a mapping of name, opening and closing."""
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
    """Return the tags of the sections of that name, in the order in which a completion has them."""
    return [tags for block in blocks for tags in block.tags if tags.name == name]


def _find_tags(text: str, blocks: tuple[Block, ...]) -> list[re.Match]:
    """Return every tag that counts at its place in the text, in order."""
    closing = {tags.opening: tags.closing for block in blocks for tags in block.tags}
    found: list[re.Match] = []
    place, due = 0, ""
    while match := _tag_pattern(blocks, due).search(text, place):
        found.append(match)
        place, due = match.end(), "" if due else closing.get(match.group(), "")
    return found


@lru_cache(maxsize=256)
def _tag_pattern(blocks: tuple[Block, ...], due: str) -> re.Pattern:
    """Match the tags that count inside a section that `due` closes, or outside all sections if `due` is empty."""
    sections = [tags for block in blocks for tags in block.tags]
    texts = {tags.opening for tags in sections} | {due} - {""}
    texts |= {tags.closing for tags in sections if tags.closing == f"</{tags.name}>"}
    longest_first = sorted(texts, key=lambda text: (-len(text), text))  # one tag may begin as another does
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def find_spans(text: str, blocks: Sequence[Block]) -> Spans:
    """Find the blocks of a completion by their tags, in one pass.

    The tags must appear exactly as the format has them, in order and not nested. Any text may stand around the
    sections. If a tag is missing or comes out of order, the block that needs it is malformed, and the rest of the text
    belongs to it. The later blocks are then absent.

    Args:
        text: any text.
        blocks: the K blocks of the format, in order.

    Returns:
        The spans of the blocks, as offsets in characters of `text`.
    """
    found = _find_tags(text, tuple(blocks))
    starts, well_formed, sections, used = [0], [], [], 0
    unfinished = fault = None
    for k, block in enumerate(blocks):
        last = k == len(blocks) - 1
        complete = True
        for tags in block.tags:
            opening, closing = (found[i] if i < len(found) else None for i in (used, used + 1))
            if opening is None or opening.group() != tags.opening:
                complete, fault = False, _fault(found, used, tags.opening, found[used - 1].end() if used else 0)
                break
            section = Section(tags.name, text[opening.end() : closing.start() if closing else None], opening.end())
            if closing is None or closing.group() != tags.closing:
                complete, unfinished = False, section
                fault = _fault(found, used + 1, tags.closing, opening.start())
                break
            sections.append(section)
            used += 2
        if last and complete and block.tags and used < len(found):
            complete, fault = False, _fault(found, used, "", found[used].start())
        elif complete and not last:
            end = found[used - 1].end() if block.tags else _begins(found, used, blocks[k + 1])
            if end is None:
                at = found[used].start() if used < len(found) else len(text)
                complete, fault = False, _fault(found, used, blocks[k + 1].tags[0].opening, at)
            else:
                starts.append(end)
        well_formed.append(complete)
        if not complete:
            break
    flags = tuple(well_formed) + (False,) * (len(blocks) - len(well_formed))
    return Spans(tuple(starts), flags, tuple(sections), unfinished, fault)


def _fault(found: Sequence[re.Match], came: int, due: str, start: int) -> Fault:
    """Make the fault of a format in which tag number `came` is not the one due, or is not there."""
    return Fault(start, due, found[came].group() if came < len(found) else "")


def _begins(found: Sequence[re.Match], used: int, block: Block) -> int | None:
    """Return the offset of the next tag if `block` begins with it, or None."""
    due = used < len(found) and found[used].group() == block.tags[0].opening
    return found[used].start() if due else None


def read_section(text: str, tag: str) -> str | None:
    """Return the text between `<tag>` and `</tag>`, or None unless each appears exactly once, in this order.

    This is for completions that others generated, in a format of which nothing else is known.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    return text.partition(opening)[2].partition(closing)[0] if text.index(opening) < text.index(closing) else None
