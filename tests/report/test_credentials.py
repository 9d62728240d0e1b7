"""Credentials in addresses: what counts as one, and that a refusal does not repeat it."""

import pytest

from bae.report.credentials import has_credentials, refusal
from bae.report.store import connect, prepare_store
from bae.report.tracking import MLflowRun


@pytest.mark.fault("credentials")
@pytest.mark.parametrize(
    "address",
    [
        "http://user:pass@host:5000",
        "https://token@host/mlflow",
        "HTTP://user:pa/ss@host",
        "http://user:p@ss@host",
        "postgresql://user:pass@host/runs",
        "postgresql+psycopg2://:pass@host/runs",
        "mysql://user:12ab@host/runs",
        "https://host/path?token=abc",
        "logger.tracking_uri=http://user:pass@host",
    ],
)
def test_these_hold_credentials(address):
    assert has_credentials(address)


@pytest.mark.parametrize(
    "address",
    ["http://host:5000", "https://host:5000/a@b", "sqlite:///outputs/mlflow.db", "sqlite:////home/a@b/c:d@e/mlflow.db",
     "file:///home/me@work/runs", "databricks://profile", "postgresql://user@host/runs", "s3://bucket/a@b",
     "http://[::1]:5000", "task.splits.train=openai/gsm8k:main:train", "$\\frac{a:b}{c}@d$"],
)  # fmt: skip
def test_these_do_not(address):
    assert not has_credentials(address)


@pytest.mark.fault("credentials")
@pytest.mark.parametrize(
    "use", [connect, lambda uri: prepare_store(uri, "e", None), lambda uri: MLflowRun(uri, "e", "x")]
)
def test_no_way_leads_around_the_refusal(use):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        use("http://user:secret@host")
    assert "secret" not in str(refused.value) and str(refused.value) == refusal("logger.tracking_uri")
