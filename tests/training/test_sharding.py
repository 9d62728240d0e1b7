"""Shards: what is trained is cut up, what samples is whole, and both are what one process would have."""

import pickle
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bae.errors import UserError
from bae.training import attention, sharded_state
from bae.training.finite import all_finite, non_finite
from bae.training.policy import Policy
from bae.training.sharding import Shards, is_sharded
from tests.support.updates import batch, make_update, rows_of

OPTIONS = {"micro_batch_tokens": 40, "max_grad_norm": 0.5}
SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture
def one_rank():
    if dist.is_initialized():  # an engine of vLLM leaves a group behind, for the next engine in its process
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Ranks:
    """The loop of an update on the ranks of the process group."""

    def backward(self, loss):
        loss.backward()

    def gradients_travel(self, now):
        return nullcontext()

    def over_ranks(self, value, operation="mean"):
        value = value.double().clone()
        dist.all_reduce(value, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
        return value if operation == "max" else value / dist.get_world_size()


def sharded(policy, optimizer=SGD, **options):
    """The shards of a policy, and an update that trains them."""
    shards = Shards(policy.model, init_device_mesh("cpu", (dist.get_world_size(),)))
    shards.gather()
    update = make_update(policy, **OPTIONS | options)
    update.stepper.loop = Ranks()
    update.stepper.model = shards.model
    update.configure(optimizer, steps=9)
    return shards, update


def copy(policy):
    return Policy(deepcopy(policy.model), policy.tokenizer, policy.prompt_template)


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(first, second, **tolerance):
    torch.testing.assert_close(first, second, **tolerance or {"atol": 0, "rtol": 0})


def test_the_policy_is_whole_except_in_an_update(tiny, one_rank):
    before = weights(tiny.model)
    shards, _ = sharded(tiny)
    assert_same(weights(tiny.model), before)
    assert all(isinstance(weight, DTensor) for weight in shards.model.parameters())
    assert is_sharded(shards.model) and not is_sharded(tiny.model)
    head, embedding = tiny.model.get_output_embeddings(), tiny.model.get_input_embeddings()
    assert head.weight is embedding.weight  # still tied
    with shards.alone():
        assert sum(weight.numel() for weight in tiny.model.parameters()) == 0
    assert_same(weights(tiny.model), before)


@pytest.mark.parametrize("case", ["on-policy", "off-policy", "checkpointed", "padded", "bf16-mixed"])
def test_an_update_of_shards_is_that_of_the_policy(tiny, one_rank, case):
    if case == "checkpointed":
        tiny.model.gradient_checkpointing_enable({"use_reentrant": False})
    if case == "padded":
        tiny.model.config._attn_implementation = "sdpa"
    options = {"optimizer_steps": 2} if case == "off-policy" else {}
    plain, work, same = copy(tiny), batch(entropy_coef=0.1), batch(entropy_coef=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "bf16-mixed"):
        make_update(plain, **OPTIONS | options).step(work)
        shards, update = sharded(tiny, **options)
        start = weights(tiny.model)
        with shards.alone():
            update.step(same)
    assert same.metrics == pytest.approx(work.metrics, abs=1e-6)
    assert_same(weights(tiny.model), weights(plain.model), atol=1e-7, rtol=0)
    assert any((value != start[name]).any() for name, value in weights(tiny.model).items())


def test_gradients_of_blocks_are_those_of_whole_weights(tiny, one_rank):
    work, rows = batch(), torch.arange(4)
    wanted = make_update(copy(tiny), **OPTIONS).block_gradients(work, rows, 0)
    _, update = sharded(tiny)
    assert_same(update.block_gradients(work, rows, 0), wanted, atol=1e-6, rtol=0)


def test_numbers_that_are_not_finite_are_found_in_shards(tiny, one_rank):
    shards, _ = sharded(tiny)
    assert all_finite(shards.model.parameters())
    with torch.no_grad():
        next(shards.model.parameters()).to_local()[0] = torch.inf
    assert not all_finite(shards.model.parameters())
    assert non_finite(dict(shards.model.named_parameters())) == "model.embed_tokens.weight"


def test_a_saved_state_goes_on_bit_for_bit(tiny, one_rank, tmp_path):
    fresh = copy(tiny)
    shards, update = sharded(tiny, ADAM)
    for seed in range(2):
        with shards.alone():
            update.step(batch(seed=seed))
    sharded_state.save(sharded_state.state_of(shards.model, update.stepper.optimizer), tmp_path)
    again, its = sharded(fresh, ADAM)
    sharded_state.load(again.model, its.stepper.optimizer, tmp_path)
    again.gather()
    assert_same(weights(fresh.model), weights(tiny.model))
    for both in ((shards, update), (again, its)):
        with both[0].alone():
            both[1].step(batch(seed=2))
    assert_same(weights(fresh.model), weights(tiny.model))


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


@pytest.mark.parametrize("what", ["description", "a value"])
def test_a_state_that_is_a_program_is_refused(tiny, one_rank, tmp_path, capsys, what):
    shards, update = sharded(tiny)
    state = sharded_state.state_of(shards.model, update.stepper.optimizer)
    if what == "a value":
        state["optimizer"]["param_groups"][0]["lr"] = Harm()
    sharded_state.save(state, tmp_path)
    if what == "description":
        (tmp_path / sharded_state.DESCRIPTION).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=r"^the checkpoint is not read: its .* no data$"):
        sharded_state.load(shards.model, update.stepper.optimizer, tmp_path)
    assert "harm" not in capsys.readouterr().out


def a_rank(rank, world, folder, policy):
    """Train a share of a batch; then save, for the other number of ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    policy.model.config._attn_implementation = "sdpa"  # what `share` registers is of the process
    attention.share(policy.model)
    work = rows_of(batch(entropy_coef=0.1), torch.arange(8).chunk(world)[rank])
    found, other = {}, copy(policy)
    shards, update = sharded(policy, optimizer_steps=2)
    with shards.alone():
        update.step(work)
    found["weights"], found["metrics"] = weights(policy.model), work.metrics
    found["here"] = sum(weight.to_local().numel() for weight in shards.model.parameters())
    again, its = sharded(other, ADAM)
    sharded_state.load(again.model, its.stepper.optimizer, folder / "one")
    again.gather()
    found["loaded"] = weights(other.model)
    torch.save(found, folder / f"{rank}.pt")
    sharded_state.save(sharded_state.state_of(again.model, its.stepper.optimizer), folder / "two")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_like_one_and_read_what_one_has_saved(tiny, one_rank, tmp_path):
    plain, saved, work = copy(tiny), copy(tiny), batch(entropy_coef=0.1)
    make_update(plain, optimizer_steps=2, **OPTIONS).step(work)
    shards, update = sharded(saved, ADAM)
    with shards.alone():
        update.step(batch())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    sharded_state.save(sharded_state.state_of(shards.model, update.stepper.optimizer), tmp_path / "one")
    torch.multiprocessing.spawn(a_rank, (2, tmp_path, tiny), nprocs=2)
    size = sum(weight.numel() for weight in plain.model.parameters())
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert sum(found["here"] for found in ranks) == size and max(found["here"] for found in ranks) < 0.6 * size
    for found in ranks:
        assert found["metrics"] == pytest.approx(work.metrics, abs=1e-6)
        assert_same(found["weights"], weights(plain.model), atol=1e-6, rtol=0)
        assert_same(found["loaded"], weights(saved.model))
    with shards.alone():
        update.step(batch(seed=1))
    third = copy(tiny)  # and one rank reads what two have saved
    again, its = sharded(third, ADAM)
    sharded_state.load(again.model, its.stepper.optimizer, tmp_path / "two")
    with again.alone():
        its.step(batch(seed=1))
    assert_same(weights(third.model), weights(saved.model))
