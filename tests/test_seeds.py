"""No two uses of random draws share a key."""

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bae.seeds import Namespace, key, keys

SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.integers(0, 2**31)  # no run has more steps or epochs


def test_namespaces_differ():
    assert len({int(namespace) for namespace in Namespace}) == len(Namespace)
    assert all(2**31 < namespace < 2**32 for namespace in Namespace)  # above every step, and in one word of a seed


@given(seed=SEEDS, other=SEEDS, step=STEPS, numbers=st.tuples(STEPS, STEPS), data=st.data())
def test_a_namespace_never_meets_another_or_a_training_step(seed, other, step, numbers, data):
    here, there = data.draw(st.permutations(list(Namespace)))[:2]
    mine = [key(seed, here), key(seed, here, numbers[0]), key(seed, here, *numbers)]
    theirs = [key(other, there), key(other, there, numbers[0]), key(other, there, *numbers)]
    theirs += keys(other, step, numbers[0], 3)
    assert not set(mine) & set(theirs)
    assert len(set(mine)) == 3


@given(seed=SEEDS, steps=st.lists(STEPS, unique=True, max_size=4), ranks=st.integers(1, 4), count=st.integers(1, 5))
def test_prompts_of_all_steps_and_ranks_have_keys_of_their_own(seed, steps, ranks, count):
    found = [key for step in steps for rank in range(ranks) for key in keys(seed, step, rank * count, count)]
    assert len(set(found)) == len(found) == len(steps) * ranks * count
    # The ranks together have the keys of one rank that has all prompts.
    assert found == [key for step in steps for key in keys(seed, step, 0, ranks * count)]


@given(seed=SEEDS, other=SEEDS, numbers=st.lists(STEPS, max_size=2))
def test_keys_differ_exactly_if_their_seeds_do(seed, other, numbers):
    for namespace in Namespace:
        assert (key(seed, namespace, *numbers) == key(other, namespace, *numbers)) == (seed == other)


def test_draws_of_different_keys_differ():
    found = [keys(0, 0, 0, 2), keys(0, 1, 0, 2), keys(1, 0, 0, 2)]
    found += [[key(0, namespace, 0), key(0, namespace, 1)] for namespace in Namespace]
    draws = [np.random.default_rng(each).random(8).tolist() for part in found for each in part]
    assert all(one != other for one, other in combinations(draws, 2))
