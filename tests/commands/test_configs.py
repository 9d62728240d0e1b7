"""Every yaml of every group composes, and what it names exists and takes the options given."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from bae.commands import schema
from bae.commands.cli import CONF

GROUPS = ["model", "task", "objectives", "baseline", "outcome", "normalisation", "aggregation", "rollout", "strategy",
          "callbacks", "logger", "optimizer", "demonstrations"]  # fmt: skip
OPTIONS = [
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF and not path.stem.startswith("_") and path.parent.name != "report"
]


def composed(*overrides, command="train"):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, list(overrides), return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    cfg.output_folder = "outputs/x"
    if "model" in cfg and OmegaConf.is_missing(cfg.model, "path"):
        cfg.model.path = "somewhere"
    return OmegaConf.to_container(cfg, resolve=True)


def targets(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_fits_what_it_names(group, option):
    root, _, rest = group.partition("/")
    chosen = f"{root}={rest + '/' if rest else ''}{option}"
    if root == "verifier":
        verifier = composed("task=gsm8k", f"verifier@task.verifier={option}")["task"]["verifier"]
        assert verifier == composed(chosen, command="evaluate")["verifier"]
        chosen = f"verifier@task.verifier={option}"
    if "demonstrations" in group or "warmstart" in (option, rest):
        missing = [] if root == "experiment" else ["model=tiny", "task=arithmetic"]
        cfg = composed(chosen, *missing, *["demonstrations.examples=[]"] * (option == "own"), command="warmstart")
    else:
        cfg = composed(*["task=gsm8k"] * (root == "verifier"), chosen)
    for node in targets(cfg):
        named = get_object(node["_target_"])
        given = {key: None for key in node if key not in ("_target_", "_partial_")}
        inspect.signature(named).bind_partial(**given)  # TypeError if a key is not an argument


def test_the_groups_are_those_that_sweeps_rely_on():
    options = {group: {o for g, o in OPTIONS if g == group} for group in [*GROUPS, "experiment", "experiment/paper"]}
    assert options["model"] >= {"tiny", "smollm2_135m", "qwen2.5_3b_instruct", "qwen2.5_7b", "qwen2.5_7b_instruct"}
    assert options["task"] >= {"arithmetic", "gsm8k", "math"}
    assert options["objectives"] >= {"confidence_brier", "rlcr", "rlvr"}
    assert options["baseline"] >= {"none", "batch_mean", "group_mean", "ocb"}
    assert options["strategy"] >= {"cpu", "gpu", "ddp", "fsdp"}
    assert options["experiment"] >= {"quickstart", "smollm2_gsm8k"}


def test_the_papers_experiment_has_the_papers_settings():
    cfg = composed("experiment=paper/qwen2.5_3b_instruct")
    assert (cfg["steps"], cfg["group_size"], cfg["prompts_per_step"] * cfg["group_size"]) == (1024, 32, 2048)
    assert (cfg["lr"], cfg["temperature"], cfg["max_new_tokens"]) == (1e-6, 1.0, 4096)
    assert cfg["optimizer"]["betas"] == [0.9, 0.999] and cfg["optimizer"]["weight_decay"] == 0.1
    assert cfg["training"]["warmup_steps"] == 64
    assert (cfg["callbacks"]["entropy"]["target"], cfg["callbacks"]["entropy"]["step_size"]) == (0.2, 5e-4)
    assert (
        cfg["model"]["dtype"] == "auto"
    )  # bfloat16, but where a processor would crawl (tests/training/test_policy.py)


PAPER = ["table1", "table2", "table3", "table5", "table6", "two_attempt", "qwen2.5_3b_instruct", "qwen2.5_7b"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_experiments_fit_eight_cards(name):
    cfg = composed(f"experiment=paper/{name}")
    assert "vllm" in cfg["rollout"]["_target_"] and cfg["rollout"]["sleep_level"] == 1
    assert cfg["training"]["importance_cap"] == 2.0  # vLLM's numerics differ
    assert cfg["strategy"] == composed("strategy=fsdp")["strategy"] and cfg["callbacks"]["interference"] is None
    assert cfg["model"]["gradient_checkpointing"] and cfg["prompts_per_step"] % 8 == 0
    longest = max(cfg["max_new_tokens"], cfg["callbacks"]["evaluation"]["max_new_tokens"])
    assert cfg["max_prompt_tokens"] + longest <= 32768  # the context of Qwen2.5
    assert len(cfg["task"]["splits"]["train"]) == 2  # MATH and DAPO
    assert set(cfg["callbacks"]["evaluation"]["splits"]) <= set(cfg["task"]["splits"])
    server = composed(f"experiment=paper/{name}", "rollout=vllm_server", "strategy=ddp")
    assert "sleep_level" not in server["rollout"]


def swept(experiment):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
    return OmegaConf.to_container(cfg.hydra.sweeper.params)


def test_tables_are_sweeps():
    assert swept("table1") == {"method": "rlcr,none,batch_mean,group_mean,ocb", "seed": "0,1,2"}
    assert swept("paper/table1") == {"method": "rlcr,none,batch_mean,group_mean,ocb"}
    assert swept("table5")["group_size"] == "8,16,32,64"
    cfg = composed("experiment=table5", "group_size=64")
    assert cfg["prompts_per_step"] * 64 == 512


@pytest.mark.parametrize(
    ("method", "rewards", "baseline"),
    [("rlcr", ["rlcr"], "group_mean"), ("ocb", ["correctness", "confidence_brier"], "outcome_conditioned")],
)
def test_a_method_is_objectives_and_baseline(method, rewards, baseline):
    cfg = composed("experiment=table1", f"method={method}")
    assert list(cfg["objectives"]["rewards"]) == rewards and cfg["baseline"]["_target_"].endswith(baseline)


def test_reports_are_of_methods_and_sets_that_are_published():
    for path in sorted((CONF / "report").glob("table[12356].yaml")):
        spec = OmegaConf.to_container(OmegaConf.load(path))
        assert spec["reference"] in spec["methods"] and set(spec["published"]) == set(spec["sets"])
        for published in spec["published"].values():
            assert set(published) <= set(spec["methods"])


def test_every_option_is_commented_or_plain():
    for path in CONF.rglob("*.yaml"):
        first = Path(path).read_text().splitlines()[0]
        assert first.startswith(("#", "defaults:")), f"{path} does not say what it is"
