"""Inject faults into tiny runs, and count which promises held: python benchmarks/faults.py [NAME …] [--count 40]

A kind of fault is one function with the decorator `fault`, which names the promise. It yields, for each fault that it
injected, None if the promise held, else what went wrong. Other kinds are tests that are marked with
@pytest.mark.fault(NAME); PROMISES says what they hold. Rows go to docs/results/faults.csv: promise, fault, how many
were injected and survived, and the command; a row of the same fault is replaced. Exit code 1 if a promise was broken.
"""

import argparse
import csv
import importlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked, so there may be no pool of threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.support

ROOT = Path(__file__).parent.parent
LIMIT = 900
"""Seconds after which a run counts as hung."""
CHAIN = 5
"""Kills of one run, after which it is left to end."""
LOADED = [
    "bae.commands.train", "bae.callbacks", "bae.report.tracking", "bae.rollout.pipeline", "bae.rollout.local.engine",
    "bae.tasks.loader", "bae.tasks.arithmetic", "bae.training.module", "bae.training.policy", "bae.training.update",
    "matplotlib.pyplot", "transformers.models.llama.modeling_llama",
]  # fmt: skip
"""What each child needs, loaded once before it is forked."""
Outcome = str | None


@dataclass(frozen=True)
class Fault:
    promise: str
    inject: Callable[[int, Path], Iterator[Outcome]]


FAULTS: dict[str, Fault] = {}
PROMISES = {
    "finite": "a reward, loss or gradient that is not finite changes no weight and is never saved",
    "signals": "a signal stops a run at the end of its step, saved, with an exit code that says so",
    "store": "training never waits for the tracking store, and what was logged arrives later, once",
    "files": "a write that fails or meets a full disk leaves what was there",
    "damage": "damage in a checkpoint or a policy is told, and the checkpoint before is used",
    "lock": "one process works on a run",
    "verifier": "an answer that hangs, or kills a worker of the verifier, costs its own verdict alone",
    "sweeps": "a job of a sweep that is refused, crashes or is killed ends no other one",
    "credentials": "credentials are refused before anything is written",
    "trust": "the folder of a run executes nothing",
}
"""What the tests that are marked as a fault hold, by the name of the mark."""


def fault(promise: str) -> Callable[[Callable[[int, Path], Iterator[Outcome]]], Any]:
    """Register a function (count, an empty folder) -> outcomes as a kind of fault. Its name is that of the fault."""

    def register(inject: Callable[[int, Path], Iterator[Outcome]]) -> Any:
        FAULTS[inject.__name__] = Fault(promise, inject)
        return inject

    return register


STEPS = 4
TINY = [
    f"steps={STEPS}", "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=8",
    "callbacks.held_out.every=1",
    "callbacks.checkpoints.every=1", "callbacks.completions.every=1", "callbacks.throughput.seconds=0.01",
    "callbacks.evaluation.splits=[val]", "callbacks.evaluation.prompts=4", "callbacks.evaluation.samples=2",
]  # fmt: skip


def child(work: Callable[[], None], output: Path) -> int:
    """Do something in a forked process and return its exit code, negative for a signal. What it prints is added to a
    file. The libraries are loaded once, here, so a run takes seconds."""
    from tests.support import empty_store

    for name in LOADED:
        importlib.import_module(name)
    empty_store()  # loads what MLflow needs for a database
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(output, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                work()
            code = 0
        except SystemExit as stopped:
            print(stopped.code, file=sys.stderr)
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return LIMIT


def train(outputs: Path, *arguments: str) -> None:
    """Run bae-train in this process."""
    from bae.commands import train
    from tests.support import call

    call(train, outputs, *arguments)


class Killer:
    """Kill this process at the n-th place of those at which a kill could lose or repeat something.

    The places are before, in and after a line of the log; before and after the store is given something; before it is
    written down how far the store is; before and after a checkpoint; before held-out problems, an evaluation and the
    policy. They count from the first checkpoint on, because before it there is nothing to resume.
    """

    def __init__(self, outputs: Path, at: int) -> None:
        self.outputs, self.left, self.lock = outputs, at, threading.Lock()
        self.counting = False

    def here(self, place: str, torn: Callable[[], None] | None = None) -> None:
        with self.lock:
            self.counting = self.counting or any(self.outputs.glob("runs/*/checkpoints/*.ckpt"))
            self.left -= self.counting
            if self.counting and self.left == 0:
                if torn is not None:
                    torn()
                print(f"\nkilled {place}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    def installed(self) -> ExitStack:
        from bae.callbacks import Checkpoints, Evaluation, HeldOut
        from bae.callbacks.checkpoints import AtomicCheckpointIO
        from bae.report.run_log import RunLog
        from bae.report.shipping import Shipper

        stack = ExitStack()
        around = [(Shipper, "_deliver"), (RunLog, "mark_sent"), (AtomicCheckpointIO, "save_checkpoint"),
                  (HeldOut, "_measure"), (Evaluation, "on_train_end"), (Checkpoints, "on_train_end")]  # fmt: skip
        for owner, name in around:
            stack.enter_context(mock.patch.object(owner, name, self.around(getattr(owner, name), name)))
        real = RunLog._write

        def write(log: Any, line: bytes) -> None:
            self.here("before a line of the log")
            self.here("in a line of the log", lambda: real(log, line[: len(line) // 2]))
            real(log, line)
            self.here("after a line of the log")

        stack.enter_context(mock.patch.object(RunLog, "_write", write))
        return stack

    def around(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.here(f"before {name}")
            result = real(*arguments, **options)
            self.here(f"after {name}")
            return result

        return wrapped


def killed_train(outputs: Path, at: int, *arguments: str) -> None:
    with Killer(outputs, at).installed():
        train(outputs, *arguments)


def record(outputs: Path) -> dict[str, Any]:
    """Return all that the store has of the only run: histories by metric, artifacts with their contents, status.

    Of time/ and perf/ only the steps: their values are never the same.
    """
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    if len(runs) != 1:
        return {"runs": len(runs)}
    run_id = runs[0].info.run_id
    found: dict[str, Any] = {"status": runs[0].info.status, "params": sorted(runs[0].data.params)}
    found["tables"] = sorted(runs[0].data.tags.get("mlflow.loggedArtifacts", "").split("}"))
    for key in runs[0].data.metrics:
        values = [(m.step, repr(m.value)) for m in client.get_metric_history(run_id, key)]
        found[key] = sorted(step for step, _ in values) if key.startswith(("time/", "perf/")) else sorted(values)
    (place,) = (outputs / "artifacts").glob(f"**/{run_id}/artifacts")
    for path in place.rglob("*"):
        if path.is_file():
            exact = path.suffix in (".json", ".safetensors")
            found[f"artifact {path.relative_to(place)}"] = path.read_bytes() if exact else None
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Outcome:
    """Return in words where a record differs from the uninterrupted run's, or None."""
    wrong = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    return f"differs in {', '.join(wrong)}" if wrong else None


def write_histories(path: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Write the histories of two records side by side: metric, step, uninterrupted, killed. A step twice shows both."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["metric", "step", "uninterrupted", "killed"])
        for key in sorted(wanted.keys() | found.keys()):
            if key.startswith(("train/", "val/", "eval/")):
                histories = wanted.get(key, []), found.get(key, [])
                for step in sorted({step for history in histories for step, _ in history}):
                    writer.writerow(
                        [key, step, *(" ".join(v for at, v in history if at == step) for history in histories)]
                    )


@fault("killed at any place and resumed, MLflow has the uninterrupted run's history: no hole, nothing twice")
def sigkill(count: int, folder: Path) -> Iterator[Outcome]:
    """Chains of kills: a run is killed and resumed CHAIN times, ends, and its record is compared."""
    whole = folder / "whole"
    if child(partial(train, whole, *TINY), folder / "whole.txt"):
        raise RuntimeError(f"the uninterrupted run failed; see {folder / 'whole.txt'}")
    wanted, rng, kills, chain = record(whole), random.Random(0), 0, 0
    while kills < count:
        chain += 1
        outputs, output = folder / f"chain_{chain}", folder / f"chain_{chain}.txt"
        arguments, mine, failed = TINY, 0, None
        while True:
            at = rng.randint(1, 60) if mine < min(CHAIN, count - kills) else 10**9
            code = child(partial(killed_train, outputs, at, *arguments), output)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                failed = f"exit code {code}; see {output}"
                break
            mine += 1
            (run,) = {path.parent.parent for path in outputs.glob("runs/*/checkpoints/*.ckpt")}
            arguments = [f"resume={run}"]
        found = {} if failed else record(outputs)
        failed = failed or differences(found, wanted)
        if chain == 1:
            write_histories(folder / "histories.csv", wanted, found)
        kills += mine
        print(f"chain {chain}: {mine} kills, {failed or 'as the uninterrupted run'}", flush=True)
        yield from [failed] * mine
        if failed is None:
            shutil.rmtree(outputs)


@fault("a logger killed at any place and gone on with leaves what an undisturbed one does")
def sigkill_logging(count: int, folder: Path) -> Iterator[Outcome]:
    """One kill at each place in turn, of a process that logs as a run does and does not train."""
    whole = folder / "whole"
    if child(partial(log_without_training, whole), folder / "whole.txt"):
        raise RuntimeError(f"the undisturbed logger failed; see {folder / 'whole.txt'}")
    wanted = record(whole)
    for at in range(1, count + 1):
        outputs, output = folder / f"place_{at}", folder / f"place_{at}.txt"
        code = child(partial(log_without_training, outputs, at), output)
        if code == 0:
            return  # there are no more places
        code = code if code != -signal.SIGKILL else child(partial(log_without_training, outputs), output)
        failed = f"exit code {code}; see {output}" if code else differences(record(outputs), wanted)
        if failed:
            print(f"place {at}: {failed}", flush=True)
        yield failed


def log_without_training(outputs: Path, at: int = 10**9) -> None:
    """Log metrics, tables, an evaluation and a folder, with a checkpoint a step; go on from the newest one."""
    from bae.callbacks.checkpoints import saved_checkpoints
    from bae.evaluation.measure import Summary
    from bae.files import write_atomically
    from bae.report.tracking import MLflowRun
    from tests.support import empty_store

    folder = outputs / "runs" / "one"
    saved = saved_checkpoints(folder)
    if not (outputs / "mlflow.db").exists():
        folder.mkdir(parents=True)
        (outputs / "mlflow.db").write_bytes(empty_store())
    with Killer(outputs, at).installed():
        logger = MLflowRun(f"sqlite:///{outputs / 'mlflow.db'}", "faults", str(folder), str(outputs / "artifacts"))
        if saved:
            logger.set_status("RUNNING")
        else:
            logger.begin()
            logger.log_config({"steps": STEPS}, {"model": "none"})
        for step in range(len(saved) + 1, STEPS + 1):
            for split in ("train", "val"):
                logger.log_metrics({f"{split}/accuracy": step / 10, f"{split}/none": math.nan}, step)
            logger.log_metrics({"time/step": time.time()}, step)
            logger.log_completions({"text": [f"step {step}"]}, step)
            logger.sync()
            write_atomically(folder / "checkpoints" / f"step_{step:06d}.ckpt", "")
        write_atomically(folder / "policy" / "model.json", "{}")
        logger.log_evaluation({"val": Summary({"ece": 0.1}, {"maj": [0.5, 0.75]})}, [])
        logger.log_folder(folder / "policy")
        logger.finalize("success")


class Tests:
    """Choose the tests of a fault, as a plugin of pytest, and keep what came of each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outcomes: dict[str, Outcome] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if any(mark.args == (self.name,) for mark in item.iter_markers("fault"))]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or (report.when == "call" and report.passed):
            broken = self.outcomes.get(report.nodeid) or (report.nodeid if report.failed else None)
            self.outcomes[report.nodeid] = broken


def tested(name: str, count: int, folder: Path) -> Iterator[Outcome]:
    """Run the tests that are marked with this fault, slow ones among them. Each is one injected fault or more."""
    import pytest

    tests = Tests(name)
    pytest.main([str(ROOT / "tests"), "-q", "-m", "fault", "-p", "no:xdist", f"--basetemp={folder}"], plugins=[tests])
    if not tests.outcomes:
        raise RuntimeError(f"no test of the fault {name} ran")
    yield from tests.outcomes.values()


FAULTS |= {name: Fault(promise, partial(tested, name)) for name, promise in PROMISES.items()}


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Write a row, in place of the one of the same fault."""
    rows = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [old for old in csv.DictReader(file) if old["fault"] != row["fault"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])


def main() -> None:
    from bae.commands import process_setup

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)}; none: all")
    parser.add_argument("--count", type=int, default=40, help="of faults of each kind")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "results" / "faults.csv")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; those that failed stay there")
    options = parser.parse_args()
    process_setup.prepare()
    broken = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.faults or FAULTS:
            folder = (options.keep or Path(temporary)).absolute() / name
            folder.mkdir(parents=True)
            outcomes = list(FAULTS[name].inject(options.count, folder))
            survived = outcomes.count(None)
            broken += len(outcomes) - survived
            count = "" if name in PROMISES else f" --count {options.count}"
            command = f"make faults ARGS='{name}{count}'"
            row = {"promise": FAULTS[name].promise, "fault": name, "injected": len(outcomes), "survived": survived,
                   "command": command}  # fmt: skip
            write_row(options.csv, row)
            print(f"{name}: {survived} of {len(outcomes)} survived: {FAULTS[name].promise}")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
