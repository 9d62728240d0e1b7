# ruff: noqa: E402
"""What each baseline costs in a training step: python benchmarks/baselines.py [--rounds 7] [overrides of bae-train …]

All work on the same rollouts, in turns, with a learning rate of 0; each line is a median over rounds and the range, in
milliseconds, and as a share of the whole step (rollout, reward, baseline, update). Peak memory: a process for each.
"""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

from bae.commands import process_setup

process_setup.prepare()  # before torch

import torch
from hydra import compose, initialize_config_dir

from bae.batch import RolloutBatch
from bae.callbacks import BlockwiseAdvantages, Rollouts
from bae.commands import schema
from bae.commands.build import make, make_pipeline, plain, quieten
from bae.commands.cli import CONF
from bae.training.options import UpdateOptions
from bae.training.update import Update

ALONE = SimpleNamespace(world_size=1, global_rank=0)
BASELINES = ["ocb", "ocb_loo", "ocb_shrunk", "rao_blackwell", "all_action"]


def settings(overrides):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return {name: compose("train", [*overrides, f"baseline={name}", "output_folder=/tmp"]) for name in BASELINES}


def parts(cfg):
    """Return the pipeline and the update that bae-train makes, without Lightning's loop."""
    policy, task = make(cfg.model), make(cfg.task)
    pipeline = make_pipeline(cfg, policy, task)
    update = Update(policy.model, pipeline.scorer.blocks, cfg.temperature, UpdateOptions(**plain(cfg.training)))
    update.configure(partial(torch.optim.SGD, lr=0.0), steps=9)
    return pipeline, update


def step(update, batch, advantages):
    """Seconds by stage of one baseline on the batch's rollouts."""
    work = RolloutBatch(batch.step, batch.problems, batch.group_size, batch.samples, batch.scored)
    work.seconds.update(batch.seconds)
    advantages.on_train_batch_start(ALONE, None, work, 0)
    update.step(work)
    return work.seconds


def race(overrides, baselines, rounds):
    configs = settings(overrides)
    quieten()
    cfg = configs["ocb"]
    pipeline, update = parts(cfg)
    rollouts = Rollouts(pipeline, cfg.seed)
    makers = {
        name: BlockwiseAdvantages(
            pipeline, make(configs[name].baseline), make(cfg.first_block_baseline), make(cfg.fallback_baseline),
            make(cfg.outcome), make(cfg.normalisation), cfg.seed,
        )
        for name in baselines
    }  # fmt: skip
    taken = {name: [] for name in baselines}
    for index in range(rounds + 1):
        problems = [
            pipeline.task.problem("train", index * cfg.prompts_per_step + p) for p in range(cfg.prompts_per_step)
        ]
        batch = RolloutBatch(index, problems, cfg.group_size)
        rollouts.on_train_batch_start(ALONE, None, batch, 0)
        for name in baselines if index % 2 else reversed(baselines):
            gc.collect()
            seconds = step(update, batch, makers[name])
            if index:  # the first round warms up
                taken[name].append(seconds)
    return taken


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", choices=BASELINES, help="of this one alone, in MiB")
    given, overrides = parser.parse_known_args()
    if given.memory:
        race(overrides, [given.memory], 1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    taken = race(overrides, BASELINES, given.rounds)
    own = lambda seconds: seconds["baseline"] + seconds["update"]  # noqa: E731
    print(f"{'baseline':<16}{'baseline ms':>24}{'update ms':>28}{'more than ocb, of the step':>34}{'peak MiB':>12}")
    for name, rounds in taken.items():
        cells = []
        for stage in ("baseline", "update"):
            values = [1000 * seconds[stage] for seconds in rounds]
            cells.append(f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]")
        more = [(own(s) - own(ocb)) / sum(ocb.values()) for s, ocb in zip(rounds, taken["ocb"], strict=True)]
        share = f"{statistics.median(more):+.1%} [{min(more):+.1%}, {max(more):+.1%}]"
        alone = subprocess.run([sys.executable, __file__, "--memory", name, *overrides], capture_output=True, text=True)
        print(f"{name:<16}{cells[0]:>24}{cells[1]:>28}{share:>34}{float(alone.stdout.split()[-1]):>12.0f}")


if __name__ == "__main__":
    main()
