"""Operations that a step needs: by hand, against torch's own count, and as a run logs them."""

import math
from contextlib import nullcontext
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.flop_counter import FlopCounterMode

from bae.batch import SampledTokens
from bae.callbacks.throughput import Throughput, product_dtype
from bae.commands import train
from bae.rollout.interface import SamplingRequest
from bae.rollout.local.engine import LocalEngine
from bae.training.flops import (
    ModelSize,
    _active_share,
    _pair_flops,
    decoding_flops,
    matmul_rate,
    model_size,
    update_flops,
)
from bae.training.forward import completion_logits, completion_pass
from tests.support import call, runs
from tests.training.test_update import batch

STAGES = ("rollout", "update")


def samples(prompts, completions):
    """Of these lengths, a prompt's for each completion; padded as an engine does it. Prompts of a length are alike."""
    prompt, own = torch.tensor(prompts).unsqueeze(1), torch.tensor(completions).unsqueeze(1)
    width, longest = int(prompt.max()), int(own.max())
    prompt_mask, mask = torch.arange(width) >= width - prompt, torch.arange(longest) < own
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 25, x.shape[1:], generator=draw) * x for x in (prompt_mask, mask)]
    return SampledTokens(ids[0], prompt_mask, ids[1], mask, torch.ones(len(mask)).bool())


def counted(kinds, run, *arguments, **options):
    """What torch counts while `run` runs, of the operations `kinds`."""
    with FlopCounterMode(display=False) as mode:
        run(*arguments, **options)
    of_all = mode.get_flop_counts()["Global"]
    return sum(of_all.get(kind, 0) for kind in kinds)


MM, BMM = torch.ops.aten.mm, torch.ops.aten.bmm


def test_a_llama_is_its_linear_layers(tiny):
    size = model_size(tiny.model)
    layers = 0
    for name, layer in tiny.model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layers += layer.in_features * layer.out_features
    assert layers == 2 * (4 * 32 * 32 + 3 * 32 * 85)  # four in attention, three of width 85 = int(32 * 8 / 3)
    # 2 layers; 4 heads of width 8; query times key and weight times value, a product and a sum each.
    assert size == ModelSize(layers, head=len(tiny.tokenizer) * 32, pair=2 * 4 * (2 * 8 + 2 * 8))


def test_a_head_of_its_own_is_no_layer(tiny):
    from transformers import LlamaForCausalLM

    tied = model_size(tiny.model)
    tiny.model.config.tie_word_embeddings = False
    assert model_size(LlamaForCausalLM(tiny.model.config)) == tied


def test_a_mixture_counts_the_experts_that_a_token_goes_to():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=30, hidden_size=16, intermediate_size=99, moe_intermediate_size=8, num_hidden_layers=2, head_dim=6,
        num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=3, decoder_sparse_step=1,
    )  # fmt: skip
    attention = 16 * 24 + 2 * 16 * 12 + 24 * 16
    router, expert = 16 * 8, 3 * 16 * 8
    layers = 2 * (attention + router + 3 * expert)
    assert model_size(Qwen3MoeForCausalLM(config)) == ModelSize(layers, 30 * 16, 2 * 4 * (2 * 6 + 2 * 6))


def test_all_experts_count_where_it_is_not_told_how_many_are_active():
    assert _active_share(SimpleNamespace(n_routed_experts=8, num_experts_per_tok=2)) == 0.25
    assert _active_share(SimpleNamespace(num_experts=8)) == 1
    assert _active_share(SimpleNamespace(num_experts=0, num_experts_per_tok=2)) == 1


def test_layers_that_are_not_linear_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    size = model_size(GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=9, n_embd=12, n_layer=2, n_head=3)))
    assert size == ModelSize(2 * (4 * 12 * 12 + 2 * 12 * 48), 30 * 12, 2 * 3 * (2 * 4 + 2 * 4))


def test_latent_attention_has_keys_wider_than_values():
    config = SimpleNamespace(num_hidden_layers=5, num_attention_heads=3, head_dim=4, qk_head_dim=12, v_head_dim=8)
    assert _pair_flops(config) == 5 * 3 * (2 * 12 + 2 * 8)


def test_by_hand():
    """Two groups of two, prompts of 2 and 3 tokens, completions of 3, 1, 2 and 2, whose last tokens predict nothing."""
    size, work = ModelSize(layers=10, head=7, pair=2), samples([2, 2, 3, 3], [3, 1, 2, 2])
    tokens = (2 + 3) + (2 + 0 + 1 + 1)
    pairs = (1 + 2) + (1 + 2 + 3)  # prompts
    pairs += (3 + 4) + 0 + 4 + 4  # the tokens of each completion see the prompt, those before, and themselves
    assert (tokens, pairs) == (9, 24)
    assert update_flops(size, work, 2) == 3 * (2 * 10 * 9 + 2 * 24 + 2 * 7 * 8)
    assert decoding_flops(size, work, 2) == 2 * 10 * 9 + 2 * 24 + 2 * 7 * (2 + 4)


def test_a_prompt_counts_once_for_its_group():
    size, work = ModelSize(layers=10, head=0, pair=0), samples([5] * 4, [3] * 4)
    per_group = [update_flops(size, work, g) / (3 * 2 * 10) for g in (1, 2, 4)]
    assert per_group == [4 * 5 + 4 * 2, 2 * 5 + 4 * 2, 5 + 4 * 2]


def test_the_head_works_on_completion_tokens_alone():
    size = ModelSize(layers=0, head=10, pair=0)
    assert {update_flops(size, samples([p] * 2, [3, 4]), 2) for p in (1, 5, 9)} == {3 * 2 * 10 * 7}


def test_torch_counts_the_same_in_a_plain_pass(tiny):
    """One completion, forward and backward, attention by whole squares."""
    tiny.model.set_attn_implementation("eager")
    size, work = model_size(tiny.model), samples([6], [5])
    length = 6 + 5 - 1
    ours = update_flops(size, work, 1)
    ours += 3 * size.pair * (length * length - length * (length + 1) // 2)  # the half that is masked is computed too

    def step():
        completion_logits(tiny.model, work, torch.arange(1))[0].sum().backward()

    assert counted((MM, BMM, torch.ops.aten.addmm), step) == ours


def test_torch_counts_the_same_where_prompts_are_shared(tiny):
    size, work = model_size(tiny.model), samples([4, 4, 4, 2, 2, 2], [3, 1, 5, 2, 2, 4])
    without_attention = ModelSize(size.layers, size.head, pair=0)
    with torch.no_grad():
        found = counted([MM], completion_pass, tiny.model, work, torch.arange(6), 1.0)
    assert 3 * found == update_flops(without_attention, work, 3)


def test_torch_counts_the_same_in_decoding(tiny, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # it counts no prepacked products
    found = []

    def decode():
        request = SamplingRequest(
            [[5, 6, 7], [8, 9]], [(0,), (3,)], group_size=3, max_new_tokens=9, temperature=1.0, eos_token_id=1,
            pad_token_id=0,
        )  # fmt: skip
        found.append(LocalEngine().sample(tiny.model, request))

    count = counted([MM], decode)
    size = model_size(tiny.model)
    assert len(found[0].completion_mask.sum(1).unique()) > 1  # some ended before others
    assert count == decoding_flops(ModelSize(size.layers, size.head, pair=0), found[0], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_matrix_products(dtype):
    before, start = torch.get_rng_state(), perf_counter()
    rate = matmul_rate(torch.device("cpu"), dtype, 0.2)
    assert 1e7 < rate < 1e15 and perf_counter() - start < 3  # of seconds that other work on the machine takes part in
    assert torch.equal(torch.get_rng_state(), before)


def test_there_is_always_a_rate():
    assert matmul_rate(torch.device("cpu"), torch.float32, 1e-3) > 0


def callback(tiny, rate=1e6):
    made = Throughput(SimpleNamespace(policy=tiny), 0.1)
    made.rate = rate
    return made


def logged(made, work, **trainer):
    found = {}
    logger = SimpleNamespace(log_metrics=lambda metrics, step: found.update(metrics, step=step))
    module = SimpleNamespace(device=torch.device("cpu"))
    made.on_train_batch_end(SimpleNamespace(**{"world_size": 1} | trainer, loggers=[logger]), module, None, work, 0)
    return found


def test_what_is_logged(tiny):
    work = batch()
    work.seconds = {"rollout": 2.0, "update": 4.0}
    size, tokens = model_size(tiny.model), int(work.samples.completion_mask.sum())
    rollout, update = decoding_flops(size, work.samples, 4) / 2, update_flops(size, work.samples, 4) / 4
    found = logged(callback(tiny), work)
    assert found.pop("perf/memory_gb") > 0.05  # libraries alone take more
    assert found == {
        "step": 1, "perf/matmul_flops": 1e6,
        "perf/rollout_flops": rollout, "perf/rollout_mfu": rollout / 1e6, "perf/rollout_tokens_per_second": tokens / 2,
        "perf/update_flops": update, "perf/update_mfu": update / 1e6, "perf/update_tokens_per_second": tokens / 4,
    }  # fmt: skip


def test_ranks_log_their_mean_and_all_tokens(tiny, monkeypatch):
    monkeypatch.setattr("bae.callbacks.throughput.most_since_last", lambda device: next(memory))
    memory = iter([3e9, 5e9, 3e9, 5e9, 3e9])
    work, slow = batch(), batch()
    work.seconds, slow.seconds = {"rollout": 1.0, "update": 1.0}, {"rollout": 2.0, "update": 4.0}
    first, second = logged(callback(tiny), work), logged(callback(tiny, rate=2e6), slow)
    said = []
    strategy = SimpleNamespace(root_device="cpu", all_gather=lambda mine: (said.append(mine), mine.expand(2, 1, -1))[1])
    for made, part in ((callback(tiny), work), (callback(tiny, rate=2e6), slow)):
        logged(made, part, world_size=2, strategy=strategy)
    strategy.all_gather = lambda mine: torch.stack(said)
    both = logged(callback(tiny), work, world_size=2, strategy=strategy)
    assert both["perf/memory_gb"] == 5
    for name in both.keys() - {"step", "perf/memory_gb"}:
        total = first[name] + second[name]
        assert both[name] == pytest.approx(total if name.endswith("tokens_per_second") else total / 2), name


def test_the_rate_is_that_of_the_dtype_that_products_run_in(tiny):
    plain = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
    assert product_dtype(plain, tiny.model) == torch.float32
    mixed = SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    assert product_dtype(mixed, tiny.model) == torch.bfloat16
    assert product_dtype(plain, tiny.model.bfloat16()) == torch.bfloat16


def test_no_time_to_measure_is_refused(tiny):
    with pytest.raises(ValueError, match=r"callbacks\.throughput\.seconds=0: must be above 0"):
        Throughput(SimpleNamespace(policy=tiny), 0)


RUN = [
    "experiment=quickstart", "steps=2", "group_size=4", "prompts_per_step=4", "callbacks.held_out=null",
    "callbacks.completions=null", "callbacks.progress=null", "callbacks.checkpoints.log_policy=false",
    "callbacks.interference=null",
]  # fmt: skip


def test_a_run_logs_it_every_step(tmp_path):
    call(train, tmp_path, *RUN, "callbacks.throughput.seconds=0.1")
    client, (run,) = runs(tmp_path)
    names = [f"perf/{stage}_{what}" for stage in STAGES for what in ("flops", "mfu", "tokens_per_second")]
    for name in [*names, "perf/matmul_flops", "perf/memory_gb"]:
        found = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in found] == [1, 2], name
        assert all(math.isfinite(metric.value) and metric.value > 0 for metric in found), name
    for stage in STAGES:
        assert 0 < run.data.metrics[f"perf/{stage}_mfu"] < 1.5
        assert run.data.metrics[f"perf/{stage}_mfu"] == pytest.approx(
            run.data.metrics[f"perf/{stage}_flops"] / run.data.metrics["perf/matmul_flops"]
        )


def test_a_run_without_it(tmp_path):
    call(train, tmp_path, *RUN, "steps=1", "callbacks.throughput=null")
    _, (run,) = runs(tmp_path)
    assert {name for name in run.data.metrics if name.startswith("perf/")} == {"perf/tokens_per_second"}
