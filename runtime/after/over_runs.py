"""Programs that measure something more of finished runs: folders and key=value from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.importing import quick_imports
from cutlayer.runtime.ground.memory import memory_told
from cutlayer.runtime.ground.text import print_errors

Measure = Callable[[Path, Mapping[str, Any]], object]
"""Measures a run in its folder, with these keys changed in its configuration, and shows what it found."""


def over_runs(
    arguments: Sequence[str] | None,
    description: str,
    epilog: str | Callable[[], str],
    values: str,
    measure: Callable[[], Measure],
) -> int:
    """Measure every run that a command line names; returns the exit status. A run that fails leaves the others alone.

    Args:
        arguments: of the program; None takes those of the process.
        description, epilog: of its help; an epilog that takes long to make is made for the help alone.
        values: examples of values, for a key whose value cannot be read.
        measure: gives the function, and may import what takes long: it is called when the arguments have been read.
    """
    helped = {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments)
    text = epilog if isinstance(epilog, str) else epilog() if helped else ""
    parser = argparse.ArgumentParser(description=description, epilog=text)
    parser.add_argument("run", nargs="+", help="folder of a run or above several, also as run=<folder>; and key=value")
    given: list[str] = parser.parse_args(arguments).run
    try:
        given = [text.removeprefix("run=") if text.startswith("run=") else text for text in given]
        folders = [Path(text) for text in given if _is_run(text)]
        changes = dict(_change(text, values) for text in given if not _is_run(text))
        if not folders:
            raise ConfigError("run", NO_VALUE, "name the folder of a run, or one above several, such as saves")
        with quick_imports():  # late: a mistake in the keys need not wait for torch
            function = measure()
            from cutlayer.runtime.after.saved import folders_with_results

        failed = 0
        for run in dict.fromkeys(run for folder in folders for run in folders_with_results(folder)):
            try:
                with memory_told():
                    function(run, changes)
            except ConfigError as error:
                print_errors(f"{run}: {error}")
                failed += 1
    except ConfigError as error:
        print_errors(error)
        return 1
    except KeyboardInterrupt:
        print_errors("interrupted; runs that were not reached or not completed are as they were")
        return 130
    return 1 if failed else 0


def _is_run(text: str) -> bool:
    return "=" not in text or Path(text).exists()


def _change(text: str, values: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"])))["value"]
    except yaml.YAMLError as error:
        raise ConfigError(key, value, f"a value such as {values}") from error
