"""bae-train plan=true says what a run needs, loads no weights, and trains nothing."""

from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from bae.commands import plan, schema, setting, train
from bae.commands.cli import CONF
from bae.demonstrations.tiny import make_model, make_tokenizer
from bae.rollout.footprint import phases
from bae.training import shapes
from bae.training.footprint import Sharding
from tests.support import call

EXPERIMENTS = [
    path.relative_to(CONF / "experiment").with_suffix("").as_posix()
    for path in sorted((CONF / "experiment").rglob("*.yaml"))
    if not path.stem.startswith("_") and path.parent.name != "warmstart"
]
ELSEWHERE = {  # these start from a policy that a warm start makes, which has the shape of
    "real/qwen2.5_0.5b_gsm8k": "Qwen/Qwen2.5-0.5B-Instruct",
    "real/smollm2_commonsenseqa": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "real/smollm2_copies": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "real/smollm2_lines": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "real/smollm2_lines_rlcr": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "real/smollm2_sums": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "real/smollm2_word_problems": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
MEASURE, KEPT = shapes.measure, {}
"""What was measured of models, by their configurations: many experiments share a model."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No weights, no hub, and no measurement of this machine."""

    def refuse(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    monkeypatch.setattr("bae.training.flops.matmul_rate", lambda *arguments: 1e11)

    def once(config, *types):
        key = (config.to_json_string(), *types)
        if key not in KEPT:
            KEPT[key] = MEASURE(config, *types)
        return KEPT[key]

    monkeypatch.setattr(shapes, "measure", once)


def planned(*overrides):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        cfg.pop("hydra")
        cfg.output_folder = "outputs/x"
    config = OmegaConf.to_container(cfg, resolve=True)
    return cfg, setting.planned(cfg, config)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_planned_without_a_hub(experiment):
    more = [f"model.path={ELSEWHERE[experiment]}"] if experiment in ELSEWHERE else []
    shown = list(plan.lines(*planned(f"experiment={experiment}", *more)))
    assert all(len(line) <= plan.COLUMNS for line in shown)
    assert any(line.startswith("peak") for line in shown) and any(line.startswith("fits") for line in shown)


def test_a_plan_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(train, tmp_path / "outputs", "plan=true")
    out = capsys.readouterr().out
    assert "llama, 0.45 M parameters, all trained" in out and "yes:" in out
    assert not list((tmp_path / "outputs").rglob("log.jsonl")) and not list((tmp_path / "outputs").rglob("policy"))


def test_the_papers_run_does_not_fit_and_the_advice_does():
    cfg, found = planned("experiment=paper/qwen2.5_7b", "plan_card=h100")
    assert found.shape.number == 2 and found.setting.state == 6 and found.setting.checkpointing
    text = " ".join(" ".join(plan.lines(cfg, found)).split())
    assert "it would with " in text and "strategy.devices=" in text
    advice = text.partition("it would with ")[2].partition(",")[0].split()
    mended = " ".join(" ".join(plan.lines(*planned("experiment=paper/qwen2.5_7b", "plan_card=h100", *advice))).split())
    assert "fits yes:" in mended and mended.split("yes: ")[1].split()[0] in text


def test_what_a_configuration_says():
    _, found = planned(
        "model=qwen2.5_3b_instruct", "strategy=ddp", "strategy.devices=4", "strategy.precision=bf16-mixed",
        "model.dtype=float32", "plan_card=a100", "max_new_tokens=100", "rollout.max_rows=64",
    )  # fmt: skip
    assert (found.setting.devices, found.setting.prompts, found.setting.max_rows) == (4, 16, 64)
    assert (found.shape.number, found.shape.product, found.setting.state) == (4, 2, pytest.approx(8, abs=0.01))
    assert found.card.memory == 80e9 and not found.setting.on_cpu and found.setting.sharding.beside == 1


def test_prompts_are_counted_as_the_policy_reads_them(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if twice %}{{ messages[-1]['content'] }}{% endif %}{{ messages[-1]['content'] }}"
    make_model(tokenizer, hidden=32, layers=2).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["model=pretrained", f"model.path={tmp_path}", "objectives.system_prompt=''"]
    _, once = planned(*arguments)
    _, twice = planned(*arguments, "+model.chat_template_kwargs.twice=true")
    assert twice.setting.prompt_tokens in (2 * once.setting.prompt_tokens - 1, 2 * once.setting.prompt_tokens)


def test_what_strategies_share():
    _, found = planned("model=qwen2.5_3b_instruct", "strategy=gpu", "plan_card=h100")
    shape, bytes_of_weights = found.shape, found.shape.parameters * found.shape.number
    assert setting.sharding(None, 8, shape) == setting.sharding("ddp", 1, shape) == Sharding()
    assert setting.sharding("ddp", 8, shape) == Sharding(beside=1.0)
    shared = setting.sharding({"_target_": "bae.callbacks.fully_sharded.FullySharded"}, 8, shape)
    assert (shared.weights, shared.gradients, shared.states, shared.beside, shared.whole) == (8, 8, 8, 0, 1)
    layer = (3_085_938_688 - 151_936 * 2048 - 2048) / 36  # the head is the embedding, and the last norm has 2048
    both = 2 * (2 * layer + 151_936 * 2048) * shape.number
    assert shared.gathered * bytes_of_weights == pytest.approx(both, rel=1e-3)
    parts = phases(shape, replace(found.setting, devices=8, sharding=shared, max_rows=0, engine=10.0))
    assert parts["sampling"]["whole weights"] == bytes_of_weights and "whole weights" not in parts["update"]
    assert parts["update"]["gathered layers"] == pytest.approx(both, rel=1e-3)


def test_adapters_alone_are_trained():
    pytest.importorskip("peft")
    _, found = planned("model=qwen2.5_3b_instruct", "strategy=gpu", "plan_card=h100", "adapter=lora", "adapter.rank=4",
                       "adapter.targets=[q_proj]")  # fmt: skip
    assert found.shape.trained == 36 * 4 * (2048 + 2048) and not found.setting.reference


def test_the_start_policy_is_kept_for_the_divergence_from_it():
    _, found = planned("model=qwen2.5_3b_instruct", "strategy=gpu", "plan_card=h100", "training.kl_coef=0.1")
    parts = phases(found.shape, found.setting)
    assert parts["sampling"]["start policy"] == parts["update"]["start policy"] == parts["update"]["weights"]


def test_halves_end_below_the_least():
    assert setting._halves(16384, 5000) == [8192, 4096] and setting._halves(3000, 10**6) == [2048]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume=latest"], "resume=latest: only a new run can be planned"),
        (["plan_card=h9"], "plan_card=h9: no such card; there are a100, h100"),
        (["plan_card=h100"], "plan_card=h100: strategy.accelerator=cpu has no use for a card; choose strategy=gpu"),
        (["strategy=gpu", "strategy.devices=0"], "strategy.devices=0: must be 1 or more"),
        (["strategy=ddp", "strategy.devices=3"], "prompts_per_step=32 does not divide over 3 ranks"),
        (["rollout.max_rows=0"], "rollout.max_rows=0: must be 1 or more"),
        (["training.micro_batch_tokens=0"], "training.micro_batch_tokens=0: must be 1 or more"),
        (["lr=nan"], "lr=nan: must be finite"),
        (["plan=perhaps"], "plan=perhaps: must be true or false"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        call(train, tmp_path / "outputs", "plan=true", *arguments)


def test_the_type_of_the_weights_is_that_of_the_card():
    cfg = OmegaConf.create({"model": {"_target_": "bae.training.policy.load_pretrained", "path": "Qwen/Qwen2.5-7B"}})
    assert setting._model(cfg, on_cpu=False)[1] == torch.bfloat16
    assert setting._types("16-mixed", torch.float32) == (torch.float32, torch.float16)
    assert setting._types("bf16-true", torch.float32) == (torch.bfloat16, None)
    assert setting._types("None", torch.float32) == (torch.float32, None)
