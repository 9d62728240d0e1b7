"""Adapters: what they compute, what is trained, and what is saved, against merged weights and a model without them."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from bae.rollout.local.engine import LocalEngine
from bae.rollout.vllm.weights import checkpoint, fingerprint
from bae.training import lora
from bae.training.flops import ModelSize, model_size, update_flops
from bae.training.forward import completion_logits, completion_pass
from bae.training.lora import Lora, adapted, merged_state, sampling_weights, without_adapters
from bae.training.policy import load_pretrained
from tests.support import needs_peft
from tests.support.rollouts import sample
from tests.support.updates import batch, make_update

pytestmark = needs_peft
ROWS = torch.arange(8)


def with_lora(policy, moved=True, **options):
    """The policy with adapters, of which B is no longer zero if they have moved."""
    given = {"rank": 3, "alpha": 6.0, "targets": lora.ALL_LINEAR, "seed": 0} | options
    made = policy.with_adapter(Lora(**given))
    draw = torch.Generator().manual_seed(1)
    for name, weight in made.model.named_parameters():
        if moved and ".lora_B." in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=draw)
    return made


def without(policy):
    """A copy of the policy before it gets adapters."""
    return replace(policy, model=copy.deepcopy(policy.model))


def log_p(model):
    with torch.no_grad():
        return completion_pass(model, batch().samples, ROWS, 0.8).log_p


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_training_begins_with_the_policy_as_it_was(tiny):
    base = without(tiny)
    policy = with_lora(tiny, moved=False)
    assert torch.equal(log_p(policy.model), log_p(base.model))
    names, values = zip(*trained(policy.model).items(), strict=True)
    assert all(".lora_A." in name or ".lora_B." in name for name in names) and len(names) == 2 * 2 * 7
    assert {value.dtype for value in values} == {torch.float}


def test_the_start_is_drawn_by_the_seed_alone(tiny):
    others = [without(tiny) for _ in range(2)]
    state = torch.get_rng_state()
    first = trained(with_lora(tiny, moved=False).model)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws have changed
    torch.manual_seed(5)
    again, other = (trained(with_lora(p, moved=False, seed=s).model) for p, s in zip(others, (0, 1), strict=True))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)


def test_merged_weights_say_what_the_adapters_say(tiny):
    base = without(tiny)
    policy = with_lora(tiny)
    layer = adapted(policy.model)["model.layers.0.mlp.up_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = layer.base_layer.weight + 6.0 / 3 * b @ a
    merged = merged_state(policy.model)
    assert_close(merged["model.layers.0.mlp.up_proj.weight"], by_hand.detach())
    assert set(merged) == set(base.model.state_dict())
    plain = without(base).model
    plain.load_state_dict({name: weight.detach() for name, weight in merged.items()})
    assert (log_p(policy.model) - log_p(base.model)).abs().max() > 0.05
    assert_close(log_p(policy.model), log_p(plain), rtol=0, atol=1e-5)

    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    with sampling_weights(policy.model):
        assert_close(log_p(policy.model), log_p(plain), rtol=0, atol=1e-5)
        assert all(layer.disable_adapters for layer in adapted(policy.model).values())
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.state_dict().items())
    assert set(trained(policy.model)) == {name for name in before if ".lora_" in name}
    with without_adapters(policy.model):
        assert torch.equal(log_p(policy.model), log_p(base.model))
    assert set(trained(policy.model)) == {name for name in before if ".lora_" in name}


def test_the_packed_pass_is_that_of_plain_rows(tiny):
    model, work = with_lora(tiny).model, batch()
    mask = work.samples.completion_mask

    def outcome(shared):
        model.zero_grad()
        if shared:
            found = completion_pass(model, work.samples, ROWS, 0.8).log_p
        else:
            logits, ids = completion_logits(model, work.samples, ROWS)
            found = (logits / 0.8).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        (found * mask).sum().backward()
        return (found * mask).detach(), {name: w.grad.clone() for name, w in trained(model).items()}

    for one, other in zip(outcome(True), outcome(False), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"micro_batch_tokens": 25}, {"checkpointing": True}])
def test_only_adapters_are_trained_and_how_a_batch_is_cut_does_not_matter(tiny, options):
    results = []
    for checkpointing, tokens in (
        (False, 1000),
        (options.get("checkpointing"), options.get("micro_batch_tokens", 1000)),
    ):
        policy = without(tiny)
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = with_lora(policy)
        before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
        update = make_update(policy, micro_batch_tokens=tokens)
        held = [weight for group in update.stepper.optimizer.param_groups for weight in group["params"]]
        assert {id(w) for w in held} == {id(w) for w in trained(policy.model).values()}
        work = batch()
        update.step(work)
        after = policy.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(trained(policy.model)) and work.metrics["grad_norm"] > 0
        results.append({name: after[name] for name in changed})
    assert_close(*results, rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_adapters_in_fp32_and_samples_with_them(tiny):
    tiny.model.to(torch.bfloat16)
    policy = with_lora(tiny)
    assert {weight.dtype for weight in trained(policy.model).values()} == {torch.float}
    assert policy.model.dtype == torch.bfloat16
    assert {weight.dtype for weight in merged_state(policy.model).values()} == {torch.bfloat16}
    with sampling_weights(policy.model):  # a small adapter would be lost by rounding
        assert not any(layer.disable_adapters for layer in adapted(policy.model).values())
    update = make_update(policy)
    work = batch()
    update.step(work)
    assert work.metrics["grad_norm"] > 0


@pytest.mark.parametrize("shared", [True, False])
def test_the_sampler_draws_from_what_is_trained(tiny, shared):
    if not shared:
        tiny.model.config._attn_implementation = "sdpa"
    base = without(tiny)
    policy = with_lora(tiny)
    samples = sample(LocalEngine(), policy)
    rows = torch.arange(len(samples.ended))
    with torch.no_grad():
        found = completion_pass(policy.model, samples, rows, 1.0).log_p
        old = completion_pass(base.model, samples, rows, 1.0).log_p
    mask = samples.completion_mask
    assert_close(samples.log_probs[mask], found[mask], rtol=0, atol=1e-5)
    assert (samples.log_probs[mask] - old[mask]).abs().max() > 0.05


def test_another_engine_gets_merged_weights_under_their_own_names(tiny):
    base = without(tiny)
    policy = with_lora(tiny)
    sent, own = dict(checkpoint(policy.model)), dict(checkpoint(base.model))
    assert list(sent) == list(own)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert_close(sent[name], merged_state(policy.model)[name])
    assert not torch.equal(sent[name], own[name]) and not sent[name].requires_grad
    before = fingerprint(policy.model)
    make_update(policy).step(batch())
    assert fingerprint(policy.model) != before


def test_a_merged_policy_is_a_model_as_any_other(tiny, tmp_path):
    policy = with_lora(tiny)
    policy.save(tmp_path / "policy")
    assert {path.name for path in (tmp_path / "policy").glob("*.safetensors")} == {"model.safetensors"}
    loaded = load_pretrained(str(tmp_path / "policy"), "float32", "{question}")
    assert not adapted(loaded.model)
    assert_close(log_p(loaded.model), log_p(policy.model), rtol=0, atol=1e-5)


def test_an_adapter_is_saved_alone_and_names_its_model(tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"adapter.save=adapter: this model is not of a folder .* use .*merged"):
        with_lora(without(tiny), save="adapter")
    tiny.save(tmp_path / "base")
    base = load_pretrained(str(tmp_path / "base"), "float32", "{question}")
    policy = with_lora(base, save="adapter")
    policy.save(tmp_path / "policy")
    (file,) = (tmp_path / "policy").glob("*.safetensors")
    assert file.name == lora.WEIGHTS_FILE and len(load_file(file)) == 2 * 2 * 7
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "policy"
    )
    ids = torch.arange(3, 11).unsqueeze(0)
    with torch.no_grad():
        assert_close(theirs(ids).logits, policy.model(ids).logits, rtol=0, atol=1e-5)
    ours = load_pretrained(str(tmp_path / "policy"), "float32", "{question}")
    assert not adapted(ours.model) and all(weight.requires_grad for weight in ours.model.parameters())
    assert_close(log_p(ours.model), log_p(policy.model), rtol=0, atol=1e-5)

    (tmp_path / "policy" / "SHA256SUMS").unlink()
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"has adapter_config.json and no adapter_model.safetensors"):
        load_pretrained(str(tmp_path / "policy"), "float32", "{question}")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"its adapter belongs to .*base; no such folder"):
        load_pretrained(str(tmp_path / "policy"), "float32", "{question}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank=0: must be 1 or more"),
        ({"alpha": 0.0}, "adapter.alpha=0.0: must be above 0"),
        ({"alpha": float("nan")}, "adapter.alpha=nan: must be above 0"),
        ({"targets": "q_proj"}, r"adapter.targets=q_proj: must be all-linear, or a list such as \[q_proj,v_proj\]"),
        ({"targets": ["q_prj"]}, "no linear layers q_prj; there are down_proj, gate_proj, k_proj, o_proj, q_proj"),
        ({"targets": ["q_proj", "lm_head"]}, "the model has no linear layers lm_head"),  # its layer is never called
        ({"targets": []}, r"adapter.targets=\[\]: nothing would be trained"),
    ],
)
def test_what_cannot_work_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        with_lora(tiny, **options)


def test_targets_are_the_layers_of_that_name(tiny):
    policy = with_lora(tiny, targets=["v_proj", "self_attn.q_proj"])
    assert {name.rpartition(".")[2] for name in adapted(policy.model)} == {"v_proj", "q_proj"}
    update = make_update(policy, micro_batch_tokens=25)  # keys have no gradient here, but prompts are encoded ahead
    update.step(batch())


def test_gradients_of_frozen_weights_are_not_counted(tiny):
    full = model_size(without(tiny).model)
    size = model_size(with_lora(tiny).model)
    added = 2 * 3 * (4 * (32 + 32) + 3 * (32 + 85))
    assert size == ModelSize(full.layers + added, full.head, full.pair, frozen=full.layers, frozen_head=full.head)
    samples = batch().samples
    one, two = (update_flops(replace(s, pair=0), samples, 4) for s in (full, replace(size, layers=full.layers)))
    assert 3 * two == 2 * one  # a forward pass, and the gradient of the states
