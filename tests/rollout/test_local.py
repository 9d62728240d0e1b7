"""Compare the local engine with transformers' generate, with the training pass and with itself."""

import copy

import numpy as np
import pytest
import torch

from bae.rollout.local import engine as local
from bae.rollout.local.engine import LocalEngine
from bae.rollout.local.prepacked import prepacked
from bae.rollout.local.sampling import Sampler
from bae.training.forward import completion_pass
from bae.training.policy import Policy, weights_dtype
from tests.support import needs_gpu, rollouts
from tests.support.rollouts import PROMPTS


def sample(policy, max_rows=512, cuda_graphs=True, **asked):
    """Sample with the local engine."""
    return rollouts.sample(LocalEngine(max_rows, cuda_graphs=cuda_graphs), policy, **asked)


@pytest.fixture(params=["shared", "plain"])
def policy(request, tiny):
    """As models are loaded, and with model.shared_prefix=false."""
    if request.param == "plain":
        tiny.model.config._attn_implementation = "sdpa"
    return tiny


@pytest.mark.parametrize("max_rows", [512, 2])
def test_greedy_decoding_is_generates(policy, max_rows):
    tiny = policy
    ours = sample(tiny, group_size=1, temperature=0, max_rows=max_rows)
    inputs = tiny.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    theirs = tiny.model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, mask, reference in zip(ours.completion_ids, ours.completion_mask, theirs, strict=True):
        assert row[mask].tolist() == reference[: int(mask.sum())].tolist()


def test_a_group_does_not_depend_on_its_neighbours(tiny):
    whole = sample(tiny)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(tiny, prompts=[prompt], keys=[(0, 0, i)])
        for n in range(4):
            mask = alone.completion_mask[n]
            assert alone.completion_ids[n][mask].equal(
                whole.completion_ids[4 * i + n][whole.completion_mask[4 * i + n]]
            )


@pytest.mark.parametrize("max_rows", [1, 3, 4, 5])
def test_decoding_in_parts_changes_nothing(policy, max_rows):
    whole, parts = sample(policy), sample(policy, max_rows=max_rows)
    assert whole.completion_ids.equal(parts.completion_ids)
    torch.testing.assert_close(whole.log_probs, parts.log_probs, atol=1e-5, rtol=0)


def test_both_ways_of_decoding_draw_the_same(tiny):
    shared = sample(tiny, group_size=8, limit=70)
    tiny.model.config._attn_implementation = "sdpa"
    assert shared.completion_ids.equal(sample(tiny, group_size=8, limit=70).completion_ids)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("max_rows", [512, 5])
def test_log_probs_are_the_training_passes(policy, temperature, max_rows):
    samples = sample(policy, group_size=8, limit=70, temperature=temperature, max_rows=max_rows)
    assert samples.ended.any()  # some left early, so that others took their place
    seen = completion_pass(policy.model, samples, torch.arange(24), temperature)
    expected = torch.where(samples.completion_mask, seen.log_p.detach(), 0)
    torch.testing.assert_close(samples.log_probs, expected, atol=1e-4, rtol=0)


def test_each_completion_is_told_of_once(policy):
    told = {}
    samples = sample(policy, group_size=8, limit=20, max_rows=5, on_finished=lambda n, *rest: told.setdefault(n, rest))
    assert sorted(told) == list(range(24))
    for n, (ids, ended) in told.items():
        assert list(ids) == samples.completion_ids[n][samples.completion_mask[n]].tolist()
        assert ended == samples.ended[n]
    assert list(told) != sorted(told)  # as they end, not as they stand


def test_draws_of_completions_follow_the_policy(policy):
    """First and second token of 4,000 completions against the policy's own distribution (χ²)."""
    samples = sample(policy, group_size=4000, limit=2, prompts=PROMPTS[:1], keys=[(3,)], max_rows=1500)
    with torch.no_grad():
        prompt = torch.tensor([policy.encode("", PROMPTS[0])])
        first = policy.model(input_ids=prompt).logits[0, -1].softmax(-1)
        commonest = int(first.argmax())
        second = policy.model(input_ids=torch.cat([prompt, torch.tensor([[commonest]])], 1)).logits[0, -1].softmax(-1)
    drawn = samples.completion_ids
    after = drawn[(drawn[:, 0] == commonest) & samples.completion_mask[:, 1], 1]
    for tokens, probabilities in ((drawn[:, 0], first), (after, second)):
        counts = torch.bincount(tokens, minlength=len(probabilities))
        expected = probabilities * len(tokens)
        degrees = len(probabilities) - 1
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_squared - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float, 1e-5), (torch.bfloat16, 0.02)])
def test_prepacked_weights_give_the_same_and_leave(tiny, dtype, tolerance):
    model = copy.deepcopy(tiny.model).to(dtype)
    policy = Policy(model, tiny.tokenizer, "{question}")
    x = torch.randn(3, 32).to(dtype)
    layer = model.model.layers[0].mlp.up_proj
    before = layer(x)
    with pytest.raises(RuntimeError, match="stop"), prepacked(model, 3):
        has = torch.backends.mkldnn.is_available() if dtype == torch.float else weights_dtype("auto") == dtype
        assert has == ("forward" in vars(layer))
        torch.testing.assert_close(layer(x), before)
        raise RuntimeError("stop")
    assert "forward" not in vars(layer)
    samples = sample(policy, group_size=8)
    seen = completion_pass(model, samples, torch.arange(24), 1.0).log_p.detach()
    assert (samples.log_probs - seen)[samples.completion_mask].abs().mean() < tolerance
    layer.weight.data.zero_()  # new weights are seen by the next rollout
    assert not sample(policy, group_size=8).log_probs.equal(samples.log_probs)


def test_keys_decide_the_draws(tiny):
    assert sample(tiny).completion_ids.equal(sample(tiny).completion_ids)
    other = sample(tiny, keys=[(1, 0, i) for i in range(3)])
    assert not sample(tiny).completion_ids[:, 0].equal(other.completion_ids[:, 0])


def test_nothing_follows_the_end_of_sequence(tiny):
    eos = int(sample(tiny).completion_ids[0, 2])  # a token that does come up
    samples = sample(tiny, group_size=16, eos=eos)
    assert samples.ended.any() and not samples.ended.all()
    for row, mask, ended in zip(samples.completion_ids, samples.completion_mask, samples.ended, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (row[:length] == eos).sum() == ended
        assert row[length:].eq(tiny.tokenizer.pad_token_id).all()
        assert not ended or row[length - 1] == eos


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    draws = Sampler(1.0).draw(probabilities.log().expand(20_000, 6), torch.rand(20_000))[0]
    counts = torch.bincount(draws, minlength=6)
    assert counts[probabilities == 0].eq(0).all()
    expected = probabilities[probabilities > 0] * 20_000
    chi_squared = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    assert chi_squared < 13.8  # 2 degrees of freedom, p = .001


def test_draws_from_many_tokens_follow_the_distribution():
    """More tokens than are summed at a time, in several slices of rows, and tokens of no probability among them."""
    torch.manual_seed(0)
    probabilities = torch.rand(1000).where(torch.rand(1000) < 0.3, 0)
    probabilities /= probabilities.sum()
    logits = probabilities.log().expand(60_000, 1000)
    draws, log_probs = Sampler(1.0).draw(logits, torch.rand(60_000))
    torch.testing.assert_close(log_probs, probabilities[draws].log(), atol=1e-5, rtol=0)
    counts = torch.bincount(draws, minlength=1000)
    possible = probabilities > 0
    assert counts[~possible].eq(0).all()
    expected = probabilities[possible] * 60_000
    degrees = int(possible.sum()) - 1
    chi_squared = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert abs(chi_squared - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"top_k": 2}, [3, 1]), ({"top_p": 0.7}, [3, 1]), ({"top_p": 0.69}, [3, 1]), ({"top_p": 0.71}, [3, 1, 4]),
     ({"top_k": 1}, [3]), ({"top_k": 3, "top_p": 0.6}, [3, 1]), ({"top_k": 99}, [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_top_k_and_top_p_leave_the_most_likely(options, allowed):
    torch.manual_seed(0)
    p = torch.tensor([0.04, 0.2, 0.06, 0.5, 0.2 - 1e-3])
    draws, log_probs = Sampler(1.0, **options).draw(p.log().expand(4000, 5), torch.rand(4000))
    assert set(draws.tolist()) == set(allowed)
    kept = p[allowed].sum()
    torch.testing.assert_close(log_probs, (p[draws] / kept).log())


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=r"rollout\.top"):
        LocalEngine(**options)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_inside_the_support(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert int(Sampler(0.7).draw(logits, torch.tensor([uniform]))[0]) in (1, 2)


@pytest.mark.parametrize("slack", [0.25, 1.0])
@pytest.mark.parametrize("max_rows", [512, 5])
def test_finished_completions_may_stay_a_while(tiny, slack, max_rows, monkeypatch):
    expected = sample(tiny, group_size=8, limit=70, max_rows=max_rows)
    decoding = local._SharedDecoding
    monkeypatch.setattr(local, "_SharedDecoding", lambda *given: decoding(*given[:-1], True))  # as on a GPU
    monkeypatch.setattr(local, "SLACK", slack)
    found = sample(tiny, group_size=8, limit=70, max_rows=max_rows)
    assert found.completion_ids.equal(expected.completion_ids) and found.ended.equal(expected.ended)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)


@needs_gpu
@pytest.mark.parametrize("max_rows", [512, 5])
def test_recorded_steps_are_plain_ones(tiny, max_rows):
    here = sample(tiny, group_size=8, limit=70, max_rows=max_rows)
    tiny.model.to("cuda")
    plain = sample(tiny, group_size=8, limit=70, max_rows=max_rows, cuda_graphs=False)
    recorded = sample(tiny, group_size=8, limit=70, max_rows=max_rows)
    for other in (plain, recorded):
        assert other.completion_ids.equal(here.completion_ids)
        torch.testing.assert_close(other.log_probs, here.log_probs, atol=1e-4, rtol=0)
