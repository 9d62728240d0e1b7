"""Optimisers of conf/optimizer: what they make of bf16 weights, of the schedule, and of a checkpoint."""

import importlib.util
import io
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir

from bae.commands import cli, schema
from bae.commands.build import make
from bae.training.options import StepOptions
from bae.training.stepper import Stepper
from tests.support import needs_torchao

RANDOM = [pytest.param(name, marks=needs_torchao) for name in ("adamw_stochastic", "adamw_8bit")]
NAMES = ["adamw", "adamw_kahan", *RANDOM]
SPACING = 2**-12
"""Of bf16 numbers around .05."""


@pytest.fixture(autouse=True)
def eager(request):
    """Let torchao compute without compiling, which takes half a minute, except in slow tests."""
    with torch.compiler.set_stance("default" if request.node.get_closest_marker("slow") else "force_eager"):
        yield


def node(name, *overrides):
    schema.register()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose("train", [f"optimizer={name}", "output_folder=/tmp", *overrides]).optimizer


class Weights(torch.nn.Module):
    """As many equal weights as torchao quantises, and some that are too few."""

    def __init__(self, value=0.05, dtype=torch.bfloat16):
        super().__init__()
        self.many = torch.nn.Parameter(torch.full((64, 128), value).to(dtype))
        self.few = torch.nn.Parameter(torch.full((7,), value).to(dtype))


def stepper(name, model, *overrides, warmup_steps=0, max_grad_norm=1e9, final_lr=1.0):
    options = StepOptions(
        max_grad_norm=max_grad_norm, warmup_steps=warmup_steps, final_lr=final_lr, micro_batch_tokens=1
    )
    made = Stepper(model, options)
    made.configure(make(node(name, *overrides)), steps=1000)
    return made


def step(made, gradient=1.0):
    """Step by a gradient: one number for all weights, or a seed of random ones."""
    for weight in made.model.parameters():
        if isinstance(gradient, float):
            weight.grad = torch.full_like(weight, gradient)
        else:
            draw = torch.Generator().manual_seed(gradient)
            weight.grad = torch.randn(weight.shape, generator=draw).to(weight.dtype)
    return made.step(loss=0.0)


def moved(name, steps=200, **options):
    """How far the weights are, and those of AdamW in fp32, after steps of 1e-6 by gradients of 1."""
    ways = []
    for kind, dtype in ((name, torch.bfloat16), ("adamw", torch.float32)):
        model = Weights(float(torch.tensor(0.05).bfloat16()), dtype)
        start, made = model.many.detach().float().clone(), stepper(kind, model, "lr=1e-6", **options)
        for _ in range(steps):
            step(made)
        ways.append(model.many.detach().float() - start)
    return ways


def test_plain_adamw_does_not_move_bf16_weights():
    way, right = moved("adamw")
    assert torch.allclose(right, torch.tensor(-200e-6), rtol=0.02)  # a step is lr for a gradient that does not change
    assert not way.any()  # as a step is below half the spacing, it is rounded away, however many there are


def test_kahan_keeps_bf16_weights_within_rounding_of_fp32():
    way, right = moved("adamw_kahan", steps=100)
    assert not way.any() and right.abs().max() < SPACING / 2  # kept, not shown yet
    way, right = moved("adamw_kahan")
    assert torch.equal(way, torch.full_like(way, -SPACING))  # 200e-6 is nearer to one spacing than to none
    way, right = moved("adamw_kahan", steps=600)
    assert (way - right).abs().max() <= 0.6 * SPACING


@pytest.mark.parametrize("name", RANDOM)
def test_stochastic_rounding_is_right_in_the_mean(name):
    way, right = moved(name)
    steps = (way / SPACING).unique()
    assert torch.equal(steps, steps.round()) and len(steps) > 2
    # Variance of a weight: 200 steps, each of which moves it by SPACING with probability 1e-6 / SPACING.
    deviation = (200e-6 * SPACING / way.numel()) ** 0.5
    assert abs(way.mean() - right.mean()) < 4 * deviation


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_and_the_clipping_act(name):
    model = Weights(0.5, torch.float32)
    made, before = stepper(name, model, "lr=1e-3", "optimizer.weight_decay=0", warmup_steps=4, max_grad_norm=2.0), 0.5
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        found = step(made)
        assert found["lr"] == pytest.approx(share * 1e-3)
        assert found["grad_norm"] == pytest.approx((64 * 128 + 7) ** 0.5)
        assert before - float(model.many.detach()[0, 0]) == pytest.approx(share * 1e-3, rel=0.01)
        before = float(model.many.detach()[0, 0])
    moment = next(iter(made.optimizer.state.values()))["exp_avg"]
    moment = moment.dequantize() if hasattr(moment, "codes") else moment
    assert moment.max() < 2.1 / (64 * 128 + 7) ** 0.5  # of clipped gradients, whose norm is 2


def resumed_equals_whole(name, dtype):
    def run(made, first, last):
        for seed in range(first, last):
            step(made, seed)
            torch.rand(seed + 1)  # whatever else draws does not matter

    whole = stepper(name, Weights(dtype=dtype), "lr=1e-4", "seed=3", warmup_steps=4)
    run(whole, 0, 3)
    parts = {"model": whole.model, "optimizer": whole.optimizer, "scheduler": whole.scheduler}
    file = io.BytesIO()
    torch.save({key: part.state_dict() for key, part in parts.items()}, file)
    run(whole, 3, 6)

    file.seek(0)
    saved = torch.load(file, map_location=lambda storage, _: storage, weights_only=True)  # as Lightning loads
    torch._dynamo.reset()  # a new process compiles anew
    torch.manual_seed(99)
    again = stepper(name, Weights(dtype=dtype), "lr=1e-4", "seed=3", warmup_steps=4)
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    again.scheduler.load_state_dict(saved["scheduler"])
    run(again, 3, 6)
    return all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_the_whole_one(name, dtype):
    assert resumed_equals_whole(name, dtype)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.parametrize("name", RANDOM)
def test_a_resumed_run_equals_the_whole_one_when_compiled(name):
    assert resumed_equals_whole(name, torch.bfloat16)


@needs_torchao
def test_rounding_draws_by_seed_and_step():
    def weights(seed, steps=1):
        made = stepper("adamw_stochastic", Weights(), "lr=1e-5", f"seed={seed}")
        for _ in range(steps):
            step(made)
        return made.model.many.detach().clone()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    twice = weights(0, 2)
    assert not torch.equal((twice != weights(0)), (weights(0) != weights(0, 0)))  # another draw at another step


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("adamw", "bfloat16", 8),
        ("adamw", "float32", 16),
        ("adamw_kahan", "bfloat16", 10),
        ("adamw_kahan", "float32", 16),
        pytest.param("adamw_stochastic", "bfloat16", 8, marks=needs_torchao),
        pytest.param("adamw_stochastic", "float32", 16, marks=needs_torchao),
        pytest.param("adamw_8bit", "bfloat16", 6, marks=needs_torchao),
        pytest.param("adamw_8bit", "float32", 10, marks=needs_torchao),
    ],
)
def test_bytes_are_those_of_the_comments(name, dtype, count):
    model = Weights(dtype=getattr(torch, dtype))
    made = stepper(name, model)
    step(made)
    states = made.optimizer.state[model.many].values()
    stored = sum(_bytes(x) for x in states if isinstance(x, torch.Tensor) and x.numel() > 1)
    assert (2 * _bytes(model.many) + stored) / model.many.numel() == pytest.approx(count, abs=0.4)  # tables are small
    text = (cli.CONF / "optimizer" / f"{name}.yaml").read_text()
    assert f"{'bf16' if dtype == 'bfloat16' else 'fp32'} weights {count}" in text


def _bytes(tensor):
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return sum(_bytes(getattr(tensor, part)) for part in parts) or tensor.nbytes


def test_without_torchao_there_is_one_sentence(monkeypatch):
    config, found = node("adamw_8bit"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    with (
        pytest.raises(
            cli.UserError, match=r"optimizer: torchao is not installed; pip install 'blockwise-advantage\[torchao\]'"
        ),
        cli.user_errors(),
    ):
        make(config)


def test_the_default_is_fused_and_the_papers_experiments_keep_what_rounding_takes():
    assert node("adamw").fused
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        assert compose("train", ["output_folder=/tmp"]).optimizer._target_ == "torch.optim.AdamW"
        paper = compose("train", ["experiment=paper/table2", "output_folder=/tmp"]).optimizer
    assert paper._target_ == "optimi.AdamW" and paper.kahan_sum is None  # null: for bf16 weights
