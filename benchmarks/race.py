"""Whole RL steps a second, ours against TRL's GRPOTrainer: python benchmarks/race.py [--group 8,32] [--new 96] …

A step is sampling, rewards, and one AdamW step on all that was sampled, by SmolLM2-135M-Instruct (make smollm2, make
peers) or --model, on a GPU if there is one. Both have the same prompts, questions of GSM8K (from BAE_DATA; else sums,
whose prompts are shorter), under the system prompt of objectives=confidence_brier, and as many new tokens: the end of a
sequence is one that no model has.

Ours is bae-train's configuration in a Lightning trainer, with the callbacks that work at every step; answers are
verified. TRL has no checkpointing of gradients, no reference model, no logs, and two rewards that cost nothing. It
takes its best of --trl-rows, completions in a micro-batch; in bfloat16, of weights in bfloat16 and autocast; and of
--trl-malloc, where `kept` is what bae-train tells malloc (bae.commands.process_setup), and `default` is what TRL's
users have.

Each measurement is a process of its own: it loads the model, takes a step that is not counted, in which it gets its
memory, then the same again. Contenders take turns. Peak memory is that of the process, libraries and
model with it, and without the verifier's workers, which start with the first answer that is in form.

Heavy imports wait inside the functions: the verifier's spawned workers import this file as well.
"""

import argparse
import gc
import statistics
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from time import perf_counter

from common import (
    DATA,
    NEVER,
    append,
    arguments,
    device,
    listed,
    load,
    measure,
    ratios,
    serve,
    spread,
    train_config,
    wait,
)

OURS = ("ours", 0, "kept")
SEEN = 2000
"""Questions among which those of the right length are looked for."""
EACH_STEP = ("rollouts", "dynamic_sampling", "advantages", "block_telemetry", "collapse", "entropy", "telemetry")
"""Callbacks of a training run that work at every step."""


class Chosen:
    """Some problems as a task."""

    def __init__(self, problems, verifier):
        self.problems, self.verifier = problems, verifier

    def size(self, split):
        return len(self.problems)

    def problem(self, split, index):
        return self.problems[index]


class Endless:
    """An engine whose completions never end before the limit."""

    def __init__(self, engine):
        self.engine = engine

    def sample(self, model, request):
        return self.engine.sample(model, replace(request, eos_token_id=NEVER))


def configuration(new, micro_batch_tokens):
    task = "gsm8k" if (DATA / "gsm8k_train.jsonl").is_file() else "arithmetic"
    overrides = [f"task={task}", "objectives=confidence_brier", f"max_new_tokens={new}"]
    overrides += ["strategy=gpu"] if device() == "cuda" else []
    overrides += [f"training.micro_batch_tokens={micro_batch_tokens}", "lr=1e-6"]
    overrides += [f"task.splits.train={DATA}/gsm8k_train.jsonl"] if task == "gsm8k" else []
    return train_config(*overrides)


def choose(cfg, policy, count, tokens):
    """The problems whose prompts are nearest to so many tokens, and how many these have on average."""
    from bae.commands.build import make

    task = make(cfg.task)
    problems = [task.problem("train", index) for index in range(min(SEEN, task.size("train")))]
    length = {p.id: len(policy.encode(cfg.objectives.system_prompt, p.question)) for p in problems}
    problems = sorted(problems, key=lambda p: (abs(length[p.id] - tokens), p.id))[:count]
    return Chosen(problems, task.verifier), sum(length[p.id] for p in problems) / count


def ours(cfg, policy, task, prompts, group, new):
    """Seconds of one step by Lightning, whole and by stage, and tokens that were sampled."""
    import lightning as L
    from lightning.pytorch.callbacks import LambdaCallback

    from bae.commands.build import make, make_pipeline, plain
    from bae.tasks.loader import PromptDataModule
    from bae.training.module import PolicyModule
    from bae.training.options import UpdateOptions
    from bae.training.update import Update

    pipeline = make_pipeline(cfg, policy, task)
    pipeline = replace(pipeline, engine=Endless(pipeline.engine), max_new_tokens=new)
    options = UpdateOptions(**plain(cfg.training))
    update = Update(policy.model, pipeline.scorer.blocks, cfg.temperature, options, make(cfg.aggregation))
    module = PolicyModule(policy, update, make(cfg.optimizer), steps=1)
    found = {}

    def begin(trainer, module, batch, index):
        found["begun"] = perf_counter()

    def end(trainer, module, outputs, batch, index):
        wait()
        found.update(batch.seconds, step=perf_counter() - found.pop("begun"))
        found["tokens"] = int(batch.samples.completion_mask.sum())

    parts = [make(cfg.callbacks[name]) for name in EACH_STEP]
    parts = [part(pipeline) if hasattr(part, "func") else part for part in parts]
    callbacks = [LambdaCallback(on_train_batch_start=begin), *parts, LambdaCallback(on_train_batch_end=end)]
    trainer = L.Trainer(**make(cfg.strategy), max_epochs=1, callbacks=callbacks, logger=False,
                        enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False,
                        use_distributed_sampler=False)  # fmt: skip
    trainer.fit(module, PromptDataModule(task, 1, prompts, group, cfg.seed))
    return found


def length(completions, **_):
    """A reward for TRL."""
    return [float(len(turns[0]["content"])) for turns in completions]


def tags(completions, **_):
    """Another one."""
    return [float(turns[0]["content"].count("<")) for turns in completions]


def trl(cfg, policy, task, prompts, group, new, rows, autocast):
    """The same of one step by TRL. rows: completions in a micro-batch, at most."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    found = {"rollout": 0.0, "reward": 0.0}

    @contextmanager
    def timed(name):
        begun = perf_counter()
        yield
        found[name] += perf_counter() - begun

    class Timed(GRPOTrainer):
        def _generate(self, *given):
            with timed("rollout"):
                return super()._generate(*given)

        def _calculate_rewards(self, *given):
            with timed("reward"):
                return super()._calculate_rewards(*given)

    class Clock(TrainerCallback):
        def on_step_begin(self, *given, **more):
            found["step"] = -perf_counter()

        def on_step_end(self, *given, **more):
            wait()
            found["step"] += perf_counter()
            metrics = trainer._metrics["train"]  # the log after this clears them
            found["tokens"] = round(metrics["completions/mean_length"][-1] * n)
            found["trl_prompt"] = metrics["num_tokens"][-1] / n - found["tokens"] / n

    n = prompts * group
    rows = max(r for r in range(1, min(rows, n) + 1) if n % r == 0)
    settings = GRPOConfig(
        "/tmp/bae_race", use_cpu=device() == "cpu", bf16=autocast, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, torch_compile=False,
        dataloader_num_workers=0, max_steps=1, num_generations=group, max_completion_length=new,
        per_device_train_batch_size=rows, gradient_accumulation_steps=n // rows, learning_rate=1e-6,
        temperature=1.0, top_k=0, top_p=1.0, beta=0.0, shuffle_dataset=False,
        generation_kwargs={"eos_token_id": None},
    )  # fmt: skip
    system = {"role": "system", "content": cfg.objectives.system_prompt}
    chats = [{"prompt": [system, {"role": "user", "content": p.question}]} for p in task.problems[:prompts]]
    trainer = Timed(policy.model, [length, tags], settings, train_dataset=Dataset.from_list(chats),
                    processing_class=policy.tokenizer, callbacks=[Clock()])  # fmt: skip
    trainer.eos_token_ids = [NEVER]
    trainer.train()
    return found | {"update": found["step"] - found["rollout"] - found["reward"]}


def one(contender, model, dtype, group, prompts, prompt_tokens, new, micro_batch_tokens, rows):
    """One measurement, in a process of its own. rows: of TRL's micro-batches."""
    begun = perf_counter()
    cfg = configuration(new, micro_batch_tokens)
    # Autocast is for weights in single precision.
    weights = "float32" if contender == "trl autocast" else dtype
    policy = load(model, weights, shared_prefix=contender == "ours")
    task, mean_prompt = choose(cfg, policy, prompts, prompt_tokens)
    step, more = ours, {}
    if contender != "ours":
        step, more = trl, {"rows": rows, "autocast": contender == "trl autocast"}
    loaded = perf_counter()
    step(cfg, policy, task, prompts, group, new, **more)
    gc.collect()  # the first step's optimiser
    warm = perf_counter()
    found = step(cfg, policy, task, prompts, group, new, **more)
    task.verifier.close()
    if found["tokens"] != prompts * group * new:
        raise RuntimeError(f"{contender} made {found['tokens']} tokens instead of {prompts * group * new}")
    if abs(found.get("trl_prompt", mean_prompt) - mean_prompt) > 1e-6:
        raise RuntimeError(f"TRL's prompts have {found['trl_prompt']} tokens, ours {mean_prompt}")
    stages = {f"{name}_s": found.get(name, 0.0) for name in ("step", "rollout", "reward", "baseline", "update")}
    return stages | {
        "completions_per_s": prompts * group / found["step"],
        "load_s": loaded - begun,
        "warm_up_s": warm - loaded,
        "mean_prompt": mean_prompt,
    }


def contenders(given, dtype):
    """(contender, rows of a micro-batch, malloc), ours first."""
    theirs = ["trl", "trl autocast"] if dtype == "bfloat16" and given.autocast else ["trl"]
    return [OURS, *product(theirs, given.trl_rows, given.trl_malloc)]


def race(given, dtype, group):
    """Rows of the CSV, by contender."""
    taken = {key: [] for key in contenders(given, dtype)}
    setting = {"model": given.model, "dtype": dtype, "group": group, "prompts": given.prompts,
               "prompt_tokens": given.prompt_tokens, "new": given.new,
               "micro_batch_tokens": given.micro_batch_tokens}  # fmt: skip
    for repeat in range(given.repeats):
        for contender, rows, malloc in list(taken) if repeat % 2 == 0 else list(reversed(taken)):
            request = {"contender": contender, **setting, "rows": rows, "malloc": malloc}
            found = measure(__file__, request)
            if found:
                row = request | {"repeat": repeat} | found
                append(given.csv, row)
                taken[contender, rows, malloc].append(row)
    return {key: rows for key, rows in taken.items() if rows}


def report(dtype, group, taken):
    if not taken:
        return
    first = next(iter(taken.values()))[0]
    print(f"\n{dtype}, {first['prompts']} prompts x {group}, {first['mean_prompt']:.0f} + {first['new']} tokens")
    columns = {"step_s": 2, "rollout_s": 2, "reward_s": 2, "update_s": 2, "completions_per_s": 3, "peak_mib": 0}
    print(f"{'':<24}" + "".join(f"{column:>24}" for column in columns))
    for (name, rows, malloc), runs in taken.items():
        cells = "".join(f"{spread([run[column] for run in runs], digits):>24}" for column, digits in columns.items())
        print(f"{f'{name} {rows or str()} {malloc}':<24}{cells}")
    middle = {key: statistics.median(run["step_s"] for run in runs) for key, runs in taken.items()}
    theirs = [key for key in taken if key != OURS]
    if OURS in taken and theirs:
        best = min(theirs, key=middle.__getitem__)
        mine, others = taken[OURS], taken[best]
        print(f"ours over the fastest TRL ({best[0]}, {best[1]} completions a micro-batch, malloc {best[2]}): "
              f"{middle[best] / middle[OURS]:.2f} of medians; "
              f"completions a second {spread(ratios(mine, others, 'completions_per_s'))}, "
              f"peak memory {spread(ratios(mine, others, 'peak_mib'))}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", type=listed(), default=["float32", "bfloat16"])
    parser.add_argument("--group", type=listed(int), default=[8, 32])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=250, help="questions near to it are chosen")
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="ours; of experiment=smollm2_gsm8k")
    parser.add_argument("--trl-rows", type=listed(int), default=[8], help="completions in TRL's micro-batches")
    parser.add_argument("--trl-malloc", type=listed(), default=["kept"], help="kept, default or both")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="TRL with bf16=True")
    given = arguments(parser, "race", model=True)
    for dtype in given.dtype:
        for group in given.group:
            report(dtype, group, race(given, dtype, group))


if __name__ == "__main__" and not serve(one):
    main()
