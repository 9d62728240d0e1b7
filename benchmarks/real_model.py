"""Warm start and train a real model, method by method and seed by seed: python benchmarks/real_model.py NAME …

NAME is an experiment, such as smollm2_word_problems: bae-warmstart experiment=warmstart/NAME makes the policy, and
bae-train experiment=real/NAME trains it by each of --methods with each of --seeds. Arguments after -- go to both, such
as steps=2; then name another --folder for the results.

What is in docs/results/real_NAME.csv is not done again, and what was stopped goes on from its last checkpoint. So it
can be called again and again, with --minutes to end each call in time. On a new machine the warm start alone is made
again, because all seeds start from its policy.

Files in docs/results: real_NAME.csv has a row for a method (or `warm start`), a seed and a set of problems, with its
metrics, the minutes that training took, and the machine; real_NAME_curves.csv has the held-out problems during
training, real_NAME_bins.csv the reliability diagrams. Both are drawn: real_NAME_curves.png, real_NAME_reliability.png.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pandas
from common import append, machine

ROOT = Path(__file__).parent.parent
METHODS = {  # RLCR's scalar has objectives of its own; the others have those of the experiment
    "rlcr": ["method=rlcr"],  # or, where there is one, the experiment real/NAME_rlcr
    **{name: [f"baseline={name}"] for name in ("ocb", "group_mean", "none", "batch_mean", "ocb_loo", "all_action")},
}
METRICS = ("accuracy", "ece", "auroc", "brier", "confidence", "coverage")
CURVES = ("accuracy", "ece", "auroc", "brier", "confidence", "malformed")
BINS = ("count", "confidence", "accuracy")
WARM_START = "warm start"
STOPPED = (75, 130, 143)
"""Exit codes of a command that a signal stopped (docs/reliability.md)."""
FILES = ("model.safetensors", "model.safetensors.index.json")


class Study:
    """Hold where things are, and until when to work.

    outputs: a folder. end: in seconds of time.monotonic(). also: arguments of bae-evaluate after each run, or none.
    """

    def __init__(self, name, folder, outputs, end, also, overrides):
        self.name, self.outputs, self.end, self.also, self.overrides = name, outputs, end, also, overrides
        self.results, self.curves, self.bins = (folder / f"real_{name}{part}.csv" for part in ("", "_curves", "_bins"))

    def is_done(self, method, seed):
        """Whether the results have this run."""
        lines = self.results.read_text().splitlines() if self.results.is_file() else []
        return any(line.startswith(f"{method},{seed},") for line in lines)

    def do(self, experiment, method, seed):
        """Make a run, or go on with it, and write down what came of it. Exits when the time is over."""
        is_warm_start = method == WARM_START
        command = Path(sys.executable).parent / ("bae-warmstart" if is_warm_start else "bae-train")
        run = Path("warmstart", self.name) if is_warm_start else Path("real", self.name, f"{method}_seed_{seed}")
        folder = self.outputs / run
        is_done = self.is_done(method, seed)
        if is_done and (has_policy(folder) or not is_warm_start):
            print(f"done before: {method}, seed {seed}")
            return
        if any((folder / "checkpoints").glob("step_*.ckpt")):
            arguments = [f"resume={folder}"]
        else:
            own = f"{experiment}/{self.name}_{method}"  # where a method has another format
            has_own = (ROOT / "conf" / "experiment" / f"{own}.yaml").is_file()
            chosen = [] if is_warm_start or has_own else METHODS[method]
            name = own if has_own else f"{experiment}/{self.name}"
            arguments = [f"experiment={name}", f"seed={seed}", f"hydra.run.dir={folder}", *chosen, *self.overrides]
            arguments += ["callbacks.evaluation.splits=[]"] if is_done else []
        if not has_policy(folder) or not (folder / "evaluation").is_dir():
            self._call(command, *arguments)
        if is_done:
            return
        if self.also:
            self._call(command.with_name("bae-evaluate"), f"run={folder}", *self.also)
        self._record(folder, method, seed)

    def _call(self, command, *arguments):
        """Run a command, and exit when the time is over."""
        left = None if self.end is None else max(1.0, self.end - time.monotonic())
        print(f"{command.name} {' '.join(arguments)}", flush=True)
        process = subprocess.Popen([command, f"outputs={self.outputs}", *arguments])
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves a checkpoint at the end of its step
            code = process.wait()
        if code in STOPPED:
            print("stopped; the same call goes on from the last checkpoint")
            sys.exit(0)
        if code:
            sys.exit(f"{command.name} failed with exit code {code}")

    def _record(self, folder, method, seed):
        """Write down what MLflow and the run's folder have of a finished run, and draw all that was written down."""
        from mlflow import MlflowClient

        from bae.evaluation.completion_table import pairs
        from bae.evaluation.metrics import reliability_table
        from bae.report.tracking import history

        store, run_id = f"sqlite:///{self.outputs / 'mlflow.db'}", (folder / "run_id").read_text()
        metrics = MlflowClient(store).get_run(run_id).data.metrics
        each = {name: history(store, run_id, f"val/{name}") for name in CURVES}
        for step in sorted(each["accuracy"]):
            row = {name: each[name].get(step, float("nan")) for name in CURVES}
            append(self.curves, {"method": method, "seed": seed, "step": step} | row)
        minutes = sum(sum(history(store, run_id, key).values()) for key in metrics if key.startswith("time/")) / 60
        sets = sorted({key.split("/")[1] for key in metrics if key.startswith("eval/")})
        for name in sets:
            row = {key: metrics.get(f"eval/{name}/{key}", float("nan")) for key in METRICS}
            row |= {f"{key}_sem": metrics.get(f"eval/{name}/sem_by_prompt/{key}", float("nan")) for key in METRICS[:4]}
            more = {"samples": int(metrics[f"eval/{name}/samples"]), "minutes": minutes, "machine": machine()}
            append(self.results, {"method": method, "seed": seed, "set": name} | row | more)
            confidences, right, _ = pairs(pandas.read_parquet(folder / "evaluation" / f"{name}.parquet"))
            table = reliability_table(confidences, right)
            for i in range(len(table["count"])):
                row = {key: float(table[key][i]) for key in BINS}
                append(self.bins, {"method": method, "seed": seed, "set": name, "bin": i} | row)
        self.draw("val")

    def draw(self, split):
        """Draw the held-out problems during training, and reliability on `split` before and after, of all seeds."""
        import torch

        from bae.evaluation import figures

        curves = pandas.read_csv(self.curves).groupby(["method", "seed"], sort=False)
        words = {"ece": "ECE", "auroc": "AUROC", "accuracy": "Accuracy"}
        histories = {title: {} for title in words.values()}
        for (method, _), run in curves:
            if method in METHODS:
                for metric, title in words.items():
                    history = dict(zip(run["step"], run[metric], strict=True))
                    histories[title].setdefault(method, []).append(history)
        if histories["ECE"]:
            figures.save(figures.training_curves(histories, "Value on held-out problems"), self.curves.with_suffix(""))
        bins = pandas.read_csv(self.bins)
        panels = {}
        for method, rows in bins[bins["set"] == split].groupby("method", sort=False):
            rows = rows.assign(confidence=rows["confidence"] * rows["count"], accuracy=rows["accuracy"] * rows["count"])
            table = rows.groupby("bin")[list(BINS)].sum()
            count = table["count"].where(table["count"] > 0)
            means = {"confidence": table["confidence"] / count, "accuracy": table["accuracy"] / count}
            values = {"count": table["count"], **means}
            panels[f"{method}, {split}"] = {key: torch.tensor(value.to_numpy()) for key, value in values.items()}
        figures.save(figures.reliability(panels), self.bins.with_name(f"real_{self.name}_reliability"))


def has_policy(folder):
    """Whether the run in this folder came to its end."""
    return any((folder / "policy" / file).is_file() for file in FILES)


def main():
    """Do all that is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the experiments warmstart/NAME and real/NAME")
    parser.add_argument("--methods", default="ocb,rlcr,ocb_loo,all_action,group_mean,none", help=", ".join(METHODS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--minutes", type=float, help="when to stop; the next call goes on")
    parser.add_argument("--also", default="", help="of bae-evaluate after each run: 'split=gsm8k prompts=100'")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results", help="of the CSV files")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="of runs, policies and MLflow's store")
    own, overrides = sys.argv[1:], []
    if "--" in own:  # argparse takes nothing from behind options
        own, overrides = own[: own.index("--")], own[own.index("--") + 1 :]
    given = parser.parse_args(own)
    end = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    study = Study(given.name, given.folder, given.outputs.absolute(), end, given.also.split(), overrides)
    study.do("warmstart", WARM_START, 0)
    for seed in map(int, given.seeds.split(",")):
        for method in given.methods.split(","):
            study.do("real", method, seed)


if __name__ == "__main__":
    main()
