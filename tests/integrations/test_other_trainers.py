"""verl, slime and prime-rl: their hooks called as their sources call them, with records that have the same fields.

Where verl is installed, its own function calls the hook.
"""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bae.batch import Problem
from bae.integrations import prime_rl, slime, verl
from bae.integrations.blockwise import Blockwise, for_token_lists
from tests.callbacks.test_writers import TEXTS
from tests.fidelity.test_continuations import by_hand, make_pipeline
from tests.integrations.test_blockwise import lists

ORDER = [5, 0, 7, 2, 1, 6, 4, 3]  # trainers balance lengths, so groups do not stay together
TOOL = 7  # an id that the policy did not sample


@pytest.fixture
def eight(tiny):
    """Two groups of four: what makes advantages, the ids of the completions, the end, and the advantages."""
    problems, samples, _ = by_hand(tiny, TEXTS)
    blockwise, end = Blockwise(make_pipeline(tiny).scorer), [tiny.tokenizer.eos_token_id]
    expected, _ = for_token_lists(blockwise, problems, lists(samples), end, 4)
    assert torch.cat(expected).unique().numel() > 4
    return SimpleNamespace(blockwise=blockwise, ids=lists(samples), end=end, expected=expected)


def verl_batch(eight):
    """The arguments with which verl's compute_advantage calls gdpo; a tool wrote after the third token of each."""
    width = max(map(len, eight.ids)) + 3
    responses, mask = torch.zeros(8, width, dtype=torch.long), torch.zeros(8, width, dtype=torch.long)
    for row, n in enumerate(ORDER):
        ids = [*eight.ids[n][:3], TOOL, *eight.ids[n][3:]]
        responses[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        mask[row, 3] = 0
    names = {"uid": [f"prompt-{n // 4}" for n in ORDER], "reward_model": [{"ground_truth": "3"} for _ in ORDER]}
    return {
        "token_level_rewards": torch.zeros(8, width),
        "response_mask": mask,
        "config": {},
        "index": np.array(names["uid"], dtype=object),
        "non_tensor_batch": {name: np.array(values, dtype=object) for name, values in names.items()},
        "batch": {"responses": responses},
    }


def assert_in_order(advantages, mask, eight):
    for row, n in enumerate(ORDER):
        assert advantages[row][mask[row].bool()].equal(eight.expected[n])
    assert not advantages[mask == 0].any()


def test_verl(eight):
    arguments = verl_batch(eight)
    advantages, returns = verl.AdvantageEstimator(eight.blockwise, eight.end)(**arguments)
    assert_in_order(advantages, arguments["response_mask"], eight)
    assert returns.equal(advantages)


def test_verl_itself_calls_it(eight, monkeypatch):
    pytest.importorskip("verl", reason="verl is not among this project's extras")
    from verl import DataProto
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.trainer.ppo.ray_trainer import compute_advantage

    monkeypatch.setitem(ADV_ESTIMATOR_REGISTRY, "gdpo", verl.AdvantageEstimator(eight.blockwise, eight.end))
    arguments = verl_batch(eight)
    tensors = {name: arguments[name] for name in ("response_mask", "token_level_rewards")} | arguments["batch"]
    data = DataProto.from_dict(tensors=tensors, non_tensors=arguments["non_tensor_batch"])
    assert_in_order(compute_advantage(data, "gdpo", config={}).batch["advantages"], arguments["response_mask"], eight)


def test_verl_is_told_what_is_missing(eight):
    estimate, arguments = verl.AdvantageEstimator(eight.blockwise, eight.end), verl_batch(eight)
    with pytest.raises(ValueError, match="verl gave no tokens: it gives them to the estimator gdpo alone"):
        estimate(**{name: arguments[name] for name in ("token_level_rewards", "response_mask", "config", "index")})
    arguments["index"][0] = "prompt-0"
    with pytest.raises(ValueError, match="prompt prompt-1 has 3 completions and prompt prompt-0 has 5"):
        estimate(**arguments)


def slime_samples(eight):
    """As slime.utils.types.Sample has it; the first one with what a tool wrote."""
    samples = [
        SimpleNamespace(group_index=n // 4, prompt="1+2=", label="3", tokens=[5, 6, *ids], response_length=len(ids),
                        loss_mask=None)
        for n, ids in enumerate(eight.ids)
    ]  # fmt: skip
    first = samples[0]
    first.tokens, first.response_length = [5, 6, TOOL, *eight.ids[0]], first.response_length + 1
    first.loss_mask = [0] + [1] * (first.response_length - 1)
    return samples


def test_slime(eight):
    samples, args = slime_samples(eight), SimpleNamespace(n_samples_per_prompt=4, context_parallel_size=1)
    raw, rewards = slime.PostProcess(eight.blockwise, eight.end)(args, samples)
    assert raw == [1, 1, 0, 0, 0, 0, 1, 1]
    for partition in (ORDER[:4], ORDER[4:]):  # two ranks, as slime's _split_train_data_by_dp cuts the lists
        data = {
            "rewards": [rewards[n] for n in partition],
            "loss_masks": [torch.ones(samples[n].response_length, dtype=torch.int) for n in partition],
        }
        assert slime.advantages(args, data) is None
        for n, advantages, returns in zip(partition, data["advantages"], data["returns"], strict=True):
            expected = torch.cat([torch.zeros(samples[n].response_length - len(eight.ids[n])), eight.expected[n]])
            assert advantages.equal(expected) and returns.equal(expected)
    assert asyncio.run(slime.no_reward(args, samples[0])) == 0


def test_slime_is_told_what_is_wrong(eight):
    samples, args = slime_samples(eight), SimpleNamespace(n_samples_per_prompt=4, context_parallel_size=2)
    process = slime.PostProcess(eight.blockwise, eight.end)
    for cut in (samples[1:], samples[:1] + samples[2:5]):
        with pytest.raises(ValueError, match="slime's samples are not whole groups of n_samples_per_prompt=4"):
            process(args, cut)
    with pytest.raises(ValueError, match="context_parallel_size=2: must be 1"):
        slime.advantages(args, {})
    args.context_parallel_size = 1
    with pytest.raises(ValueError, match="slime's rewards are no advantages: name a PostProcess"):
        slime.advantages(args, {"rewards": [0.0], "loss_masks": [torch.ones(1)]})


def test_prime_rl(eight):
    """Each trace has a prompt, two turns of the policy and a tool between them, as verifiers.v1.Trace has nodes."""

    def trace(ids):
        nodes = [([5, 6], False), (ids[:4], True), ([TOOL], False), (ids[4:], True)]
        return SimpleNamespace(nodes=[SimpleNamespace(token_ids=t, mask=[m] * len(t)) for t, m in nodes])

    traces = [trace(ids) for ids in eight.ids[4:]]
    per_token = prime_rl.token_advantages(eight.blockwise, traces, "3", eight.end)
    problems = [Problem("1+2=", "1+2=", "3")] * 4
    group, _ = for_token_lists(eight.blockwise, problems, eight.ids[4:], eight.end, 4)
    assert per_token == [row.tolist() for row in group] and any(map(any, per_token))
