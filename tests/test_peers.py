"""GRPO and GDPO as TRL has them: the same tensors through its trainer and through ours, equal to 1e-5 or explained."""

from functools import partial

import pytest
import torch

from bae.batch import SampledTokens, group_index
from bae.method.advantages import advantages, spread_over_tokens, sum_by_block
from bae.method.baselines import RewardView, group_mean
from bae.method.losses import block_mean, blockwise_clipped_loss, constant_length, log_probs_and_entropy, token_mean
from bae.method.normalisation import batch_std, group_std, none
from bae.training.forward import completion_logits

trl = pytest.importorskip("trl", reason="make peers installs TRL, to compare with")
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

WIDTH = 9
TEMPERATURE, CLIP, CLIP_HIGH = 0.8, 0.2, 0.28
WEIGHTS = [1.0, 0.5]
EPSILON = 1e-4  # TRL adds it to every standard deviation; these are unbiased, as ours


def verdict_and_brier(prompts, group, seed=0):
    """(P, G, 2): rewards of an answer that is right or wrong, and of the confidence in it."""
    g = torch.Generator().manual_seed(seed)
    correct = torch.randint(2, (prompts, group), generator=g).float()
    return torch.stack([correct, -((torch.rand(prompts, group, generator=g) - correct) ** 2)], -1)


AGREED, ABSENT = verdict_and_brier(3, 4, seed=2), verdict_and_brier(4, 4, seed=3)
AGREED[1] = torch.tensor([0.0, -0.09])
# TRL's None: of one objective, of both, of one objective in all the group but one.
ABSENT[0, 2, 1] = ABSENT[1, 3] = ABSENT[2, 1:, 1] = torch.nan
REWARDS = {
    "groups of four": verdict_and_brier(3, 4),
    "groups of seven": verdict_and_brier(2, 7, seed=1),
    "a group agrees": AGREED,
    "some are absent": ABSENT,
}
with_rewards = pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)


def peer(policy, rewards, folder, steps=1, micro_batches=1, **options):
    """TRL's trainer, and what it made of rewards, (P, G, J), and completions that are prescribed.

    The rollout is cut into `steps` optimiser steps of `micro_batches` each.
    """
    from datasets import Dataset

    n = rewards.shape[0] * rewards.shape[1]
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, WIDTH + 1, (n,), generator=g)
    draw = lambda length: torch.randint(3, 25, (int(length),), generator=g).tolist()  # noqa: E731
    prompts = [ids for p in range(len(rewards)) for ids in [draw(2 + p)] * rewards.shape[1]]
    rollout = {"prompt_ids": prompts, "completion_ids": [draw(length) for length in lengths], "logprobs": None}
    columns = rewards.flatten(0, 1).T.tolist()
    rows = [{"prompt": ""}] * n
    settings = trl.GRPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=rewards.shape[1],
        max_completion_length=WIDTH,
        per_device_train_batch_size=n // (steps * micro_batches),
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=steps * micro_batches,
        num_iterations=2,  # with one, a single step takes today's log-probabilities for the old ones
        temperature=TEMPERATURE,
        epsilon=CLIP,
        epsilon_high=CLIP_HIGH,
        **options,
    )
    trainer = trl.GRPOTrainer(
        policy.model,
        [lambda column=column, **_: column for column in columns],
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
        rollout_func=lambda *_: rollout,
    )
    trainer.current_gradient_accumulation_steps = micro_batches  # as train() has it
    policy.model.train()
    return trainer, trainer._generate_and_score_completions(rows)


def centred(rewards):
    """(P, G, J) rewards minus their group's mean, (N, J); the groups, (N,); and where there was a reward, (N, J)."""
    group = group_index(rewards.shape[0] * rewards.shape[1], rewards.shape[1])
    present, rewards = ~rewards.flatten(0, 1).isnan(), rewards.flatten(0, 1).nan_to_num()
    columns = zip(rewards.T, present.T, strict=True)
    means = [group_mean(RewardView(reward, group, torch.zeros_like(group), counts)) for reward, counts in columns]
    return advantages(rewards, torch.stack(means, 1), present), group, present


def grpo(rewards, normalise):
    """(N,): the weighted sum of the rewards as one objective."""
    total = (rewards * torch.tensor(WEIGHTS)).nansum(-1, keepdim=True)
    advantage, group, present = centred(total.masked_fill(rewards.isnan().all(-1, keepdim=True), torch.nan))
    return normalise(advantage[:, 0], group, present[:, 0], group)


def gdpo(rewards):
    """(N,): each objective normalised in its group, then their weighted sum in the batch."""
    advantage, group, present = centred(rewards)
    each = [group_std(a, group, p, group, EPSILON) for a, p in zip(advantage.T, present.T, strict=True)]
    block = sum_by_block(torch.stack(each, 1), [0, 0], WEIGHTS, blocks=1)
    return batch_std(block[:, 0], group, present.any(1), group, EPSILON)


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))


@with_rewards
def test_advantages_of_grpo(tiny, tmp_path, rewards):
    _, inputs = peer(tiny, rewards, tmp_path, scale_rewards="group", reward_weights=WEIGHTS)
    assert_equal(grpo(rewards, partial(group_std, epsilon=EPSILON)), inputs["advantages"])


@with_rewards
def test_advantages_of_dr_grpo(tiny, tmp_path, rewards):
    _, inputs = peer(tiny, rewards, tmp_path, scale_rewards="none", reward_weights=WEIGHTS)
    assert_equal(grpo(rewards, none), inputs["advantages"])


@with_rewards
def test_advantages_of_gdpo(tiny, tmp_path, rewards):
    options = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": WEIGHTS}
    _, inputs = peer(tiny, rewards, tmp_path, **options)
    assert_equal(gdpo(rewards), inputs["advantages"])


@pytest.mark.parametrize("rewards", [REWARDS["groups of four"], REWARDS["groups of seven"]])
def test_trl_scales_by_the_batch_before_it_centres(tiny, tmp_path, rewards):
    """TRL divides by the deviation of the rewards, ours by that of the advantages: prompts of unlike difficulty make
    the first larger. Nothing else differs."""
    _, inputs = peer(tiny, rewards, tmp_path, scale_rewards="batch", reward_weights=WEIGHTS)
    total = (rewards * torch.tensor(WEIGHTS)).sum(-1)
    factor = (grpo(rewards, none).std() + EPSILON) / (total.std() + EPSILON)
    assert factor < 0.999
    assert_equal(factor * grpo(rewards, partial(batch_std, epsilon=EPSILON)), inputs["advantages"])


def test_equal_rewards_are_exactly_no_signal_here(tiny, tmp_path):
    """TRL's mean of equal rewards may be a rounding error off, and 1e-4 is all that it is divided by."""
    rewards = torch.tensor([-0.3, -0.07]).view(2, 1, 1).expand(2, 7, 2)
    _, inputs = peer(tiny, rewards, tmp_path, scale_rewards="group", reward_weights=WEIGHTS)
    assert not grpo(rewards, partial(group_std, epsilon=EPSILON)).any()
    assert inputs["advantages"].abs().max() < torch.finfo(torch.float).eps / EPSILON


def off_policy(policy, folder, **options):
    """TRL's trainer and tensors, and the policy moved away, so that ratios lie beyond both ends of the clip."""
    trainer, inputs = peer(policy, REWARDS["groups of four"], folder, **options)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return trainer, inputs


def split(inputs, parts):
    from trl.trainer.utils import split_tensor_dict

    return split_tensor_dict(inputs, parts)


def block_and_tokens(mask):
    """One block, the whole completion: (N, T), (1,) its weight, (1,) its tokens."""
    return torch.where(mask.bool(), 0, -1), torch.ones(1), mask.sum().view(1)


def our_loss(policy, inputs, weights):
    """Of TRL's tensors, or a part of them; weights: (N, T)."""
    prompt_mask, completion_mask = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
    everyone = torch.arange(len(weights))
    samples = SampledTokens(inputs["prompt_ids"], prompt_mask, inputs["completion_ids"], completion_mask, everyone >= 0)
    logits, ids = completion_logits(policy.model, samples, everyone)
    log_p, _ = log_probs_and_entropy(logits, ids, TEMPERATURE)
    advantage = spread_over_tokens(inputs["advantages"].unsqueeze(1), block_and_tokens(completion_mask)[0])
    columns = (x[:, : ids.shape[1]] for x in (inputs["old_per_token_logps"], advantage, weights))
    return blockwise_clipped_loss(log_p, *columns, CLIP, CLIP_HIGH)


def assert_same_update(policy, ours, theirs):
    """Of scalar losses: the values, and the gradients in every parameter."""
    assert_equal(ours, theirs)
    parameters = list(policy.model.parameters())
    mine, others = (torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters)]) for x in (ours, theirs))
    assert others.abs().max() > 0.01
    assert_equal(mine, others)


@pytest.mark.parametrize(("steps", "micro_batches"), [(1, 1), (1, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", block_mean), ("dapo", token_mean), ("dr_grpo", partial(constant_length, length=WIDTH))],
)
def test_loss_and_gradient(tiny, tmp_path, loss_type, aggregation, steps, micro_batches):
    cut = {"steps": steps, "micro_batches": micro_batches}
    trainer, inputs = off_policy(tiny, tmp_path, loss_type=loss_type, **cut)
    weights = steps * aggregation(*block_and_tokens(inputs["completion_mask"]))  # ours are of the whole rollout batch
    parts = split(inputs | {"weights": weights}, steps * micro_batches)
    for step in range(steps):
        step_parts = parts[step * micro_batches : (step + 1) * micro_batches]
        ours = sum(our_loss(tiny, part, part["weights"]) for part in step_parts)
        assert_same_update(tiny, ours, sum(trainer.compute_loss(tiny.model, part) for part in step_parts))
    assert all(max(trainer._metrics["train"][f"clip_ratio/{end}_mean"]) > 0.1 for end in ("low", "high"))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_bnpo_is_a_token_mean_of_each_micro_batch(tiny, tmp_path, micro_batches):
    """So TRL's gradient depends on how a batch is cut into these; ours has the whole batch's tokens."""
    trainer, inputs = off_policy(tiny, tmp_path, loss_type="bnpo", micro_batches=micro_batches)
    parts = split(inputs, micro_batches)
    means = [our_loss(tiny, part, token_mean(*block_and_tokens(part["completion_mask"]))) for part in parts]
    theirs = sum(trainer.compute_loss(tiny.model, part) for part in parts)
    assert_same_update(tiny, sum(means) / micro_batches, theirs)
