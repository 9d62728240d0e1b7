"""Make a tiny policy and its tokenizer, with random weights. bae-warmstart trains the policies that ship from it."""

from typing import Any

from bae.demonstrations.arithmetic import WORDS
from bae.training.policy import Policy, finish

TAGS = ("reasoning", "answer", "analysis", "confidence")


def make_tiny(prompt_template: str = "{question}", hidden: int = 96, layers: int = 4, heads: int = 4) -> Policy:
    """Make a Llama with random weights, of 0.45 M parameters by default, that knows digits, signs and tags.

    Args:
        prompt_template: see `Policy`.
        hidden: the width of a hidden state.
        layers, heads: of the model.
    """
    tokenizer = make_tokenizer()
    return finish(make_model(tokenizer, hidden, layers, heads), tokenizer, prompt_template)


def make_tokenizer() -> Any:
    """Make a fast tokenizer with one token for each digit, sign, analysis word and tag of the format."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<|pad|>", "<|end|>", "<|unknown|>", *"0123456789+-=. ", *WORDS]
    backend = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>"
    )
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return tokenizer


def make_model(tokenizer: Any, hidden: int = 96, layers: int = 4, heads: int = 4) -> Any:
    """Make a Llama of about 0.45 M parameters, randomly initialised.

    For a Qwen2, transformers 5 would load no tokenizer but Qwen2's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=int(hidden * 8 / 3),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
