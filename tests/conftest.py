"""What several tests share: a random tiny policy, and where real data lies."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing model fails at once
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("BAE_DATA", ROOT.parent / "shared" / "data"))


def needs(file: str) -> pytest.MarkDecorator:
    """Skip where a file of the data folder is absent."""
    return pytest.mark.skipif(not (DATA / file).is_file(), reason=f"{DATA / file} is not there; set BAE_DATA")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture
def tiny():
    """A random policy of the tiny architecture, smaller still."""
    from bae import attention
    from bae.models import Policy
    from bae.warmstart import make_model, make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden=32, layers=2).eval()
    attention.share(model)
    return Policy(model, tokenizer, "{question}")


def call(module, outputs, *arguments):
    """Run an entry point, such as bae.train, in this process."""
    before = sys.argv
    sys.argv = [f"bae-{module.__name__.partition('.')[2]}", f"outputs={outputs}", *arguments]
    try:
        module.main()
    finally:
        sys.argv = before


def runs(outputs):
    """A client of the store in this folder, and all its runs, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    return client, client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time"])
