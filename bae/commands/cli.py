"""Run an entry point under Hydra, and turn what the user got wrong into one sentence."""

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bae.commands import jobs, process_setup, schema, sweep
from bae.commands.output import readers_may_leave
from bae.commands.process_setup import program
from bae.commands.refusals import check_credentials
from bae.errors import UserError
from bae.signals import Stopped, StopSignals

FULL_ERROR = "HYDRA_FULL_ERROR"
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
"""What a value must be, in words, by its type."""
KINDS = {"integer": int, "float": float, "bool": bool, "boolean": bool}
"""The types that OmegaConf's messages name."""
PASTED = ("run", "resume", "completions")
"""The keys whose values are pasted: folders and files."""
QUOTES = "'\"`\u2018\u2019\u201c\u201d\u00ab\u00bb"
PLAIN = r"[\w./@+-]*"
"""What Hydra reads without quotes."""
MENDABLE = (UserError, HydraException, OmegaConfBaseException)
"""The errors that say what the user can mend."""
ROOT = Path(__file__).parent.parent
CONF = next(folder for folder in (ROOT.parent / "conf", ROOT / "conf") if folder.is_dir())
"""The configuration: beside the package in a checkout, inside it when installed."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what parts say of their arguments into UserError, while a run is being built and nothing was computed.

    These are ValueError, OSError, TypeError and ImportError.
    """
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__
        where = re.search(r"full_key: (\S+)", str(error))
        if isinstance(cause, (ValueError, FileNotFoundError, UserError)):
            raise UserError(str(cause)) from error
        advice = "; if it is called later, add _partial_: true" if "required positional argument" in str(cause) else ""
        message = f"{where[1] if where else 'configuration'}: {cause or error}{advice}"
        raise UserError(message.replace("\n", " ")) from error
    except (ValueError, FileNotFoundError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or error}: {error.strerror or 'failed'}; choose another place") from error


def quoted(text: str) -> str:
    """Return a text as the value of an override, whatever signs it has."""
    return QuotedString(text, Quote.single).with_quotes()


def pasted(argument: str) -> str:
    """Return an argument that names a folder or a file as Hydra reads it, whatever signs the name has.

    Quotes around it, as terminals and chats add them, are taken off. Other arguments are returned as they are.
    """
    key, _, value = argument.partition("=")
    if key not in PASTED or "${" in value:
        return argument
    bare = value.strip().strip(QUOTES).strip()
    is_list = "," in bare and not Path(bare).exists()
    return f"{key}={bare if is_list or re.fullmatch(PLAIN, bare) else quoted(bare)}"


def run(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and call `task`, in a sweep once for each job.

    Exits with status 1 and one sentence on stderr for a UserError, or for a configuration that does not compose.
    HYDRA_FULL_ERROR=1 shows the whole traceback instead. A signal that stops the process gives one sentence, too, and
    an exit code of its own (bae.signals).
    """
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(f"{process_setup.program()} {version('blockwise-advantage')}")
        return
    from bae.commands.sweep_rest import job_of, run_rest

    process_setup.prepare()
    schema.register()
    chosen = os.environ.get(FULL_ERROR)
    alone = job_of()

    @functools.wraps(task)
    def quiet(cfg: DictConfig) -> float | None:
        # While the task runs, the environment is the user's again: processes that it starts inherit it.
        with _environment(FULL_ERROR, chosen):
            check_names()
            if (log := alone or sweep.log_of_jobs()) is not None:
                explain = partial(_explained, chosen == "1")
                return jobs.run_job(log, list(HydraConfig.get().overrides.task), task, cfg, explain)
            elif HydraConfig.get().mode == RunMode.MULTIRUN:
                task(cfg)  # Hydra is to see the error
            else:
                with _one_sentence(chosen == "1"):
                    task(cfg)
        return None

    sys.argv = [sys.argv[0], *map(pasted, sys.argv[1:])]
    check_credentials({argument.partition("=")[0]: argument for argument in sys.argv[1:]})
    # Hydra then raises, and the sentence can be ours.
    with readers_may_leave(), _stops(), _one_sentence(chosen == "1"), _environment(FULL_ERROR, "1"), StopSignals():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(quiet)()
        except BrokenExecutor:
            if (open_sweep := sweep.running()) is None:
                raise
            run_rest(open_sweep)
        sweep.finish()


@contextmanager
def _stops() -> Iterator[None]:
    """Let no sweep stay open in MLflow, and say which signal stopped this process."""
    try:
        yield
    except Stopped as stop:
        message = stop.message
        if message is None:
            message = f"stopped by {stop.name} before it was done; the same command begins again"
        if message:
            print(f"{program()}: {message}", file=sys.stderr)
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
    except MENDABLE as error:
        if verbose:
            raise
        sys.exit(f"{program()}: {explain(error)}")
    except ValueError as error:
        if verbose or "Config group override must be a string" not in str(error):  # Hydra raises it as it is
            raise
        sys.exit(f"{program()}: {_no_option(sys.argv[1:])}")


def _explained(verbose: bool, error: Exception) -> str | None:
    """Return one sentence for what the user got wrong in a job; None for other errors, and if verbose."""
    return explain(error) if isinstance(error, MENDABLE) and not verbose else None


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
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: it cannot be read as key=value; put a value with signs or blanks between quotes inside "
            "the quotes of the shell, as in 'name=\"a (b)\"'"
        )
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
    shape = re.search(r"Cannot merge DictConfig with ListConfig\s+full_key: ([\w.]+)\s+object_type=(\w+)", text)
    if shape:
        was, wanted = ("list", "mapping") if shape[2] == "list" else ("mapping", "list")
        return f"{shape[1]}: it is a {was}, and cannot be made a {wanted}; " + (
            "write [{…}]" if was == "list" else f"remove it first, with ~{shape[1]} +{shape[1]}=[…]"
        )
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
        group = missing[2] if missing[2].startswith("hydra/") else missing[2].partition("/")[0]
        chosen = missing[1].removeprefix(f"{group}/")
        plugin = f"; others are packages, such as hydra-{chosen}-launcher" if group == "hydra/launcher" else ""
        return f"{group}={chosen}: no such option; {missing[2]} has {', '.join(options)}{plugin}"
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


def _known_keys() -> set[str]:
    """Return every key that stands in some yaml of conf/ or of the user."""
    paths = [path for folder in (CONF, *user_folders()) for path in folder.rglob("*.yaml")]
    return {key for path in paths for key in re.findall(r"^\s*(\w+):", path.read_text(), re.M)}
