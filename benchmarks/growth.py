"""How time and memory grow, one factor at a time: python benchmarks/growth.py [--figure] [--factors group,new] …

A small Llama with random weights, in single precision. One factor changes, the others stay as they are in BASE:

    group        G, completions of a prompt       new     tokens of a completion
    vocabulary   tokens that there are            blocks  K, parts of a completion (the update alone)
    completions  N, in a batch of three blocks, of which advantages are made: OCB with its fallback, and their sums

For each value there is a process for sampling and one for the training step, which take a small step that is not
counted (2 tokens of 2 completions) and then three, the median of which counts. Memory is what the process gained over
what it had before these, when libraries, weights and the small step's leavings were there; peak_mib, in the CSV, is all
of it. Values take turns. Printed is the exponent of a power law, by least squares in logarithms over the upper half of
the values: medians, and the range over repeats. --figure draws docs/results/growth.png.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path
from time import perf_counter

from common import (
    NEVER,
    RESULTS,
    append,
    arguments,
    fixed_batch,
    listed,
    measure,
    named_blocks,
    now_mib,
    peak_mib,
    plain_update,
    random_ids,
    sampling_request,
    serve,
    spread,
)

BASE = {"prompts": 2, "group": 8, "prompt_tokens": 64, "new": 64, "vocabulary": 8192, "blocks": 2}
FACTORS = {
    "group": [4, 8, 16, 32, 64],
    "new": [32, 64, 128, 256, 512],
    "vocabulary": [1000, 4000, 16000, 64000, 128000],
    "blocks": [1, 2, 4, 8],
    "completions": [10**4, 10**5, 10**6],
}
PHASES = {"blocks": ["update"], "completions": ["advantages"]}  # of other factors: rollout and update
LAYERS, WIDTH, HEADS = 4, 256, 4
STEPS = 3
GROUP = 8
"""Of the completions whose advantages are made."""


def small_policy(vocabulary):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bae.training import attention
    from bae.training.policy import Policy

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=3 * WIDTH,
                         num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    attention.share(model)
    return Policy(model, None, None)


def rollout(prompts, group, prompt_tokens, new, vocabulary, blocks, micro_batch_tokens):
    """A function that samples so many completions of so many tokens; blocks are nothing to an engine."""
    from bae.rollout.local.engine import LocalEngine

    model, engine = small_policy(vocabulary).model, LocalEngine()
    ids = random_ids(vocabulary, prompts, prompt_tokens).tolist()
    requests = {True: sampling_request(ids, 1, 2, NEVER), False: sampling_request(ids, group, new, NEVER)}
    return lambda small: engine.sample(model, requests[small])


def update(prompts, group, prompt_tokens, new, vocabulary, blocks, micro_batch_tokens):
    """A function that takes a training step."""
    made = plain_update(small_policy(vocabulary), named_blocks(blocks), micro_batch_tokens)
    small_batch = fixed_batch(vocabulary, 1, 2, prompt_tokens, 2, blocks)
    batch = fixed_batch(vocabulary, prompts, group, prompt_tokens, new, blocks)
    return lambda small: made.step(small_batch if small else batch)


def advantages(completions):
    """A function that makes advantages of three blocks from scores, as bae.callbacks.writers does."""
    from functools import partial

    import torch

    from bae.batch import group_index
    from bae.method.advantages import advantages as minus
    from bae.method.advantages import sum_by_block
    from bae.method.baselines import group_mean, outcome_conditioned, with_fallback, without_self
    from bae.objectives import Objective
    from bae.objectives.brier import brier
    from bae.objectives.correctness import correctness
    from bae.objectives.reward_view import ScoreTable, reward_view

    report = partial(Objective, score=brier, worst=-1.0, given="right")
    objectives = [
        Objective("right", "block_0", worst=0.0, reward=correctness),
        report("first", "block_1"),
        report("second", "block_2"),
    ]

    def make(count):
        draw = torch.Generator().manual_seed(0)
        correct = torch.randint(2, (count, 1), generator=draw).float().expand(-1, 3)
        confidence = torch.rand(count, 3, generator=draw)
        rewards = torch.where(torch.arange(3) == 0, correct, brier(confidence, correct))
        every = torch.ones(count, 3, dtype=torch.bool)
        given = correct.double() * (torch.arange(3) > 0)
        return ScoreTable(rewards, every, ~every, confidence, correct, given), group_index(count, GROUP)

    tables = {True: make(2 * GROUP), False: make(completions)}

    def weigh(small):
        table, group = tables[small]
        baselines = torch.zeros_like(table.rewards)
        for j, objective in enumerate(objectives):
            baseline = outcome_conditioned if j else group_mean
            baselines[:, j], _ = with_fallback(baseline, without_self, reward_view(objective, j, table, group))
        return sum_by_block(minus(table.rewards, baselines, table.present), [0, 1, 2], [1.0] * 3, 3)

    return weigh


def one(phase, **setting):
    """One measurement, in a process of its own."""
    begun = perf_counter()
    step = {"rollout": rollout, "update": update, "advantages": advantages}[phase](**setting)
    step(True)
    warm = perf_counter()
    before = now_mib()
    taken = []
    for _ in range(STEPS):
        start = perf_counter()
        step(False)
        taken.append(perf_counter() - start)
    return {
        "seconds": statistics.median(taken),
        "gained_mib": max(0.0, peak_mib() - before),
        "load_and_warm_up_s": warm - begun,
    }


def settings(given, factor, value):
    if factor == "completions":
        return {"completions": value}
    return BASE | {"micro_batch_tokens": given.micro_batch_tokens, factor: value}


def grow(given, factor):
    """Rows of the CSV."""
    values = FACTORS[factor][: given.values]
    taken = []
    for repeat in range(given.repeats):
        for value in values if repeat % 2 == 0 else reversed(values):
            for phase in PHASES.get(factor, ["rollout", "update"]):
                found = measure(__file__, {"phase": phase, **settings(given, factor, value)})
                if found:
                    row = {"factor": factor, "value": value, "phase": phase, "repeat": repeat,
                           "micro_batch_tokens": given.micro_batch_tokens} | found  # fmt: skip
                    append(given.csv, row)
                    taken.append(row)
    return taken


def exponent(values, results):
    """The slope of the logarithms over the upper half of the values, those in the middle with it; NaN for one value, or
    for nothing that was gained."""
    half = len(values) // 2
    points = [(math.log(v), math.log(r)) for v, r in list(zip(values, results, strict=True))[half:] if r > 0]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def exponents(rows, column):
    """Of the medians, and the range over repeats, as text."""
    values = sorted({row["value"] for row in rows})
    at = lambda value, repeat=None: statistics.median(  # noqa: E731
        row[column] for row in rows if row["value"] == value and repeat in (None, row["repeat"])
    )
    each = []
    for repeat in sorted({row["repeat"] for row in rows}):
        if all(any(row["value"] == v and row["repeat"] == repeat for row in rows) for v in values):
            each.append(exponent(values, [at(v, repeat) for v in values]))
    middle = exponent(values, [at(v) for v in values])
    return f"{middle:.2f} [{min(each):.2f}, {max(each):.2f}]" if each else f"{middle:.2f}"


def report(taken):
    for factor in dict.fromkeys(row["factor"] for row in taken):
        print(f"\n{factor:<14}{'value':>10}{'seconds':>26}{'MiB gained':>26}")
        for phase in dict.fromkeys(row["phase"] for row in taken if row["factor"] == factor):
            rows = [row for row in taken if row["factor"] == factor and row["phase"] == phase]
            for value in sorted({row["value"] for row in rows}):
                cells = [[row[column] for row in rows if row["value"] == value] for column in ("seconds", "gained_mib")]
                print(f"{phase:<14}{value:>10}{spread(cells[0], 3):>26}{spread(cells[1], 1):>26}")
            slopes = [exponents(rows, column) for column in ("seconds", "gained_mib")]
            print(f"{phase:<14}{'exponent':>10}{slopes[0]:>26}{slopes[1]:>26}")


def draw(path, taken):
    """Time above, memory below; a column for each factor. Bars go over the range of repeats."""
    from matplotlib import style
    from matplotlib.ticker import LogLocator, NullFormatter

    from bae.evaluation.figures import STYLE, add_curve, add_legend, make_panels

    style.use(STYLE)
    factors = [factor for factor in FACTORS if any(row["factor"] == factor for row in taken)]
    figure, panels = make_panels(len(factors), rows=2, height=3.4)
    for column, factor in enumerate(factors):
        for i, phase in enumerate(("rollout", "update", "advantages")):
            rows = [row for row in taken if row["factor"] == factor and row["phase"] == phase]
            if not rows:
                continue
            for panel, name in zip(panels[:, column], ("seconds", "gained_mib"), strict=True):
                values = sorted({row["value"] for row in rows if row[name] > 0})
                cells = [[row[name] for row in rows if row["value"] == v and row[name] > 0] for v in values]
                add_curve(panel, values, cells, phase, i, 3, statistics.median)
        for panel in panels[:, column]:
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(sorted({row["value"] for row in taken if row["factor"] == factor}))
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}" if value < 1000 else f"{value / 1000:.0f}k")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.yaxis.set_minor_formatter(NullFormatter())
        panels[1][column].set_xlabel(factor)
    panels[0][0].set_ylabel("Seconds")
    panels[1][0].set_ylabel("MiB gained")
    add_legend(figure, panels.flat)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def saved(path):
    """Rows of a CSV that an earlier run made."""
    kinds = {"value": int, "repeat": int, "seconds": float, "gained_mib": float}
    with path.open(newline="") as file:
        return [row | {name: kind(row[name]) for name, kind in kinds.items()} for row in csv.DictReader(file)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--factors", type=listed(), default=list(FACTORS))
    parser.add_argument("--values", type=int, help="the smallest so many of each factor; else all")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--figure", action="store_true", help="of all rows of the CSV")
    parser.add_argument("--figure-file", type=Path, default=RESULTS / "growth.png")
    given = arguments(parser, "growth")
    for factor in given.factors:
        report(grow(given, factor))
    if given.figure:  # last, for it loads torch, and processes begin with the memory of the one that starts them
        draw(given.figure_file, saved(given.csv))


if __name__ == "__main__" and not serve(one):
    main()
