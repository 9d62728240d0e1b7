"""Compare vLLM in this process with transformers, the trainer's forward pass and itself.

On a CPU vLLM has no attention for heads as small as those of the shipped policies, so these have a policy of their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from bae.method.losses import log_probs_and_entropy
from bae.rollout.vllm.completions import seeds
from bae.rollout.vllm.engine import VllmEngine
from bae.rollout.vllm.weights import checkpoint, fingerprint
from bae.training.forward import completion_logits
from bae.training.policy import Policy
from tests.support import runs
from tests.support.rollouts import PROMPTS, sample

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm, or pip install vllm on a GPU"
)
COLOCATED = ["rollout=vllm", "rollout.kv_cache_gib=0.1"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_policy(family="llama"):
    """Random, with heads of 32 dimensions and weights large enough to have preferences."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from bae.demonstrations.tiny import make_model, make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden=128, layers=2)
    if family == "qwen2":  # biases, shared key-value heads, a head of its own
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **shape, **heads))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.08 * torch.randn_like(weight)
    return Policy(model.eval().to(DEVICE), tokenizer, "{question}")


@pytest.fixture(scope="module")
def engine():
    return VllmEngine(kv_cache_gib=0.1, max_model_len=64)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@torch.no_grad()
def gap(model, samples, temperature=1.0, k=0):
    """The largest difference between the engine's log-probabilities and those of the trainer's forward pass."""
    logits, ids = completion_logits(model, samples, torch.arange(len(samples.ended)))
    if k:
        logits = logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)
        log_p = torch.log_softmax(logits / temperature, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    else:
        log_p, _ = log_probs_and_entropy(logits, ids, temperature)
    log_p = log_p.cpu()
    assert samples.log_probs[~samples.completion_mask].eq(0).all()
    return (log_p - samples.log_probs)[samples.completion_mask].abs().max().item()


def generated(policy, prompt, limit=12):
    ids = torch.tensor([policy.encode("", prompt)], device=DEVICE)
    out = policy.model.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=1, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_decoding_is_generates_and_log_probs_are_the_trainers(family):
    policy = make_policy(family)
    engine = VllmEngine(kv_cache_gib=0.1, max_model_len=64)
    ours = sample(engine, policy, group_size=1, temperature=0)
    assert ours.log_probs is None
    for prompt, row, mask in zip(PROMPTS, ours.completion_ids, ours.completion_mask, strict=True):
        assert row[mask].tolist() == generated(policy, prompt)
    for temperature in (1.0, 0.7):
        assert gap(policy.model, sample(engine, policy, temperature=temperature), temperature) < 1e-3  # on a CPU: 1e-6


@needs_vllm
@pytest.mark.slow
def test_log_probs_are_those_of_the_truncated_distribution(policy):
    engine = VllmEngine(kv_cache_gib=0.1, max_model_len=64, top_k=3)
    assert gap(policy.model, sample(engine, policy, temperature=0.7), 0.7, k=3) < 1e-3


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_new_weights_are_sampled_from(engine, how):
    policy = make_policy()
    before = sample(engine, policy)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.05, **how)
    logits, ids = completion_logits(policy.model, before, torch.arange(12))
    log_probs_and_entropy(logits, ids, 1.0)[0].sum().backward()
    optimizer.step()
    assert gap(policy.model, before) > 0.1
    after = sample(engine, policy)
    assert gap(policy.model, after) < 1e-3
    assert not after.completion_ids.equal(before.completion_ids)


@needs_vllm
@pytest.mark.slow
def test_weights_travel_only_when_they_changed(engine, policy, monkeypatch):
    sample(engine, policy)
    sent = []
    real = engine.engine.collective_rpc
    monkeypatch.setattr(
        engine.engine, "collective_rpc", lambda name, **more: (sent.append(name), real(name, **more))[1]
    )
    sample(engine, policy)
    assert sent == []
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(1.1)
    sample(engine, policy)
    sample(engine, policy)
    assert sent.count("reload_weights") == 1


@needs_vllm
@pytest.mark.slow
def test_keys_decide_the_draws(engine, policy):
    whole = sample(engine, policy)
    assert whole.completion_ids.equal(sample(engine, policy).completion_ids)
    other = sample(engine, policy, keys=[(1, 0, i) for i in range(3)])
    assert not whole.completion_ids[:, 0].equal(other.completion_ids[:, 0])
    assert len(set(map(tuple, whole.completion_ids[:4].tolist()))) == 4
    larger = sample(engine, policy, group_size=6)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(engine, policy, prompts=[prompt], keys=[(0, 0, i)])
        for n in range(4):
            ids = alone.completion_ids[n][alone.completion_mask[n]].tolist()
            assert ids == whole.completion_ids[4 * i + n][whole.completion_mask[4 * i + n]].tolist()
            assert ids == larger.completion_ids[6 * i + n][larger.completion_mask[6 * i + n]].tolist()


@needs_vllm
@pytest.mark.slow
def test_more_prompts_than_a_pass_takes(engine, policy):
    prompts = ["1" * n + "+2=" for n in range(20, 36)]  # 500 tokens
    whole = sample(engine, policy, prompts=prompts, group_size=1)
    narrow = VllmEngine(kv_cache_gib=0.1, max_model_len=64, engine_args={"max_num_batched_tokens": 64})
    some = sample(narrow, policy, prompts=prompts, group_size=1)
    assert (some.completion_ids == whole.completion_ids).float().mean() > 0.9  # rounding may turn a draw


@needs_vllm
@pytest.mark.slow
def test_nothing_follows_the_end_of_sequence(engine, policy):
    eos = int(sample(engine, policy).completion_ids[0, 2])  # a token that does come up
    samples = sample(engine, policy, group_size=16, eos=eos)
    assert samples.ended.any() and not samples.ended.all()
    for row, mask, ended in zip(samples.completion_ids, samples.completion_mask, samples.ended, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (row[:length] == eos).sum() == ended
        assert row[length:].eq(policy.tokenizer.pad_token_id).all()
        assert row[length - 1] == eos if ended else length == 12


@needs_vllm
@pytest.mark.slow
def test_each_completion_is_told_of_once(engine, policy):
    told = {}
    samples = sample(engine, policy, on_finished=lambda n, ids, ended: told.setdefault(n, []).append((ids, ended)))
    assert sorted(told) == list(range(12))
    for n, tellings in told.items():
        ids = samples.completion_ids[n][samples.completion_mask[n]].tolist()
        assert tellings == [(ids, bool(samples.ended[n]))]


@needs_vllm
@pytest.mark.slow
def test_a_call_that_was_broken_off_leaves_nothing_behind(engine, policy):
    def interrupt(n, ids, ended):
        raise KeyboardInterrupt

    before = sample(engine, policy)
    with pytest.raises(KeyboardInterrupt):
        sample(engine, policy, on_finished=interrupt)
    assert sample(engine, policy).completion_ids.equal(before.completion_ids)


@needs_vllm
@pytest.mark.slow
def test_the_trainers_random_numbers_and_threads_stay_as_they_are(policy):
    torch.manual_seed(3)
    before, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    sample(VllmEngine(kv_cache_gib=0.1, max_model_len=64), policy)
    assert torch.get_rng_state().equal(before) and torch.set_num_threads is set_num_threads


@needs_vllm
@pytest.mark.slow
def test_a_model_that_vllm_does_not_know_is_refused(policy):
    odd = type("OddForCausalLM", (type(policy.model),), {})(policy.model.config).to(DEVICE)
    with pytest.raises(ValueError, match="does not know OddForCausalLM"):
        sample(VllmEngine(), Policy(odd, policy.tokenizer, "{question}"))


@needs_vllm
@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU build")
def test_what_the_cpu_build_cannot_do_is_refused(tiny, policy):
    with pytest.raises(ValueError, match="attention heads have 8 dimensions"):
        sample(VllmEngine(), tiny)
    with pytest.raises(ValueError, match="cannot sleep on a CPU"):
        sample(VllmEngine(sleep_level=1), policy)
    with pytest.raises(ValueError, match="policy is on the device meta and this vLLM is built for cpu"):
        sample(VllmEngine(), Policy(make_policy().model.to("meta"), policy.tokenizer, "{question}"))


@needs_vllm
def test_what_does_not_fit_is_refused_before_an_engine_is_made(policy):
    with pytest.raises(ValueError, match="prompt of 8 tokens and max_new_tokens=12 are more than the 19"):
        sample(VllmEngine(max_model_len=19), policy)
    with pytest.raises(ValueError, match="more than the 256"):
        sample(VllmEngine(), policy, limit=250)


def trained(folder, *arguments):
    """The runs in `folder` after one of bae-train, for two steps, with a policy that vLLM can run."""
    make_policy().save(folder / "start")
    model = ["model=pretrained", f"model.path={folder / 'start'}", "model.dtype=float32",
             "model.prompt_template='{question}'"]  # fmt: skip
    small = ["steps=2", "prompts_per_step=4", "group_size=4", "max_new_tokens=16", "training.warmup_steps=1",
             "callbacks.held_out.prompts=4"]  # fmt: skip
    job = subprocess.run(
        [sys.executable, "-m", "bae.commands.train", f"outputs={folder}", *model, *small, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert job.returncode == 0, job.stderr
    return runs(folder)[1]


@needs_vllm
@pytest.mark.slow
def test_a_sweep_trains_with_it(tmp_path):
    parent, *jobs = trained(tmp_path, *COLOCATED, "seed=0,1", "-m")
    assert [job.data.metrics["train/lr"] for job in jobs] == [1e-6, 1e-6]  # the paper's: it is constant
    assert all(job.info.status == "FINISHED" for job in (parent, *jobs))


@needs_vllm
@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    two = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]
    trained(tmp_path, *COLOCATED)
    one, both = trained(tmp_path, *COLOCATED, *two)
    for metric in ("train/reward/correctness", "train/entropy", "train/grad_norm", "val/accuracy"):
        assert both.data.metrics[metric] == pytest.approx(one.data.metrics[metric], abs=1e-4), metric


@pytest.mark.parametrize(
    "wrong",
    [{"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"max_model_len": 0}, {"max_num_seqs": 0}, {"kv_cache_gib": 0},
     {"gpu_memory_utilization": 0}, {"gpu_memory_utilization": 30}, {"sleep_level": 3}, {"dtype": "half-baked"}],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"^rollout\.{next(iter(wrong))}="):
        VllmEngine(**wrong)


def test_a_missing_vllm_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'blockwise-advantage\[vllm\]'"):
        VllmEngine()


def test_seeds_are_a_keys_own():
    assert seeds((0, 1, 2), 3) == seeds((0, 1, 2), 5)[:3]
    assert len({*seeds((0, 1, 2), 100), *seeds((0, 1, 3), 100)}) == 200
    assert all(0 <= seed < 2**63 for seed in seeds((2**32 - 1, 2**32 - 3, 0), 100))


def test_a_checkpoint_names_tied_weights_once(tiny):
    weights = dict(checkpoint(tiny.model))
    assert set(weights) == set(dict(tiny.model.named_parameters())) and "lm_head.weight" not in weights
    assert weights["model.norm.weight"].data_ptr() == tiny.model.model.norm.weight.data_ptr()


def test_a_fingerprint_sees_changes_and_exchanges(tiny):
    norm = tiny.model.model.norm
    before = fingerprint(tiny.model)
    assert fingerprint(tiny.model) == before
    tiny.model.load_state_dict(tiny.model.state_dict())
    loaded = fingerprint(tiny.model)
    assert loaded != before
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())
    assert fingerprint(tiny.model) != loaded


def test_a_fingerprint_sees_steps_that_torch_does_not_count(tiny):
    parameters = list(tiny.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = fingerprint(tiny.model)
    for _ in range(2):
        torch.optim.AdamW(parameters, fused=True).step()
        assert fingerprint(tiny.model) != before
        before = fingerprint(tiny.model)


def test_importing_the_module_registers_no_hook():
    code = "import torch; from torch.optim import optimizer as o; import bae.rollout.vllm.weights as w; "
    code += "assert not o._global_optimizer_post_hooks; w._step_counter(), w._step_counter(); "
    code += "assert len(o._global_optimizer_post_hooks) == 1"
    subprocess.run([sys.executable, "-c", code], check=True)
