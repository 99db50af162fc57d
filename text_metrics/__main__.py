"""Figures of a file of generated text: `python -m cutlayer.text_metrics outputs.txt references.txt`."""

from __future__ import annotations

import argparse

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import print_errors, print_lines
from cutlayer.text_metrics import TEXT_METRICS, USUAL, check_metrics, score
from cutlayer.text_metrics.files import read_hypotheses, read_references


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each metric; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cutlayer.text_metrics", description="What generated text is worth against references."
    )
    parser.add_argument("hypotheses", help="a text a line")
    parser.add_argument("references", help="a text a line, an empty line between the groups; without any, one each")
    names = ",".join(TEXT_METRICS.names())
    parser.add_argument("--metrics", default=",".join(USUAL), help=f"of {names}; by default %(default)s")
    given = parser.parse_args(arguments)
    try:
        metrics = tuple(dict.fromkeys(given.metrics.split(",")))
        check_metrics(metrics)
        hypotheses = read_hypotheses(given.hypotheses)
        references = read_references(given.references, len(hypotheses))
        found = score(metrics, hypotheses, references)
    except ConfigError as error:
        print_errors(error)
        return 1
    print_lines(f"{len(hypotheses):,} text{'s' * (len(hypotheses) > 1)}, {sum(map(len, references)):,} references")
    print_lines(*(f"{name:<{max(map(len, found))}}  {value:.4f}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    run_program(main)
