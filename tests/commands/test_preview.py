"""bae-train preview=true shows prompts, and trains nothing."""

import pytest
from omegaconf import OmegaConf

from bae.batch import Problem
from bae.commands import preview, train
from bae.training.policy import Policy
from tests.support import call


def test_it_shows_the_prompts_of_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(train, tmp_path / "outputs", "preview=true", "prompts_per_step=2", "group_size=2")
    out = capsys.readouterr().out
    assert "the first 2 of 2 prompts of step 1" in out and out.count("tokens, reference ") == 2
    assert not list((tmp_path / "outputs").rglob("log.jsonl")) and not list((tmp_path / "outputs").rglob("policy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["resume=auto"], "resume=auto: only a new run can be previewed"), (["lr=nan"], "lr=nan: must be finite")],
)
def test_what_is_wrong_is_refused(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        call(train, tmp_path / "outputs", "preview=true", *arguments)


def test_a_chat_with_its_special_tokens(tiny):
    turn = "<|pad|>{{ m['content'] }}<|end|>"
    tiny.tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}<|pad|>"
    cfg = OmegaConf.create({"objectives": {"system_prompt": "1+1", "examples": [{"question": "2", "completion": "3"}]}})
    problem = Problem("p/1", "5-4=", "1\u202e")
    shown = list(preview.lines(Policy(tiny.model, tiny.tokenizer, None), problem, cfg))
    assert shown == [
        "problem p/1: 18 tokens, reference 1⟨U+202E⟩",
        "  | <|pad|>1+1<|end|><|pad|>2<|end|><|pad|>3<|end|><|pad|>5-4=<|end|><|pad|>",
        "",
    ]
