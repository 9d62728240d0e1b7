"""bae-train adapter=lora, as a user meets it: a short run of the tiny policy, resumed, and evaluated."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.commands.test_train import assert_equal, resume_without_small, runs, train, weights  # noqa: F401
from tests.support import needs_peft

pytestmark = needs_peft
LORA = [
    "adapter=lora",
    "adapter.rank=2",
    "steps=2",
    "callbacks.held_out.every=0",
    "callbacks.checkpoints.log_policy=false",
]


def saved(folder, step):
    return torch.load(folder / "checkpoints" / f"step_{step:06d}.ckpt", weights_only=True)


def test_a_run_with_adapters_resumes_bit_for_bit(train):  # noqa: F811
    train(*LORA)
    (run,) = runs()
    folder = Path(run.data.tags["output_folder"])
    assert (run.data.params["adapter"], run.data.params["adapter.rank"]) == ("lora", "2")
    size = 4 * 2 * (4 * (96 + 96) + 3 * (96 + 256))  # four layers with seven adapters each
    assert run.data.tags["trained_parameters"] == str(size) and int(run.data.tags["parameters"]) > 400_000 + size
    whole, final = saved(folder, 2), weights(folder)
    assert all(".lora_" in name for name in whole["state_dict"]) and len(whole["state_dict"]) == 4 * 2 * 7
    assert len(whole["optimizer_states"][0]["state"]) == 4 * 2 * 7
    (folder / "checkpoints" / "step_000002.ckpt").unlink()
    shutil.rmtree(folder / "policy")
    resume_without_small(folder)
    again = saved(folder, 2)
    assert_equal(again["state_dict"], whole["state_dict"])
    assert_equal(again["optimizer_states"], whole["optimizer_states"])
    assert again["callbacks"] == whole["callbacks"]
    assert_equal(weights(folder), final)


def test_adapters_alone_are_saved_evaluated_and_trained_further(train, capsys):  # noqa: F811
    from bae.commands import evaluate
    from tests.commands.test_train import outputs
    from tests.support import call

    train(*LORA, "adapter.save=adapter", "adapter.targets=[q_proj,v_proj]", "steps=1")
    folder = Path(runs()[0].data.tags["output_folder"])
    files = {path.name for path in (folder / "policy").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "SHA256SUMS"} <= files
    assert "model.safetensors" not in files
    call(evaluate, outputs(), f"run={folder}", "split=val", "prompts=4", "samples=2")
    assert "val" in capsys.readouterr().out
    train(f"model.path={folder / 'policy'}", "steps=1", "callbacks.held_out.every=0")
    assert (Path(runs()[1].data.tags["output_folder"]) / "policy" / "model.safetensors").is_file()


def test_a_sharded_strategy_is_refused(train):  # noqa: F811
    with pytest.raises(SystemExit, match=r"adapter: strategy=fsdp cuts weights up.*; use strategy=ddp"):
        train(*LORA, "strategy=fsdp", "strategy.accelerator=cpu")
