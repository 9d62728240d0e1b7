"""How much of the machine's speed the update gets: python benchmarks/update.py [--group 8] [--compile] [--profile] …

The training step of SmolLM2-135M-Instruct (make smollm2) or --model, on a GPU if there is one, on fixed random samples.
Its forward and backward passes are timed without the optimiser's step and the clipping, which are a column of their
own, and are held against

    square    the fastest of products of square matrices, up to 2048 x 2048 on a CPU (bae.training.flops.matmul_rate)
    own       the very products that the layers and the head need, with as many rows as a micro-batch has: forward,
              gradient of the input, gradient of the weight; all their work over all their time

which are measured in the same process, in turns with it. Useful work is 6 operations for each weight of a linear layer
and token, a prompt counting once for its group; 12 for each pair of a query with a key before it, each head and each
number in it; and 6 for each weight of the head and completion token. What is computed again does not count. So the
share of a product's speed that is useful work (MFU) may exceed 1 for own products only by noise.

A process for each setting, which takes one step that is not counted. Peak memory is that of the process, libraries and
model with it. --profile adds a table of where the time of one more step goes, by the profiler, which slows it.
"""

import argparse
from time import perf_counter

from common import (
    append,
    arguments,
    fixed_batch,
    listed,
    load,
    measure,
    named_blocks,
    plain_update,
    serve,
    spread,
    wait,
)

SECONDS = 1.0
"""That square products are tried for."""
TRIES = 3
"""Runs of each product, the best of which counts."""
SCOPES = (("_Tiled", "attention"), ("_Chunked", "vocabulary"), ("Optimizer.", "optimiser"))
"""Whatever is done within an operation of such a name."""
OPERATIONS = (
    (("mm", "bmm", "addmm", "matmul", "linear"), "matrix products"),
    (("copy_", "clone", "cat", "index", "gather", "scatter", "contiguous", "_to_copy", "masked_scatter"), "copies"),
    (("mul", "add", "sub", "div", "neg", "silu", "rsqrt", "mean", "pow", "sum", "cos", "sin", "exp", "fill_", "zero_",
      "where", "norm"), "norms and other elementwise"),
)  # fmt: skip


def linear_shapes(model):
    """(outputs, inputs) of every linear layer but the head."""
    import torch

    head = model.get_output_embeddings()
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def useful(model, samples, group):
    """Operations of a forward and a backward pass that no implementation can do without, by where they are."""
    from dataclasses import replace

    from bae.training.flops import ModelSize, model_size, update_flops

    size, nothing = model_size(model), ModelSize(0, 0, 0)
    return {
        "linear": update_flops(replace(nothing, layers=size.layers), samples, group),
        "attention": update_flops(replace(nothing, pair=size.pair), samples, group),
        "head": update_flops(replace(nothing, head=size.head), samples, group),
    }


def best(product):
    """Seconds."""
    times = []
    for _ in range(TRIES):
        wait()
        begun = perf_counter()
        product()
        wait()
        times.append(perf_counter() - begun)
    return min(times)


def own_rate(model, rows, head_rows):
    """Operations a second over the products of all layers, each of which has so many rows, and of the head."""
    from collections import Counter

    import torch

    head = tuple(model.get_output_embeddings().weight.shape)
    products = Counter((rows, *shape) for shape in linear_shapes(model)) + Counter({(head_rows, *head): 1})
    work = seconds = 0.0
    for (m, o, i), count in products.items():
        x, w, g = (torch.randn(*shape, device=model.device).to(model.dtype) for shape in ((m, i), (o, i), (m, o)))
        passes = (lambda: torch.nn.functional.linear(x, w), lambda: g @ w, lambda: g.T @ x)  # noqa: B023
        seconds += count * sum(map(best, passes))
        work += count * 6 * m * o * i
    return work / seconds


def kind_of(event):
    """Of an operation of the profiler, by its own name and those of what it is part of."""
    name, above = event.name, event
    while above is not None:
        for mark, kind in SCOPES:
            if mark in above.name:
                return kind
        above = above.cpu_parent
    if "CompiledFxGraph" in name:  # what torch.compile fused; matrix products are operations of their own within
        return "norms and other elementwise"
    bare = name.removeprefix("aten::").removesuffix("Backward0")
    for names, kind in OPERATIONS:
        if any(bare.startswith(x) or bare.strip("_").endswith(x) for x in names):
            return kind
    return "rest"


def profile(step):
    """Seconds by kind, and by name those of the kind that has none."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU]) as seen:
        step()
    kinds, rest = {}, {}
    for event in seen.events():
        seconds, kind = event.self_cpu_time_total / 1e6, kind_of(event)
        kinds[kind] = kinds.get(kind, 0.0) + seconds
        if kind == "rest":
            rest[event.name] = rest.get(event.name, 0.0) + seconds
    return {"kinds": kinds, "rest": dict(sorted(rest.items(), key=lambda x: -x[1])[:8])}


def timed_optimiser(update):
    """Count the seconds of its step and of the clipping before it."""
    taken = [0.0]

    def watch(function):
        def timed(*given, **more):
            wait()
            begun = perf_counter()
            value = function(*given, **more)
            wait()
            taken[0] += perf_counter() - begun
            return value

        return timed

    optimizer = update.stepper.optimizer
    optimizer.step, update.stepper.clip_gradients = watch(optimizer.step), watch(update.stepper.clip_gradients)
    return taken


def one(model, dtype, group, prompts, prompt_tokens, new, micro_batch_tokens, compiled, repeats, profiled):
    """All repeats of one setting."""
    from statistics import fmean

    import torch

    from bae.training.chunked_head import LOGITS
    from bae.training.flops import matmul_rate
    from bae.training.packing import Packing, micro_batches

    begun = perf_counter()
    policy = load(model, dtype, compile=compiled)
    model = policy.model
    batch = fixed_batch(model.config.vocab_size, prompts, group, prompt_tokens, new, 2)
    parts = micro_batches(batch.samples, torch.arange(prompts * group), micro_batch_tokens)
    rows = round(fmean(Packing(batch.samples, part, "cpu").ids.numel() for part in parts))
    head_rows = min(round(fmean(len(part) * new for part in parts)), LOGITS // model.config.vocab_size)
    update = plain_update(policy, named_blocks(2), micro_batch_tokens)
    loaded = perf_counter()
    update.step(batch)
    warm = perf_counter()
    taken = timed_optimiser(update)
    work = useful(model, batch.samples, group)
    measured = []
    for _ in range(repeats):
        rates = {"square": matmul_rate(model.device, model.dtype, SECONDS), "own": own_rate(model, rows, head_rows)}
        batch.seconds["update"] = taken[0] = 0.0
        update.step(batch)
        seconds = batch.seconds["update"] - taken[0]
        rate = sum(work.values()) / seconds
        measured.append({
            "pass_s": seconds, "optimiser_s": taken[0], "pass_gflops": rate / 1e9,
            **{f"{name}_gflops": speed / 1e9 for name, speed in rates.items()},
            **{f"mfu_{name}": rate / speed for name, speed in rates.items()},
        })  # fmt: skip
    return {
        "measured": measured,
        "setting": {
            "micro_batches": len(parts), "rows": rows, "head_rows": head_rows,
            **{f"{name}_gflop": count / 1e9 for name, count in work.items()},
            "load_s": loaded - begun, "warm_up_s": warm - loaded,
        },
        "profile": profile(lambda: update.step(batch)) if profiled else None,
    }  # fmt: skip


def report(request, found):
    setting, rows = found["setting"], found["measured"]
    total = sum(setting[f"{name}_gflop"] for name in ("linear", "attention", "head"))
    print(f"\n{request['dtype']}, {request['prompts']} prompts x {request['group']}, {request['prompt_tokens']} + "
          f"{request['new']} tokens{', compiled' if request['compiled'] else ''}: {total:.0f} GFLOP in "
          f"{setting['micro_batches']} micro-batches of {setting['rows']} tokens; "
          f"warm-up {setting['warm_up_s']:.1f} s, peak {found['peak_mib']:.0f} MiB")  # fmt: skip
    digits = {"pass_s": 2, "optimiser_s": 2, "pass_gflops": 0, "square_gflops": 0, "own_gflops": 0, "mfu_square": 3,
              "mfu_own": 3}  # fmt: skip
    print("".join(f"{name:>22}" for name in digits))
    print("".join(f"{spread([row[name] for row in rows], d):>22}" for name, d in digits.items()))
    if found["profile"]:
        whole = sum(found["profile"]["kinds"].values())
        for kind, seconds in sorted(found["profile"]["kinds"].items(), key=lambda x: -x[1]):
            print(f"  {kind:<30}{seconds:8.2f} s{seconds / whole:8.1%}")
        print("  most of the rest: " + ", ".join(f"{name} {s:.2f} s" for name, s in found["profile"]["rest"].items()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", type=listed(), default=["float32", "bfloat16"])
    parser.add_argument("--group", type=listed(int), default=[8, 32])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=250)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--micro-batch-tokens", type=listed(int), default=[2048])
    parser.add_argument("--compile", action="store_true", help="the layers, by bae.training.policy.compile_layers")
    parser.add_argument("--profile", action="store_true")
    given = arguments(parser, "update", model=True)
    for dtype in given.dtype:
        for group in given.group:
            for tokens in given.micro_batch_tokens:
                request = {"model": given.model, "dtype": dtype, "group": group, "prompts": given.prompts,
                           "prompt_tokens": given.prompt_tokens, "new": given.new, "micro_batch_tokens": tokens,
                           "compiled": given.compile, "repeats": given.repeats}  # fmt: skip
                found = measure(__file__, request | {"profiled": given.profile})
                if found:
                    facts = found["setting"] | {"peak_mib": found["peak_mib"], "machine": found["machine"]}
                    for repeat, row in enumerate(found["measured"]):
                        append(given.csv, request | {"repeat": repeat} | row | facts)
                    report(request, found)


if __name__ == "__main__" and not serve(one):
    main()
