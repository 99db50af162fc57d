"""Generate text with finished runs' language models: `python generate.py <run> ... generate.prompts=100`.

A run is its folder below saves/, or a folder above several. The run's model completes every prompt of the test set; the
texts, their references and what they are worth go to `generated/` in the run's folder.
"""

from __future__ import annotations

from cutlayer.runtime.after.over_runs import Measure, over_runs
from cutlayer.runtime.ground.streams import run_program


def main(arguments: list[str] | None = None) -> int:
    """Generate with what the command line names; returns the exit status."""
    return over_runs(
        arguments,
        "Complete the prompts of the test set with a finished run's language model, and measure the texts.",
        "Keys: generate.beams=10, generate.length_penalty=0.8, generate.no_repeat=4, generate.tokens=64, "
        "generate.prompts=100, generate.metrics=[bleu,nist,rouge_l,cider,meteor], generate.start=final|best, "
        "generate.batch_size=16; generate.prompt='a text' goes on with that text and shows it; "
        "device, threads, dataset.root and others that only say where and how to compute.",
        "10, null or [bleu,nist]",
        _measure,
    )


def _measure() -> Measure:
    from cutlayer.runtime.after.saved import generate_run  # late: a mistake in the keys need not wait for torch

    return generate_run


if __name__ == "__main__":
    run_program(main)
