"""What several benchmarks need: a fresh process for each measurement, its peak memory, and rows of a CSV as they come.

The process that starts the others must stay small, for on Linux a new process begins with the peak memory of the one
that started it. So heavy imports wait inside the functions.
"""

import csv
import ctypes
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as bae.commands.process_setup has it, for all contenders alike
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent.parent / "docs" / "results"
DATA = Path(os.environ.get("BAE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
SMOLLM2 = "smollm2_135m"
CHILD = "--child"
RESULT = "RESULT "
NEVER = -1
"""An end of sequence that no model has."""


def measure(file: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `serve` of this file makes of the request, in a fresh process; None if it failed, which is printed."""
    done = subprocess.run([sys.executable, file, CHILD, json.dumps(request)], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode == 0 and found:
        result: dict[str, Any] = json.loads(found[-1].removeprefix(RESULT))
        return result
    reason = "\n".join((done.stderr.strip() or "no message; out of memory?").splitlines()[-3:])
    print(f"failed with {done.returncode}: {dict(request)}\n{reason}", file=sys.stderr)
    return None


def serve(function: Callable[..., Mapping[str, Any]]) -> bool:
    """Whether this process was started by `measure`; then the function has answered, and there is no more to do.

    To what it returns are added peak_mib, the most memory that this process had, libraries and model with it (that it
    took on the GPU, if it used one), and what the machine is.
    """
    if sys.argv[1:2] != [CHILD]:
        return False
    request = json.loads(sys.argv[2])
    settle(request.pop("malloc", "kept"))
    found = function(**request)
    print(RESULT + json.dumps({**found, "peak_mib": peak_mib(), "machine": machine()}), flush=True)
    return True


def settle(malloc: str) -> None:
    """Prepare the process before torch is loaded.

    malloc: `kept` for what bae-train tells malloc (bae.commands.process_setup), `default` for nothing, and a=b;… for
    parameters of mallopt by their numbers.
    """
    for name, value in re.findall(r"(-?\d+)=(\d+)", malloc):
        ctypes.CDLL(None).mallopt(int(name), int(value))
    if malloc == "kept":
        from bae.commands import process_setup

        process_setup.prepare()


def peak_mib() -> float:
    import torch

    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_reserved() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def now_mib() -> float:
    """Memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def machine() -> str:
    """What times depend on, in one cell."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}; torch {torch.__version__}"
    bf16 = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512" if torch.cpu._is_avx512_bf16_supported() else "no"
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    return f"{cores}; {torch.get_num_threads()} threads; bf16 {bf16}; torch {torch.__version__}"


def device() -> str:
    """Where a benchmark runs: on a GPU, if there is one. CUDA_VISIBLE_DEVICES= hides it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Until a GPU has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One more row of a CSV. Raises ValueError if the file has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.is_file()
    if not fresh:
        with path.open(newline="") as file:
            if next(csv.reader(file)) != list(row):
                raise ValueError(f"{path} has other columns; name another file with --csv")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def spread(values: Sequence[float], digits: int = 2) -> str:
    """median [min, max]"""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} [{low}, {high}]"


def ratios(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    """Of one contender to another, repeat by repeat, where both were measured."""
    theirs = {row["repeat"]: row[column] for row in others}
    return [row[column] / theirs[row["repeat"]] for row in rows if row["repeat"] in theirs]


def arguments(parser: Any, name: str, model: bool = False) -> Any:
    """Parse the options, with those that all have."""
    if model:
        parser.add_argument("--model", default=SMOLLM2, help="a folder or hub id in the place of SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=RESULTS / f"{name}.csv", help="rows are added to it as they come")
    return parser.parse_args()


def listed(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """The type of an option that is a list: a,b,c."""
    return lambda text: [kind(part) for part in text.split(",")]


def train_config(*overrides: str) -> Any:
    """The configuration of bae-train without an experiment."""
    from hydra import compose, initialize_config_dir

    from bae.commands import schema
    from bae.commands.build import quieten
    from bae.commands.cli import CONF

    quieten()
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["~experiment", "output_folder=/tmp", *overrides])


def load(model: str, dtype: str, **options: Any) -> Any:
    """The policy of conf/model/<model>.yaml, else of that folder or hub id, on the device."""
    from bae.commands.build import make

    known = model == SMOLLM2
    more = [f"model.{key}={str(value).lower()}" for key, value in options.items()]
    more += [f"model={model}"] if known else ["model=pretrained", f"model.path={model}"]
    policy = make(train_config(f"model.dtype={dtype}", *more).model)
    policy.model.to(device())
    return policy


def plain_update(policy: Any, blocks: Any, micro_batch_tokens: int) -> Any:
    """Return an update in plain PyTorch, with bae-train's optimiser."""
    from bae.commands.build import make
    from bae.training.options import UpdateOptions
    from bae.training.update import Update

    options = UpdateOptions(clip=0.2, max_grad_norm=1.0, warmup_steps=0, micro_batch_tokens=micro_batch_tokens)
    update = Update(policy.model, blocks, temperature=1.0, options=options)
    update.configure(make(train_config().optimizer), steps=10**6)
    return update


def named_blocks(count: int) -> Any:
    from bae.text.blocks import make_blocks

    return make_blocks({f"block_{k}": {"sections": [f"tag_{k}"]} for k in range(count)})


def random_ids(vocabulary: int, *shape: int) -> Any:
    import torch

    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(sum(shape)))


def sampling_request(prompts: list[list[int]], group: int, new: int, end: int) -> Any:
    """Return a request for `group` completions of `new` tokens of each prompt; end: the end of sequence."""
    from bae.rollout.interface import SamplingRequest

    keys = [(0, p) for p in range(len(prompts))]
    return SamplingRequest(prompts, keys, group, new, temperature=1.0, eos_token_id=end, pad_token_id=0)


def fixed_batch(vocabulary: int, prompts: int, group: int, prompt_tokens: int, new: int, blocks: int) -> Any:
    """A batch as the training step finds it, of random tokens; every completion has all blocks, as long as each
    other."""
    import torch

    from bae.batch import Advantages, RolloutBatch, SampledTokens, Scored

    n = prompts * group
    asked = random_ids(vocabulary, prompts, prompt_tokens).repeat_interleave(group, 0)
    whole, every = (torch.ones(n, width, dtype=torch.bool) for width in (prompt_tokens, new))
    samples = SampledTokens(asked, whole, random_ids(vocabulary, n, new), every, ~every[:, 0])
    block_of = (torch.arange(new) * blocks // new).expand(n, -1)
    nothing = torch.zeros(n, blocks)
    batch = RolloutBatch(0, [], group, samples, Scored([], block_of, nothing, nothing.bool(), nothing.bool()))
    advantages = torch.randn(n, blocks, generator=torch.Generator().manual_seed(1))
    batch.advantages = Advantages(advantages, advantages)
    return batch
