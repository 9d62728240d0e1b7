"""Check what a configuration gives to the parts that it names by `_target_`, before any of them is made.

The type hints of a function or class are the schema of its options, also for a user's own. So a mistyped key of a
`_partial_`, or a text where a number is wanted, is refused with the full name of the key.
"""

import difflib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from bae.commands.cli import WORDS, UserError

SPECIAL = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


def check_parts(config: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse wrong options of all parts. Raises UserError, one sentence, for the first one.

    Args:
        config: a resolved configuration, plain dicts and lists.
        prefix: the key under which it stands, with a dot at its end.
    """
    for path, node in parts(config, prefix):
        check_options(path, find_target(path, node["_target_"]), {k: v for k, v in node.items() if k not in SPECIAL})


def find_target(path: str, target: str) -> Any:
    """Return the object that `_target_` names. Raises UserError if there is none."""
    try:
        return pkgutil.resolve_name(target)
    except Exception as error:  # whatever importing the user's module raises
        reason = " ".join(str(error.__cause__ or error).split())
        outside = isinstance(error, ModuleNotFoundError) and not target.startswith("bae.")
        advice = "check the spelling" + (", or add the folder that has it to PYTHONPATH" if outside else "")
        raise UserError(f"{path}._target_={target}: cannot be imported ({reason}); {advice}") from error


def check_options(path: str, target: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that a function or class does not take, or not with such a value. Raises UserError."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some built-in ones tell nothing
        return
    hints = _hints(target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in options.items():
        key = f"{path}.{name}"
        if name not in parameters:
            if takes_any:
                continue
            near = difflib.get_close_matches(name, parameters, n=1)
            takes = f"did you mean {near[0]}?" if near else f"there are {', '.join(parameters)}"
            raise UserError(f"there is no key {key}; {takes}")
        if not _has_part(value):
            _check_value(key, value, hints.get(name, Any))


def parts(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every node that has a `_target_`, with its path; outer ones first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path.rstrip("."), node
        for key, value in node.items():
            yield from parts(value, f"{path}{key}.")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from parts(value, f"{path}{i}.")


def _has_part(value: Any) -> bool:
    """Tell whether a value contains a part of its own, which is checked for itself."""
    return next(parts(value, ""), None) is not None


def _hints(target: Any) -> dict[str, Any]:
    """Return the type hints of the parameters, as far as they can be found."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except Exception:  # names that only a type checker imports
        return {}


def _check_value(key: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the hinted type, if that is made of plain types. Raises UserError."""
    if not _is_plain(hint):
        return
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_python(value, strict=not isinstance(value, (list, dict)))
    except ValidationError as error:
        raise UserError(f"{key}={value}: must be {describe(hint)}") from error


def _is_plain(hint: Any) -> bool:
    """Tell whether a hint is made of numbers, texts, flags, None, and lists and mappings of these."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return True
    if origin is None:
        return hint in WORDS
    inner = [a for a in arguments if a is not Ellipsis and a is not Any]
    containers = (typing.Union, types.UnionType, list, tuple, dict, Sequence, Mapping)
    return origin in containers and all(map(_is_plain, inner))


def describe(hint: Any) -> str:
    """Return a hint in words: `int | None` is "a whole number or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple, Sequence):
        return f"a list, each {describe(arguments[0])}" if arguments else "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return WORDS.get(hint, "another value")
