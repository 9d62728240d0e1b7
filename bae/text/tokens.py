"""From sampled token ids to blocks: the bytes that each token stands for, and the block that each token is in.

Text is never tokenised again: offsets come from the sampled ids, so they are exact whatever the policy wrote,
half a character or half a tag included.
"""

import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from bae.text.blocks import CONFIDENCE, Block, Section, Spans, find_spans
from bae.text.number import Number, parse_confidence

NUMBER_BYTES = 16
"""Of a number's text, as many bytes have their tokens told apart; whatever is written, the rest is one piece."""


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every id of a fast tokenizer, (V,) long; joined over ids, they are the decoded text.

    Reads three kinds of decoder: byte-level BPE (GPT-2, Qwen2, SmolLM2), SentencePiece with byte fallback
    (Llama 2), and plain pieces. Raises TypeError for a slow tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"{type(tokenizer).__name__} is a slow tokenizer; blocks need a fast one (use_fast=True)")
    decoder = json.dumps(json.loads(backend.to_str())["decoder"] or {})
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    if "ByteLevel" in decoder:
        byte_of = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
        convert = lambda piece: bytes(byte_of[char] for char in piece)  # noqa: E731
    elif "ByteFallback" in decoder:
        convert = _sentencepiece_bytes
    else:
        convert = str.encode
    return [added[i].encode() if i in added else convert(piece or "") for i, piece in enumerate(pieces)]


def _byte_level_alphabet() -> list[str]:
    """The character by which byte-level BPE writes each of the 256 bytes (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def _sentencepiece_bytes(piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


class Located(NamedTuple):
    """text: of one completion. spans: its blocks; offsets in them count bytes. block_of: of each of the len(ids) + 1
    positions, the last one being the end of sequence. numbers: of each `confidence` section that was begun."""

    text: str
    spans: Spans
    block_of: list[int]
    numbers: tuple[Number, ...]


@lru_cache(maxsize=64)
def _in_bytes(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The same blocks for text that has a character for every byte."""
    latin = lambda text: text.encode().decode("latin-1")  # noqa: E731
    return tuple(
        replace(b, tags=tuple(replace(t, opening=latin(t.opening), closing=latin(t.closing)) for t in b.tags))
        for b in blocks
    )


def locate_blocks(
    ids: Sequence[int], vocabulary: Sequence[bytes], blocks: Sequence[Block], ended: bool = True
) -> Located:
    """The blocks of one completion. A token belongs to the block in which its first byte lies.

    ids: the sampled ids up to, and without, the end-of-sequence token.
    vocabulary: `token_bytes` of the tokenizer that sampled.
    ended: whether the end of sequence was sampled, too; where the token limit came first, no number ends there.
    """
    pieces = [vocabulary[i] for i in ids]
    raw = b"".join(pieces)
    # Latin-1 makes one character of every byte, so that offsets in the text are offsets in the bytes.
    spans = find_spans(raw.decode("latin-1"), _in_bytes(tuple(blocks)))
    offsets = list(itertools.accumulate(map(len, pieces), initial=0))
    block_of = [bisect_right(spans.starts, offset) - 1 for offset in offsets]
    begun = [*spans.sections, *([spans.unfinished] if spans.unfinished else [])]
    drawn = offsets[: len(ids) + ended]
    numbers = tuple(_number(s, s is not spans.unfinished, drawn) for s in begun if s.tag == CONFIDENCE)
    sections = tuple(Section(s.tag, _utf8(s.content.encode("latin-1")), s.start) for s in spans.sections)
    return Located(_utf8(raw), Spans(spans.starts, spans.well_formed, sections), block_of, numbers)


def _number(section: Section, closed: bool, offsets: Sequence[int]) -> Number:
    """The tokens of a number, as far as they are told apart. section: of Latin-1 text. offsets: of all tokens."""
    content = section.content.encode("latin-1")
    first = bisect_left(offsets, section.start)
    last = bisect_right(offsets, section.start + min(len(content), NUMBER_BYTES))
    value = parse_confidence(_utf8(content)) if closed else None
    return Number(content, value, first, tuple(offset - section.start for offset in offsets[first:last]))


def _utf8(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
