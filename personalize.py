"""Personalise finished runs: `python personalize.py <run> ... personalize.part=full personalize.epochs=[0,1,5]`.

A run is its folder below saves/, or a folder above several. Every client fine-tunes the run's model on its own data and
is tested on its own share of the test set; the results go to `personalized/` in the run's folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from runtime.config import NO_VALUE, ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Personalise what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a finished run's model on every client, and test it on the client's own test data.",
        epilog="Keys: personalize.part=body|head|full, personalize.epochs=5 or =[0,1,5], personalize.lr=0.001; "
        "device, threads, dataset.root and others that only say where and how to compute.",
    )
    parser.add_argument("run", nargs="+", help="folder of a run or above several; and key=value")
    given: list[str] = parser.parse_args(arguments).run
    try:
        folders = [Path(text) for text in given if _is_run(text)]
        changes = dict(_change(text) for text in given if not _is_run(text))
        if not folders:
            raise ConfigError("run", NO_VALUE, "name the folder of a run, or one above several, such as saves")
        from runtime.saved import find_runs, personalize_run  # late: a mistake in the keys need not wait for torch

        failed = 0
        for run in dict.fromkeys(run for folder in folders for run in find_runs(folder)):
            try:
                personalize_run(run, changes)
            except ConfigError as error:
                print(f"{run}: {error}", file=sys.stderr)
                failed += 1
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; runs that were not reached or not completed are as they were", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _is_run(text: str) -> bool:
    return "=" not in text or Path(text).exists()


def _change(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"])))["value"]
    except yaml.YAMLError as error:
        raise ConfigError(key, value, "a value such as 5, [0,1,5] or full") from error


if __name__ == "__main__":
    sys.exit(main())
