"""Fresh ends of completions, from their own prefixes, by the policy that ships."""

import pytest
import torch

from bae.batch import Problem, SampledTokens
from bae.fidelity.continuations import resample
from bae.objectives import Objective
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.objectives.scoring import Scorer
from bae.rollout.interface import pad_left
from bae.rollout.local.engine import LocalEngine
from bae.rollout.pipeline import Pipeline
from bae.tasks.arithmetic import Arithmetic
from bae.text.blocks import make_blocks
from bae.text.tokens import token_bytes
from bae.training.policy import load_pretrained

TASK = Arithmetic({"val": {"terms": [2, 3, 4], "digits": [1, 2], "size": 2000, "held_out": True}})
TWO = {"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]}
THREE = {"reasoning": ["reasoning"], "solution": ["answer"], "confidence": ["analysis", "confidence"]}
SOLUTION = "<reasoning>3</reasoning><answer>3</answer>"
WHOLE = SOLUTION + "<analysis>short</analysis><confidence>0.5</confidence>"


@pytest.fixture(scope="module")
def warm():
    return load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")


def make_pipeline(policy, schema=TWO, limit=40, temperature=1.0, malformed="penalise", engine=None):
    objectives = [
        Objective("correctness", "solution", 0.0, reward=correctness),
        Objective("confidence_brier", "confidence", -1.0, score=brier, given="correctness"),
    ]
    scorer = Scorer(make_blocks(schema), objectives, TASK.verifier, token_bytes(policy.tokenizer), malformed)
    return Pipeline(policy, engine or LocalEngine(), scorer, TASK, "", limit, temperature)


def roll_out(pipeline, prompts=6, group_size=4):
    problems = [TASK.problem("val", i) for i in range(prompts)]
    samples, scored, _ = pipeline(problems, [(0, 0, i) for i in range(prompts)], group_size)
    return [problem for problem in problems for _ in range(group_size)], samples, scored


def again(pipeline, problems, samples, scored, block=1, rollouts=3, **options):
    keys = [(0, 1, n) for n in range(len(problems))]
    return resample(pipeline, problems, samples, scored.block_of, block, rollouts, keys, **options)


def by_hand(policy, texts, ended=True):
    """Problems, samples and scores of completions of `1+2=` that no policy wrote."""
    pipeline = make_pipeline(policy)
    rows = [policy.tokenizer(text)["input_ids"] + [policy.tokenizer.eos_token_id] * ended for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [policy.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    prompt_ids, prompt_mask = pad_left([policy.encode("", "1+2=")] * len(rows), policy.tokenizer.pad_token_id)
    samples = SampledTokens(prompt_ids, prompt_mask, ids, mask, torch.full((len(rows),), ended))
    problems = [Problem(str(n), "1+2=", "3") for n in range(len(rows))]
    return problems, samples, pipeline.scorer(problems, samples)


@pytest.mark.parametrize(("schema", "block"), [(TWO, 1), (THREE, 1), (THREE, 2)])
def test_what_is_kept_and_what_is_fresh(warm, schema, block):
    pipeline = make_pipeline(warm, schema)
    problems, samples, scored = roll_out(pipeline)
    result = again(pipeline, problems, samples, scored, block)
    assert result.rows.tolist() == [n for n in range(len(problems)) if scored.block_of[n].max() >= block]
    differ = 0
    for i, n in enumerate(result.rows.tolist()):
        prefix = int(((scored.block_of[n] >= 0) & (scored.block_of[n] < block)).sum())
        for m in range(3 * i, 3 * i + 3):
            assert result.samples.completion_ids[m, :prefix].equal(samples.completion_ids[n, :prefix])
            assert result.samples.prompt_ids[m].equal(samples.prompt_ids[n])
            assert result.samples.prompt_mask[m].equal(samples.prompt_mask[n])
            assert result.scored.block_of[m, :prefix].equal(scored.block_of[n, :prefix])
            assert result.scored.block_of[m, prefix] == block
            assert result.scored.completions[m].problem is problems[n]
            differ += result.scored.completions[m].text != scored.completions[n].text
    assert differ > len(result.rows)
    if block == len(schema) - 1:  # what the earlier blocks earned is settled
        assert result.rewards(0).equal(scored.rewards[result.rows, :1].expand(-1, 3))
    assert result.rewards(1).shape == (len(result.rows), 3)


def test_an_empty_prefix_is_a_rollout(tiny):
    pipeline = make_pipeline(tiny)
    problems, samples, scored = roll_out(pipeline, group_size=1)
    keys = [(0, 1, n) for n in range(len(problems))]
    fresh, _, _ = pipeline(problems, keys, 3)
    result = resample(pipeline, problems, samples, scored.block_of, 0, 3, keys)
    assert result.samples.completion_ids.equal(fresh.completion_ids) and result.samples.ended.equal(fresh.ended)


@pytest.mark.parametrize("block", [1, 2])
def test_greedy_continuations_of_greedy_completions_are_these(warm, block):
    pipeline = make_pipeline(warm, THREE, temperature=0)
    problems, samples, scored = roll_out(pipeline, prompts=16, group_size=1)
    result = again(pipeline, problems, samples, scored, block)
    assert len(result.rows) > 12
    for name in ("prompt_ids", "prompt_mask", "completion_mask", "completion_ids", "ended"):
        kept = getattr(samples, name)[result.rows].repeat_interleave(3, 0)
        assert getattr(result.samples, name).equal(kept), name


def test_completions_without_the_block_are_left_out(warm):
    texts = ["", "<reasoning>3</reasoning><answer>", WHOLE, SOLUTION]
    problems, samples, scored = by_hand(warm, texts)
    result = again(make_pipeline(warm), problems, samples, scored)
    assert result.rows.tolist() == [2, 3]  # the last one stopped after its answer: a decision of the second block
    assert all(c.text.startswith(SOLUTION) for c in result.scored.completions)
    assert [c.problem for c in result.scored.completions] == [problems[2]] * 3 + [problems[3]] * 3


def test_nobody_reached_the_block(warm):
    pipeline = make_pipeline(warm)
    result = again(pipeline, *by_hand(warm, ["", "3"]))
    assert result.rows.tolist() == [] and result.scored.completions == []
    assert result.rewards(1).shape == (0, 3) and len(result.samples.completion_ids) == 0


def test_the_token_limit_counts_prefix_and_end(warm):
    pipeline = make_pipeline(warm, limit=21)
    problems, samples, scored = roll_out(pipeline, prompts=12)
    result = again(pipeline, problems, samples, scored)
    length = result.samples.completion_mask.sum(1)
    assert result.samples.ended.any() and not result.samples.ended.all()
    assert (length <= 21).all() and (length[~result.samples.ended] == 21).all()
    assert [c.truncated for c in result.scored.completions] == (~result.samples.ended).tolist()
    last = result.samples.completion_ids.gather(1, length.unsqueeze(1) - 1).squeeze(1)
    assert (last == warm.tokenizer.eos_token_id).equal(result.samples.ended)


class EndsAfter:
    """An engine whose g-th completion of a prompt says "short" g + 1 times, then ends, if it may."""

    def __init__(self, tokenizer):
        self.word, self.limits = tokenizer("short")["input_ids"], []

    def sample(self, model, request):
        self.limits.append(request.max_new_tokens)
        group = [self.word * (g + 1) + [request.eos_token_id] for g in range(request.group_size)]
        rows = [row[: request.max_new_tokens] for row in group * len(request.prompts)]
        length = torch.tensor([[len(row)] for row in rows])
        ids = torch.tensor([row + [request.pad_token_id] * (int(length.max()) - len(row)) for row in rows])
        mask = torch.arange(ids.shape[1]) < length
        return SampledTokens(*request.padded_prompts(), ids, mask, (ids == request.eos_token_id).any(1))


def test_the_engine_is_given_the_limit_of_a_band(warm):
    engine = EndsAfter(warm.tokenizer)
    problems, samples, scored = by_hand(warm, [SOLUTION + "<analysis>", "<reasoning></reasoning><answer></answer>."])
    # Prefixes of 6 and 4 tokens, bands of 2: the shorter one comes first.
    for limit, calls, lengths in ((10, [6, 4], [8, 9, 10, 10, 6, 7, 8, 9]), (9, [5, 3], [8, 9, 9, 9, 6, 7, 8, 9])):
        engine.limits.clear()
        result = again(make_pipeline(warm, limit=limit, engine=engine), problems, samples, scored, rollouts=4)
        assert engine.limits == calls
        assert result.samples.completion_mask.sum(1).tolist() == lengths
        ends = [6 + g + 2 <= limit for g in range(4)] + [4 + g + 2 <= limit for g in range(4)]
        assert result.samples.ended.tolist() == ends


def test_a_row_is_cut_at_its_own_limit(warm):
    engine = EndsAfter(warm.tokenizer)
    rollouts = by_hand(warm, ["<reasoning>3 3</reasoning><answer></answer>."])
    result = again(make_pipeline(warm, limit=10, engine=engine), *rollouts, rollouts=4)
    assert engine.limits == [4]  # for a prefix of 7 tokens, in the band of 6 and 7
    assert result.samples.completion_mask.sum(1).tolist() == [9, 10, 10, 10]
    assert result.samples.ended.tolist() == [True, True, False, False]  # the third ended in the band's fourth token
    assert result.samples.completion_ids[2, -1] == engine.word[0]


@pytest.mark.parametrize("max_rows", [1, 7])
def test_the_result_does_not_depend_on_the_chunks(warm, max_rows):
    pipeline = make_pipeline(warm)
    rollouts = roll_out(pipeline)
    whole, parts = again(pipeline, *rollouts), again(pipeline, *rollouts, max_rows=max_rows)
    assert whole.samples.completion_ids.equal(parts.samples.completion_ids)
    assert whole.scored.rewards.equal(parts.scored.rewards)


def test_a_prefix_does_not_depend_on_its_neighbours(warm):
    pipeline = make_pipeline(warm, limit=15)
    problems, samples, scored = roll_out(pipeline, prompts=12)
    whole = again(pipeline, problems, samples, scored)
    assert 19 not in whole.rows and 20 in whole.rows  # too long, with others after it
    for i, n in enumerate(whole.rows.tolist()):
        one = SampledTokens(*(column if column is None else column[n : n + 1] for column in vars(samples).values()))
        alone = resample(pipeline, [problems[n]], one, scored.block_of[n : n + 1], 1, 3, [(0, 1, n)])
        assert alone.scored.completions == whole.scored.completions[3 * i : 3 * i + 3]


def test_the_digits_follow_the_policys_distribution(warm):
    pipeline = make_pipeline(warm, {"solution": ["reasoning", "answer", "analysis"], "confidence": ["confidence"]})
    problems, samples, _ = by_hand(warm, [WHOLE])
    result = again(pipeline, problems, samples, pipeline.scorer(problems, samples), rollouts=4000)
    opening = WHOLE[: WHOLE.index("0.5")] + "0."
    ids = warm.encode("", "1+2=" + opening)
    with torch.no_grad():
        probabilities = warm.model(torch.tensor([ids])).logits[0, -1].softmax(0)
    texts = [c.text for c in result.scored.completions if c.text.startswith(opening)]
    assert len(texts) > 3000
    for digit in "0123456789":
        p = float(probabilities[warm.tokenizer.convert_tokens_to_ids(digit)])
        count = sum(text[len(opening) :].startswith(digit) for text in texts)
        assert abs(count - len(texts) * p) <= 4 * (len(texts) * p * (1 - p)) ** 0.5 + 1, digit


def test_rewards_are_those_of_completions_on_average(warm):
    pipeline = make_pipeline(warm)
    problems, samples, scored = roll_out(pipeline, prompts=64, group_size=4)
    result = again(pipeline, problems, samples, scored, rollouts=8)
    excess = scored.rewards[result.rows, 1] - result.rewards(1).mean(1)
    assert excess.std() > 0.05
    assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5


def test_a_masked_end_has_no_reward(warm):
    engine = EndsAfter(warm.tokenizer)  # no confidence in what it says
    rollouts = by_hand(warm, [WHOLE])
    assert again(make_pipeline(warm, malformed="mask", engine=engine), *rollouts).rewards(1).isnan().all()
    assert again(make_pipeline(warm, engine=engine), *rollouts).rewards(1).eq(-1).all()


def test_no_rollouts(warm):
    with pytest.raises(ValueError, match="rollouts=0"):
        again(make_pipeline(warm), *by_hand(warm, [WHOLE]), rollouts=0)
