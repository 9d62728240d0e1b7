"""The rooms stay apart: imports go one way, pure maths loads no framework, and only the entry points see Hydra."""

import ast
import subprocess
import sys

import pytest

from tests.support import ROOT

BAE = ROOT / "bae"
ROOMS = ["errors", "event_loop", "text", "method", "batch", "seeds", "files", "signals", "objectives", "tasks",
         "integrations", "training", "rollout", "demonstrations", "evaluation", "fidelity", "callbacks", "report",
         "commands"]  # fmt: skip
MODULES = sorted(BAE.rglob("*.py"))


def room_of(path):
    return path.relative_to(BAE).parts[0].removesuffix(".py")


def imports(path):
    """The full names of what a module imports, relative ones excepted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_is_known_and_says_what_it_is_for():
    found = {room_of(path) for path in MODULES} - {"__init__"}
    assert found == set(ROOMS)
    for folder in {path.parent for path in MODULES}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text and text.count(".") >= 2, folder


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(BAE)))
def test_a_room_imports_only_from_rooms_before_it(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        if not name.startswith("bae."):
            continue
        other = name.split(".")[1]
        assert ROOMS.index(other) <= ROOMS.index(room), f"{path} imports {name}"


def test_no_circles_between_modules():
    """Among imports at the top of modules; those inside functions wait until they are needed."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    edges = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        wanted = set()
        for node in top:
            base = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            deeper = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found = [each for each in deeper if each in names] or [each for each in base if each in names]
            wanted |= set(found)
        edges[name] = wanted - {name}
    done = set()
    while ready := {name for name, wanted in edges.items() if name not in done and wanted <= done}:
        done |= ready
    assert done == set(edges), f"these import each other: {sorted(set(edges) - done)}"


def test_pure_modules_load_no_framework():
    pure = [path for path in MODULES if room_of(path) in ROOMS[: ROOMS.index("tasks")]]
    pure += [BAE / "evaluation" / "voting.py", BAE / "training" / "flops.py", BAE / "training" / "options.py",
             BAE / "training" / "sketch.py", BAE / "training" / "footprint.py", BAE / "training" / "cards.py",
             BAE / "training" / "chunked_head.py", BAE / "tasks" / "arithmetic.py",
             *(BAE / "demonstrations" / f"{name}.py" for name in ("pieces", "columns", "arithmetic"))]  # fmt: skip
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in pure]
    frameworks = ("lightning", "hydra", "transformers", "mlflow", "omegaconf")
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\n"
    code += f"print([m for m in {frameworks} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_method_alone_is_cheap_to_depend_on():
    """Beside torch and numpy, and what these load, `bae.method` imports nothing that is installed."""
    code = "import sys, torch, numpy; before = set(sys.modules); import bae.method.baselines, bae.method.losses\n"
    code += "import bae.method.advantages, bae.method.normalisation, bae.method.stated_numbers, bae.method.shrinkage\n"
    code += "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - {'bae'} - sys.stdlib_module_names))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(out.stdout)) <= {"torch", "numpy"}


def test_importing_changes_nothing_in_the_process():
    code = (
        "import os; before = dict(os.environ)\n"
        "import bae.commands.train, bae.commands.process_setup, bae.text.verifier\n"
        "assert dict(os.environ) == before\n"
        "import sys; print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"  # --help answers at once, and spawned workers start light


def test_only_entry_points_see_hydra():
    for path in MODULES:
        seen = {name for name in imports(path) if name.split(".")[0] in ("hydra", "omegaconf")}
        assert not seen or room_of(path) == "commands", f"{path} imports {seen}"


def test_one_lightning():
    for path in MODULES:
        assert not any(name.startswith("pytorch_lightning") for name in imports(path)), path


def test_model_output_is_never_evaluated():
    for path in MODULES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not {"eval", "exec"} & names, path


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert not {path: lines for path, lines in long.items() if lines > 400}
