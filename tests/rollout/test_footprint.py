"""The memory of a step's phases, worked by hand, and the nearest setting that fits."""

from dataclasses import replace
from functools import partial

import pytest

from bae.rollout.footprint import decoding, nearest, peak, phases
from bae.training.chunked_head import LOGITS
from bae.training.flops import ModelSize, decoding_flops, update_flops
from bae.training.footprint import LIBRARIES, MALLOC, Setting, Shape, Sharding, longest_group

SHAPE = Shape(
    size=ModelSize(layers=1000, head=200, pair=8), parameters=1200, trained=1100, layers=2, width=10, vocabulary=2,
    keys=5, number=4, kept=100, kept_beside=12, casts=0, product=4, tied=True,
)  # fmt: skip
SETTING = Setting(
    on_cpu=False, bf16_on_cpu=False, prompts=2, group_size=4, prompt_tokens=7, new_tokens=40, micro_batch_tokens=100,
    checkpointing=False, packed=True, max_rows=512, engine=0.0, asleep=0.0, state=8.0, devices=1, sharding=Sharding(),
    interference=False,
)  # fmt: skip


def of(phase, shape=SHAPE, **changes):
    return phases(shape, replace(SETTING, **changes))[phase]


def test_what_is_always_there():
    for phase in ("sampling", "update"):
        found = of(phase)
        assert (found["libraries"], found["weights"], found["optimiser states"]) == (LIBRARIES, 4800, 8 * 1100)
    assert "gradients" not in of("sampling") and of("update")["gradients"] == 4 * 1100


def test_a_strategy_divides_what_it_shards():
    found = of("update", devices=4, sharding=Sharding(4, 2, 1, beside=2.0))
    assert (found["weights"], found["gradients"], found["optimiser states"]) == (1200, 2200, 8800)
    assert found["strategy's copies"] == 2 * 4800


def test_the_cache_has_places_for_the_longest_completions():
    token = 2 * 5 * 2 * 4  # keys and values, heads together, layers, bytes
    assert of("sampling")["keys and values"] == token * (8 * 64 + 2 * 2 * 7)  # 32 places doubled hold 40
    assert of("sampling", max_rows=4)["keys and values"] == token * (4 * 64 + 2 * 2 * 7)
    assert of("sampling", new_tokens=65)["keys and values"] == token * (8 * 128 + 28)
    on_cpu = of("sampling", on_cpu=True, new_tokens=65)["keys and values"]
    assert on_cpu == pytest.approx(MALLOC * token * (8 * 96 + 28))  # in steps of 32


def test_weights_are_reordered_where_that_gains():
    def reordered(shape=SHAPE, **changes):
        return of("sampling", shape, on_cpu=True, **changes).get("reordered weights", 0)

    assert reordered() == 4 * 1200 and reordered(prompts=50) == 0  # 200 rows at a time
    half = replace(SHAPE, number=2)
    assert reordered(half) == 0 and reordered(half, bf16_on_cpu=True, prompts=50) == 2 * 1200
    assert "reordered weights" not in of("sampling")


def test_activations_are_those_of_a_micro_batch():
    assert of("update")["activations"] == (2 * 100 + 12) * 100
    assert of("update", checkpointing=True)["activations"] == (2 * 10 * 4 + 12) * 100
    assert of("update", micro_batch_tokens=10)["activations"] == 212 * 47  # a completion with its prompt is alone
    whole = of("update", micro_batch_tokens=10**6)
    assert whole["activations"] == 212 * (2 * 7 + 8 * 40) and "gradients" not in whole  # they come as these go


def test_logits_are_bounded_where_prompts_are_shared():
    large = replace(SHAPE, vocabulary=LOGITS // 10, size=ModelSize(1, LOGITS, 1))
    found = of("update", large, prompts=100)
    assert found["logits"] == 2 * 4 * LOGITS + 12 * LOGITS  # two parts, and three copies of one in fp32
    assert of("update", large, packed=False)["logits"] == 100 * (LOGITS // 10) * 16


def test_a_sampler_of_its_own_has_its_share():
    found = phases(SHAPE, replace(SETTING, max_rows=0, engine=5e9, asleep=1e9))
    assert found["sampling"]["vLLM"] == 5e9 and found["update"]["vLLM"] == 1e9
    assert "keys and values" not in found["sampling"]


def test_gradients_of_blocks_are_a_phase_of_their_own():
    found = phases(SHAPE, replace(SETTING, interference=True))
    assert found["interference"]["gradients of a block"] == 15 * 1100 and "gradients" not in found["interference"]


def test_the_largest_phase_counts():
    found = phases(SHAPE, SETTING)
    assert peak(found) == max(sum(parts.values()) for parts in found.values())


def test_steps_of_decoding_and_what_they_read():
    steps, read = decoding(SHAPE, replace(SETTING, max_rows=3))  # 8 completions in three turns
    assert steps == 3 * 40 and read == 4 * 1200 + 80 * (3 * 20 + 1 * 7)


def test_operations_are_those_of_the_longest_group():
    group = longest_group(SETTING)
    assert group.completion_mask.sum() == 160 and group.prompt_mask[0].sum() == 7
    assert decoding_flops(SHAPE.size, group, 4) < update_flops(SHAPE.size, group, 4)


KNOBS = [
    [(f"micro={n}", partial(replace, micro_batch_tokens=n)) for n in (80, 60, 50)],
    [(f"rows={n}", partial(replace, max_rows=n)) for n in (4, 2, 1)],
]


def room(**changes):
    return peak(phases(SHAPE, replace(SETTING, **changes)))


def test_the_nearest_setting_changes_little():
    assert nearest(SHAPE, SETTING, KNOBS, [], room(max_rows=2))[0] == ["rows=4"]  # then the update is the larger phase
    only_update = replace(SETTING, max_rows=1)
    options, found = nearest(SHAPE, only_update, KNOBS, [], room(max_rows=1, micro_batch_tokens=60))
    assert options == ["micro=60"] and peak(found) == room(max_rows=1, micro_batch_tokens=60)


def test_two_options_change_where_one_is_not_enough():
    options, _ = nearest(SHAPE, SETTING, KNOBS, [], room(max_rows=1, micro_batch_tokens=50))
    assert options[0] == "micro=50" and options[1].startswith("rows=")


def test_more_devices_are_the_last_resort():
    devices = [(f"devices={n}", partial(replace, sharding=Sharding(n, n, n))) for n in (2, 4)]
    assert nearest(SHAPE, SETTING, KNOBS, devices, room(max_rows=1, micro_batch_tokens=50))[0][0] == "micro=50"
    shared = room(max_rows=1, micro_batch_tokens=50, sharding=Sharding(2, 2, 2))
    assert nearest(SHAPE, SETTING, KNOBS, devices, shared)[0] == ["micro=50", "rows=2", "devices=2"]


def test_nothing_may_fit():
    assert nearest(SHAPE, SETTING, KNOBS, [], LIBRARIES) is None
