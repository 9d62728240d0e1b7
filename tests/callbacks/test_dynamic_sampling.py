"""Groups without signal give way to others: which ones, for whom, and the same each time."""

import shutil
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.batch import Problem, RolloutBatch, SampledTokens, concatenate, rows_of
from bae.callbacks import BlockwiseAdvantages, DynamicSampling, Rollouts, dynamic_sampling
from bae.callbacks.dynamic_sampling import chosen_groups
from bae.commands import train
from bae.demonstrations.tiny import make_tokenizer
from bae.method import normalisation
from bae.method.baselines import group_mean, outcome_conditioned, without_self
from bae.objectives.outcomes import answer_length, given_reward
from bae.rollout.interface import pad_left
from bae.tasks.loader import PromptLoader, problem_indices
from bae.training.policy import load_pretrained
from tests.fidelity.test_continuations import SOLUTION, TASK, by_hand, make_pipeline
from tests.support import call, runs

TOKENIZER = make_tokenizer()
WRONG = SOLUTION.replace("<answer>3", "<answer>4")


@pytest.fixture(scope="module")
def warm():
    return load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")


def confident(solution, q):
    return f"{solution}<analysis></analysis><confidence>{q}</confidence>"


def alone(rank=0, world=1):
    """A trainer; with several ranks, the others have groups like its own."""
    like_mine = SimpleNamespace(root_device="cpu", all_gather=lambda mine: mine.expand(world, *mine.shape))
    return SimpleNamespace(world_size=world, global_rank=rank, strategy=like_mine)


# Which groups.


@pytest.mark.parametrize(
    ("signal", "count", "chosen"),
    [
        ("++", 2, [0, 1]),
        ("+-", 2, [0, 1]),
        ("--", 2, [0, 1]),
        ("-+--", 2, [0, 1]),  # nothing better is there
        ("-+-+", 2, [1, 3]),
        ("-++", 2, [1, 2]),
        ("+-++", 2, [0, 2]),  # of more than are needed, the first
        ("---+", 3, [0, 1, 3]),
        ("+--+", 1, [0]),
        ("-", 1, [0]),
    ],
)
def test_chosen_groups_by_hand(signal, count, chosen):
    assert chosen_groups(torch.tensor([sign == "+" for sign in signal]), count).tolist() == chosen


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.data())
def test_chosen_groups(signal, data):
    count = data.draw(st.integers(1, len(signal)))
    chosen = chosen_groups(torch.tensor(signal), count).tolist()
    assert len(chosen) == count and chosen == sorted(set(chosen))
    useful = [p for p, flag in enumerate(signal) if flag]
    assert [p for p in chosen if signal[p]] == useful[:count]
    # Those without signal are there only for want of others, and are the first such.
    idle = [p for p in chosen if not signal[p]]
    assert idle == [p for p, flag in enumerate(signal) if not flag][: max(0, count - len(useful))]
    if sum(signal[:count]) == count:
        assert chosen == list(range(count))


# Which rank has them.


@pytest.mark.parametrize(
    ("chosen", "taken"),
    [
        ([0, 1, 2, 3], [["a0", "a1"], ["b0", "b1"]]),  # nothing was replaced
        ([0, 1, 2, 7], [["a0", "a1"], ["b0", "B1"]]),  # by its own
        ([0, 1, 2, 5], [["a0", "a1"], ["b0", "A1"]]),  # one travels
        ([2, 3, 6, 7], [["B0", "B1"], ["b0", "b1"]]),
        ([0, 4, 5, 6], [["a0", "A0"], ["B0", "A1"]]),
    ],
)
def test_ranks_exchange_groups_by_hand(monkeypatch, chosen, taken):
    """Two ranks a and b of two groups; capitals are those of the second round."""
    sampled, said = [["a0", "a1", "A0", "A1"], ["b0", "b1", "B0", "B1"]], []
    monkeypatch.setattr(dynamic_sampling, "gather_objects", lambda trainer, mine: said.append(mine) or [mine])

    def exchange(rank):
        return dynamic_sampling.exchanged(alone(rank, 2), sampled[rank], torch.tensor(chosen), 2)

    for rank in (0, 1):
        exchange(rank)
    monkeypatch.setattr(dynamic_sampling, "gather_objects", lambda trainer, mine: said)
    assert [exchange(rank) for rank in (0, 1)] == taken
    assert len(said) in (0, 2)  # either both ranks speak or none


# Parts of batches.


def part(policy, rows, prompt):
    """Scores of texts; every field of both records differs from row to row, so that a mixed-up row shows."""
    _, samples, scored = by_hand(policy, rows)
    ids, mask = pad_left([policy.encode("", prompt)] * len(rows), policy.tokenizer.pad_token_id)
    log_probs = torch.randn(samples.completion_ids.shape).masked_fill(~samples.completion_mask, 0)
    return replace(samples, prompt_ids=ids, prompt_mask=mask, log_probs=log_probs), scored


def assert_same(one, other):
    for record, its in ((one[0], other[0]), (one[1], other[1])):
        for f in fields(record):
            first, second = getattr(record, f.name), getattr(its, f.name)
            if isinstance(first, torch.Tensor):
                assert first.dtype == second.dtype and first.equal(second), f.name
            else:
                assert first == second is None or list(first) == list(second), f.name


SHORT = ["", "3"]
LONG = [confident(SOLUTION, 0.5), WRONG, confident(WRONG, 1.7)]


@pytest.mark.parametrize(("prompts", "order"), [(("1+2=", "10+2="), 1), (("10+20-7=", "1+2="), -1)])
def test_parts_are_padded_to_the_widest(tiny, prompts, order):
    parts = [part(tiny, *each) for each in zip((SHORT, LONG), prompts, strict=True)][::order]
    samples, scored = concatenate(parts, tiny.tokenizer.pad_token_id)
    total, wide = 5, max(s.completion_ids.shape[1] for s, _ in parts)
    assert samples.completion_ids.shape == samples.completion_mask.shape == scored.block_of.shape == (total, wide)
    assert samples.prompt_ids.shape == samples.prompt_mask.shape
    at = 0
    for mine, its in parts:
        rows = slice(at, at + len(mine.ended))
        at = rows.stop
        prompt, width = mine.prompt_ids.shape[1], mine.completion_ids.shape[1]
        assert samples.prompt_ids[rows, -prompt:].equal(mine.prompt_ids)  # padded on the left
        assert not samples.prompt_mask[rows, :-prompt].any() and samples.prompt_mask[rows, -prompt:].equal(
            mine.prompt_mask
        )
        assert samples.completion_ids[rows, :width].equal(mine.completion_ids)
        assert samples.completion_mask[rows, :width].equal(mine.completion_mask)
        assert not samples.completion_mask[rows, width:].any()
        assert (samples.completion_ids[rows, width:] == tiny.tokenizer.pad_token_id).all()
        assert scored.block_of[rows, :width].equal(its.block_of) and (scored.block_of[rows, width:] == -1).all()
        assert scored.completions[rows] == its.completions
    assert samples.completion_mask.dtype == samples.prompt_mask.dtype == torch.bool
    assert (scored.block_of >= 0).equal(samples.completion_mask)
    assert len(scored.numbers) == len(scored.completions) == len(scored.rewards) == total


def test_parts_of_parts_are_the_parts(tiny):
    """What is put together and taken apart again is what it was, but for the padding."""
    parts = [part(tiny, SHORT, "1+2="), part(tiny, LONG, "1+2=")]
    whole = concatenate(parts, tiny.tokenizer.pad_token_id)
    for wanted, rows in zip(parts, ([0, 1], [2, 3, 4]), strict=True):
        samples, scored = rows_of(*whole, torch.tensor(rows))
        width = wanted[0].completion_ids.shape[1]
        narrow = replace(samples, completion_ids=samples.completion_ids[:, :width],
                         completion_mask=samples.completion_mask[:, :width],
                         log_probs=samples.log_probs[:, :width])  # fmt: skip
        assert_same((narrow, replace(scored, block_of=scored.block_of[:, :width])), wanted)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_rows_in_any_order(rows):
    policy = SimpleNamespace(tokenizer=TOKENIZER, encode=lambda system, question: TOKENIZER(question)["input_ids"])
    parts = [part(policy, SHORT, "1+2="), part(policy, LONG, "10+20=")]
    whole = concatenate(parts, TOKENIZER.pad_token_id)
    samples, scored = rows_of(*whole, torch.tensor(rows))
    one_by_one = [rows_of(*whole, torch.tensor([row])) for row in rows]
    assert_same((samples, scored), concatenate(one_by_one, TOKENIZER.pad_token_id))
    assert [c.text for c in scored.completions] == [whole[1].completions[row].text for row in rows]
    assert_same(rows_of(*whole, torch.arange(5)), whole)


# Whole batches, written by hand.


class Written:
    """An engine that writes for each question what it is told."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.keys = tokenizer, texts, []

    def sample(self, model, request):
        self.keys += request.keys
        rows = []
        for prompt in request.prompts:
            texts = self.texts[self.tokenizer.decode(prompt)]
            assert len(texts) == request.group_size
            rows += [[*self.tokenizer(text)["input_ids"], request.eos_token_id] for text in texts]
        length = torch.tensor([[len(row)] for row in rows])
        ids = torch.tensor([row + [request.pad_token_id] * (int(length.max()) - len(row)) for row in rows])
        mask = torch.arange(ids.shape[1]) < length
        return SampledTokens(*request.padded_prompts(), ids, mask, torch.ones(len(ids)).bool())


SURE, UNSURE = 0.9, 0.5
GROUPS = {  # of two completions: what they say, and whether that has signal under each policy for malformed output
    "alike": [confident(SOLUTION, SURE)] * 2,
    "alike and wrong": [confident(WRONG, SURE)] * 2,
    "empty": ["", ""],
    "two confidences": [confident(SOLUTION, SURE), confident(SOLUTION, UNSURE)],
    "two confidences in a wrong answer": [confident(WRONG, SURE), confident(WRONG, UNSURE)],
    "right and wrong": [confident(SOLUTION, SURE), confident(WRONG, SURE)],
    "right and wrong, else alike": [confident(SOLUTION, SURE), confident(WRONG, UNSURE)],
    "one stops": [confident(SOLUTION, SURE), SOLUTION],
    "one is empty": [confident(SOLUTION, SURE), ""],
    "one is empty, one wrong": [confident(WRONG, SURE), ""],
}
WITHOUT = {"alike", "alike and wrong", "empty", "one is empty, one wrong"}  # what is empty earns as what is wrong
MASKED = {"one stops", "one is empty"}  # under `mask` one completion alone is left, and compared with itself


def batch_of(pipeline, names, further=(), step=0, group_size=2, rank=0, world=1):
    """A rolled-out batch of these questions; further: those of each round."""
    ask = lambda questions: [Problem(f"{n}:{q}", q, "3") for n, q in enumerate(questions)]  # noqa: E731
    asked = []

    def more(number):
        asked.append(number)
        return ask(further[number - 1])

    batch = RolloutBatch(step, ask(names), group_size, further=more)
    Rollouts(pipeline, seed=0).on_train_batch_start(alone(rank, world), None, batch, 0)
    return batch, asked


def questions(names):
    """A question for each name: what the policy can read."""
    return {name: f"{n + 10}+1=" for n, name in enumerate(names)}


def sampling(policy, names, further=(), rounds=1, malformed="penalise", outcome=given_reward, groups=GROUPS, **options):
    asks = questions(groups)
    engine = Written(policy.tokenizer, {asks[name]: texts for name, texts in groups.items()})
    pipeline = make_pipeline(policy, engine=engine, malformed=malformed)
    batch, asked = batch_of(
        pipeline, [asks[n] for n in names], [[asks[n] for n in names] for names in further], **options
    )
    before = batch.require_rollouts()
    trainer = alone(options.get("rank", 0), options.get("world", 1))
    DynamicSampling(pipeline, outcome, rounds, seed=0).on_train_batch_start(trainer, None, batch, 0)
    back = {question: name for name, question in asks.items()}
    return SimpleNamespace(batch=batch, asked=asked, engine=engine, before=before, pipeline=pipeline,
                           names=[back[problem.question] for problem in batch.problems])  # fmt: skip


@pytest.mark.parametrize("malformed", ["penalise", "mask"])
@pytest.mark.parametrize("name", GROUPS)
def test_only_groups_without_signal_are_replaced(tiny, name, malformed):
    made = sampling(tiny, [name], [["two confidences"]], malformed=malformed)
    idle = name in WITHOUT or (malformed == "mask" and name in MASKED)
    assert made.names == (["two confidences"] if idle else [name])
    assert made.batch.metrics == {"sampling_rounds": 1.0 + idle, "groups_replaced": float(idle)}
    assert made.asked == [1] * idle


def test_signal_is_what_the_baseline_leaves(tiny):
    """No signal: with the outcome's own mean as the baseline, every advantage of the group is zero, in all blocks."""
    for name in GROUPS:
        made = sampling(tiny, [name], rounds=0)
        plain = {"objective": normalisation.none, "block": normalisation.none}
        weigh = BlockwiseAdvantages(
            made.pipeline, outcome_conditioned, group_mean, without_self, given_reward, plain, 0
        )
        weigh.on_train_batch_start(alone(), None, made.batch, 0)
        assert bool(made.batch.require_advantages().per_block.any()) == (name not in WITHOUT), name


def test_a_reward_that_differs_between_outcomes_alone(tiny):
    """It has no signal of its own, but what the outcome is made of has; unless that is no objective's reward."""
    between = {"long": [confident(SOLUTION, SURE), confident(SOLUTION.replace("<answer>3", "<answer>03"), UNSURE)]}
    groups = GROUPS | between
    kept = sampling(tiny, ["long"], [["two confidences"]], groups=groups)
    by_length = partial(answer_length, edges=[2])
    gone = sampling(tiny, ["long"], [["two confidences"]], groups=groups, outcome=by_length)
    assert (kept.names, gone.names) == (["long"], ["two confidences"])
    assert sampling(tiny, ["right and wrong"], [["alike"]], outcome=by_length).names == ["right and wrong"]


def test_a_batch_by_hand(tiny):
    made = sampling(tiny, ["alike", "two confidences", "empty"], [["one stops", "alike and wrong", "right and wrong"]])
    assert made.names == ["two confidences", "one stops", "right and wrong"]
    assert made.batch.metrics == {"sampling_rounds": 2.0, "groups_replaced": pytest.approx(2 / 3)}
    samples, scored = made.batch.require_rollouts()
    assert [c.text for c in scored.completions] == [text for name in made.names for text in GROUPS[name]]
    assert [c.problem for c in scored.completions] == [p for p in made.batch.problems for _ in range(2)]
    tokenizer = tiny.tokenizer
    asks = questions(GROUPS)
    for n, completion in enumerate(scored.completions):
        prompt = samples.prompt_ids[n][samples.prompt_mask[n]]
        assert tokenizer.decode(prompt) == asks[made.names[n // 2]] == completion.problem.question
        written = samples.completion_ids[n][samples.completion_mask[n]]
        assert tokenizer.decode(written) == completion.text + "<|end|>"
    again = made.pipeline.scorer([c.problem for c in scored.completions], samples)
    assert_same((samples, scored), (samples, replace(again, block_of=scored.block_of)))
    assert again.block_of.equal(scored.block_of)


def test_rounds_end_when_all_is_well(tiny):
    useful, idle = ["two confidences", "right and wrong"], ["alike", "empty"]
    none = sampling(tiny, useful, rounds=3)
    assert none.asked == [] and none.batch.metrics == {"sampling_rounds": 1.0, "groups_replaced": 0.0}
    assert_same(none.batch.require_rollouts(), none.before)
    second = sampling(tiny, idle, [["alike", "one stops"], useful, useful], rounds=3)
    assert second.asked == [1, 2] and second.names == ["one stops", "two confidences"]
    assert second.batch.metrics == {"sampling_rounds": 3.0, "groups_replaced": 1.0}
    at_most = sampling(tiny, idle, [["alike", "one stops"], useful, useful], rounds=1)
    assert at_most.asked == [1] and at_most.names == ["alike", "one stops"]  # what cannot be replaced stays
    never = sampling(tiny, idle, [idle, idle], rounds=2)
    assert never.names == idle and never.batch.metrics == {"sampling_rounds": 3.0, "groups_replaced": 0.0}
    assert [p.id[0] for p in never.batch.problems] == ["0", "1"]
    width = never.before[0].completion_ids.shape[1]
    assert never.batch.require_rollouts()[0].completion_ids[:, :width].equal(never.before[0].completion_ids)


def test_no_rounds_leave_the_batch_alone(tiny):
    made = sampling(tiny, ["alike", "empty"], rounds=0)
    assert made.batch.require_rollouts()[0] is made.before[0] and made.batch.require_rollouts()[1] is made.before[1]
    assert made.batch.metrics == {} and made.asked == [] and made.names == ["alike", "empty"]
    with pytest.raises(ValueError, match=r"^callbacks\.dynamic_sampling\.rounds=-1: must not be negative$"):
        DynamicSampling(made.pipeline, given_reward, -1, 0)


def test_what_is_missing_is_said(tiny):
    pipeline = make_pipeline(tiny, limit=4)
    callback = DynamicSampling(pipeline, given_reward, 1, 0)
    with pytest.raises(RuntimeError, match="no rollouts"):
        callback.on_train_batch_start(alone(), None, RolloutBatch(0, [TASK.problem("val", 0)], 2), 0)
    batch = RolloutBatch(0, [TASK.problem("val", 0)], 2)
    Rollouts(pipeline, 0).on_train_batch_start(alone(), None, batch, 0)  # four tokens are too few for any block
    with pytest.raises(RuntimeError, match="no further problems"):
        callback.on_train_batch_start(alone(), None, batch, 0)


def test_no_draw_is_used_twice(tiny):
    """Over two ranks, two steps and three rounds; the first is that of Rollouts."""
    keys = []
    for step in (0, 1):
        for rank in (0, 1):
            made = sampling(tiny, ["alike", "empty"], [["alike", "empty"]] * 3, rounds=3, step=step, rank=rank, world=2)
            keys += made.engine.keys
    assert len(keys) == len(set(keys)) == 2 * 2 * 4 * 2
    draws = {tuple(torch.tensor(key).tolist()) for key in keys}
    assert len(draws) == len(keys) and all(len(key) == 3 for key in keys)
    assert sorted(key[2] for key in keys if key[1] == 0) == list(range(16))


def test_seconds_add_up(tiny):
    made = sampling(tiny, ["alike"], [["alike"], ["alike"]], rounds=2)
    assert set(made.batch.seconds) == {"rollout", "reward"}
    once = sampling(tiny, ["alike"], rounds=0)
    pipeline = once.pipeline
    slow = lambda *a: (*pipeline(*a)[:2], {"rollout": 100.0, "reward": 10.0})  # noqa: E731
    callback = DynamicSampling(pipeline, given_reward, 2, 0)
    callback.pipeline = Slow(pipeline, slow)
    once.batch.further = lambda number: once.batch.problems
    callback.on_train_batch_start(alone(), None, once.batch, 0)
    assert once.batch.seconds["rollout"] == pytest.approx(200, abs=5)
    assert once.batch.seconds["reward"] == pytest.approx(20, abs=5)


class Slow:
    """A pipeline that says how long it took."""

    def __init__(self, pipeline, call):
        self.policy, self.scorer, self.call = pipeline.policy, pipeline.scorer, call

    def __call__(self, *arguments):
        return self.call(*arguments)


def test_ranks_and_groups_of_three(tiny):
    """The share of a rank is whole groups of whatever size."""
    three = {"alike": GROUPS["alike"] * 2, "mixed": [confident(SOLUTION, q) for q in (0.1, 0.1, 0.1, 0.2)]}
    made = sampling(tiny, ["alike", "mixed", "alike"], [["mixed", "alike", "mixed"]], groups=three, group_size=4)
    assert made.names == ["mixed", "mixed", "mixed"]
    assert [c.confidence for c in made.batch.require_rollouts()[1].completions] == [0.1, 0.1, 0.1, 0.2] * 3


# A policy that samples, and problems that a task has.


def loader(rank=0, world=1, prompts=4, seed=0, steps=3):
    return PromptLoader(TASK, "val", steps, prompts, 2, seed, rank, world)


def drawn(policy, batch, seed=0, rounds=2):
    pipeline = make_pipeline(policy, temperature=0.5)  # so that groups agree
    Rollouts(pipeline, seed).on_train_batch_start(alone(), None, batch, 0)
    DynamicSampling(pipeline, given_reward, rounds, seed).on_train_batch_start(alone(), None, batch, 0)
    return batch


def test_the_same_seed_and_step_draw_the_same(warm):
    first = [drawn(warm, batch) for batch in loader()]
    resumed = loader()
    resumed.load_state_dict({"next_step": 1})
    again = [drawn(warm, batch) for batch in resumed]
    assert any(batch.metrics["groups_replaced"] > 0 for batch in first)
    for one, other in zip(first[1:], again, strict=True):
        assert one.problems == other.problems and one.metrics == other.metrics
        assert_same(one.require_rollouts(), other.require_rollouts())
    other_seed = [drawn(warm, batch, seed=1) for batch in loader()]
    assert [b.problems for b in other_seed] != [b.problems for b in first]
    for batch in first:
        assert len(batch.problems) == 4 and len(batch.require_rollouts()[1].completions) == 8
        assert [c.problem for c in batch.require_rollouts()[1].completions[::2]] == batch.problems


def test_further_problems_differ_by_round_and_step():
    batches = list(loader(prompts=8))
    draws = [tuple(p.id for p in batch.further_problems(number)) for batch in batches for number in (1, 2, 3)]
    assert len(set(draws)) == len(draws) == 9
    ordered = {tuple(p.id for p in batch.problems) for batch in batches}
    assert not ordered & set(draws)
    assert draws[0] == tuple(p.id for p in batches[0].further_problems(1))  # asked again
    other = next(iter(loader(prompts=8, seed=1)))
    assert tuple(p.id for p in other.further_problems(1)) != draws[0]
    assert all(p == TASK.problem("val", int(p.id.partition("/")[2])) for p in batches[0].further_problems(1))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_one_draw(world):
    """Disjoint slices, in order; and the order of the steps is left as it was."""
    whole = list(loader(prompts=2 * world))
    parts = [list(loader(rank=rank, world=world, prompts=2)) for rank in range(world)]
    for step, batch in enumerate(whole):
        for number in (1, 2):
            shares = [part[step].further_problems(number) for part in parts]
            assert [len(share) for share in shares] == [2] * world
            assert [p for share in shares for p in share] == batch.further_problems(number)
        indices = problem_indices(0, step, TASK.size("val"), 2 * world)
        assert [p.id for part in parts for p in part[step].problems] == [f"val/{i}" for i in indices]


@pytest.mark.slow
def test_a_run_with_other_groups_is_resumed(tmp_path):
    """Three steps in one go, and the same from the checkpoint of the first on."""
    from safetensors.torch import load_file

    arguments = [
        "steps=3", "group_size=2", "prompts_per_step=4", "callbacks.dynamic_sampling.rounds=2", "lr=1e-4",
        "callbacks.held_out=null", "callbacks.completions=null", "callbacks.checkpoints.log_policy=false",
        "callbacks.checkpoints.every=1", "callbacks.checkpoints.keep=9", "temperature=0.2",
        "callbacks.throughput.seconds=0.01",
    ]  # fmt: skip
    call(train, tmp_path / "outputs", *arguments)
    client, (run,) = runs(tmp_path / "outputs")
    history = lambda name: [m.value for m in client.get_metric_history(run.info.run_id, f"train/{name}")]  # noqa: E731
    before = {name: history(name) for name in ("sampling_rounds", "groups_replaced", "accuracy", "grad_norm")}
    assert all(1 <= rounds <= 3 for rounds in before["sampling_rounds"]) and max(before["sampling_rounds"]) > 1
    folder = Path(run.data.tags["output_folder"])
    weights = load_file(folder / "policy" / "model.safetensors")
    for step in (2, 3):
        (folder / "checkpoints" / f"step_{step:06d}.ckpt").unlink()
    shutil.rmtree(folder / "policy")
    call(train, tmp_path / "outputs", f"resume={folder}")
    assert {name: history(name) for name in before} == before
    for name, value in load_file(folder / "policy" / "model.safetensors").items():
        assert value.equal(weights[name]), name
