"""What several tests share: where real data lies, and how an entry point is run and its runs are found."""

import os
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("BAE_DATA", ROOT.parent / "shared" / "data"))


def needs(file: str) -> pytest.MarkDecorator:
    """Skip where a file of the data folder is absent."""
    return pytest.mark.skipif(not (DATA / file).is_file(), reason=f"{DATA / file} is not there; set BAE_DATA")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed; make lora")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed; make torchao")


@cache
def empty_store():
    """The bytes of an MLflow store without runs; to set one up takes MLflow a second."""
    from bae.report.store import SQLITE, store

    with tempfile.TemporaryDirectory() as folder:
        with store(f"{SQLITE}{folder}/mlflow.db"):
            pass
        return (Path(folder) / "mlflow.db").read_bytes()


def call(module, outputs, *arguments):
    """Run an entry point, such as bae.commands.train, in this process. A new store begins as a copy of an empty one."""
    if (
        module.__name__ in ("bae.commands.train", "bae.commands.warmstart")
        and not (Path(outputs) / "mlflow.db").exists()
    ):
        Path(outputs).mkdir(parents=True, exist_ok=True)
        (Path(outputs) / "mlflow.db").write_bytes(empty_store())
    before = sys.argv
    sys.argv = [f"bae-{module.__name__.rpartition('.')[2]}", f"outputs={outputs}", *arguments]
    try:
        module.main()
    finally:
        sys.argv = before


def runs(outputs):
    """A client of the store in this folder, and all its runs, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    return client, client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time"])


@contextmanager
def package(files, name, folder, monkeypatch):
    """Let Python find a package in a folder, which is the working directory meanwhile. files: {path: text}."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]
