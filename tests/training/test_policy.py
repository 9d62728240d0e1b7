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


TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if thinking is defined and not thinking %}<reasoning></reasoning>{% endif %}"
    "{% if strict %}{{ raise_exception('strict is\\nno mode') }}{% endif %}"
)


@pytest.fixture
def chat(tiny):
    """Make a policy whose chat template knows the arguments `thinking` and `strict`."""
    tiny.tokenizer.chat_template = TEMPLATE

    def make(**arguments):
        return models.finish(tiny.model, tiny.tokenizer, None, shared_prefix=False, chat_template_kwargs=arguments)

    return make


def test_a_chat_template_gets_its_arguments(chat):
    def prompt(policy):
        return policy.tokenizer.decode(policy.encode("1", "2+2="))

    assert prompt(chat(thinking=True)) == prompt(chat()) == prompt(chat(unknown=[1])) == "1<|end|>2+2=<|end|>"
    assert prompt(chat(thinking=False)) == "1<|end|>2+2=<|end|><reasoning></reasoning>"


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "return_dict", "conversation"])
def test_arguments_that_are_not_of_the_template_are_refused(chat, name):
    with pytest.raises(ValueError, match=f"model.chat_template_kwargs.{name}: this is an argument of the tokenizer"):
        chat(**{name: False})


def test_what_a_chat_template_refuses_is_one_sentence(chat):
    with pytest.raises(ValueError, match=r"its chat template refuses the prompt \(strict is\); change model\.chat_t"):
        chat(strict=True).encode("1", "2+2=")


def test_a_prompt_template_takes_no_arguments(tiny):
    with pytest.raises(ValueError, match=r"model.chat_template_kwargs=\{'thinking': False\}: with model.prompt_temp"):
        models.finish(tiny.model, tiny.tokenizer, "{question}", chat_template_kwargs={"thinking": False})
