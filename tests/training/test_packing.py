"""Passes that share prompts against plain padded rows, and how completions are cut into micro-batches."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bae.batch import SampledTokens
from bae.method.losses import log_probs_and_entropy
from bae.rollout.interface import SamplingRequest
from bae.rollout.local.engine import LocalEngine
from bae.training import attention
from bae.training import attention_cpu as shared_attention
from bae.training.forward import check_shared_prefix, completion_logits, completion_pass
from bae.training.packing import Packing, micro_batches, passes
from bae.training.policy import compile_layers

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
}


def model_of(family, **options):
    torch.manual_seed(1)
    kind, config = FAMILIES[family]
    return kind(config).eval().requires_grad_(True)


def some(groups, seed=0, length=9, width=7, vocabulary=61):
    """Completions of prompts of different lengths; groups: how many of each."""
    g = torch.Generator().manual_seed(seed)
    which = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    n = len(which)
    prompt_mask = torch.arange(length) >= torch.randint(0, length, (len(groups), 1), generator=g)
    mask = torch.arange(width) < torch.randint(1, width + 1, (n, 1), generator=g)
    return SampledTokens(
        torch.randint(3, vocabulary, (len(groups), length), generator=g).masked_fill(~prompt_mask, 0)[which],
        prompt_mask[which],
        torch.randint(3, vocabulary, (n, width), generator=g).masked_fill(~mask, 0),
        mask,
        torch.ones(n).bool(),
    )


def outcome(model, samples, rows, weights):
    """Log-probabilities and entropies of the tokens, and the gradient of a sum of both."""
    model.zero_grad()
    seen = completion_pass(model, samples, rows, 0.8)
    device, width = seen.log_p.device, seen.log_p.shape[1]
    mask = samples.completion_mask[rows][:, :width].to(device)
    ((seen.log_p + 0.3 * seen.entropy) * weights[rows][:, :width].to(device) * mask).sum().backward()
    values = torch.stack([seen.log_p * mask, seen.entropy * mask]).detach()
    return values.cpu(), {name: p.grad.cpu().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tile", [2**20, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_plain_rows(family, tile, monkeypatch):
    monkeypatch.setattr(shared_attention, "TILE", tile)  # one tile for all, and many in every dimension
    model, samples = model_of(family), some([3, 1, 4])
    rows, weights = torch.arange(8), torch.randn(8, 7, generator=torch.Generator().manual_seed(3))
    plain = outcome(model, samples, rows, weights)
    attention.share(model)
    shared = outcome(model, samples, rows, weights)
    torch.testing.assert_close(shared[0], plain[0], atol=1e-5, rtol=0)
    assert max(float(g.abs().max()) for g in plain[1].values()) > 0.1
    for name, gradient in plain[1].items():
        torch.testing.assert_close(shared[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_double_precision_agrees_to_the_last_digits():
    model, samples = model_of("llama").double(), some([2, 3])
    weights = torch.randn(5, 7, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    plain, gradient = outcome(model, samples, torch.arange(5), weights)
    attention.share(model)
    shared, same = outcome(model, samples, torch.arange(5), weights)
    # log_softmax of plain rows is in single precision, so values are compared with that.
    torch.testing.assert_close(shared.float(), plain.float(), atol=2e-6, rtol=0)
    assert all((same[name] - gradient[name]).abs().max() < 1e-5 for name in gradient)


def test_torchs_kernels_give_the_same():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.double, requires_grad=True)  # noqa: E731
    tensors = [draw(2, 2, 3, 2, 5, 4), *(draw(2, 2, 3, 5, 4) for _ in "kv"), *(draw(2, 2, 6, 4) for _ in "kv")]
    sizes = (6, 2), (5, 3)
    real = torch.ones(2, 1, 1, 1, 5, 1) * (torch.arange(5) < torch.tensor(sizes[1]).unsqueeze(1)).view(2, 1, 1, 1, 5, 1)
    found = []
    for attend in (shared_attention._Tiled.apply, shared_attention._dense):
        out = attend(*tensors, *sizes) * real
        found.append([out, *torch.autograd.grad((out**2).sum(), tensors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def in_parts(model, samples, weights, budget):
    """The same as `outcome`, summed over micro-batches, and how often a prompt was read ahead."""
    model.zero_grad()
    parts, carriers = micro_batches(samples, torch.arange(len(weights)), budget), []
    values = torch.zeros(2, len(weights), int(samples.completion_mask.sum(1).max()))
    for part, *prompts in passes(model, samples, parts, True):
        seen = completion_pass(model, samples, part, 0.8, *prompts)
        device, width = seen.log_p.device, seen.log_p.shape[1]
        mask = samples.completion_mask[part, :width].to(device)
        ((seen.log_p + 0.3 * seen.entropy) * weights[part, :width].to(device) * mask).sum().backward()
        values[:, part, :width] = torch.stack([seen.log_p * mask, seen.entropy * mask]).detach().cpu().float()
        carriers += [carried for carried in prompts[:1] if carried is not None and carried not in carriers]
    return values, {name: p.grad.cpu().clone() for name, p in model.named_parameters()}, len(carriers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("budget", "read_ahead"), [(999, 0), (24, 1), (12, 3), (1, 3)])
def test_a_prompt_of_several_micro_batches_is_read_ahead_once(budget, read_ahead, checkpointing):
    model, samples = model_of("qwen2"), some([7, 1, 4, 2], seed=4)
    weights = torch.randn(14, 7, generator=torch.Generator().manual_seed(3))
    values, gradient = outcome(model, samples, torch.arange(14), weights)
    attention.share(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    same_values, same_gradient, count = in_parts(model, samples, weights, budget)
    torch.testing.assert_close(same_values, values, atol=1e-5, rtol=0)
    assert all((same_gradient[name] - gradient[name]).abs().max() < 1e-5 for name in gradient)
    assert count == read_ahead


def test_prompts_that_are_read_ahead_under_autocast():
    model, samples = model_of("llama"), some([7, 1, 4], seed=4)
    weights = torch.randn(12, 7, generator=torch.Generator().manual_seed(3))
    attention.share(model)
    values, gradient, _ = in_parts(model, samples, weights, 999)
    with torch.autocast("cpu", torch.bfloat16):
        same_values, same_gradient, count = in_parts(model, samples, weights, 12)
    assert count == 2
    torch.testing.assert_close(same_values, values, atol=0.03, rtol=0)
    for name, expected in gradient.items():
        assert (same_gradient[name] - expected).norm() < 0.05 * expected.norm(), name


@settings(deadline=None, max_examples=25)
@given(groups=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_any_rows_in_any_order_of_groups(groups, seed, data):
    model, samples = model_of("llama"), some(groups, seed)
    rows = torch.tensor(data.draw(st.permutations(range(sum(groups)))))[: data.draw(st.integers(1, sum(groups)))]
    weights = torch.ones(sum(groups), 7)
    plain = outcome(model, samples, rows, weights)[0]
    attention.share(model)
    torch.testing.assert_close(outcome(model, samples, rows, weights)[0], plain, atol=1e-5, rtol=0)


def test_a_prompt_is_there_once_and_no_padding():
    samples = some([3, 4])
    packing = Packing(samples, torch.arange(7), "cpu")
    prompts = samples.prompt_mask[0].sum() + samples.prompt_mask[3].sum()
    assert packing.ids.shape[1] == int(prompts + samples.completion_mask.sum() - 7)  # the last token predicts nothing
    attention.share(model := model_of("llama"))
    assert len(packing.states(model)) == int(samples.completion_mask.sum())


def test_padding_of_the_vocabularys_slices_is_never_seen():
    """More tokens than a chunk of logits takes, and a slice that does not divide them."""
    from bae.training import chunked_head as vocabulary

    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g, requires_grad=True) for s in ((50, 8), (33, 8), (33,)))
    ids, factors = torch.randint(33, (50,), generator=g), torch.randn(2, 50, generator=g)
    found = []
    for limit in (2**20, 33 * 7):
        vocabulary.LOGITS, vocabulary.SLICE, before = limit, limit // 3, (vocabulary.LOGITS, vocabulary.SLICE)
        try:
            log_p, entropy = vocabulary.head_log_probs(hidden, weight, bias, ids, 0.7)
            gradients = torch.autograd.grad((log_p * factors[0] + entropy * factors[1]).sum(), (hidden, weight, bias))
        finally:
            vocabulary.LOGITS, vocabulary.SLICE = before
        found.append((log_p, entropy, *gradients))
    logits = (hidden @ weight.T + bias).unsqueeze(0)
    log_p, entropy = (x[0] for x in log_probs_and_entropy(logits, ids.unsqueeze(0), 0.7))
    gradients = torch.autograd.grad((log_p * factors[0] + entropy * factors[1]).sum(), (hidden, weight, bias))
    for chunked in found:
        for one, other in zip(chunked, (log_p, entropy, *gradients), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_gradient_checkpointing_runs_layers_twice_and_changes_nothing(shared):
    model, samples, weights, runs = model_of("llama"), some([3, 2]), torch.ones(5, 7), []
    if shared:
        attention.share(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: runs.append(module.training))
    plain = outcome(model, samples, torch.arange(5), weights)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = outcome(model, samples, torch.arange(5), weights)
    assert runs == [False] * 6  # once, then twice, and never in training mode: nothing drops out
    assert not any(module.training for module in model.modules())
    assert again[0].equal(plain[0]) and all(again[1][name].allclose(g, atol=1e-6) for name, g in plain[1].items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_compiled_layers_give_the_same_and_leave_sampling_alone(tiny):
    samples, weights = some([3, 2], vocabulary=25), torch.ones(5, 7)
    request = SamplingRequest(
        [[3, 4, 5]], [(0,)], group_size=4, max_new_tokens=9, temperature=1.0, eos_token_id=1, pad_token_id=0
    )
    plain = outcome(tiny.model, samples, torch.arange(5), weights)
    drawn = LocalEngine().sample(tiny.model, request)
    compile_layers(tiny.model)
    whole = outcome(tiny.model, samples, torch.arange(5), weights)
    *parts, read_ahead = in_parts(tiny.model, samples, weights, 16)  # other lengths, and without gradients
    assert read_ahead
    for values, gradients in (whole, parts):
        torch.testing.assert_close(values, plain[0], atol=1e-5, rtol=0)
        for name, gradient in plain[1].items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    assert LocalEngine().sample(tiny.model, request).completion_ids.equal(drawn.completion_ids)


def test_autocast_uses_half_precision_and_gives_gradients_of_the_weights():
    model, samples = model_of("llama"), some([3, 2])
    attention.share(model)
    weights = torch.ones(5, 7)
    exact, gradients = outcome(model, samples, torch.arange(5), weights)
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_gradients = outcome(model, samples, torch.arange(5), weights)
    assert 0 < (rough - exact).abs().max() < 0.1
    assert all(g.dtype == torch.float for g in rough_gradients.values())
    whole, rough_whole = (torch.cat([g.flatten() for g in x.values()]) for x in (gradients, rough_gradients))
    assert torch.cosine_similarity(whole, rough_whole, 0) > 0.99


def test_a_model_without_a_layout_computes_what_it_did():
    model, samples = model_of("qwen2"), some([2])
    before = completion_logits(model, samples, torch.arange(2))[0]
    attention.share(model)
    attention.share(model)
    assert completion_logits(model, samples, torch.arange(2))[0].equal(before)
    check_shared_prefix(model)


def test_a_shared_model_is_saved_as_any_other(tmp_path):
    model = model_of("llama")
    attention.share(model)
    model.save_pretrained(tmp_path)
    assert "bae" not in (tmp_path / "config.json").read_text()
    assert not attention.is_shared(LlamaForCausalLM.from_pretrained(tmp_path))


def test_what_cannot_be_shared_is_refused_with_advice():
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval()
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    scaled = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    scaled.lm_head.register_forward_hook(lambda module, inputs, out: out * 2)
    for model in (capped, windowed, scaled):
        attention.share(model)
        with pytest.raises(ValueError, match=r"model\.shared_prefix=false"):
            check_shared_prefix(model)


@settings(deadline=None)
@given(groups=st.lists(st.integers(1, 5), min_size=1, max_size=5), budget=st.integers(1, 80), least=st.integers(1, 6))
def test_micro_batches_hold_each_completion_once_within_the_budget(groups, budget, least):
    samples = some(groups)
    n = sum(groups)
    parts = micro_batches(samples, torch.arange(n), budget, least)
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert len(parts) >= min(least, n)
    for part in parts:
        prompts = {tuple(samples.prompt_ids[i].tolist()): int(samples.prompt_mask[i].sum()) for i in part}
        tokens = sum(prompts.values()) + int(samples.completion_mask[part].sum())
        assert tokens <= budget or len(part) == 1
    assert micro_batches(samples, torch.arange(0), budget) == []


def test_groups_stay_together_where_they_fit():
    samples = some([4, 4, 4])
    parts = micro_batches(samples, torch.arange(12), 60)
    for part in parts[:-1]:
        assert len({i // 4 for i in part.tolist()}) * 4 <= len(part) + 3
