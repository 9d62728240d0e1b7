"""Agreement with Monte Carlo: a case worked by hand, and simulations in which the true value is known."""

from dataclasses import astuple
from math import isnan, nan, sqrt

import pytest
import torch

from bae.fidelity.compare_to_monte_carlo import compare_to_monte_carlo, sets
from bae.fidelity.gradient_agreement import gradient_agreement
from bae.method.baselines import RewardView, leave_one_out, none, outcome_conditioned
from bae.training.sketch import count_sketch

# Two prompts of two completions. V̂ = 1/2, 0, 1, 1/2; s²/M = 1/4, 0, 0, 1/4; r - V̂ = 1/2, 0, 0, -1/2.
REWARD = torch.tensor([1.0, 0.0, 1.0, 0.0])
ROLLOUTS = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
PROMPT = torch.tensor([0, 0, 1, 1])
ZERO = torch.zeros(4)


def simulate(prompts=400, size=4, rollouts=8, seed=0):
    """Values that differ between prompts and within, rewards and rollouts about them, one stratum for each prompt."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.arange(prompts).repeat_interleave(size)
    value = torch.randn(prompts, generator=g)[prompt] + 0.3 * torch.randn(len(prompt), generator=g)
    reward = value + torch.randn(len(prompt), generator=g)
    again = value[:, None] + torch.randn(len(prompt), rollouts, generator=g)
    block = RewardView(reward, prompt, torch.zeros(len(prompt)), torch.ones(len(prompt), dtype=torch.bool))
    baselines = {"ocb": outcome_conditioned(block), "loo": leave_one_out(block), "none": none(block)}
    return value, {"reward": reward, "baselines": baselines, "rollouts": again, "prompt": prompt}


def numbers(result):
    fields = [field for mine in result.values() for field in astuple(mine)]
    return [x for field in fields for x in (field if isinstance(field, tuple) else [field])]


def test_hand_worked():
    got = compare_to_monte_carlo(REWARD, {"zero": ZERO, "low": ZERO - 0.5}, ROLLOUTS, PROMPT, reference="low")
    zero, low = got["zero"], got["low"]
    assert (zero.completions, zero.prompts) == (4, 2)
    assert zero.observed_rmse.value == pytest.approx(sqrt(1.5 / 4))
    assert zero.rmse.value == pytest.approx(sqrt(1.5 / 4 - 0.5 / 4))
    assert zero.bias == (-0.5, -0.75, -0.25)  # draws of two prompts: one of them twice, half the time
    # cov = (1/2 · 1/2 + 1/2 · 1/2) / 3; variance of r - V̂ = (1/4 + 1/4) / 3, of which 1/8 is noise; of r - 0, 1/3
    assert zero.slope.value == pytest.approx((1 / 6) / (1 / 6 - 1 / 8))
    assert zero.correlation.value == pytest.approx((1 / 6) / sqrt(1 / 3 * (1 / 6 - 1 / 8)))
    assert low.rmse.value == pytest.approx(1) and low.bias.value == -1
    assert zero.rmse_ratio.value == pytest.approx(0.5)
    assert low.rmse_ratio == (1, 1, 1) and low.p == 1


def test_where_is_the_set_alone():
    where = torch.tensor([True, False, True, False])
    nowhere_else = torch.where(where, 0.0, torch.nan)
    got = compare_to_monte_carlo(REWARD, {"zero": nowhere_else}, ROLLOUTS, PROMPT, where=where)["zero"]
    assert (got.completions, got.prompts) == (2, 2)
    assert got.rmse.value == pytest.approx(sqrt((0.25 - 0.25 + 1) / 2))
    assert got.bias == (-0.75, -1, -0.5)
    assert isnan(got.p) and all(map(isnan, got.rmse_ratio))  # no reference


def test_the_noise_of_the_rollouts_is_taken_out():
    value, data = simulate()
    for name, got in compare_to_monte_carlo(**data).items():
        error = value - data["baselines"][name]
        assert got.rmse.value == pytest.approx(float(error.square().mean().sqrt()), abs=0.03), name
        assert got.rmse.low < float(error.square().mean().sqrt()) < got.rmse.high
        assert got.observed_rmse.value**2 - got.rmse.value**2 == pytest.approx(1 / 8, rel=0.05)
    assert got.bias.value == pytest.approx(-float(value.mean()), abs=0.02)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_including_oneself_among_n_leaves_a_slope_of_one_minus_one_in_n(size):
    _, data = simulate(prompts=4000 // size, size=size)
    got = compare_to_monte_carlo(**data)
    assert got["loo"].slope.value == pytest.approx(1, abs=0.06)
    assert got["ocb"].slope.value == pytest.approx((1 - 1 / size) * got["loo"].slope.value)
    assert got["loo"].slope.low < 1 < got["loo"].slope.high
    assert got["ocb"].slope.high < 1
    assert got["ocb"].correlation.value == pytest.approx(got["loo"].correlation.value)


def test_a_perfect_baseline_correlates_fully():
    value, data = simulate()
    got = compare_to_monte_carlo(**data | {"baselines": {"true": value}})["true"]
    assert got.slope.value == pytest.approx(1, abs=0.03) and got.correlation.value == pytest.approx(1, abs=0.03)
    assert got.rmse.value < 0.1 and got.rmse.low == 0  # clipped: by chance the noise explains more than all


def test_the_order_of_completions_and_the_names_of_prompts_do_not_matter():
    _, data = simulate(prompts=40)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    moved = {name: x[order] for name, x in data.items() if name != "baselines"}
    moved |= {"baselines": {name: b[order] for name, b in data["baselines"].items()}, "prompt": 3 * moved["prompt"] + 7}
    there, back = (compare_to_monte_carlo(**d, reference="ocb", resamples=200) for d in (data, moved))
    assert numbers(there) == pytest.approx(numbers(back))
    assert numbers(there) != numbers(compare_to_monte_carlo(**data, reference="ocb", resamples=200, seed=1))


def test_a_baseline_does_not_differ_from_its_copy():
    _, data = simulate(prompts=50)
    data["baselines"]["copy"] = data["baselines"]["ocb"].clone()
    got = compare_to_monte_carlo(**data, reference="ocb", resamples=200)
    assert got["copy"] == got["ocb"]
    assert got["copy"].rmse_ratio == (1, 1, 1) and got["copy"].p == 1


def test_pairing_narrows_the_ratio():
    _, data = simulate(prompts=100)
    ocb = data["baselines"]["ocb"]
    data["baselines"] = {"ocb": ocb, "near": 0.9 * ocb}
    got = compare_to_monte_carlo(**data, reference="ocb")["near"]
    alone = [(m.rmse.high - m.rmse.low) / m.rmse.value for m in compare_to_monte_carlo(**data).values()]
    assert got.rmse_ratio.high - got.rmse_ratio.low < 0.7 * sqrt(alone[0] ** 2 + alone[1] ** 2) * got.rmse_ratio.value


def test_p_agrees_with_the_interval_and_not_with_the_side():
    _, data = simulate(prompts=100)
    there, back = (
        compare_to_monte_carlo(**data, reference="ocb")["none"],
        compare_to_monte_carlo(**data, reference="none")["ocb"],
    )
    assert there.p == back.p < 0.01 and there.rmse_ratio.low > 1 > back.rmse_ratio.high


def test_what_has_no_value_is_nan():
    one = compare_to_monte_carlo(REWARD[:2], {"zero": ZERO[:2]}, ROLLOUTS[:2], PROMPT[:2], reference="zero")["zero"]
    assert one.bias.value == -0.25 and isnan(one.bias.low) and isnan(one.bias.high) and isnan(one.p)
    nothing = compare_to_monte_carlo(
        REWARD, {"zero": ZERO}, ROLLOUTS, PROMPT, "zero", where=torch.zeros(4, dtype=torch.bool)
    )
    assert (nothing["zero"].completions, nothing["zero"].prompts) == (0, 0)
    assert all(map(isnan, numbers(nothing)[2:]))
    empty = compare_to_monte_carlo(REWARD[:0], {"zero": ZERO[:0]}, ROLLOUTS[:0], PROMPT[:0])
    assert all(map(isnan, numbers(empty)[2:]))
    alike = torch.full((4,), 0.1)
    constant = compare_to_monte_carlo(alike, {"zero": ZERO}, alike[:, None].expand(4, 3), PROMPT, "zero")["zero"]
    assert isnan(constant.slope.value) and isnan(constant.correlation.value) and constant.rmse.value > 0
    exact = compare_to_monte_carlo(alike, {"exact": alike}, alike[:, None].expand(4, 3), PROMPT, "exact")["exact"]
    assert exact.rmse.value < 1e-8 and isnan(exact.rmse_ratio.value) and exact.p == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baselines": {"ocb": torch.tensor([0.0, nan, 0, 0])}}, "baseline ocb: not finite somewhere in the set"),
        ({"baselines": {"ocb": ZERO[:3]}}, r"baseline ocb: want one for each of 4 completions, got \(3,\)"),
        ({"prompt": PROMPT[:1]}, "prompt: want one for each of 4"),
        ({"where": torch.ones(3, dtype=torch.bool)}, "where: want one for each of 4"),
        ({"rollouts": ROLLOUTS[:, :1]}, r"rollouts: want \(N, M\) with 2 or more of each completion, got \(4, 1\)"),
        ({"rollouts": ROLLOUTS + torch.inf}, "rollouts: not finite"),
        ({"reference": "ocb"}, "reference ocb: not among the baselines zero"),
        ({"resamples": 1}, "2 resamples or more"),
    ],
)
def test_errors_say_what_is_wrong(change, message):
    data = {"reward": REWARD, "baselines": {"zero": ZERO}, "rollouts": ROLLOUTS, "prompt": PROMPT}
    with pytest.raises(ValueError, match=message):
        compare_to_monte_carlo(**data | change)


def test_sets():
    got = sets(torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([1, 3, 40, 2]), {1.0: "correct"})
    assert {name: inside.tolist() for name, inside in got.items()} == {
        "all": [True] * 4,
        "outcome=0": [True, False, False, True],
        "correct": [False, True, True, False],
        "size=1": [True, False, False, False],
        "size=2-3": [False, True, False, True],
        "size=16+": [False, False, True, False],
    }
    edges = sets(torch.zeros(6), torch.tensor([4, 7, 8, 15, 16, 0]))
    assert [(name, int(inside.sum())) for name, inside in edges.items()][2:] == [
        ("size=4-7", 2), ("size=8-15", 2), ("size=16+", 1)]  # fmt: skip
    assert list(sets(torch.zeros(0), torch.zeros(0))) == ["all"]


def gradients(mean, prompts=100, size=256, seed=0):
    """True gradients of prompts, with a mean; a proxy of them, and two noisy halves of a reference."""
    g = torch.Generator().manual_seed(seed)
    true = mean + torch.randn(prompts, size, generator=g)
    proxy = 0.9 * true + 0.8 * torch.randn(prompts, size, generator=g)
    return true, proxy, *(true + torch.randn(prompts, size, generator=g) for _ in range(2))


def test_gradients_by_hand():
    got = gradient_agreement(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
    assert got.cosine.value == pytest.approx(1.5 / sqrt(2)) and isnan(got.cosine.low)
    assert got.mse.value == 0
    both = [torch.tensor([[1.0, 0.0], [0.0, 1.0]])] * 3
    assert gradient_agreement(*both).cosine.value == pytest.approx(1)
    assert gradient_agreement(*both).mse == (0, 0, 0)


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.5])
def test_the_cosine_is_that_with_the_true_gradient(mean):
    true, proxy, a, b = gradients(mean)
    got = gradient_agreement(proxy, a, b)
    cosine = float(torch.cosine_similarity(proxy.sum(0), true.sum(0), dim=0))
    noisy = float(torch.cosine_similarity(proxy.sum(0), (a + b).sum(0), dim=0))
    assert got.cosine.value == pytest.approx(cosine, abs=0.05) and noisy < cosine
    assert abs(got.cosine.value - cosine) < abs(noisy - cosine)
    assert got.cosine.low < cosine < got.cosine.high  # also for 0.5, where all resamples are below
    assert got.mse.value == pytest.approx(float((proxy - true).square().sum() / true.square().sum()), abs=0.03)
    assert got.mse.low < got.mse.value < got.mse.high


def test_the_interval_of_the_cosine_is_the_jackknifes():
    _, *three = gradients(0.5, 6, 32)
    without = [gradient_agreement(*(torch.cat([x[:i], x[i + 1 :]]) for x in three)).cosine.value for i in range(6)]
    error = (5 * torch.tensor(without).var(correction=0)).sqrt().item()
    value, low, high = gradient_agreement(*three).cosine
    assert (value - low, high - value) == pytest.approx((1.96 * error, 1.96 * error), rel=1e-3)


def test_the_scale_of_gradients_does_not_matter():
    _, *three = gradients(0.1, 20, 16)
    flat = [x for interval in gradient_agreement(*three) for x in interval]
    tiny = [x for interval in gradient_agreement(*(1e-9 * x for x in three)) for x in interval]
    assert flat == pytest.approx(tiny)
    nothing = gradient_agreement(*(0 * x for x in three))
    assert all(isnan(x) for interval in nothing for x in interval)
    with pytest.raises(ValueError, match="want three of"):
        gradient_agreement(three[0], three[1][:3], three[2])


def test_a_sketch_keeps_dot_products():
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 10_000, generator=g)
    y = x + noise
    sketched = torch.tensor([[float(count_sketch(x, 512, s) @ count_sketch(v, 512, s)) for v in (x, y, noise)]
                             for s in range(20)]) / float(x @ x)  # fmt: skip
    assert sketched[0, :2].tolist() == pytest.approx([1, 1], abs=0.25)
    assert sketched.mean(0).tolist() == pytest.approx([1, 1, 0], abs=0.05)


def test_a_sketch_is_linear_and_always_the_same():
    x, y = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(count_sketch(x + 2 * y, 64), count_sketch(x, 64) + 2 * count_sketch(y, 64))
    assert count_sketch(x, 64).equal(count_sketch(x, 64)) and not count_sketch(x, 64).equal(count_sketch(x, 64, 1))
    one = torch.zeros(1000, dtype=torch.bfloat16).index_fill(0, torch.tensor(7), -2.0)
    assert count_sketch(one, 64).dtype == torch.float and count_sketch(one, 64).abs().sum() == 2
    assert count_sketch(x[:0], 4).tolist() == [0] * 4
    with pytest.raises(ValueError, match="size of 1 or more"):
        count_sketch(x, 0)


def test_the_share_of_the_noise_that_the_block_adds():
    """Prompts' true gradients spread by 2 about a mean of 1 in each of 50 dimensions; sampling adds a variance of 1."""
    g = torch.Generator().manual_seed(0)
    true = 1 + 2 * torch.randn(400, 50, generator=g)

    def noisy():
        return true + torch.randn(400, 50, generator=g)

    share = gradient_agreement(noisy(), noisy(), noisy()).noise_share
    assert share.value == pytest.approx(1 / (1 + 4), abs=0.02)
    assert share.low < 0.2 < share.high
    half_a, half_b = noisy(), noisy()
    assert gradient_agreement(true, half_a, half_b).noise_share.value == pytest.approx(0, abs=0.02)
    assert torch.tensor(gradient_agreement(true[:1], half_a[:1], half_b[:1]).noise_share).isnan().all()
