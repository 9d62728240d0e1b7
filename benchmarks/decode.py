"""Tokens a second of sampling alone, ours, transformers' generate and vLLM: python benchmarks/decode.py [--new 96] …

SmolLM2-135M-Instruct (make smollm2) or --model, random prompts, every completion of full length. Settings are prompts x
completions of each; by default 64 sequences as 8 x 8 and as 64 x 1, where no prompt is shared. transformers has no end
of sequence to look for, and reads a prompt again for each of its completions, as generate does. vLLM is left out where
it is not installed.

Each measurement is a process of its own, whose loading of the model does not count, nor does a warm-up of 2 tokens of
every sequence, in which vLLM makes its engine. Then the time for 1 token of each is taken, which is that of the
prompts, and that for all. Contenders take turns. Peak memory is that of the process, libraries and model with it; vLLM
keeps a copy of the weights and a cache of fixed size.
"""

import argparse
import importlib.util
from time import perf_counter

from common import (
    NEVER,
    append,
    arguments,
    listed,
    load,
    measure,
    random_ids,
    ratios,
    sampling_request,
    serve,
    spread,
    wait,
)

RARE = 6
"""The end of a sequence for vLLM, which wants one that the model has: of SmolLM2, <filename>. Should it be drawn, the
measurement fails."""
CONTENDERS = ("ours", "transformers", "vllm")


def engine(name, sequences, tokens):
    """(model, prompts, group, new) -> (N, new) ids."""
    if name == "transformers":
        return generate
    end = NEVER
    if name == "vllm":
        end = RARE
        from bae.rollout.vllm.engine import VllmEngine

        made = VllmEngine(max_model_len=tokens, max_num_seqs=sequences)
    else:
        from bae.rollout.local.engine import LocalEngine

        made = LocalEngine()

    def sample(model, prompts, group, new):
        request = sampling_request(prompts.tolist(), group, new, end)
        return made.sample(model, request).completion_ids

    return sample


def generate(model, prompts, group, new):
    import torch
    from transformers import GenerationConfig

    model.generation_config.eos_token_id = None  # else it stands in for the one that is not given below
    settings = GenerationConfig(max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                num_return_sequences=group, pad_token_id=0)  # fmt: skip
    prompts = prompts.to(model.device)
    with torch.no_grad():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    return out[:, prompts.shape[1] :]


def one(contender, model, dtype, prompts, group, prompt_tokens, new):
    """One measurement, in a process of its own."""
    begun = perf_counter()
    model = load(model, dtype, shared_prefix=contender == "ours").model
    sample = engine(contender, prompts * group, prompt_tokens + new)
    ids = random_ids(model.config.vocab_size, prompts, prompt_tokens)
    loaded = perf_counter()
    seconds = []
    for tokens in (2, 1, new):
        start = perf_counter()
        made = sample(model, ids, group, tokens)
        wait()
        seconds.append(perf_counter() - start)
        if tuple(made.shape) != (prompts * group, tokens):
            raise RuntimeError(f"{contender} made {tuple(made.shape)} tokens instead of {prompts * group} x {tokens}")
    warm, first, whole = seconds
    n = prompts * group
    return {
        "seconds": whole,
        "prompt_s": first,
        "tokens_per_s": n * new / whole,
        "decode_tokens_per_s": n * (new - 1) / max(whole - first, 1e-9),
        "load_s": loaded - begun,
        "warm_up_s": warm,
    }


def compare(given, contenders, dtype, prompts, group):
    """Rows of the CSV, by contender."""
    taken = {name: [] for name in contenders}
    setting = {"model": given.model, "dtype": dtype, "prompts": prompts, "group": group,
               "prompt_tokens": given.prompt_tokens, "new": given.new}  # fmt: skip
    for repeat in range(given.repeats):
        for name in contenders if repeat % 2 == 0 else reversed(contenders):
            request = {"contender": name, **setting}
            found = measure(__file__, request)
            if found:
                row = request | {"repeat": repeat} | found
                append(given.csv, row)
                taken[name].append(row)
    return {name: rows for name, rows in taken.items() if rows}


def report(given, dtype, prompts, group, taken):
    print(f"\n{dtype}, {prompts} prompts x {group}, {given.prompt_tokens} + {given.new} tokens")
    columns = {"tokens_per_s": 0, "decode_tokens_per_s": 0, "prompt_s": 2, "warm_up_s": 2, "peak_mib": 0}
    print(f"{'':<14}" + "".join(f"{column:>24}" for column in columns) + f"{'ours over it':>24}")
    for name, rows in taken.items():
        cells = "".join(f"{spread([row[column] for row in rows], digits):>24}" for column, digits in columns.items())
        over = ratios(taken.get("ours", []), rows, "tokens_per_s")
        print(f"{name:<14}{cells}{spread(over) if over else '-':>24}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", type=listed(), default=["float32", "bfloat16"])
    parser.add_argument("--settings", type=listed(), default=["8x8", "64x1"], help="prompts x completions of each")
    parser.add_argument("--contenders", type=listed(), default=list(CONTENDERS))
    parser.add_argument("--prompt-tokens", type=int, default=250)
    parser.add_argument("--new", type=int, default=96)
    given = arguments(parser, "decode", model=True)
    contenders = given.contenders
    if "vllm" in contenders and not importlib.util.find_spec("vllm"):
        print("vllm is skipped: it is not installed")
        contenders = [name for name in contenders if name != "vllm"]
    for dtype in given.dtype:
        for setting in given.settings:
            prompts, group = map(int, setting.split("x"))
            report(given, dtype, prompts, group, compare(given, contenders, dtype, prompts, group))


if __name__ == "__main__" and not serve(one):
    main()
