"""Memory stays what steps need, whatever the order of lengths."""

import subprocess
import sys

import pytest
import torch

from bae.training import heap
from bae.training.heap import CALLS, Heap, most_since_last, resident

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux alone")

SAMPLING = """
from bae.commands import process_setup
process_setup.prepare()
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from bae.rollout.interface import SamplingRequest
from bae.rollout.local.engine import LocalEngine
from bae.training import attention
from bae.training.heap import resident

config = LlamaConfig(vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
model, engine = LlamaForCausalLM(config).eval(), LocalEngine(max_rows=4)
attention.share(model)
for step in range(100):
    prompts = [[1] * (100 + 3 * step), [2] * (100 + 4 * step)] if step % 2 else [[1] * (900 - 5 * step)]
    engine.sample(model, SamplingRequest(prompts, [(0, p) for p in range(len(prompts))], 2, 2, 1.0, -1, 0))
    if step in (29, 99):
        print(resident() >> 20)
"""
PINNED = """
from bae.commands import process_setup
process_setup.prepare()
import torch
from bae.training.heap import CALLS, Heap, resident

heap, small = Heap(), []
for step in range(60):
    activations = [torch.ones((2 + step) * 2**16) for _ in range(8)]  # 4 MB and more
    del activations[::2]
    small.append([torch.ones(2**13) for _ in range(16)])  # half a MB that stays, in the gaps
    del activations
    heap.tidy()
    if step == CALLS:
        print(resident() >> 20)
print(resident() >> 20)
"""


def mib(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_prompts_of_other_lengths_leave_nothing_behind():
    """Without the rule for calls with many rows in bae.rollout.local.prepacked, this gained 170 to 210 MiB."""
    early, late = mib(SAMPLING)
    assert late < early + 100


def test_small_things_that_stay_do_not_keep_what_lay_around_them():
    """Without `Heap` this gained 2080 MiB. With it, it gained 10 to 310: as much as piles up since the last trim."""
    early, late = mib(PINNED)
    assert late < early + 600


def test_memory_is_given_back_when_steps_need_less(monkeypatch):
    taken, trims = iter([*[100] * CALLS, 109, 111, 90, 95, 95, 95, 104, 105]), []
    monkeypatch.setattr(heap, "resident", lambda: next(taken))
    monkeypatch.setattr(heap, "_trim", lambda: trims.append(1))
    made = Heap()
    found = [made.tidy() for _ in range(CALLS + 8)]
    assert found == [False] * (CALLS + 1) + [True] + [False] * 5 + [True]
    assert len(trims) == 2


def test_nothing_is_done_where_memory_is_not_known(monkeypatch):
    monkeypatch.setattr(heap, "resident", lambda: 0)
    made = Heap()
    assert not any(made.tidy() for _ in range(20))


def test_the_most_memory_since_last():
    cpu = torch.device("cpu")
    most_since_last(cpu)
    large = torch.ones(2**26)  # 256 MiB
    at_most = most_since_last(cpu)
    assert at_most >= resident() - 2**24
    del large
    assert most_since_last(cpu) > 0
