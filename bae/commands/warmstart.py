"""`bae-warmstart`: make the tiny policies that ship in the package, from nothing.

Supervised fine-tuning on the arithmetic task teaches a policy a format and some arithmetic. It does not teach what the
format is there for: to know how sure it is, or to mend its first attempt. bae/commands/demonstrations.py writes what
the policy is shown.
"""

import random
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from bae.commands import cli
from bae.commands.build import make
from bae.commands.demonstrations import WORDS, Demonstrate, Piece
from bae.training.policy import Policy

TAGS = ("reasoning", "answer", "analysis", "confidence")


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


def make_batch(
    tokenizer: Any, task: Any, demonstrate: Demonstrate, start: int, rows: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Make a batch of demonstrations.

    Returns:
        ids: (B, S), padded on the right.
        labels: (B, S), the ids to predict; -100 on the prompt, on padding and on what is not to be learnt.
    """
    ids, labels = [], []
    for index in range(start, start + rows):
        problem = task.problem("train", index % task.size("train"))
        pieces = [Piece(problem.question, learn=False), *demonstrate(problem, rng), Piece(tokenizer.eos_token)]
        parts = tokenizer([piece.text for piece in pieces])["input_ids"]  # a token never spans two pieces
        ids.append([token for part in parts for token in part])
        pairs = zip(pieces, parts, strict=True)
        labels.append([token if piece.learn else -100 for piece, part in pairs for token in part])
    width = max(map(len, ids))
    return _padded(ids, width, tokenizer.pad_token_id), _padded(labels, width, -100)


def _padded(rows: list[list[int]], width: int, fill: int) -> Tensor:
    """Return (B, width): the rows, filled up on the right."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def warm_start(
    task: Any,
    demonstrate: Demonstrate,
    steps: int,
    batch_size: int,
    micro_batch_size: int,
    lr: float,
    seed: int,
) -> Policy:
    """Train model and tokenizer from nothing, on problems of the training split only.

    conf/warmstart.yaml says what the options mean.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="warm start")
    for step in bar:
        ids, labels = make_batch(tokenizer, task, demonstrate, step * batch_size, batch_size, rng)
        count = (labels != -100).sum()
        total = 0.0
        for part in torch.arange(batch_size).split(micro_batch_size):
            mask = ids[part] != tokenizer.pad_token_id
            logits = model(input_ids=ids[part], attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[part, 1:].flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item() / count.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}")
    return Policy(model, tokenizer, "{question}")


def main() -> None:
    """Run `bae-warmstart`."""
    cli.run(run, "warmstart")


def run(cfg: DictConfig) -> None:
    """Build the task, train, save."""
    with cli.user_errors():
        task, demonstrate = make(cfg.task), make(cfg.demonstrations)
    policy = warm_start(task, demonstrate, cfg.steps, cfg.batch_size, cfg.micro_batch_size, cfg.lr, cfg.seed)
    policy.save(Path(cfg.output))
    print(f"policy   {cfg.output}")
    print(f"try it   bae-train model.path={cfg.output} # and objectives= in the form of {cli.choice('demonstrations')}")


if __name__ == "__main__":
    main()
