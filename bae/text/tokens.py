"""Find the bytes of each sampled token, and the block that each token lies in.

Text is never tokenised again. Offsets come from the sampled ids, so they are exact for anything that the policy
writes, even half a character or half a tag.
"""

import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from bae.text.blocks import CONFIDENCE, Block, Section, Spans, find_spans
from bae.text.number import Number, parse_confidence

NUMBER_BYTES = 16
"""The bytes at the start of a stated number whose tokens are told apart; all bytes after them are one piece."""


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of every token id. Joined over the ids of a text, they are the decoded text.

    Three kinds of decoder are read: byte-level BPE (GPT-2, Qwen2, SmolLM2), SentencePiece with byte fallback
    (Llama 2), and plain pieces.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Returns:
        A list of length V, the bytes of id v at index v.

    Raises:
        TypeError: if the tokenizer is a slow one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"{type(tokenizer).__name__} is a slow tokenizer; blocks need a fast one (use_fast=True)")
    decoder = json.dumps(json.loads(backend.to_str())["decoder"] or {})
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    convert: Callable[[str], bytes]
    if "ByteLevel" in decoder:
        convert = _byte_level_bytes
    elif "ByteFallback" in decoder:
        convert = _sentencepiece_bytes
    else:
        convert = str.encode
    return [added[i].encode() if i in added else convert(piece or "") for i, piece in enumerate(pieces)]


def _byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a piece of byte-level BPE."""
    byte_of = _byte_level_alphabet()
    return bytes(byte_of[char] for char in piece)


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """Map each character by which byte-level BPE writes a byte to that byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = itertools.count(256)
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}


def _sentencepiece_bytes(piece: str) -> bytes:
    """Return the bytes of a piece of SentencePiece with byte fallback."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


class Located(NamedTuple):
    """Hold the text of one completion, and where its blocks and numbers lie.

    Args:
        text: the text of the completion.
        spans: its blocks; offsets in them count bytes.
        block_of: the block of each of the len(ids) + 1 positions; the last position is the end of sequence.
        numbers: one for each `confidence` section that was begun.
    """

    text: str
    spans: Spans
    block_of: list[int]
    numbers: tuple[Number, ...]


@lru_cache(maxsize=64)
def _in_bytes(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Return the same blocks with tags for a text that has one character for each byte."""

    def spread(text: str) -> str:
        return text.encode().decode("latin-1")

    return tuple(
        replace(b, tags=tuple(replace(t, opening=spread(t.opening), closing=spread(t.closing)) for t in b.tags))
        for b in blocks
    )


def locate_blocks(
    ids: Sequence[int], vocabulary: Sequence[bytes], blocks: Sequence[Block], ended: bool = True
) -> Located:
    """Find the blocks of one completion. A token belongs to the block in which its first byte lies.

    Args:
        ids: the sampled ids, up to and without the end-of-sequence token.
        vocabulary: `token_bytes` of the tokenizer that sampled.
        blocks: the K blocks of the format, in order.
        ended: whether the end of sequence was sampled too. If the token limit came first, no number ends there.
    """
    pieces = [vocabulary[i] for i in ids]
    raw = b"".join(pieces)
    # Latin-1 makes one character of every byte, so offsets in the text are offsets in the bytes.
    spans = find_spans(raw.decode("latin-1"), _in_bytes(tuple(blocks)))
    offsets = list(itertools.accumulate(map(len, pieces), initial=0))
    block_of = [bisect_right(spans.starts, offset) - 1 for offset in offsets]
    begun = [*spans.sections, *([spans.unfinished] if spans.unfinished else [])]
    drawn = offsets[: len(ids) + ended]
    numbers = tuple(_number(s, s is not spans.unfinished, drawn) for s in begun if s.tag == CONFIDENCE)
    sections = tuple(Section(s.tag, _spread_back(s.content), s.start) for s in spans.sections)
    fault = spans.fault and replace(spans.fault, due=_spread_back(spans.fault.due), came=_spread_back(spans.fault.came))
    return Located(_utf8(raw), Spans(spans.starts, spans.well_formed, sections, fault=fault), block_of, numbers)


def _number(section: Section, closed: bool, offsets: Sequence[int]) -> Number:
    """Locate the tokens of a number, as far as they are told apart.

    Args:
        section: the section of the number, in Latin-1 text.
        closed: whether the section has its closing tag.
        offsets: for each token of the completion, the offset of its first byte.
    """
    content = section.content.encode("latin-1")
    first = bisect_left(offsets, section.start)
    last = bisect_right(offsets, section.start + min(len(content), NUMBER_BYTES))
    value = parse_confidence(_utf8(content)) if closed else None
    return Number(content, value, first, tuple(offset - section.start for offset in offsets[first:last]))


def _spread_back(text: str) -> str:
    """Decode a text that has one character for each byte."""
    return _utf8(text.encode("latin-1"))


def _utf8(raw: bytes) -> str:
    """Decode bytes, with a replacement character for whatever is not UTF-8."""
    return raw.decode("utf-8", errors="replace")
