"""The local engine against transformers' generate and against itself."""

import pytest
import torch

from bae.rollout.local import LocalEngine, pick

PROMPTS = ["1+2=", "37+48-5=", "9-9+9-9="]


def sample(policy, group_size=4, limit=12, max_rows=512, temperature=1.0, prompts=PROMPTS, keys=None, eos=None):
    ids = [policy.encode("", question) for question in prompts]
    return LocalEngine(max_rows).sample(
        policy.model,
        ids,
        keys or [(0, 0, i) for i in range(len(ids))],
        group_size=group_size,
        max_new_tokens=limit,
        temperature=temperature,
        eos_token_id=policy.tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=policy.tokenizer.pad_token_id,
    )


def test_greedy_decoding_is_generates(tiny):
    ours = sample(tiny, group_size=1, temperature=0)
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


def test_decoding_in_parts_changes_nothing(tiny):
    whole, parts = sample(tiny), sample(tiny, max_rows=4)
    assert whole.completion_ids.equal(parts.completion_ids)


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
    draws = pick(probabilities.log().expand(20_000, 6), torch.rand(20_000), 1.0)
    counts = torch.bincount(draws, minlength=6)
    assert counts[probabilities == 0].eq(0).all()
    expected = probabilities[probabilities > 0] * 20_000
    chi_squared = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    assert chi_squared < 13.8  # 2 degrees of freedom, p = .001


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_inside_the_support(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert int(pick(logits, torch.tensor([uniform]), 0.7)) in (1, 2)
