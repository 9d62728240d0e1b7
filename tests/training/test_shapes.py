"""Sizes of models without weights: as published, and as torch keeps them in a real pass."""

from contextlib import nullcontext

import pytest
import torch

from bae.batch import SampledTokens
from bae.errors import UserError
from bae.training import attention
from bae.training.flops import model_size
from bae.training.packing import Packing
from bae.training.shapes import gguf_config, measure, pretrained_config, without_weights


@pytest.mark.parametrize(
    ("name", "parameters", "without_embeddings"),
    [  # as the models' pages say: 7.61 B and 6.53 B, 3.09 B and 2.77 B, .49 B and .36 B
        ("Qwen/Qwen2.5-7B", 7_615_616_512, 6_525_621_760),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 6_525_621_760),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, 2_774_773_760),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 357_898_112),
    ],
)
def test_published_models_are_known_without_a_hub(name, parameters, without_embeddings, monkeypatch):
    monkeypatch.setattr("bae.training.shapes.AutoConfig.from_pretrained", None)
    model = without_weights(pretrained_config(name), torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters
    heads = {id(x.weight): x.weight.numel() for x in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert parameters - sum(heads.values()) == without_embeddings


def test_a_known_file_needs_no_package():
    assert gguf_config("no_such_package", "SmolLM2-135M-Instruct.Q4_1.gguf").num_hidden_layers == 30
    with pytest.raises(UserError, match=r"no other\.gguf in the package no_such_package"):
        gguf_config("no_such_package", "other.gguf")


def test_a_model_that_is_nowhere(monkeypatch):
    def away(*arguments, **options):
        raise OSError("offline")

    monkeypatch.setattr("bae.training.shapes.AutoConfig.from_pretrained", away)
    with pytest.raises(UserError, match=r"model\.path=me/mine: its shape is not known here.* name a folder"):
        pretrained_config("me/mine")


def test_the_tiny_model_by_hand(tiny):
    shape = measure(tiny.model.config, torch.float32)
    assert shape.size == model_size(tiny.model)
    assert shape.parameters == shape.trained == sum(p.numel() for p in tiny.model.parameters())
    assert (shape.layers, shape.width, shape.keys, shape.number, shape.tied) == (2, 32, 32, 4, True)
    # Two norms keep their input, its quotient and their output; attention query, key, value and its output; the rest
    # the gate, its activation, the other factor and the product. Two norms keep one more number each.
    assert shape.kept == 4 * (6 * 32 + 4 * 32 + 4 * 85 + 2)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_real_pass_keeps_as_much(tiny, autocast):
    """One completion of one prompt, whose tokens are all fed but the last; index tensors are left out."""
    attention.share(tiny.model)
    ids = torch.randint(3, 25, (1, 300), generator=torch.Generator().manual_seed(0))
    true = torch.ones(1, 300, dtype=torch.bool)
    samples = SampledTokens(ids, true, ids, true, true[:, 0])
    weights = {p.untyped_storage().data_ptr() for p in (*tiny.model.parameters(), *tiny.model.buffers())}
    kept = {}

    def note(x):
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    mixed = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), mixed:
        Packing(samples, torch.arange(1), torch.device("cpu")).states(tiny.model)
    found = sum(x.untyped_storage().nbytes() for x in kept.values())
    shape = measure(tiny.model.config, torch.float32, autocast)
    casts = shape.casts - (0 if autocast is None else 2 * shape.size.head)  # the head is not in this pass
    wanted = (shape.layers * shape.kept + shape.kept_beside) * 599 + casts
    assert found == pytest.approx(wanted, rel=0.05)


def test_half_precision_keeps_less():
    config = pretrained_config("Qwen/Qwen2.5-0.5B")
    single, half = measure(config, torch.float32), measure(config, torch.bfloat16)
    assert single.kept / 2 < half.kept < 0.6 * single.kept  # norms work in fp32
    mixed = measure(config, torch.float32, torch.bfloat16)
    assert half.kept < mixed.kept < single.kept
    biases = 24 * (896 + 2 * 128)
    assert mixed.casts == pytest.approx(2 * (mixed.size.layers + mixed.size.head), abs=2 * biases)
