"""Gradients of baselines from sketches are those of training; the reference is the gradient where that is known."""

from dataclasses import dataclass, replace

import pytest
import torch

import bae.fidelity.gradients
from bae.batch import Advantages, RolloutBatch
from bae.fidelity.continuations import resample
from bae.fidelity.gradients import prompt_gradients, sketch_completions, sketch_reference
from bae.method.advantages import sum_by_block
from bae.method.baselines import leave_one_out
from bae.method.losses import log_probs_and_entropy
from bae.method.stated_numbers import Candidates
from bae.objectives.rao_blackwell import RaoBlackwell
from bae.objectives.refining import Ranks, RefiningBaseline
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


@dataclass(frozen=True)
class Ramp:
    """Halve the advantage of each token, give later tokens more, and raise the log-probability of the block's first."""

    objective: int
    advantage: torch.Tensor
    in_block: torch.Tensor

    @property
    def unrefined(self):
        return ~self.in_block.any(1)

    def apply(self, forward, rows, weights):
        in_block = self.in_block[rows, : forward.log_p.shape[1]]
        ramp = 0.1 * torch.arange(in_block.shape[1]) - 0.5 * self.advantage[rows].unsqueeze(1)
        first = in_block.int().argmax(1, keepdim=True)
        gain = 0.7 * (weights.gather(1, first) * forward.log_p.gather(1, first)).sum()
        return ramp * in_block, gain


class Ramped:
    """A refining baseline that the project does not know."""

    def __call__(self, rewards):
        return torch.zeros_like(rewards.reward)

    def check(self, scorer, optimizer_steps=1):
        pass

    def refine(self, j, advantage, scored, scorer, ranks):
        return Ramp(j, advantage, scored.block_of == scorer.block_of_objective[j])


REFINING = {
    "rao_blackwell": RaoBlackwell(leave_one_out),
    "all_action": RaoBlackwell(leave_one_out, all_action=True),
    "ramped": Ramped(),
}


def refine(baseline, scored, scorer, advantage):
    return baseline.refine(1, advantage, scored, scorer, Ranks())


def pairs(scored, scorer):
    """What each refining baseline makes of advantages 0 and 1."""
    ones = torch.ones(len(scored.completions))
    return {
        name: (refine(b, scored, scorer, 0 * ones), refine(b, scored, scorer, ones)) for name, b in REFINING.items()
    }


def by_training(policy, samples, scored, advantage, refinement=None):
    """The gradient of the second block of one training step, a sum over completions."""
    per_objective = torch.stack([torch.zeros_like(advantage), advantage], 1)
    work = RolloutBatch(0, [], 1, samples, scored)
    work.advantages = Advantages(
        per_objective,
        sum_by_block(per_objective, [0, 1], [1.0, 1.0], 2),
        refinements=[refinement] if refinement else [],
        weights=[1.0, 1.0],
        block_of_objective=[0, 1],
    )
    found = test_policy.gradients(policy, work, temperature=TEMPERATURE)
    # Of the mean loss, in which the tests' second block weighs 2.
    return torch.cat([found[name].flatten() for name, _ in policy.model.named_parameters()]) * -len(advantage) / 2


def test_the_gradient_of_a_baseline_is_that_of_training(tiny, exact):
    pipeline, samples, scored, _ = written(tiny)
    assert all(isinstance(baseline, RefiningBaseline) for baseline in REFINING.values())
    in_block, rows = scored.block_of == 1, torch.arange(len(TEXTS))
    sketches = sketch_completions(pipeline, samples, in_block, rows, pairs(scored, pipeline.scorer), exact)
    sketches |= {"half_a": torch.zeros(3, exact), "half_b": torch.zeros(3, exact)}
    advantage = scored.rewards[:, 1] - torch.linspace(-0.2, -0.9, len(TEXTS))
    hand = {None: by_training(tiny, samples, scored, advantage)}
    for name, baseline in REFINING.items():
        refinement = refine(baseline, scored, pipeline.scorer, advantage)
        hand[name] = by_training(tiny, samples, scored, advantage, refinement)
    for name, gradient in hand.items():
        found = prompt_gradients(sketches, advantage, PROMPT, name)
        assert gradient.abs().max() > 0.01 and found.shape == (3, exact)
        assert torch.allclose(found.sum(0), gradient, atol=1e-4, rtol=1e-3), name
    found = list(hand.values())
    for i, one in enumerate(found):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in found[i + 1 :])
    # A prompt's own is the sum of its completions'.
    own = (advantage.unsqueeze(1) * sketches["whole"])[PROMPT == 1].sum(0)
    torch.testing.assert_close(prompt_gradients(sketches, advantage, PROMPT)[1], own)


def test_the_parts_of_a_completion(tiny, exact):
    """Chosen rows, in order; without anything to refine, the advantage is that of the whole block."""
    pipeline, samples, scored, _ = written(tiny)
    refinements = pairs(scored, pipeline.scorer)

    def sketch(rows, refinements=refinements, size=exact):
        rows = torch.tensor(rows, dtype=torch.long)
        return sketch_completions(pipeline, samples, scored.block_of == 1, rows, refinements, size)

    whole, some = sketch(list(range(len(TEXTS)))), sketch([1, 5])
    assert list(whole) == ["whole", *(f"{name}/{a}" for name in REFINING for a in (0, 1))]
    for name in whole:
        torch.testing.assert_close(some[name], whole[name][[1, 5]])
    nothing = sketch([1], {"none": (None, None)})
    torch.testing.assert_close(nothing["none/1"], nothing["whole"])
    torch.testing.assert_close(nothing["whole"], some["whole"][:1])
    assert not nothing["none/0"].any()
    for name in ("rao_blackwell", "all_action"):  # the second stops before any number
        assert some[f"{name}/0"][0].any() and not some[f"{name}/0"][1].any()
        torch.testing.assert_close(some[f"{name}/1"][1], some["whole"][1])
        # What the advantage is multiplied with is the text before the number.
        text = some[f"{name}/1"][0] - some[f"{name}/0"][0]
        torch.testing.assert_close(text, before_the_number(tiny, samples, scored, 1), atol=1e-5, rtol=1e-4)
    assert sketch([], size=5)["rao_blackwell/1"].shape == (0, 5)


def before_the_number(policy, samples, scored, n):
    """The gradient of the log-probability of the block's text before the first decision, over the block's tokens."""
    logits, ids = completion_logits(policy.model, samples, torch.tensor([n]))
    log_p, _ = log_probs_and_entropy(logits, ids, TEMPERATURE)
    pipeline = make_pipeline(policy, temperature=TEMPERATURE)
    decisions = number_decisions(scored, pipeline.scorer, 1, Candidates(pipeline.scorer.vocabulary))
    mask = (scored.block_of == 1)[n, : ids.shape[1]]
    text = mask & (torch.arange(len(mask)) < decisions.position[n, 0])
    total = (log_p[0] * text).sum() / mask.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.model.parameters()))])


def test_what_is_kept_is_the_sketch_of_the_gradient(tiny, exact, monkeypatch):
    pipeline, samples, scored, _ = written(tiny)
    arguments = pipeline, samples, scored.block_of == 1, torch.tensor([0, 1]), pairs(scored, pipeline.scorer)
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
    in_block = again.scored.block_of == 1
    made = sketch_completions(pipeline, again.samples, in_block, rows, pairs(again.scored, pipeline.scorer), size)
    made["half_a"] = torch.zeros(4, size)
    # With the expectation as the baseline, the text before the number has no advantage.
    expected = expected_reward(policy.model, again.samples, decisions, 1.0, 100)
    advantage = (again.rewards(1).flatten() - expected)[rows]
    every, drawn = (prompt_gradients(made, advantage, rows, name) for name in ("all_action", "rao_blackwell"))
    assert (every @ g / norm).tolist() == pytest.approx([1.0] * 4, abs=0.01)
    assert torch.cosine_similarity(every, g.unsqueeze(0)).min() > 0.999
    assert torch.cosine_similarity(drawn, g.unsqueeze(0)).max() < 0.5


def test_with_ordinary_advantages_that_sum_to_zero_a_constant_gradient_cancels():
    """Sums over prompts: completions whose gradients are alike leave nothing under the mean of their stratum."""
    reward, prompt = torch.tensor([-0.1, -0.5, -0.9, -0.3]), torch.tensor([1, 1, 0, 1])
    alike = torch.ones(4, 3) * torch.tensor([1.0, 2.0, 3.0])
    sketches = {"whole": alike, "half_a": torch.zeros(2, 3)}
    mean = prompt_gradients(sketches, reward - torch.tensor([-0.3, -0.3, -0.4, -0.3]), prompt)
    torch.testing.assert_close(mean, torch.tensor([[-0.5], [0.0]]) * alike[:2])
    torch.testing.assert_close(prompt_gradients(sketches, reward, prompt), torch.tensor([[-0.9], [-0.9]]) * alike[:2])


def test_the_gradient_of_a_refining_baseline_is_affine_in_the_advantage():
    g = torch.Generator().manual_seed(0)
    zero, one, whole = torch.randn(3, 4, 5, generator=g)
    sketches = {"whole": whole, "mine/0": zero, "mine/1": one, "half_a": torch.zeros(4, 5)}
    advantage = torch.tensor([0.0, 1.0, -2.0, 0.5])
    found = prompt_gradients(sketches, advantage, torch.arange(4), "mine")
    torch.testing.assert_close(found, torch.stack([zero[0], one[1], 3 * zero[2] - 2 * one[2], (zero[3] + one[3]) / 2]))
