"""What flows through a training step, and the dimension legend of the whole project.

    P  prompts in a step (on this rank)      G  completions of one prompt, a group
    N  completions, N = P * G, group by group: completion n belongs to prompt n // G
    J  objectives       K  blocks            L  prompt tokens       T  completion tokens       V  vocabulary

The batch is the only channel between callbacks: each stage fills one field, once, and the next one reads it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bae.method.stated_numbers import Decisions
from bae.text.blocks import ANSWER, Section
from bae.text.number import Number
from bae.text.verdict import Verdict


@dataclass(frozen=True)
class Problem:
    """A question with a reference answer that a verifier can check."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Completion:
    """One completion as objectives see it. Where the format has several answers or confidences, they count from 0.

    sections: what was read of the format, in order, as far as it was kept to.
    well_formed: K flags.
    verdicts: one for each `answer` section.
    confidences: the number in each `confidence` section that was begun, None if it is none in [0, 1].
    length: tokens, end of sequence included.
    truncated: the token limit came before the end of sequence.
    tokens: of each block, by name; their sum is the length.
    repeats: one for each `answer` section, whether it is the first answer again, by the verifier.
    """

    problem: Problem
    text: str
    sections: tuple[Section, ...]
    well_formed: tuple[bool, ...]
    verdicts: tuple[Verdict, ...]
    confidences: tuple[float | None, ...]
    length: int
    truncated: bool
    tokens: Mapping[str, int] = field(default_factory=dict)
    repeats: tuple[bool, ...] = ()

    def answer(self, which: int = 0) -> str | None:
        """The text of an answer, None if it was not reached."""
        answers = [section.content for section in self.sections if section.tag == ANSWER]
        return answers[which] if which < len(answers) else None

    def is_correct(self, which: int = 0) -> bool:
        """Whether there is such an answer and the verifier accepts it."""
        return self.verdicts[which : which + 1] == (Verdict.CORRECT,)

    def stated(self, which: int = 0) -> float | None:
        """A stated confidence, None if there is none that can be read."""
        return self.confidences[which] if which < len(self.confidences) else None

    @property
    def correct(self) -> bool:
        return self.is_correct()

    @property
    def confidence(self) -> float | None:
        return self.stated()


@dataclass(frozen=True)
class SampledTokens:
    """Token ids as a rollout engine returns them.

    prompt_ids, prompt_mask: (N, L), padded on the left.
    completion_ids, completion_mask: (N, T), padded on the right; the mask holds every sampled token up to and
        including the first end of sequence.
    ended: (N,) bool, whether the end of sequence was sampled.
    log_probs: (N, T), of each token in the distribution that it was drawn from, in nats, 0 outside the mask; None where
        the engine does not tell.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    ended: Tensor
    log_probs: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """Completions read, verified and rewarded.

    block_of: (N, T) long, the block of each token, -1 outside the completion.
    rewards: (N, J), after the policy for malformed output was applied.
    present: (N, J) bool, whether the objective counts for this completion: its block was reached, and is not
        masked for being malformed. Where it is False the reward is 0 and enters no mean.
    malformed: (N, J) bool, whether the block was reached but is not in form, or gave nothing to score.
    numbers: of each completion, where the tokens of each of its confidences lie, as far as they were begun.
    """

    completions: list[Completion]
    block_of: Tensor
    rewards: Tensor
    present: Tensor
    malformed: Tensor
    numbers: Sequence[Sequence[Number]] = ()


@dataclass(frozen=True)
class NumberAdvantages:
    """What the training step needs to give the tokens of stated numbers advantages of their own, for one objective.

    decisions: of N completions. reward, advantage: (N,), as in Advantages. block: the block of the objective.
    weight: of the objective. all_action: whether numbers learn from every alternative, or from the sampled one.
    """

    decisions: Decisions
    reward: Tensor
    advantage: Tensor
    block: int
    weight: float
    all_action: bool


@dataclass(frozen=True)
class Advantages:
    """per_objective: (N, J), zero where not present. per_block: (N, K), their weighted sum in each block.
    numbers: for objectives whose baseline the training step finishes, because it needs the policy's distribution."""

    per_objective: Tensor
    per_block: Tensor
    numbers: Sequence[NumberAdvantages] = ()


@dataclass
class RolloutBatch:
    """One step's work. `problems` come with it; each other field is written by the stage named beside it."""

    step: int
    problems: list[Problem]
    group_size: int
    samples: SampledTokens | None = None  # Rollouts
    scored: Scored | None = None  # Rollouts
    advantages: Advantages | None = None  # BlockwiseAdvantages
    entropy_coef: float = 0.0  # AdaptiveEntropy
    metrics: dict[str, float] = field(default_factory=dict)  # BlockwiseAdvantages, PolicyModule.training_step
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage
    further: Callable[[int], list[Problem]] | None = None  # round, from 1 -> as many other problems of the split

    def require_rollouts(self) -> tuple[SampledTokens, Scored]:
        """Samples and scores. Raises RuntimeError if the Rollouts callback has not run."""
        if self.samples is None or self.scored is None:
            raise RuntimeError("the batch has no rollouts: put bae.callbacks.Rollouts before whatever reads them")
        return self.samples, self.scored

    def further_problems(self, number: int) -> list[Problem]:
        """As many problems as the step has, others for each round; number: from 1."""
        if self.further is None:
            raise RuntimeError("the batch has no further problems: bae.tasks.loader.PromptLoader gives them")
        return self.further(number)

    def require_advantages(self) -> Advantages:
        """Advantages. Raises RuntimeError if the BlockwiseAdvantages callback has not run."""
        if self.advantages is None:
            raise RuntimeError("the batch has no advantages: put bae.callbacks.BlockwiseAdvantages after Rollouts")
        return self.advantages

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of the `with` body, in seconds, to `seconds[name]`."""
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


def group_index(n: int, group_size: int) -> Tensor:
    """(N,) long: the prompt that each completion belongs to."""
    return torch.arange(n) // group_size


def concatenate(parts: Sequence[tuple[SampledTokens, Scored]], pad: int) -> tuple[SampledTokens, Scored]:
    """Rollouts of several calls as those of one; pad: the id of padding."""
    samples, scored = zip(*parts, strict=True)
    ids = lambda name, fill, left=False: _stack([getattr(s, name) for s in samples], fill, left)  # noqa: E731
    told = all(s.log_probs is not None for s in samples)
    rows = lambda name: torch.cat([getattr(s, name) for s in scored])  # noqa: E731
    return (
        SampledTokens(ids("prompt_ids", pad, True), ids("prompt_mask", False, True), ids("completion_ids", pad),
                ids("completion_mask", False), torch.cat([s.ended for s in samples]),
                ids("log_probs", 0.0) if told else None),
        Scored([c for s in scored for c in s.completions], _stack([s.block_of for s in scored], -1), rows("rewards"),
               rows("present"), rows("malformed"), [n for s in scored for n in s.numbers]),
    )  # fmt: skip


def rows_of(samples: SampledTokens, scored: Scored, rows: Tensor) -> tuple[SampledTokens, Scored]:
    """The completions `rows`, (R,) long."""
    pick: Callable[[Any], Any] = lambda x: (  # noqa: E731
        x if x is None else x[rows] if isinstance(x, Tensor) else [x[n] for n in rows.tolist()]
    )
    each = lambda part: {f.name: pick(getattr(part, f.name)) for f in fields(part)}  # noqa: E731
    return SampledTokens(**each(samples)), Scored(**each(scored))


def _stack(columns: Sequence[Tensor], fill: float, left: bool = False) -> Tensor:
    """One below the other, each filled up to the widest."""
    width = max(x.shape[1] for x in columns)
    gap = lambda x: (width - x.shape[1], 0) if left else (0, width - x.shape[1])  # noqa: E731
    return torch.cat([torch.nn.functional.pad(x, gap(x), value=fill) for x in columns])
