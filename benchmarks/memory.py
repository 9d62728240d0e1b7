"""How much memory steps take, and whether it stays the same: python benchmarks/memory.py [--stages rollout,update] …

Each step draws lengths anew: prompts of 20 to 200 tokens, and completions of --shortest to --new. So no two steps have
tensors of the same sizes, which is what makes the heap of a process fall apart. A small Llama with random weights, or
--model smollm2_135m (make smollm2) or a folder, in single precision.

Contenders take turns, each repeat in a process of its own:

    kept     what bae-train tells malloc (bae.commands.process_setup)
    default  malloc as it is
    a=b;…    parameters of mallopt by their numbers in malloc.h, such as -1=2147483647;-4=0
    FOLDER   another checkout of this project, as bae-train runs there

Printed for each step are MiB: what malloc has in use between steps, and the most that the process had; and seconds of
the processor, which other work on the machine changes less than the time that passes. At the end stand what tensors
take at the most in one more step, by the profiler (--tensors), and the seconds of all contenders.
"""

import argparse
import ctypes
import os
import re
from pathlib import Path
from time import process_time

from common import (
    NEVER,
    SMOLLM2,
    append,
    arguments,
    fixed_batch,
    listed,
    load,
    measure,
    named_blocks,
    plain_update,
    random_ids,
    sampling_request,
    serve,
    spread,
)

PROMPT = 20, 200
"""Tokens of the shortest and the longest prompt."""
VOCABULARY, WIDTH, LAYERS = 49152, 288, 8


def policy(model):
    import torch

    if model != "small":
        return load(model, "float32")
    from transformers import LlamaConfig, LlamaForCausalLM

    from bae.training import attention
    from bae.training.policy import Policy

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=768, num_hidden_layers=LAYERS,
                         num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=None)  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    attention.share(made)
    return Policy(made, None, None)


def most_mib():
    """The most memory that this process had since this was last asked."""
    text = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) / 1024


def used_mib():
    """What malloc has in use."""

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
        ]  # fmt: skip

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    info = mallinfo()
    return (info.uordblks + info.hblkhd) / 2**20


def drawn_lengths(step, prompts, group, shortest, new):
    """The tokens of each prompt, and (N,) of each completion. The longest completion is another in each step, too."""
    import torch

    draw = torch.Generator().manual_seed(step)
    asked = torch.randint(PROMPT[0], PROMPT[1] + 1, (prompts,), generator=draw)
    most = int(torch.randint((shortest + new) // 2, new + 1, (), generator=draw))
    return asked, torch.randint(shortest, most + 1, (prompts * group,), generator=draw)


def drawn_batch(vocabulary, asked, wanted, group):
    """A batch of random tokens as the training step finds it, with prompts and completions of these lengths."""
    from dataclasses import replace

    import torch

    batch = fixed_batch(vocabulary, len(asked), group, int(asked.max()), int(wanted.max()), blocks=1)
    prompt_mask = batch.samples.prompt_mask.flip(1).cumsum(1).flip(1) <= asked.repeat_interleave(group)[:, None]
    mask = torch.arange(int(wanted.max())) < wanted[:, None]
    batch.samples = replace(batch.samples, prompt_mask=prompt_mask, completion_mask=mask)
    batch.scored = replace(batch.scored, block_of=batch.scored.block_of.where(mask, -1))
    return batch


def end_at_wanted():
    """Let the completions of the local engine end at the lengths `wanted` of the class that is returned."""
    from bae.rollout.local import engine

    class Limited(engine._Draws):
        wanted = None

        def draw(self, rows, logits):
            token, unfinished = super().draw(rows, logits)
            return token, unfinished & (self.lengths[rows] < self.wanted[rows])

    engine._Draws = Limited
    return Limited


def one(model, stages, prompts, group, shortest, new, micro_batch_tokens, max_rows, steps, tensors, repeat):
    """All steps, in a process of their own."""
    from bae.rollout.local.engine import LocalEngine

    made = policy(model).model
    vocabulary = made.config.vocab_size
    update = plain_update(policy=type("Holder", (), {"model": made}), blocks=named_blocks(1),
                          micro_batch_tokens=micro_batch_tokens)  # fmt: skip
    engine, draws = LocalEngine(max_rows), end_at_wanted()

    def take(step, stage):
        asked, draws.wanted = drawn_lengths(step, prompts, group, shortest, new)
        if stage == "update":
            update.step(drawn_batch(vocabulary, asked, draws.wanted, group))
        else:
            ids = random_ids(vocabulary, prompts, PROMPT[1])
            cut = [row[:length].tolist() for row, length in zip(ids, asked, strict=True)]
            engine.sample(made, sampling_request(cut, group, new, NEVER))

    rows = []
    most_mib()
    for step in range(steps):
        row = {"step": step}
        for stage in stages:
            begun = process_time()
            take(step, stage)
            row |= {f"{stage}_s": process_time() - begun, f"{stage}_mib": most_mib()}
        rows.append(row | {"used_mib": used_mib()})
    return {"rows": rows, "tensors": {stage: tensors_mib(lambda: take(steps, stage)) for stage in stages * tensors}}  # noqa: B023


def tensors_mib(step):
    """The most that the tensors that were made in the step took together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def contend(contender, request):
    """What the contender makes of the request."""
    if not Path(contender).is_dir():
        return measure(__file__, request | {"malloc": contender})
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = contender
    try:
        return measure(__file__, request)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def report(contender, stages, found):
    print(f"\n{contender}\nstep{'in use':>10}" + "".join(f"{stage:>10}{'s':>8}" for stage in stages))
    for row in found["rows"]:
        cells = "".join(f"{row[f'{stage}_mib']:>10.0f}{row[f'{stage}_s']:>8.1f}" for stage in stages)
        print(f"{row['step']:>4}{row['used_mib']:>10.0f}{cells}", flush=True)
    for stage, size in found["tensors"].items():
        print(f"tensors made in {stage}: {size:.0f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="small", help=f"small, {SMOLLM2}, a folder or hub id")
    parser.add_argument("--contenders", type=listed(), default=["kept", "default"])
    parser.add_argument("--stages", type=listed(), default=["rollout", "update"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=5)
    parser.add_argument("--new", type=int, default=80)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tensors", action="store_true")
    given = arguments(parser, "memory")
    names = ("model", "stages", "prompts", "group", "shortest", "new", "micro_batch_tokens", "max_rows", "steps")
    request = {name: getattr(given, name) for name in names}
    seconds = {contender: [] for contender in given.contenders}
    for repeat in range(given.repeats):
        for contender in given.contenders if repeat % 2 == 0 else reversed(given.contenders):
            found = contend(contender, request | {"repeat": repeat, "tensors": given.tensors and not repeat})
            if found:
                report(contender, given.stages, found)
                seconds[contender].append(sum(row[f"{stage}_s"] for row in found["rows"] for stage in given.stages))
                for row in found["rows"]:
                    facts = {"contender": contender, **request, "stages": "+".join(given.stages), "repeat": repeat}
                    append(given.csv, facts | row | {"machine": found["machine"]})
    for contender, taken in seconds.items():
        if taken:
            print(f"{contender}: {spread(taken)} s of the processor for all steps")


if __name__ == "__main__" and not serve(one):
    main()
