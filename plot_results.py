"""Figures, tables and reports of finished runs; `python plot_results.py --help` lists the options."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cutlayer import HOME
from cutlayer.plotting.compose import Composed, compose
from cutlayer.plotting.experiments import read_plot_config
from cutlayer.plotting.figures import FIGURES
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import print_errors, print_lines

PLOT_CONFIG = Path("exp_configs.yaml")
PACKAGED = HOME / PLOT_CONFIG


def main(arguments: list[str] | None = None) -> int:
    """Draw what the configuration asks for and print what was made; returns the exit status."""
    figures = "\n".join(f"  {name}: {kind.caption}" for name, kind in FIGURES.items())
    parser = argparse.ArgumentParser(
        description="Draw figures and tables of finished runs.",
        epilog=f"figures:\n{figures}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--saves", type=Path, default=Path("saves"), help="folder with runs (default: saves)")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the figures (default: figures)")
    parser.add_argument(
        "--config", type=Path, help="what to draw (default: exp_configs.yaml, here or beside this file)"
    )
    parser.add_argument("--only", metavar="NAME", help="draw the comparison of this name alone")
    options = parser.parse_args(arguments)
    try:
        if options.config is not None and not options.config.is_file():
            raise ConfigError("--config", options.config, "a file")
        if not options.saves.is_dir():
            raise ConfigError("--saves", options.saves, "a folder with runs")
        config = read_plot_config(options.config or (PLOT_CONFIG if PLOT_CONFIG.is_file() else PACKAGED))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        made = compose(options.saves, options.out, config, options.only, processes=cores)
    except ConfigError as error:
        print_errors(error)
        return 1
    except OSError as error:
        print_errors(f"--out: {error.filename} cannot be written: {error.strerror}")
        return 1
    report(made)
    return 0 if made.files and not made.empty else 1


def report(made: Composed) -> None:
    """Tell what was drawn, and what was left out and why."""
    for path in made.files:
        print_lines(path)
    for title, folders in (("damaged", made.found.damaged), ("not finished", made.found.unfinished)):
        for folder, reason in folders.items():
            print_errors(f"left out, {title}: {folder}: {reason}")
    for run in made.found.older:
        print_errors(f"left out, older than a run of the same setting and seed: {run.folder}")
    for line in made.left_out:
        print_errors(line)
    for name, reason in made.empty.items():
        print_errors(f"comparison {name}: {reason}")
    if not made.files and not made.empty:
        print_errors("nothing to draw: no finished run was found")


if __name__ == "__main__":
    run_program(main)
