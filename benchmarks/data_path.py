"""What a training step does besides the model, at the paper's scale: python benchmarks/data_path.py [--repeats 3]

Completions are worked mathematics of SmolLM2's tokenizer, up to 4,096 tokens long, in groups of 32. They are read into
blocks while they come in, verified, rewarded, given advantages by OCB, divided into micro-batches, and written to a
table and a page, by the functions that bae-train calls. No model takes part. Each size has a process of its own; sizes
take turns. Printed are seconds by stage, the memory that the stages gained, and the exponent of time in completions
and in tokens: 1 is linear.
"""

import argparse
import random
import statistics
import tempfile
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace

from common import SMOLLM2, append, arguments, load, measure, now_mib, peak_mib, serve, spread
from growth import exponent

GROUP = 32
SIZES = [(256, 4096), (512, 4096), (1024, 4096), (2048, 4096), (2048, 512), (2048, 1024), (2048, 2048)]
STAGES = ["read", "verify", "advantages", "micro_batches", "metrics", "page"]
SENTENCES = (
    "First we factor the quadratic, $x^2 - 5x + 6 = (x-2)(x-3)$, so the roots are 2 and 3. ",
    "Therefore \\frac{1}{2} + \\frac{1}{3} = \\frac{5}{6}, which is what was asked. ",
    "If a < b then b > a, and <b> is no tag of the format; let us check: 7 * 8 = 56. ",
    "Wait, that is wrong. Let me compute it again with n = 12 and k = 5, step by step. ",
)


def texts(count, tokens, tokenizer):
    """Token ids of completions, and their reference answers. Lengths differ, and one in eight is cut off."""
    draw = random.Random(0)
    pieces = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    opening, middle = (tokenizer(tag)["input_ids"] for tag in ("<reasoning>", "</reasoning>"))
    rows, references = [], []
    for n in range(count):
        right = f"{draw.randint(2, 99)}/{draw.randint(101, 199)}"
        answer = right if n % 2 else f"\\frac{{{draw.randint(2, 99)}}}{{{draw.randint(101, 199)}}}"
        tail = f"<answer>{answer}</answer><analysis>Two steps.</analysis><confidence>0.{n % 100:02d}</confidence>"
        end = [*middle, *tokenizer(tail)["input_ids"]]
        length = draw.randint(tokens // 2, tokens - 1) - len(opening) - len(end)
        body = []
        while len(body) < length:
            body += draw.choice(pieces)
        ids = [*opening, *body[: max(0, length)], *end]
        rows.append((ids[: tokens // 2], False) if n % 8 == 0 else ([*ids, tokenizer.eos_token_id], True))
        references.append(right)
    return rows, references


def one(completions, tokens):
    """One measurement, in a process of its own."""
    import torch

    from bae.batch import Advantages, Problem, SampledTokens, group_index
    from bae.callbacks.telemetry import completion_metrics
    from bae.evaluation.completion_page import GroupView, page
    from bae.evaluation.completion_table import columns, frame
    from bae.evaluation.completion_view import Viewer
    from bae.method.advantages import advantages as minus
    from bae.method.advantages import sum_by_block
    from bae.method.baselines import outcome_conditioned, with_fallback, without_self
    from bae.objectives import Objective
    from bae.objectives.brier import brier
    from bae.objectives.correctness import correctness
    from bae.objectives.outcomes import given_reward
    from bae.objectives.reward_view import reward_view, score_table
    from bae.objectives.scoring import Scorer
    from bae.text.blocks import make_blocks
    from bae.text.tokens import token_bytes
    from bae.text.verifier import MathVerifier
    from bae.training.packing import micro_batches

    torch.set_num_threads(1)
    tokenizer = load(SMOLLM2, "bfloat16").tokenizer
    blocks = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
    objectives = [
        Objective("correctness", "solution", worst=0.0, reward=correctness),
        Objective("confidence_brier", "confidence", score=brier, given="correctness"),
    ]
    verifier = MathVerifier()
    scorer = Scorer(blocks, objectives, verifier, token_bytes(tokenizer))
    verifier.verify([("1.0", "1")])  # the workers start
    rows, references = texts(completions, tokens, tokenizer)
    problems = [Problem(str(n // GROUP), "What is it?", reference) for n, reference in enumerate(references)]
    mask = torch.arange(tokens) < torch.tensor([[len(ids)] for ids, _ in rows])
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for row, _ in rows for token in row])
    prompt = torch.zeros(completions, 157, dtype=torch.long)
    ended = torch.tensor([end for _, end in rows])
    samples = SampledTokens(prompt, torch.ones_like(prompt).bool(), ids, mask, ended, torch.zeros(mask.shape))
    trainer = SimpleNamespace(world_size=1, global_rank=0)
    before, seconds, own = now_mib(), {}, {}

    @contextmanager
    def stage(name):
        start, cpu = perf_counter(), process_time()
        yield
        seconds[name], own[name] = perf_counter() - start, process_time() - cpu

    with scorer.begin(problems) as scoring:
        with stage("read"):
            for n, (row, end) in enumerate(rows):
                scoring.add(n, row, end)
        with stage("verify"):
            scored = scoring.finish(samples)
    with stage("advantages"):
        group = group_index(completions, GROUP)
        table = score_table(scored, objectives, given_reward, group)
        baselines = torch.zeros_like(table.rewards)
        for j, baseline in enumerate((without_self, outcome_conditioned)):
            baselines[:, j], _ = with_fallback(baseline, without_self, reward_view(objectives[j], j, table, group))
        centred = minus(table.rewards, baselines, table.present)
        advantages = Advantages(centred, sum_by_block(centred, [0, 1], [1.0, 1.0], 2), baselines=baselines)
    with stage("micro_batches"):
        micro_batches(samples, torch.arange(completions), 2 * (157 + tokens))
    with stage("metrics"):
        metrics = completion_metrics(trainer, scored, scorer)
        with tempfile.TemporaryDirectory() as folder:
            frame([columns(scored.completions, scorer.attempts)]).to_parquet(Path(folder) / "table.parquet")
    with stage("page"):
        viewer = Viewer(samples, scored, scorer, GROUP, advantages, table.outcome)
        page("Completions", [GroupView(problems[0], [viewer.view(n) for n in range(GROUP)], GROUP, 1)], 4000)
    verifier.close()
    accuracy = metrics["accuracy"]
    assert 0.3 < accuracy < 0.6 and 0.1 < metrics["malformed"] < 0.2, metrics  # the texts are what they should be
    own = {f"cpu_{name}": value for name, value in own.items()}
    return {**seconds, **own, "tokens_sampled": int(mask.sum()), "gained_mib": max(0.0, peak_mib() - before)}


def growth(taken, factor, fixed):
    """The exponent of the whole time in a factor, where the other has its largest value."""
    most = max(row[fixed] for row in taken)
    sizes = sorted({row[factor] for row in taken if row[fixed] == most})
    times = [statistics.median(total(r) for r in taken if (r[factor], r[fixed]) == (size, most)) for size in sizes]
    return exponent(sizes, times)


def total(row):
    return sum(row[stage] for stage in STAGES)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="the first so many of the sizes")
    given = arguments(parser, "data_path")
    taken = []
    for repeat in range(given.repeats):
        for completions, tokens in SIZES[: given.sizes]:
            found = measure(__file__, {"completions": completions, "tokens": tokens})
            if found:
                row = {"completions": completions, "tokens": tokens, "repeat": repeat} | found
                append(given.csv, row)
                taken.append(row)
    for size in SIZES[: given.sizes]:
        rows = [row for row in taken if (row["completions"], row["tokens"]) == size]
        if rows:
            stages = ", ".join(f"{stage} {spread([row[stage] for row in rows])}" for stage in STAGES)
            print(f"{size[0]} x {size[1]}: {spread([total(row) for row in rows])} s: {stages}")
            print(f"    gained {spread([row['gained_mib'] for row in rows], 0)} MiB")
    for factor, fixed in (("completions", "tokens"), ("tokens", "completions")):
        print(f"exponent in {factor}: {growth(taken, factor, fixed):.2f}")


if __name__ == "__main__" and not serve(one):
    main()
