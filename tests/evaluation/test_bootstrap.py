"""Compare bootstrap standard errors with formulas and a plain loop, and check what correlation does to them."""

import pytest
import torch

from bae.evaluation import bootstrap
from bae.evaluation.bootstrap import Pairs, clustered_bootstrap, iid_bootstrap, paired_bootstrap
from bae.evaluation.metrics import all_metrics

NAMES = all_metrics(torch.zeros(0), torch.zeros(0)).keys()


def sample(n, seed=0):
    """Draw calibrated confidences of two places, and outcomes."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 101, (n,), generator=g).double() / 100
    return q, torch.rand(n, generator=g) < q


def test_the_error_of_a_mean_is_sigma_over_root_n():
    q, c = sample(2000)
    got = iid_bootstrap(q, c)
    assert got.keys() == NAMES
    mean = float(c.double().mean())
    assert got["accuracy"].value == mean
    assert got["accuracy"].sem == pytest.approx((mean * (1 - mean) / 2000) ** 0.5)
    assert got["confidence"].sem == pytest.approx(float(q.std()) / 2000**0.5, rel=0.08)
    assert got["brier"].sem == pytest.approx(float(((q - c.double()) ** 2).std()) / 2000**0.5, rel=0.08)


def test_a_plain_loop_agrees():
    q, c = sample(300)
    g = torch.Generator().manual_seed(1)
    draws = [all_metrics(q[i], c[i]) for i in torch.randint(300, (1000, 300), generator=g)]
    got = iid_bootstrap(q, c)
    for name in ("ece", "ece_adaptive", "auroc", "nll", "resolution", "bias"):
        assert got[name].sem == pytest.approx(float(torch.stack([d[name] for d in draws]).std()), rel=0.1), name
        assert got[name].value == float(all_metrics(q, c)[name])


def test_copies_of_a_sample_are_no_evidence():
    q, c = (x.repeat_interleave(16) for x in sample(250))
    prompt = torch.arange(250).repeat_interleave(16)
    iid, clustered = iid_bootstrap(q, c), clustered_bootstrap(Pairs(q, c, prompt))
    for name in ("accuracy", "brier", "auroc", "nll", "confidence"):
        assert clustered[name].sem / iid[name].sem == pytest.approx(16**0.5, rel=0.1), name


def test_clusters_of_one_are_iid():
    q, c = sample(400)
    iid, clustered = iid_bootstrap(q, c), clustered_bootstrap(Pairs(q, c, [f"prompt {i}" for i in range(400)]))
    assert iid["ece"] == clustered["ece"]
    assert iid["accuracy"].sem == pytest.approx(clustered["accuracy"].sem, rel=0.08)


def test_clusters_of_different_sizes_stay_whole():
    # Prompt a: one sample, right. Prompt b: three, wrong. Draws aa, ab, ba, bb: accuracy 1, 1/4, 1/4, 0.
    pairs = Pairs(torch.full((4,), 0.5), torch.tensor([1, 0, 0, 0]), ["a", "b", "b", "b"])
    got = clustered_bootstrap(pairs, 20_000)
    draws = torch.tensor([1, 0.25, 0.25, 0])
    assert got["accuracy"].value == 0.25
    assert got["accuracy"].sem == pytest.approx(float(draws.std(correction=0)), rel=0.03)


def test_the_seed_decides_and_the_size_of_chunks_does_not(monkeypatch):
    q, c = sample(100)
    first, again, other = (iid_bootstrap(q, c, 250, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    monkeypatch.setattr(bootstrap, "_CHUNK", 700)
    in_sevens = iid_bootstrap(q, c, 250, seed=1)
    assert in_sevens["ece"].sem == pytest.approx(first["ece"].sem, rel=1e-9)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="outside"):
        bootstrap._resampled([Pairs(torch.tensor([2.0]), torch.ones(1), [0])], [0], 10, 0)
    assert torch.get_num_threads() == before


def test_what_is_undefined_stays_so():
    one_kind = iid_bootstrap(torch.tensor([0.5, 0.9, torch.nan]), torch.ones(3), 50)
    assert one_kind["auroc"].value != one_kind["auroc"].value
    assert one_kind["auroc"].sem != one_kind["auroc"].sem
    assert one_kind["ece"].sem > 0
    nothing = iid_bootstrap(torch.zeros(0), torch.zeros(0), 50)
    assert all(value != value and sem != sem for value, sem in nothing.values())


def test_resamples_without_a_value_are_left_out():
    # A quarter of the resamples of two draw one kind alone twice; the others have AUROC 1.
    got = iid_bootstrap(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]), 100)
    assert got["auroc"] == (1.0, 0.0)


def two_methods(seed=0, prompts=200, better=0.1):
    """Draw two methods with 8 and 4 samples of the same prompts, in different orders; prompts differ in difficulty."""
    g = torch.Generator().manual_seed(seed)
    chance = torch.rand(prompts, generator=g) * (1 - better)
    methods = []
    for size, gain in ((8, 0.0), (4, better)):
        prompt = torch.randperm(prompts, generator=g).repeat_interleave(size)
        c = torch.rand(len(prompt), generator=g) < chance[prompt] + gain
        methods.append(Pairs(torch.full((len(prompt),), 0.5), c, prompt))
    return methods


def test_pairing_takes_out_the_difficulty_of_prompts():
    first, second = two_methods()
    got = paired_bootstrap(first, second)["accuracy"]
    a, b = (clustered_bootstrap(pairs)["accuracy"] for pairs in (first, second))
    assert got.value == pytest.approx(b.value - a.value)
    assert got.sem < 0.8 * (a.sem**2 + b.sem**2) ** 0.5
    by_prompt = [torch.stack([m.correct[m.prompt == p].double().mean() for p in range(200)]) for m in (first, second)]
    assert got.sem == pytest.approx(float((by_prompt[1] - by_prompt[0]).std()) / 200**0.5, rel=0.1)
    assert got.low < got.value < got.high
    assert got.high - got.low == pytest.approx(2 * 1.96 * got.sem, rel=0.1)
    assert got.p < 0.01 and got.low > 0


def test_swapping_the_methods_changes_the_sign_alone():
    first, second = two_methods(prompts=100)
    there, back = paired_bootstrap(first, second, 300)["accuracy"], paired_bootstrap(second, first, 300)["accuracy"]
    assert back.value == -there.value
    assert back.sem == pytest.approx(there.sem, rel=0.3)
    assert max(there.p, back.p) < 0.05


def test_a_method_does_not_differ_from_itself():
    method, _ = two_methods(prompts=30)
    got = paired_bootstrap(method, method, 200)
    assert got["accuracy"] == (0, 0, 1, 0, 0)
    assert got["auroc"] == (0, 0, 1, 0, 0)


def test_p_is_small_as_often_as_it_says():
    small = sum(paired_bootstrap(*two_methods(seed, 60, 0.0), 200)["accuracy"].p < 0.2 for seed in range(100))
    assert 8 <= small <= 35  # of 100, where 20 are expected


def test_other_prompts_are_refused():
    q, c = torch.tensor([0.5, 0.5]), torch.tensor([1, 0])
    with pytest.raises(ValueError, match="different prompts: 1 in the first alone, 0 in the second alone, such as b"):
        paired_bootstrap(Pairs(q, c, ["a", "b"]), Pairs(q, c, ["a", "a"]))
    with pytest.raises(ValueError, match="a prompt id for each of 2 completions, got 1"):
        clustered_bootstrap(Pairs(q, c, ["a"]))
    with pytest.raises(ValueError, match="2 resamples or more"):
        iid_bootstrap(q, c, 1)
