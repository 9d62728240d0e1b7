"""Run an entry point under Hydra, and turn what the user got wrong into one sentence."""

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bae.commands import process_setup, schema
from bae.errors import UserError
from bae.report.credentials import has_credentials, refusal
from bae.signals import Stopped, StopSignals

FULL_ERROR = "HYDRA_FULL_ERROR"
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
"""What a value must be, in words, by its type."""
KINDS = {"integer": int, "float": float, "bool": bool, "boolean": bool}
"""The types that OmegaConf's messages name."""
ROOT = Path(__file__).parent.parent
CONF = next(folder for folder in (ROOT.parent / "conf", ROOT / "conf") if folder.is_dir())
"""The configuration: beside the package in a checkout, inside it when installed."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what parts say of their arguments into UserError, while a run is being built and nothing was computed.

    These are ValueError, FileNotFoundError and TypeError.
    """
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__
        where = re.search(r"full_key: (\S+)", str(error))
        if isinstance(cause, (ValueError, FileNotFoundError)):
            raise UserError(str(cause)) from error
        advice = "; if it is called later, add _partial_: true" if "required positional argument" in str(cause) else ""
        message = f"{where[1] if where else 'configuration'}: {cause or error}{advice}"
        raise UserError(message.replace("\n", " ")) from error
    except (ValueError, FileNotFoundError, TypeError) as error:
        raise UserError(str(error)) from error


def run(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and call `task`.

    Exits with status 1 and one sentence on stderr for a UserError, or for a configuration that does not compose.
    HYDRA_FULL_ERROR=1 shows the whole traceback instead. A signal that stops the process gives one sentence, too, and
    an exit code of its own (bae.signals).
    """
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(f"{Path(sys.argv[0]).name} {version('blockwise-advantage')}")
        return
    process_setup.prepare()
    schema.register()
    chosen = os.environ.get(FULL_ERROR)

    @functools.wraps(task)
    def quiet(cfg: DictConfig) -> None:
        # While the task runs, the environment is the user's again: processes that it starts inherit it.
        with _one_sentence(chosen == "1"), _environment(FULL_ERROR, chosen):
            check_names()
            task(cfg)

    check_credentials({argument.partition("=")[0]: argument for argument in sys.argv[1:]})
    # Hydra then raises, and the sentence can be ours.
    with _stops(), _one_sentence(chosen == "1"), _environment(FULL_ERROR, "1"), StopSignals():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(quiet)()


@contextmanager
def _stops() -> Iterator[None]:
    """Let no sweep stay open in MLflow, and say which signal stopped this process."""
    from bae.commands import sweep

    try:
        yield
    except Stopped as stop:
        message = stop.message
        if message is None:
            message = f"stopped by {stop.name} before it was done; the same command begins again"
        if message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sweep.close_parent("KILLED")
        raise
    except BaseException:
        sweep.close_parent("FAILED")
        raise


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set or, with None, unset an environment variable for the `with` body."""
    before = os.environ.pop(name, None)
    try:
        if value is not None:
            os.environ[name] = value
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def options(group: str) -> list[str]:
    """Return the options of a config group: of conf/, and of folders that the user added to it."""
    from hydra.core.global_hydra import GlobalHydra

    options: list[str] = GlobalHydra.instance().config_loader().get_group_options(group)
    return options


def choice(group: str) -> str:
    """Return the option that was chosen of a config group."""
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().runtime.choices[group])


@contextmanager
def _one_sentence(verbose: bool) -> Iterator[None]:
    """Exit with one sentence for what the user got wrong; verbose: raise it instead."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if verbose:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {explain(error)}")
    except ValueError as error:
        if verbose or "Config group override must be a string" not in str(error):  # Hydra raises it as it is
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {_no_option(sys.argv[1:])}")


def _no_option(arguments: list[str]) -> str:
    """Return one sentence for the first group that was given null or a number instead of the name of an option."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        is_group = (CONF / group.partition("@")[0]).is_dir()
        if is_group and re.fullmatch(r"(?i)null|true|false|[\d.e+-]+", value):
            return f"{argument}: {group} takes the name of an option; to go without it, write ~{group}"
    return "a group takes the name of an option, and not null or a number"


def explain(error: Exception) -> str:
    """Return one sentence for an error of composition."""
    text = str(error.__cause__ or error) if isinstance(error, HydraException) else str(error)
    unknown = re.search(r"Key '([\w.\-]+)' is not in struct\s+full_key: ([\w.\-]+)", text)
    unknown = unknown or re.search(r"Key '([\w.\-]+)' not in '\w+'\s+full_key: ([\w.\-]+)", text)
    if unknown:
        near = difflib.get_close_matches(unknown[1], _known_keys() - {unknown[1]}, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help for what there is, or --cfg job for every key"
        return f"there is no key {unknown[2]}; {hint}"
    absent = re.search(r"Missing mandatory value: ([\w.]+)", text)
    if absent:
        return f"{absent[1]}: it has no default; give it, as in {absent[1]}=…"
    single = re.search(r"Cannot assign \w+ to .*\s+full_key: ([\w.]+)", text)
    if single:
        group = single[1].rpartition("_")[2]
        hint = f"choose an option with {group}@{single[1]}=…" if (CONF / group).is_dir() else "set its keys one by one"
        return f"{single[1]}: it has keys of its own, so it cannot be a single value; {hint}"
    wrong = re.search(
        r"Value '(.*?)' (?:of type '\w+' )?(?:could not be converted to|is not a valid) (\w+).*full_key: ([\w.]+)",
        text,
        re.S,
    )
    if wrong:
        kind = KINDS.get(wrong[2].lower())
        return f"{wrong[3]}={wrong[1]}: must be {WORDS[kind] if kind else wrong[2]}"
    missing = re.search(
        r"Could not find '([\w./\-]+)'\s+Available options in '([\w./\-]+)':\s+(.*?)\n[^\t]", text + "\n", re.DOTALL
    )
    if missing:
        options = [o for o in missing[3].split() if not o.startswith("_")]
        return f"{missing[1].replace('/', '=', 1)}: no such option; {missing[2]} has {', '.join(options)}"
    return " ".join(text.split())


def user_folders() -> list[Path]:
    """Return the folders of configuration that the user added on the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    given, _ = parser.parse_known_args(sys.argv[1:])
    return [Path(folder) for folder in given.config_dir]


def check_names() -> None:
    """Refuse yamls of the user whose names conf/ has already, because Hydra would read the others. Raises UserError."""
    for folder in user_folders():
        for path in sorted(folder.rglob("*.yaml")):
            if (CONF / path.relative_to(folder)).is_file():
                raise UserError(
                    f"{path}: conf/{path.relative_to(folder)} of the package hides it; give it another name"
                )


def check_credentials(values: Mapping[str, str]) -> None:
    """Exit with one sentence if one of these is an address with a user name or a password, before it is written.

    values: {where it was written: the text}.
    """
    for key, value in values.items():
        if has_credentials(value):
            sys.exit(f"{Path(sys.argv[0]).name}: {refusal('the command line' if '://' in key else key)}")


class RefuseCredentials(Callback):
    """Refuse credentials in a configuration before Hydra saves it in `.hydra/`. The command line is checked before."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_credentials(dict(_texts(config)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_credentials(dict(_texts(config)))


def _texts(node: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of a configuration, with references resolved as far as they can be already."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for key in raw if isinstance(raw, dict) else range(len(raw)):
        value = raw[key]
        with suppress(OmegaConfBaseException, ValueError):
            value = node[key]
        if OmegaConf.is_config(value):
            yield from ((f"{key}.{below}", text) for below, text in _texts(value))
        elif isinstance(value, str):
            yield str(key), value


def _known_keys() -> set[str]:
    """Return every key that stands in some yaml of conf/ or of the user."""
    paths = [path for folder in (CONF, *user_folders()) for path in folder.rglob("*.yaml")]
    return {key for path in paths for key in re.findall(r"^\s*(\w+):", path.read_text(), re.M)}
