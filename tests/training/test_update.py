"""The training step: gradients that depend on what they should, and on nothing else."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import bae.training.update
from bae.batch import Advantages, RolloutBatch
from bae.method.losses import block_mean, constant_length, token_mean
from bae.method.stated_numbers import Decisions
from bae.objectives.rao_blackwell import NumberRefinement
from bae.training.forward import completion_logits, completion_pass
from bae.training.options import UpdateOptions
from bae.training.sketch import count_sketch
from bae.training.stepper import lr_share
from tests.support.updates import batch, make_update, rows_of

AGGREGATIONS = {
    "block_mean": block_mean,
    "token_mean": token_mean,
    "constant_length": partial(constant_length, length=7),
}
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS.values(), ids=AGGREGATIONS)


def gradients(policy, work, **options):
    """The update of one plain SGD step, which is the gradient."""
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    make_update(policy, **options).step(work)
    after = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    policy.model.load_state_dict(before, strict=False)
    return {name: (before[name] - after[name]) / 0.1 for name in before}


def assert_same(first, second, atol=1e-6):
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], atol=atol, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_aggregation
@pytest.mark.parametrize("tokens", [1, 22, 45])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_gradient_does_not_depend_on_the_micro_batch(tiny, tokens, entropy_coef, aggregation):
    work = batch(entropy_coef=entropy_coef)
    whole = gradients(tiny, work, aggregation=aggregation)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    assert_same(gradients(tiny, work, micro_batch_tokens=tokens, aggregation=aggregation), whole)


def test_every_aggregation_is_another_gradient(tiny):
    norms = [torch.cat([g.flatten() for g in gradients(tiny, batch(), aggregation=a).values()]).norm()
             for a in AGGREGATIONS.values()]  # fmt: skip
    assert len({round(float(norm), 3) for norm in norms}) == 3


def gradients_over_ranks(policy, parts, **options):
    """The mean over ranks of their gradients, and what each says of the whole. What ranks tell each other does not
    depend on what they are told: so one pass writes it down, a second gives each the means."""
    said = [[] for _ in parts]
    for mine, part in zip(said, parts, strict=True):
        gradients(policy, part, reduce=lambda value, mine=mine: (mine.append(value.double()), value)[1], **options)
        part.metrics = {}
    found = []
    for part in parts:
        means = iter([torch.stack(values).mean(0) for values in zip(*said, strict=True)])
        found.append(gradients(policy, part, reduce=lambda value, means=means: next(means), **options))
    return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}, [part.metrics for part in parts]


@every_aggregation
def test_gradient_does_not_depend_on_the_number_of_ranks(tiny, aggregation):
    work = batch(entropy_coef=0.3, seed=1)
    whole = gradients(tiny, work, aggregation=aggregation)
    parts = [rows_of(work, torch.arange(4)), rows_of(work, torch.arange(4, 8))]
    tokens = [[int((part.scored.block_of == k).sum()) for k in range(2)] for part in parts]
    assert tokens[0][0] != tokens[1][0] and tokens[0][1] != tokens[1][1]  # else a mean of means would do
    shared, metrics = gradients_over_ranks(tiny, parts, aggregation=aggregation)
    assert_same(shared, whole)
    for name in ("entropy", "clip_fraction"):
        assert metrics[0][name] == metrics[1][name] == pytest.approx(work.metrics[name])


@every_aggregation
def test_mini_batches_are_parts_of_the_whole(tiny, aggregation):
    """If the policy stood still, the mean of their gradients would be that of the batch."""
    work = batch()
    whole = gradients(tiny, work, aggregation=aggregation)
    made, seen = make_update(tiny, aggregation=aggregation, optimizer_steps=2), []

    def stand_still():
        seen.append({name: p.grad.clone() for name, p in tiny.model.named_parameters()})

    made.stepper.optimizer = SimpleNamespace(step=stand_still, zero_grad=tiny.model.zero_grad)
    made.stepper.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0], step=lambda: None)
    made.step(work)
    assert len(seen) == 2
    assert_same({name: (seen[0][name] + seen[1][name]) / 2 for name in whole}, whole)


@every_aggregation
def test_gradient_does_not_depend_on_padding(tiny, aggregation):
    work = batch()
    samples, scored = work.require_rollouts()
    wider = replace(
        samples,
        prompt_ids=torch.nn.functional.pad(samples.prompt_ids, (3, 0)),
        prompt_mask=torch.nn.functional.pad(samples.prompt_mask, (3, 0)),
        completion_ids=torch.nn.functional.pad(samples.completion_ids, (0, 5)),
        completion_mask=torch.nn.functional.pad(samples.completion_mask, (0, 5)),
    )
    padded = batch()
    padded.samples = wider
    padded.scored = replace(scored, block_of=torch.nn.functional.pad(scored.block_of, (0, 5), value=-1))
    assert_same(gradients(tiny, padded, aggregation=aggregation), gradients(tiny, work, aggregation=aggregation))


def test_what_stands_in_padding_does_not_matter(tiny):
    work, other = batch(entropy_coef=0.3), batch(entropy_coef=0.3)
    samples, _ = work.require_rollouts()
    junk = torch.randint(3, 25, samples.completion_ids.shape)
    other.samples = replace(
        samples,
        completion_ids=torch.where(samples.completion_mask, samples.completion_ids, junk),
        prompt_ids=torch.where(samples.prompt_mask, samples.prompt_ids, 7),
    )
    assert_same(gradients(tiny, other), gradients(tiny, work))


def with_numbers(work, all_action, seed=3):
    """The second block's objective has two decisions in the completions that are long enough, one in others."""
    g = torch.Generator().manual_seed(seed)
    samples, scored = work.require_rollouts()
    lengths, n = samples.completion_mask.sum(1), len(samples.completion_ids)
    position = torch.stack([torch.where(lengths > 4, lengths - 2, -1), torch.where(lengths > 4, lengths - 1, -1)], 1)
    position[scored.block_of.gather(1, position.clamp(min=0)) != 1] = -1
    position[::3, 1] = -1
    position = torch.where(position[:, :1] < 0, position.flip(1), position)  # a row's own come first
    value, reward, final = -torch.rand(n, 2, 5, generator=g), -torch.rand(n, generator=g), -torch.rand(n, generator=g)
    decisions = Decisions(position, value, torch.tensor([3, 7, 8, 11, 20]), -1.5, final)
    given = work.require_advantages()
    refinement = NumberRefinement(1, decisions, reward, given.per_objective[:, 1], scored.block_of == 1, all_action)
    per_block = given.per_block.clone()
    per_block[:, 1] = 0.7 * given.per_objective[:, 1] + 0.3  # another objective in the block, too
    work.advantages = Advantages(given.per_objective, per_block, [refinement], [1.0, 0.7], [0, 1])
    assert (position >= 0).sum(1).unique().tolist() == [0, 1, 2]
    return work


def gradients_by_loops(policy, work, temperature=0.8):
    """-sum of w_t A_t log pi_t in plain loops, with the advantages of numbers from their definition."""
    samples, scored = work.require_rollouts()
    (numbers,) = work.require_advantages().refinements
    d, weights = numbers.decisions, block_mean(scored.block_of, torch.tensor([1.0, 2.0]), torch.ones(2))
    loss = 0.0
    for n in range(len(samples.completion_ids)):
        logits, ids = completion_logits(policy.model, samples, torch.tensor([n]))
        log_p = torch.log_softmax(logits[0] / temperature, -1)
        places = [int(p) for p in d.position[n] if p >= 0]
        values = [sum(log_p[p, v].exp() * d.value[n, k, c] for c, v in enumerate(d.ids))
                  + (1 - sum(log_p[p, v].exp() for v in d.ids)) * d.other for k, p in enumerate(places)]  # fmt: skip
        for t, token in enumerate(ids[0, : int(samples.completion_mask[n].sum())]):
            block = int(scored.block_of[n, t])
            advantage = work.require_advantages().per_block[n, block]
            if block == 1 and places:
                mine, other = numbers.advantage[n], 0.3
                steps = [*values, d.final[n]]
                if t < places[0]:
                    mine = mine + steps[0] - numbers.reward[n]
                elif t in places:
                    k = places.index(t)
                    mine = steps[k + 1] - steps[k]
                    if numbers.all_action:
                        loss = loss - weights[n, t] * 0.7 * values[k]
                        mine = torch.zeros(())
                else:
                    mine = numbers.reward[n] - d.final[n]
                advantage = 0.7 * mine.detach() + other
            loss = loss - weights[n, t] * advantage * log_p[t, token]
    policy.model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    return found


@pytest.mark.parametrize("all_action", [False, True])
def test_numbers_have_advantages_of_their_own(tiny, all_action):
    work = with_numbers(batch(), all_action)
    whole = gradients(tiny, work)
    assert_same(gradients(tiny, with_numbers(batch(), all_action), micro_batch_tokens=25), whole)
    assert_same(gradients_by_loops(tiny, with_numbers(batch(), all_action)), whole, atol=1e-5)


def test_no_advantage_no_gradient(tiny):
    work = batch()
    work.advantages = Advantages(torch.zeros(8, 2), torch.zeros(8, 2))
    assert all(float(g.abs().max()) == 0 for g in gradients(tiny, work).values())


def test_the_first_ratio_is_exactly_one(tiny, monkeypatch):
    ratios = []
    real = bae.training.update.blockwise_clipped_loss

    def spy(log_p, old, *rest):
        ratios.append((log_p - old).exp().detach())
        return real(log_p, old, *rest)

    monkeypatch.setattr(bae.training.update, "blockwise_clipped_loss", spy)
    gradients(tiny, batch(), micro_batch_tokens=25)
    assert all(torch.equal(r, torch.ones_like(r)) for r in ratios)
    ratios.clear()
    gradients(tiny, batch(), micro_batch_tokens=20, optimizer_steps=2)
    assert all(torch.equal(r, torch.ones_like(r)) for r in ratios[:2])  # the first mini-batch
    assert not any(torch.equal(r, torch.ones_like(r)) for r in ratios[2:])  # the second is off-policy by one step


@pytest.mark.parametrize(("clip_high", "expected"), [(None, (0.2, 0.2)), (0.28, (0.2, 0.28))])
def test_the_upper_clip_is_the_lower_unless_given(tiny, monkeypatch, clip_high, expected):
    clips = []
    for name in ("blockwise_clipped_loss", "is_clipped"):
        real = getattr(bae.training.update, name)

        def spy(*arguments, real=real):
            clips.append(arguments[-2:])
            return real(*arguments)

        monkeypatch.setattr(bae.training.update, name, spy)
    gradients(tiny, batch(), clip_high=clip_high)
    assert clips == [expected] * 2


def flat(grads):
    return torch.cat([g.flatten() for g in grads.values()])


EVERYONE = torch.arange(8)


@every_aggregation
def test_gradients_of_blocks_are_those_of_the_others_advantages_taken_away(tiny, aggregation):
    work = batch(entropy_coef=0.3)
    found = make_update(tiny, aggregation=aggregation, micro_batch_tokens=25).block_gradients(work, EVERYONE, 0)
    assert found.shape == (2, sum(p.numel() for p in tiny.model.parameters()))
    for k in range(2):
        alone = batch()
        alone.require_advantages().per_block[:, 1 - k] = 0
        torch.testing.assert_close(
            found[k], flat(gradients(tiny, alone, aggregation=aggregation)), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("all_action", [False, True])
def test_gradients_of_blocks_have_those_of_numbers(tiny, all_action):
    work = with_numbers(batch(), all_action)
    made = make_update(tiny, micro_batch_tokens=40)
    found = made.block_gradients(work, EVERYONE, 0)
    torch.testing.assert_close(found.sum(0), flat(gradients_by_loops(tiny, work)), atol=1e-5, rtol=1e-5)
    plain = made.block_gradients(batch(), EVERYONE, 0)
    torch.testing.assert_close(found[0], plain[0], atol=1e-6, rtol=1e-5)  # the numbers are the second block's
    assert (found[1] - plain[1]).norm() > 0.1 * plain[1].norm()


def test_gradients_of_blocks_add_up_over_rows_and_can_be_sketched(tiny):
    work, made = batch(), make_update(tiny, optimizer_steps=2)
    rows = torch.tensor([5, 0, 3])
    part = made.block_gradients(work, rows, 0)
    rest = made.block_gradients(work, torch.tensor([1, 2, 4, 6, 7]), 0)
    whole = made.block_gradients(work, EVERYONE, 0)
    torch.testing.assert_close(part + rest, whole, atol=1e-6, rtol=1e-5)
    sketched = made.block_gradients(work, rows, 50)
    torch.testing.assert_close(sketched, torch.stack([count_sketch(g, 50) for g in part]), atol=1e-6, rtol=1e-4)


def test_gradients_of_blocks_leave_no_trace(tiny):
    work, made = batch(), make_update(tiny)
    made.block_gradients(work, EVERYONE, 50)
    assert all(p.grad is None for p in tiny.model.parameters()) and work.metrics == {} and work.seconds == {}
    for p in tiny.model.parameters():
        p.grad = torch.ones_like(p)
    made.block_gradients(work, EVERYONE, 50)
    assert all(bool((p.grad == 1).all()) for p in tiny.model.parameters())
    tiny.model.zero_grad()


def test_gradients_of_blocks_under_gradient_checkpointing(tiny):
    plain = make_update(tiny).block_gradients(batch(), EVERYONE, 0)
    tiny.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(make_update(tiny).block_gradients(batch(), EVERYONE, 0), plain, atol=1e-6, rtol=1e-5)


def test_metrics_of_the_update(tiny):
    work = batch()
    make_update(tiny, warmup_steps=4).step(work)
    assert work.metrics["clip_fraction"] == 0  # on-policy
    assert 0 < work.metrics["entropy"] < 3.6  # log of the vocabulary
    assert work.metrics["lr"] == pytest.approx(0.1 / 4)
    assert work.metrics["grad_norm"] > 0
    assert work.seconds["update"] > 0


def test_the_learning_rate_rises_and_falls():
    shares = [lr_share(step, total=8, warmup=2, final=0.4) for step in range(9)]
    assert shares == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4])  # a longer run stays at the end
    assert [lr_share(step, 3, 0, 1.0) for step in range(3)] == [1.0] * 3
    assert lr_share(5, total=4, warmup=10, final=0.0) == 0.6  # a run shorter than its warm-up


def test_the_norm_is_clipped(tiny):
    clipped = gradients(tiny, batch(), max_grad_norm=1e-3)
    norm = torch.cat([g.flatten() for g in clipped.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_reading_before_writing_is_explained():
    empty = RolloutBatch(0, [], 4)
    with pytest.raises(RuntimeError, match=r"put bae\.callbacks\.Rollouts before"):
        empty.require_rollouts()
    with pytest.raises(RuntimeError, match=r"put bae\.callbacks\.BlockwiseAdvantages after"):
        empty.require_advantages()


def told(work, policy, ratio):
    """The batch, sampled by an engine to which each token was 1/ratio as likely as to the policy."""
    seen = completion_pass(policy.model, work.samples, EVERYONE, 0.8)
    log_probs = torch.zeros(work.samples.completion_mask.shape)
    log_probs[:, : seen.log_p.shape[1]] = (seen.log_p - math.log(ratio)).detach()
    return replace(work, samples=replace(work.samples, log_probs=log_probs), metrics={}, seconds={})


@pytest.mark.parametrize(
    ("ratio", "cap", "factor"), [(1.0, 2.0, 1.0), (1.5, 2.0, 1.5), (3.0, 2.0, 2.0), (3.0, None, 1.0)]
)
@pytest.mark.parametrize("optimizer_steps", [1, 2])
def test_importance_weighs_tokens_up_to_the_cap(tiny, ratio, cap, factor, optimizer_steps):
    plain = gradients(tiny, batch(), optimizer_steps=optimizer_steps)
    work = told(batch(), tiny, ratio)
    weighted = gradients(tiny, work, optimizer_steps=optimizer_steps, importance_cap=cap)
    if optimizer_steps == 1 or factor == 1:
        assert_same(weighted, {name: factor * g for name, g in plain.items()}, atol=1e-5)
    else:  # the second step begins elsewhere
        assert any((weighted[name] - g).abs().max() > 1e-4 for name, g in plain.items())
    kl = ratio - 1 - math.log(ratio)
    assert work.metrics["mismatch_kl"] == pytest.approx(kl, abs=1e-5)
    assert work.metrics["mismatch_max"] == pytest.approx(math.log(ratio), abs=1e-5)
    assert work.metrics["mismatch_capped"] == float(cap is not None and ratio > cap)


def test_without_the_engines_word_there_is_no_mismatch(tiny):
    work = batch()
    gradients(tiny, work, importance_cap=2.0)
    assert not any(name.startswith("mismatch") for name in work.metrics)


def test_what_was_applied_is_written_back(tiny):
    """Of a refined objective the mean over its block's tokens; nothing changes for the others."""
    before = with_numbers(batch(), all_action=False)
    given, (refinement,) = before.require_advantages(), before.require_advantages().refinements
    forward = completion_pass(tiny.model, before.samples, EVERYONE, 0.8)
    change, _ = refinement.apply(forward, EVERYONE, torch.ones_like(forward.log_p))
    in_block = before.scored.block_of[:, : change.shape[1]] == 1
    mean = torch.stack([c[b].mean() if b.any() else torch.zeros(()) for c, b in zip(change, in_block, strict=True)])
    assert mean.abs().max() > 0.1
    make_update(tiny, micro_batch_tokens=25).step(before)
    applied = before.require_advantages()
    assert applied.per_objective[:, 0].equal(given.per_objective[:, 0])
    assert applied.per_block[:, 0].equal(given.per_block[:, 0])
    torch.testing.assert_close(applied.per_objective[:, 1], given.per_objective[:, 1] + mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(applied.per_block[:, 1], given.per_block[:, 1] + 0.7 * mean, atol=1e-5, rtol=1e-5)


def test_an_affine_refinement_is_what_is_asked_for(tiny):
    """The change of a refinement is affine in the advantage: what fidelity studies rely on."""
    work = with_numbers(batch(), all_action=True)
    (refinement,) = work.require_advantages().refinements
    forward = completion_pass(tiny.model, work.samples, EVERYONE, 0.8)
    weights = torch.rand_like(forward.log_p)
    at = [refinement.apply(forward, EVERYONE, weights) for refinement in (
        replace(refinement, advantage=torch.full((8,), a)) for a in (0.0, 1.0, 3.0))]  # fmt: skip
    torch.testing.assert_close(at[2][0], at[0][0] + 3 * (at[1][0] - at[0][0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at[2][1], at[0][1])


def test_values_that_cannot_work_are_refused():
    good = {"clip": 0.2, "max_grad_norm": 1.0, "warmup_steps": 0, "micro_batch_tokens": 10}
    UpdateOptions(**good)
    nan = math.nan
    for name, values in {
        "clip": (0, 1, -0.1, nan), "clip_high": (0, -1, nan, math.inf), "max_grad_norm": (0, -1, nan),
        "warmup_steps": (-1,), "final_lr": (-0.1, 1.1, nan), "micro_batch_tokens": (0,), "optimizer_steps": (0, -2),
        "importance_cap": (0, nan, math.inf), "kl_coef": (-1, nan, math.inf), "kl_estimator": ("k4", ""),
    }.items():  # fmt: skip
        for value in values:
            with pytest.raises(ValueError, match=rf"^training\.{name}="):
                UpdateOptions(**good | {name: value})
