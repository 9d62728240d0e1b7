"""Turn problems into scored completions, for training and held-out evaluation alike."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from bae.batch import Problem, SampledTokens, Scored
from bae.errors import UserError
from bae.objectives.scoring import Scorer
from bae.rollout.interface import RolloutEngine, SamplingRequest
from bae.tasks import Task
from bae.tasks.short_prompts import ShortPrompts
from bae.training.policy import Policy


@dataclass(frozen=True)
class Pipeline:
    """Encode problems, sample completions and score them.

    Attributes:
        policy: the model to sample from, and its tokenizer.
        engine: what samples.
        scorer: what reads, verifies and rewards completions.
        task: where the problems come from.
        system_prompt: text that tells the policy the format.
        max_new_tokens: tokens that a completion may have.
        temperature: of sampling.
        examples: earlier turns of the chat that show the format; see `Policy.encode`.
    """

    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    task: Task
    system_prompt: str
    max_new_tokens: int
    temperature: float
    examples: Sequence[Mapping[str, str]] = ()

    @property
    def context(self) -> int | None:
        """Return the tokens of prompt and completion that the policy was made for; None if its model does not say."""
        config = getattr(self.policy.model, "config", None)
        return getattr(config, "max_position_embeddings", None)

    def prompt(self, problem: Problem) -> list[int]:
        """Return the tokens of a prompt. Raises UserError if the policy has no room for even one token after it."""
        ids = self._encoded(problem)
        if self.context and len(ids) >= self.context:
            raise UserError(
                f"the prompt of problem {problem.id} has {len(ids)} tokens, and the context of the model "
                f"{self.context}; leave the problem out, or choose another model"
            )
        return ids

    def with_short_prompts(self, most: int) -> "Pipeline":
        """Return this pipeline on the problems whose prompts have `most` tokens or fewer."""
        return replace(self, task=ShortPrompts(self.task, lambda problem: len(self._encoded(problem)), most))

    def _encoded(self, problem: Problem) -> list[int]:
        return self.policy.encode(self.system_prompt, problem.question, self.examples)

    def check_room(self, problems: Iterable[Problem]) -> None:
        """Refuse problems whose completions would not end within the policy's context. Raises UserError."""
        for problem in problems:
            room = (self.context or math.inf) - len(self.prompt(problem))
            if self.max_new_tokens > room:
                raise UserError(
                    f"max_new_tokens={self.max_new_tokens}: with the prompt of problem {problem.id} that is more than "
                    f"the {self.context} tokens of the model's context; use max_new_tokens={room} or less"
                )

    def __call__(
        self, problems: Sequence[Problem], keys: Sequence[tuple[int, ...]], group_size: int
    ) -> tuple[SampledTokens, Scored, dict[str, float]]:
        """Sample and score a group of completions of each problem.

        Completions are read and verified while others are being sampled, if the engine reports them one by one.

        Args:
            problems: P problems.
            keys: P seeds, one for each problem.
            group_size: completions of each problem.

        Returns:
            samples: of N = P * group_size completions, group by group.
            scored: their scores.
            seconds: "rollout" is the time of sampling. "reward" is what scoring adds to it: the reading in between,
                and what is left to do after sampling. Their sum is the time of the call.
        """
        start = perf_counter()
        between = 0.0
        with self.scorer.begin([problem for problem in problems for _ in range(group_size)]) as scoring:

            def add(n: int, ids: Sequence[int], ended: bool) -> None:
                nonlocal between
                begun = perf_counter()
                scoring.add(n, ids, ended)
                between += perf_counter() - begun

            request = SamplingRequest(
                prompts=[self.prompt(problem) for problem in problems],
                keys=keys,
                group_size=group_size,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_token_id=self.policy.tokenizer.eos_token_id,
                pad_token_id=self.policy.tokenizer.pad_token_id,
                on_finished=add,
            )
            samples = self.engine.sample(self.policy.model, request)
            sampled = perf_counter()
            scored = scoring.finish(samples)
        rollout = sampled - start - between
        return samples, scored, {"rollout": rollout, "reward": perf_counter() - start - rollout}
