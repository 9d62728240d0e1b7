"""Gradients of baselines from sketches are those of training; the reference is the gradient where that is known."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import bae.fidelity.gradients
from bae.batch import Advantages, NumberAdvantages, RolloutBatch
from bae.fidelity.continuations import resample
from bae.fidelity.gradients import ALL_ACTION, compare_gradients, sketch_completions, sketch_reference
from bae.method.advantages import sum_by_block
from bae.method.losses import log_probs_and_entropy
from bae.method.stated_numbers import Candidates
from bae.objectives.reward_view import number_decisions
from bae.training.forward import completion_logits, expected_reward
from bae.training.policy import load_pretrained
from bae.training.sketch import count_sketch
from tests.fidelity.test_continuations import SOLUTION, WHOLE, by_hand, make_pipeline
from tests.training import test_update as test_policy

WRONG = SOLUTION.replace("<answer>3", "<answer>4")
END = "<analysis></analysis><confidence>"
TEXTS = [
    WHOLE,
    f"{SOLUTION}{END}0.85</confidence>",
    WRONG + WHOLE[len(SOLUTION) :],
    f"{SOLUTION}{END}.9</confidence>.",  # goes on
    f"{SOLUTION}{END}0.7",  # and is not closed
    SOLUTION,
    f"{WRONG}{END}1</confidence>",  # no point, no decision
    f"{WRONG}{END}1.7</confidence>",
]
PROMPT = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
TEMPERATURE = 0.8


@pytest.fixture
def exact(monkeypatch, tiny):
    """Sketches that are the gradients themselves, as long as there are parameters."""
    monkeypatch.setattr(bae.fidelity.gradients, "count_sketch", lambda vector, size: vector)
    return sum(p.numel() for p in tiny.model.parameters())


def written(policy):
    """A pipeline, and samples, scores and decisions of texts that the policy did not write."""
    pipeline = make_pipeline(policy, temperature=TEMPERATURE)
    _, samples, scored = by_hand(policy, TEXTS)
    decisions = number_decisions(scored, pipeline.scorer, 1, Candidates(pipeline.scorer.vocabulary))
    assert (decisions.position >= 0).sum(1).tolist() == [2, 3, 2, 2, 2, 0, 0, 2]
    return pipeline, samples, scored, decisions


def by_training(policy, samples, scored, baseline, decisions, all_action=False):
    """The gradient of the second block of one training step, a sum over completions."""
    reward = scored.rewards[:, 1]
    advantage = reward - baseline
    per_objective = torch.stack([torch.zeros_like(advantage), advantage], 1)
    numbers = [] if decisions is None else [NumberAdvantages(decisions, reward, advantage, 1, 1.0, all_action)]
    work = RolloutBatch(0, [], 1, samples, scored)
    work.advantages = Advantages(per_objective, sum_by_block(per_objective, [0, 1], [1.0, 1.0], 2), numbers)
    found = test_policy.gradients(policy, work, temperature=TEMPERATURE)
    # Of the mean loss, in which the tests' second block weighs 2.
    return torch.cat([found[name].flatten() for name, _ in policy.model.named_parameters()]) * -len(reward) / 2


@pytest.fixture
def proxies(monkeypatch):
    """compare_gradients that gives back what it would compare."""
    monkeypatch.setattr(bae.fidelity.gradients, "gradient_agreement", lambda proxy, *rest: proxy)
    return partial(compare_gradients, resamples=2)


def test_the_gradient_of_a_baseline_is_that_of_training(tiny, exact, proxies):
    pipeline, samples, scored, decisions = written(tiny)
    reward, rows = scored.rewards[:, 1], torch.arange(len(TEXTS))
    sketches = sketch_completions(pipeline, samples, scored.block_of == 1, rows, reward, decisions, exact)
    nothing = torch.zeros(3, exact)
    baseline, text = torch.linspace(-0.6, 0, len(TEXTS)), torch.linspace(-0.2, -0.9, len(TEXTS))
    expected = expected_reward(tiny.model, samples, decisions, TEMPERATURE, 3)
    assert expected.isnan().tolist() == [False] * 5 + [True, True, False]
    found = proxies(sketches | {"half_a": nothing, "half_b": nothing}, reward, expected,
                    {"plain": baseline, "rao_blackwell": expected}, {"rao_blackwell": text}, PROMPT)  # fmt: skip
    assert list(found) == ["plain", "rao_blackwell", ALL_ACTION]
    hand = {
        "plain": by_training(tiny, samples, scored, baseline, None),
        "rao_blackwell": by_training(tiny, samples, scored, text, decisions),
        ALL_ACTION: by_training(tiny, samples, scored, text, decisions, all_action=True),
    }
    for name, gradient in hand.items():
        assert gradient.abs().max() > 0.01 and found[name].shape == (3, exact)
        assert torch.allclose(found[name].sum(0), gradient, atol=1e-4, rtol=1e-3), name
    # A prompt's own is the sum of its completions'.
    own = ((reward - baseline).unsqueeze(1) * sketches["whole"])[PROMPT == 1].sum(0)
    torch.testing.assert_close(found["plain"][1], own)
    assert not torch.allclose(hand["rao_blackwell"], hand[ALL_ACTION], atol=1e-3)


def test_the_parts_of_a_completion(tiny, exact):
    """Chosen rows, in order; without decisions the text is all there is."""
    pipeline, samples, scored, decisions = written(tiny)
    sketch = partial(sketch_completions, pipeline, samples, scored.block_of == 1, reward=scored.rewards[:, 1])
    whole = sketch(torch.arange(len(TEXTS)), decisions=decisions, size=exact)
    some = sketch(torch.tensor([1, 5]), decisions=decisions, size=exact)
    for name in whole:
        torch.testing.assert_close(some[name], whole[name][[1, 5]])
    none = sketch(torch.tensor([1]), decisions=None, size=exact)
    torch.testing.assert_close(none["text"], none["whole"])
    torch.testing.assert_close(none["whole"], some["whole"][:1])
    assert not none["sampled"].any() and not none["every"].any()
    assert not some["sampled"][1].any() and some["sampled"][0].any()  # the second stops before any number
    assert sketch(torch.tensor([]).long(), decisions=decisions, size=5)["whole"].shape == (0, 5)


def test_what_is_kept_is_the_sketch_of_the_gradient(tiny, exact, monkeypatch):
    pipeline, samples, scored, decisions = written(tiny)
    arguments = pipeline, samples, scored.block_of == 1, torch.tensor([0, 1]), scored.rewards[:, 1], decisions
    whole = sketch_completions(*arguments, exact)
    monkeypatch.undo()
    for name, sketches in sketch_completions(*arguments, 64).items():
        torch.testing.assert_close(sketches, torch.stack([count_sketch(row, 64) for row in whole[name]]))


def continued(policy, rollouts=6):
    """Fresh ends of the second block, by a policy that knows no format; rewards are given by hand."""
    pipeline = make_pipeline(policy, temperature=TEMPERATURE)
    problems, samples, scored = by_hand(policy, [SOLUTION, "3", SOLUTION, WRONG])
    keys = [(5, n) for n in range(4)]
    again = resample(pipeline, problems, samples, scored.block_of, 1, rollouts, keys)
    assert again.rows.tolist() == [0, 2, 3]
    return pipeline, again


def with_rewards(again, rewards):
    scored = replace(again.scored, rewards=torch.stack([torch.zeros(rewards.numel()), rewards.flatten()], 1),
                     present=torch.ones(rewards.numel(), 2).bool())  # fmt: skip
    scored.present[:, 1] = ~rewards.flatten().isnan()
    return replace(again, scored=scored)


def reference(pipeline, again, size, micro_batch_tokens=30, group=(0, 2, 2)):
    return sketch_reference(pipeline, again, 1, 1, torch.tensor(group), 3, size, micro_batch_tokens)


def test_the_reference_judges_each_sample_against_the_others_of_its_half(tiny, exact):
    pipeline, again = continued(tiny)
    rewards = torch.tensor([[-0.1, -0.4, -0.4, 0, 0, 0], [-0.2, -0.2, -0.2, -0.9, -0.3, 0], [-1.0] * 6])
    half_a, half_b = reference(pipeline, with_rewards(again, rewards), exact)
    logits, ids = completion_logits(tiny.model, again.samples, torch.arange(18))
    log_p, _ = log_probs_and_entropy(logits, ids, TEMPERATURE)
    mask = (again.scored.block_of == 1)[:, : ids.shape[1]]
    mean = ((log_p * mask).sum(1) / mask.sum(1)).view(3, 6)
    # Against the mean of the two others: -.1 + .4, -.4 + .25, twice; where all are equal, nothing.
    weight = torch.tensor([0.3, -0.15, -0.15]) / 3
    hand = torch.autograd.grad((mean[0, :3] * weight).sum(), list(tiny.model.parameters()), retain_graph=True)
    torch.testing.assert_close(half_a[0], torch.cat([g.flatten() for g in hand]), atol=1e-5, rtol=1e-4)
    assert half_a[0].abs().max() > 1e-3
    assert not half_a[1:].any() and not half_b[0].any()  # the second problem has no prefix here
    weight = torch.tensor([-0.9 + 0.15, -0.3 + 0.45, 0.6]) / 3
    hand = torch.autograd.grad((mean[1, 3:] * weight).sum(), list(tiny.model.parameters()))
    torch.testing.assert_close(half_b[2], torch.cat([g.flatten() for g in hand]), atol=1e-5, rtol=1e-4)


def test_the_halves_of_the_reference_share_no_sample(tiny, exact):
    pipeline, again = continued(tiny)
    rewards = -torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    first = reference(pipeline, with_rewards(again, rewards), exact)
    rewards[:, 3:] = rewards[:, 3:].flip(1)
    second = reference(pipeline, with_rewards(again, rewards), exact, micro_batch_tokens=90)
    torch.testing.assert_close(first[0], second[0], atol=1e-6, rtol=1e-4)
    assert (first[1] - second[1]).abs().max() > 1e-3


def test_prompts_add_up(tiny, exact):
    pipeline, again = continued(tiny)
    again = with_rewards(again, -torch.rand(3, 6, generator=torch.Generator().manual_seed(0)))
    apart, together = reference(pipeline, again, exact, group=(0, 1, 2)), reference(pipeline, again, exact)
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(torch.stack([a[0], a[1] + a[2]]), b[[0, 2]], atol=1e-6, rtol=1e-4)


def test_samples_that_do_not_count_move_nothing(tiny, exact):
    pipeline, again = continued(tiny)
    rewards = torch.tensor([[-0.1, -0.4, torch.nan, torch.nan, torch.nan, -0.3]] + [[-1.0] * 6] * 2)
    half_a, half_b = reference(pipeline, with_rewards(again, rewards), exact)
    both = torch.tensor([[-0.1, -0.4, -0.4, 0, 0, 0]] + [[-1.0] * 6] * 2)
    counted, _ = reference(pipeline, with_rewards(again, both), exact)
    assert half_a[0].any() and not torch.allclose(half_a[0], counted[0])
    assert not half_b.any()  # one that counts has nothing to be compared with


def test_the_reference_is_the_gradient_of_the_expected_reward():
    """The policy that ships states one of a few numbers here, so that its expected reward is a finite sum."""
    policy = load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")
    schema = {"solution": ["reasoning", "answer", "analysis"], "confidence": ["confidence"]}
    pipeline = make_pipeline(policy, schema)
    prefix = SOLUTION + "<analysis>short</analysis>"
    problems, samples, _ = by_hand(policy, [prefix])
    scored = pipeline.scorer(problems, samples)
    again = resample(pipeline, problems, samples, scored.block_of, 1, 800, [(0, 0)])
    size = 1 << 14
    halves = sketch_reference(pipeline, again, 1, 1, torch.tensor([0]), 1, size, 100)
    a, b = halves[0][0], halves[1][0]

    stated = [prefix + f"<confidence>0.{k:02}</confidence>" for k in range(100)]
    problems, samples, _ = by_hand(policy, stated)
    scored = pipeline.scorer([problems[0]] * 100, samples)
    logits, ids = completion_logits(policy.model, samples, torch.arange(100))
    log_p, _ = log_probs_and_entropy(logits, ids, 1.0)
    mask = (scored.block_of == 1)[:, : ids.shape[1]]
    total = (log_p * mask).sum(1)
    assert total.exp().sum() > 0.999  # nearly all that it may write
    assert mask.sum(1).unique().numel() == 1  # so that the mean over the block's tokens is the sum, over their number
    reward = scored.rewards[:, 1]
    expected = (total.exp() * reward).sum() / total.exp().sum().detach()
    exact = torch.autograd.grad(expected / mask[0].sum(), [p for p in policy.model.parameters() if p.requires_grad])
    g = count_sketch(torch.cat([x.flatten() for x in exact]), size)
    norm = g @ g
    # The halves' errors are independent: their product is far smaller than either's square, which is noise.
    assert (a - g) @ (b - g) / norm == pytest.approx(0, abs=0.05)
    assert torch.cosine_similarity((a + b) / 2, g, dim=0) > 0.99

    # From all actions a single completion has nearly all of it, and from the one that was drawn hardly any.
    decisions = number_decisions(again.scored, pipeline.scorer, 1, Candidates(pipeline.scorer.vocabulary))
    rows = torch.arange(4)
    one = sketch_completions(
        pipeline, again.samples, again.scored.block_of == 1, rows, again.rewards(1).flatten(), decisions, size
    )
    assert (one["every"] @ g / norm).tolist() == pytest.approx([1.0] * 4, abs=0.01)
    assert torch.cosine_similarity(one["every"], g.unsqueeze(0)).min() > 0.999
    assert torch.cosine_similarity(one["sampled"], g.unsqueeze(0)).max() < 0.5


def test_with_ordinary_advantages_that_sum_to_zero_a_constant_gradient_cancels(proxies):
    """Sums over prompts: completions whose gradients are alike leave nothing under the mean of their stratum."""
    reward, prompt = torch.tensor([-0.1, -0.5, -0.9, -0.3]), torch.tensor([1, 1, 0, 1])
    alike = torch.ones(4, 3) * torch.tensor([1.0, 2.0, 3.0])
    sketches = dict.fromkeys(("whole", "text", "sampled", "every"), alike)
    sketches |= {name: torch.zeros(2, 3) for name in ("half_a", "half_b")}
    found = proxies(sketches, reward, torch.full((4,), torch.nan),
                    {"mean": torch.tensor([-0.3, -0.3, -0.4, -0.3]), "none": torch.zeros(4)}, {}, prompt)  # fmt: skip
    torch.testing.assert_close(found["mean"], torch.tensor([[-0.5], [0.0]]) * alike[:2])
    torch.testing.assert_close(found["none"], torch.tensor([[-0.9], [-0.9]]) * alike[:2])
