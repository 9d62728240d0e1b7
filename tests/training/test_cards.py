"""The time of a step, worked by hand."""

from dataclasses import replace

import pytest

from bae.training.cards import CARDS, Card, of_this_cpu, sampling_seconds, update_seconds

CARD = Card("made up", memory=1e9, half=100.0, single=10.0, bandwidth=50.0, update_share=0.5, sampling_share=0.2,
            decoding_step=0.25)  # fmt: skip


def test_an_update_takes_its_operations():
    assert update_seconds(CARD, 300, 2, False) == 6 and update_seconds(CARD, 300, 4, False) == 60
    assert update_seconds(CARD, 300, 2, True) == 8  # the forward pass of three twice


def test_sampling_waits_for_the_slower_of_two():
    assert sampling_seconds(CARD, 40, 2, steps=4, read=10) == 40 / 20 + 1
    assert sampling_seconds(CARD, 40, 2, steps=4, read=100) == 4 * 100 / 50 + 1


def test_a_cpu_is_not_held_to_a_bandwidth_that_nobody_measured():
    card = of_this_cpu(1e9, 100.0, is_bf16=False)
    assert sampling_seconds(card, 35, 4, steps=10, read=1e12) == pytest.approx(1)
    assert of_this_cpu(1e9, 100.0, is_bf16=True).update_share < card.update_share


def test_what_was_measured_on_gpus_is_met_within_a_third():
    """docs/speed.md: the update of 1.7 B parameters took .48 s, and decoding 96 tokens of 4 prompts x 8 .77 s."""
    layers, head = 1.61e9, 0.1e9  # SmolLM2-1.7B
    update = 6 * (layers * (16 * 250 + 128 * 95) + head * 128 * 96)
    assert update_seconds(CARDS["h100"], update, 2, False) == pytest.approx(0.48, rel=0.33)
    assert sampling_seconds(CARDS["h200"], 0, 2, steps=96, read=3.4e9) == pytest.approx(0.77, rel=0.33)


def test_cards_are_what_their_makers_say():
    assert all(8e9 < card.memory < 1e12 and card.single < card.half < 1e16 for card in CARDS.values())
    assert replace(CARDS["h200"], name="", memory=0, bandwidth=0) == replace(
        CARDS["h100"], name="", memory=0, bandwidth=0
    )
