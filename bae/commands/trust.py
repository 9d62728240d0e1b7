"""Keep the folder of a run data: what its config.yaml names is checked before anything of it is imported or called.

A run folder may come from anyone. Its configuration names what is called, by `_target_`. So names outside the package
and the few libraries that conf/ itself names are refused until the user trusts them on the command line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bae.commands import validate
from bae.commands.cli import UserError

LIGHTNING = ("lightning.pytorch.strategies", "lightning.pytorch.loggers")
LIBRARIES = ("bae", "torch.optim", "optimi", "torchao.optim", *LIGHTNING)
"""The packages whose functions and classes a run's configuration may name."""
REMOTE_CODE = "remote_code"
"""What `trust` has for code that comes with a model."""


def check_trusted(key: str, folder: Path, saved: Mapping[str, Any], trust: Sequence[str]) -> None:
    """Refuse a run's configuration that names what is not trusted.

    Args:
        key: under which the user named the run.
        folder: of the run.
        saved: its configuration, resolved, plain dicts and lists.
        trust: names of packages of the user's own, and `remote_code`.

    Raises:
        UserError: one sentence, for the first such name.
    """
    for path, node in validate.parts(saved, ""):
        target = str(node["_target_"])
        package = target.partition(".")[0]
        if package not in trust and not _is_of_libraries(path, target):
            raise UserError(
                f"{key}={folder}: its {path} is {target}, which is not this project's; if you know who made the run, "
                f"allow it with trust=[{package}]"
            )
    if REMOTE_CODE not in trust and (key_path := _remote_code(saved, "")):
        raise UserError(
            f"{key}={folder}: its {key_path} is true, but code that comes with a model is not run because a folder "
            f"says so; if you know who made it, allow it with trust=[{REMOTE_CODE}]"
        )


def _is_of_libraries(path: str, target: str) -> bool:
    """Tell whether a name begins with one of LIBRARIES, and what it stands for was made there.

    `bae.commands.train.os.system` begins so, but was made elsewhere.
    """
    if not _is_inside(target):
        return False
    found = validate.find_target(path, target)
    return callable(found) and _is_inside(str(getattr(found, "__module__", "")))


def _is_inside(name: str) -> bool:
    return any(name == library or name.startswith(f"{library}.") for library in LIBRARIES)


def _remote_code(node: Any, path: str) -> str | None:
    """Return the path of the first `trust_remote_code` that is set, or None."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        if name == "trust_remote_code" and value:
            return f"{path}{name}"
        if found := _remote_code(value, f"{path}{name}."):
            return found
    return None
