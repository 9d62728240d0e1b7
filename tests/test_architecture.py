"""The rooms stay apart: pure maths loads no framework, and Hydra is seen by the entry points alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BAE = Path(__file__).parent.parent / "bae"
ENTRY_POINTS = {
    f"{name}.py" for name in ["build", "cli", "evaluate", "fidelity", "report", "schema", "sweep", "train", "warmstart"]
}  # fmt: skip
PURE = ["answers", "blocks", "baselines", "advantages", "demonstrations", "flops", "losses", "normalisation",
        "numbers", "outcomes", "shrinkage", "voting"]  # fmt: skip


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_load_no_framework(module):
    frameworks = ("lightning", "hydra", "transformers", "mlflow")
    code = f"import sys, bae.{module}; print([m for m in {frameworks} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_only_entry_points_see_hydra():
    for path in BAE.rglob("*.py"):
        seen = {name for name in imports(path) if name.split(".")[0] in ("hydra", "omegaconf")}
        assert not seen or path.relative_to(BAE).as_posix() in ENTRY_POINTS, f"{path} imports {seen}"


def test_one_lightning():
    for path in BAE.rglob("*.py"):
        assert not any(name.startswith("pytorch_lightning") for name in imports(path)), path


def test_model_output_is_never_evaluated():
    for path in BAE.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not {"eval", "exec"} & names, path
