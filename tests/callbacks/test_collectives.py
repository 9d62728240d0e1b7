"""What ranks tell each other: rows and objects, rank by rank, on every rank."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from bae.callbacks.collectives import gather, gather_objects

ALONE = SimpleNamespace(world_size=1)


def test_one_process_keeps_what_it_has():
    rows = torch.rand(3, 2)
    assert gather(ALONE, rows) is rows
    assert gather_objects(ALONE, {"a": 1}) == [{"a": 1}]


def stacked(tensor):
    """What Lightning's strategy gives: (world, N, …)."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return torch.stack(found)


def a_rank(rank, world, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=stacked)
    trainer = SimpleNamespace(world_size=world, strategy=strategy)
    rows = torch.arange(4.0).view(2, 2) + 10 * rank
    said = gather_objects(trainer, ["nothing"] * rank)  # of other lengths on each rank
    torch.save({"rows": gather(trainer, rows), "said": said}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_rows_and_objects_of_both_in_order(tmp_path):
    torch.multiprocessing.spawn(a_rank, (2, tmp_path / "store", tmp_path), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["rows"].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
        assert found["said"] == [[], ["nothing"]]
