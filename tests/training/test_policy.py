"""What a policy's weights are made of."""

from types import SimpleNamespace

import pytest
import torch

from bae.training import policy as models


@pytest.fixture(params=[True, False], ids=["with bfloat16", "without"])
def native(request, monkeypatch):
    """A CPU alone, and whether it multiplies bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: request.param))
    return request.param


def test_auto_is_the_fast_type(native, recwarn):
    assert models.weights_dtype("auto") == (torch.bfloat16 if native else torch.float32)
    assert not recwarn.list


def test_bfloat16_that_would_crawl_is_warned_of(native, recwarn):
    assert models.weights_dtype("bfloat16") == torch.bfloat16
    assert [str(w.message).split(":")[0] for w in recwarn.list] == ([] if native else ["model.dtype=bfloat16"])


@pytest.mark.parametrize("name", ["bfloat61", "int8", "nn"])
def test_what_is_no_type_of_weights_is_refused(name):
    with pytest.raises(ValueError, match=f"model.dtype={name}: not a floating-point type"):
        models.weights_dtype(name)


def test_a_policy_has_the_type(native):
    policy = models.load_pretrained("package://assets/tiny", prompt_template="{question}")
    assert policy.model.dtype == (torch.bfloat16 if native else torch.float32)
