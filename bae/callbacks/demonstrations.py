"""The callbacks of a warm start: two that write demonstrations on the batch, and one that logs the training step."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeGuard

import lightning as L

from bae import seeds
from bae.batch import Problem, RolloutBatch
from bae.callbacks.collectives import gather_objects
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one
from bae.demonstrations.pieces import Confidences, Piece, Write, encode, is_in_form, text_of, without
from bae.rollout.pipeline import Pipeline
from bae.text.blocks import ANSWER, CONFIDENCE, find_spans, tags_named

TRIED = 64
"""So many problems are tried before training, to find out whether demonstrations can be written at all."""


class WrittenDemonstrations(L.Callback):
    """Write `demonstrations`: one completion of each of the step's problems, by a function.

    A problem is left out if the function has nothing for it, or writes a completion that is not in form.

    Args:
        pipeline: has the format, the tokenizer and the prompts.
        write: writes a completion.
        seed: of the draws.
        read_only: sections whose contents the policy reads and is not taught to write.

    Raises:
        ValueError: if no demonstration of the first problems is in form.
    """

    def __init__(self, pipeline: Pipeline, write: Write, seed: int, read_only: Sequence[str] = ()) -> None:
        self.pipeline = pipeline
        self.write = write
        self.seed = seed
        self.read_only = check_sections(pipeline, read_only)
        self._try()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        first = trainer.global_rank * len(batch.problems)
        with batch.timed("demonstrations"):
            shown = []
            for n, problem in enumerate(batch.problems):
                pieces = self.write(problem, draws(self.seed, batch.step, first + n))
                if self._is_usable(pieces):
                    shown.append((problem, pieces))
            put(batch, self.pipeline, shown, self.read_only)

    def _is_usable(self, pieces: Sequence[Piece] | None) -> TypeGuard[Sequence[Piece]]:
        """Tell whether something was written, in form."""
        return pieces is not None and is_in_form(pieces, self.pipeline.scorer.blocks)

    def _try(self) -> None:
        """Write demonstrations of the first problems, and refuse a source of which none can be used."""
        task, refused = self.pipeline.task, None
        for i in range(min(TRIED, task.size("train"))):
            pieces = self.write(task.problem("train", i), draws(self.seed, 0, i))
            if self._is_usable(pieces):
                return
            refused = refused or pieces
        tags = "".join(f"{t.opening}…{t.closing}" for block in self.pipeline.scorer.blocks for t in block.tags)
        found = f"this one, for example, is not: {text_of(refused)[:200]!r}" if refused else "there are none to write"
        raise ValueError(
            f"demonstrations: of the first {TRIED} problems, none has a demonstration in the form of objectives, "
            f"{tags}; {found}"
        )


class OwnDemonstrations(L.Callback):
    """Write `demonstrations`: completions of the step's problems by the policy itself, which was shown examples.

    The prompts from which it learns have no examples, so it comes to do without them. What is not in form is left out.

    Args:
        pipeline: samples and scores.
        examples: earlier turns of the chat, {question, completion} each, that show the format.
        samples: completions of each problem.
        keep: of those in form, the `right` ones, or `all`.
        confidences: what a confidence is replaced by; see `Confidences`.
        seed: of the draws.
        read_only: sections whose contents the policy reads and is not taught to write.

    Raises:
        ValueError: for examples of which there are none or that are not in form, or that a prompt cannot have.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        examples: Sequence[Mapping[str, str]],
        samples: int,
        keep: Literal["right", "all"],
        confidences: Mapping[str, float],
        seed: int,
        read_only: Sequence[str] = (),
    ) -> None:
        at_least_one("demonstrations", samples=samples)
        blocks = pipeline.scorer.blocks
        if not examples:
            raise ValueError("demonstrations.examples is empty; write one {question, completion} or more")
        for i, example in enumerate(examples):
            if not is_in_form([Piece(example["completion"])], blocks):
                raise ValueError(f"demonstrations.examples.{i}: the completion is not in the form of objectives.blocks")
        self.pipeline = pipeline
        self.sampler = replace(pipeline, examples=examples)
        pipeline.policy.encode(pipeline.system_prompt, "", examples)  # raises if there is no chat
        self.samples = samples
        self.keep = keep
        self.confidences = Confidences(confidences)
        self.seed = seed
        self.read_only = check_sections(pipeline, read_only)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        first = trainer.global_rank * len(batch.problems)
        keys = seeds.keys(self.seed, batch.step, first, len(batch.problems))
        _, scored, seconds = self.sampler(batch.problems, keys, self.samples)
        batch.seconds["demonstrations"] = sum(seconds.values())
        answers = len(tags_named(self.pipeline.scorer.blocks, ANSWER))
        shown = []
        for n, completion in enumerate(scored.completions):
            if not all(completion.well_formed) or completion.truncated:
                continue
            if self.keep == "all" or all(completion.is_correct(which) for which in range(answers)):
                rng = draws(self.seed, batch.step, first * self.samples + n)
                shown.append((completion.problem, self._pieces(completion.text, rng)))
        put(batch, self.pipeline, shown, self.read_only)
        batch.metrics["kept"] = len(shown) / len(scored.completions)

    def _pieces(self, text: str, rng: random.Random) -> list[Piece]:
        """Return a completion with its confidences drawn anew, and without what follows its last section."""
        blocks, out, place = self.pipeline.scorer.blocks, "", 0
        for section in find_spans(text, blocks).sections:
            content = self.confidences.draw(rng) if section.tag == CONFIDENCE else section.content
            out += text[place : section.start] + content
            place = section.start + len(section.content)
        closings = [tags.closing for block in blocks for tags in block.tags]
        return [Piece(out + (closings[-1] if blocks[-1].tags else text[place:]))]


class WarmStartTelemetry(L.Callback):
    """Log the loss and what else a step of a warm start measured, and show the loss on the progress bar."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        shown = batch.require_demonstrations()
        mine = (int(shown.learnt.any(1).sum()), int(shown.samples.completion_mask.sum()))
        count, tokens = (sum(values) for values in zip(*gather_objects(trainer, mine), strict=True))
        metrics = {f"train/{name}": value for name, value in batch.metrics.items()} | {"train/demonstrations": count}
        metrics |= {f"time/{name}": value for name, value in batch.seconds.items()}
        metrics["perf/tokens_per_second"] = tokens / sum(batch.seconds.values())
        run_logger(trainer).log_metrics(metrics, step=batch.step + 1)
        pl_module.log_dict({"loss": batch.metrics["loss"]}, prog_bar=True, logger=False)


def draws(seed: int, step: int, number: int) -> random.Random:
    """Return the generator of demonstration number `number` of a step, counted over all ranks."""
    return random.Random(repr(seeds.key(seed, seeds.Namespace.DEMONSTRATIONS, step, number)))


def put(
    batch: RolloutBatch,
    pipeline: Pipeline,
    shown: Sequence[tuple[Problem, Sequence[Piece]]],
    read_only: Sequence[str],
) -> None:
    """Write demonstrations on the batch, as tokens.

    If there is none, the batch has an empty one from which nothing is learnt: other ranks wait for our gradients.

    Args:
        batch: of a step.
        pipeline: has the format, the tokenizer and the prompts.
        shown: problems and their completions.
        read_only: sections whose contents are not learnt.
    """
    policy, blocks = pipeline.policy, pipeline.scorer.blocks
    completions = [without(pieces, blocks, read_only) if read_only else pieces for _, pieces in shown]
    problems = [problem for problem, _ in shown] or batch.problems[:1]
    prompts = [policy.encode(pipeline.system_prompt, problem.question, pipeline.examples) for problem in problems]
    batch.demonstrations = encode(policy.tokenizer, prompts, completions or [[]])
    if not shown:
        batch.demonstrations.learnt[:] = False


def check_sections(pipeline: Pipeline, names: Sequence[str]) -> Sequence[str]:
    """Return the names of sections. Raises ValueError for one that the format does not have."""
    known = {tags.name for block in pipeline.scorer.blocks for tags in block.tags}
    for name in names:
        if name not in known:
            raise ValueError(f"demonstrations.read_only: no section {name!r}; there are {', '.join(sorted(known))}")
    return names
