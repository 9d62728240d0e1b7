"""Refuse what must not be written, or cannot be, before Hydra writes anything."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bae.commands.process_setup import program
from bae.report.credentials import has_credentials, refusal


def check_credentials(values: Mapping[str, str]) -> None:
    """Exit with one sentence if one of these is an address with a user name or a password, before it is written.

    values: {where it was written: the text}.
    """
    for key, value in values.items():
        if has_credentials(value):
            sys.exit(f"{program()}: {refusal('the command line' if '://' in key else key)}")


class BeforeHydraWrites(Callback):
    """Refuse credentials in a configuration, and a folder that cannot be made, before Hydra saves it there.

    The command line is checked before.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_credentials(dict(_texts(config)))
        _make_folder(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_credentials(dict(_texts(config)))
        _make_folder(config.hydra.sweep.dir)


def _make_folder(folder: str) -> None:
    """Make the folder of a run or a sweep, or exit with one sentence if that cannot be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{program()}: {folder}: it cannot be made ({error.strerror}); set outputs to another")


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
