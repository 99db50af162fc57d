"""Figures, tables and reports of finished runs; `python plot_results.py --help` lists the options."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from plotting.compose import Composed, compose
from plotting.experiments import read_config
from runtime.config import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Draw what the configuration asks for and tell what was made; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw figures and tables of finished runs.")
    parser.add_argument("--saves", type=Path, default=Path("saves"), help="folder with runs (default: saves)")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the figures (default: figures)")
    parser.add_argument("--config", type=Path, help="what to draw (default: exp_configs.yaml beside this file)")
    parser.add_argument("--only", metavar="NAME", help="draw the comparison of this name alone")
    options = parser.parse_args(arguments)
    try:
        if options.config is not None and not options.config.is_file():
            raise ConfigError("--config", options.config, "a file")
        if not options.saves.is_dir():
            raise ConfigError("--saves", options.saves, "a folder with runs")
        config = read_config(options.config or Path(__file__).with_name("exp_configs.yaml"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        made = compose(options.saves, options.out, config, options.only, processes=cores)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"--out: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    report(made)
    return 0 if made.files and not made.empty else 1


def report(made: Composed) -> None:
    """Tell what was drawn, and what was left out and why."""
    for path in made.files:
        print(path)
    for title, folders in (("damaged", made.found.damaged), ("not finished", made.found.unfinished)):
        for folder, reason in folders.items():
            print(f"left out, {title}: {folder}: {reason}", file=sys.stderr)
    for run in made.found.older:
        print(f"left out, older than a run of the same setting and seed: {run.folder}", file=sys.stderr)
    for line in made.left_out:
        print(line, file=sys.stderr)
    for name, reason in made.empty.items():
        print(f"comparison {name}: {reason}", file=sys.stderr)
    if not made.files and not made.empty:
        print("nothing to draw: no finished run was found", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
