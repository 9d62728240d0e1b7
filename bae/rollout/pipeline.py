"""From problems to scored completions: what training and held-out evaluation have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from bae.batch import Problem, Samples, Scored
from bae.models import Policy
from bae.rollout import RolloutEngine
from bae.scoring import Scorer
from bae.tasks import Task


@dataclass(frozen=True)
class Pipeline:
    """Encode, sample, score.

    system_prompt: what the policy is told of the format. examples: turns that show it; see `Policy.encode`.
    max_new_tokens: tokens a completion may have.
    temperature: of sampling.
    """

    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    task: Task
    system_prompt: str
    max_new_tokens: int
    temperature: float
    examples: Sequence[Mapping[str, str]] = ()

    def __call__(
        self, problems: Sequence[Problem], keys: Sequence[tuple[int, ...]], group_size: int
    ) -> tuple[Samples, Scored, dict[str, float]]:
        """`group_size` completions of each problem; keys: one seed for each problem.

        Returns samples, scores and the seconds that "rollout" and "reward" took.
        """
        start = perf_counter()
        tokenizer = self.policy.tokenizer
        samples = self.engine.sample(
            self.policy.model,
            [self.policy.encode(self.system_prompt, problem.question, self.examples) for problem in problems],
            keys,
            group_size=group_size,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        sampled = perf_counter()
        scored = self.scorer([problem for problem in problems for _ in range(group_size)], samples)
        return samples, scored, {"rollout": sampled - start, "reward": perf_counter() - sampled}
