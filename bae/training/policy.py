"""Where the policy's weights and tokenizer come from, and how a question becomes a prompt for it."""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bae.training import attention
from bae.training.forward import check_shared_prefix

mkldnn = torch.ops.mkldnn
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Policy:
    """A causal language model, its fast tokenizer, and the form of its prompts.

    prompt_template: text with {system} and {question}; None means the tokenizer's chat template.
    """

    model: Any
    tokenizer: Any
    prompt_template: str | None

    def encode(self, system: str, question: str, examples: Sequence[Mapping[str, str]] = ()) -> list[int]:
        """Token ids of one prompt, up to where the completion begins.

        examples: earlier turns of the chat, {question, completion} each, for a model that has to be shown the format.
        Raises ValueError for examples where there is a prompt template in the place of a chat.
        """
        if self.prompt_template is not None:
            if examples:
                raise ValueError("objectives.examples are turns of a chat; with model.prompt_template there is none")
            # Not str.format: a question may hold braces of its own.
            text = self.prompt_template.replace("{system}", system).replace("{question}", question)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        messages = [{"role": "system", "content": system}]
        for example in examples:
            messages += [{"role": "user", "content": example["question"]},
                         {"role": "assistant", "content": example["completion"]}]  # fmt: skip
        messages += [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def save(self, folder: Path) -> None:
        """Write safetensors, configuration and tokenizer; `AutoModelForCausalLM.from_pretrained(folder)` reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_pretrained(
    path: str,
    dtype: str = "auto",
    prompt_template: str | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    shared_prefix: bool = True,
    compile: bool = False,
) -> Policy:
    """A policy from a local folder or a hub id, safetensors only.

    path: `package://assets/tiny` is a folder in this package. dtype: see weights_dtype. shared_prefix: see
    bae.training.attention; raises ValueError for a model that cannot.
    Raises FileNotFoundError with one sentence if nothing is there.
    """
    folder = PACKAGE / path.removeprefix("package://") if path.startswith("package://") else Path(path)
    source = str(folder) if folder.is_dir() else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=weights_dtype(dtype),
            use_safetensors=True,  # otherwise transformers would still unpickle a .bin
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"model.path={path}: no such folder, and the hub does not give it ({_first_line(error)}); "
            "check the spelling, log in if it is gated, or name a local folder"
        ) from error
    return _finish(model, tokenizer, prompt_template, gradient_checkpointing, shared_prefix, compile)


def load_gguf(
    package: str,
    file: str,
    dtype: str = "auto",
    prompt_template: str | None = None,
    gradient_checkpointing: bool = False,
    shared_prefix: bool = True,
    compile: bool = False,
) -> Policy:
    """A policy from a GGUF file inside an installed package, dequantised.

    package: import name; it is located, not imported. file: the file's name inside it.
    Raises FileNotFoundError with one sentence if the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else None
    if folder is None or not (folder / file).is_file():
        raise FileNotFoundError(f"model: no {file} in the package {package}; install it with: make smollm2")
    kind = weights_dtype(dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=kind)
    config = AutoConfig.from_pretrained(folder, gguf_file=file)
    # A model that came from GGUF refuses to be saved; the same weights in a fresh one do not.
    model = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return _finish(model, tokenizer, prompt_template, gradient_checkpointing, shared_prefix, compile)


def _finish(
    model: Any,
    tokenizer: Any,
    prompt_template: str | None,
    gradient_checkpointing: bool,
    shared_prefix: bool,
    compile: bool,
) -> Policy:
    if tokenizer.eos_token_id is None:
        raise ValueError("model: its tokenizer has no end-of-sequence token; choose another model")
    if prompt_template is None and not tokenizer.chat_template:
        raise ValueError(
            "model: its tokenizer has no chat template; set e.g. model.prompt_template='{system}\\n\\n{question}\\n'"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.eval()  # no dropout: the ratio of the first update must be exactly 1
    if shared_prefix:
        attention.share(model)
        check_shared_prefix(model)
    if compile:
        compile_layers(model)
    return Policy(model, tokenizer, prompt_template)


def weights_dtype(name: str) -> torch.dtype:
    """The type of that name. `auto`: bfloat16 where the GPU, or without one the CPU, multiplies it, else float32.

    Warns of bfloat16 on a CPU that does not. Raises ValueError for what is no floating-point type.
    """
    native = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else mkldnn._is_mkldnn_bf16_supported()
    if name == "auto":
        return torch.bfloat16 if native else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"model.dtype={name}: not a floating-point type of torch; use auto, bfloat16 or float32")
    if dtype == torch.bfloat16 and not native:
        warnings.warn(
            "model.dtype=bfloat16: this processor has no instructions for it, and takes up to 400 times as long as for "
            "float32; model.dtype=auto takes what it has",
            stacklevel=2,
        )
    return dtype


def compile_layers(model: Any) -> None:
    """Let torch.compile fuse what each layer does beside matrix products and attention. Layers are alike, so one is
    compiled, at its first pass, for all lengths."""
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
