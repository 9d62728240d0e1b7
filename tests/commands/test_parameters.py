"""Check which values of a configuration are parameters in MLflow."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from bae.commands import cli, schema
from bae.commands.parameters import parameters
from bae.commands.sweep import sweep_name


def composed(*overrides, name="train"):
    schema.register()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose(name, list(overrides), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        cfg.output_folder = "/run"
        del cfg["hydra"]
    return parameters(cfg, choices, overrides)


def test_what_people_compare_is_there_and_no_target():
    found = composed("experiment=quickstart")
    expected = {"model": "tiny", "task": "arithmetic", "objectives": "confidence_brier", "baseline": "ocb",
                "lr": "0.0002",
                "first_block_baseline": "group_mean", "optimizer": "adamw", "strategy": "cpu", "steps": "300",
                "seed": "0", "group_size": "16", "prompts_per_step": "32", "max_new_tokens": "48",
                "experiment": "quickstart",
                "training.warmup_steps": "30"}  # fmt: skip
    assert expected.items() <= found.items()
    assert len(found) < 40
    assert not {"callbacks", "logger", "outputs", "output_folder", "name"} & set(found)
    assert not [name for name in found if "_target_" in name or "_partial_" in name]


def test_what_the_user_overrides_is_always_there():
    given = ["callbacks.held_out.every=7", "baseline@first_block_baseline=ocb_loo", "callbacks.interference=null",
             "model.path=x/y", "callbacks=fidelity", "+objectives.rewards.confidence_brier.weight=2", "name=mine",
             "baseline._target_=bae.method.baselines.none"]  # fmt: skip
    found = composed(*given)
    assert found["callbacks.held_out.every"] == "7" and found["first_block_baseline"] == "ocb_loo"
    assert found["model.path"] == "x/y" and found["callbacks"] == "fidelity" and found["name"] == "mine"
    assert found["objectives.rewards.confidence_brier.weight"] == "2"
    assert found["baseline"] == "bae.method.baselines.none"
    assert found["callbacks.interference"] == "null"


def test_a_warm_start_names_its_demonstrations():
    assert composed("experiment=warmstart/tiny", name="warmstart")["demonstrations"]


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ({"method": "ocb,rlcr", "seed": "0,1,2"}, "method=ocb,rlcr · seed=0,1,2"),
        ({}, "sweep"),
        ({"a": "1" * 500}, None),
    ],
)
def test_the_name_of_a_sweep_says_what_varied(varied, name):
    made = sweep_name(varied)
    assert len(made) <= 200 and (name is None or made == name)
