"""Fixtures that several tests share: a random tiny policy."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing model fails at once
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def tiny():
    """A random policy of the tiny architecture, smaller still."""
    from bae.commands.warmstart import make_model, make_tokenizer
    from bae.training import attention
    from bae.training.policy import Policy

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden=32, layers=2).eval()
    attention.share(model)
    return Policy(model, tokenizer, "{question}")
