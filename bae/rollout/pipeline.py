"""From problems to scored completions: what training and held-out evaluation have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from bae.batch import Problem, SampledTokens, Scored
from bae.objectives.scoring import Scorer
from bae.rollout.interface import RolloutEngine
from bae.tasks import Task
from bae.training.policy import Policy


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
    ) -> tuple[SampledTokens, Scored, dict[str, float]]:
        """`group_size` completions of each problem; keys: one seed for each problem.

        Completions are read and verified while others are being sampled, as far as the engine tells of them. Returns
        samples, scores and seconds: "rollout" of sampling, "reward" of what scoring adds to that, which is reading in
        between, and the rest after it. Their sum is the time of the call.
        """
        start = perf_counter()
        tokenizer = self.policy.tokenizer
        between = 0.0
        with self.scorer.begin([problem for problem in problems for _ in range(group_size)]) as scoring:

            def add(n: int, ids: Sequence[int], ended: bool) -> None:
                nonlocal between
                begun = perf_counter()
                scoring.add(n, ids, ended)
                between += perf_counter() - begun

            samples = self.engine.sample(
                self.policy.model,
                [self.policy.encode(self.system_prompt, problem.question, self.examples) for problem in problems],
                keys,
                group_size=group_size,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                on_finished=add,
            )
            sampled = perf_counter()
            scored = scoring.finish(samples)
        rollout = sampled - start - between
        return samples, scored, {"rollout": rollout, "reward": perf_counter() - start - rollout}
