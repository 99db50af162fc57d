"""Figures, tables and reports of finished runs; `python plot_results.py --help` lists the options."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cutlayer import HOME
from cutlayer.plotting.compose import Composed, compose
from cutlayer.plotting.experiments import read_config
from cutlayer.plotting.figures import FIGURES
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import complain, tell

CONFIG = Path("exp_configs.yaml")
PACKAGED = HOME / CONFIG


def main(arguments: list[str] | None = None) -> int:
    """Draw what the configuration asks for and tell what was made; returns the exit status."""
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
        config = read_config(options.config or (CONFIG if CONFIG.is_file() else PACKAGED))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        made = compose(options.saves, options.out, config, options.only, processes=cores)
    except ConfigError as error:
        complain(error)
        return 1
    except OSError as error:
        complain(f"--out: {error.filename} cannot be written: {error.strerror}")
        return 1
    report(made)
    return 0 if made.files and not made.empty else 1


def report(made: Composed) -> None:
    """Tell what was drawn, and what was left out and why."""
    for path in made.files:
        tell(path)
    for title, folders in (("damaged", made.found.damaged), ("not finished", made.found.unfinished)):
        for folder, reason in folders.items():
            complain(f"left out, {title}: {folder}: {reason}")
    for run in made.found.older:
        complain(f"left out, older than a run of the same setting and seed: {run.folder}")
    for line in made.left_out:
        complain(line)
    for name, reason in made.empty.items():
        complain(f"comparison {name}: {reason}")
    if not made.files and not made.empty:
        complain("nothing to draw: no finished run was found")


if __name__ == "__main__":
    run_program(main)
