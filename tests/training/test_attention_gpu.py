"""Rows of sequences by FlashAttention: its kernels on a GPU, and elsewhere what they are documented to compute."""

from itertools import chain

import pytest
import torch

from bae.batch import SampledTokens
from bae.training import attention
from bae.training import attention_gpu as flash_attention
from tests.support import needs_gpu
from tests.training.test_packing import in_parts, model_of, outcome, some


def pairs(queries, keys, causal):
    """(S, S') bool: which query sees which key; sequences lie one after the other."""
    which = [torch.repeat_interleave(torch.arange(len(x.begins) - 1), x.begins.diff()) for x in (queries, keys)]
    at = [torch.arange(len(w)) - x.begins[w] for w, x in zip(which, (queries, keys), strict=True)]
    seen = which[0].unsqueeze(1) == which[1]
    return seen & (at[0].unsqueeze(1) >= at[1]) if causal else seen


def forward(query, key, value, queries, keys, causal, scaling):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    scores = scores.masked_fill(~pairs(queries, keys, causal), -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("hqk,khd->qhd", (scores - lse.unsqueeze(-1)).exp(), value), lse, (lse, lse)


def backward(grad, query, key, value, out, lse, queries, keys, causal, state, scaling):
    """By the output and the lse that are handed in, as the kernels do it."""
    ratio = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.repeat_interleave(ratio, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, wide_key) * scaling - lse.unsqueeze(-1)
    p = scores.masked_fill(~pairs(queries, keys, causal), -torch.inf).exp()
    change = p * (torch.einsum("qhd,khd->hqk", grad, wide_value) - (grad * out).sum(-1).T.unsqueeze(-1)) * scaling
    to_key, to_value = torch.einsum("hqk,qhd->khd", change, query), torch.einsum("hqk,qhd->khd", p, grad)
    to_key, to_value = (x.unflatten(1, (-1, ratio)).sum(2) for x in (to_key, to_value))
    return torch.einsum("hqk,khd->qhd", change, wide_key), to_key, to_value


@pytest.fixture
def emulated(monkeypatch):
    """What the kernels compute, on a CPU."""
    for name, value in (("_forward", forward), ("_backward", backward), ("is_usable", lambda query: True)):
        monkeypatch.setattr(flash_attention, name, value)


@pytest.mark.parametrize("groups", [[3, 1, 4], [8]])
def test_two_calls_make_the_whole_and_its_gradients(groups, emulated):
    model, samples = model_of("qwen2"), some(groups)
    rows, weights = torch.arange(8), torch.randn(8, 7, generator=torch.Generator().manual_seed(3))
    values, gradient = outcome(model, samples, rows, weights)
    attention.share(model)
    same_values, same_gradient = outcome(model, samples, rows, weights)
    torch.testing.assert_close(same_values, values, atol=1e-5, rtol=0)
    assert all((same_gradient[name] - gradient[name]).abs().max() < 1e-5 for name in gradient)


def test_carried_prompts(emulated):
    model, samples, weights = model_of("llama"), some([7, 1, 4], seed=4), torch.ones(12, 7)
    values, gradient = outcome(model, samples, torch.arange(12), weights)
    attention.share(model)
    same_values, same_gradient, read_ahead = in_parts(model, samples, weights, 24)
    torch.testing.assert_close(same_values, values, atol=1e-5, rtol=0)
    assert all((same_gradient[name] - gradient[name]).abs().max() < 1e-5 for name in gradient)
    assert read_ahead == 2


def test_completions_of_one_token_feed_nothing(emulated):
    samples = some([2, 2])
    mask = samples.completion_mask & (torch.arange(7) < 1)
    samples = SampledTokens(samples.prompt_ids, samples.prompt_mask, samples.completion_ids, mask, samples.ended)
    model, rows, weights = model_of("llama"), torch.arange(4), torch.ones(4, 7)
    values, _ = outcome(model, samples, rows, weights)
    attention.share(model)
    torch.testing.assert_close(outcome(model, samples, rows, weights)[0], values, atol=1e-5, rtol=0)


def test_only_what_a_gpu_has_kernels_for():
    assert not flash_attention.is_usable(torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16))


@needs_gpu
@pytest.mark.parametrize("prompts, completions", [([130, 7], [[300, 0, 65], [0]]), ([5, 64, 3], [[9], [1, 2], [128]])])
def test_the_kernels_compute_what_they_are_documented_to(prompts, completions):
    lengths = ([*prompts, *chain(*completions)], prompts, [sum(each) for each in completions])
    there, here = ([flash_attention.Lengths(x, device) for x in lengths] for device in ("cuda", "cpu"))
    draw = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(heads, there[0].total, 64, generator=draw, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (6, 2, 2)
    ]
    out = flash_attention.row_attention(*tensors, *there, 0.125)
    grad = torch.randn(out.shape, generator=draw, device="cuda", dtype=torch.bfloat16)
    found = [out, *torch.autograd.grad(out, tensors, grad)]
    seen = pairs(here[0], here[0], True)
    seen[here[1].total :, : here[1].total] = pairs(here[2], here[1], False)
    query, key, value = exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    key, value = (x.repeat_interleave(3, 0) for x in (key, value))
    weights = (query @ key.mT / 8).masked_fill(~seen, -torch.inf).softmax(-1)
    plain = (weights @ value).transpose(0, 1)
    for one, other in zip(found, [plain, *torch.autograd.grad(plain, exact, grad.cpu().double())], strict=True):
        assert (one.cpu().double() - other).norm() / other.norm() < 1e-2


@needs_gpu
@pytest.mark.parametrize("dtype, most", [(torch.float, 1e-4), (torch.bfloat16, 0.1)])
def test_a_models_pass_on_a_gpu_is_that_of_the_cpu(dtype, most):
    model, samples = model_of("qwen2"), some([3, 1, 4])
    rows, weights = torch.arange(8), torch.randn(8, 7, generator=torch.Generator().manual_seed(3))
    values, gradient = outcome(model, samples, rows, weights)
    attention.share(model.to("cuda", dtype))
    whole, parts = outcome(model, samples, rows, weights), in_parts(model, samples, weights, 24)
    assert parts[2] > 0
    for same_values, same_gradient in (whole, parts[:2]):
        assert (same_values.float() - values).abs().max() < most
        for name, expected in gradient.items():
            assert (same_gradient[name].float() - expected).norm() < most * (1 + expected.norm()), name
