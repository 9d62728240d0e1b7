"""The policies that ship, the demonstrations that they were shown, and the command that makes them."""

import hashlib
import random
import re

import pytest

from bae.batch import Problem
from bae.commands.demonstrations import SolutionConfidence, TwoAttempts, read_terms
from bae.commands.warmstart import make_batch, make_tokenizer, warm_start
from bae.evaluation.metrics import auroc
from bae.objectives import Objective
from bae.objectives.correctness import correctness
from bae.objectives.scoring import Scorer
from bae.rollout.interface import SamplingRequest
from bae.rollout.local.engine import LocalEngine
from bae.rollout.pipeline import Pipeline
from bae.text.blocks import find_spans, make_blocks
from bae.text.tokens import token_bytes
from bae.training.policy import PACKAGE, Policy, load_pretrained

PROBLEM = Problem("x", "37+8-152=", "-107")


def settings(*overrides):
    """The command's configuration as composed."""
    from hydra import compose, initialize_config_dir

    from bae.commands.cli import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("warmstart", list(overrides))


@pytest.fixture(scope="module")
def task():
    from bae.commands.build import make

    return make(settings().task)


def shown(demonstrations):
    """What an option of conf/demonstrations makes."""
    from bae.commands.build import make

    return make(settings(f"demonstrations={demonstrations}").demonstrations)


def written(pieces):
    return "".join(piece.text for piece in pieces)


def test_one_attempt_and_a_confidence_from_nowhere():
    pieces = SolutionConfidence({"0.25": 1, "0.75": 0})(PROBLEM, random.Random(0))
    assert written(pieces) == (
        "<reasoning>45 -107</reasoning><answer>-107</answer><analysis>long</analysis><confidence>0.25</confidence>"
    )
    assert all(piece.learn for piece in pieces)
    assert "<analysis>short</analysis>" in written(
        shown("solution_confidence")(Problem("x", "9-8=", "1"), random.Random(0))
    )


def test_the_first_policy_was_shown_what_its_seed_shows_now(task):
    ids, labels = make_batch(make_tokenizer(), task, shown("solution_confidence"), 0, 128, random.Random(0))
    digest = hashlib.sha256(ids.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest == "567f2bce82e46ca1bc6307c81100ed4777877ae0d7cf2ccc42b408ef40263a35"


def test_two_attempts_are_worked_out_from_both_ends():
    pieces = TwoAttempts(slip=0, slips=[1])(PROBLEM, random.Random(0))
    assert written(pieces) == (
        "<reasoning>45 -107</reasoning><answer>-107</answer><reasoning>-144 -107</reasoning><answer>-107</answer>"
    )
    assert all(piece.learn for piece in pieces)


def test_a_slip_is_carried_on_and_not_learnt():
    seen = set()
    for seed in range(20):
        pieces = TwoAttempts(slip=1, slips=[10])(PROBLEM, random.Random(seed))
        seen.add(written(piece for piece in pieces if not piece.learn))
        first, second = written(pieces).split("</answer>", 1)
        assert re.fullmatch(
            r"<reasoning>35 (-127|-107)</reasoning><answer>\1|<reasoning>55 (-107|-87)</reasoning><answer>\2", first
        )
        assert second == "<reasoning>-144 -107</reasoning><answer>-107</answer>"
    assert seen == {"35-127", "35-107", "55-107", "55-87"}  # two slips may cancel


def test_half_of_the_first_attempts_are_wrong_and_no_second(task):
    demonstrate, rng = shown("two_attempt"), random.Random(0)
    wrong = 0
    for index in range(2000):
        problem = task.problem("train", index)
        terms, pieces = read_terms(problem.question), demonstrate(problem, rng)
        totals = [piece for piece in pieces if re.fullmatch(r"-?\d+", piece.text)]
        before = [terms[0], *(int(piece.text) for piece in totals)]
        for piece, total, term in zip(totals, before, terms[1:], strict=False):
            assert piece.learn == (int(piece.text) == total + term)
        first, second = re.findall(r"<answer>(.*?)</answer>", written(pieces))
        assert first == str(before[-1]) and second == problem.answer
        wrong += first != problem.answer
    assert 0.44 <= wrong / 2000 <= 0.52


def test_labels_leave_out_the_prompt_the_padding_and_the_slips(task):
    tokenizer, demonstrate = make_tokenizer(), TwoAttempts(slip=0.5, slips=[1, 2])
    ids, labels = make_batch(tokenizer, task, demonstrate, 0, 32, random.Random(0))
    rng = random.Random(0)
    for index, (row, label) in enumerate(zip(ids, labels, strict=True)):
        problem = task.problem("train", index)
        pieces = demonstrate(problem, rng)
        whole = problem.question + written(pieces) + "<|end|>"
        assert tokenizer.decode(row[row != tokenizer.pad_token_id]) == whole
        assert row[row != tokenizer.pad_token_id].tolist() == tokenizer(whole)["input_ids"]
        assert (label[label != -100] == row[label != -100]).all()
        assert tokenizer.decode(label[label != -100]) == written(p for p in pieces if p.learn) + "<|end|>"


def test_demonstrations_are_a_function_of_the_seed(task):
    texts = [written(shown("two_attempt")(task.problem("train", 4), random.Random(seed))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("slip", "slips"), [(30, [1]), (-0.1, [1]), (0.3, []), (0.3, [0, 1])])
def test_slips_that_cannot_be(slip, slips):
    with pytest.raises(ValueError, match=r"demonstrations\.slip"):
        TwoAttempts(slip, slips)


def measured(policy: Policy, task, split="val", prompts=200):
    """Share correct, AUROC and share malformed on held-out problems."""
    import torch

    blocks = make_blocks({"completion": ["reasoning", "answer", "analysis", "confidence"]})
    objectives = [Objective("correctness", "completion", worst=0.0, reward=correctness)]
    scorer = Scorer(blocks, objectives, task.verifier, token_bytes(policy.tokenizer))
    pipeline = Pipeline(policy, LocalEngine(), scorer, task, "", 48, 1.0)
    problems = [task.problem(split, i) for i in range(prompts)]
    _, scored, _ = pipeline(problems, [(0, 0, i) for i in range(prompts)], 4)
    readable = [c for c in scored.completions if c.confidence is not None]
    q = torch.tensor([c.confidence for c in readable])
    c = torch.tensor([float(c.correct) for c in readable])
    return float(c.mean()), float(auroc(q, c)), float(scored.malformed.float().mean())


def attempts(policy: Policy, task, split="val", prompts=200):
    """Of completions with two attempts: the share in form, and (first answer, second answer, reference) of those."""
    blocks = make_blocks({"first": ["reasoning", "answer"], "second": ["reasoning", "answer"]})
    tokenizer = policy.tokenizer
    problems = [task.problem(split, i) for i in range(prompts)]
    request = SamplingRequest(
        [policy.encode("", problem.question) for problem in problems],
        [(0, 0, i) for i in range(prompts)],
        group_size=4,
        max_new_tokens=64,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    samples = LocalEngine().sample(policy.model, request)
    rows = []
    for n, (ids, mask) in enumerate(zip(samples.completion_ids, samples.completion_mask, strict=True)):
        spans = find_spans(tokenizer.decode(ids[mask], skip_special_tokens=False), blocks)
        if all(spans.well_formed) and samples.ended[n]:
            rows.append((spans.sections[1].content, spans.sections[3].content, problems[n // 4].answer))
    return len(rows) / len(samples.completion_ids), rows


def check_confidence(policy, task):
    accuracy, discrimination, malformed = measured(policy, task)
    assert 0.25 <= accuracy <= 0.60
    assert 0.44 <= discrimination <= 0.56  # its confidence says nothing
    assert malformed <= 0.03


def check_two_attempts(policy, task):
    in_form, rows = attempts(policy, task)
    share = lambda flags: sum(flags) / len(flags)  # noqa: E731
    wrong = [(first, second) for first, second, reference in rows if first != reference]
    assert in_form >= 0.98
    assert 0.30 <= share([first == reference for first, _, reference in rows]) <= 0.55
    assert 0.35 <= share([second == reference for _, second, reference in rows]) <= 0.60
    assert 0.25 <= share([first == second for first, second in wrong]) <= 0.60  # no copy, and not independent


CHECKS = {"solution_confidence": check_confidence, "two_attempt": check_two_attempts}
SHIPPED = {"solution_confidence": "tiny", "two_attempt": "tiny_two_attempt"}


@pytest.mark.parametrize("demonstrations", SHIPPED)
def test_the_policies_that_ship(demonstrations, task):
    name = SHIPPED[demonstrations]
    policy = load_pretrained(f"package://assets/{name}", "float32", "{question}")
    assert (PACKAGE / "assets" / name / "model.safetensors").stat().st_size <= 2_000_000
    assert policy.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    CHECKS[demonstrations](policy, task)


def test_difficulty_is_graded_for_the_policy_that_ships(task):
    policy = load_pretrained("package://assets/tiny", "float32", "{question}")
    accuracy, _, _ = measured(policy, task)
    assert measured(policy, task, "easy")[0] > accuracy + 0.2
    assert measured(policy, task, "hard")[0] < accuracy - 0.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("demonstrations", ["solution_confidence"])  # the other one takes twice as long
def test_the_command_rebuilds_an_equivalent_one(demonstrations, task):
    cfg = settings()
    sizes = cfg.steps, cfg.batch_size, cfg.micro_batch_size
    policy = warm_start(task, shown(demonstrations), *sizes, cfg.lr, cfg.seed)
    CHECKS[demonstrations](policy, task)
