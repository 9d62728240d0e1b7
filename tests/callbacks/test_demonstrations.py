"""What a model shows itself: which of its completions are kept, and how they are written anew."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bae.batch import Problem, RolloutBatch, SampledTokens
from bae.callbacks import OwnDemonstrations, WarmStartTelemetry, WrittenDemonstrations
from bae.demonstrations.pieces import Piece
from bae.demonstrations.tiny import make_tokenizer
from bae.objectives import Objective
from bae.objectives.correctness import correctness
from bae.objectives.scoring import Scorer
from bae.rollout.interface import pad_left
from bae.rollout.pipeline import Pipeline
from bae.tasks.arithmetic import Arithmetic
from bae.text.blocks import make_blocks
from bae.text.tokens import token_bytes
from bae.training.policy import Policy

TOKENIZER = make_tokenizer()
TASK = Arithmetic({"train": {"terms": [2], "digits": [1], "size": 50, "held_out": False}})
BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["confidence"]})
RIGHT = "<reasoning>5</reasoning><answer>5</answer><confidence>0.95</confidence>"
WRONG = RIGHT.replace("<answer>5", "<answer>6")
EXAMPLES = [{"question": "1+1=", "completion": RIGHT}]
ALONE = SimpleNamespace(world_size=1, global_rank=0)
PROBLEM = Problem("x", "2+3=", "5")


class Chat(Policy):
    """A policy whose prompts say how many examples they have."""

    def encode(self, system, question, examples=()):
        return self.tokenizer("+" * len(examples) + question)["input_ids"]


class Engine:
    """Return these completions, whatever the prompt; keep the request."""

    def __init__(self, texts, ended=True):
        self.texts, self.ended = texts, ended

    def sample(self, model, request):
        self.request = request
        ids = [TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] * self.ended for text in self.texts]
        width = max(map(len, ids))
        rows = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in ids])
        prompts = pad_left([prompt for prompt in request.prompts for _ in range(request.group_size)], 0)
        samples = SampledTokens(*prompts, rows, mask, torch.full((len(ids),), self.ended))
        for n, row in enumerate(ids):
            request.on_finished(n, row, self.ended)
        return samples


def pipeline(texts=(RIGHT,), ended=True):
    objective = Objective("correctness", "solution", worst=0.0, reward=correctness)
    scorer = Scorer(BLOCKS, [objective], TASK.verifier, token_bytes(TOKENIZER))
    return Pipeline(Chat(SimpleNamespace(), TOKENIZER, None), Engine(texts, ended), scorer, TASK, "", 99, 1.0)


def own(pipe, step=0, **options):
    settings = {"examples": EXAMPLES, "samples": 4, "keep": "right", "confidences": {"0.25": 1}, "seed": 0} | options
    callback = OwnDemonstrations(pipe, **settings)
    batch = RolloutBatch(step, [PROBLEM], 1)
    callback.on_train_batch_start(ALONE, None, batch, 0)
    return batch


def texts(batch):
    """What is demonstrated, row by row, and what of it is learnt."""
    shown = batch.demonstrations
    rows = zip(shown.samples.completion_ids, shown.samples.completion_mask, shown.learnt, strict=True)
    return [(TOKENIZER.decode(ids[mask]), TOKENIZER.decode(ids[learnt])) for ids, mask, learnt in rows]


SAMPLED = (RIGHT, WRONG, "<answer>5</answer>", RIGHT + "5 5")
ANEW = RIGHT.replace("0.95", "0.25") + "<|end|>"


@pytest.mark.parametrize(
    ("keep", "kept"), [("right", [ANEW, ANEW]), ("all", [ANEW, WRONG.replace("0.95", "0.25") + "<|end|>", ANEW])]
)
def test_completions_in_form_are_kept_and_their_confidences_drawn_anew(keep, kept):
    pipe = pipeline(SAMPLED)
    batch = own(pipe, keep=keep)
    assert texts(batch) == [(text, text) for text in kept]
    assert batch.metrics["kept"] == len(kept) / 4 and "demonstrations" in batch.seconds
    ids = lambda text: TOKENIZER(text)["input_ids"]  # noqa: E731
    assert pipe.engine.request.prompts == [ids("+2+3=")]  # it sampled with an example
    samples = batch.demonstrations.samples
    assert samples.prompt_ids[0][samples.prompt_mask[0]].tolist() == ids("2+3=")  # and learns without


def test_what_was_cut_off_is_not_kept_and_a_batch_without_any_teaches_nothing():
    for pipe in (pipeline(SAMPLED, ended=False), pipeline([WRONG] * 4)):
        batch = own(pipe)
        assert not batch.demonstrations.learnt.any() and len(batch.demonstrations.learnt) == 1


def test_draws_are_a_function_of_seed_step_and_completion():
    options = {"keep": "all", "confidences": {f"0.{n}": 1 for n in range(1, 10)}}
    pipe = pipeline([RIGHT] * 4)
    drawn = [texts(own(pipe, **key, **options)) for key in ({}, {}, {"seed": 1}, {"step": 1})]
    assert drawn[0] == drawn[1] and drawn[0] not in drawn[2:] and len({text for text, _ in drawn[0]}) > 1


def test_a_section_may_be_read_only():
    batch = own(pipeline([RIGHT] * 4), read_only=["reasoning", "answer"])
    assert texts(batch)[0][1] == "<reasoning></reasoning><answer></answer><confidence>0.25</confidence><|end|>"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"examples": []}, "examples is empty"),
        ({"examples": [{"question": "1", "completion": "5"}]}, r"examples\.0: the completion is not in the form"),
        ({"samples": 0}, "samples=0: must be 1 or more"),
        ({"read_only": ["thought"]}, "no section 'thought'; there are answer, confidence, reasoning"),
        ({"confidences": {}}, "name one or more"),
    ],
)
def test_what_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        own(pipeline(), **options)


def test_examples_need_a_chat(tiny):
    pipe = replace(pipeline(), policy=tiny)  # it has a template for its prompts
    with pytest.raises(ValueError, match="there is none"):
        own(pipe)


def test_a_function_writes_what_it_can():
    def write(problem, rng):
        return None if problem.question == "1=" else [Piece("no form" if problem.question == "7=" else RIGHT)]

    batch = RolloutBatch(3, [Problem("a", "1=", "1"), PROBLEM, Problem("b", "7=", "7")], 1)
    with pytest.raises(ValueError, match="none has a demonstration in the form of objectives"):
        WrittenDemonstrations(pipeline(), lambda problem, rng: [Piece("<answer>5</answer>")], seed=0)
    WrittenDemonstrations(pipeline(), write, seed=0).on_train_batch_start(ALONE, None, batch, 0)
    assert texts(batch) == [(RIGHT + "<|end|>",) * 2]


def test_the_step_is_logged():
    batch = own(pipeline([RIGHT] * 4))
    batch.metrics |= {"loss": 2.0}
    logged = {}
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.update({step: dict(metrics)}))
    shown = {}
    module = SimpleNamespace(log_dict=lambda values, **_: shown.update(values))
    WarmStartTelemetry().on_train_batch_end(SimpleNamespace(world_size=1, loggers=[logger]), module, None, batch, 0)
    assert logged[1]["train/loss"] == 2.0 and logged[1]["train/demonstrations"] == 4 and logged[1]["train/kept"] == 1
    assert logged[1]["perf/tokens_per_second"] > 0 and shown == {"loss": 2.0}
