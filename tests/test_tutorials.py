"""The tutorials at their word: their files run, and every command composes and fits what it names."""

import inspect
import re
import shlex
from importlib.util import find_spec

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from lightning import Trainer
from omegaconf import OmegaConf

from bae.batch import Completion, Problem
from bae.commands import schema, train
from bae.commands.checks import check_train
from bae.commands.cli import CONF
from bae.commands.validate import check_options, check_parts
from bae.text.blocks import Section
from tests.commands.test_configs import targets
from tests.support import ROOT, call, package, runs

DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text() for path in [*sorted((DOCS / "tutorials").glob("*.md")), DOCS / "launching.md"]}
FILES = dict(
    re.findall(r"^`(my_blocks/\S+)`:\n\n```(?:python|yaml)\n(.*?)^```$", PAGES["third_block"], re.MULTILINE | re.DOTALL)
)
FENCE = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCES = [(page, fence) for page, text in PAGES.items() for fence in FENCE.findall(text)]
# Of this page what needs a server; tests/test_extending.py runs all else.
FENCES += [("extending", f) for f in FENCE.findall((DOCS / "extending.md").read_text()) if "vllm serve" in f]
COMMANDS = [  # without what starts them, such as torchrun, or CUDA_VISIBLE_DEVICES=0
    (page, command[1])
    for page, fence in FENCES
    for line in fence.replace("\\\n", "").splitlines()
    if (command := re.search(r"(?:^|\s)(bae-\w+ .*)", line))
]
SHORT = [
    "steps=2", "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=4", "callbacks.held_out.samples=2",
    "callbacks.checkpoints.log_policy=false", "training.micro_batch_tokens=1000", "callbacks.throughput.seconds=0.01",
]  # fmt: skip


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """The files of the third block in an empty folder, from which Python finds them while the test lasts."""
    with package(FILES, "my_blocks", tmp_path, monkeypatch):
        yield tmp_path


def test_the_third_block_is_trained(blocks):
    call(train, blocks / "outputs", "objectives=reviewed", *SHORT, "--config-dir", "my_blocks/conf")
    _, (run,) = runs(blocks / "outputs")
    assert run.info.status == "FINISHED" and 0 <= run.data.metrics["train/reward/right_word"] <= 1
    for block in ("solution", "review", "confidence"):
        assert f"train/block_zero_signal/{block}" in run.data.metrics


@pytest.mark.parametrize(
    ("question", "word", "reward"), [("7+5=", "short", 1), ("7+15=", "short", 0), ("7+15=", "long", 1), ("7=", "", 0)]
)
def test_the_right_word_by_hand(blocks, question, word, reward):
    from my_blocks.rewards import right_word

    def read(*sections):
        return Completion(Problem("p", question, "12"), "", sections, (True,), (), 0, False, verdicts=())

    assert right_word(read(Section("analysis", word))) == reward
    assert right_word(read()) is None


def single(overrides):
    """The overrides of the first job of a sweep. Those of a launcher that is not installed are left out."""
    if not find_spec("hydra_plugins") or not find_spec("hydra_plugins.hydra_submitit_launcher"):
        overrides = [o for o in overrides if not re.match(r"hydra[./]launcher", o)]
    for override in OverridesParser.create().parse_overrides(overrides):
        first = next(iter(override.sweep_string_iterator())) if override.is_sweep_override() else None
        yield override.input_line if first is None else f"{override.get_key_element()}={first}"


def test_there_are_commands():
    assert {page for page, _ in COMMANDS} == {"extending", "launching", "own_data", "slurm", "table1", "third_block"}
    assert sum(page == "launching" for page, _ in COMMANDS) == 18
    assert {line.split()[0] for _, line in COMMANDS} == {"bae-train", "bae-evaluate", "bae-report", "bae-warmstart"}


@pytest.mark.parametrize(("page", "line"), [pair for pair in COMMANDS if "--config-dir" not in pair[1]])
def test_a_command_composes_and_fits_what_it_names(page, line):
    command, *arguments = shlex.split(line)
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = list(single([argument for argument in arguments if argument != "-m"]))
        cfg = compose(command.removeprefix("bae-"), overrides, return_hydra_config=True)
    if "hydra/launcher=submitit_slurm" in overrides:
        assert cfg.hydra.launcher.gpus_per_node in (1, 8)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    cfg.output_folder = "outputs/x"
    if command == "bae-train":
        check_train(cfg)
    composed = OmegaConf.to_container(cfg, resolve=True)
    check_parts(composed)
    if command == "bae-train":
        check_options("strategy", Trainer, composed["strategy"])
    for node in targets(composed):
        given = {key: None for key in node if key not in ("_target_", "_partial_")}
        inspect.signature(get_object(node["_target_"])).bind_partial(**given)  # TypeError if a key is not an argument
