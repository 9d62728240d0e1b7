"""Seconds from prompts to scores if answers are verified after decoding, or meanwhile: python benchmarks/overlap.py

256 completions that a policy wrote for MATH500 (from BAE_DATA), cut off at --tokens, by MathVerifier. A stand-in for
an engine replays them, all at a time, at --pace seconds a token; it sleeps, as a host does while a GPU works.
--hostile: answers that need more than the verifier's time limit. Both ways take turns, --repeats times. Printed are
medians and ranges.

Heavy imports wait inside the functions: the verifier's spawned workers import this file as well.
"""

import argparse
import json
import re
import statistics
from time import perf_counter, sleep
from types import SimpleNamespace

from common import DATA

from bae.text.verdict import Verdict
from bae.text.verifier import MathVerifier

TOKEN = re.compile(r"\s?[^\W_]{1,6}|\s|\W|_")
PAD, EOS = 0, 1
OPEN = r"x+\binom{x}{2}"  # a reference to which a hostile answer is in form, so that it is compared


class Replay:
    """Rows of ids, as if all were decoded together; tells: of each as soon as it is done."""

    def __init__(self, rows, pace, tells):
        self.rows, self.pace, self.tells = rows, pace, tells

    def sample(self, model, request):
        import torch

        from bae.batch import SampledTokens

        step = 0
        for n in sorted(range(len(self.rows)), key=lambda n: len(self.rows[n])):
            row = self.rows[n]
            sleep(self.pace * (len(row) - step))
            step = len(row)
            if self.tells:
                request.on_finished(n, row, row[-1] == EOS)
        ids = torch.tensor([row + [PAD] * (step - len(row)) for row in self.rows])
        mask = torch.arange(step) < torch.tensor([[len(row)] for row in self.rows])
        return SampledTokens(ids[:, :1], mask[:, :1], ids, mask, (ids == EOS).any(1))


def file():
    return [json.loads(line) for line in (DATA / "rlcr_math500_completions.jsonl").open(encoding="utf-8")]


def start(verifier):
    """Fresh workers, that have seen 200 answers to other problems: they would remember those of the run before."""
    sleep(3)  # whoever takes the place of one that was killed is there, and does not complain that it is not needed
    verifier.close()
    lines = [line for line in file() if line["model"] == "Base"][300:]
    verifier.verify([(line["completion"].rpartition("<answer>")[2].partition("</answer>")[0], line["answer"])
                     for line in lines])  # fmt: skip


def read(count, hostile, limit):
    """Questions, references, rows of ids and the vocabulary. Tokens are words, cut at every sixth letter, and signs."""
    lines = [line for line in file() if line["model"] == "RLCR"][:count]
    whole = [line for line in lines if len(TOKEN.findall(line["completion"])) < limit]
    for n, line in enumerate(whole[:hostile]):
        line["answer"] = OPEN
        line["completion"] = re.sub(
            "<answer>.*</answer>", rf"<answer>{n + 10}^{{10^{{9}}}}</answer>", line["completion"]
        )
    ids = {"": PAD, "</s>": EOS}
    pieces = [TOKEN.findall(line["completion"]) for line in lines]
    rows = [[*(ids.setdefault(piece, len(ids)) for piece in text), EOS][:limit] for text in pieces]
    return lines, rows, [piece.encode() for piece in ids]


def pipelines(rows, vocabulary, pace, verifier):
    """One that verifies after decoding, and one that does so meanwhile."""
    from bae.objectives import Objective
    from bae.objectives.brier import brier
    from bae.objectives.correctness import correctness
    from bae.objectives.scoring import Scorer
    from bae.rollout.pipeline import Pipeline
    from bae.text.blocks import make_blocks

    blocks = make_blocks({"solution": ["answer"], "confidence": ["confidence"]})
    objectives = [
        Objective("correctness", "solution", worst=0.0, reward=correctness),
        Objective("confidence_brier", "confidence", worst=-1.0, score=brier, given="correctness"),
    ]
    scorer = Scorer(blocks, objectives, verifier, vocabulary)
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
    policy = SimpleNamespace(model=None, tokenizer=tokenizer, encode=lambda *question: [PAD])
    return {
        name: Pipeline(policy, Replay(rows, pace, tells), scorer, None, "", max(map(len, rows)), 1.0)
        for name, tells in (("after", False), ("meanwhile", True))
    }


def spread(values):
    return f"{statistics.median(values):6.2f} [{min(values):.2f}, {max(values):.2f}]"


def compare(given, hostile, verifier):
    from bae.batch import Problem

    lines, rows, vocabulary = read(given.completions, hostile, given.tokens)
    problems = [Problem(str(n), line["problem"], line["answer"]) for n, line in enumerate(lines)]
    times = {"after": [], "meanwhile": []}
    scores = {}
    for _ in range(given.repeats):
        for name, pipeline in pipelines(rows, vocabulary, given.pace, verifier).items():
            start(verifier)
            begun = perf_counter()
            _, scores[name], seconds = pipeline(problems, [(n,) for n in range(len(problems))], 1)
            times[name].append({"total": perf_counter() - begun} | seconds)
    assert scores["after"].rewards.equal(scores["meanwhile"].rewards)
    verdicts = [verdict for c in scores["after"].completions for verdict in c.verdicts]
    print(f"\n{len(rows)} completions, {len(verdicts)} answers, {verdicts.count(Verdict.CORRECT)} right, "
          f"{verdicts.count(Verdict.TIMEOUT)} out of time; {max(map(len, rows))} tokens at {given.pace} s")  # fmt: skip
    for name, runs in times.items():
        print(f"{name:<10}" + "".join(f"  {part} {spread([run[part] for run in runs])}" for part in runs[0]))
    ratios = [a["total"] / b["total"] for a, b in zip(*times.values(), strict=True)]
    print(f"after / meanwhile {spread(ratios)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--completions", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--pace", type=float, default=0.005)
    parser.add_argument("--hostile", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    verifier = MathVerifier()
    for hostile in given.hostile:
        compare(given, hostile, verifier)
    verifier.close()


if __name__ == "__main__":
    main()
