"""The configuration of a run folder is data: what it names runs only if it is ours, or if the user trusts it."""

import pytest
from omegaconf import OmegaConf

from bae.commands import evaluate, train
from bae.commands.build import CONFIG_FILE, saved_config
from bae.commands.cli import UserError
from tests.support import call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a run of one step."""
    folder = tmp_path_factory.mktemp("trust")
    small = ["steps=1", "group_size=2", "prompts_per_step=2", "callbacks.held_out=null", "callbacks.throughput=null"]
    call(train, folder, *small, f"hydra.run.dir={folder / 'run'}", f"output_folder={folder / 'run'}")
    return folder / "run"


@pytest.fixture
def craft(run):
    """Change the run's configuration, and put it back after the test."""
    before = (run / CONFIG_FILE).read_text()

    def change(**keys):
        saved = OmegaConf.load(run / CONFIG_FILE)
        for key, value in keys.items():
            OmegaConf.update(saved, key, value)
        OmegaConf.save(saved, run / CONFIG_FILE)
        return run

    yield change
    (run / CONFIG_FILE).write_text(before)


def test_an_honest_run_needs_no_trust(run):
    assert saved_config("run", run, []).steps == 1
    assert saved_config("run", run, [], ["steps=3"]).steps == 3


@pytest.mark.fault("trust")
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "bae.commands.train.os.system",  # the same, by way of the package
        "bae.commands.train.Path.unlink",
        "bae_evil.run",
        "torch.load",
        "torch.optim.lr_scheduler.warnings.warn",
        "hydra.utils.instantiate",
        "${oc.decode:os.system}",
    ],
)
@pytest.mark.parametrize(("module", "key"), [(train, "resume"), (evaluate, "run")])
def test_a_crafted_configuration_runs_nothing(craft, tmp_path, module, key, target):
    touched = tmp_path / "touched"
    folder = craft(**{"callbacks.progress": {"_target_": target, "_args_": [f"touch {touched}"]}})
    with pytest.raises(SystemExit) as stopped:
        call(module, folder.parent, f"{key}={folder}")
    sentence = str(stopped.value)
    assert "its callbacks.progress is " in sentence and "trust=[" in sentence and "\n" not in sentence
    assert not touched.exists()


def test_what_was_checked_is_what_is_made(craft):
    """A reference cannot become another name later: none is left."""
    folder = craft(**{"callbacks.progress": "${callbacks.entropy}"})
    left = OmegaConf.to_container(saved_config("run", folder, []), resolve=False)
    assert left["callbacks"]["progress"]["_target_"].startswith("bae.")


def test_a_package_of_the_user_is_trusted_by_name(craft):
    folder = craft(outcome={"_target_": "tests.support.no_such_thing", "_partial_": True})
    with pytest.raises(UserError, match=r"its [\w.]*outcome is tests\.support\.no_such_thing.*trust=\[tests\]"):
        saved_config("run", folder, [])
    assert saved_config("run", folder, ["tests"]).outcome["_target_"] == "tests.support.no_such_thing"


@pytest.mark.fault("trust")
@pytest.mark.parametrize("key", ["model.trust_remote_code", "callbacks.progress.trust_remote_code"])
def test_remote_code_is_never_inherited(craft, key):
    folder = craft(**{key: True})
    with pytest.raises(UserError, match=rf"its {key} is true, .*trust=\[remote_code\]"):
        saved_config("run", folder, [])
    assert saved_config("run", folder, ["remote_code"]).steps == 1


@pytest.mark.fault("trust")
def test_code_in_a_policy_does_not_run(craft, tmp_path):
    """A policy that brings its own model class: bae-evaluate refuses before it loads it."""
    touched = tmp_path / "touched"
    folder = craft(**{"model.trust_remote_code": True})
    (folder / "policy" / "evil.py").write_text(f"open({str(touched)!r}, 'w')")
    with pytest.raises(SystemExit, match="trust_remote_code"):
        call(evaluate, folder.parent, f"run={folder}")
    assert not touched.exists()
