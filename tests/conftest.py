"""Settings of a process of tests, and fixtures that several tests share: a random tiny policy."""

import os

from bae.commands import process_setup

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing model fails at once
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
process_setup.prepare()  # as the entry points do, before torch and MLflow are loaded

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("patient", deadline=None)  # the cores may be busy
settings.load_profile("patient")


@pytest.fixture
def tiny():
    """A random policy of the tiny architecture, smaller still."""
    import torch

    from bae.demonstrations.tiny import make_model, make_tokenizer
    from bae.training import attention
    from bae.training.policy import Policy

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden=32, layers=2).eval()
    attention.share(model)
    return Policy(model, tokenizer, "{question}")
