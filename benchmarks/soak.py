"""A long run in small: does anything grow? python benchmarks/soak.py [--steps 10000] [--figure]

bae-train runs with all callbacks, the tiny policy at lr=0, which keeps its answers readable, and 2 completions a step.
Every second this process reads in /proc what the run and its children (the verifier's workers) hold.
docs/results/soak.csv has a row for each SPAN steps: resident memory in MiB, of the run and of all, file handles,
milliseconds a step (the median over the span), milliseconds of the processor a step (which other work on the machine
changes less), MiB of MLflow's SQLite file and of the run's own log. Printed are the
slopes per 1,000 steps, by least squares without the first tenth. --figure draws docs/results/soak.png from the CSV.

jobs: python benchmarks/soak.py --jobs 100 runs that many short jobs on one store, two at a time, and counts those that
ended well and are whole in MLflow.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import RESULTS

SPAN = 100
MINIMAL = [
    "group_size=2", "prompts_per_step=1", "lr=0", "callbacks.held_out.prompts=2", "callbacks.held_out.samples=2",
    "callbacks.held_out.every=50", "callbacks.completions.every=50", "callbacks.checkpoints.every=50",
    "callbacks.interference.every=50", "callbacks.interference.completions=4", "callbacks.throughput.seconds=0.01",
    "task=dataset",  # with the verifier that has workers
]  # fmt: skip

COLUMNS = ("step", "rss_mib", "all_rss_mib", "handles", "ms_per_step", "cpu_ms_per_step", "sqlite_mib", "log_mib")
MIB = 2**20


def arguments(outputs: Path) -> list[str]:
    """The command line of a run, with a file of sums beside its outputs."""
    sums = outputs / "sums.jsonl"
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*MINIMAL, f"task.splits.train={sums}", f"task.splits.val={sums}", f"outputs={outputs}"]


def soak(steps: int, target: Path) -> None:
    """Run, watch, and write the CSV row by row."""
    with tempfile.TemporaryDirectory() as folder, target.open("w", newline="") as file:
        outputs, log = Path(folder), Path(folder) / "run" / "tracking" / "log.jsonl"
        command = [sys.executable, "-m", "bae.commands.train", *arguments(outputs), f"steps={steps}",
                   f"hydra.run.dir={outputs / 'run'}"]  # fmt: skip
        with open(outputs / "output.txt", "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            times: list[float] = []
            read, done, used = 0, 0, 0.0
            while process.poll() is None:
                time.sleep(1)
                new = log.read_bytes()[read:] if log.exists() else b""
                whole = new[: new.rfind(b"\n") + 1]  # the last line may not be whole yet
                read += len(whole)
                for line in whole.decode().splitlines():
                    step, seconds = step_of(line)
                    if step is None:
                        continue
                    done, times = step, [*times, seconds]
                    if done % SPAN == 0:
                        before, used = used, processor(process.pid)
                        writer.writerow(row(process.pid, outputs, log, done, times, used - before))
                        file.flush()
                        times = []
        if process.returncode:
            sys.exit((outputs / "output.txt").read_text()[-2000:])


def step_of(line: str) -> tuple[int | None, float]:
    """The step and the seconds of a line of the log that has the time of a step, else (None, 0)."""
    if '"time/update"' not in line:
        return None, 0.0
    values = json.loads(line)["metrics"]
    return values[0][2], sum(value for key, value, _ in values if key.startswith("time/"))


def row(pid: int, outputs: Path, log: Path, done: int, times: list[float], used: float) -> dict[str, float]:
    """What a process holds now; used: its seconds of the processor in this span."""
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    own, database = rss(pid), outputs / "mlflow.db"
    values = (done, own, own + sum(map(rss, children)), handles, 1000 * statistics.median(times),
              1000 * used / len(times), database.stat().st_size / MIB, log.stat().st_size / MIB)  # fmt: skip
    return {name: round(value, 3) for name, value in zip(COLUMNS, values, strict=True)}


def processor(pid: int) -> float:
    """Seconds of the processor that a process and its threads have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def report(source: Path) -> None:
    """Print slopes per 1,000 steps, without the first tenth."""
    import numpy as np

    table = np.genfromtxt(source, delimiter=",", names=True)
    late = table[table["step"] > table["step"][-1] / 10]
    for name in COLUMNS[1:]:
        slope = np.polyfit(late["step"] / 1000, late[name], 1)[0]
        print(f"{name:<12} {late[name][0]:10.2f} -> {late[name][-1]:10.2f}   slope {slope:+.3f} per 1,000 steps")


def figure(source: Path) -> None:
    """Draw each column over the steps."""
    import numpy as np
    from matplotlib.figure import Figure

    table = np.genfromtxt(source, delimiter=",", names=True)
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    labels = {"rss_mib": "memory of the run, MiB", "all_rss_mib": "with its workers, MiB", "handles": "file handles",
              "ms_per_step": "ms a step",
              "cpu_ms_per_step": "ms of the processor a step", "sqlite_mib": "MLflow's file, MiB",
              "log_mib": "the run's own log, MiB"}  # fmt: skip
    panels = drawn.subplots(2, 4).flat
    panels[-1].axis("off")
    for panel, (name, label) in zip(panels, labels.items(), strict=False):
        panel.plot(table["step"], table[name], linewidth=1)
        panel.set(title=label, xlabel="step", ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    drawn.savefig(source.with_suffix(".png"), dpi=150)


def jobs(count: int) -> None:
    """Run short jobs on one store, two at a time, and look at what MLflow has of them."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        shared = arguments(Path(folder))

        def one(seed: int) -> int:
            command = [sys.executable, "-m", "bae.commands.train", *shared, "steps=2", f"seed={seed}",
                       f"hydra.run.dir={folder}/runs/{seed}"]  # fmt: skip
            return subprocess.run(command, capture_output=True).returncode

        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            codes = list(pool.map(one, range(count)))
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(ids, max_results=10 * count)
        whole = [run for run in runs if run.info.status == "FINISHED" and "val/accuracy" in run.data.metrics]
        minutes = (time.perf_counter() - start) / 60
        print(f"{codes.count(0)} of {count} jobs ended with 0; {len(whole)} are whole in MLflow; {minutes:.1f} minutes")
        sys.exit(codes.count(0) != count or len(whole) != count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, help="run so many short jobs instead")
    parser.add_argument("--csv", type=Path, default=RESULTS / "soak.csv")
    parser.add_argument("--figure", action="store_true", help="draw what the CSV has")
    options = parser.parse_args()
    if options.jobs:
        jobs(options.jobs)
    if not options.figure:
        soak(options.steps, options.csv)
    report(options.csv)
    figure(options.csv)


if __name__ == "__main__":
    main()
